"""Test the adapter of train_llama.py on the test split: perplexity and greedy predictions, tuned beside base.

The base is the same model with the adapter switched off, in the same pass. Perplexity is exp(summed negative log
likelihood / scored tokens) over the gold completion and its EOS after the exact inference prompt. This is a script of
the pipeline, not a pytest file.

Reads:  OUTPUT_DIR/dataset/ (test) and OUTPUT_DIR/adapter/, whose adapter_config.json names the base model.
Writes: OUTPUT_DIR/samsum_predictions.json and OUTPUT_DIR/trivia_qa_predictions.json.

    python test_llama.py
    python test_llama.py --no-compare-with-base --output-dir outputs/demo
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

from train_llama import TASKS, encode, fail, first_line, load_model, load_rows, load_tokenizer, quiet

# Settings: edit here, or override for one run on the command line.
COMPARE_WITH_BASE = True  # also test the base, with the adapter switched off
LOAD_IN_4BIT = True  # as in training
MAX_BATCH_TOKENS = 8192  # tokens of a padded batch; halve it where memory ends
SAMSUM_MAX_NEW_TOKENS = 96  # the longest gold summaries have some 80 tokens
TRIVIA_QA_MAX_NEW_TOKENS = 24  # an answer is a few words; it ends at the line's end
OUTPUT_DIR = "outputs"

# Fixed
END_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>")  # Llama 3 has more than one


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("--compare-with-base", action=boolean, default=COMPARE_WITH_BASE, help="also test the base")
    add("--load-in-4bit", action=boolean, default=LOAD_IN_4BIT, help="NF4, as in training")
    add("--max-batch-tokens", type=int, default=MAX_BATCH_TOKENS, help="tokens of a padded batch")
    add("--samsum-max-new-tokens", type=int, default=SAMSUM_MAX_NEW_TOKENS, help="tokens of a summary")
    add("--trivia-qa-max-new-tokens", type=int, default=TRIVIA_QA_MAX_NEW_TOKENS, help="tokens of an answer")
    add("--output-dir", default=OUTPUT_DIR, help="holds dataset/ and adapter/, gets the predictions")
    args = parser.parse_args(argv)
    for name in ("max_batch_tokens", "samsum_max_new_tokens", "trivia_qa_max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def read_adapter(output_dir):
    """Path of the adapter and the name of its base model; exits 2 where it is missing or broken."""
    folder = Path(output_dir) / "adapter"
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
        fail(f"the adapter in {folder} does not load onto its base ({first_line(error)}): run train_llama.py again")


def end_tokens(model, tokenizer, task):
    """Ids that end a prediction: every end token the model knows and, for trivia_qa, every token with a line end."""
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    vocabulary = tokenizer.get_vocab()
    ends |= {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    if task == "trivia_qa":
        ends |= {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i], clean_up_tokenization_spaces=False)}
    return sorted(ends)


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


def pad_left(rows, pad, device):
    """Model inputs of rows (lists of ids) padded on the left: input_ids, attention_mask, position_ids."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def score(model, tokenizer, prompts, completions, max_tokens, progress):
    """Negative log likelihood (nats, float) of each completion after its prompt."""
    import torch

    wholes = [p + c for p, c in zip(prompts, completions, strict=True)]
    nll = [0.0] * len(wholes)
    for batch in batches([len(whole) for whole in wholes], max_tokens):
        keep = max(len(completions[i]) for i in batch)  # logits of the completions only, never of the whole batch
        inputs = pad_left([wholes[i] for i in batch], tokenizer.pad_token_id, model.device)
        logits = model(**inputs, logits_to_keep=keep + 1, use_cache=False).logits[:, :-1]
        for row, index in enumerate(batch):
            gold = torch.tensor(completions[index], device=model.device)
            log_probs = logits[row, -len(gold) :].float().log_softmax(-1)
            nll[index] = -log_probs.gather(1, gold[:, None]).double().sum().item()
        progress.update(len(batch))
    return nll


def predict(model, tokenizer, prompts, task, max_new_tokens, max_tokens, progress):
    """Greedy prediction (string) of each prompt (list of ids), and how many hit max_new_tokens."""
    ends = end_tokens(model, tokenizer, task)
    predictions, unfinished = [""] * len(prompts), 0
    for batch in batches([len(prompt) + max_new_tokens for prompt in prompts], max_tokens):
        inputs = pad_left([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
        inputs.pop("position_ids")  # generate derives them from the mask
        width = inputs["input_ids"].shape[1]
        output = model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        for index, new in zip(batch, output[:, width:].tolist(), strict=True):
            stop = next((k for k, token in enumerate(new) if token in ends), None)
            unfinished += stop is None
            text = tokenizer.decode(new[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
            predictions[index] = text.split("\n")[0].strip() if task == "trivia_qa" else text
        progress.update(len(batch))
    return predictions, unfinished


def perplexity(nll, completions, texts):
    """Corpus perplexity of the completions; bits_per_byte compares models of different tokenizers."""
    total, tokens = math.fsum(nll), sum(map(len, completions))
    size = sum(len(text.encode()) for text in texts)
    return {
        "perplexity": math.exp(total / tokens),
        "nll_sum": total,
        "tokens": tokens,
        "examples": len(nll),
        "bits_per_byte": total / size / math.log(2),
    }


def test_task(args, model, tokenizer, rows, task):
    """Scores and predictions of one task by the tuned model and, where asked for, the base; see `write`."""
    from contextlib import nullcontext

    from tqdm import tqdm

    try:
        ids = encode(tokenizer, rows.to_dict())
    except ValueError as error:
        fail(f"cannot test: {first_line(error)}")
    prompts, completions = ids["prompt_ids"], ids["completion_ids"]
    limit = getattr(model.config, "max_position_embeddings", None)
    new = getattr(args, f"{task}_max_new_tokens")
    for row_id, prompt, completion in zip(rows["id"], prompts, completions, strict=True):
        if limit and len(prompt) + max(new, len(completion)) > limit:
            fail(f"{row_id}: {len(prompt)} prompt tokens and {max(new, len(completion))} more do not fit the model's "
                 f"{limit}: lower --{task.replace('_', '-')}-max-new-tokens, or MAX_CONTEXT_WORDS of "
                 "build_dataset.py")  # fmt: skip
    result = {}
    for system in ["tuned", "base"] if args.compare_with_base else ["tuned"]:
        progress = tqdm(total=2 * len(prompts), desc=f"{task} {system}", disable=None, leave=False)
        with progress, model.disable_adapter() if system == "base" else nullcontext():
            nll = score(model, tokenizer, prompts, completions, args.max_batch_tokens, progress)
            texts, unfinished = predict(model, tokenizer, prompts, task, new, args.max_batch_tokens, progress)
        figures = perplexity(nll, completions, rows["completion"]) | {"hit_max_new_tokens": unfinished}
        result[system] = {"nll": nll, "predictions": texts, "figures": figures}
    return result | {"tokens": [len(completion) for completion in completions]}


def write(args, base, folder, rows, task, result):
    """Write one predictions file of the contract, whole or not at all."""
    examples = []
    for i, row in enumerate(rows):
        example = {key: row[key] for key in ("id", "references", "answer_in_context")}
        example |= {"prediction": result["tuned"]["predictions"][i], "nll": result["tuned"]["nll"][i]}
        if "base" in result:
            example |= {"base_prediction": result["base"]["predictions"][i], "base_nll": result["base"]["nll"][i]}
        examples.append(example | {"tokens": result["tokens"][i]})
    systems = [system for system in ("tuned", "base") if system in result]
    content = {"task": task, "model": base, "adapter": str(folder), "settings": vars(args)}
    content |= {"perplexity": {system: result[system]["figures"] for system in systems}, "examples": examples}
    path = Path(args.output_dir) / f"{task}_predictions.json"
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def print_table(results):
    print(f"\n{'perplexity':<24}{'tuned':>14}{'base':>14}\n" + "-" * 52)
    for task, result in results.items():
        for key, label in (("perplexity", ""), ("bits_per_byte", " bits/byte"), ("hit_max_new_tokens", " unfinished")):
            cells = [result[s]["figures"][key] for s in ("tuned", "base") if s in result]
            cells = [f"{cell:>14,.3f}" if isinstance(cell, float) else f"{cell:>14}" for cell in cells]
            print(f"{task + label:<24}" + "".join(cells))


def main(argv=None):
    args = parse_args(argv)
    start = time.time()
    rows = load_rows(args.output_dir, "test")
    folder, base = read_adapter(args.output_dir)
    if not os.access(args.output_dir, os.W_OK):
        fail(f"cannot write to {args.output_dir}")
    import torch

    quiet()
    tasks = sorted(set(rows["task"]))
    tokenizer = load_tokenizer(str(folder))
    model = load_adapter(load_model(base, args.load_in_4bit), folder)
    results, paths = {}, []
    with torch.inference_mode():
        for task in tasks:
            part = rows.filter(lambda names, task=task: [n == task for n in names], input_columns="task", batched=True)
            results[task] = test_task(args, model, tokenizer, part, task)
            paths.append(write(args, base, folder, part, task, results[task]))
    for task in set(TASKS) - set(tasks):  # else evaluations.py would score another run's predictions
        (Path(args.output_dir) / f"{task}_predictions.json").unlink(missing_ok=True)
    print_table(results)
    print(f"\nwrote {', '.join(map(str, paths))} in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
