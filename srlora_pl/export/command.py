"""Trained models for programs that know nothing of this package: timm's or transformers' folders, or a PEFT adapter."""

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from srlora_pl.lowrank.delta import Factors, change, overall_error
from srlora_pl.models import peft_folder
from srlora_pl.models.family import ModelFamily, example_outputs
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
            lines = [
                f"{name}: rank {each.rank}, relative error {each.error:.2e}" for name, each in self.factors.items()
            ]
            lines.append(f"relative error of all changes together: {overall_error(self.factors.values()):.2e}")
        lines += self.notes
        ranks = sorted({factors.rank for factors in self.factors.values()})
        if ranks:
            lines.append(
                f"adapter of rank {' to '.join(map(str, dict.fromkeys([ranks[0], ranks[-1]])))}: {_mib(self.size)}, "
                f"the merged weights would take {_mib(self.dense_size)}"
            )
        if self.size > self.dense_size:
            lines.append("--format merged is the smaller file here, and the faster model")
        lines.append(
            f"largest output difference to the trained model: {self.difference:.1e} (outputs up to {self.largest:.1e})"
        )
        return [*lines, f"written to {self.folder}" + ("" if ranks else f" ({_mib(self.size)})")]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


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
        class_names: one per class.

    Raises:
        UserError: an argument is wrong, the weights are not finite, or the files do not give the model's outputs;
            then nothing is written.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format} is unknown, it is one of {', '.join(FORMATS)}")
    target = require_free(folder, force)
    if not isinstance(task, Task):
        raise UserError(
            f"{type(task).__name__} is neither an ImageClassifier nor a TextClassifier, so its files have no known "
            "layout: take model.adaptation.merged_copy()"
        )
    class_names = class_names if len(class_names) == task.hparams.get("num_classes") else ()
    if rank is not None and task.adaptation.method.nested:
        with task.adaptation.at_rank(rank):
            return _export(task, target, format, None, class_names)
    if rank is not None and format != "peft":
        raise UserError(f"--rank {rank} belongs to --format peft, leave it out for merged weights")
    return _export(task, target, format, rank, class_names)


def _export(task: Task, target: Path, format: str, rank: int | None, class_names: Sequence[str]) -> Report:
    plain = task.adaptation.merged_copy()
    _require_finite(plain.state_dict())
    with _whole_or_nothing(target) as new:
        if format == "merged":
            report = _write_merged(task, plain, new, class_names)
        else:
            report = _write_adapter(task, plain, new, rank, class_names)
    return replace(report, folder=target)


def _write_merged(task: Task, plain: nn.Module, new: Path, class_names: Sequence[str]) -> Report:
    family = task.family
    notes = family.save(plain, new, class_names, task.card())
    trained = example_outputs(family, task.net, task.net)
    loaded = example_outputs(family, family.load(new), task.net)
    size = _size(plain.state_dict())
    return Report(new, size, size, *_compare(loaded, trained, trained), notes=notes)


def _write_adapter(task: Task, plain: nn.Module, new: Path, rank: int | None, class_names: Sequence[str]) -> Report:
    family, start = task.family, task.adapter
    base, heads = _pretrained(family), family.heads(task.net)
    factors = change(task.adaptation, rank, start.merged_into(task.adaptation) if start else None)
    names = [*heads, *(start.modules_beside(heads) if start else ())]
    modules = {name: plain.get_submodule(name).state_dict() for name in names}
    _require_finite({f"{name}.{side}": getattr(each, side) for name, each in factors.items() for side in "BA"})
    _require_untouched(base, plain, (*(f"{name}.weight" for name in factors), *(f"{name}." for name in modules)))
    base_settings = (family.base_name, family.task_type, family.revision)
    size = peft_folder.write(new, factors, modules, *base_settings, class_names)
    trained = example_outputs(family, task.net, task.net)
    installed = find_spec("peft") is not None
    notes = [f"it belongs on {family.recipe}"]
    if not installed:
        notes.append("peft is not installed, so the files were not loaded back")
    if rank is not None or not installed:
        rebuilt = example_outputs(family, _changed(copy.deepcopy(base), factors, modules), task.net)
    found = example_outputs(family, _in_peft(base, new), task.net) if installed else rebuilt
    differences = _compare(found, trained if rank is None else rebuilt, trained)
    return Report(new, size, _size(plain.state_dict()), *differences, factors, notes)


def _pretrained(family: ModelFamily) -> nn.Module:
    """The pretrained network with a new head."""
    if family.random:
        raise UserError(
            "the run started from random weights (model.backbone_kwargs.pretrained is false), so there is no "
            "pretrained model that a PEFT folder could be put on: use --format merged"
        )
    return family.build()[0].eval()


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


def _size(state: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in state.values())


def _require_finite(state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity, so nothing was written: export an earlier checkpoint")


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


def require_free(folder: str | Path, force: bool) -> Path:
    """The whole path of a folder that may be written to.

    Raises:
        UserError: it is a file, or holds files and ``force`` is not set.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {folder} is a file, give a folder")
    if not force and target.is_dir() and any(target.iterdir()):
        raise UserError(f"--output {folder} holds files already, give a new folder or --force to overwrite them")
    return target


@contextmanager
def _whole_or_nothing(target: Path) -> Iterator[Path]:
    """A new folder that replaces ``target``, or is moved into it, if the block succeeds, and vanishes otherwise."""
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            new = Path(place, "new")
            new.mkdir()
            yield new
            for file in new.iterdir():
                file.chmod(new.stat().st_mode & 0o666)  # safetensors lets only the owner read
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            _move(new, target)
    except BaseException as error:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"--output {target} cannot be written ({reason}), so nothing was: name another place"
            ) from error
        raise


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


def export_checkpoint(
    checkpoint: str, format: str, output: str, rank: int | None, force: bool, config_file: str | None
) -> Report:
    """`export_model` of the model in the file ``checkpoint`` of a ``fit``.

    Args:
        config_file: names the task's class and the places of the pretrained weights; by default the run's own.
    """
    require_free(output, force)
    task, class_names = load_task(Path(checkpoint), config_file)
    return export_model(task, output, format, rank, force, class_names)


def load_task(checkpoint: Path, config_file: str | None) -> tuple[Task, list[str]]:
    """The trained model in ``checkpoint`` on the CPU, and the names of its classes, empty if unknown.

    Raises:
        UserError: the file was not written by ``fit``, or the model cannot be built again.
    """
    content = checkpoints.read(checkpoint)
    if not {"srlora", "hyper_parameters"} <= set(content):
        raise UserError(f"--ckpt_path {checkpoint} holds no model that this package adapted, so it cannot be exported")
    settings, kind = _task_class(checkpoint, config_file)
    given = settings["model"].get("init_args") or {}
    places = {key: given[key] for key in _PLACES if key in given}
    task = kind.load_from_checkpoint(checkpoint, "cpu", compile=False, optimizer="sgd", weights_only=True, **places)
    data = settings.get("data") or {}
    task.take_data_settings(str(data.get("class_path")), data.get("init_args") or {})
    return task, checkpoints.class_names(content) or []


def _task_class(checkpoint: Path, config_file: str | None) -> tuple[config.Node, type[Task]]:
    """The run's settings, and the class of its model."""
    folders = checkpoints.run_folders(checkpoint)
    if not (config_file or folders):
        raise UserError(f"the run's config.yaml is not in {checkpoint.resolve().parent.parent}, give it with --config")
    file = config_file or str(folders[0] / "config.yaml")
    settings = config.read(file)
    model = settings.get("model")
    path = str(model.get("class_path")) if isinstance(model, dict) else ""
    if not (config_file or path.startswith("srlora_pl.")):
        # Importing a class runs code, which a file found beside a checkpoint must not cause.
        raise UserError(f"{file} names the class {path!r} from elsewhere, give --config {file} if you trust it")
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise UserError(
            f"model.class_path {path!r} in {file} is no task of this package, give the run's own config.yaml"
        )
    return settings, kind
