"""Tables of texts and labels in files: CSV, TSV, JSON lines and parquet, with the place of every row for complaints."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from srlora_pl.util.errors import UserError, did_you_mean, listed, one_line

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_SEPARATORS = (",", ";", "\t", "|")


@dataclass
class Table:
    """Chosen columns of a file, each a list with one entry a row.

    ``lines``: where each row stands, counted from 1; ``class_labels``: of the columns that hold the numbers of classes,
    the names of these; ``broken``: how many rows were left out.
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
        kind = "row" if self.path.suffix.lower() == ".parquet" else "line"
        return f"{kind} {self.lines[row]} of {self.path}"

    def texts(self, column: str, may_be_empty: bool = False) -> list[str]:
        """A column that must hold text in every row."""
        for row, text in enumerate(self.columns[column]):
            if is_missing(text) or not (may_be_empty or str(text).strip()):
                raise UserError(f"The text in column {column!r} is empty in {self.where(row)}; fill or remove the row.")
            if not isinstance(text, str):
                raise UserError(
                    f"Column {column!r} holds {text!r}, not text, in {self.where(row)}; name another column."
                )
            self.require_characters("text", text, column, row)
        return self.columns[column]

    def require_characters(self, what: str, value: Any, column: str, row: int) -> None:
        """Refuse a text with a lone surrogate, which no file in UTF-8 can hold."""
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(
                f"The {what} in column {column!r} holds half a character (a lone surrogate) in {self.where(row)}; "
                f"correct or remove the row."
            )


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: absent, or not a number."""
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

    Fields of a CSV may be quoted (RFC 4180); in a TSV a quote is a letter, unless the whole file is quoted like a CSV.

    Args:
        path: ends in one of `SUFFIXES`.
        columns: for every column, who asks for it, as the end of a sentence (``that data.text_column names``).
        optional: columns that may be absent from the file, and then are from the table.
        separator: of the fields of a CSV or TSV, by default the comma or the tab.
        header: names of a file's columns where its first line does not hold them.
        skip_broken: leave out rows with too few or too many fields.
        may_be_quoted: False reads every quote of a TSV as a letter.

    Raises:
        UserError: the file is missing or not what its name says, or has no such column or no rows.
    """
    if path.is_dir():
        raise UserError(f"'{path}' is a folder; name a file in it.")
    if not path.is_file():
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*")])
        raise UserError(f"The file '{path}' does not exist{near}; correct the path or put the file there.")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"'{path}' is none of the kinds of file that can be read; it must end in {listed(SUFFIXES)}.")
    wanted = _Wanted(path, columns, optional)
    if path.suffix.lower() == ".parquet":
        table = _read_parquet(wanted)
    elif path.suffix.lower() == ".jsonl":
        table = _read_json(wanted)
    else:
        table = _read_delimited(wanted, separator, header, skip_broken, may_be_quoted)
    if not len(table):
        raise UserError(f"The file '{path}' has no rows; put samples in it.")
    return table


@dataclass
class _Wanted:
    """Which columns of which file are asked for, and by whom."""

    path: Path
    columns: dict[str, str]
    optional: Sequence[str]

    def among(self, names: Sequence[str]) -> list[str]:
        """Those of the columns that ``names`` have; all that are not optional must be there."""
        for column, why in self.columns.items():
            if column not in names and column not in self.optional:
                raise UserError(
                    f"The file '{self.path}' has no column {column!r}{did_you_mean(column, names)} {why}; its columns "
                    f"are {listed(names)}."
                )
            if names.count(column) > 1:
                raise UserError(
                    f"The file '{self.path}' has {names.count(column)} columns {column!r}; rename or remove one."
                )
        return [column for column in self.columns if column in names]


def _read_parquet(wanted: _Wanted) -> Table:
    from pyarrow import ArrowException, parquet  # slow to import, and few need it

    try:
        schema = parquet.read_schema(wanted.path)
        columns = parquet.read_table(wanted.path, columns=wanted.among(schema.names)).to_pydict()
    except (ArrowException, OSError) as error:
        reason = one_line(error)
        raise UserError(f"'{wanted.path}' is not a parquet file ({reason}); write it again.") from None
    rows = range(1, len(next(iter(columns.values()))) + 1)
    return Table(wanted.path, columns, rows, _class_labels(schema.metadata or {}, columns))


def _class_labels(metadata: dict[bytes, bytes], columns: dict[str, list[Any]]) -> dict[str, list[str]]:
    """The names that the `datasets` library keeps beside the numbers of a ``ClassLabel``, or of lists of them."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        kinds = {column: features[column] for column in columns if column in features}
    except (KeyError, TypeError, ValueError):
        return {}
    # Who writes other values into the column may leave its description as it was.
    named = {c: _names_of(kind) for c, kind in kinds.items() if not any(isinstance(v, str) for v in columns[c])}
    return {column: [str(name).strip() for name in names] for column, names in named.items() if names}


def _names_of(kind: Any) -> list[str] | None:
    if isinstance(kind, list):  # as older versions write a list of ClassLabels
        return _names_of(kind[0]) if kind else None
    if not isinstance(kind, dict):
        return None
    if kind.get("_type") != "ClassLabel":
        return _names_of(kind.get("feature"))
    return kind["names"] if isinstance(kind.get("names"), list) else None


def _read_json(wanted: _Wanted) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(_text(wanted.path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers and nests that are too long for Python
            reason = getattr(error, "msg", error)
            raise UserError(
                f"Line {number} of {wanted.path} is not JSON ({reason}); a JSON-lines file has one object a line."
            ) from None
        if not isinstance(row, dict):
            raise UserError(f'Line {number} of {wanted.path} is not a JSON object; write {{"name": value, ...}}.')
        rows.append(row)
        lines.append(number)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {column: [row.get(column) for row in rows] for column in wanted.among(names)} if rows else {}
    return Table(wanted.path, columns, lines)


def _read_delimited(
    wanted: _Wanted, separator: str | None, header: Sequence[str] | None, skip_broken: bool, may_be_quoted: bool
) -> Table:
    path, is_csv = wanted.path, wanted.path.suffix.lower() == ".csv"
    separator = separator or ("," if is_csv else "\t")
    text = _text(path)
    if not header:
        _check_separator(wanted, text.partition("\n")[0], separator)
    if is_csv:
        rows = _quoted_rows(path, text, separator)
    else:
        rows = _tsv_rows(path, text, separator) if may_be_quoted else _plain_rows(text, separator)
    names = list(header) if header else next(rows, (0, []))[1]
    if not names:
        raise UserError(f"The file '{path}' is empty; put a line of column names and samples in it.")
    chosen = wanted.among(names)
    places = [names.index(column) for column in chosen]
    columns: list[list[str]] = [[] for _ in chosen]
    lines: list[int] = []
    broken = 0
    for number, row in rows:
        if len(row) != len(names):
            if skip_broken:
                broken += 1
                continue
            raise UserError(
                f"Line {number} of {path} has {_count(row)} but the header has {len(names)}; mend the line"
                + (", or put quotes around a text that holds the separator." if is_csv else ".")
            )
        for column, place in zip(columns, places, strict=True):
            column.append(row[place])
        lines.append(number)
    return Table(path, dict(zip(chosen, columns, strict=True)), lines, broken=broken)


def _tsv_rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a TSV that may be quoted as pandas does it, or be like GLUE's, where quotes are letters.

    If it is quoted, every quote stands where a writer of CSV puts one. Fields in quotes alone do not prove it; a quote
    written twice, names of columns in quotes, or a tab or line break between quotes do.
    """
    if '"' not in text:
        return _plain_rows(text, separator)
    plain = list(_plain_rows(text, separator))
    in_quotes = any(len(cell) > 1 and cell[0] == cell[-1] == '"' for _, row in plain for cell in row)
    end = re.escape(separator)
    a_field = rf'(?:"(?:[^"]++|"")*+"|[^"\r\n{end}]*+)'
    if re.fullmatch(rf"(?:{a_field}(?:{end}|\r\n?|\n))*+{a_field}", text):
        rows = list(_quoted_rows(path, text, separator))
        fits, fits_plain = (len({len(row) for _, row in each}) == 1 for each in (rows, plain))
        proved = text.startswith('"') or any('"' in cell for _, row in rows for cell in row)
        if fits and (proved or not fits_plain):
            return iter(rows)
        in_quotes |= fits
    if in_quotes:
        rank_zero_info(
            f"Fields of '{path}' stand in quotes, which are read as part of them, as a quote is a letter in a TSV; "
            f"save it as CSV if they are not."
        )
    return iter(plain)


def _plain_rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line:
            yield number, line.split(separator)


def _quoted_rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    number = 1
    while True:
        # Texts of any length, which are cut to data.max_length anyway. The limit is the whole process's.
        limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"The row that begins in line {number} of {path} cannot be read ({error}); write a quote inside "
                f"a quoted text twice."
            ) from None
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if row:
            yield number, row
        number = reader.line_num + 1


def _check_separator(wanted: _Wanted, first_line: str, separator: str) -> None:
    """Refuse a file whose header has no ``separator`` but another one, between names that are asked for."""
    for other in () if separator in first_line else _SEPARATORS:
        names = [name.strip().strip('"') for name in first_line.split(other)]
        if len(names) > 1 and set(names) & set(wanted.columns):
            shown, mend = json.dumps(separator), json.dumps(other)
            raise UserError(
                f"The fields of '{wanted.path}' are not separated by {shown} but, it seems, by {mend}; set "
                f"data.separator to {mend}."
            )


def _text(path: Path) -> str:
    """The file's text, in UTF-8 with or without a byte order mark."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind a mark, of three bytes.
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, start) + 1
        raise UserError(
            f"Line {line} of {path} holds the byte 0x{data[start]:02x}, which is not UTF-8; save the file as UTF-8."
        ) from None


def _count(row: Sequence[str]) -> str:
    return "1 field" if len(row) == 1 else f"{len(row)} fields"
