"""The model card of an exported folder, README.md: what is known of a run, with the hub's metadata at its head."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from srlora_pl.export.usage import usage
from srlora_pl.reporting.summary import FILE as SUMMARY
from srlora_pl.run import folders
from srlora_pl.tasks.base import Task
from srlora_pl.training import checkpoints
from srlora_pl.util.errors import UserError, listed

# The hub's names of scores, where they differ from ours.
_PIPELINES = {None: "image-classification", "SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}
_METRICS = {
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "top5": "top_5_accuracy",
}
_WHAT = {
    "merged": "The files hold the whole network, with the adapters merged into its weights.",
    "peft": "The files hold a LoRA for the untouched base model, in the layout of PEFT.",
    "onnx": "`model.onnx` is the merged network, for batches of any size{}.",
    "pt2": "`model.pt2` is the merged network as a program of `torch.export`, for batches of any size{}.",
}


@dataclass(frozen=True)
class Facts:
    """What is known of a run beside its model.

    Attributes:
        summary: the content of its summary.json; empty if unknown.
        data: what it was trained on, in a few words.
        repository: of the hub, where the folder will be.
        remarks: sentences on what is not known.
    """

    summary: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    repository: str | None = None
    remarks: Sequence[str] = ()


def facts_of(checkpoint: Path, data: Mapping[str, Any], repository: str | None = None) -> Facts:
    """What the folder of the run that wrote ``checkpoint`` tells.

    Args:
        checkpoint: the exported one. Scores are those of one checkpoint, and left out for another one.
        data: the run's settings of its data, ``class_path`` and ``init_args``.
        repository: where the folder will be.
    """
    folder = folders.folder_of(checkpoint)
    known, remarks = _data_name(data), []
    try:
        summary = json.loads((folder / SUMMARY).read_text("utf-8")) if folder else {}
    except (OSError, ValueError):
        summary = {}
    if not summary:
        where = "the checkpoint lies in no run's folder" if folder is None else f"its run has no readable {SUMMARY}"
        remarks.append(f"{where}, so its scores, its length and the versions that it was trained with are not known")
    elif scored := _other_scored(checkpoint, folder, summary):
        summary = {key: value for key, value in summary.items() if key != "scores"}
        remarks.append(f"the run's scores are those of {scored}, which is another checkpoint than this one")
    return Facts(summary, known, repository, remarks)


def _other_scored(checkpoint: Path, folder: Path | None, summary: Mapping[str, Any]) -> str:
    """The checkpoint that the run's scores are of; nothing if these are the weights of ``checkpoint``."""
    best = Path(summary.get("best", {}).get("checkpoint", "")).name
    steps = summary.get("steps")
    if best and folder:
        file = next((file for file in checkpoints.files_of(folder) if file.name == best), None)
        try:
            steps = checkpoints.read(file)["global_step"] if file else None
        except UserError:
            steps = None
    same = checkpoint.name == best or checkpoints.read(checkpoint)["global_step"] == steps
    return "" if same else best or f"step {steps}"


def _data_name(data: Mapping[str, Any]) -> str:
    given = data.get("init_args") or {}
    if given.get("task"):
        return f"GLUE {str(given['task']).upper()}"
    return str(given.get("name") or Path(str(given.get("root") or "")).name)


def model_card(
    task: Task, facts: Facts, name: str, format: str, class_names: Sequence[str] = (), lost: float = 0.0
) -> str:
    """The card of ``task``, exported as ``format`` to a folder ``name``.

    ``lost``: the relative error of a LoRA that was compressed.
    """
    place = facts.repository or name
    title, base, scores = place.rpartition("/")[2], _base(task), _scores(facts)
    on = f" on {facts.data}" if facts.data else ""
    sizes = "" if task.family.task_type is None else " and texts of any length that the model takes"
    remarks = [f"{remark[0].upper()}{remark[1:]}." for remark in facts.remarks]
    if lost:
        remarks.append(f"The scores are those of the exact LoRA; this one has a relative error of {lost:.1e}.")
    rows = {key: f"{value:.4f}" for key, value in scores.items()}
    parts = [
        f"---\n{_metadata(task, facts, title, format).to_yaml()}\n---",
        f"# {title}",
        f"`{base}`, fine-tuned{on} with {_method(task)}, by `srlora_pl`. {_WHAT[format].format(sizes)}",
        _table({"": "", **_facts(task, facts, class_names)}),
        "## Scores",
        *([_table({"score": "value", **rows})] if rows else []),
        *(remarks if remarks or rows else ["None are known."]),
        "## Use",
        f"```python\n{usage(task.family, format, place, facts.repository is not None)}```",
        "## License",
        _license_sentence(task),
    ]
    return "\n\n".join(parts) + "\n"


def _method(task: Task) -> str:
    return type(task.adaptation.method).__name__


def _base(task: Task) -> str:
    """The repository of the pretrained weights, or their folder's name; not its path, which is nobody's business."""
    if task.family.random:
        return "random weights"
    return _repository(task) or Path(str(task.hparams["backbone"])).name


def _repository(task: Task) -> str | None:
    return None if task.family.random else task.family.hub_name(task.net)


def _metadata(task: Task, facts: Facts, title: str, format: str) -> ModelCardData:
    base = _repository(task)
    is_text = task.family.task_type is not None
    kind = _PIPELINES[task.family.task_type]
    library = {"merged": "transformers" if is_text else "timm", "peft": "peft", "onnx": "onnx", "pt2": "pytorch"}[
        format
    ]
    results = [
        EvalResult(
            task_type=kind,
            dataset_type=facts.data or "unknown",
            dataset_name=facts.data or "unknown",
            dataset_split=key.partition("/")[0],
            metric_type=_METRICS.get(score := key.partition("/")[2], score),
            metric_value=value,
        )
        for key, value in _scores(facts).items()
        if not key.endswith("/loss")
    ]
    return ModelCardData(
        library_name=library,
        license=_license(task),
        base_model=base,
        base_model_relation=None if base is None else "adapter" if format == "peft" else "finetune",
        pipeline_tag=kind,
        tags=["srlora_pl", _method(task).lower()],
        model_name=title,
        eval_results=results or None,
    )


def _scores(facts: Facts) -> dict[str, float]:
    """Without that of the name score, which is another one's value again."""
    scores: Mapping[str, float] = facts.summary.get("scores", {})
    return {key: value for key, value in scores.items() if not key.endswith("/score") and value is not None}


def _facts(task: Task, facts: Facts, class_names: Sequence[str]) -> dict[str, str]:
    """The rows of the card's table."""
    summary = facts.summary
    settings = task.adaptation.method.spec().get("init_args") or {}
    told = ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, [], {}, False))
    rows = {
        "base model": _base(task),
        "method": f"{_method(task)}: {told}",
        "data": facts.data,
        "outputs": f"{len(class_names)} classes: {listed(class_names, most=20)}" if class_names else "",
    }
    if config := getattr(task, "data_config", None):
        _, height, width = config["input_size"]
        rows["input"] = (
            f"{height} x {width} pixels, RGB, {config['interpolation']}, mean {config['mean']}, std {config['std']}, "
            f"crop_pct {config['crop_pct']}, crop_mode {config['crop_mode']}"
        )
    if parameters := summary.get("parameters"):
        rows["trained parameters"] = f"{parameters['trained']:,} of {parameters['all']:,}"
    if summary.get("steps"):
        rows["training"] = f"{summary['steps']} steps, {summary['seconds']:.0f} s on {summary['device']}"
    if versions := summary.get("versions"):
        rows["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return {key: value for key, value in rows.items() if value}


def _table(rows: Mapping[str, str]) -> str:
    (head, *body) = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows.items()]
    return "\n".join([head, "| --- | --- |", *body])


def _license(task: Task) -> str | None:
    """That of the pretrained weights, as far as timm tells it."""
    return None if task.family.random else getattr(task.net, "pretrained_cfg", {}).get("license")


def _license_sentence(task: Task) -> str:
    if name := _license(task):
        return f"That of the pretrained weights, {name}. The data may have conditions of their own."
    return "Not given: state one at the head of this file, in accord with those of the pretrained weights and the data."
