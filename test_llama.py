"""Compare the fine-tuned model with the base model on the test split: perplexity and greedy predictions.

Both are tested in one run: the base is the same model with the adapter switched off. Perplexity is exp(summed negative
log likelihood / scored tokens) over the reference completion and its EOS token, after the same prompt as in
prediction. The perplexity of a general text, which belongs to no task, shows what fine-tuning or quantising cost
elsewhere. That text is read in windows of 1,024 tokens that do not overlap, each after a BOS token if the tokenizer
has one; without BOS, a window's first token is not scored. If a run is interrupted, the same command resumes it.
With --server, an OpenAI-compatible server is asked, and no model is loaded. With --ask, the model answers one text of
yours, through the prompt that it was trained on, and nothing is written. This is a script, not a pytest file.

Reads:  OUTPUT_DIR/dataset/ (test) and OUTPUT_DIR/adapter/, whose adapter_config.json names the base model.
Writes: OUTPUT_DIR/samsum_predictions.json, trivia_qa_predictions.json, own_predictions.json: one per task with rows.
        --name NAME writes samsum_predictions_NAME.json and so on (for a server, the model's name is the default);
        --swap-answers writes trivia_qa_predictions_swapped.json. Batches of an unfinished file are kept in
        .samsum_predictions.part0.jsonl.

    python test_llama.py
    python test_llama.py --model outputs/merged --name merged
    python test_llama.py --adapter none --shots 3 --name base-3-shot
    python test_llama.py --swap-answers
    python test_llama.py --server http://127.0.0.1:8000/v1
    python test_llama.py --ask dialogue.txt
    python test_llama.py --ask "Where was the treaty signed?" --context page.txt
    accelerate launch --num_processes 2 test_llama.py
"""

import contextlib
import json
import os
import re
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path

from pipeline import machine, models
from pipeline.attention import choose_attention
from pipeline.files import built_tasks, digest, load_rows, only_run_in, read_json, refuse_another, rows_of, sha256
from pipeline.script import fail, is_main, progress, say, script
from pipeline.settings import check_url, parse_settings
from pipeline.testing import predictions
from pipeline.testing.asking import prompt_to_ask, read_text
from pipeline.tokens import CHAT_TEMPLATES, end_tokens, tokenizer_identity, tokenizer_of
from tasks import TASKS, own, samsum, swapped, trivia_qa

# Settings: edit here, or override for one run on the command line.
ADAPTER = "auto"  # adapter: a folder, or none for the base alone; auto: OUTPUT_DIR/adapter, or none if MODEL is given
MODEL = "auto"  # model: a hub id or a folder, such as outputs/merged; auto: the base that the adapter names
NAME = ""  # suffix for the names of the prediction files; empty: none (for a model at SERVER: that model's name)
CHAT_TEMPLATE = "auto"  # chat template: on, off; auto: as in training (without an adapter: on if there is one)
COMPARE_WITH_BASE = True  # also test the base, with the adapter switched off
SWAP_ANSWERS = False  # replace the answers in trivia_qa's contexts, to see whether the model reads or recalls
SHOTS = 0  # solved train examples in front of each test prompt, for a model without an adapter; 0 = none
LOAD_IN_4BIT = None  # 4-bit weights: True, False; None: as in training, but False if MODEL is set without an adapter
MAX_BATCH_TOKENS = 0  # tokens in a batch, prompts and predictions together; 0 = 16384 on a GPU, 8192 on a CPU
SAMSUM_MAX_NEW_TOKENS = samsum.MAX_NEW_TOKENS  # length limit of a summary, in tokens; references have up to 80
TRIVIA_QA_MAX_NEW_TOKENS = trivia_qa.MAX_NEW_TOKENS  # length limit of an answer, in tokens; it also ends at a line end
OWN_MAX_NEW_TOKENS = own.MAX_NEW_TOKENS  # length limit of an answer to your own prompts, in tokens
GENERAL_TEXT = "general_text.txt"  # text file to report the perplexity of; empty: none
SERVER = ""  # OpenAI-compatible server to ask, http(s)://host/v1; empty: the model is loaded here
SERVER_MODEL = ""  # name of the model on the server; empty: the only one that the server has
SERVER_API = "auto"  # endpoint: completions, chat; auto: chat if there is a chat template or no completions endpoint
SERVER_CONCURRENCY = 8  # number of parallel requests
SERVER_TIMEOUT = 120.0  # a request is given up after this many seconds times SERVER_CONCURRENCY
SERVER_THOUGHT_TOKENS = 0  # additional tokens for the thoughts of a reasoning model; 0 = none
SERVER_MAX_EXAMPLES = 0  # number of rows per task to send to the server, which may cost money; 0 = all
SERVER_INPUT_PRICE = 0.0  # price of a million tokens that the server reads, in any currency; 0 = no price is shown
SERVER_OUTPUT_PRICE = 0.0  # price of a million tokens that the server writes; 0 = no price is shown
ASK = ""  # text to answer instead of a test: a question, a file with a dialogue, or - for standard input
CONTEXT = ""  # text file that contains the answer to ASK; trivia_qa takes the 300 words nearest to the question
TASK = "auto"  # task whose prompt ASK gets: samsum, trivia_qa, own; auto: the one that fits the text
OVERWRITE = False  # replace finished predictions, or those of another run; an interrupted run still resumes
OUTPUT_DIR = "outputs"  # folder that contains dataset/ and adapter/ and gets the predictions

# Fixed
CHOICES = {"CHAT_TEMPLATE": CHAT_TEMPLATES, "SERVER_API": ("auto", "completions", "chat"), "TASK": ("auto", *TASKS)}
CHOICES |= {"LOAD_IN_4BIT": (bool, None), "SERVER_CONCURRENCY": (int,), "SERVER_TIMEOUT": (float,)}
CHOICES |= dict.fromkeys(("COMPARE_WITH_BASE", "SWAP_ANSWERS", "OVERWRITE"), (bool,))
CHOICES |= dict.fromkeys(("SAMSUM_MAX_NEW_TOKENS", "TRIVIA_QA_MAX_NEW_TOKENS", "OWN_MAX_NEW_TOKENS"), (int,))
CHOICES |= dict.fromkeys(("SHOTS", "MAX_BATCH_TOKENS", "SERVER_MAX_EXAMPLES", "SERVER_THOUGHT_TOKENS"), (0, int))
CHOICES |= dict.fromkeys(("SERVER_INPUT_PRICE", "SERVER_OUTPUT_PRICE"), (0, float))
# Settings that are resolved, or without an influence
UNBOUND = ("adapter", "model", "chat_template", "load_in_4bit", "general_text", "name", "overwrite", "output_dir")
UNBOUND += ("ask", "context", "task", "shots")  # shots are noted where there are any: files without stay finished


def parse_args(argv=None):
    args = parse_settings(sys.modules[__name__], argv, CHOICES)
    if not re.fullmatch(r"[\w-]*", args.name) or re.fullmatch(r"(.*_)?swapped", args.name.lower()):
        fail("--name must be made of letters, digits, - and _, and not end in swapped (files that swap answers do)")
    if args.server:
        check_url("--server", args.server)
        if args.shots:
            fail("--shots is for a model that is loaded here: leave out --server or --shots")
    if args.ask and (args.server or args.shots or args.swap_answers):
        fail("--ask is for a model that is loaded here, without examples: leave out --server, --shots, --swap-answers")
    if not args.ask and any(str(word).split("=")[0] == "--ask" for word in (sys.argv[1:] if argv is None else argv)):
        fail("--ask has no text: give a question, a dialogue or a prompt")
    if args.ask == args.context == "-":
        fail("--ask and --context cannot both be read from standard input: give a file for one of them")
    if not args.ask and (args.context or args.task != "auto"):
        fail("--context and --task are for --ask: give that, too")
    return args


def swap_answers(args, rows):
    """The rows with another answer in their context (a Dataset), and {"swapped" or why not: how many rows}."""
    from datasets import Dataset

    template = built_tasks(args.output_dir, TASKS)[swapped.OF]["prompt"]
    swapped_rows, counts = swapped.swap_answers(rows, template)
    say(f"{swapped.OF}, answers in the context: {', '.join(f'{n} {what}' for what, n in counts.items())}")
    if not swapped_rows:
        fail(f"no answer can be swapped: run build_dataset.py with {swapped.OF}, a context and more test rows")
    dataset = Dataset.from_list(swapped_rows)
    dataset._fingerprint = rows._fingerprint  # the rows that they were made from
    return dataset, counts


def answer(args):
    """Print what the base and the fine-tuned model, or a model alone, answer to ASK."""
    base, folder, in_4bit, source = choose_system(args)
    task, prompt, one_line = prompt_to_ask(args, TASKS, source or Path(args.output_dir, "adapter"))
    import torch
    from datasets import Dataset

    from pipeline.testing import decoding

    machine.own_gpu("test_llama.py")
    models.quiet()
    refuse_another_base(args, base, folder)
    tokenizer = tokenizer_of(base, source, args.chat_template)
    model, adapter_off = decoding.load_system(base, folder, in_4bit, args.compare_with_base)
    rows = Dataset.from_list([{"id": "--ask", "prompt": prompt, "completion": " a"}])  # its completion is not shown
    new, limit = vars(args)[f"{task}_max_new_tokens"], model.config.max_position_embeddings
    [row] = predictions.encoded(tokenizer, rows)
    if len(row["prompt_ids"]) + new > limit:
        tokens = f"{len(row['prompt_ids']):,} tokens{' with its context' if args.context else ''}"
        length = f"its prompt has {tokens}, its answer up to {new:,}, and the model can read {limit:,}"
        less = "" if len(row["prompt_ids"]) > limit else f", or lower --{task.replace('_', '-')}-max-new-tokens"
        fail(f"--ask is too long ({length}): shorten it{less}")
    way = ", through the chat template" if tokenizer.chat_template else ""
    say(f"asked as {task}: {len(row['prompt_ids'])} tokens{way}, answered in at most {new} tokens")
    attention, ends, bar = choose_attention("packed"), end_tokens(base, tokenizer), progress(total=1)
    names = {"base": "the base", "tuned": "the fine-tuned model" if folder else "the model"}
    answered_by = predictions.systems({"adapter": folder or "none", "compare_with_base": args.compare_with_base})
    for system in sorted(answered_by):  # the base first
        with adapter_off() if system == "base" else contextlib.nullcontext(), torch.inference_mode():
            [result] = decoding.test_batch(model, tokenizer, [row], attention, new, ends, one_line, bar)
        cut_off = " (cut off at the limit of tokens)" if result["hit_max_new_tokens"] else ""
        say(f"\n{names[system]}{cut_off}:\n{result['prediction'] or '(nothing)'}")


def choose_system(args):
    """What is tested: the model's name, the adapter's folder or None, whether in 4 bits, whose tokenizer it gets."""
    given = args.model != "auto"
    alone = args.adapter == "none" or (args.adapter == "auto" and given)
    if alone and given:
        base = models.find_model(args.model)
        warn_of_another_merge(args, base)
        return base, None, bool(args.load_in_4bit), None
    folder = Path(args.output_dir, "adapter") if args.adapter in ("auto", "none") else Path(args.adapter)
    named = models.read_adapter(folder)
    base = models.find_model(args.model if given else named)
    trained = models.read_run(folder)["settings"]
    in_4bit = args.load_in_4bit
    if in_4bit is None:
        in_4bit = bool(trained.get("load_in_4bit", True))  # most are QLoRA's
    if not trained:
        how = f"in {4 if in_4bit else 16} bits, with --chat-template {args.chat_template}"
        say(f"{folder} does not say how it was trained: it is tested {how}")
    if args.chat_template == "auto":
        args.chat_template = trained.get("chat_template", "auto")
    return base, None if alone else folder, in_4bit, folder  # the base alone gets the adapter's prompts


def warn_of_another_merge(args, base):
    """Warn where a model in OUTPUT_DIR was merged from another adapter than OUTPUT_DIR has now."""
    weights = Path(args.output_dir, "adapter", "adapter_model.safetensors")
    merged = read_json(Path(base, "merge.json")).get("adapter_sha256")
    beside = Path(args.output_dir).resolve() == Path(base).parent.resolve() and weights.is_file()
    if merged and beside and merged != sha256(weights):
        now = Path(args.output_dir, "adapter")
        say(f"warning: {args.model} was merged from another adapter than {now} is now: run merge_llama.py again")


def refuse_another_base(args, base, folder, weights=None):
    """Exit 2 where an adapter was trained on other weights than its base has now, unless --model asks for these."""
    if not folder or args.model != "auto" or not (trained_on := models.read_run(folder)["run"].get("weights")):
        return  # an adapter from elsewhere names none
    now = {"model": base, "weights": weights or models.weights_identity(base)}
    instead = shlex.join(["--model", base, "--adapter", str(folder)])
    remedy = f"put back what {folder}/run.json names, or give {instead} to take this one all the same"
    refuse_another(f"{base}, the base of {folder},", now | {"weights": trained_on}, now, remedy)


def read_general_text(args):
    """The text of GENERAL_TEXT, empty where none is asked for; exits 2 where it cannot be read."""
    if not args.general_text:
        return ""
    here, beside = Path(args.general_text), Path(__file__).parent / "pipeline" / "testing" / args.general_text
    return read_text("--general-text", args.general_text, here if here.is_file() else beside).strip()


def tasks_of(args, rows):
    """{task: where its answers end, `one_line`, and their most tokens, `new`} of the tasks that have rows."""
    present = set(rows.unique("task"))
    if unknown := present - TASKS.keys():
        fail(f"test of {args.output_dir}/dataset has an unknown task {min(unknown)}: run build_dataset.py again")
    tasks = {}
    for task, built in built_tasks(args.output_dir, TASKS).items():
        new = vars(args)[f"{task}_max_new_tokens"]
        if task in present:
            tasks[task] = {"one_line": built["one_line"], "new": new}
        else:
            del vars(args)[f"{task}_max_new_tokens"]  # it does not tell one run from another
    return tasks


def run_identity(args, base, folder, in_4bit, rows, tokenizer, text):
    """What has to be the same for a run to resume, `settings` in the files: weights, rows, settings."""
    import torch

    lora = read_json(folder / "adapter_config.json") if folder else {}
    for without_effect in ("base_model_name_or_path", "peft_version", "lora_dropout"):
        lora.pop(without_effect, None)
    run = {
        "model": base,
        "weights": models.weights_identity(base),
        "adapter": sha256(folder / "adapter_model.safetensors")[:16] if folder else "none",
        "adapter_config": digest(json.dumps(lora, sort_keys=True)),
        "4_bit": in_4bit,
        "chat_template": digest(tokenizer.chat_template),
        "tokenizer": tokenizer_identity(tokenizer),
        "rows": rows._fingerprint,
        "examples": len(rows),
        "general_text": digest(text),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    for name, value in vars(args).items():
        if name not in UNBOUND and not name.startswith("server"):
            run[name] = value
    return run


def plan(task, rows, tokenizer, new, limit, max_tokens, shots=()):
    """The batches of the rows that fit the model's `limit` of tokens: lists of dicts, `length` their most tokens.

    A batch has at most max_tokens when padded. The longest come first: memory ends at once or not at all.
    """
    fitting = []
    for row in predictions.encoded(tokenizer, rows, shots):
        length = len(row["prompt_ids"]) + max(new, len(row["completion_ids"]))
        if length <= limit:
            fitting.append(row | {"length": length})
    if not fitting:
        flag = f"--{task.replace('_', '-')}-max-new-tokens" + (" or --shots" if shots else "")
        fail(f"no row of {task} fits the model's {limit} tokens: lower {flag}, or take a model that reads more")
    if left := len(rows) - len(fitting):
        say(f"{task}: {left} of {len(rows)} rows do not fit the model's {limit} tokens: counted as wrong")
    batches = []
    for row in sorted(fitting, key=lambda row: -row["length"]):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0]["length"] > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def test_task(args, task, rows, tokenizer, model, adapter_off, path, run, state, one_line, new, shots=()):
    """Test this process' share of the batches, appending each to its work file as soon as it is done."""
    import torch

    from pipeline.testing import decoding

    attention = choose_attention("packed")
    max_tokens = args.max_batch_tokens if attention == "packed" else 1  # else nothing keeps the rows apart
    batches = plan(task, rows, tokenizer, new, model.config.max_position_embeddings, max_tokens, shots)
    done = predictions.examples_done(path, run)
    if done:
        say(f"{task}: going on, {len(done)} of {len(rows)} rows are there from before")
    state.wait_for_everyone()  # all have read what is done before any adds to it
    undone = [batch for batch in batches if not all(row["place"] in done for row in batch)]
    share = undone[state.process_index :: state.num_processes]
    ends = end_tokens(run["model"], tokenizer)
    started, tokens = time.time(), 0
    systems = predictions.systems(run)
    bar = progress(total=len(systems) * sum(map(len, share)), desc=task, unit=" answers")
    with bar, torch.inference_mode():
        for batch in share:
            examples = {row["place"]: {"tokens": len(row["completion_ids"])} for row in batch}
            for prefix in systems.values():
                with adapter_off() if prefix else contextlib.nullcontext():
                    results = decoding.test_batch(model, tokenizer, batch, attention, new, ends, one_line, bar)
                for row, result in zip(batch, results, strict=True):
                    examples[row["place"]] |= {prefix + key: value for key, value in result.items()}
                    tokens += len(row["prompt_ids"]) + len(row["completion_ids"]) + result["new_tokens"]
            predictions.append_work(path, run, list(examples.items()), state.process_index)
    took = f"{time.time() - started:.1f} s" + (" (first process)" if state.num_processes > 1 else "")
    say(f"{task}: {len(rows)} rows, {tokens:,} tokens in {took}")


def test_undone(args, tasks, base, folder, in_4bit, tokenizer, rows, state):
    """Test the tasks that are not finished; the paths of all that have rows."""
    from pipeline.testing import decoding  # and torch, transformers
    from pipeline.testing.shots import choose_shots

    text = read_general_text(args)
    run = run_identity(args, base, folder, in_4bit, rows, tokenizer, text)
    if args.shots:
        run |= choose_shots(args.output_dir, tasks, args.shots, tokenizer)
    refuse_another_base(args, base, folder, run["weights"])
    built = read_json(Path(args.output_dir, "dataset", "train", "state.json")).get("_fingerprint")
    if folder and models.read_run(folder)["run"].get("train rows", built) != built:
        say(f"warning: {folder} was trained on another data set: it may have been trained on rows of this test")
    parts = {task: rows_of(rows, task) for task in TASKS}
    paths = predictions.paths_of(TASKS, args.output_dir, args.name, args.swap_answers)
    done = [task for task, path in paths.items() if predictions.finished(args, path, run)]
    state.wait_for_everyone()  # all have looked before any changes a file
    if any(len(part) for task, part in parts.items() if task not in done):
        system = decoding.load_system(base, folder, in_4bit, "base" in predictions.systems(run))
        general = decoding.test_general_text(text, tokenizer, *system, run) if text and is_main() else {}
    for task, path in paths.items():
        if task in done:
            say(f"{path} is finished, by the same settings on the same rows: nothing to do")
        elif parts[task]:
            test_task(args, task, parts[task], tokenizer, *system, path, run, state, **tasks[task])
            state.wait_for_everyone()
            if is_main():
                predictions.write_predictions(task, parts[task], folder, path, run, general)
            say(f"wrote {path}")
        elif is_main():  # else evaluations.py would score another run's predictions
            path.unlink(missing_ok=True)
        if is_main():
            predictions.remove_work(path)
    return [path for path in paths.values() if path.exists()]


@script
def main(argv=None):
    args = parse_args(argv)
    if (args.server or args.ask) and os.environ.get("WORLD_SIZE", "1") != "1":
        reason = f"{'--server' if args.server else '--ask'} is for one process"
        fail(f"{reason}: start the script with python, not with torchrun or accelerate launch")
    started = time.time()
    if args.ask:
        answer(args)
        return
    rows = load_rows(args.output_dir, "test")
    if args.swap_answers:
        rows, args.swap_answers = swap_answers(args, rows)  # how many, for the settings in the file
    tasks = tasks_of(args, rows)
    base, folder, in_4bit, source = choose_system(args)
    if args.shots and folder:
        fail("--shots is for a model without an adapter: give --adapter none, and a --name")
    say(f"testing {args.server or folder or base} on {len(rows):,} rows")
    if args.server:
        from pipeline.testing.served import test_server

        test_server(args, tasks, base, tokenizer_of(base, source, args.chat_template), rows)
        return
    import torch
    from accelerate import PartialState

    machine.own_gpu("test_llama.py")
    machine.warn_of_load()
    models.quiet()
    # 16384 take 2 GB for keys and values at 8B; on a CPU half of it is as fast, in less memory
    args.max_batch_tokens = args.max_batch_tokens or (16384 if torch.cuda.is_available() else 8192)
    with only_run_in(args.output_dir):
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        tokenizer = tokenizer_of(base, source, args.chat_template)
        paths = test_undone(args, tasks, base, folder, in_4bit, tokenizer, rows, state)
        if is_main():
            predictions.show(paths, rows)
        say(f"\n{time.time() - started:.0f} s, peak memory {machine.peak_memory():.2f} GB")
        state.wait_for_everyone()
        state.destroy_process_group()


if __name__ == "__main__":
    main()
