"""How test_llama.py loads a model and lets it answer: each prompt is read once, for loss and prediction.

A prompt is read unpadded; a Decoder continues from its keys and values, STRIDE tokens at a time: after each stride the
rows that have ended are left out. On 60 dialogues and a CPU, transformers' generate and a pass for the loss take 3.4
times as long (benchmarks/testing.py).
"""

import contextlib
import functools
import math
import os

import torch
from transformers import DynamicCache

from pipeline import machine, models
from pipeline.attention import MAX_NLL, choose_attention, losses_of, read
from pipeline.script import fail, first_line, out_of_memory, say
from pipeline.testing import predictions
from pipeline.testing.decoder import Decoder

READ_TOKENS = 4096  # of a pass over whole rows
FEW_ROWS = 8  # that a CPU multiplies faster as W x'
STRIDE = 16  # new tokens of a batch after which the rows that have ended leave it
WINDOW = 1024  # tokens of the general text that are read at once


def load_system(base, folder, in_4bit, compare):
    """The LlamaForCausalLM, with the adapter of `folder` where there is one, and a context that switches that off.

    4-bit weights are unpacked at every use, or once where there is room: the same numbers (bitsandbytes computes them
    in that type), in four times the memory on a GPU, eight times on a CPU.
    """
    model = models.load_model(base, in_4bit).eval()
    if in_4bit and has_room(model):
        model = model.dequantize()
    few_rows_first(model)
    model.greedy_decoder = Decoder(model)
    if not folder:
        return model, None
    from pipeline.lora import fuse_lora  # and PEFT

    # each alone: a row of NaN in the embeddings, of a token that never occurs, spoils no other
    ids = torch.arange(0, model.config.vocab_size, model.config.vocab_size // 64 + 1, device=model.device)[:, None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        tuned = models.load_adapter(model, folder)
        for name, parameter in tuned.named_parameters():  # as in training; PEFT would cast each input to float32
            if ".lora_" in name:
                parameter.data = parameter.data.to(model.dtype)
        fuse_lora(tuned)
        with tuned.disable_adapter():
            change = (model(input_ids=ids).logits - before).nan_to_num().abs().max() / before.nan_to_num().abs().max()
    # PiSSA and its kin take a part out of the base; others bring a matrix or biases of their own
    if compare and not change < 0.01:
        reason = f"the adapter in {folder} changes its base when it is loaded, as PiSSA does"
        fail(f"{reason}: give --no-compare-with-base, and test the base by itself with --model {base} --name base")
    return tuned.get_base_model(), tuned.disable_adapter


def has_room(model):
    """Whether all of the weights fit unpacked: on a GPU beside the packed ones and 8 GB for a batch, else in half."""
    if torch.cuda.is_available():
        return 2 * model.num_parameters() + 8e9 < torch.cuda.mem_get_info(model.device)[0]
    return 4 * model.num_parameters() < machine.host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / 2


def few_rows_first(model):
    """On a CPU, compute the products of a few rows as W x': as x W' they take MKL up to seven times as long.

    Testing 6 + 6 rows of SmolLM2-135M on two cores took 44 s with it and 49 without, the dialogues 16 and 22.
    """
    if model.device.type == "cpu":
        for module in model.modules():
            if type(module) is torch.nn.Linear and module.bias is None:
                module.forward = functools.partial(linear, module)


def linear(module, x):
    rows = x.flatten(0, -2)
    if 1 < len(rows) <= FEW_ROWS:
        return (module.weight @ rows.T).T.contiguous().view(*x.shape[:-1], -1)
    return torch.nn.functional.linear(x, module.weight)


def read_rows(model, prompts, completions, attention):
    """Each completion's negative log likelihood (nats), and the prompts' keys and values, padded left.

    Whole rows are read in passes of about READ_TOKENS: on a CPU larger ones wait for memory.
    """
    model.set_attn_implementation(attention)
    nll, caches, start = [], [], 0
    sizes = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    while start < len(sizes):
        end = start + 1
        while end < len(sizes) and sum(sizes[start : end + 1]) <= READ_TOKENS:
            end += 1
        part = slice(start, end)
        caches.append(DynamicCache())
        logits, golds = read(model, prompts[part], completions[part], caches[-1])
        losses = losses_of(logits, golds).split([len(gold) for gold in completions[part]])
        nll += [row_losses.sum().item() for row_losses in losses]
        start = end
    return nll, padded(caches, prompts, completions)


def padded(caches, prompts, completions):
    """Each layer's keys and values, [rows, heads, longest prompt - 1, head_dim], padded left, without last tokens."""
    sizes = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    offsets = torch.arange(lengths.max() - 1) - (lengths.max() - lengths)[:, None]
    places = (sizes.cumsum(0) - sizes)[:, None] + offsets.clamp(min=0)  # padding repeats a row's first token
    places = places.to(caches[0].layers[0].device)
    layers = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        keys, values = (torch.cat([getattr(part, name)[0] for part in parts], dim=1) for name in ("keys", "values"))
        layers.append([flat[:, places].transpose(0, 1) for flat in (keys, values)])
        for part in parts:
            part.keys = part.values = None
    return layers


def test_rows(model, prompts, completions, attention, new, end_of, bar):
    """nll (nats) and greedy prediction (list of at most `new` ids, an ending one included) of each row.

    end_of: the answer_end of the task. bar: moves by one for each row that has ended.
    """
    decoder = model.greedy_decoder
    nll, layers = read_rows(model, prompts, completions, attention)
    model.set_attn_implementation("sdpa")
    width = max(map(len, prompts))
    decoder.begin(layers, new)
    written = [[] for _ in prompts]
    going = left = list(range(len(prompts)))  # places of the rows that have not ended; left: of these in the batch
    for length in range(0, new, STRIDE):
        going = [going[i] for i in left]
        more = min(STRIDE, new - length)
        decoder.keep(left, width - 1 + length, more)

        def all_ended(ids, going=going):
            return all(end_of(written[place] + row) is not None for place, row in zip(going, ids, strict=True))

        last_ids = [(prompts[place] + written[place])[-1] for place in going]
        starts = [width - len(prompts[place]) for place in going]
        for place, ids in zip(going, decoder.write(last_ids, starts, more, all_ended), strict=True):
            written[place] += ids
        left = [i for i, place in enumerate(going) if end_of(written[place]) is None]
        bar.update(len(going) - len(left))
        if not left:
            break
    decoder.layers = []
    bar.update(len(left))
    return [(loss, row[: end_of(row)]) for loss, row in zip(nll, written, strict=True)]


def in_halves(model, prompts, completions, *options, bar):
    """test_rows, of half the rows at a time where GPU memory ends."""
    before = bar.n
    try:
        return test_rows(model, prompts, completions, *options, bar)
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:  # the latter from a graph
        if not out_of_memory(error):
            raise
        if len(prompts) == 1:
            reason = f"one row is too much for the GPU's memory ({first_line(error)})"
            fail(f"{reason}: try --load-in-4bit", in_any_process=True)
    model.greedy_decoder.clear()
    torch.cuda.empty_cache()
    say(f"{len(prompts)} rows are too much for the GPU's memory: halved; try a lower --max-batch-tokens")
    bar.n, middle = before, len(prompts) // 2
    first = in_halves(model, prompts[:middle], completions[:middle], *options, bar=bar)
    return first + in_halves(model, prompts[middle:], completions[middle:], *options, bar=bar)


def answer_end(tokenizer, ends, one_line):
    """The function that a prediction's ids go to: how many go to its end, that one included, or None.

    ends: ids that end a text. one_line: a line's end does, too, behind something that is not blank.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    decode = functools.cache(lambda token: tokenizer.decode([token], **options))

    def end_of(ids):
        blank = True
        for length, token in enumerate(ids, 1):
            text = decode(token) if one_line else ""
            if token in ends or "\n" in (text.lstrip() if blank else text):
                return length
            blank = blank and not text.strip()

    return end_of


def test_batch(model, tokenizer, rows, attention, new, ends, one_line, bar):
    """What is known of each row after it, under the names of the predictions file."""
    prompts = [row["prompt_ids"] for row in rows]
    completions = [row["completion_ids"] for row in rows]
    end_of = answer_end(tokenizer, ends, one_line)
    results = []
    tested = in_halves(model, prompts, completions, attention, new, end_of, bar=bar)
    for row, (nll, ids) in zip(rows, tested, strict=True):
        if not nll < MAX_NLL * len(row["completion_ids"]):  # NaN too
            reason = f"{row['id']} has a log-likelihood of {-nll}: the model diverged"
            fail(f"{reason}, train it again with a lower learning rate", in_any_process=True)
        kept = [token for token in ids if token not in ends]
        text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        result = {"prediction": text.split("\n")[0].strip() if one_line else text, "nll": nll}
        results.append(result | {"new_tokens": len(ids), "hit_max_new_tokens": end_of(ids) is None})
    return results


def test_general_text(text, tokenizer, model, adapter_off, run):
    """{system: perplexity of the text, nll_sum (nats), tokens}"""
    model.set_attn_implementation(choose_attention("packed"))
    ids = tokenizer(text, split_special_tokens=True, verbose=False).input_ids
    front = ids[:1] if ids[0] == tokenizer.bos_token_id else []  # of each window
    step = min(WINDOW, model.config.max_position_embeddings) - len(front)
    parts = [front + ids[start : start + step] for start in range(len(front), len(ids), step)]
    parts = [part for part in parts if len(part) > 1]
    figures, tokens = {}, sum(len(part) - 1 for part in parts)
    if not tokens:
        fail("the text of --general-text is too short: it has a single token")
    for system, prefix in predictions.systems(run).items():
        with adapter_off() if prefix else contextlib.nullcontext(), torch.inference_mode():
            nll = sum(losses_of(*read(model, [part[:1]], [part[1:]])).sum().item() for part in parts)
        if not nll < MAX_NLL * tokens:  # NaN too
            fail(f"the general text has a log-likelihood of {-nll}: the {system} model diverged")
        figures[system] = {"perplexity": math.exp(nll / tokens), "nll_sum": nll, "tokens": tokens}
    return figures
