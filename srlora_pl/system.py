"""What a run ran on: versions of libraries, the device, and how much memory it took."""

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
