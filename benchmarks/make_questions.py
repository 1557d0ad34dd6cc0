"""Make the rows behind README's first table: XQuAD's English questions in trivia_qa's layout, 818 dialogues of samsum.

XQuAD (Artetxe et al. 2020, CC BY-SA 4.0) has 1,190 questions of SQuAD 1.1 on 48 articles of five paragraphs. An
article's page is its paragraphs with a blank line between them. In the data set's order the first 30 articles are
train, the next 12 validation, which build_dataset.py tests on, and the last 6 are left out: 786 and 277 questions.
The hub's rows name no article: five contexts after one another are one. The dialogues are samsum's validation rows in
their order: 600 are train, 100 validation, 118 test.

    python benchmarks/make_questions.py --output questions --dialogues dialogues
    python benchmarks/real_model.py --model smollm2-135m-instruct --samsum dialogues --trivia-qa questions
"""

import argparse
import csv
import json
from itertools import islice
from pathlib import Path

from huggingface_hub import hf_hub_download

HUB = "hf://datasets/google/xquad/xquad.en/validation-*.parquet"
SAMSUM = "knkarthick/samsum"
DIALOGUES = {"train": 600, "validation": 100, "test": 118}
PARAGRAPHS, TRAIN, VALIDATION = 5, 30, 12  # of an article; articles of each split


def read(source):
    """[(id, question, context, its first answer)] of SQuAD's JSON or of the hub's parquet."""
    from datasets import load_dataset

    if not source.endswith(".json"):
        rows = load_dataset("parquet", data_files=source, split="train")
        return [(row["id"], row["question"], row["context"], row["answers"]["text"][0]) for row in rows]
    found = []
    for article in json.loads(Path(source).read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for row in paragraph["qas"]:
                found.append((row["id"], row["question"], paragraph["context"], row["answers"][0]["text"]))
    return found


def write_dialogues(source, folder):
    """Cut a file like samsum's validation.csv into DIALOGUES."""
    csv.field_size_limit(2**31 - 1)
    with open(source, encoding="utf-8", newline="") as file:
        rows = iter(list(csv.reader(file)))
    head = next(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in DIALOGUES.items():
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *islice(rows, count)])
        print(f"{count} dialogues: {folder / f'{split}.csv'}")


def main(argv=None):
    from datasets import Dataset

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--xquad", default=HUB, help="or a parquet file of its form, or SQuAD's JSON: xquad.en.json")
    parser.add_argument("--output", type=Path, required=True, help="gets rc.wikipedia/")
    parser.add_argument("--dialogues", type=Path, help="gets train.csv, validation.csv and test.csv")
    parser.add_argument("--samsum", help="samsum's validation.csv; else it is fetched from the hub")
    args = parser.parse_args(argv)
    if args.dialogues:
        source = args.samsum or hf_hub_download(SAMSUM, "validation.csv", repo_type="dataset")
        write_dialogues(source, args.dialogues)
    rows = read(args.xquad)
    contexts = list(dict.fromkeys(context for _, _, context, _ in rows))
    places = {context: place for place, context in enumerate(contexts)}
    splits = {"train": [], "validation": []}
    for row_id, question, context, answer in rows:
        article = places[context] // PARAGRAPHS
        if article < TRAIN + VALIDATION:
            page = "\n\n".join(contexts[article * PARAGRAPHS : (article + 1) * PARAGRAPHS])
            row = {"question_id": f"xq_{row_id}", "question": question, "entity_pages": {"wiki_context": [page]}}
            row["answer"] = {"value": answer, "aliases": [answer]}
            splits["train" if article < TRAIN else "validation"].append(row)
    for split, split_rows in splits.items():
        path = args.output / "rc.wikipedia" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(split_rows).to_parquet(path)
        print(f"{len(split_rows)} questions: {path}")


if __name__ == "__main__":
    main()
