"""Checkpoint files: written whole or not at all, and found again."""

import re
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

from srlora_pl.training import lightning_internals as internals
from srlora_pl.util.errors import UserError, causes
from srlora_pl.util.files import replacing, require_there


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint atomically, once the new one is on the disk; addresses such as s3:// as Lightning does."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; after a `UserError` an earlier file is still there."""
        if storage_options is not None or not internals.is_local_file(path):
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
            last = newest(filter(resumes, path.parent.glob("*.ckpt")))
            where = f"the last whole checkpoint is {last[0]} of step {last[1]}" if last else "there is no earlier one"
            raise UserError(
                f"The checkpoint {path} of step {checkpoint.get('global_step')} could not be written "
                f"({cause.strerror}), {where}: make room, and go on with --ckpt_path last."
            ) from error


def read(path: Path) -> dict[str, Any]:
    """The content of a Lightning checkpoint; tensors stay on the disk until they are used. Other files are refused."""
    require_there("--ckpt_path", path)
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
    """The classes that the model was trained on, in the order of its outputs; None where the file does not tell."""
    states = [state for state in checkpoint.values() if isinstance(state, dict) and "processed" in state]
    return next((list(state["class_names"]) for state in states if "class_names" in state), None)


def resumes(file: Path) -> bool:
    """Whether a run can go on from ``file``: not from weights alone."""
    try:
        return "optimizer_states" in read(file)
    except UserError:
        return True  # whoever reads it says why not


def settings_of(callbacks: Iterable[Callback]) -> dict[str, dict[str, Any]]:
    """The plain constructor arguments of each callback, by its key in a checkpoint.

    Paths of folders are left out: a run may be moved.
    """
    found = {}
    for callback in callbacks:
        arguments = signature(type(callback).__init__).parameters
        values = {name.removeprefix("_"): value for name, value in vars(callback).items()}
        plain = {name: value for name, value in values.items() if type(value) in (str, int, float, bool, type(None))}
        found[callback.state_key] = {name: plain[name] for name in plain if name in arguments and name != "dirpath"}
    return found


def keep_settings(checkpoint: dict[str, Any], callbacks: Sequence[Callback], began: dict[str, dict[str, Any]]) -> None:
    """Replace the settings in the saved states of ``callbacks`` by those of this run; their counts stay.

    A setting is a constructor argument that has not changed since: ``began`` is `settings_of` the run that wrote the
    file. A ModelCheckpoint's schedule is a setting too, so its state is also found under the key of another schedule,
    but not of another score or mode.
    """
    states, now = checkpoint.get("callbacks", {}), settings_of(callbacks)
    for callback in callbacks:
        key = old = callback.state_key
        if isinstance(callback, ModelCheckpoint) and key not in states:
            score = key.partition("'every_n_train_steps'")[0]
            other = [each for each in states if each not in now and each.startswith(f"{score}'every_n_train_steps'")]
            old = other[0] if len(other) == 1 else key
        if isinstance(state := states.get(old), dict):
            del states[old]
            before = began.get(old, {})
            given = {name: value for name, value in now[key].items() if name in state}
            states[key] = {**state, **{name: given[name] for name in given if before.get(name) == state[name]}}


def keep_to_own_folders(checkpoint: dict[str, Any], callbacks: Iterable[Checkpoint]) -> None:
    """Let each ModelCheckpoint of ``callbacks`` remember only files in its folder, wherever that is now.

    The run's folder may have moved; and a callback deletes files that it remembers, which a checkpoint from elsewhere
    must not decide. A callback whose best file is missing begins anew.
    """
    states = checkpoint.get("callbacks", {})
    for callback in callbacks:
        state, folder = states.get(callback.state_key), getattr(callback, "dirpath", None)
        if folder is None or not (state and "best_model_path" in state):
            continue
        models = [*state["best_k_models"], *(state[key] for key in _REMEMBERED)]
        before = state.get("dirpath") or ""
        own = {path: str(file) for path in models if (file := Path(folder, _below(path, before))).is_file()}
        if state["best_model_path"] not in own:
            del states[callback.state_key]
            continue
        best = {own[path]: score for path, score in state["best_k_models"].items() if path in own}
        paths = {key: own.get(state[key], "") for key in _REMEMBERED}
        few: Any = callback
        if 0 < few.save_top_k < len(best):
            ranked = sorted(best, key=lambda path: float(best[path]), reverse=few.mode == "max")
            best = {path: best[path] for path in ranked[: few.save_top_k]}
            paths["kth_best_model_path"] = ranked[few.save_top_k - 1]
        states[callback.state_key] = {**state, **paths, "best_k_models": best, "dirpath": str(folder)}


_REMEMBERED = ("best_model_path", "kth_best_model_path", "last_model_path")


def _below(path: str, folder: str) -> Path:
    """The part of ``path`` below ``folder``, of several folders where a score's name holds a slash."""
    name = Path(path)
    if folder and name.is_relative_to(folder) and ".." not in name.parts:
        return name.relative_to(folder)
    return Path(name.name)


def files_of(folder: Path) -> list[Path]:
    """The checkpoints in a run's ``folder`` at any depth, SLURM's too, but none in the folders of other runs."""
    files = (file for file in folder.rglob("*.ckpt") if not file.name.startswith("."))
    return [file for file in files if not re.search(r"(^|/)version_\d+/", file.relative_to(folder).as_posix())]


def run_folders(checkpoint: Path) -> list[Path]:
    """The folders around ``checkpoint`` that hold a run's ``config.yaml``, the nearest first."""
    file = checkpoint.resolve()
    return [
        folder
        for depth, folder in enumerate(file.parents)
        if (folder / "config.yaml").is_file()
        # a config.yaml further up may be anyone's
        and (depth < 2 or folder.name.startswith("version_") or file.relative_to(folder).parts[0] == "checkpoints")
    ]


def newest(files: Iterable[Path], pass_over: Callable[[Path], None] = lambda file: None) -> tuple[Path, int] | None:
    """The checkpoint with the highest step among ``files`` of one run, with that step; None if none can be read.

    A file's time decides only between files of one step (of a validation and of the micro-batch before it), as a
    copied folder has lost its times.

    Args:
        pass_over: called for each file that cannot be read.
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
