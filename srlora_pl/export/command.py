"""Trained models for programs that know nothing of this package.

These are timm's or transformers' folders, a PEFT adapter, or a program for a server.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any

from torch import Tensor, nn

from srlora_pl.export import serving
from srlora_pl.export.adapters import changed, in_peft, require_untouched
from srlora_pl.export.card import Facts, facts_of, model_card
from srlora_pl.export.folders import require_free, whole_or_nothing
from srlora_pl.export.report import Report, compare, require_finite, size_of
from srlora_pl.lowrank.delta import change, overall_error
from srlora_pl.lowrank.nf4 import relative_error
from srlora_pl.lowrank.targets import linears_in_blocks
from srlora_pl.models import peft_folder
from srlora_pl.models.family import example_outputs
from srlora_pl.models.weights import NF4, prepared
from srlora_pl.run import config, folders
from srlora_pl.run.messages import note
from srlora_pl.tasks.base import Task
from srlora_pl.training import checkpoints
from srlora_pl.util.errors import UserError
from srlora_pl.util.files import relative

FORMATS = ("merged", "peft", *serving.FILES)
# The arguments of a task that say where its pretrained weights are, and change when folders move.
_PLACES = ("backbone", "backbone_checkpoint", "adapter")


def export_model(
    task: Task,
    folder: str | Path,
    format: str = "merged",
    rank: int | None = None,
    force: bool = False,
    class_names: Sequence[str] = (),
    card: Facts | None = None,
) -> Report:
    """Write the trained ``task`` to ``folder``, load it from there with the library it is for, and compare outputs.

    Args:
        task: an `ImageClassifier`, a `TextClassifier` or a `CausalLM`; it is not changed.
        folder: new or empty, unless ``force``.
        format: ``merged``, plain weights in timm's or transformers' own layout; ``peft``, a LoRA on the pretrained
            weights; ``onnx`` or ``pt2`` (``torch.export``), the merged network as a program for any number of samples
            and any length of texts.
        rank: compresses the LoRA to this rank; None for the exact one. Where the method's first pairs are a model of
            their own, it takes so many of each matrix, in either format.
        force: write into a folder that holds files already; those of other names stay, but for weights and adapters
            of another export: the libraries would load them too.
        class_names: one per class; by default those that the task was trained on.
        card: what is known of the run; with it the folder gets a model card, README.md.

    Raises:
        UserError: an argument is wrong, the weights are not finite, or the files do not give the model's outputs;
            then nothing is written.
    """
    _require_format(format)
    target = require_free(folder, force)
    if not isinstance(task, Task):
        raise UserError(
            f"{type(task).__name__} is neither an ImageClassifier nor a TextClassifier nor a CausalLM, so its files "
            "have no known layout: take model.adaptation.merged_copy()"
        )
    class_names = class_names or task.trained_classes
    class_names = class_names if len(class_names) == task.hparams.get("num_classes") else ()
    if rank is not None and task.adaptation.method.nested:
        with task.adaptation.at_rank(rank):
            return _export(task, target, format, None, class_names, card)
    if rank is not None and format != "peft":
        raise UserError(f"--rank {rank} belongs to --format peft, leave it out for merged weights")
    return _export(task, target, format, rank, class_names, card)


def _require_format(format: str) -> None:
    if format not in FORMATS:
        raise UserError(f"--format {format} is unknown, it is one of {', '.join(FORMATS)}")
    serving.require_packages(format)


def _export(
    task: Task, target: Path, format: str, rank: int | None, class_names: Sequence[str], card: Facts | None
) -> Report:
    plain = task.adaptation.merged_copy()
    require_finite(plain)
    with whole_or_nothing(target) as new:
        if format == "peft":
            report = _write_adapter(task, plain, new, target, rank, class_names)
        else:
            report = _write_merged(task, plain, new, target, class_names, format)
        if card is not None:
            lost = overall_error(report.factors.values()) if rank is not None else 0.0
            (new / "README.md").write_text(model_card(task, card, target.name, format, class_names, lost), "utf-8")
        return replace(report, files=sorted(file.name for file in new.iterdir()))


def _write_merged(
    task: Task, plain: nn.Module, new: Path, target: Path, class_names: Sequence[str], format: str
) -> Report:
    family, exact = task.family, _exact(task, plain)
    notes = family.save(plain, new, class_names, task.card())
    if rounded := _in_four_bits(task):
        lost = relative_error(linear.weight for linear in rounded.values())
        notes.append(
            f"frozen weights are those of the run, in four bits: {lost:.1e} from the pretrained ones, relative"
        )
    loaded = family.load(new)
    if format in serving.FILES:
        _remove_weights(new)
        serving.write(family, loaded, new, format)
        found, trained = serving.trial_outputs(family, task.net if exact is None else exact, new, format)
        expected = trained
    else:
        trained = _trained_outputs(task, exact)
        # In half precision the weights are rounded once as they are written, and `plain` with them.
        expected = trained if exact is None else example_outputs(family, plain, task.net)
        found = example_outputs(family, loaded, task.net)
    return Report(target, size_of(plain), size_of(plain), *compare(found, expected, trained), notes=notes)


def _trained_outputs(task: Task, exact: nn.Module | None) -> Tensor:
    """Those of the trained network; of one with weights in half precision, of its merged weights in float32."""
    return example_outputs(task.family, task.net if exact is None else exact, task.net)


def _exact(task: Task, plain: nn.Module) -> nn.Module | None:
    """The merged network in float32, where its weights are not; None where they are."""
    is_half = any(weight.dtype.itemsize == 2 for weight in task.net.parameters())
    return copy.deepcopy(plain) if is_half else None


def _in_four_bits(task: Task) -> dict[str, nn.Linear]:
    """The pretrained linears that the run has in four bits, by dotted name; none where nothing tells them any more."""
    if task.hparams["weights"] != NF4 or task.family.random:
        return {}
    base = prepared(task.adapter, task.adaptation.method, (), "", task.family.build()[0])
    return linears_in_blocks(base, task.trained_heads(base))


def _remove_weights(folder: Path) -> None:
    """Leave the configuration, with the classes and how inputs are prepared, and the tokenizer."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()


def _write_adapter(
    task: Task, plain: nn.Module, new: Path, target: Path, rank: int | None, class_names: Sequence[str]
) -> Report:
    family, start = task.family, task.adapter
    if family.random:
        raise UserError(
            "the run started from random weights (model.backbone_kwargs.pretrained is false), so there is no "
            "pretrained model that a PEFT folder could be put on: use --format merged"
        )
    base, heads, exact = family.build()[0].float().eval(), family.heads(task.net), _exact(task, plain)
    factors = change(task.adaptation, rank, start.merged_into(task.adaptation) if start else None)
    names = [*heads, *(start.modules_beside(heads) if start else ())]
    modules = {name: plain.get_submodule(name).state_dict() for name in names}
    rounded = _in_four_bits(task)
    exported = (*(f"{name}.weight" for name in {**factors, **rounded}), *(f"{name}." for name in modules))
    require_untouched(base.state_dict(), plain, exported)
    try:
        notes = family.save(plain, new, class_names, task.card())
        # Beside an adapter transformers would take a config.json for the sign of a whole model.
        (new / "config.json").rename(new / "model_config.json")
    except UserError as error:
        notes = [f"without a model_config.json: {error}"]
    _remove_weights(new)
    size = peft_folder.write(new, factors, modules, family.base, family.task_type, class_names)
    trained = _trained_outputs(task, exact)
    installed = find_spec("peft") is not None
    notes = [f"it belongs on {family.recipe}", *notes]
    if not installed:
        notes.append("peft is not installed, so the files were not loaded back")
    if rounded:
        notes.append("the run had these weights in four bits, so the adapter gives other outputs on them")
    if others := rank is not None or bool(rounded) or not installed:
        rebuilt = example_outputs(family, changed(copy.deepcopy(base), factors, modules), task.net)
    found = example_outputs(family, in_peft(base, new), task.net) if installed else rebuilt
    differences = compare(found, rebuilt if others else trained, trained)
    return Report(target, size, size_of(plain), *differences, factors, notes)


# -- the command


def export(given: argparse.Namespace) -> list[str]:
    """`export_model` for a checkpoint, as the command line asks for it; the report in words."""
    _require_format(given.format)
    repository = None
    if given.push_to_hub:
        from srlora_pl.export import hub  # which asks the network, so only here

        repository = hub.require_repository(given.push_to_hub)
    require_free(given.output, given.force)
    checkpoint = find_checkpoint(given.ckpt_path, given.config)
    task, data = load_task(checkpoint, given.config)
    card = facts_of(checkpoint, data, repository) if given.model_card or repository else None
    report = export_model(task, given.output, given.format, given.rank, given.force, card=card)
    lines = [*(f"note: {remark}" for remark in (card.remarks if card else ())), *report.lines()]
    if repository:
        lines.append(f"pushed to {hub.push(report.folder, report.files, repository, given.private)}")
    return lines


def find_checkpoint(asked: str, config_files: Sequence[str]) -> Path:
    """The file ``asked`` for; of ``last`` the furthest readable one of a run.

    That is the newest run of the config files, as for ``fit`` and ``test``; without any, the run below ``runs/`` that
    was written to last.
    """
    if asked != "last":
        return Path(asked)
    if config_files:
        settings = _combined(config_files)
        arguments = (settings.get("model") or {}).get("init_args") or {}
        method, name = config.class_name(arguments.get("method")), settings.get("name") or Path(config_files[0]).stem
        root = folders.root_of((settings.get("trainer") or {}).get("default_root_dir"), name, method)
        places = folders.own_or_all(config_files[0], root)
    else:
        root = Path(folders.ROOT)
        places = sorted(root.glob("*/version_*"), key=_last_write, reverse=True)
    if not (found := folders.furthest_checkpoint(places, None)):
        raise UserError(f"--ckpt_path last finds no checkpoint in {root}, run fit first or give a file")
    note(f"--ckpt_path last takes {relative(found[0])}, step {found[1]}")
    return found[0]


def _last_write(folder: Path) -> float:
    return max((file.stat().st_mtime for file in checkpoints.files_of(folder)), default=0.0)


def _combined(config_files: Sequence[str]) -> config.Node:
    return config.combine([config.read(config.find(file)) for file in config_files])[0]


def load_task(checkpoint: Path, config_files: Sequence[str] = ()) -> tuple[Task, config.Node]:
    """The trained model in ``checkpoint`` on the CPU, and the run's settings of its data.

    Args:
        config_files: name the task's class and the places of the pretrained weights; by default the run's own.

    Raises:
        UserError: the file was not written by ``fit``, or the model cannot be built again.
    """
    if not {"srlora", "hyper_parameters"} <= set(checkpoints.read(checkpoint)):
        raise UserError(f"--ckpt_path {checkpoint} holds no model that this package adapted, so it cannot be exported")
    homes = checkpoints.run_folders(checkpoint)
    if not (config_files or homes):
        raise UserError(f"the run's config.yaml is not in {checkpoint.resolve().parent.parent}, give it with --config")
    files = config_files or [str(homes[0] / "config.yaml")]
    settings = _combined(files)
    path, file = str(config.model_class(settings)), files[0]
    method = config.classes(settings).get("model.method", path)
    for each in (path, method):
        if not (config_files or each.startswith("srlora_pl.")):
            # Importing a class runs code, which a file found beside a checkpoint must not cause.
            raise UserError(f"{file} names the class {each!r} from elsewhere, give --config {file} if you trust it")
    kind: Any = locate(path)
    locate(method)  # a checkpoint's method is looked for among those that are imported
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise UserError(
            f"model.class_path {path!r} in {file} is no task of this package, give the run's own config.yaml"
        )
    given, data = settings["model"].get("init_args") or {}, settings.get("data") or {}
    places = {key: given[key] for key in _PLACES if key in given}
    task = kind.load_from_checkpoint(checkpoint, "cpu", compile=False, optimizer="sgd", weights_only=True, **places)
    task.take_data_settings(str(data.get("class_path")), data.get("init_args") or {})
    return task, data
