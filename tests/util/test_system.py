import platform
import resource
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from srlora_pl.util import system
from tests.helpers.waiting import run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_versions_are_those_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(system, "_LIBRARIES", ("torch", "surely-not-installed"))
    assert system.versions().keys() == {"python", "torch"}
    assert system.versions()["torch"] == version("torch")


def test_the_name_of_a_processor_says_how_many_threads_are_used():
    assert system.device_name(CPU).endswith(f", {torch.get_num_threads()} thread")  # conftest.py leaves one


@pytest.mark.parametrize(
    ("hip", "expected"), [(None, "Some GPU, CUDA 13.0"), ("7.0.51831", "Some GPU, HIP 7.0.51831, gfx942")]
)
def test_the_name_of_a_gpu_says_what_drives_it(hip, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx942"))
    assert system.device_name(GPU) == expected


def test_peak_memory_grows_with_what_is_held():
    before = system.peak_memory_bytes(CPU)
    held = torch.ones(before // 4 + 2**24)  # as many bytes as the process has ever held, and 64 MiB more
    assert system.peak_memory_bytes(CPU) >= held.nbytes


def test_the_commit_is_that_of_the_code_and_says_whether_it_was_changed(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=me", "-c", "user.email=me@here")
        return run(["git", *who, *words], cwd=tmp_path, check=True).stdout

    monkeypatch.setattr(system, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert system.commit() is None
    git("init", "-q")
    assert system.commit() is None  # no commit yet
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    assert system.commit() == git("rev-parse", "HEAD").strip()
    (tmp_path / "notes.txt").touch()
    assert not system.commit().endswith("+")
    (tmp_path / "code.py").write_text("2")
    assert system.commit() == git("rev-parse", "HEAD").strip() + "+"
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(system, "REPOSITORY", tmp_path / "site-packages")
    assert system.commit() is None  # that repository is somebody else's


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
def test_freed_memory_is_used_again():
    faults = "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    program = f"""
import resource, sys, torch
from srlora_pl.util import system
if sys.argv[1] == "keep":
    system.keep_freed_memory()
for step in range(24):
    if step == 16:  # a few blocks are laid side by side first
        before = {faults}
    torch.ones(2**24)
print({faults} - before)
"""
    given, kept = (int(run([sys.executable, "-c", program, how], check=True).stdout) for how in ("leave", "keep"))
    pages = 8 * 2**26 // resource.getpagesize()
    assert kept < pages // 100
    assert given > 10 * kept or given < pages // 2  # where huge pages are on, there is little to save


def test_peak_memory_of_a_gpu_is_what_torch_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123 if device == GPU else 0)
    assert system.peak_memory_bytes(GPU) == 123
