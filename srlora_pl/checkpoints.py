"""Checkpoint files: written whole or not at all, and found again."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Checkpoint

from srlora_pl.errors import UserError, causes, did_you_mean
from srlora_pl.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one moment, once the new one is on the disk; other addresses than files as usual."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            UserError: it cannot be written; what was at ``path`` is still there.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except Exception as error:
            # torch wraps the refusal of the disk in an error of its own
            cause = next((each for each in causes(error) if isinstance(each, OSError)), None)
            if cause is None:
                raise
            last = newest(path.parent.glob("*.ckpt"))
            where = f"the last whole checkpoint is {last[0]} of step {last[1]}" if last else "there is no earlier one"
            raise UserError(
                f"The checkpoint {path} of step {checkpoint.get('global_step')} could not be written "
                f"({cause.strerror}), {where}: make room, and go on with --ckpt_path last."
            ) from error


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of Lightning; its tensors stay on the disk until they are used.

    Raises:
        UserError: there is no such file, it is truncated, or holds something else.
    """
    if not path.is_file():
        near = did_you_mean(str(path), map(str, path.parent.glob("*.ckpt")))
        raise UserError(f"--ckpt_path {path} does not exist{near}")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise UserError(
            f"--ckpt_path {path} cannot be read, it is truncated or no checkpoint of this package: give another file"
        ) from error
    if not (isinstance(content, dict) and {"state_dict", "global_step", "pytorch-lightning_version"} <= set(content)):
        raise UserError(f"--ckpt_path {path} holds no Lightning checkpoint (for weights use model.backbone_checkpoint)")
    return content


def class_names(checkpoint: dict[str, Any]) -> list[str] | None:
    """Of the data that the model was trained on, in the order of its outputs; None where the file does not tell."""
    states = [state for state in checkpoint.values() if isinstance(state, dict) and "processed" in state]
    return next((list(state["class_names"]) for state in states if "class_names" in state), None)


def keep_to_own_folders(checkpoint: dict[str, Any], callbacks: Iterable[Checkpoint]) -> None:
    """Of the files that each ModelCheckpoint of ``callbacks`` remembers keep those in its folder, wherever it is now.

    A run's folder may have moved; and a callback deletes in time what it remembers, which a checkpoint from elsewhere
    must not decide. Without its best file it begins anew.
    """
    states = checkpoint.get("callbacks", {})
    for callback in callbacks:
        state, folder = states.get(callback.state_key), getattr(callback, "dirpath", None)
        if folder is None or not (state and "best_model_path" in state):
            continue
        models = [*state["best_k_models"], *(state[key] for key in _REMEMBERED)]
        own = {path: str(file) for path in models if (file := Path(folder, Path(path).name)).is_file()}
        if state["best_model_path"] not in own:
            del states[callback.state_key]
            continue
        best = {own[path]: score for path, score in state["best_k_models"].items() if path in own}
        paths = {key: own.get(state[key], "") for key in _REMEMBERED}
        states[callback.state_key] = {**state, **paths, "best_k_models": best, "dirpath": str(folder)}


_REMEMBERED = ("best_model_path", "kth_best_model_path", "last_model_path")


def files_of(folder: Path) -> list[Path]:
    """The checkpoints in a run's ``folder``, those that were written for SLURM too."""
    return [*folder.glob("checkpoints/*.ckpt"), *folder.glob("hpc_ckpt_*.ckpt")]


def run_folders(checkpoint: Path) -> list[Path]:
    """The folders around ``checkpoint`` that hold a run's ``config.yaml``, the nearest first."""
    return [folder for folder in checkpoint.resolve().parents[:2] if (folder / "config.yaml").is_file()]


def newest(files: Iterable[Path], pass_over: Callable[[Path], None] = lambda file: None) -> tuple[Path, int] | None:
    """The readable checkpoint among ``files`` of one run that is furthest, with its step; None if there is none.

    The step in the file decides, and the file's time only between files of one step (those of a validation and of
    the micro-batch before it): a copied folder has lost its times, and as a run is resumed bit for bit, a later step
    in its folder is further on the same way whenever it was written.

    Args:
        files: looked at all.
        pass_over: called for each that cannot be read.
    """
    found: list[tuple[int, int, Path]] = []
    for file in files:
        try:
            found.append((read(file)["global_step"], file.stat().st_mtime_ns, file))
        except UserError:
            pass_over(file)
    if not found:
        return None
    step, _, file = max(found)
    return file, step
