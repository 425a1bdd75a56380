"""Reading records from JSONL and CSV files, each with the line it stands on.

Whatever is wrong with a record is reported with file, line and field.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft._errors import UserError


class Record(NamedTuple):
    """One record and where it stands."""

    fields: dict[str, Any]
    file: Path
    line: int  # of a CSV record that spans several lines, the last

    def error(self, problem: str) -> UserError:
        """An error about this record, to be raised."""
        return UserError(f"{self.file}, line {self.line}: {problem}")

    def text(self, field: str) -> str:
        """The text in a field; one that is missing, empty or no text is an error."""
        value = self.value(field)
        if not isinstance(value, str):
            raise self.error(f"field {field!r} is {type(value).__name__}, not text.")
        if not value.strip():
            raise self.error(f"field {field!r} is empty.")
        return value

    def value(self, field: str) -> Any:
        """What a field holds; one that is missing is an error."""
        if field not in self.fields:
            there = ", ".join(repr(name) for name in self.fields) or "none"
            raise self.error(f"no field {field!r}. The fields there are: {there}.")
        return self.fields[field]


def read_records(file: str | Path) -> Iterator[Record]:
    """The records of a .jsonl or .csv file, in order. Empty lines are no records.

    Raises:
      UserError: for a file that is not there, is of another kind, or is not UTF-8; for a line
        that is not a JSON object; for a CSV row with more or fewer columns than its header.
    """
    file = Path(file)
    readers = {".jsonl": _jsonl, ".csv": _csv}
    if file.suffix not in readers:
        raise UserError(f"{file} is neither .jsonl nor .csv, the two kinds that can be read.")
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}.") from error


def _lines(file):
    """`(number, text)` of each line. Decoded one by one, so that a fault has its line."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 text, at byte {error.start} of the line."
                raise Record({}, file, number).error(problem) from error


def _jsonl(file):
    for number, line in _lines(file):
        if not line.strip():
            continue
        record = Record({}, file, number)
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise record.error(f"not JSON: {error.msg}, at column {error.colno}.") from error
        if not isinstance(fields, dict):
            raise record.error(
                f"a JSON object with named fields is needed, got {type(fields).__name__}."
            )
        yield record._replace(fields=fields)


def _csv(file):
    rows = csv.reader((text for _, text in _lines(file)), strict=True)
    header = None
    try:
        for row in rows:
            record = Record({}, file, rows.line_num)
            if not row:
                continue
            if header is None:
                header = row
            elif len(row) != len(header):
                raise record.error(f"{len(row)} columns, but the header has {len(header)}.")
            else:
                yield record._replace(fields=dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise Record({}, file, rows.line_num).error(f"not CSV: {error}.") from error
