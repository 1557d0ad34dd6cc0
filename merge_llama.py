"""Merge the adapter of train_llama.py into its 16-bit base: a plain transformers folder that loads without PEFT.

After writing, the folder is loaded back and its logits on a few test prompts are compared with those of base and
adapter. Where they differ by more than rounding, merged/ is not put in place and the exit code is 1.

Reads:  OUTPUT_DIR/adapter/, its base model, and a few test prompts of OUTPUT_DIR/dataset/.
Writes: OUTPUT_DIR/merged/ (safetensors, tokenizer, generation config, model card, merge.json).

    python merge_llama.py
    python merge_llama.py --check-prompts 16 --output-dir outputs/demo
"""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

from test_llama import load_adapter, read_adapter
from train_llama import fail, first_line, load_rows, load_tokenizer, load_weights, quiet

# Settings: edit here, or override for one run on the command line.
CHECK_PROMPTS = 8  # test prompts on which the merged model is compared with base and adapter
MAX_SHARD_SIZE = "5GB"  # of one safetensors file
OUTPUT_DIR = "outputs"

# Fixed
TOLERANCE = 0.02  # mean absolute logit difference over the logits' standard deviation; bf16 rounding gives some 0.005


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--check-prompts", type=int, default=CHECK_PROMPTS, help="prompts to compare on")
    parser.add_argument("--max-shard-size", default=MAX_SHARD_SIZE, help="of one safetensors file")
    parser.add_argument("--output-dir", default=OUTPUT_DIR, help="holds adapter/ and dataset/, gets merged/")
    args = parser.parse_args(argv)
    if args.check_prompts < 1:
        parser.error("--check-prompts must be at least 1")
    if not re.fullmatch(r"[1-9]\d*[KMG]B", args.max_shard_size):
        parser.error("--max-shard-size must be a number with its unit, such as 5GB or 500MB")
    return args


def load_16bit(model):
    """The model in its stored dtype, on the CPU: the merge needs host memory of twice the 16-bit weights at most."""
    return load_weights(model, dtype="auto")


def logits_of(model, tokenizer, prompts):
    """Float32 logits [vocabulary] after each prompt, stacked to [prompts, vocabulary]."""
    import torch

    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt).input_ids], device=model.device)
            rows.append(model(input_ids=ids, logits_to_keep=1).logits[0, -1].float())
    return torch.stack(rows)


def compare(expected, actual):
    """How far logits `actual` are from `expected`, both [prompts, vocabulary]."""
    difference = (expected - actual).abs()
    return {
        "largest_logit_difference": difference.max().item(),
        "mean_logit_difference": difference.mean().item(),
        "relative_difference": (difference.mean() / expected.std()).item(),
        "equal_greedy_tokens": (expected.argmax(-1) == actual.argmax(-1)).float().mean().item(),
        "prompts": len(expected),
        "tolerance": TOLERANCE,
    }


def write(model, tokenizer, base, folder, args):
    """Save the merged model, tokenizer and model card in `folder`."""
    model.generation_config.do_sample = False  # Llama 2's own config samples; greedy was tested
    model.generation_config.temperature = model.generation_config.top_p = None
    model.save_pretrained(folder, max_shard_size=args.max_shard_size)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(
        f"---\nbase_model: {base}\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {Path(base).name}, fine-tuned on samsum and trivia_qa\n\nA QLoRA adapter merged into the 16-bit "
        f"weights of `{base}`. It summarises dialogues and answers questions from a context.\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this folder")\n```\n'
    )


def install(fresh, target):
    """Put the finished folder in place of the old one."""
    old = target.with_name(".merged.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main(argv=None):
    args = parse_args(argv)
    output = Path(args.output_dir)
    folder, base = read_adapter(output)
    prompts = load_rows(output, "test")["prompt"][: args.check_prompts]
    if not os.access(output, os.W_OK):
        fail(f"cannot write to {output}")
    import torch
    import transformers

    quiet()
    tokenizer = load_tokenizer(base)
    model = load_adapter(load_16bit(base), folder)
    expected = logits_of(model, tokenizer, prompts)
    try:
        model = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT found weights that are no numbers
        fail(f"cannot merge {folder} ({first_line(error)}): run train_llama.py again, with a lower learning rate")
    fresh = output / ".merged.new"
    shutil.rmtree(fresh, ignore_errors=True)
    write(model, tokenizer, base, fresh, args)
    dtype = str(model.dtype).removeprefix("torch.")
    del model
    report = compare(expected, logits_of(load_16bit(str(fresh)), tokenizer, prompts))
    verified = report["relative_difference"] <= TOLERANCE  # false for NaN too
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    content = {"base_model": base, "adapter": str(folder), "dtype": dtype, "verified": verified, "comparison": report}
    (fresh / "merge.json").write_text(json.dumps(content | {"versions": versions}, indent=2) + "\n")
    for key, value in report.items():
        print(f"{key + ':':<26}{value:.4g}")
    if not verified:
        print(f"error: the merged model differs from base and adapter: left unverified in {fresh}", file=sys.stderr)
        raise SystemExit(1)
    install(fresh, output / "merged")
    print(f"\nwrote {output / 'merged'} ({dtype})")


if __name__ == "__main__":
    main()
