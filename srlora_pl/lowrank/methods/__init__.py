"""One small class a method: what a config names under ``model.method``."""

from srlora_pl.lowrank.method import Method
from srlora_pl.lowrank.methods.adalora import AdaLoRA
from srlora_pl.lowrank.methods.bitfit import BitFit
from srlora_pl.lowrank.methods.bottleneck import Bottleneck
from srlora_pl.lowrank.methods.dora import DoRA
from srlora_pl.lowrank.methods.dylora import DyLoRA
from srlora_pl.lowrank.methods.full import Full
from srlora_pl.lowrank.methods.galore import GaLore
from srlora_pl.lowrank.methods.hydralora import HydraLoRA
from srlora_pl.lowrank.methods.linear_probe import LinearProbe
from srlora_pl.lowrank.methods.lora import LoRA
from srlora_pl.lowrank.methods.lora_ga import LoRAGA
from srlora_pl.lowrank.methods.lora_pro import LoRAPro
from srlora_pl.lowrank.methods.lora_sb import LoRASB
from srlora_pl.lowrank.methods.lora_xs import LoRAXS
from srlora_pl.lowrank.methods.peft_tuner import Peft
from srlora_pl.lowrank.methods.pissa import PiSSA
from srlora_pl.lowrank.methods.prefix_tuning import PrefixTuning
from srlora_pl.lowrank.methods.prompt_tuning import PromptTuning
from srlora_pl.lowrank.methods.relora import ReLoRA
from srlora_pl.lowrank.methods.srlora import SRLoRA
from srlora_pl.lowrank.methods.tied_lora import TiedLoRA
from srlora_pl.lowrank.methods.vera import VeRA
from srlora_pl.util.errors import UserError, did_you_mean

__all__ = [
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "DyLoRA",
    "Full",
    "GaLore",
    "HydraLoRA",
    "LinearProbe",
    "LoRA",
    "LoRAGA",
    "LoRAPro",
    "LoRASB",
    "LoRAXS",
    "Peft",
    "PiSSA",
    "PrefixTuning",
    "PromptTuning",
    "ReLoRA",
    "SRLoRA",
    "TiedLoRA",
    "VeRA",
]
REGISTRY: list[type[Method]] = [
    LoRA,
    PiSSA,
    SRLoRA,
    LoRAXS,
    LoRASB,
    LoRAGA,
    LoRAPro,
    DoRA,
    AdaLoRA,
    VeRA,
    TiedLoRA,
    ReLoRA,
    DyLoRA,
    HydraLoRA,
    Bottleneck,
    PromptTuning,
    PrefixTuning,
    Peft,
    Full,
    LinearProbe,
    BitFit,
    GaLore,
]


def from_spec(spec: dict[str, object]) -> Method:
    """The method that `Method.spec` describes.

    A spec may come from anyone's file, so its ``class_path`` only picks among the methods that are imported.

    Raises:
        UserError: it names none of them.
    """
    known = {f"{home}.{kind.__qualname__}": kind for kind in imported() for home in _homes(kind)}
    path = str(spec.get("class_path"))
    if path not in known:
        raise UserError(f"model.method.class_path is {path!r}{did_you_mean(path, known)}: it names no method.")
    return known[path](**spec.get("init_args", {}))  # type: ignore[arg-type]


def _homes(kind: type) -> set[str]:
    """The modules that ``kind`` can be imported from: the package's own methods also from its top."""
    return {kind.__module__, kind.__module__.partition(".lowrank.")[0]}


def imported() -> list[type[Method]]:
    """All methods that are imported, the user's too."""
    return _subclasses(Method)


def _subclasses(kind: type[Method]) -> list[type[Method]]:
    return [kind, *(deeper for sub in kind.__subclasses__() for deeper in _subclasses(sub))]
