"""Measure evaluations.py at the size of the real test sets: 819 + 7,993 rows, base and tuned, every figure and page.

Writes invented predictions of real lengths (20-word summaries, 14 aliases a question, 300-word contexts), runs the
script as a user does, and opens its page in Chromium where there is one. Prints seconds and peak memory.

    python benchmarks/evaluations.py
    python benchmarks/evaluations.py --runs 1 --folder /tmp/evaluations_benchmark
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROWS = {"samsum": 819, "trivia_qa": 7993}
ALIASES = 14  # per question; the mean of rc.wikipedia's validation split is of that order
CONTEXT_WORDS = 300  # MAX_CONTEXT_WORDS of build_dataset.py
RUNS = 3
FOLDER = "/tmp/evaluations_benchmark"
CHROMIUM = "/usr/bin/chromium"
ROOT = Path(__file__).resolve().parent.parent


def write_predictions(folder, seed=0):
    """Both prediction files; tuned is nearer to the references than base, which runs on to its limit."""
    rng = random.Random(seed)
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "r", "n")]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(20000)]
    pool = rng.choices(words, weights=[1 / (rank + 5) for rank in range(len(words))], k=1_000_000)

    def text(length):
        start = rng.randrange(len(pool) - length)
        return " ".join(pool[start : start + length])

    def sentences(length):
        return ". ".join(text(max(2, length // 2)).capitalize() for _ in range(2)) + "."

    def near(reference, kept):
        return " ".join(word if rng.random() < kept else rng.choice(pool) for word in reference.split())

    for task, rows in ROWS.items():
        examples = []
        for i in range(rows):
            if task == "samsum":
                gold = [sentences(rng.randint(6, 34))]
                tuned, base, prompt = near(gold[0], 0.6), sentences(70), text(rng.randint(30, 250))
            else:
                value = text(rng.choice((1, 2, 2, 3))).title()
                gold = [value, *(f"{value} {text(1)}" for _ in range(ALIASES // 2))]
                gold += [text(rng.choice((1, 2, 3))).title() for _ in range(ALIASES - len(gold))]
                tuned, base = value if rng.random() < 0.6 else text(2), f"{text(18)} {near(value, 0.3)}"
                prompt = f"{text(rng.randint(CONTEXT_WORDS // 2, CONTEXT_WORDS))}\n\nQuestion: {text(14)}?\nAnswer:"
            nll = rng.uniform(1, 30)
            examples.append({"id": f"{task}:{i}", "references": gold, "answer_in_context": rng.random() < 0.8,
                "prompt": prompt, "prediction": tuned, "nll": nll, "base_prediction": base,
                "base_nll": nll + rng.uniform(0, 20), "tokens": rng.randint(3, 40)})  # fmt: skip
        (folder / f"{task}_predictions.json").write_text(json.dumps({"task": task, "examples": examples}))


def open_page(page):
    """Seconds from asking for the page to its table of examples standing there, in a fresh headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab, start = browser.new_page(), time.perf_counter()
        tab.goto(page.as_uri())
        tab.wait_for_selector("#examples tbody tr")
        seconds = time.perf_counter() - start
        browser.close()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", default=FOLDER, help="gets the predictions and the results")
    parser.add_argument("--runs", type=int, default=RUNS)
    args = parser.parse_args()
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder)
    seconds = []
    for _ in range(args.runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "evaluations.py", "--output-dir", folder], check=True, cwd=folder)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    page = folder / "evaluation.html"
    print(f"\n{os.cpu_count()} cores; {sum(ROWS.values())} rows, 2 systems")
    print(f"evaluations.py: {statistics.median(seconds):.1f} s (median of {args.runs}: "
          f"{', '.join(f'{value:.1f}' for value in seconds)}), peak {peak:.0f} MB")  # fmt: skip
    print(f"evaluation.html: {page.stat().st_size / 1e6:.1f} MB")
    if Path(CHROMIUM).exists():
        print(f"opened in Chromium: {statistics.median(open_page(page) for _ in range(3)):.2f} s (median of 3)")


if __name__ == "__main__":
    main()
