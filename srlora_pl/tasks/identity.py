"""Whether a checkpoint and a run are of one model: its arguments, and the classes that its outputs mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srlora_pl.data.protocols import DataForTask
from srlora_pl.util.errors import UserError

# Arguments that must agree where only the weights are used (the mixin compares the method).
_OF_THE_NETWORK = ("num_classes", "backbone", "backbone_kwargs", "problem", "train_pooler")
# Arguments that may change even where a run goes on; weights come from the checkpoint.
_FREE = {"method", "backbone_checkpoint", "checkpoints", "compile", "matmul_precision"}
# Keys of model.backbone_kwargs that leave the network as it is: where files lie, and the tokenizer's padding.
_PLACES = ("pretrained", "cache_dir", "local_files_only", "proxies", "pad_token_id")


def require_same_model(saved: Mapping[str, Any], here: Mapping[str, Any], resumes: bool) -> None:
    """Compare the arguments of a checkpoint with those of the run.

    Args:
        saved: the checkpoint's hyperparameters.
        here: the run's.
        resumes: whether the run goes on, so that all arguments must agree: the optimizer's state would restore the old
            values in silence.

    Raises:
        UserError: an argument differs.
    """
    for key in sorted(set(saved) - _FREE) if resumes else _OF_THE_NETWORK:
        if key in saved and _comparable(saved[key]) != _comparable(here.get(key)):
            mend = "give it data of as many classes" if key == "num_classes" else f"set model.{key} to the former"
            raise UserError(
                f"The checkpoint was written with model.{key} {saved[key]!r}, but this run has {here.get(key)!r}: "
                f"{mend}, or start anew without --ckpt_path."
            )


def _comparable(value: Any) -> Any:
    """The last part of a path, since folders move, and the arguments that shape the network."""
    if isinstance(value, str):
        return Path(value).name
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k not in _PLACES}
    return value or {}


def require_same_classes(trained: Sequence[str], data: DataForTask) -> None:
    """Refuse data of other classes: an output means a class by its place alone, and would be scored as another one.

    Args:
        trained: the classes that the model was trained on, empty where unknown.
        data: to use it with. Where it names no classes, or another number of them, nothing is compared.

    Raises:
        UserError: a name differs.
    """
    given = list(data.class_names)
    if len(trained) != len(given):
        return
    if data.names_numbers and list(trained) == [*map(str, range(len(given)))]:
        return  # of an older checkpoint
    for place, (theirs, ours) in enumerate(zip(trained, given, strict=True)):
        if theirs != ours:
            raise UserError(
                f"The model was trained on other classes: number {place} is {theirs!r} there and {ours!r} in "
                "this data; name the classes of the data as they were, or start anew without --ckpt_path."
            )
