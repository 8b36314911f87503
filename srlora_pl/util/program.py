"""The program as it was called, and the files that come with it; nothing heavy is imported here."""

import sys
from importlib.util import find_spec
from pathlib import Path

from srlora_pl.util.errors import UserError

_PACKAGE = Path(__file__).parents[1]
REPOSITORY = _PACKAGE.parent
# A wheel holds the configs inside the package; a clone, beside it.
CONFIGS = next((home / "configs" for home in (_PACKAGE, REPOSITORY) if (home / "configs").is_dir()), Path("configs"))


class MissingExtraError(UserError, ImportError):
    """A package is not installed that an extra of this package brings."""


def program() -> str:
    """The words that begin every command: ``srlora``, ``python -m srlora_pl``, or ``python cli.py`` in a clone."""
    called = Path(sys.argv[0])
    if called == _PACKAGE / "__main__.py":
        return "python -m srlora_pl"
    return "srlora" if called.stem == "srlora" else "python cli.py"


def require_extra(extra: str, package: str, what: str) -> None:
    """Refuse ``what`` unless ``package`` is installed, which comes with an extra of this package."""
    if find_spec(package) is None:
        raise MissingExtraError(f"{what} needs the package {package}: pip install 'srlora_pl[{extra}]' brings it")
