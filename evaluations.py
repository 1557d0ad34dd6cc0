"""Score the predictions of test_llama.py, or of any other system: ROUGE, BLEU, exact match, F1; base beside tuned.

samsum gets ROUGE-1/2/L/Lsum (stemmed, one sentence per line), BLEU and exact match; trivia_qa gets exact match and F1
by the official rules over all aliases, BLEU with effective order, and ROUGE. Scores run from 0 to 100; perplexity,
where the predictions carry it, is printed beside them. Needs neither torch nor the network.

Reads:  OUTPUT_DIR/samsum_predictions.json and trivia_qa_predictions.json, whichever exist, or the files of
        --predictions: {"task": "samsum", "examples": [{"references": ["..."], "prediction": "..."}]} is enough.
Writes: OUTPUT_DIR/evaluation.json.

    python evaluations.py
    python evaluations.py --predictions my_predictions.json --output-dir outputs/mine
"""

import argparse
import json
import os
import re
import string
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Settings: edit here, or override for one run on the command line.
PREDICTIONS = ()  # prediction files, one per task; none = those of test_llama.py in OUTPUT_DIR
OUTPUT_DIR = "outputs"

# Fixed
ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SCORES = {  # what each task reports, in the order of the table
    "samsum": (*ROUGES, "bleu", "exact_match"),
    "trivia_qa": ("exact_match", "f1", "bleu_effective_order", *ROUGES),
}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")  # nltk's punkt would be a download
PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
PACKAGES = ("evaluate", "rouge_score", "sacrebleu")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--predictions", nargs="+", default=PREDICTIONS, metavar="FILE", help="one file per task")
    parser.add_argument("--output-dir", default=OUTPUT_DIR, help="where evaluation.json is written")
    return parser.parse_args(argv)


def fail(message):
    """Print one sentence on stderr and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def require(condition, message):
    if not condition:
        fail(message)


def read_predictions(path):
    """One checked prediction file as a dict; anything wrong with it ends the script in one sentence."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        fail(f"{path} is not valid JSON ({error}): run test_llama.py again")
    require(isinstance(data, dict), f"{path} must hold a JSON object with task and examples")
    task, examples, block = data.get("task"), data.get("examples"), data.get("perplexity", {})
    require(task in list(SCORES), f"{path}: task is {task!r}, must be one of {', '.join(SCORES)}")
    require(isinstance(examples, list) and examples, f"{path}: examples must be a list with at least one example")
    with_base = isinstance(examples[0], dict) and "base_prediction" in examples[0]
    for index, example in enumerate(examples):
        check_example(f"{path}: example {index}", example, with_base)
    require(isinstance(block, dict), f"{path}: perplexity must be a JSON object with tuned and base")
    for system in {"tuned", "base"} & set(block):
        number = block[system].get("perplexity") if isinstance(block[system], dict) else None
        require(type(number) in (int, float), f"{path}: perplexity of {system} must be a JSON object with perplexity")
    check_values(path, data)
    return data


def check_example(where, example, with_base):
    """`references`: list of strings, not empty; `prediction`: string; `base_prediction`: in all examples or none."""
    require(isinstance(example, dict), f"{where} must be a JSON object with references and prediction")
    for key in ("references", "prediction"):
        require(key in example, f"{where} has no {key}")
    references = example["references"]
    listed = isinstance(references, list) and references and all(isinstance(text, str) for text in references)
    require(listed, f"{where}: references must be a list of at least one string")
    require(isinstance(example["prediction"], str), f"{where}: prediction must be a string")
    require(("base_prediction" in example) == with_base, f"{where}: base_prediction must be in all examples or none")
    require(isinstance(example.get("base_prediction", ""), str), f"{where}: base_prediction must be a string")
    check_values(where, example)


def check_values(where, value):
    """Python's json reads NaN, 1e999 and half a character without a word: none may get into the scores."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        fail(f"{where} holds a number or text that is not valid JSON ({error}): run test_llama.py again")


def read_all(args):
    """{task: predictions} of the files asked for, or of those that stand in the output dir."""
    default = [Path(args.output_dir) / f"{task}_predictions.json" for task in SCORES]
    paths = args.predictions or [path for path in default if path.exists()]
    if not paths:
        fail(f"no predictions at {args.output_dir}: run test_llama.py first")
    tasks = {}
    for path in paths:
        data = read_predictions(path)
        if data["task"] in tasks:
            fail(f"{path} is a second file for {data['task']}: give one file per task")
        tasks[data["task"]] = {**data, "file": str(path)}
    return {task: tasks[task] for task in SCORES if task in tasks}


def normalize_answer(text):
    """The official TriviaQA normalisation: `_` and punctuation become blanks, lower case, no a/an/the, single blanks.

    Source: github.com/mandarjoshi90/triviaqa, evaluation/triviaqa_evaluation.py. Punctuation is ASCII's and ‘ ’ ´ `:
    “ ” and dashes stay. SQuAD's rules differ: they delete punctuation ("Spider-Man" is "spider man" here).
    """
    text = text.replace("_", " ").lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match_score(prediction, reference):
    """Whether both are equal once normalised (bool). Source: triviaqa_evaluation.py, see normalize_answer."""
    return normalize_answer(prediction) == normalize_answer(reference)


def f1_score(prediction, reference):
    """F1 (0 to 1) over the normalised words both share, with multiplicity; 0 where they share none.

    Source: triviaqa_evaluation.py, see normalize_answer.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    same = sum((Counter(predicted) & Counter(expected)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def triviaqa(predictions, references):
    """Exact match and F1, 0 to 100: the mean over all examples of the best reference; a blank prediction scores 0."""
    pairs = list(zip(predictions, references, strict=True))
    exact = [max(exact_match_score(p, r) for r in refs) if p.strip() else 0 for p, refs in pairs]
    f1 = [max(f1_score(p, r) for r in refs) for p, refs in pairs]
    return {"exact_match": 100 * sum(exact) / len(pairs), "f1": 100 * sum(f1) / len(pairs)}


def rouge(predictions, references):
    """rouge_score's F-measures, 0 to 100: plain means of the best reference; stemmed, a sentence per line."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(list(ROUGES), use_stemmer=True)
    totals = dict.fromkeys(ROUGES, 0.0)
    for prediction, refs in zip(predictions, references, strict=True):
        lines = [SENTENCE_END.sub("\n", ref.strip()) for ref in refs]  # a line end matters to Lsum alone
        scores = scorer.score_multi(lines, SENTENCE_END.sub("\n", prediction.strip()))
        for name in ROUGES:
            totals[name] += scores[name].fmeasure
    return {name: 100 * total / len(predictions) for name, total in totals.items()}


def bleu(predictions, references, effective_order):
    """sacrebleu's corpus BLEU, 0 to 100, and its signature.

    effective_order: ignore n-gram orders longer than the answers; without it one right word scores 0.
    """
    from sacrebleu.metrics import BLEU

    width = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(width)]
    if len(references) != len(predictions):  # sacrebleu would cut silently
        raise ValueError("predictions and references differ in length")
    metric = BLEU(effective_order=effective_order)
    name = "bleu_effective_order" if effective_order else "bleu"
    score = metric.corpus_score(predictions, streams).score
    return {name: score, f"{name}_signature": str(metric.get_signature())}


def import_evaluate():
    """evaluate, without the transformers and torch that its evaluators would import: seconds for nothing."""
    hide = "transformers" not in sys.modules
    if hide:
        sys.modules["transformers"] = None  # its import now fails, which evaluate allows for
    try:
        import evaluate
        import evaluate.saving
    finally:
        if hide:
            del sys.modules["transformers"]
    evaluate.saving._git_commit_hash = lambda: None  # it needs git, and complains where the cwd is no repository
    return evaluate


def make_metrics(task, cache_dir):
    """The task's metrics as one evaluate.combine object: compute(predictions=[str], references=[[str]]) -> dict."""
    import datasets

    evaluate = import_evaluate()

    text = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
    info = {"description": __doc__, "citation": "", "features": datasets.Features(text)}

    class Rouge(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(**info)

        def _compute(self, predictions, references):
            return rouge(predictions, references)

    class Bleu(Rouge):
        def _compute(self, predictions, references):
            return bleu(predictions, references, effective_order=task == "trivia_qa")

    class TriviaQA(Rouge):
        def _compute(self, predictions, references):
            return triviaqa(predictions, references)

    # evaluate makes a cache folder even when nothing goes into it: not in the user's home, not in the cwd
    options = {"keep_in_memory": True, "seed": 0, "cache_dir": cache_dir}
    return evaluate.combine([Rouge(**options), Bleu(**options), TriviaQA(**options)])


def score_task(task, data):
    """{"examples": n, "tuned": {metric: value}, "base": ... and "perplexity": ... where the file has them}."""
    examples = data["examples"]
    references = [example["references"] for example in examples]
    result = {"examples": len(examples), "file": data["file"]}
    with tempfile.TemporaryDirectory() as cache_dir:
        metrics = make_metrics(task, cache_dir)
        for system, key in (("tuned", "prediction"), ("base", "base_prediction")):
            if key in examples[0]:
                predictions = [example[key] for example in examples]
                scores = metrics.compute(predictions=predictions, references=references)
                names = [*SCORES[task], *(name for name in scores if name.endswith("_signature"))]
                result[system] = {name: scores[name] for name in names}
    return result | {key: data[key] for key in ("perplexity", "model", "adapter") if key in data}


def save(path, results):
    """Write evaluation.json with evaluate.save beside its place, then rename: it appears whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".evaluation-") as folder:
            os.replace(import_evaluate().save(Path(folder) / path.name, **results), path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def print_table(task, result):
    """The scores of one task, 2 decimals: base, tuned, difference, or tuned alone."""
    systems = [system for system in ("base", "tuned") if system in result]
    rows = [(name, [result[system][name] for system in systems]) for name in SCORES[task]]
    block = result.get("perplexity", {})
    if all(system in block for system in systems):
        rows.append(("perplexity", [block[system]["perplexity"] for system in systems]))
    header = [*systems, "difference"] if len(systems) == 2 else systems
    title = f"{task} ({result['examples']} examples)"
    print(f"\n{title:<28}" + "".join(f"{name:>14}" for name in header))
    for name, values in rows:
        difference = f"{values[1] - values[0]:>+14.2f}" if len(values) == 2 else ""
        print(f"{name:<28}" + "".join(f"{value:>14.2f}" for value in values) + difference)


def main(argv=None):
    args = parse_args(argv)
    tasks = read_all(args)
    path = Path(args.output_dir) / "evaluation.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        fail(f"cannot write to {args.output_dir}: {error.strerror}")
    from importlib.metadata import version

    results = {task: score_task(task, data) for task, data in tasks.items()}
    versions = {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
    save(path, results | {"versions": versions, "settings": {**vars(args), "stemmer": True}})
    for task, result in results.items():
        print_table(task, result)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
