"""Tables of texts and labels in files (CSV, TSV, JSON lines, JSON, parquet), with the place of every row for errors."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from srlora_pl.util.errors import UserError, did_you_mean, is_utf8, listed, one_line, shortened

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
WITH_JSON = (*SUFFIXES, ".json")
_SEPARATORS = (",", ";", "\t", "|")

_Choose = Callable[[Sequence[str]], list[str]]
_Rows = list[tuple[int, list[str]]]  # the line that a row begins in, and its fields


@dataclass
class Table:
    """Chosen columns of a file, each a list with one entry per row.

    ``lines``: the place of each row, counted from 1; ``class_labels``: the class names of the columns that hold class
    numbers; ``broken``: how many rows were left out.
    """

    path: Path
    columns: dict[str, list[Any]]
    lines: Sequence[int]
    class_labels: dict[str, list[str]] = field(default_factory=dict)
    broken: int = 0

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """``line 7 of FILE``."""
        kind = "row" if self.path.suffix.lower() in (".parquet", ".json") else "line"
        return f"{kind} {self.lines[row]} of {self.path}"

    def texts(self, column: str, may_be_empty: bool = False) -> list[str]:
        """A column that must hold text in every row."""
        for row, text in enumerate(self.columns[column]):
            if is_missing(text) or not (may_be_empty or str(text).strip()):
                raise UserError(f"The text in column {column!r} is empty in {self.where(row)}; fill or remove the row.")
            if not isinstance(text, str):
                raise UserError(
                    f"Column {column!r} holds {shortened(text)}, not text, in {self.where(row)}; name another column."
                )
        return self.columns[column]


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_table(
    path: Path,
    columns: dict[str, str],
    optional: Sequence[str] = (),
    separator: str | None = None,
    header: Sequence[str] | None = None,
    skip_broken: bool = False,
    may_be_quoted: bool = True,
) -> Table:
    """Read some columns of a file.

    Fields of a CSV may be quoted (RFC 4180). In a TSV a quote is a letter, unless the whole file is quoted like a CSV.

    Args:
        path: ends in one of `WITH_JSON`.
        columns: each with the reason for it, as the end of a sentence (``that data.text_column names``).
        optional: columns that the file may lack; the table then lacks them too.
        separator: between the fields of a CSV or TSV; by default the comma or the tab.
        header: the column names of a CSV or TSV without a header line.
        skip_broken: leave out rows with too few or too many fields.
        may_be_quoted: False takes every quote in a TSV for a letter.

    Raises:
        UserError: the file is missing, is not of its kind, lacks a column or has no rows.
    """
    if path.is_dir():
        raise UserError(f"'{path}' is a folder; name a file in it.")
    if not path.is_file():
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*")])
        raise UserError(f"The file '{path}' does not exist{near}; correct the path or put the file there.")
    suffix = path.suffix.lower()
    if suffix not in WITH_JSON:
        raise UserError(f"'{path}' cannot be read as a table; give a file that ends in {listed(WITH_JSON)}.")
    choose = partial(choose_columns, path, columns, optional)
    if suffix == ".parquet":
        table = _read_parquet(path, choose)
    elif suffix in (".jsonl", ".json"):
        table = _read_json(path, choose)
    else:
        text, separator = _text(path), separator or ("," if suffix == ".csv" else "\t")
        if not header:
            _check_separator(path, text.partition("\n")[0], separator, columns)
        if suffix == ".csv":
            rows = _quoted_rows(path, text, separator)
        else:
            rows = _tsv_rows(path, text, separator) if may_be_quoted else _plain_rows(text, separator)
        table = _from_rows(path, choose, rows, header, skip_broken)
    if not len(table):
        raise UserError(f"The file '{path}' has no rows; put samples in it.")
    return table


def choose_columns(path: Path, columns: dict[str, str], optional: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns of a file, named ``names``, that are asked for."""
    for column, why in columns.items():
        if column not in names and column not in optional:
            raise UserError(
                f"The file '{path}' has no column {column!r}{did_you_mean(column, names)} {why}; its columns are "
                f"{listed(names)}."
            )
        if names.count(column) > 1:
            raise UserError(f"The file '{path}' has {names.count(column)} columns {column!r}; rename or remove one.")
    return [column for column in columns if column in names]


# -- parquet and JSON lines


def _read_parquet(path: Path, choose: _Choose) -> Table:
    from pyarrow import ArrowException, parquet  # slow to import, and few need it

    try:
        schema = parquet.read_schema(path)
        columns = parquet.read_table(path, columns=choose(schema.names)).to_pydict()
    except (ArrowException, OSError) as error:
        raise UserError(f"'{path}' is not a parquet file ({one_line(error)}); write it again.") from None
    rows = range(1, len(next(iter(columns.values()))) + 1)
    return Table(path, columns, rows, _class_labels(schema.metadata or {}, columns))


def _class_labels(metadata: dict[bytes, bytes], columns: dict[str, list[Any]]) -> dict[str, list[str]]:
    """The class names that `datasets` stores beside the numbers of a ``ClassLabel``, or of lists of them."""
    if b"huggingface" not in metadata:
        return {}
    from datasets import ClassLabel, Features

    try:
        described = json.loads(metadata[b"huggingface"])["info"]["features"]
        features = Features.from_dict({column: described[column] for column in columns if column in described})
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    # A program that writes names over the numbers may leave the description as it was.
    numbers = {name: kind for name, kind in features.items() if not any(isinstance(v, str) for v in columns[name])}
    kinds = {name: getattr(kind, "feature", kind) for name, kind in numbers.items()}
    return {name: list(map(str.strip, kind.names)) for name, kind in kinds.items() if isinstance(kind, ClassLabel)}


def _read_json(path: Path, choose: _Choose) -> Table:
    text = _text(path)
    is_array = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    rows = _array(path, text) if is_array else _json_lines(path, text)
    if not rows:
        return Table(path, {}, [])
    chosen = choose(list(dict.fromkeys(name for row in rows.values() for name in row)))
    table = Table(path, {column: [row.get(column) for row in rows.values()] for column in chosen}, list(rows))
    for number, row in enumerate(rows.values()):
        if not is_utf8(json.dumps([row.get(column) for column in chosen], ensure_ascii=False)):
            place = table.where(number)
            raise UserError(
                f"{place[0].upper()}{place[1:]} holds half a character (a lone surrogate); correct or remove it."
            )
    return table


def _json_lines(path: Path, text: str) -> dict[int, dict[str, Any]]:
    rows = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _json(line, f"Line {number} of {path}", "one object per line")
        if not isinstance(row, dict):
            raise UserError(f'Line {number} of {path} is not a JSON object; write {{"name": value, ...}}.')
        rows[number] = row
    return rows


def _array(path: Path, text: str) -> dict[int, dict[str, Any]]:
    rows = dict(enumerate(_json(text, f"'{path}'", "a list of objects"), 1))
    for number, row in rows.items():
        if not isinstance(row, dict):
            raise UserError(f'Row {number} of {path} is not a JSON object; write {{"name": value, ...}}.')
    return rows


def _json(text: str, place: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nests that are too long for Python
        raise UserError(f"{place} is not JSON ({getattr(error, 'msg', error)}); write {what}.") from None


# -- CSV and TSV


def _from_rows(path: Path, choose: _Choose, rows: _Rows, header: Sequence[str] | None, skip_broken: bool) -> Table:
    if header is None:
        if not rows:
            return Table(path, {}, [])
        header, rows = rows[0][1], rows[1:]
    chosen = choose(header)
    broken = [(line, row) for line, row in rows if len(row) != len(header)]
    if broken and not skip_broken:
        line, row = broken[0]
        raise UserError(
            f"Line {line} of {path} has {len(row)} instead of {len(header)} fields; mend the line"
            + (", or put quotes around a text that holds the separator." if path.suffix.lower() == ".csv" else ".")
        )
    whole = [(line, row) for line, row in rows if len(row) == len(header)] if broken else rows
    places = {column: header.index(column) for column in chosen}
    columns = {column: [row[place] for _, row in whole] for column, place in places.items()}
    return Table(path, columns, [line for line, _ in whole], broken=len(broken))


def _tsv_rows(path: Path, text: str, separator: str) -> _Rows:
    """The rows of a TSV: quoted as pandas writes it, or like GLUE's, where quotes are letters.

    In a quoted file every quote stands where a writer of CSV puts one. Fields in quotes alone do not prove it; a
    doubled quote, column names in quotes, or a tab or line break between quotes do.
    """
    plain = _plain_rows(text, separator)
    if '"' not in text:
        return plain
    end = re.escape(separator)
    a_field = rf'(?:"(?:[^"]++|"")*+"|[^"\r\n{end}]*+)'
    is_well_quoted = re.fullmatch(rf"(?:{a_field}(?:{end}|\r\n?|\n))*+{a_field}", text)
    quoted = _quoted_rows(path, text, separator) if is_well_quoted else []
    fits, fits_plain = (len({len(row) for _, row in rows}) == 1 for rows in (quoted, plain))
    if fits and (not fits_plain or text.startswith('"') or any('"' in cell for _, row in quoted for cell in row)):
        return quoted
    if fits or any(len(cell) > 1 and cell[0] == cell[-1] == '"' for _, row in plain for cell in row):
        rank_zero_info(
            f"Fields of '{path}' stand in quotes, which are read as part of them, as a quote is a letter in a TSV; "
            f"save it as CSV if they are not."
        )
    return plain


def _plain_rows(text: str, separator: str) -> _Rows:
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [(number, line.split(separator)) for number, line in enumerate(lines, 1) if line]


def _quoted_rows(path: Path, text: str, separator: str) -> _Rows:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, number = [], 1
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # the whole process's
    try:
        for row in reader:
            rows.append((number, row))
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"The row that begins in line {number} of {path} cannot be read ({error}); write a quote inside a quoted "
            f"text twice."
        ) from None
    finally:
        csv.field_size_limit(limit)
    return [(number, row) for number, row in rows if row]


def _check_separator(path: Path, first_line: str, separator: str, columns: dict[str, str]) -> None:
    """Refuse a file whose header has no ``separator`` but another one, between names that are asked for."""
    for other in () if separator in first_line else _SEPARATORS:
        names = [name.strip().strip('"') for name in first_line.split(other)]
        if len(names) > 1 and set(names) & set(columns):
            shown, mend = json.dumps(separator), json.dumps(other)
            raise UserError(
                f"The fields of '{path}' are not separated by {shown} but, it seems, by {mend}; set data.separator to "
                f"{mend}."
            )


def _text(path: Path) -> str:
    """The file's text, in UTF-8 with or without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise UserError(
            f"Line {line} of {path} holds the byte 0x{byte:02x}, which is not UTF-8; save the file as UTF-8."
        ) from None
