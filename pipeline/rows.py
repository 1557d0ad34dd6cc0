"""Rows out of files: CSV, JSON, JSONL or parquet, each row a dict of its columns."""

import csv
import json
import re
from contextlib import contextmanager

import pyarrow.parquet

from pipeline.script import first_line
from pipeline.texts import BadData

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")


def read_rows(path, counts):
    """All rows of a file; a CSV line that has not the header's columns is counted. Raises BadData."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return read_csv(path, counts)
    if suffix == ".parquet":
        with open_parquet(path) as file:
            return file.read().to_pylist()
    if suffix in SUFFIXES:
        return read_json_rows(path)
    raise BadData(f"{path} ends in {suffix or 'no suffix'}: give a file that ends in {', '.join(SUFFIXES)}")


def read_csv(path, counts):
    csv.field_size_limit(2**31 - 1)
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, restkey="more", strict=True):
                if "more" in row or None in row.values():
                    counts["broken CSV line"] += 1
                else:
                    rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:  # past a stray quote, nobody knows what is a row
        reason = "it is cut off, has stray quotes or is no UTF-8 CSV"
        raise BadData(f"cannot read {path} ({first_line(error)}): {reason}") from error
    return rows


def read_json_rows(path):
    """The objects of a JSON list, or one a line; a number is read as its text."""
    as_written = {"parse_int": str, "parse_float": str}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"cannot read {path} ({first_line(error)}): give a file in UTF-8") from error
    in_a_list = text.lstrip().startswith("[")
    pieces = [text] if in_a_list else text.split("\n")
    rows = []
    for number, piece in enumerate(pieces, start=1):
        if not piece.strip():
            continue
        place = str(path) if in_a_list else f"line {number} of {path}"
        try:
            value = json.loads(piece, **as_written)
        except (ValueError, RecursionError) as error:
            raise BadData(
                f"{place} is no JSON ({first_line(error)}): give a list of objects, or one a line"
            ) from error
        new = value if in_a_list else [value]
        if not all(isinstance(row, dict) for row in new):
            raise BadData(f'{place} is no JSON object: give rows such as {{"prompt": "...", "completion": "..."}}')
        rows += new
    return rows


@contextmanager
def open_parquet(path):
    """A pyarrow ParquetFile. Raises BadData where it is none, in whatever process it is read."""
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            yield file
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        reason = "the file is cut off or no parquet file"
        raise BadData(f"cannot read {path} ({first_line(error)}): {reason}") from error


def read_first(path, columns, texts):
    """[((path, row group, row), the row's `columns`)] of a parquet file that is too large to be read at once.

    texts: the columns that must be there as texts, such as answer.aliases.*, or BadData is raised.
    """
    rows = []
    with open_parquet(path) as file:
        kinds = {re.sub(r"\.list\.\w+$", ".*", leaf.path): str(leaf.logical_type) for leaf in file.schema}
        for name in texts:
            if kinds.get(name) != "String":
                raise BadData(f"{path} has no column {name} of texts: give files as the hub has them")
        for group in range(file.num_row_groups):
            for number, row in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                rows.append(((str(path), group, number), row))
    return rows


def render_places(places, columns, render):
    """{place: render(row)} for places in one row group of one file; runs in another process."""
    path, group, _ = places[0]
    wanted, results = set(places), {}
    with open_parquet(path) as file:
        batches = file.iter_batches(batch_size=16, row_groups=[group], columns=columns)  # memory stays small
        rows = (batch.slice(i, 1) for batch in batches for i in range(len(batch)))
        for number, row in enumerate(rows):
            place = (path, group, number)
            if place in wanted:
                results[place] = render(row.to_pylist()[0])
    return results
