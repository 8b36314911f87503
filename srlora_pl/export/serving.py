"""A merged network as a program that a server runs without its library: ONNX, or torch.export's archive."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from srlora_pl.models.family import ModelFamily, in_evaluation
from srlora_pl.util.errors import UserError, one_line
from srlora_pl.util.program import require_extra

FILES = {"onnx": "model.onnx", "pt2": "model.pt2"}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
_AXES = ("batch", "length")  # of a server's inputs, as many as may have any size
# Samples and tokens of the inputs that a program is tried with; one of two texts of 16 tokens is traced.
_TRIED = ((1, 7), (3, 24))


def require_packages(format: str) -> None:
    """Refuse a ``format`` that is written with a package which is not installed."""
    for package in _PACKAGES.get(format, ()):
        require_extra("onnx", package, f"--format {format}")


def write(family: ModelFamily, net: nn.Module, folder: Path, format: str) -> None:
    """Write the plain network ``net`` as a program for any number of samples and, of texts, any length.

    Raises:
        UserError: torch cannot follow the network, or only with inputs of one size.
    """
    inputs = family.served_inputs(net, samples=2, length=16, seed=0)
    axes = {name: dict(enumerate(_AXES[: 1 if x.is_floating_point() else 2])) for name, x in inputs.items()}
    free = {name: dict.fromkeys(own, Dim.DYNAMIC) for name, own in axes.items()}
    with _refusing(format), _quiet():
        program = torch.export.export(family.served(net).eval(), (), inputs, dynamic_shapes=free)
        if format == "pt2":
            torch.export.save(program, folder / FILES[format])
        else:
            _write_onnx(program, folder / FILES[format], axes)


def _write_onnx(program: ExportedProgram, file: Path, axes: dict[str, dict[int, str]]) -> None:
    onnx = torch.onnx.export(program, dynamo=True, output_names=["logits"], dynamic_shapes=axes, verbose=False)
    assert onnx is not None
    onnx.save(file)  # above 2 GB, which is the most that a protobuf takes, with the weights beside it


def trial_outputs(family: ModelFamily, net: nn.Module, folder: Path, format: str) -> tuple[Tensor, Tensor]:
    """The outputs of the program in ``folder`` and of ``net`` for fresh inputs of other sizes than the traced ones.

    Float64 on the CPU, (samples, classes) each.

    Raises:
        UserError: the program does not run on them.
    """
    run = _onnx(folder) if format == "onnx" else _pt2(folder)
    weight, served, found, expected = next(net.parameters()), family.served(net), [], []
    for seed, (samples, length) in enumerate(_TRIED, start=1):
        inputs = family.served_inputs(net, samples, length, seed)
        there = {name: x.to(weight) if x.is_floating_point() else x.to(weight.device) for name, x in inputs.items()}
        with torch.no_grad(), in_evaluation(net):
            expected.append(served(**there).cpu().double())
        with _refusing(format):
            found.append(run(inputs).double())
    return torch.cat(found), torch.cat(expected)


def _onnx(folder: Path):  # type: ignore[no-untyped-def]
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILES["onnx"], providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])

    return run


def _pt2(folder: Path):  # type: ignore[no-untyped-def]
    program = torch.export.load(folder / FILES["pt2"]).module()
    return torch.no_grad()(lambda inputs: program(**inputs))


@contextmanager
def _refusing(format: str) -> Iterator[None]:
    """Turns what torch and onnxruntime raise about a network, of any type, into a sentence; not what the disk does."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = re.sub(r"\x1b\[\d+m", "", one_line(error))  # colours
        raise UserError(
            f"torch cannot write this network as --format {format} for inputs of any size ({reason}): take "
            "--format merged"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporters tell about their own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
