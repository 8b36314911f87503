"""What a run ran on: its code, versions of libraries, the device, and how much memory it took."""

import ctypes
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from srlora_pl.util.program import REPOSITORY

_LARGEST = 2**31 - 1  # that mallopt(3) takes
_LIBRARIES = ("srlora_pl", "torch", "torchvision", "lightning", "timm", "transformers", "peft")


def versions() -> dict[str, str]:
    """Of Python, of this package and of the libraries that results depend on; those that are not installed are left
    out."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of this package's code, with a + if it was changed; None outside a repository of its own."""
    if not (REPOSITORY / ".git").exists():  # installed, perhaps below somebody else's repository
        return None
    try:
        found, changes = (
            subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.strip() + ("+" if changes.strip() else "")


def device_name(device: torch.device) -> str:
    """The GPU with what drives it (``NVIDIA H100, CUDA 13.0`` or ``AMD Instinct MI300X, HIP 7.0, gfx942``), or the
    processor with the threads that torch uses."""
    if device.type == "cuda":  # torch calls AMD's GPUs so as well
        name = torch.cuda.get_device_name(device)
        if torch.version.hip:
            return f"{name}, HIP {torch.version.hip}, {torch.cuda.get_device_properties(device).gcnArchName}"
        return f"{name}, CUDA {torch.version.cuda}"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return str(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: of a GPU's memory in tensors, or else of the machine's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Have this process use the memory again that it frees, where the C library can be told so.

    glibc gives large blocks back at once, and the next step waits for the system to clear as many: a tenth of a step
    of ViT-B/16 on a CPU, see docs/speed.md. Sets ``M_MMAP_THRESHOLD`` and ``M_TRIM_THRESHOLD`` of mallopt(3).
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        library.mallopt(-3, _LARGEST)
        library.mallopt(-1, _LARGEST)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
