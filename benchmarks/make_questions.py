"""Make the folder of real questions behind README's first table: XQuAD's English ones in trivia_qa's layout.

XQuAD (Artetxe et al. 2020, CC BY-SA 4.0) has 1,190 questions of SQuAD 1.1 on 48 articles of five paragraphs. An
article's page is its paragraphs with a blank line between them. In the data set's order the first 30 articles are
train, the next 12 validation, which build_dataset.py tests on, and the last 6 are left out: 786 and 277 questions.
The hub's rows name no article: five contexts after one another are one.

    python benchmarks/make_questions.py --output questions
    python benchmarks/real_model.py --model smollm2-135m-instruct --samsum knkarthick/samsum --trivia-qa questions
"""

import argparse
import json
from pathlib import Path

HUB = "hf://datasets/google/xquad/xquad.en/validation-*.parquet"
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


def main(argv=None):
    from datasets import Dataset

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--xquad", default=HUB, help="or a parquet file of its form, or SQuAD's JSON: xquad.en.json")
    parser.add_argument("--output", type=Path, required=True, help="gets rc.wikipedia/")
    args = parser.parse_args(argv)
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
