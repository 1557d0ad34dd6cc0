"""Tokenizers, chat templates, and the token ids of a row."""

import json
from contextlib import suppress
from pathlib import Path

from pipeline import models
from pipeline.files import digest, read_json
from pipeline.script import fail, first_line, say

END_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>")  # Llama 3 has more than one
# in front of a chat template: the prompt of a template that asks for today's date would be another one every day
DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
CHAT_TEMPLATES = ("auto", "on", "off")
PLAIN_PROMPTS = "train and test with --chat-template off"


def load_tokenizer(model, chat_template="auto"):
    """The model's tokenizer; a missing pad token is set to an existing one, nothing is added.

    It keeps a chat template only where prompts are to go through it: so do `encode`, and the folders it is saved to.
    """
    from transformers import AutoTokenizer

    folder = models.fetch(model, weights=False)
    if not any(folder.glob("tokenizer*.json")) and (folder / "tokenizer.model").is_file():
        # transformers makes another tokenizer of it, without BOS and without the blank in front
        fail(f"{model} has tokenizer.model but no tokenizer_config.json, which says how to use it: get that file, too")
    config = models.load_config(model) if (folder / "config.json").is_file() else None  # an adapter's folder has none
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    except Exception as error:
        models.load_failed(model, error)
    if hasattr(tokenizer, "legacy"):  # transformers 5 does not save it, and a chat would be split otherwise
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        setattr(tokenizer, name, getattr(tokenizer, name) or None)  # the first Llamas have ""
    if not tokenizer.eos_token:
        fail(f"the tokenizer of {model} names no end token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token is None:  # labels and attention are masked by length, so EOS is still learned
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer("a").input_ids[:2].count(tokenizer.bos_token_id) > 1:
        fail(f"the tokenizer of {model} puts BOS in front twice: mend its post_processor in tokenizer.json")
    template = None
    if tokenizer.chat_template and chat_template != "off":
        with suppress(ValueError):  # of several none is the default one
            template = tokenizer.get_chat_template()
        if not isinstance(template, str):
            fail(f"the tokenizer of {model} has no single chat template: {PLAIN_PROMPTS}")
        if "strftime_now" in template and DATE not in template:
            template = DATE + template
    elif chat_template == "on":
        fail(f"the tokenizer of {model} has no chat template: take the instruct model, or give --chat-template off")
    if not template and tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
        fail(f"the tokenizer of {model} puts EOS behind every text: mend its post_processor in tokenizer.json")
    tokenizer.chat_template = template
    return tokenizer


def write_for_others(folder):
    """Change a folder's tokenizer_config.json, if there is one, so that transformers 4 and llama.cpp read it."""
    path = Path(folder) / "tokenizer_config.json"
    config = read_json(path)
    # older folders have the template there; llama.cpp would put EOS behind a prompt, which no row of training had
    kept = {name: value for name, value in config.items() if name not in ("chat_template", "add_eos_token")}
    if kept.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, which 4 does not know
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(kept.get("extra_special_tokens"), list):  # for 4 a dict
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    if kept != config:
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def tokenizer_identity(tokenizer):
    """What makes ids of a row, by content: the tokenizer, its chat template and its end token."""
    return digest(tokenizer.backend_tokenizer.to_str() + (tokenizer.chat_template or "") + tokenizer.eos_token)


def tokenizer_of(base, folder, chat_template="auto"):
    """The tokenizer of an adapter's folder where it has one, else the base's; exits 2 where it has more tokens."""
    files = {path.name for path in Path(folder).glob("*")} if folder else set()
    whole = "tokenizer_config.json" in files and files & {"tokenizer.json", "tokenizer.model", "vocab.json"}
    source = folder if whole else base
    tokenizer = load_tokenizer(str(source), chat_template)
    config = models.load_config(base)
    size, tokenizer.model_max_length = config.vocab_size, config.max_position_embeddings  # many have another one
    trained_with = folder and models.read_run(folder)["run"].get("tokenizer")
    if trained_with and trained_with != tokenizer_identity(tokenizer):
        say(f"warning: {folder} was trained with other prompts: another tokenizer, or another --chat-template")
    added = [token for token, number in tokenizer.get_vocab().items() if number >= size]
    if added:
        reason = f"the tokenizer in {source} has tokens beyond the {size} of {base} ({min(added)})"
        remedy = "merge where it was trained, and test that as --model" if folder else "resize the model, and save it"
        fail(f"{reason}: it is another model's, or was added to: {remedy}")
    return tokenizer


def end_tokens(base, tokenizer):
    """Ids that end a text: a completion's last, EOS, the generation config's that the tokenizer has, the family's."""
    generation = read_json(models.fetch(base, weights=False) / "generation_config.json")
    ends = generation.get("eos_token_id") if generation else models.load_config(base).eos_token_id
    vocabulary = tokenizer.get_vocab()
    own = {end for end in (ends if isinstance(ends, list) else [ends]) if end in vocabulary.values()}
    named = {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    trained = encode(tokenizer, {"id": ["sample"], "prompt": ["a"], "completion": [" a"]})["completion_ids"][0][-1]
    return {trained, tokenizer.eos_token_id} | own | named


def encode(tokenizer, rows, shots=()):
    """Token ids of a batch of rows: {"prompt_ids", "completion_ids"}, lists of lists; the completion ends with EOS.

    The prompt is encoded as in generation, with one BOS, or none where the tokenizer puts none. The completion is what
    follows it when both are encoded together; a row whose prompt would be split otherwise then raises ValueError.
    With a chat template, the prompt is the user's turn and the completion the assistant's: see encode_chats.
    shots: [(prompt, completion)] of solved examples that each prompt begins with.
    """
    if tokenizer.chat_template:
        prompts, wholes = encode_chats(tokenizer, rows, shots)
    else:
        examples = "".join(f"{prompt}{completion}\n\n" for prompt, completion in shots)
        prompt_texts = [examples + prompt for prompt in rows["prompt"]]
        texts = [prompt + completion for prompt, completion in zip(prompt_texts, rows["completion"], strict=True)]
        options = {"split_special_tokens": True, "verbose": False}  # "</s>" in a dialogue is text, and ends nothing
        prompts = tokenizer(prompt_texts, **options).input_ids
        wholes = [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts, **options).input_ids]
    completions = []
    for row_id, prompt, whole in zip(rows["id"], prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt or len(whole) <= len(prompt) + 1:
            remedy = f": its chat template does not fit, {PLAIN_PROMPTS}" if tokenizer.chat_template else ""
            reason = f"{row_id}: the tokens of the prompt are not those of prompt and completion together"
            raise ValueError(reason + remedy)
        completions.append(whole[len(prompt) :])
    return {"prompt_ids": prompts, "completion_ids": completions}


def encode_chats(tokenizer, rows, shots=()):
    """Ids of the prompts and of the whole rows, as a server's chat endpoint makes them from one message of a user.

    A prompt goes as far as the answer's first token, a whole row to the token that ends the assistant's turn; solved
    examples are earlier turns. Special tokens are those that the template writes; in a dialogue they are text.
    ValueError where the template is to blame.
    """
    examples = [turn for shot in shots for turn in turns(*shot)]
    chats = [examples + turns(*row) for row in zip(rows["prompt"], rows["completion"], strict=True)]
    options = {"return_dict": False, "sanitize_control_tokens": True}
    try:
        unanswered = [chat[:-1] for chat in chats]
        prompts = tokenizer.apply_chat_template(unanswered, add_generation_prompt=True, **options)
        wholes = tokenizer.apply_chat_template(chats, **options)
        shown = tokenizer.apply_chat_template(chats, tokenize=False)
    except Exception as error:  # a template is a program
        raise ValueError(f"its chat template fails ({first_line(error)}): {PLAIN_PROMPTS}") from error
    for place, (chat, text) in enumerate(
        zip(chats, shown, strict=True)
    ):  # some leave out what is between <think> and </think>
        dropped = [turn["content"].strip() not in text for turn in chat]
        if any(dropped):
            what = "a solved example" if any(dropped[:-2]) else f"row {rows['id'][place]}"
            raise ValueError(f"its chat template does not write the whole text of {what}: {PLAIN_PROMPTS}")
    ends = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    for prompt, whole in zip(prompts, wholes, strict=True):
        end = next((i + 1 for i in range(len(prompt), len(whole)) if whole[i] in ends), 0)
        del whole[end:]  # what follows the end, mostly a newline, is never generated
    return prompts, wholes


def turns(prompt, completion):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
