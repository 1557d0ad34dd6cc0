"""Solved training examples in front of each test prompt: a fair baseline for a model without an adapter."""

import random

from pipeline.files import load_rows, rows_of
from pipeline.script import fail, say
from pipeline.testing.predictions import encoded

SEED = 0  # of drawing the examples


def choose_shots(output_dir, tasks, number, tokenizer):
    """Give each of `tasks` its `shots`, [(prompt, completion)], the same for all its rows; what is noted of them.

    They are drawn among the shorter half of the task's rows in train, which has no row near one of test. In plain
    text a model continues with a further example after its answer: there an answer ends at its line's end,
    unless a completion of the task in train has several lines.
    """
    train = load_rows(output_dir, "train")
    noted = {"shots": number, "shot_ids": {}, "shot_tokens": {}}
    for task, how in tasks.items():
        rows = rows_of(train, task)
        if len(rows) < 2 * number:
            fail(f"--shots {number} needs {2 * number} train rows of {task}, whose shorter half it draws from")
        single_lines = not any("\n" in completion.strip() for completion in rows["completion"])
        shorter = sorted(encoded(tokenizer, rows), key=tokens_of)[: len(rows) // 2]
        examples = random.Random(SEED).sample(shorter, number)
        how["shots"] = [(row["prompt"], row["completion"]) for row in examples]
        if not tokenizer.chat_template:
            how["one_line"] = how["one_line"] or single_lines
        noted["shot_ids"][task] = [row["id"] for row in examples]
        noted["shot_tokens"][task] = sum(map(tokens_of, examples))
        say(f"{task}: examples {', '.join(noted['shot_ids'][task])}, {noted['shot_tokens'][task]:,} tokens")
        if not tokenizer.chat_template and not how["one_line"]:
            say(f"{task}: its answers have several lines, so that a prediction may run on into a further example")
    return noted


def tokens_of(row):
    return len(row["prompt_ids"]) + len(row["completion_ids"])
