"""The folders of runs, ``<root>/version_N``, and the checkpoints in them."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from srlora_pl.run.messages import note
from srlora_pl.training import checkpoints
from srlora_pl.util.errors import UserError
from srlora_pl.util.files import relative

ROOT = "runs"  # below which runs are, unless trainer.default_root_dir says otherwise
_FOLDER = "SRLORA_RUN_FOLDER"  # where the first process writes, for those that it starts
_JOB = "slurm_job"  # a file in the run's folder: the job of SLURM that started it


def root_of(default_root_dir: str | None, name: str, method: str) -> Path:
    """Where the runs of a config are, by its name and the ``class_path`` of its method."""
    return Path(default_root_dir or ROOT, f"{name}-{method.rsplit('.', 1)[-1].lower()}")


def versions(root: Path) -> list[Path]:
    """The run folders ``version_N`` below ``root``, the newest first."""
    folders = (path for path in root.glob("version_*") if path.name[8:].isdigit())
    return sorted(folders, key=lambda path: int(path.name[8:]), reverse=True)


def new_version(root: Path) -> Path:
    """The next free ``version_N`` below ``root``, made at once, so that runs started together do not share one."""
    number = next((int(path.name[8:]) for path in versions(root)), -1) + 1
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        # Only the first rank writes; the processes that it starts learn the folder from it, as it exists by then.
        return Path(os.environ.get(_FOLDER) or root / f"version_{number}")
    while True:
        folder = root / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(
                f"trainer.default_root_dir: {folder} cannot be made ({error.strerror}), give a folder for the runs"
            ) from error
        else:
            os.environ[_FOLDER] = str(folder.resolve())
            return folder.resolve()


def folder_of(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote ``checkpoint``, or None for a file that lies elsewhere."""
    folders = checkpoints.run_folders(checkpoint)
    return next((folder for folder in folders if checkpoint.resolve() in checkpoints.files_of(folder)), None)


def own_or_all(config_file: str | None, root: Path) -> list[Path]:
    """The run folders of a config, the newest first; for a run's own ``config.yaml`` only that run's.

    Given from another folder than the one in which it was trained, the run's place still ends as ``root`` does.
    """
    own = Path(config_file).resolve() if config_file else Path()
    home = own.parent.parent
    is_below = not root.is_absolute() and home.parts[-len(root.parts) :] == root.parts
    if own.name == "config.yaml" and (home == root.resolve() or is_below):
        return [own.parent]
    return [folder.resolve() for folder in versions(root)]


def furthest_checkpoint(folders: Iterable[Path], usable: Callable[[Path], bool] | None) -> tuple[Path, int] | None:
    """The furthest readable checkpoint in the first folder that has one, and its step; ``usable`` filters files."""
    for folder in folders:
        files = filter(usable, checkpoints.files_of(folder))
        if found := checkpoints.newest(files, lambda file: note(f"{relative(file)} cannot be read and is passed over")):
            return found
    return None


@rank_zero_only
def discard(folder: Path) -> None:
    """Remove a new folder that holds no checkpoint."""
    if not checkpoints.files_of(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()


# -- SLURM


def requeued(root: Path, command: str) -> Path | None:
    """The folder of the run that SLURM starts again, where ``command`` had begun it."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    job = _job(command)
    files = ((folder, folder / _JOB) for folder in versions(root))
    return next((folder.resolve() for folder, file in files if file.is_file() and file.read_text() == job), None)


@rank_zero_only
def remember_job(folder: Path, command: str) -> None:
    """Let `requeued` find ``folder``."""
    if "SLURM_JOB_ID" in os.environ:
        (folder / _JOB).write_text(_job(command))


def _job(command: str) -> str:
    return f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_STEP_ID', '')} {command}"
