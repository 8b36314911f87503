"""Checkpoint files are whole or absent, and the newest whole one is found."""

import errno
import os
import resource
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from srlora_pl.training.checkpoints import AtomicCheckpointIO, newest
from srlora_pl.util.errors import UserError
from srlora_pl.util.files import replacing
from tests.helpers.checkpoints import content
from tests.helpers.errors import mentions


def save(path: Path, step: int, size: int = 10) -> None:
    AtomicCheckpointIO().save_checkpoint(content(step, size), path)


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_takes_the_place_of_the_last(tmp_path: Path) -> None:
    target = tmp_path / "deep/last.ckpt"
    for step in (1, 2):
        save(target, step)
        loaded = AtomicCheckpointIO().load_checkpoint(target, weights_only=True)
        assert torch.equal(loaded["state_dict"]["weight"], torch.full((10,), float(step)))
    assert names(target.parent) == {"last.ckpt"}


def test_a_file_has_the_rights_that_any_new_file_has(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt", 1)
    (tmp_path / "other").touch()
    assert (tmp_path / "last.ckpt").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    save(tmp_path / "best.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    save(tmp_path / "last.ckpt", 2)
    assert (step_of(tmp_path / "best.ckpt"), step_of(tmp_path / "last.ckpt")) == (1, 2)


def test_all_is_on_the_disk_before_the_name_is_and_then_the_name(tmp_path: Path, monkeypatch) -> None:
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    save(tmp_path / "last.ckpt", 1)
    unfinished, *rest = done
    assert Path(unfinished).parent == tmp_path
    assert Path(unfinished).name.endswith(".unfinished")
    assert rest == ["replace", str(tmp_path)]


def test_lightning_takes_no_leftover_for_a_checkpoint_of_slurms(tmp_path: Path) -> None:
    with replacing(tmp_path / "hpc_ckpt_1.ckpt"):
        connector = L.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")._checkpoint_connector
        assert len(names(tmp_path)) == 1
        assert connector._hpc_resume_path is None
        assert connector.hpc_save_path(str(tmp_path)).endswith("hpc_ckpt_1.ckpt")


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_process_that_dies_while_it_writes_leaves_the_last_file(place: str, tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    save(target, 1)
    if (child := os.fork()) == 0:
        setattr(os, place, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save(target, 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert step_of(target) == 1
    (leftover,) = names(tmp_path) - {"last.ckpt"}
    assert (tmp_path / leftover).stat().st_size > 500
    assert newest(tmp_path.glob("*.ckpt")) == (target, 1)
    save(tmp_path / "other.ckpt", 3)
    assert names(tmp_path) == {"last.ckpt", "other.ckpt"}


def test_what_a_living_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "one") as file:
        file.write(b"1" * 100000)
        save(tmp_path / "two.ckpt", 2)
    assert (tmp_path / "one").read_bytes() == b"1" * 100000


def test_a_full_disk(tmp_path: Path) -> None:
    """The kernel refuses the rest of a write that it has begun, as with a disk that fills up."""
    target = tmp_path / "last.ckpt"
    save(target, 1)
    save(tmp_path / "best.ckpt", 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            save(target, 4, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for word in (str(target), "step 4", "File too large", str(tmp_path / "best.ckpt"), "step 3", "--ckpt_path last"):
        assert word in str(caught.value)
    assert names(tmp_path) == {"last.ckpt", "best.ckpt"}
    assert step_of(target) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_says_it_is_full_at_the_very_end(number: int, tmp_path: Path, monkeypatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=mentions(os.strerror(number), "no earlier one")):
        save(tmp_path / "last.ckpt", 1)
    assert names(tmp_path) == set()


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        AtomicCheckpointIO().save_checkpoint({"hook": lambda: None}, tmp_path / "last.ckpt")
    assert names(tmp_path) == set()


def test_addresses_that_are_no_files_go_lightnings_way(tmp_path: Path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda self, *arguments: seen.append(arguments[1]))
    AtomicCheckpointIO().save_checkpoint({}, "memory://last.ckpt")
    assert seen == ["memory://last.ckpt"]


def test_the_newest_is_the_furthest_and_then_the_youngest(tmp_path: Path) -> None:
    for name, step, time in (("a", 8, 50), ("b", 12, 10), ("c", 12, 20), ("d", 12, 15), ("e", 4, 99)):
        save(tmp_path / f"{name}.ckpt", step)
        os.utime(tmp_path / f"{name}.ckpt", (time, time))
    assert newest(tmp_path.glob("*.ckpt")) == (tmp_path / "c.ckpt", 12)
    whole = (tmp_path / "c.ckpt").read_bytes()
    (tmp_path / "c.ckpt").write_bytes(whole[:-100])
    (tmp_path / "d.ckpt").write_bytes(b"")
    passed = []
    assert newest(tmp_path.glob("*.ckpt"), passed.append) == (tmp_path / "b.ckpt", 12)
    assert {file.name for file in passed} == {"c.ckpt", "d.ckpt"}
    assert newest([]) is None
