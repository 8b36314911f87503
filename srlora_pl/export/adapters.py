"""A PEFT folder for any network that was adapted."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srlora_pl.export.folders import require_free, whole_or_nothing
from srlora_pl.export.report import Report, compare, require_finite, size_of
from srlora_pl.lowrank import Adaptation
from srlora_pl.lowrank.delta import Factors, change, merged_copy
from srlora_pl.models import peft_folder
from srlora_pl.util.errors import UserError, listed


def export_peft(
    adaptation: Adaptation,
    folder: str | Path,
    base: str,
    *,
    revision: str | None = None,
    rank: int | None = None,
    task_type: str | None = None,
    class_names: Sequence[str] = (),
    force: bool = False,
) -> Report:
    """Write what training changed in any network as a LoRA that the PEFT library loads, and compare the weights.

    ``PeftModel.from_pretrained(net, folder)`` puts it on a network that was built as that of ``adaptation`` was, with
    its pretrained weights. The modules in ``adaptation.trainable`` are replaced by the trained ones.

    Args:
        adaptation: of the network; it is not changed.
        folder: new or empty, unless ``force``.
        base: the name or folder of the pretrained network, which the files tell.
        revision: of the base on the hub.
        rank: compresses the LoRA to this rank; None for the exact one.
        task_type: PEFT's name of the task, such as ``SEQ_CLS`` or ``CAUSAL_LM``.
        class_names: of the network's outputs.
        force: write into a folder that holds files already.

    Raises:
        UserError: the method trains more than low-rank updates and modules; an argument is wrong; a weight is not
            finite; or the files do not give the trained weights. Then nothing is written.
    """
    target = require_free(folder, force)
    factors, plain = change(adaptation, rank), adaptation.merged_copy()
    require_finite(plain)
    modules = _trained_modules(plain, adaptation.trainable)
    untrained = merged_copy(adaptation.net, adaptation.layers, adaptation.pretrained_weights())
    exported = (*(f"{name}.weight" for name in factors), *(f"{name}." for name in modules))
    if adaptation.weights.reload:
        state = adaptation.weights.reload()
        require_untouched({name: state[name] for name in untrained.state_dict() if name in state}, plain, exported)
    with whole_or_nothing(target) as new:
        size = peft_folder.write(new, factors, modules, (base, revision), task_type, class_names)
        wanted = plain if rank is None else changed(copy.deepcopy(untrained), factors, modules)
        installed = find_spec("peft") is not None
        loaded: Any = in_peft(untrained, new) if installed else None
        found = loaded.merge_and_unload() if installed else changed(untrained, factors, modules)
        differences = compare(*(_values(net, exported) for net in (found, wanted, plain)))
        notes = [f"it belongs on {base}", *_beside(plain, exported, adaptation.weights.reload is not None)]
        if not installed:
            notes.append("peft is not installed, so the files were not loaded back")
        report = Report(target, size, size_of(plain), *differences, factors, notes)
        return replace(report, files=sorted(file.name for file in new.iterdir()), compared="weight")


def _trained_modules(plain: nn.Module, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The states of the modules that trained whole, by dotted name."""
    modules = dict(plain.named_modules())
    for name in names:
        if name not in modules:
            raise UserError(
                f"trainable names the parameter {name}, and a PEFT folder holds low-rank updates and whole modules: "
                "name its module, or take adaptation.merged_copy()"
            )
    return {name: modules[name].state_dict() for name in names}


def _values(net: nn.Module, exported: tuple[str, ...]) -> Tensor:
    """All that a folder holds of ``net``, in one row, float64."""
    state = net.state_dict()
    return torch.cat([state[name].double().flatten() for name in sorted(state) if name.startswith(exported)])


def _beside(plain: nn.Module, exported: tuple[str, ...], compared: bool) -> list[str]:
    """A word on statistics that a forward pass changes, where nothing tells whether they are those of the base."""
    names = [name for name in plain.state_dict() if name.endswith("running_mean") and not name.startswith(exported)]
    if compared or not names:
        return []
    return [f"the running statistics of {listed(names, most=2)} are not in it: they must be those of the base"]


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about transformers
        return PeftModel.from_pretrained(base, str(folder), torch_device="cpu")


def require_untouched(base: Mapping[str, Tensor], plain: nn.Module, exported: tuple[str, ...]) -> None:
    """Refuse changes that a LoRA and heads cannot hold, such as the running statistics of a batch norm."""
    own = plain.state_dict()
    for name, value in base.items():
        if not name.startswith(exported) and not torch.equal(value, own[name]):
            raise UserError(
                f"{name} is no longer that of the pretrained weights, and a PEFT folder holds only linear layers and "
                "heads: use --format merged"
            )


@torch.no_grad()
def changed(base: nn.Module, factors: Mapping[str, Factors], modules: Mapping[str, dict[str, Any]]) -> nn.Module:
    """``base`` with the content of a PEFT folder merged into its weights, in place."""
    for name, each in factors.items():
        weight = base.get_parameter(f"{name}.weight")
        weight.copy_(each.applied_to(weight))
    for name, state in modules.items():
        base.get_submodule(name).load_state_dict(state)
    return base
