"""Where rows of prompts and answers come from: files, and data sets on the hub."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from srlora_pl.data.splits import split_of
from srlora_pl.data.texts.files import find_files
from srlora_pl.data.texts.tables import WITH_JSON, Table, choose_columns, read_table
from srlora_pl.util.errors import UserError, listed, one_line
from srlora_pl.util.files import is_hub_name

# Reads columns, each with the reason for it, of which some may be missing.
Source = Callable[[dict[str, str], Sequence[str]], Table]


def is_on_hub(root: str) -> bool:
    """Whether ``root`` can only be the name of a data set on the hub."""
    path = Path(root).expanduser()
    return is_hub_name(root) and not path.exists() and path.suffix.lower() not in WITH_JSON


def from_file(path: Path, separator: str | None = None) -> Source:
    """A file, see `read_table`."""

    def read(columns: dict[str, str], optional: Sequence[str]) -> Table:
        return read_table(path, columns, optional, separator)

    return read


def from_root(root: str, separator: str | None = None) -> tuple[dict[str, Source], list[Path]]:
    """The sources of the splits that are at ``root``, a file, a folder or a name on the hub, and files that are none.

    Raises:
        UserError: there is no split to train on.
    """
    if is_on_hub(root):
        tables = load_hub(root)
        splits = {split_of(name) or name: partial(_table, Path(root, name), rows) for name, rows in tables.items()}
        if "train" not in splits:
            raise UserError(f"The data set {root!r} has no split 'train', only {listed(tables)}; name another one.")
        return dict(splits), []
    files, others = find_files(Path(root).expanduser(), WITH_JSON)
    return {split: from_file(path, separator) for split, path in files.items()}, others


def from_hub(name: str, split: str, config: str | None = None) -> Source:
    """One split of a data set on the hub, or a part of it, such as ``train[:100]``."""

    def read(columns: dict[str, str], optional: Sequence[str]) -> Table:
        return _table(Path(name, split), load_hub(name, split, config), columns, optional)

    return read


def load_hub(name: str, split: str | None = None, config: str | None = None) -> Any:
    from datasets import load_dataset  # takes a second, and local files need none of it

    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # whatever its readers, the hub client and the network raise
        raise UserError(
            f"The data set {name!r} could not be loaded from the hub ({one_line(error)}); without a network, put its "
            f"files into a folder and set data.root to it."
        ) from error


def _table(place: Path, rows: Any, columns: dict[str, str], optional: Sequence[str]) -> Table:
    chosen = choose_columns(place, columns, optional, rows.column_names)
    content: Mapping[str, Any] = rows.select_columns(chosen).to_dict()
    if not len(rows):
        raise UserError(f"The split '{place}' has no rows; name another one.")
    return Table(place, dict(content), range(1, len(rows) + 1))
