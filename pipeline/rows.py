"""Rows out of files: CSV, JSON, JSONL or parquet, each row a dict of its columns."""

import csv
import json
import re
from contextlib import contextmanager

import pyarrow
from pyarrow.parquet import ParquetFile

from pipeline.script import first_line
from pipeline.texts import BadData

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")


def read_rows(path, counts):
    """All rows of a file; a CSV line that has not the header's columns is counted. Raises BadData."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise BadData(f"{path} ends in {suffix or 'no suffix'}: give a file that ends in {', '.join(SUFFIXES)}")
    with readable(path):
        if suffix == ".parquet":
            return read_parquet(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            return read_csv(file, counts) if suffix == ".csv" else read_json_rows(file.read())


@contextmanager
def readable(path):
    """Raise BadData where a file is not what its suffix says."""
    try:
        yield
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # pyarrow's are ValueErrors
        kind = path.suffix[1:].lower()
        of_csv = ", has stray quotes or no commas between columns, is not in UTF-8"
        parts = {"csv": of_csv, "parquet": ""}.get(kind, ", is not in UTF-8")
        raise BadData(f"cannot read {path} ({first_line(error)}): it is cut off{parts}, or is no {kind}") from error


def read_parquet(path):
    table = ParquetFile(path).read()
    for place, name in enumerate(table.column_names):
        column = table.column(place)
        if column.type in (pyarrow.float16(), pyarrow.float32()):  # 37.4 would be read as 37.400001525878906
            numbers = [None if number != number else float(str(number)) for number in column.to_numpy()]
            table = table.set_column(place, name, pyarrow.array(numbers, pyarrow.float64()))
    return table.rename_columns(distinct_names(table.column_names)).to_pylist()


def read_csv(file, counts):
    csv.field_size_limit(2**31 - 1)
    rows, reader = [], csv.DictReader(file, strict=True)  # past a stray quote, nobody knows what is a row
    if len(names := reader.fieldnames or []) == 1 and ";" in names[0]:
        raise BadData(f"the columns of {file.name} are separated by semicolons: save it with commas")
    if not names:
        raise BadData(f"{file.name} names no columns: it is empty, or its first line is blank")
    reader.fieldnames = distinct_names(names)
    for row in reader:
        if None in row or None in row.values():  # more cells than columns, or fewer
            counts["broken CSV line"] += 1
        else:
            rows.append(row)
    return rows


def distinct_names(names):
    """The names of columns; a name that occurs more than once gets a number behind it in each place."""
    numbered = []
    for place, name in enumerate(names):
        numbered.append(f"{name} ({names[:place].count(name) + 1})" if names.count(name) > 1 else name)
    return numbered


def read_json_rows(text):
    """The objects of a JSON list, or one a line; a number is read as its text. Raises ValueError."""
    as_written = {"parse_int": str, "parse_float": str, "parse_constant": lambda name: None}  # NaN, as pandas has it
    if text.lstrip().startswith("["):
        rows = json.loads(text, **as_written)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                rows += [json.loads(line, **as_written)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {error}; give a list, or an object a line") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError('not every row is an object such as {"prompt": "...", "completion": "..."}')
    return rows


def read_first(path, columns, texts):
    """((path, row group, row), the row's `columns`) in turn of a parquet file that is too large to be read at once.

    texts: the columns that must be there as texts, such as answer.aliases.*, or BadData is raised.
    """
    with readable(path), ParquetFile(path, buffer_size=1 << 20) as file:
        kinds = {re.sub(r"\.list\.\w+$", ".*", leaf.path): str(leaf.logical_type) for leaf in file.schema}
        for name in texts:
            if kinds.get(name) != "String":
                raise BadData(f"{path} has no column {name} of texts: give files as the hub has them")
        for group in range(file.num_row_groups):
            for number, row in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                yield (path, group, number), row


def render_places(places, columns, render):
    """{place: render(row)} for places in one row group of one file; runs in another process."""
    path, group, _ = places[0]
    wanted, results = set(places), {}
    with readable(path), ParquetFile(path, buffer_size=1 << 20) as file:
        batches = file.iter_batches(batch_size=16, row_groups=[group], columns=columns)  # memory stays small
        rows = (batch.slice(i, 1) for batch in batches for i in range(len(batch)))
        for number, row in enumerate(rows):
            place = (path, group, number)
            if place in wanted:
                results[place] = render(row.to_pylist()[0])
    return results
