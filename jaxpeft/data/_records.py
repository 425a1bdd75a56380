"""Reading records from JSONL and CSV files, each with its line number.

Errors in a record name the file, the line and the field.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft._errors import UserError


class Record(NamedTuple):
    """One record, and where it is."""

    fields: dict[str, Any]
    file: Path
    line: int  # from 1; the last one of a CSV record that spans several lines

    def error(self, problem: str) -> UserError:
        """The error to raise about this record."""
        return UserError(f"{self.file}, line {self.line}: {problem}")

    def text(self, field: str) -> str:
        """The text of a field.

        Raises:
          UserError: where the field is missing or empty, or is not text.
        """
        value = self.value(field)
        if not isinstance(value, str):
            raise self.error(f"field {field!r} is {type(value).__name__}, not text.")
        if not value.strip():
            raise self.error(f"field {field!r} is empty.")
        return value

    def value(self, field: str) -> Any:
        """The value of a field.

        Raises:
          UserError: where the field is missing.
        """
        if field not in self.fields:
            there = ", ".join(repr(name) for name in self.fields) or "none"
            raise self.error(f"there is no field {field!r}. The record has the fields: {there}.")
        return self.fields[field]


def read_records(file: str | Path) -> Iterator[Record]:
    """The records of a .jsonl or .csv file, in order. Empty lines are skipped.

    Raises:
      UserError: for a file that does not exist, is of another kind, or is not UTF-8; for a line
        that is not a JSON object; for a CSV row with more or fewer columns than its header.
    """
    file = Path(file)
    readers = {".jsonl": _jsonl, ".csv": _csv}
    if file.suffix not in readers:
        raise UserError(f"{file} is neither a .jsonl nor a .csv file. Convert it to one of them.")
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}.") from error


def _lines(file):
    """`(number, text)` of each line, decoded one by one, so that errors have a line number."""
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
                f"a record is a JSON object with named fields, got {type(fields).__name__}."
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
                raise record.error(
                    f"the row has {len(row)} columns, but the header has {len(header)}."
                )
            else:
                yield record._replace(fields=dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise Record({}, file, rows.line_num).error(f"not CSV: {error}.") from error
