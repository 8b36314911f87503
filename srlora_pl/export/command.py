"""Trained models for programs that know nothing of this package: timm's or transformers' folders, or a PEFT adapter."""

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from srlora_pl.lowrank.delta import Factors, change, overall_error
from srlora_pl.models import peft_folder
from srlora_pl.models.family import example_outputs
from srlora_pl.run import config
from srlora_pl.tasks.base import Task
from srlora_pl.training import checkpoints
from srlora_pl.util.errors import UserError

FORMATS = ("merged", "peft")
WEIGHTS = ("model.safetensors", peft_folder.WEIGHTS)
# The arguments of a task that say where its pretrained weights are, and change when folders move.
_PLACES = ("backbone", "backbone_checkpoint", "adapter")


@dataclass(frozen=True)
class Report:
    """What an export wrote.

    Attributes:
        folder: where.
        size: of its weights, in bytes.
        dense_size: of the merged weights, in bytes.
        difference: the largest absolute difference between outputs of the trained model and of the files.
        largest: the largest absolute output of the trained model.
        factors: of the PEFT adapter, by layer.
        notes: further sentences for the user.
    """

    folder: Path
    size: int
    dense_size: int
    difference: float
    largest: float
    factors: Mapping[str, Factors] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """The report in words."""
        lines = []
        if any(factors.lost for factors in self.factors.values()):
            lines += [f"{name}: rank {f.rank}, relative error {f.error:.2e}" for name, f in self.factors.items()]
            lines.append(f"relative error of all changes together: {overall_error(self.factors.values()):.2e}")
        lines += self.notes
        size, dense = (f"{size / 2**20:.1f} MiB" for size in (self.size, self.dense_size))
        if self.factors:
            ranks = sorted({factors.rank for factors in self.factors.values()})
            span = " to ".join(map(str, dict.fromkeys([ranks[0], ranks[-1]])))
            lines.append(f"adapter of rank {span}: {size}, the merged weights would take {dense}")
        if self.size > self.dense_size:
            lines.append("--format merged is the smaller file here, and the faster model")
        lines.append(
            f"largest output difference to the trained model: {self.difference:.1e} (outputs up to {self.largest:.1e})"
        )
        return [*lines, f"written to {self.folder}" + ("" if self.factors else f" ({size})")]


def export_model(
    task: Task,
    folder: str | Path,
    format: str = "merged",
    rank: int | None = None,
    force: bool = False,
    class_names: Sequence[str] = (),
) -> Report:
    """Write the trained ``task`` to ``folder``, load it from there with the library it is for, and compare outputs.

    Args:
        task: an `ImageClassifier` or a `TextClassifier`; it is not changed.
        folder: new or empty, unless ``force``.
        format: ``merged``, plain weights in timm's or transformers' own layout; or ``peft``, a LoRA on the pretrained
            weights.
        rank: compresses the LoRA to this rank; None for the exact one. Where the method's first pairs are a model of
            their own, it takes so many of each matrix, in either format.
        force: write into a folder that holds files already; those of other names stay, but for weights and adapters
            of another export: the libraries would load them too.
        class_names: one per class; by default those that the task was trained on.

    Raises:
        UserError: an argument is wrong, the weights are not finite, or the files do not give the model's outputs;
            then nothing is written.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format} is unknown, it is one of {', '.join(FORMATS)}")
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {folder} is a file, give a folder")
    if not force and target.is_dir() and any(target.iterdir()):
        raise UserError(f"--output {folder} holds files already, give a new folder or --force to overwrite them")
    if not isinstance(task, Task):
        raise UserError(
            f"{type(task).__name__} is neither an ImageClassifier nor a TextClassifier, so its files have no known "
            "layout: take model.adaptation.merged_copy()"
        )
    class_names = class_names or task.trained_classes
    class_names = class_names if len(class_names) == task.hparams.get("num_classes") else ()
    if rank is not None and task.adaptation.method.nested:
        with task.adaptation.at_rank(rank):
            return _export(task, target, format, None, class_names)
    if rank is not None and format != "peft":
        raise UserError(f"--rank {rank} belongs to --format peft, leave it out for merged weights")
    return _export(task, target, format, rank, class_names)


def _export(task: Task, target: Path, format: str, rank: int | None, class_names: Sequence[str]) -> Report:
    plain = task.adaptation.merged_copy()
    for name, value in plain.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity, so nothing was written: export an earlier checkpoint")
    with _whole_or_nothing(target) as new:
        if format == "merged":
            return _write_merged(task, plain, new, target, class_names)
        return _write_adapter(task, plain, new, target, rank, class_names)


def _write_merged(task: Task, plain: nn.Module, new: Path, target: Path, class_names: Sequence[str]) -> Report:
    family, size = task.family, _size(plain)
    notes = family.save(plain, new, class_names, task.card())
    trained = example_outputs(family, task.net, task.net)
    loaded = example_outputs(family, family.load(new), task.net)
    return Report(target, size, size, *_compare(loaded, trained, trained), notes=notes)


def _write_adapter(
    task: Task, plain: nn.Module, new: Path, target: Path, rank: int | None, class_names: Sequence[str]
) -> Report:
    family, start = task.family, task.adapter
    if family.random:
        raise UserError(
            "the run started from random weights (model.backbone_kwargs.pretrained is false), so there is no "
            "pretrained model that a PEFT folder could be put on: use --format merged"
        )
    base, heads = family.build()[0].eval(), family.heads(task.net)
    factors = change(task.adaptation, rank, start.merged_into(task.adaptation) if start else None)
    names = [*heads, *(start.modules_beside(heads) if start else ())]
    modules = {name: plain.get_submodule(name).state_dict() for name in names}
    _require_untouched(base, plain, (*(f"{name}.weight" for name in factors), *(f"{name}." for name in modules)))
    size = peft_folder.write(new, factors, modules, family.base, family.task_type, class_names)
    trained = example_outputs(family, task.net, task.net)
    installed = find_spec("peft") is not None
    notes = [f"it belongs on {family.recipe}"]
    if not installed:
        notes.append("peft is not installed, so the files were not loaded back")
    if rank is not None or not installed:
        rebuilt = example_outputs(family, _changed(copy.deepcopy(base), factors, modules), task.net)
    found = example_outputs(family, _in_peft(base, new), task.net) if installed else rebuilt
    differences = _compare(found, trained if rank is None else rebuilt, trained)
    return Report(target, size, _size(plain), *differences, factors, notes)


def _in_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about transformers
        return PeftModel.from_pretrained(base, str(folder), torch_device="cpu")


def _compare(found: Tensor, expected: Tensor, trained: Tensor) -> tuple[float, float]:
    """The largest difference of ``found`` and the ``trained`` outputs, and the largest of these.

    Raises:
        UserError: ``found`` is not the ``expected`` output.
    """
    largest = float(trained.abs().max())
    allowed = 1e-4 * largest + 1e-6  # a deep network's rounding in float32 comes to about 1e-5 of its outputs
    if not (distance := float((found - expected).abs().max())) <= allowed:
        raise UserError(
            f"the exported files give outputs that differ by {distance:.1e}, float32 explains no more than "
            f"{allowed:.1e}, so nothing was written: please report this with the model's name"
        )
    return float((found - trained).abs().max()), largest


def _size(net: nn.Module) -> int:
    return sum(value.nbytes for value in net.state_dict().values())


def _require_untouched(base: nn.Module, plain: nn.Module, exported: tuple[str, ...]) -> None:
    """Refuse changes that a LoRA and heads cannot hold, such as the running statistics of a batch norm."""
    own = plain.state_dict()
    for name, value in base.state_dict().items():
        if not name.startswith(exported) and not torch.equal(value, own[name]):
            raise UserError(
                f"{name} is no longer that of the pretrained weights, and a PEFT folder holds only linear layers and "
                "heads: use --format merged"
            )


@torch.no_grad()
def _changed(base: nn.Module, factors: Mapping[str, Factors], modules: Mapping[str, dict[str, Any]]) -> nn.Module:
    """``base`` with the content of a PEFT folder merged into its weights, in place."""
    for name, each in factors.items():
        weight = base.get_parameter(f"{name}.weight")
        weight.copy_(each.applied_to(weight))
    for name, state in modules.items():
        base.get_submodule(name).load_state_dict(state)
    return base


# -- folders


@contextmanager
def _whole_or_nothing(target: Path) -> Iterator[Path]:
    """A new folder that replaces ``target``, or is moved into it, if the block succeeds, and vanishes otherwise."""
    there = next(parent for parent in target.parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=there) as place:
            new = Path(place, "new")
            new.mkdir()
            yield new
            for file in new.iterdir():
                file.chmod(new.stat().st_mode & 0o666)  # safetensors lets only the owner read
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            _move(new, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--output {target} cannot be written ({reason}), so nothing was: name another place"
        ) from error


def _move(new: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        new.replace(target)  # at once; an empty folder may be in the way
        return
    # File by file, and the weights are away for as long as old and new ones are mixed.
    files = sorted(new.iterdir(), key=lambda file: file.name in WEIGHTS)
    for name in (*WEIGHTS, peft_folder.PICKLE, peft_folder.CONFIG):
        (target / name).unlink(missing_ok=True)
    for file in files:
        file.replace(target / file.name)


# -- from a checkpoint


def load_task(checkpoint: Path, config_file: str | None) -> Task:
    """The trained model in ``checkpoint`` on the CPU.

    Args:
        config_file: names the task's class and the places of the pretrained weights; by default the run's own.

    Raises:
        UserError: the file was not written by ``fit``, or the model cannot be built again.
    """
    if not {"srlora", "hyper_parameters"} <= set(checkpoints.read(checkpoint)):
        raise UserError(f"--ckpt_path {checkpoint} holds no model that this package adapted, so it cannot be exported")
    folders = checkpoints.run_folders(checkpoint)
    if not (config_file or folders):
        raise UserError(f"the run's config.yaml is not in {checkpoint.resolve().parent.parent}, give it with --config")
    file = config_file or str(folders[0] / "config.yaml")
    settings = config.read(file)
    path = str(config.model_class(settings))
    if not (config_file or path.startswith("srlora_pl.")):
        # Importing a class runs code, which a file found beside a checkpoint must not cause.
        raise UserError(f"{file} names the class {path!r} from elsewhere, give --config {file} if you trust it")
    kind: Any = locate(path)
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise UserError(
            f"model.class_path {path!r} in {file} is no task of this package, give the run's own config.yaml"
        )
    given, data = settings["model"].get("init_args") or {}, settings.get("data") or {}
    places = {key: given[key] for key in _PLACES if key in given}
    task = kind.load_from_checkpoint(checkpoint, "cpu", compile=False, optimizer="sgd", weights_only=True, **places)
    task.take_data_settings(str(data.get("class_path")), data.get("init_args") or {})
    return task
