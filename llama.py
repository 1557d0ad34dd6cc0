"""What the scripts know of Llamas: finding, loading, encoding, attention within packed rows, one pass that reads."""

import hashlib
import json
import logging
import os
import re
import resource
import warnings
from contextlib import suppress
from pathlib import Path

from common import MANIFEST, TASKS, fail, first_line, out_of_memory, read_json, say, sha256

MODELS = {
    # free to download; Apache 2.0
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "tinyllama": "TinyLlama/TinyLlama_v1.1",
    # gated: Meta's own licences, to be accepted at the models' pages
    "llama2": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3": "meta-llama/Meta-Llama-3-8B",
    "llama3.1": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
}
SMALL_FILES = ("*.json", "tokenizer*", "*.jinja", "README.md")  # what is fetched of a hub repository first
FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights, as safetensors calls them
COMPUTED = "rotary_emb.inv_freq"  # in the files of early Llamas, and no longer read
END_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>")  # Llama 3 has more than one
NO_NUMBERS = ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")  # settings that change no number
# in front of a chat template: the prompt of a template that asks for today's date would be another one every day
DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
CHAT_TEMPLATES = ("auto", "on", "off")
PLAIN_PROMPTS = "train and test with --chat-template off"
ATTENTIONS = ("auto", "packed", "flash_attention_2", "sdpa", "eager")


def quiet():
    """Turn the libraries' noise down: progress bars, deprecations of their own calls; their warnings stay."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft|bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says that its optional CPU kernels are not installed


def load_rows(output_dir, split):
    """One split of OUTPUT_DIR/dataset as a datasets.Dataset; exits 2 where it is missing, broken, empty or foreign."""
    from datasets import List, Value, disable_caching, disable_progress_bars, load_from_disk

    disable_progress_bars()
    disable_caching()  # else the tokens of every run stay behind in dataset/
    text, folder = Value("string"), Path(output_dir) / "dataset"
    columns = {"id": text, "task": text, "prompt": text, "completion": text, "references": List(text)}
    if not folder.is_dir():
        fail(f"no dataset at {folder}: run build_dataset.py first")
    try:
        rows = load_from_disk(str(folder / split))
        # load_from_disk hashes it once more; dataset_report.json has the one that was written
        rows._fingerprint = json.loads((folder / split / "state.json").read_text())["_fingerprint"]
        missing = [name for name, kind in columns.items() if rows.features.get(name) != kind]
        missing = missing or [name for name in columns if rows.data.column(name).null_count]
    except IndexError:  # how datasets reads back a split that was saved without rows
        rows, missing = [], []
    except Exception as error:  # whatever the libraries raise, the folder is not a whole data set
        fail(f"cannot read {split} of {folder} ({first_line(error)}): run build_dataset.py again")
    if missing:
        fail(f"{split} of {folder} has no column {', '.join(missing)}, or not as text: run build_dataset.py again")
    if len(rows) == 0:
        fail(f"{split} of {folder} is empty: run build_dataset.py with more examples")
    if unknown := set(rows.unique("task")) - set(TASKS):
        fail(f"{split} of {folder} holds an unknown task {min(unknown)}: run build_dataset.py again")
    return rows


def rows_of(rows, task):
    return rows.filter(lambda name: name == task, input_columns="task")


def find_model(model):
    """The hub id, or the absolute path of the local folder, that `model` names; exits 2 where it can be neither."""
    model = MODELS.get(model, model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            fail(f"{model} has no config.json: give a folder laid out like a model's hub repository")
        return os.path.abspath(folder)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        fail(f"unknown model {model}: neither one of {', '.join(MODELS)}, nor a hub id (owner/name), nor a folder")
    return model


def fetch(model, weights=True):
    """The local folder with a model's files: its own, or of a hub id the hub cache's, downloaded where need be."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        patterns = (*SMALL_FILES, "*.safetensors") if weights else SMALL_FILES
        return Path(snapshot_download(model, allow_patterns=patterns))
    except GatedRepoError:  # before the next one: it is one of its kind
        fail(f"{model} is gated: accept its licence at https://huggingface.co/{model}, then run: hf auth login")
    except RepositoryNotFoundError:
        fail(f"there is no model {model} on the hub, or it is private: check the name, or run: hf auth login")
    except Exception as error:  # a dozen kinds, from a hub that cannot be reached to a full disk
        fail(f"cannot load {model} ({first_line(error)}): check the name and the network, or give a local folder")


def weight_files(model):
    """The safetensors files that transformers loads of a model, sorted: a whole one goes before an index."""
    folder = fetch(model)
    shards, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pth")]
    if pickles and not shards[0].is_file() and not index.is_file():
        fail(f"{model} has no model.safetensors, only {pickles[0].name}, a pickle: convert it to safetensors")
    if index.is_file() and not shards[0].is_file():
        try:
            names = json.loads(index.read_text())["weight_map"].values()
            shards = sorted({folder / Path(name).name for name in names})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{model} has a broken {index.name} ({first_line(error)}): get it again")
    for path in shards:
        if not path.is_file():
            fail(f"{model} has no {path.name}: get the missing file")
    return shards


def tensors_in(path):
    """(name, tensor) in turn, each opened for it alone: what was read of a mapped file counts as memory."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
    for name in names:
        with safe_open(path, "pt") as file:
            yield name, file.get_tensor(name)


def weights_identity(model):
    """What a model computes, by content: the first digits of the SHA-256 of each file and of its settings, by +."""
    files = [path.resolve() for path in weight_files(model)]
    # the hub's cache names a file by its SHA-256
    digests = [path.name if re.search("/blobs/[0-9a-f]{64}$", str(path)) else sha256(path) for path in files]
    config = load_config(model)
    settings = {name: getattr(config, name) for name in type(config).__annotations__ if name not in NO_NUMBERS}
    digests.append(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest())
    return "+".join(digest[:16] for digest in digests)


def load_failed(model, error):
    if out_of_memory(error):  # common.script reports it
        raise error
    where = "in " if Path(model).is_dir() else ""
    fail(f"cannot load the model {where}{model} ({first_line(error)}): a file of it is missing or broken")


def load_config(model):
    """The model's config, of a Llama's own settings alone; exits 2 where it is no Llama's, or of quantised weights."""
    folder = fetch(model, weights=False)
    from transformers import LlamaConfig

    # a Llama's own settings alone: what other tools' sessions left there, such as output_attentions, is not obeyed
    names = {*LlamaConfig.__annotations__, "rope_theta", "rope_scaling", "tokenizer_class"}
    names -= {"use_cache", "attention_dropout", "pretraining_tp"}
    try:
        for path in (folder / name for name in ("config.json", "generation_config.json", "tokenizer_config.json")):
            if path.is_file() and not read_json(path):  # transformers would find it late, or take other settings
                fail(f"{path} is empty, or no JSON object in plain UTF-8 without a BOM: save it so, or get it again")
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if content.get("model_type") != "llama":
            fail(f"{model} is a {content.get('model_type', 'nameless')} model: these scripts train Llamas")
        if content.get("quantization_config") or content.get("compression_config"):
            fail(f"{model} is quantised: take the 16-bit model it was made from")
        return LlamaConfig(**{name: content[name] for name in names & content.keys()}, name_or_path=model)
    except Exception as error:
        load_failed(model, error)


def check_weights(model, config):
    """Exit 2 unless the weight files have what the config asks for and nothing else; reads their headers alone."""
    import torch
    from safetensors import safe_open
    from transformers import LlamaForCausalLM

    found = {}
    try:
        for path in weight_files(model):
            with safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in set(file.keys()) if not name.endswith(COMPUTED)}
                found |= {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}
        with torch.device("meta"):
            expected = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
        if config.tie_word_embeddings:  # then it need not be there
            found.setdefault("lm_head.weight", (expected["lm_head.weight"], FLOATS[0]))
    except Exception as error:
        load_failed(model, error)
    again = "load it by AutoModelForCausalLM, and save that"
    if {"embed_tokens.weight", "lm_head.weight"} <= found.keys():
        fail(f"{model} names its weights as AutoModel saves them, without model. in front: {again}")
    if missing := expected.keys() - found.keys():
        fail(f"{model} lacks weights ({min(missing)}, {len(missing)} in all): get it again, or mend its config.json")
    for name, (shape, kind) in sorted(found.items()):
        if name not in expected:
            fail(f"{model} has {name}, for which its config.json has no place: mend that file, or {again}")
        if shape != expected[name]:
            fail(f"{model} has {name} as {shape}, its config.json asks for {expected[name]}: mend that file")
        if kind not in FLOATS:
            fail(f"{model} has {name} as {kind}: take its 16-bit weights")


def load_tokenizer(model, chat_template="auto"):
    """The model's tokenizer; a missing pad token is set to an existing one, nothing is added.

    It keeps a chat template only where prompts are to go through it: so do `encode`, and the folders it is saved to.
    """
    from transformers import AutoTokenizer

    folder = fetch(model, weights=False)
    if not any(folder.glob("tokenizer*.json")) and (folder / "tokenizer.model").is_file():
        # transformers makes another tokenizer of it, without BOS and without the blank in front
        fail(f"{model} has tokenizer.model but no tokenizer_config.json, which says how to use it: get that file, too")
    config = load_config(model) if (folder / "config.json").is_file() else None  # an adapter's folder has none
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    except Exception as error:
        load_failed(model, error)
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
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_identity(tokenizer):
    """What makes ids of a row, by content: the tokenizer, its chat template and its end token."""
    content = tokenizer.backend_tokenizer.to_str() + (tokenizer.chat_template or "") + tokenizer.eos_token
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def tokenizer_of(base, folder, chat_template="auto"):
    """The tokenizer of an adapter's folder where that holds one, else the base's; exits 2 where it has more tokens."""
    source = folder if folder and (Path(folder) / "tokenizer_config.json").is_file() else base
    tokenizer = load_tokenizer(str(source), chat_template)
    config = load_config(base)
    size, tokenizer.model_max_length = config.vocab_size, config.max_position_embeddings  # many have another one
    trained_with = folder and source == base and read_run(folder)["run"].get("tokenizer")
    if trained_with and trained_with != tokenizer_identity(tokenizer):
        say(f"warning: {folder} was trained with other prompts: another tokenizer, or another --chat-template")
    added = [token for token, number in tokenizer.get_vocab().items() if number >= size]
    if added:
        reason = f"the tokenizer in {source} has tokens beyond the {size} of {base} ({min(added)})"
        remedy = "merge where it was trained, and test that as --model" if folder else "resize the model, and save it"
        fail(f"{reason}: it is another model's, or was added to: {remedy}")
    return tokenizer


def compute_dtype():
    """bfloat16 where the GPU has it, float16 on older ones, float32 on the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def own_gpu(script):
    """One process takes one GPU: under a launcher that of its rank, else the first. Call it before CUDA is used.

    The Trainer would spread one process over all visible GPUs, which 4-bit weights do not survive.
    """
    import torch

    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return
    count = torch.cuda.device_count()  # asks the driver, and leaves CUDA_VISIBLE_DEVICES to be changed
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        say(f"taking one of {count} GPUs; for all of them: accelerate launch --num_processes {count} {script}")


def under_fsdp():
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def load_model(model, load_in_4bit, **options):
    """The base model: NF4 with double quantisation, or unquantised; by default in compute_dtype on the own device.

    options go to from_pretrained. Exits 2 where check_weights does.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = load_config(model)
    check_weights(model, config)
    dtype = options.get("dtype") or compute_dtype()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if under_fsdp() else torch.uint8,  # FSDP shards only tensors of one dtype
    )
    device = {"": int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"}
    options = {"dtype": dtype, "device_map": None if under_fsdp() else device} | options
    options["quantization_config"] = nf4 if load_in_4bit else None
    options["adapter_kwargs"] = {"subfolder": "config.json"}  # where none can be: one beside the base is not loaded
    try:
        loaded = AutoModelForCausalLM.from_pretrained(fetch(model), config=config, **options)
    except Exception as error:
        load_failed(model, error)
    loaded.name_or_path = loaded.config.name_or_path = model  # not its place in the hub's cache
    # transformers keeps a head apart that differs from the embeddings, whatever the config says
    loaded.config.tie_word_embeddings = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for module in loaded.modules():
        # bitsandbytes 0.50.2 repacks the weights in a CPU's first evaluation, for a bf16 kernel without a backward:
        # what is trained after that gets no gradient through the base. Keep the float32 path, which has one.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


def read_adapter(folder):
    """The base model that a PEFT adapter's folder names; exits 2 where the adapter is missing or broken."""
    config = Path(folder) / "adapter_config.json"
    if not config.is_file():
        fail(f"no adapter at {folder}: run train_llama.py first")
    settings = read_json(config)
    base = settings.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        fail(f"cannot read {config}, or it names no base model: run train_llama.py again")
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        fail(f"no adapter_model.safetensors in {folder}: run train_llama.py again")
    alpha = read_run(folder)["settings"].get("lora_alpha")  # an adapter from elsewhere does not say
    if alpha and (settings.get("lora_alpha") != alpha or settings.get("use_rslora") or settings.get("alpha_pattern")):
        say(f"warning: {config} scales the adapter otherwise than in training: it is taken as that file says")
    return base


def read_run(folder):
    """What train_llama.py noted of an adapter, as in run.json; "settings" and "run" are {} where it did not."""
    run, checkpoint = read_json(Path(folder) / "run.json"), read_json(Path(folder) / MANIFEST)
    if not run:
        run = {"settings": checkpoint.get("run"), "run": checkpoint.get("run")}
    return run | {name: run[name] if isinstance(run.get(name), dict) else {} for name in ("settings", "run")}


def load_adapter(model, folder):
    """`model` with the LoRA adapter of `folder` on it, ready for inference."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
        # beside LoRA on lm_head or embed_tokens PEFT saves that layer's own matrix, older versions not always
        least, most = (set(get_peft_model_state_dict(model, save_embedding_layers=some)) for some in (False, True))
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            if not least <= set(file.keys()) <= most:  # PEFT only warns, and leaves such layers as in the base
                raise ValueError("its tensors are not those that its config names")
        return model
    except Exception as error:  # a cut-off file, or shapes of another base
        reason = re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__  # PEFT's are of many lines
        fail(f"the adapter in {folder} does not load onto its base ({reason}): run train_llama.py again")


def end_tokens(model, tokenizer):
    """Ids that end a text: a completion's last, EOS, the generation config's that the tokenizer has, the family's."""
    ends = model.generation_config.eos_token_id
    vocabulary = tokenizer.get_vocab()
    own = {end for end in (ends if isinstance(ends, list) else [ends]) if end in vocabulary.values()}
    named = {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    trained = encode(tokenizer, {"id": ["sample"], "prompt": ["a"], "completion": [" a"]})["completion_ids"][0][-1]
    return {trained, tokenizer.eos_token_id} | own | named


def encode(tokenizer, rows):
    """Token ids of a batch of rows: {"prompt_ids", "completion_ids"}, lists of lists; the completion ends with EOS.

    The prompt is encoded as in generation, with one BOS, or none where the tokenizer puts none. The completion is what
    follows it when both are encoded together; a row whose prompt would be split otherwise then raises ValueError.
    With a chat template, the prompt is the user's turn and the completion the assistant's: see encode_chats.
    """
    if tokenizer.chat_template:
        prompts, wholes = encode_chats(tokenizer, rows)
    else:
        texts = [prompt + completion for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True)]
        options = {"split_special_tokens": True, "verbose": False}  # "</s>" in a dialogue is text, and ends nothing
        prompts = tokenizer(rows["prompt"], **options).input_ids
        wholes = [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts, **options).input_ids]
    completions = []
    for row_id, prompt, whole in zip(rows["id"], prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt or len(whole) <= len(prompt) + 1:
            remedy = f": its chat template does not fit, {PLAIN_PROMPTS}" if tokenizer.chat_template else ""
            reason = f"{row_id}: the tokens of the prompt are not those of prompt and completion together"
            raise ValueError(reason + remedy)
        completions.append(whole[len(prompt) :])
    return {"prompt_ids": prompts, "completion_ids": completions}


def encode_chats(tokenizer, rows):
    """Ids of the prompts and of the whole rows, as a server's chat endpoint makes them from one message of a user.

    A prompt goes as far as the answer's first token, a whole row to the token that ends the assistant's turn. Special
    tokens are those that the template writes; in a dialogue they are text. ValueError where the template is to blame.
    """
    chats = [[{"role": "user", "content": prompt}] for prompt in rows["prompt"]]
    answers = [[{"role": "assistant", "content": completion.strip()}] for completion in rows["completion"]]
    options = {"return_dict": False, "sanitize_control_tokens": True}
    try:
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, **options)
        wholes = tokenizer.apply_chat_template([c + a for c, a in zip(chats, answers, strict=True)], **options)
        shown = tokenizer.apply_chat_template(chats[0] + answers[0], tokenize=False)
    except Exception as error:  # a template is a program
        raise ValueError(f"its chat template fails ({first_line(error)}): {PLAIN_PROMPTS}") from error
    if not all(text.strip() in shown for text in (rows["prompt"][0], rows["completion"][0])):
        raise ValueError(f"its chat template does not write the whole text it is given: {PLAIN_PROMPTS}")
    ends = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    for prompt, whole in zip(prompts, wholes, strict=True):
        end = next((i + 1 for i in range(len(prompt), len(whole)) if whole[i] in ends), 0)
        del whole[end:]  # what stands behind the end, mostly a newline, is never generated
    return prompts, wholes


def packed_attention(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_):
    """Causal attention within each row of a packed sequence, for transformers' AttentionInterface.

    A dense mask over the sequence, as sdpa needs it, costs its square; this costs the sum of the rows' squares.
    query [1, heads, tokens, head_dim], key and value the same with fewer heads, cu_seq_lens_q [rows + 1]: where each
    row begins, and the end (TRL's collator passes it). Returns [1, tokens, heads, head_dim] and None.
    """
    import torch

    if cu_seq_lens_q is None:  # never guess: plain causal attention would let the rows see one another
        raise ValueError("packed attention was not told where the rows begin (cu_seq_lens_q)")
    if query.is_cuda and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        out = varlen_attn(query, key, value, *bounds, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        return out[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    out = [attend(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in rows]
    return torch.cat(out, dim=2).transpose(1, 2), None


def choose_attention(name):
    """Register packed_attention and resolve "auto": flash attention where it is installed, else packed attention.

    On CUDA that runs torch's varlen kernel, which needs an Ampere GPU or newer: older ones get sdpa.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.utils import is_flash_attn_2_available

    AttentionInterface.register("packed", packed_attention)
    if name == "auto" and is_flash_attn_2_available():
        return "flash_attention_2"
    if name not in ("auto", "packed"):
        return name
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        say("packed attention needs a newer GPU: taking sdpa, which is slower with long sequences")
        return "sdpa"
    return "packed"


def read(model, prompts, completions, cache=None):
    """One pass over whole rows (lists of ids), flattened: nothing is padded, and no row attends to another.

    Returns the logits [tokens, vocabulary] before each completion token, all rows' in turn, and those tokens' ids.
    `model` attends by "packed", or by anything where there is one row. `cache` gets the keys and values.
    """
    import torch

    ids = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    bounds = torch.tensor([0, *map(len, ids)]).cumsum(0)
    starts = zip(prompts, bounds.tolist(), bounds.tolist()[1:], strict=False)
    golds = torch.cat([torch.arange(start + len(prompt), end) for prompt, start, end in starts])
    flat = torch.tensor(sum(ids, []), device=model.device)
    logits = model(
        input_ids=flat[None],
        position_ids=torch.cat([torch.arange(len(row)) for row in ids]).to(model.device)[None],
        past_key_values=cache,
        use_cache=cache is not None,
        cu_seq_lens_q=bounds.int().to(model.device),
        max_length_q=max(map(len, ids)),
        logits_to_keep=golds.to(model.device) - 1,  # of the completions only
    ).logits[0]
    return logits, flat[golds]


def peak_memory():
    """Highest memory so far of this process, in GB: on the GPU, or on the host where there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
