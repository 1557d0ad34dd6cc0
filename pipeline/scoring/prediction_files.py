"""Prediction files of test_llama.py or of any other system: read, checked once, and put side by side."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.script import fail, say
from pipeline.texts import BadData, fields_of

SWAPPED = "swapped"  # column of test_llama.py --swap-answers, and the task that such rows are of
# Keys of evaluation.json beside a task's systems: no system's name
RESERVED = ("examples", "ids", "files", "made_from", "too_long", "perplexity", "general_text", "intervals", "seeds")
RESERVED += ("equal_predictions", "rouge_note", "comparisons", "groups", "per_example", "judge")
RESERVED += ("bits", "cut_off", "empty", "blanks_note")
NLL = Annotated[float, Field(ge=-1, le=1e15)]  # nats: not below 0 but for rounding; sums of which a float holds


def check_figure(value):
    if abs(value) > 1e305:
        raise ValueError("the number is too large")
    return value


FIGURE = Annotated[int | float, AfterValidator(check_figure)]
ONE_OR_MORE = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class Example(BaseModel, strict=True):
    """A row of a prediction file: `references` and `prediction` are enough."""

    references: Annotated[list[str], ONE_OR_MORE, Field(min_length=1)]
    prediction: str
    id: Annotated[str, Field(strict=False, coerce_numbers_to_str=True)] | None = None
    base_prediction: str | None = None
    prompt: str | None = None
    answer_in_context: bool | None = None
    swapped: str | None = None  # what the context says in the place of the answer
    nll: NLL | None = None
    base_nll: NLL | None = None
    tokens: Annotated[int, Field(le=10**9)] | None = None
    new_tokens: int | None = None
    base_new_tokens: int | None = None
    hit_max_new_tokens: bool | None = None
    base_hit_max_new_tokens: bool | None = None
    too_long: bool = False  # for its model: test_llama.py left it out, so it has no nll


class PredictionFile(BaseModel, strict=True):
    """What test_llama.py writes for a task; of another system's file `task` and `examples` are enough."""

    task: str
    examples: list[Example]
    perplexity: dict[str, dict[str, FIGURE]] = {}
    general_text: dict[str, dict[str, FIGURE]] = {}
    left_out: list[str] = []  # ids of rows that its server was not asked for, or did not answer
    settings: Any = None
    merged_from: Any = None  # the adapter, by its hash, that was merged into its model

    @field_validator("task", mode="before")
    @classmethod
    def is_known(cls, value, info):
        value = value.lower() if isinstance(value, str) else value
        if value not in list(info.context):
            *others, last = map(repr, info.context)
            raise ValueError(f"Input should be {', '.join(others)} or {last}")
        return value

    @model_validator(mode="after")
    def all_or_none(self):
        if not self.examples and not self.left_out:
            raise ValueError("examples: List should have at least 1 item")
        for name in ("id", "base_prediction", SWAPPED):
            given = [getattr(example, name) is not None for example in self.examples]
            if any(given) and not all(given):
                raise ValueError(f"examples.{given.index(False)} has no {name}: give it to all examples or none")
        for place, example in enumerate(self.examples):
            example.id = str(place) if example.id is None else example.id
        [(row_id, count)] = Counter(column(self.examples, "id") or [""]).most_common(1)
        if count > 1:
            raise ValueError(f"id {row_id!r} is there more than once: every example needs its own")
        if column(self.examples, SWAPPED):
            self.task = SWAPPED  # from here on a task by itself
        return self


@dataclass
class System:
    """The predictions of one system; `losses` (nll, tokens) per example, if known; `made_from` as its file says."""

    file: str
    predictions: list
    losses: list | None
    perplexity: dict | None
    general_text: dict | None
    made_from: dict | None
    too_long: int  # examples that its model could not read
    new_tokens: list  # that it wrote for each prediction, None where its file does not say
    cut_off: list | None  # whether each prediction ended at the limit of new tokens, if known
    empty: list  # whether each prediction is
    found: bool = False  # whether nobody named its file: it was in OUTPUT_DIR

    @property
    def bits(self):
        """Of its weights while it was tested: 4 or 16; None where its file does not say."""
        in_4bit = (self.made_from or {}).get("4_bit")
        return {True: 4, False: 16}[in_4bit] if isinstance(in_4bit, bool) else None


@dataclass
class Rows:
    """The rows of a task: the examples of its first file, and the predictions of all systems on them by name."""

    task: ModuleType
    template: str  # what its prompts were made by
    file: str
    examples: list[Example]
    systems: dict = field(default_factory=dict)

    def column(self, name):
        return column(self.examples, name)


def column(examples, name):
    """The values of a column as a list, or None where an example has none."""
    values = [getattr(example, name) for example in examples]
    return None if None in values else values


def read_values(raw, templates):
    """The values in the bytes of a JSON file, with or without a BOM: one, or one a task of rows without a frame."""
    try:
        value = json.loads(raw)
        rows = [value] if isinstance(value, dict) and "prediction" in value else value  # a single line
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # more than one value: one a line
            raise
        lines = enumerate(raw.decode(json.detect_encoding(raw)).split("\n"), 1)
        rows = [read_line(number, line) for number, line in lines if line.strip()]
    # Python's json reads NaN, 1e999 and half a character without a word: none may get into the scores.
    json.dumps(rows, ensure_ascii=False, allow_nan=False).encode()
    if not rows or not isinstance(rows, list):
        return [rows]
    tasks = {}
    for row in rows:
        task = str(row.get("task") or task_of(str(row.get("prompt")), templates)).lower()
        tasks.setdefault(task, []).append(row)
    return [{"task": task, "examples": examples} for task, examples in tasks.items()]


def read_line(number, line):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def task_of(prompt, templates):
    """The task whose template made the prompt, or else ends like it, behind its last field; "none" where none does."""
    ends = {task: template.rpartition("}")[2].rstrip() for task, template in templates.items()}
    alike = [task for task, end in ends.items() if end and prompt.rstrip().endswith(end)]
    made = [task for task in alike if fields_of(templates[task], prompt)]
    return next(iter(made or alike), "none")


def read_file(path, templates):
    """The checked PredictionFiles of a file, one a task; BadData says in one sentence what is wrong with it."""
    files = []
    try:
        values = read_values(Path(path).read_bytes(), templates)
        for value in values:
            files.append(PredictionFile.model_validate(value, context=templates))
        return files
    except OSError as error:
        raise BadData(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        fault = f"{place}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        if {one["loc"] for one in error.errors() if one["type"] == "missing"} >= {("task",), ("examples",)}:
            fault = "it has neither task nor examples: it is no file of predictions"
        if len(values) > 1:
            fault = f"its rows of task {value['task']}: {fault}"
    except (ValueError, RecursionError, AttributeError) as error:
        fault = f"not valid JSON ({error})"
    raise BadData(f"{path}: {fault}")


def systems_of(name, path, data, rows):
    """{system: System}: base and tuned of a file of test_llama.py, or one of them: its base if `name` is base."""
    systems, examples = {}, aligned(rows, path, data.examples)
    read = [example for example in examples if not example.too_long]  # the others add nothing to a sum
    prefixes = {"base": "base_", "tuned": ""} if column(examples, "base_prediction") else {"tuned": ""}
    if name:
        prefixes = {name: prefixes.get(name.partition("@")[0], "")}  # base@SEED, too
    for system, prefix in prefixes.items():
        side = "base" if prefix else "tuned"
        known = column(read, f"{prefix}nll") and min(column(read, "tokens") or [0]) > 0
        losses = [(getattr(example, f"{prefix}nll") or 0.0, example.tokens or 0) for example in examples]
        perplexity, general_text = data.perplexity.get(side, {}), data.general_text.get(side, {})
        if known:
            nll, tokens = map(sum, zip(*losses, strict=True))
            computed = math.exp(min(nll / tokens, 700))
            stated = perplexity.get("perplexity", 0)
            if not math.isclose(stated, computed, rel_tol=1e-3):  # none is stated, or it contradicts the examples
                perplexity = {"perplexity": computed, "nll_sum": nll, "tokens": tokens}
        cut_off = [getattr(example, f"{prefix}hit_max_new_tokens") for example in examples]
        predictions = column(examples, f"{prefix}prediction")
        systems[system] = System(
            file=str(path),
            predictions=predictions,
            losses=losses if known else None,
            perplexity=perplexity if "perplexity" in perplexity else None,
            general_text=general_text if "perplexity" in general_text else None,
            made_from=data.settings if isinstance(data.settings, dict) else None,
            too_long=len(examples) - len(read),
            new_tokens=[getattr(example, f"{prefix}new_tokens") for example in examples],
            cut_off=[bool(value) for value in cut_off] if any(value is not None for value in cut_off) else None,
            empty=[not text.strip() for text in predictions],
        )
    return systems


def aligned(rows, path, examples):
    """The examples in the order of `rows`; exits 2 where they are not the same ones."""
    by_id = {example.id: example for example in examples}
    odd = sorted(by_id.keys() ^ set(rows.column("id")))
    if odd:
        difference = f"{path} and {rows.file} differ in {len(odd)} examples, such as {odd[0]}"
        fail(f"{difference}: systems are compared on the same rows")
    for example in rows.examples:
        if by_id[example.id].references != example.references:
            fail(f"{path}: example {example.id} has other references than in {rows.file}")
        if by_id[example.id].swapped != example.swapped:
            fail(f"{path}: other answers were swapped in than in {rows.file}")
    return [by_id[example.id] for example in rows.examples]


def leave_out(files):
    """Take the rows that one of the files leaves out from all files of its task."""
    for task in dict.fromkeys(data.task for data in files):
        of_task = [data for data in files if data.task == task]
        left_out = {row_id for data in of_task for row_id in data.left_out}
        for data in of_task if left_out else []:
            data.examples = [example for example in data.examples if example.id not in left_out]
            if left_out - set(data.left_out):
                data.perplexity = {}  # that of all its rows is another one
            if not data.examples:
                remedy = "ask the server for more, see test_llama.py --server-max-examples"
                fail(f"no row of {task} is in all files: {remedy}")
        if left_out:
            say(f"{task}: {len(left_out)} rows left out, for which a server's file has no answer")


def same_rows(data, other):
    """Whether two PredictionFiles are of the same rows: those of one build with the same ids and references."""
    noted = [part.settings.get("rows") if isinstance(part.settings, dict) else None for part in (data, other)]
    if None not in noted and noted[0] != noted[1]:
        return False
    rows, others = ({row.id: row.references for row in part.examples} for part in (data, other))
    return data.task == other.task and rows == others


def of_another_adapter(data, main_file, output_dir):
    """Whether a PredictionFile is of a model in OUTPUT_DIR into which another adapter was merged than is tested."""
    if not data.merged_from or not isinstance(data.settings, dict) or not isinstance(main_file.settings, dict):
        return False
    beside = Path(str(data.settings.get("model"))).parent.resolve() == Path(output_dir).resolve()
    return beside and main_file.settings.get("adapter") not in (None, "none", data.merged_from)


def find_files(output_dir, templates, main_files):
    """[(NAME, path, PredictionFile)] of each TASK_predictions_NAME.json of the same rows; others are left out."""
    found, mains = [], {data.task: data for data in main_files}
    for task, main_file in mains.items():
        taken = {"tuned", "base"} if column(main_file.examples, "base_prediction") else {"tuned"}
        for path in sorted(Path(output_dir).glob(f"{task}_predictions_*.json")):
            name = path.stem.removeprefix(f"{task}_predictions_")
            if name.lower().endswith(SWAPPED):
                continue
            try:
                data, *more = read_file(path, templates)
                if name in taken.union(RESERVED) or not re.fullmatch(r"[^\s/@=]+", name):
                    raise BadData(f"{path}: a system cannot be called {name}, see --predictions")
                if more or not same_rows(data, main_file):
                    raise BadData(f"{path}: its rows are not those of {task}_predictions.json")
                if of_another_adapter(data, main_file, output_dir):
                    remedy = "run merge_llama.py, and test merged/ again"
                    raise BadData(f"{path}: another adapter is merged into its model: {remedy}")
                found.append((name, str(path), data))
            except BadData as error:
                say(f"left out: {error}")
    return found
