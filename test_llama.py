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

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import train_llama
from train_llama import TASKS, encode, fail, first_line, is_main, load_model, load_rows, load_tokenizer, quiet, say

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
OUTPUT_DIR = "outputs"

# Fixed
END_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>")  # Llama 3 has more than one
UNBOUND = ("adapter", "model", "load_in_4bit", "name", "overwrite", "output_dir")  # resolved, or without an influence
SHOWN = 3  # examples of each task printed at the end


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("--adapter", default=ADAPTER, help="a folder, none, or auto: OUTPUT_DIR/adapter, none where --model is given")
    add("--model", default=MODEL, help="a hub id or folder; auto: the base that the adapter names")
    add("--name", default=NAME, help="of a further pair of prediction files")
    add("--compare-with-base", action=boolean, default=COMPARE_WITH_BASE, help="also test the base")
    add("--load-in-4bit", action=boolean, default=LOAD_IN_4BIT, help="NF4; None: as the adapter was trained")
    add("--max-batch-tokens", type=int, default=MAX_BATCH_TOKENS, help="tokens of a batch")
    add("--samsum-max-new-tokens", type=int, default=SAMSUM_MAX_NEW_TOKENS, help="tokens of a summary")
    add("--trivia-qa-max-new-tokens", type=int, default=TRIVIA_QA_MAX_NEW_TOKENS, help="tokens of an answer")
    add("--overwrite", action=boolean, default=OVERWRITE, help="replace predictions of another run")
    add("--output-dir", default=OUTPUT_DIR, help="holds dataset/ and adapter/, gets the predictions")
    args = parser.parse_args(argv)
    for name in ("max_batch_tokens", "samsum_max_new_tokens", "trivia_qa_max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not re.fullmatch(r"[\w-]*", args.name):
        parser.error("--name must be made of letters, digits, dashes and underscores")
    return args


def read_adapter(output_dir, folder=None):
    """Path of the adapter and the name of its base model; exits 2 where it is missing or broken."""
    folder = Path(folder or Path(output_dir) / "adapter")
    if not (folder / "adapter_config.json").is_file():
        fail(f"no adapter at {folder}: run train_llama.py first")
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError("it names no base model")
    except (ValueError, KeyError, TypeError) as error:
        fail(f"cannot read {folder / 'adapter_config.json'} ({first_line(error)}): run train_llama.py again")
    if not (folder / "adapter_model.safetensors").is_file():
        fail(f"no adapter_model.safetensors in {folder}: run train_llama.py again")
    return folder, base


def choose_system(args):
    """What is tested: folder of the adapter or None, name of the model under it, whether in 4 bits."""
    alone = args.adapter == "none" or (args.adapter == "auto" and args.model != "auto")
    if alone and args.model != "auto":
        return None, train_llama.find_model(args.model), bool(args.load_in_4bit)
    folder, base = read_adapter(args.output_dir, None if args.adapter in ("auto", "none") else args.adapter)
    base = train_llama.find_model(base if args.model == "auto" else args.model)
    in_4bit = args.load_in_4bit
    if in_4bit is None:
        try:
            in_4bit = bool(json.loads((folder / "run.json").read_text())["settings"]["load_in_4bit"])
        except (OSError, ValueError, KeyError, TypeError):  # an adapter from elsewhere
            in_4bit = True
    return None if alone else folder, base, in_4bit


def load_adapter(model, folder):
    """`model` with the LoRA adapter of `folder` on it, ready for inference."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
        expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            if set(file.keys()) != expected:  # PEFT only warns, and leaves such layers as in the base
                raise ValueError("its tensors are not those that its config names")
        return model
    except Exception as error:  # a cut-off file, or shapes of another base
        reason = re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__  # PEFT's are of many lines
        fail(f"the adapter in {folder} does not load onto its base ({reason}): run train_llama.py again")


def load_system(base, folder, in_4bit):
    """The model in evaluation mode, with the adapter of `folder` where there is one.

    The CPU unpacks 4-bit weights for every use. Where host memory is ample they are unpacked once: the same numbers
    (float32 holds every NF4 value times its scale as bitsandbytes computes it), in eight times the memory.
    """
    import torch
    from transformers.utils import logging

    model = load_model(base, in_4bit).eval()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("WORLD_SIZE", 1))
    if in_4bit and not torch.cuda.is_available() and 4 * model.num_parameters() < memory / 2:
        logging.set_verbosity_error()  # it tells what it does
        model = model.dequantize()
        logging.set_verbosity_warning()
    return load_adapter(model, folder) if folder else model


def end_tokens(model, tokenizer, task):
    """Two sets of ids that end a prediction: the model's end tokens and, for trivia_qa, tokens with a line end."""
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    vocabulary = tokenizer.get_vocab()
    ends |= {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    if task != "trivia_qa":
        return ends, set()
    texts = ((i, tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in range(len(tokenizer)))
    return ends, {i for i, text in texts if "\n" in text} - ends


def batches(lengths, max_tokens):
    """Lists of indices, longest rows first, so that each batch padded to its longest holds at most max_tokens."""
    batch = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def read(model, prompts, completions):
    """One pass over whole rows (lists of ids), flattened: nothing is padded, and no row attends to another.

    Returns each completion's negative log likelihood (nats, from float32 log-probabilities), the greedy first token
    after each prompt, and the prompts' keys and values: per row and layer a pair [heads, tokens, head_dim].
    """
    import torch
    from transformers import DynamicCache

    device, cache = model.device, DynamicCache()
    ids = [p + c for p, c in zip(prompts, completions, strict=True)]
    bounds = [0, *torch.tensor([len(row) for row in ids]).cumsum(0).tolist()]
    positions = torch.cat([torch.arange(len(row)) for row in ids]).to(device)
    golds = [torch.arange(start + len(p), end) for p, start, end in zip(prompts, bounds, bounds[1:], strict=False)]
    ids, golds = torch.tensor(sum(ids, []), device=device), torch.cat(golds).to(device)
    logits = model(input_ids=ids[None], position_ids=positions[None], past_key_values=cache, use_cache=True,
                   cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32, device=device),
                   max_length_q=int(positions.max()) + 1,
                   logits_to_keep=golds - 1).logits[0]  # of the completions only # fmt: skip
    lengths, cross_entropy = [len(c) for c in completions], torch.nn.functional.cross_entropy
    pieces = zip(logits.split(512), ids[golds].split(512), strict=True)  # float32 copies of a few positions at a time
    losses = torch.cat([cross_entropy(some.float(), gold, reduction="none") for some, gold in pieces])
    nll = [part.sum().item() for part in losses.double().split(lengths)]
    first = torch.tensor([0, *lengths[:-1]], device=device).cumsum(0)
    rows = [[(layer.keys[0, :, start : start + len(p)], layer.values[0, :, start : start + len(p)])
             for layer in cache.layers] for p, start in zip(prompts, bounds, strict=False)]  # fmt: skip
    return nll, logits[first].argmax(-1), rows


class KeyValues:
    """Keys and values of the rows still being written, [rows, heads, width + new, head_dim] a layer, filled in place.

    transformers' DynamicCache would copy all of them at every token, its StaticCache attend to the unfilled part.
    """

    def __init__(self, rows, new):
        """`rows` as `read` returns them; shorter prompts are padded on the left."""
        self.length = max(row[0][0].shape[1] for row in rows)
        self.layers = [[self.stack(parts, new) for parts in zip(*row, strict=True)] for row in zip(*rows, strict=True)]

    def stack(self, parts, new):
        import torch

        pad = torch.nn.functional.pad
        return torch.stack([pad(part, (0, 0, self.length - part.shape[1], new)) for part in parts])

    def update(self, key, value, layer, *_):  # called by the model's attention
        for stored, fresh in zip(self.layers[layer], (key, value), strict=True):
            stored[:, :, self.length : self.length + 1] = fresh
        return [stored[:, :, : self.length + 1] for stored in self.layers[layer]]

    def keep(self, rows):
        for pair in self.layers:
            pair[:] = [stored[rows] for stored in pair]


def write_on(model, cache, lengths, tokens, ends, new):
    """Greedy predictions (lists of at most `new` ids, an ending one included) after prompts of `lengths` in `cache`.

    tokens: the first one of each. A row that has ended leaves the batch.
    """
    import torch

    positions = torch.tensor(lengths, device=model.device)
    mask = torch.arange(cache.length + new, device=model.device) >= (cache.length - positions)[:, None]  # no padding
    outputs, alive = [[] for _ in lengths], list(range(len(lengths)))
    while True:
        for row, token in zip(alive, tokens.tolist(), strict=True):
            outputs[row].append(token)
        going = [i for i, row in enumerate(alive) if outputs[row][-1] not in ends]
        if not going or len(outputs[alive[0]]) == new:
            return outputs
        if len(going) < len(alive):
            kept = torch.tensor(going, device=model.device)
            tokens, positions, mask, alive = tokens[kept], positions[kept], mask[kept], [alive[i] for i in going]
            cache.keep(kept)
        inputs = {"input_ids": tokens[:, None], "position_ids": positions[:, None], "past_key_values": cache}
        visible = mask[:, None, None, : cache.length + 1]
        tokens = model(**inputs, attention_mask=visible, use_cache=True).logits[:, -1].argmax(-1)
        cache.length += 1
        positions = positions + 1


def test_rows(model, prompts, completions, ends, new, attention):
    """nll (nats) and predicted ids (list) of each row by `model`, a LlamaForCausalLM."""
    import torch

    groups = [(prompts, completions)]
    if attention != "packed":  # nothing would keep the rows of a pass apart: read each by itself
        groups = [([p], [c]) for p, c in zip(prompts, completions, strict=True)]
    model.set_attn_implementation(attention)
    nll, tokens, rows = zip(*(read(model, *group) for group in groups), strict=True)
    cache = KeyValues(sum(rows, []), new)
    del rows  # the memory of one copy
    model.set_attn_implementation("sdpa")
    outputs = write_on(model, cache, [len(p) for p in prompts], torch.cat(tokens), ends, new)
    return list(zip(sum(nll, []), outputs, strict=True))


def in_halves(work, batch):
    """work(batch), a list with one item for each of batch's; in halves where GPU memory ends."""
    import torch

    try:
        return work(batch)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            die(f"one row is too much for the GPU's memory ({first_line(error)}): try --load-in-4bit")
    torch.cuda.empty_cache()
    print(f"{len(batch)} rows are too much for the GPU's memory: halved; a lower --max-batch-tokens saves the try")
    middle = len(batch) // 2
    return in_halves(work, batch[:middle]) + in_halves(work, batch[middle:])


def perplexity(nll, tokens, texts):
    """Corpus figures of the completions `texts` from each one's nll (nats) and number of scored tokens.

    bits_per_byte compares models of different tokenizers; word_perplexity does too, by blank-separated words.
    """
    total, words = math.fsum(nll), sum(max(1, len(text.split())) for text in texts)
    return {
        "perplexity": math.exp(total / sum(tokens)),
        "nll_sum": total,
        "tokens": sum(tokens),
        "examples": len(nll),
        "bits_per_byte": total / sum(len(text.encode()) for text in texts) / math.log(2),
        "word_perplexity": math.exp(min(700, total / words)),  # 700: the largest that a float holds
    }


def run_identity(args, base, folder, in_4bit, rows):
    """What has to be the same for a run to go on where it was, `settings` in the files: weights, rows, settings."""
    import torch

    local = sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
    run = {"model": base, "weights": [train_llama.sha256(path)[:16] for path in local]}
    run["adapter"] = train_llama.sha256(folder / "adapter_model.safetensors")[:16] if folder else "none"
    run |= {"4_bit": in_4bit, "rows": rows._fingerprint, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    return run | {name: value for name, value in vars(args).items() if name not in UNBOUND}


def output_path(args, task):
    return Path(args.output_dir) / f"{task}_predictions{'_' + args.name if args.name else ''}.json"


def work_files(path):
    """The unfinished work beside a predictions file, one for each process that took part."""
    return sorted(path.parent.glob(f".{path.stem}.part*.jsonl"))


def read_work(path):
    """Of a work file: its run, {batch: examples}, and the bytes of its whole lines; a half-written one is left out."""
    run, done, size = None, {}, 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            if not line.endswith(b"\n"):
                raise ValueError
            item = json.loads(line)
            if run is None:
                run = item["settings"]
            else:
                done[item["batch"]] = item["examples"]
        except (ValueError, KeyError, TypeError):
            break
        size += len(line)
    return run, done, size


def finished(args, path, run):
    """Whether the predictions of this run stand at `path`; exits 2 where they, or work for them, are of another."""
    old = None
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        except (OSError, ValueError, AttributeError):
            old = {}
    if args.overwrite:
        return False
    if old == run:
        return True
    runs = [(part, read_work(part)[0]) for part in work_files(path)]
    for part, other in runs:
        train_llama.refuse_another_run(part, other or run, run)
    if old is not None and not any(other for _, other in runs):  # work of this run means: it may be replaced
        train_llama.refuse_another_run(path, old, run)
    return False


def encode_task(args, tokenizer, rows, task, limit):
    """prompts and completions (lists of ids) of a task's rows; exits 2 where one does not fit the model's context."""
    try:
        ids = encode(tokenizer, rows.to_dict())
    except ValueError as error:
        fail(f"cannot test: {first_line(error)}")
    prompts, completions, new = ids["prompt_ids"], ids["completion_ids"], getattr(args, f"{task}_max_new_tokens")
    for row_id, prompt, completion in zip(rows["id"], prompts, completions, strict=True):
        if limit and len(prompt) + max(new, len(completion)) > limit:
            fail(f"{row_id}: {len(prompt)} prompt tokens and {max(new, len(completion))} more do not fit the model's "
                 f"{limit}: lower --{task.replace('_', '-')}-max-new-tokens, or MAX_CONTEXT_WORDS of "
                 "build_dataset.py")  # fmt: skip
    return prompts, completions


def test_task(args, model, tokenizer, rows, task, path, run, state):
    """Test this process' share of the batches, appending each to its work file as soon as it is done."""
    import torch
    from tqdm import tqdm

    adapted = run["adapter"] != "none"
    llama = model.get_base_model() if adapted else model
    prompts, completions = encode_task(args, tokenizer, rows, task, llama.config.max_position_embeddings)
    new, attention = getattr(args, f"{task}_max_new_tokens"), train_llama.choose_attention("packed")
    ends, line_ends = end_tokens(llama, tokenizer, task)
    lengths = [len(p) + max(new, len(c)) for p, c in zip(prompts, completions, strict=True)]
    plan, done = list(batches(lengths, args.max_batch_tokens)), {}
    for part in work_files(path):
        done |= read_work(part)[1]
    state.wait_for_everyone()  # all have read what is done before any adds to it
    undone = [number for number in range(len(plan)) if number not in done][state.process_index :: state.num_processes]
    systems = ["", "base_"] if adapted and args.compare_with_base else [""]
    started, tokens = time.time(), 0
    total = len(systems) * sum(lengths[i] for number in undone for i in plan[number])
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    bar = tqdm(total=total, desc=task, disable=None if is_main() else True, leave=False, bar_format=form)

    def test(batch):
        """What is known of each row of the batch after it, under the names of the predictions file."""
        some = [prompts[i] for i in batch], [completions[i] for i in batch]
        results = []
        for i, (nll, ids) in zip(batch, test_rows(llama, *some, ends | line_ends, new, attention), strict=True):
            if not nll < 700 * len(completions[i]):  # NaN too; exp(700) is about the largest that a float holds
                die(f"{rows[i]['id']} has a log-likelihood of {-nll}: the model diverged, train it again with a lower "
                    "learning rate")  # fmt: skip
            text = tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True,
                                    clean_up_tokenization_spaces=False).strip()  # fmt: skip
            text = text.split("\n")[0].strip() if task == "trivia_qa" else text
            cut = len(ids) == new and ids[-1] not in ends | line_ends
            results.append({"prediction": text, "nll": nll, "new_tokens": len(ids), "hit_max_new_tokens": cut})
        return results

    with open_work(path, run, state) as file, bar, torch.inference_mode():
        for number in undone:
            examples = {i: {"tokens": len(completions[i])} for i in plan[number]}
            for system in systems:
                with model.disable_adapter() if system else contextlib.nullcontext():
                    results = in_halves(test, plan[number])
                for i, result in zip(plan[number], results, strict=True):
                    examples[i] |= {system + key: value for key, value in result.items()}
                    tokens += len(prompts[i]) + len(completions[i]) + result["new_tokens"]
                bar.set_postfix_str(f"{tokens / (time.time() - started):,.0f} tokens/s")
                bar.update(sum(lengths[i] for i in plan[number]))
            file.write(json.dumps({"batch": number, "examples": list(examples.items())}).encode() + b"\n")
            file.flush()
    seconds = time.time() - started
    before, share = sum(map(len, done.values())), ", first process" if state.num_processes > 1 else ""
    say(f"{task}: {len(rows)} examples, {before} of them from before; {tokens:,} tokens in {seconds:.1f} s, "
        f"{tokens / seconds:,.0f}/s{share}")  # fmt: skip


def die(message):
    """`fail` for what only one of several processes may have met."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def open_work(path, run, state):
    """This process' work file, open for appending; what a killed process left half-written is cut off."""
    part = path.with_name(f".{path.stem}.part{state.process_index}.jsonl")
    old, _, size = read_work(part)
    file = part.open("ab")
    file.truncate(size)
    if old is None:
        file.write(json.dumps({"settings": run}).encode() + b"\n")
        file.flush()
    return file


def write(base, folder, rows, task, path, run):
    """Put the predictions file in place, whole, from the work files, and remove those."""
    found, examples, figures = {}, [], {}
    for part in work_files(path):
        found |= {i: example for batch in read_work(part)[1].values() for i, example in batch}
    names = ("prediction", "nll", "new_tokens", "hit_max_new_tokens")
    keys = [system + name for name in names for system in ("", "base_")]
    for i, row in enumerate(rows):
        example = {key: row[key] for key in ("id", "references", "answer_in_context") if key in row}
        examples.append(example | {key: found[i][key] for key in [*keys, "tokens"] if key in found[i]})
    tokens = [example["tokens"] for example in examples]
    for system, prefix in (("tuned", ""), ("base", "base_")):
        if prefix + "nll" in examples[0]:
            figures[system] = perplexity([e[prefix + "nll"] for e in examples], tokens, rows["completion"])
            figures[system]["hit_max_new_tokens"] = sum(e[prefix + "hit_max_new_tokens"] for e in examples)
    content = {"task": task, "model": base, "adapter": folder and str(folder), "settings": run}
    content |= {"perplexity": figures, "examples": examples}
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)
    for part in work_files(path):
        part.unlink()


def show(results, prompts):
    """Print the first examples of each task, then the table, base before tuned."""
    systems = {"base": "base_", "tuned": ""}
    if not next(iter(results.values()))["adapter"]:
        systems = {"model": ""}
    for content in results.values():
        for example in content["examples"][:SHOWN]:
            lines = {"prompt": prompts[example["id"]], "reference": " | ".join(example["references"][:3])}
            lines |= {name: example.get(prefix + "prediction") for name, prefix in systems.items()}
            print(f"\n{example['id']}")
            for label, text in lines.items():
                if text is not None:
                    text = " ".join(text.split())
                    short = text if len(text) <= 67 else "..." + text[-64:] if label == "prompt" else text[:64] + "..."
                    print(f"  {label:<10} {short}")
    figures = {task: dict(reversed(content["perplexity"].items())) for task, content in results.items()}
    names = next(iter(figures.values())) if "tuned" in systems else systems
    print(f"\n{'':<30}" + "".join(f"{name:>18}" for name in names))
    for task, columns in figures.items():
        for key in ("perplexity", "bits_per_byte", "word_perplexity", "hit_max_new_tokens"):
            print(f"{task + ' ' + key:<30}" + "".join(f"{column[key]:>18,.5g}" for column in columns.values()))


def main(argv=None):
    args = parse_args(argv)
    start = time.time()
    rows = load_rows(args.output_dir, "test")
    folder, base, in_4bit = choose_system(args)
    if not os.access(args.output_dir, os.W_OK):
        fail(f"cannot write to {args.output_dir}")
    import torch
    from accelerate import PartialState

    quiet()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    run = run_identity(args, base, folder, in_4bit, rows)
    tasks = sorted(set(rows["task"]))
    paths = {task: output_path(args, task) for task in TASKS}
    undone = {task: path for task, path in paths.items() if not finished(args, path, run)}
    state.wait_for_everyone()  # all have looked before any changes a file
    if is_main():
        for task, path in undone.items():
            if task not in tasks:  # else evaluations.py would score another run's predictions
                path.unlink(missing_ok=True)
            for part in work_files(path):
                if read_work(part)[0] != run:
                    part.unlink()
    state.wait_for_everyone()
    parts = {task: rows.filter(lambda name, task=task: name == task, input_columns="task") for task in tasks}
    if set(tasks) & set(undone):
        tokenizer = load_tokenizer(str(folder or base))
        model = load_system(base, folder, in_4bit)
    for task in tasks:
        path = paths[task]
        if task not in undone:
            say(f"{path} is finished, by the same settings on the same rows: nothing to do")
            continue
        try:
            test_task(args, model, tokenizer, parts[task], task, path, run, state)
            state.wait_for_everyone()
            if is_main():
                write(base, folder, parts[task], task, path, run)
        except OSError as error:
            die(f"cannot write {path} ({first_line(error)}): make room, then give the same command again")
        except KeyboardInterrupt:
            print("\nstopped: the same command goes on after the last finished batch", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
    if is_main():
        show({task: json.loads(paths[task].read_text(encoding="utf-8")) for task in tasks},
             dict(zip(rows["id"], rows["prompt"], strict=True)))  # fmt: skip
        print(f"\n{', '.join(str(paths[task]) for task in tasks)}: {time.time() - start:.0f} s, "
              f"peak memory {train_llama.peak_memory():.2f} GB")  # fmt: skip
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
