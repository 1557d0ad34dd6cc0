"""Measure build_dataset.py on a trivia_qa source of the real size per question: questions a second, peak memory.

Writes sources of N questions with some 54 kB of invented pages each in the hub's layout, builds each of them, and
builds the first once more the way that comes to mind first: datasets.load_dataset, then map with the same renderer.

    python benchmarks/build_dataset.py
    python benchmarks/build_dataset.py --questions 10000 --folder /tmp/trivia_qa --runs 3
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

QUESTIONS = [10000, 5000, 20000]
PAGES = 2  # per question
PAGE_BYTES = 27_000  # the real mean is 54 kB a question
ROWS_PER_GROUP = 1000
RUNS = 3
FOLDER = "/tmp/build_dataset_benchmark"
ROOT = Path(__file__).resolve().parent.parent

ALTERNATIVE = """
import sys
import build_dataset
from datasets import load_dataset
from tasks import trivia_qa
source, processes = sys.argv[1:]
settings = build_dataset.parse_args([])
def render(row):
    item = trivia_qa.render(row, "train", settings)
    return {"prompt": item["prompt"] if isinstance(item, dict) else None}
if __name__ == "__main__":
    files = {"train": "rc.wikipedia/train-*.parquet"}
    rows = load_dataset(source, data_files=files, split="train", cache_dir=source + ".cache")
    rows = rows.map(render, remove_columns=rows.column_names, num_proc=int(processes))
    print(len(rows.filter(lambda prompt: prompt is not None, input_columns="prompt")))
"""


def write_source(folder, questions, seed=0):
    """rc.wikipedia/ with `questions` train rows and 200 test rows whose answers stand in their pages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(seed)
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "r", "n")]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(20000)]
    weights = [1 / (rank + 5) for rank in range(len(words))]  # Zipf: few words are most of a text
    pool = rng.choices(words, weights=weights, k=2_000_000)

    def page(facts):
        sentences, size = list(facts), 0
        while size < PAGE_BYTES:
            start = rng.randrange(len(pool) - 30)
            sentences.append(" ".join(pool[start : start + rng.randint(8, 24)]).capitalize() + ".")
            size += len(sentences[-1]) + 1
        rng.shuffle(sentences)
        return "\n".join(" ".join(sentences[i : i + 6]) for i in range(0, len(sentences), 6))

    def rows(split, count):
        for i in range(count):
            subject, answer = f"{rng.choice(words)} {rng.choice(words)}".title(), rng.choice(words).title() + f" {i}"
            question = f"Who built the {subject} in the town of {rng.choice(words).title()} near {rng.choice(words)}?"
            pages = [page([f"The {subject} was built by {answer}."]), *(page([]) for _ in range(PAGES - 1))]
            yield {
                "question": question,
                "question_id": f"{split}_{i}",
                "entity_pages": {"title": [subject] * PAGES, "wiki_context": pages},
                "answer": {"value": answer, "aliases": [answer]},
            }

    folder = Path(folder) / "rc.wikipedia"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", questions), ("validation", 200)):
        batch, writer = [], None
        for row in rows(split, count):
            batch.append(row)
            if len(batch) == ROWS_PER_GROUP or row["question_id"] == f"{split}_{count - 1}":
                table = pa.Table.from_pylist(batch)
                writer = writer or pq.ParquetWriter(folder / f"{split}-00000-of-00001.parquet", table.schema)
                writer.write_table(table)
                batch = []
        writer.close()


def processes_of(pid):
    found = [pid]
    for child in found:
        try:
            for task in os.listdir(f"/proc/{child}/task"):
                found += map(int, Path(f"/proc/{child}/task/{task}/children").read_text().split())
        except OSError:
            pass
    return found


def measure(command):
    """Seconds, and the highest resident memory (MB) of any one process, with and without mapped files."""
    peaks = {"VmHWM": 0, "RssAnon": 0}
    start = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    def watch():
        while process.poll() is None:
            for pid in processes_of(process.pid):
                try:
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                except OSError:
                    continue
                for line in lines:
                    name, _, value = line.partition(":")
                    if name in peaks:
                        peaks[name] = max(peaks[name], int(value.split()[0]) / 1024)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{errors}")
    return time.time() - start, peaks["VmHWM"], peaks["RssAnon"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", nargs="+", type=int, default=QUESTIONS)
    parser.add_argument("--runs", type=int, default=RUNS, help="of the first size; its medians are printed")
    parser.add_argument("--folder", default=FOLDER, help="for sources and outputs; about 1 GB per 20,000 questions")
    args = parser.parse_args()
    folder, processes = Path(args.folder), os.cpu_count()
    print(f"{'':<34}{'questions/s':>12}{'peak MB':>10}{'anonymous MB':>14}")
    for size in args.questions:
        source, output = folder / f"source_{size}", folder / f"output_{size}"
        if not source.exists():
            write_source(source, size)
        build = [sys.executable, "build_dataset.py", "--tasks", "trivia_qa", "--trivia-qa", str(source)]
        build += [f"--{split}-examples-per-task=0" for split in ("train", "test")] + ["--output-dir", str(output)]
        results = {"build_dataset.py": [], "load_dataset + map": []}
        for _ in range(args.runs if size == args.questions[0] else 1):
            subprocess.run(["rm", "-rf", str(output), f"{source}.cache"], check=True)
            results["build_dataset.py"].append(measure(build))
            if size == args.questions[0]:
                alternative = [sys.executable, "-c", ALTERNATIVE, str(source), str(processes)]
                results["load_dataset + map"].append(measure(alternative))
        for name, runs in results.items():
            if runs:
                seconds, peak, anonymous = (statistics.median(values) for values in zip(*runs, strict=True))
                print(
                    f"{name + f', N = {size:,}':<34}{size / seconds:>12,.0f}{peak:>10,.0f}{anonymous:>14,.0f}",
                    flush=True,
                )
        report = json.loads((output / "dataset_report.json").read_text())
        rate = report["tasks"]["trivia_qa"]["answer_in_context"]["train"]["question"]
        print(f"  the answer is in the context of {rate:.1%} of the training questions")


if __name__ == "__main__":
    main()
