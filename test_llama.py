"""Test the adapter of train_llama.py on the test split: perplexity and greedy predictions, tuned beside base.

The base is the same model with the adapter switched off, in the same run. Perplexity is exp(summed negative log
likelihood / scored tokens) over the gold completion and its EOS after the exact inference prompt. A killed run goes on
where it was when its command is given again. This is a script of the pipeline, not a pytest file.

Reads:  OUTPUT_DIR/dataset/ (test) and OUTPUT_DIR/adapter/, whose adapter_config.json names the base model.
Writes: OUTPUT_DIR/samsum_predictions.json and trivia_qa_predictions.json; with --name NAME,
        samsum_predictions_NAME.json and so on. Until one is whole, .samsum_predictions.part0.jsonl holds its batches.

    python test_llama.py
    python test_llama.py --model outputs/merged --name merged
    accelerate launch --num_processes 2 test_llama.py
"""

import contextlib
import functools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import common
import llama
from common import TASKS, fail, first_line, is_main, say

# Settings: edit here, or override for one run on the command line.
ADAPTER = "auto"  # a folder, or none: the base alone; auto: OUTPUT_DIR/adapter, or none where MODEL is given
MODEL = "auto"  # a hub id or folder, such as outputs/merged; auto: the base that the adapter names
NAME = ""  # of a further pair of prediction files
COMPARE_WITH_BASE = True  # also test the base, with the adapter switched off
LOAD_IN_4BIT = None  # True, False; None: as the adapter was trained, and a model without one in 16 bit
MAX_BATCH_TOKENS = 16384  # tokens of a batch, prompts and predictions; an 8B model's keys and values: 2 GB
SAMSUM_MAX_NEW_TOKENS = 96  # the longest gold summaries have some 80 tokens
TRIVIA_QA_MAX_NEW_TOKENS = 24  # an answer is a few words; it ends at the line's end
OVERWRITE = False  # replace predictions of another run
OUTPUT_DIR = "outputs"  # holds dataset/ and adapter/, gets the predictions

# Fixed
UNBOUND = ("adapter", "model", "load_in_4bit", "name", "overwrite", "output_dir")  # resolved, or without an influence
MAX_NLL = 700  # nats a token: exp(700) is about the largest that a float holds
SHOWN = 3  # examples of each task printed at the end


def parse_args(argv=None):
    args = common.parse_settings(sys.modules[__name__], argv)
    if not re.fullmatch(r"[\w-]*", args.name):
        fail("--name must be made of letters, digits, dashes and underscores")
    return args


def choose_system(args):
    """What is tested: the model's name, the adapter's folder or None, whether in 4 bits."""
    given = args.model != "auto"
    alone = args.adapter == "none" or (args.adapter == "auto" and given)
    if alone and given:
        return llama.find_model(args.model), None, bool(args.load_in_4bit)
    folder = Path(args.output_dir, "adapter") if args.adapter in ("auto", "none") else Path(args.adapter)
    base = llama.read_adapter(folder)
    base = llama.find_model(args.model if given else base)
    in_4bit = args.load_in_4bit
    if in_4bit is None:  # an adapter from elsewhere does not say: QLoRA
        in_4bit = bool(common.read_json(folder / "run.json").get("settings", {}).get("load_in_4bit", True))
    return base, None if alone else folder, in_4bit


def run_identity(args, base, folder, in_4bit, rows):
    """What has to be the same for a run to go on where it was, `settings` in the files: weights, rows, settings."""
    import torch

    run = {
        "model": base,
        "weights": llama.weights_identity(base),
        "adapter": common.sha256(folder / "adapter_model.safetensors")[:16] if folder else "none",
        "4_bit": in_4bit,
        "rows": rows._fingerprint,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    return run | {name: value for name, value in vars(args).items() if name not in UNBOUND}


def systems(run):
    """{name of a system: what its columns begin with}."""
    both = run["adapter"] != "none" and run["compare_with_base"]
    return {"tuned": "", "base": "base_"} if both else {"tuned": ""}


def output_path(args, task):
    return Path(args.output_dir, f"{task}_predictions{'_' + args.name if args.name else ''}.json")


def work_files(path):
    """The unfinished work beside a predictions file, one for each process that took part: a line a batch."""
    return sorted(path.parent.glob(f".{path.stem}.part*.jsonl"))


def read_work(path):
    """[{"settings", "batch", "examples"}] of all batches done so far; a kill costs the batch at hand, no more."""
    done = []
    for part in work_files(path):
        for line in part.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # half written
                done.append(json.loads(line))
    return done


def finished(args, path, run):
    """Whether the predictions of this run stand at `path`; exits 2 where they, or work for them, are of another."""
    if args.overwrite:
        return False
    stored = common.read_json(path).get("settings")
    if path.exists() and stored == run:
        return True
    begun = [item["settings"] for item in read_work(path)]
    if run in begun:  # what else stands there was to be replaced
        return False
    if path.exists():
        begun.append(stored if isinstance(stored, dict) else {})
    for other in begun:
        common.refuse_another(path, other, run, "give its settings again, or --overwrite, or --name for further files")
    return False


def load_tokenizer(base, folder):
    """The adapter's tokenizer where its folder holds one, else the base's; exits 2 where it has tokens of its own."""
    source = folder if folder and (folder / "tokenizer_config.json").is_file() else base
    tokenizer = llama.load_tokenizer(str(source))
    size = llama.load_config(base).vocab_size
    vocabulary = tokenizer.get_vocab()
    added = [token for token in sorted(vocabulary, key=vocabulary.get) if vocabulary[token] >= size]
    if added:
        fail(
            f"the tokenizer in {source} has tokens beyond the {size} of {base} ({', '.join(added[:3])}): it is "
            "another model's, or tokens were added: merge it where it was trained, and test that as --model"
        )
    return tokenizer


def load_system(base, folder, in_4bit, compare):
    """The model in evaluation mode, with the adapter of `folder` where there is one.

    The CPU unpacks 4-bit weights for every use. Where host memory is ample they are unpacked once: the same numbers
    (float32 holds every NF4 value times its scale as bitsandbytes computes it), in eight times the memory.
    """
    import torch
    from transformers.utils import logging

    model = llama.load_model(base, in_4bit).eval()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("WORLD_SIZE", 1))
    if in_4bit and not torch.cuda.is_available() and 4 * model.num_parameters() < memory / 2:
        logging.set_verbosity_error()  # it tells what it does
        model = model.dequantize()
        logging.set_verbosity_warning()
    if not folder:
        return model
    before = probe(model)
    model = llama.load_adapter(model, folder)
    if compare:
        with model.disable_adapter():
            change = (probe(model) - before).abs().max() / before.abs().max()
        # PiSSA and its kin take a part out of the base; others bring a matrix or biases of their own
        if not change < 0.01:
            fail(
                f"the adapter in {folder} changes its base when it is loaded, as PiSSA does: switched off, it is not "
                f"the base. Give --no-compare-with-base; test the base by itself with --model {base} --name base"
            )
    return model


def probe(model):
    """Logits of some sixty tokens from all over the vocabulary."""
    import torch

    size = model.config.vocab_size
    ids = torch.arange(0, size, size // 64 + 1, device=model.device)
    with torch.inference_mode():
        return model(input_ids=ids[None]).logits.float()


@dataclass
class Task:
    """What testing a task's rows takes; a row is named by its place in the test split."""

    name: str
    rows: object  # datasets.Dataset
    prompts: list  # of ids
    completions: list  # of ids
    plan: list  # batches, lists of rows; without those that are too long for the model
    new: int  # tokens of a prediction at most
    ends: set  # ids that end a prediction and are no part of it
    line_ends: set  # ids that end a prediction, with text before the line's end
    attention: str  # that reads


def prepare(args, name, rows, tokenizer, ends, limit):
    """The Task of some rows; those that do not fit the `limit` of the model's context are left out of its plan."""
    try:
        ids = llama.encode(tokenizer, rows.to_dict())
    except ValueError as error:
        fail(f"cannot test: {first_line(error)}")
    prompts, completions = ids["prompt_ids"], ids["completion_ids"]
    new = getattr(args, f"{name}_max_new_tokens")
    lengths = [len(p) + max(new, len(c)) for p, c in zip(prompts, completions, strict=True)]
    fitting = {row: length for row, length in enumerate(lengths) if length <= limit}
    if not fitting:
        flag = f"--{name.replace('_', '-')}-max-new-tokens"
        fail(f"no row of {name} fits the model's {limit} tokens: lower {flag}, or take a model that reads more")
    if left := len(rows) - len(fitting):
        say(f"{name}: {left} of {len(rows)} rows do not fit the model's {limit} tokens: counted as wrong")
    plan = list(batches(fitting, args.max_batch_tokens))
    ending = line_ends(tokenizer) - ends if name == "trivia_qa" else set()  # an answer is one line
    return Task(name, rows, prompts, completions, plan, new, ends, ending, llama.choose_attention("packed"))


def batches(lengths, max_tokens):
    """Lists of rows, longest first, so that each batch padded to its longest holds at most max_tokens.

    lengths: {row: tokens}. The longest come first, so that memory ends at once or not at all.
    """
    batch = []
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def line_ends(tokenizer):
    """Ids of the tokens that hold a line's end, be it after other text."""
    texts = ((i, tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in range(len(tokenizer)))
    return {i for i, text in texts if "\n" in text}


# A prompt is read once, unpadded, for its loss and its prediction: transformers' generate goes on from its keys and
# values. Beside a loop of our own, which dropped the rows that have ended, that takes 1.0 to 1.2 times as long with
# 135 M parameters and 1.1 to 1.5 times with 1 M; generate from the start and a pass for the loss takes 1.4 to 2.5.


def read_rows(model, prompts, completions, attention):
    """One pass over whole rows: each completion's negative log likelihood (nats), and the prompts' keys and values.

    These are a DynamicCache of [rows, heads, longest prompt - 1, head_dim] a layer, padded on the left: generate reads
    the last token of each prompt.
    """
    from transformers import DynamicCache

    model.set_attn_implementation(attention)
    groups = [(prompts, completions)]
    if attention != "packed":  # nothing would keep the rows of a pass apart: read each by itself
        groups = [([prompt], [completion]) for prompt, completion in zip(prompts, completions, strict=True)]
    nll, caches = [], []
    for some, golds in groups:
        caches.append(DynamicCache())
        logits, ids = llama.read(model, some, golds, caches[-1])
        nll += sums_of_loss(logits, ids, [len(gold) for gold in golds])
    return nll, padded(caches, prompts, completions)


def sums_of_loss(logits, ids, lengths):
    """Negative log likelihood of rows of `lengths` from logits [tokens, vocabulary] and ids of all of them in turn."""
    import torch

    pieces = zip(logits.split(512), ids.split(512), strict=True)  # float32 copies of a few positions at a time
    losses = [torch.nn.functional.cross_entropy(some.float(), gold, reduction="none") for some, gold in pieces]
    return [part.sum().item() for part in torch.cat(losses).double().split(lengths)]


def padded(caches, prompts, completions):
    """The prompts' keys and values, all but the last token's, as rows of one cache, from those of all rows in turn."""
    import torch
    from transformers import DynamicCache

    sizes = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    offsets = torch.arange(width - 1) - (width - lengths)[:, None]
    places = (sizes.cumsum(0) - sizes)[:, None] + offsets.clamp(min=0)  # padding repeats a row's first token
    cache = DynamicCache()
    for number in range(len(caches[0].layers)):
        layers = [some.layers[number] for some in caches]
        keys = torch.cat([layer.keys[0] for layer in layers], dim=1)
        values = torch.cat([layer.values[0] for layer in layers], dim=1)
        cache.update(keys[:, places].transpose(0, 1), values[:, places].transpose(0, 1), number)
    return cache


def test_rows(model, prompts, completions, ends, new, attention):
    """nll (nats) and greedy prediction (list of at most `new` ids, an ending one included) of each row.

    model: a LlamaForCausalLM whose generation config asks for nothing.
    """
    import torch

    nll, cache = read_rows(model, prompts, completions, attention)
    model.set_attn_implementation("sdpa")
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    outputs = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    written = outputs[:, width:].tolist()
    stops = [next((i + 1 for i, token in enumerate(row) if token in ends), new) for row in written]
    return [(loss, row[:stop]) for loss, row, stop in zip(nll, written, stops, strict=True)]


def test_batch(model, tokenizer, task, batch):
    """What is known of each row of the batch after it, under the names of the predictions file."""
    prompts = [task.prompts[i] for i in batch]
    completions = [task.completions[i] for i in batch]
    ends = task.ends | task.line_ends
    tested = test_rows(model, prompts, completions, ends, task.new, task.attention)
    results = []
    for i, (nll, ids) in zip(batch, tested, strict=True):
        if not nll < MAX_NLL * len(task.completions[i]):  # NaN too
            reason = f"{task.rows[i]['id']} has a log-likelihood of {-nll}: the model diverged"
            fail(f"{reason}, train it again with a lower learning rate", in_any_process=True)
        kept = [token for token in ids if token not in task.ends]
        text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        result = {"prediction": text.split("\n")[0].strip() if task.line_ends else text, "nll": nll}
        cut_off = len(ids) == task.new and ids[-1] not in ends
        results.append(result | {"new_tokens": len(ids), "hit_max_new_tokens": cut_off})
    return results


def in_halves(work, batch):
    """work(batch), a list with one item for each of batch's; in halves where GPU memory ends."""
    import torch

    try:
        return work(batch)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            reason = first_line(error)
            fail(f"one row is too much for the GPU's memory ({reason}): try --load-in-4bit", in_any_process=True)
    torch.cuda.empty_cache()
    say(f"{len(batch)} rows are too much for the GPU's memory: halved; try a lower --max-batch-tokens")
    middle = len(batch) // 2
    return in_halves(work, batch[:middle]) + in_halves(work, batch[middle:])


def test_task(model, core, tokenizer, task, path, run, state):
    """Test this process' share of the batches, appending each to its work file as soon as it is done."""
    import torch
    from tqdm import tqdm

    done = [item["batch"] for item in read_work(path) if item["settings"] == run]
    state.wait_for_everyone()  # all have read what is done before any adds to it
    undone = [number for number in range(len(task.plan)) if number not in done]
    share = undone[state.process_index :: state.num_processes]
    work = functools.partial(test_batch, core, tokenizer, task)
    started, tokens = time.time(), 0
    rows = sum(len(task.plan[number]) for number in share)
    bar = tqdm(total=rows, desc=task.name, unit=" rows", disable=None if is_main() else True, leave=False)
    part = path.with_name(f".{path.stem}.part{state.process_index}.jsonl")
    with part.open("a") as file, bar, torch.inference_mode():
        for number in share:
            examples = {i: {"tokens": len(task.completions[i])} for i in task.plan[number]}
            for prefix in systems(run).values():
                with model.disable_adapter() if prefix else contextlib.nullcontext():
                    results = in_halves(work, task.plan[number])
                for i, result in zip(task.plan[number], results, strict=True):
                    examples[i] |= {prefix + key: value for key, value in result.items()}
                    tokens += len(task.prompts[i]) + len(task.completions[i]) + result["new_tokens"]
            item = {"settings": run, "batch": number, "examples": list(examples.items())}
            file.write("\n" + json.dumps(item))  # on a line of its own, whatever a kill left of the one before
            file.flush()
            bar.update(len(task.plan[number]))
    before = sum(len(task.plan[number]) for number in done)
    text = f"{task.name}: {len(task.rows)} rows, {before} of them from before; "
    text += f"{tokens:,} tokens in {time.time() - started:.1f} s"
    say(text + (" (first process)" if state.num_processes > 1 else ""))


def perplexity(nll, tokens, texts):
    """Corpus figures of the completions `texts` from each one's nll (nats) and number of scored tokens.

    bits_per_byte compares models of different tokenizers; word_perplexity does too, by blank-separated words.
    """
    total = math.fsum(nll)
    words = sum(max(1, len(text.split())) for text in texts)
    return {
        "perplexity": math.exp(total / sum(tokens)),
        "nll_sum": total,
        "tokens": sum(tokens),
        "examples": len(nll),
        "bits_per_byte": total / sum(len(text.encode()) for text in texts) / math.log(2),
        "word_perplexity": math.exp(min(MAX_NLL, total / words)),
    }


def write_predictions(task, folder, path, run):
    """Put the predictions file in place, whole, from the work files, and remove those."""
    found = {}
    for item in read_work(path):
        if item["settings"] == run:
            found |= dict(item["examples"])
    scored = [found[i] for i in sorted(found)]
    texts = [task.rows[i]["completion"] for i in sorted(found)]
    tokens = [example["tokens"] for example in scored]
    figures = {}
    for system, prefix in systems(run).items():
        figures[system] = perplexity([example[prefix + "nll"] for example in scored], tokens, texts)
        figures[system]["hit_max_new_tokens"] = sum(example[prefix + "hit_max_new_tokens"] for example in scored)
    content = {
        "task": task.name,
        "model": run["model"],
        "adapter": folder and str(folder),
        "settings": run,
        "perplexity": figures,
        "too_long": [row_id for i, row_id in enumerate(task.rows["id"]) if i not in found],
        "examples": [example_of(row, found.get(i), systems(run).values()) for i, row in enumerate(task.rows)],
    }
    common.write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for part in work_files(path):
        part.unlink()


def example_of(row, result, prefixes):
    """An example of the predictions file; `result` None: of a row that is too long, whose predictions are empty."""
    example = {key: row[key] for key in ("id", "references", "answer_in_context") if key in row}
    return example | (result or {f"{prefix}prediction": "" for prefix in prefixes} | {"too_long": True})


def show(contents, prompts):
    """Print the first examples of each task, then the table, base before tuned, within 80 columns."""
    prefixes = {"base": "base_", "tuned": ""}
    if not any(content["adapter"] for content in contents.values()):
        prefixes = {"model": ""}
    for content in contents.values():
        for example in content["examples"][:SHOWN]:
            prompt = " ".join(prompts[example["id"]].split())
            say(f"\n{example['id']}\n  {'prompt':<10} {prompt if len(prompt) <= 67 else '...' + prompt[-64:]}")
            texts = {"reference": " | ".join(example["references"][:3])}
            texts |= {name: example.get(prefix + "prediction") for name, prefix in prefixes.items()}
            for name, text in texts.items():
                if text is not None:
                    text = " ".join(text.split())
                    say(f"  {name:<10} {text if len(text) <= 67 else text[:64] + '...'}")
    figures = {task: dict(reversed(content["perplexity"].items())) for task, content in contents.items()}
    names = next(iter(figures.values())) if "tuned" in prefixes else prefixes
    say(f"\n{'':<30}" + "".join(f"{name:>18}" for name in names))
    for task, columns in figures.items():
        for key in ("perplexity", "bits_per_byte", "word_perplexity", "hit_max_new_tokens"):
            say(f"{task + ' ' + key:<30}" + "".join(f"{column[key]:>18,.5g}" for column in columns.values()))


def test_undone(args, base, folder, in_4bit, rows, state):
    """Test the tasks that are not finished; {task: path} of all that have rows."""
    from transformers import GenerationConfig

    run = run_identity(args, base, folder, in_4bit, rows)
    paths = {task: output_path(args, task) for task in TASKS}
    undone = [task for task, path in paths.items() if not finished(args, path, run)]
    state.wait_for_everyone()  # all have looked before any changes a file
    parts = {task: part for task in TASKS if len(part := llama.rows_of(rows, task))}
    for task in undone:
        if task not in parts and is_main():  # else evaluations.py would score another run's predictions
            paths[task].unlink(missing_ok=True)
    if set(undone) & set(parts):
        tokenizer = load_tokenizer(base, folder)
        model = load_system(base, folder, in_4bit, "base" in systems(run))
        core = model.get_base_model() if folder else model
        ends = llama.end_tokens(core, tokenizer)
        core.generation_config = GenerationConfig()  # else the base's wishes: sampling, penalties
    for task, part in parts.items():
        path = paths[task]
        if task not in undone:
            say(f"{path} is finished, by the same settings on the same rows: nothing to do")
            continue
        prepared = prepare(args, task, part, tokenizer, ends, model.config.max_position_embeddings)
        test_task(model, core, tokenizer, prepared, path, run, state)
        state.wait_for_everyone()
        if is_main():
            write_predictions(prepared, folder, path, run)
        say(f"wrote {path}")
    return {task: paths[task] for task in parts}


@common.script
def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    rows = llama.load_rows(args.output_dir, "test")
    base, folder, in_4bit = choose_system(args)
    import torch
    from accelerate import PartialState

    llama.quiet()
    with common.only_run_in(args.output_dir):
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        paths = test_undone(args, base, folder, in_4bit, rows, state)
        if is_main():
            contents = {task: common.read_json(path) for task, path in paths.items()}
            show(contents, dict(zip(rows["id"], rows["prompt"], strict=True)))
        say(f"\n{time.time() - started:.0f} s, peak memory {llama.peak_memory():.2f} GB")
        state.wait_for_everyone()
        state.destroy_process_group()


if __name__ == "__main__":
    main()
