"""The linears of a network that a method adapts."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from srlora_pl.lowrank.linear import Adapter
from srlora_pl.lowrank.target_settings import ALL_LINEAR, TargetSettings, is_below, name_matches
from srlora_pl.util.errors import UserError, did_you_mean

QKV = ("query", "key", "value")
# The same part of a transformer block in the names of timm and of the transformers families. A name is tried as it
# stands first; only one that matches nothing is looked up here.
ALIASES = {
    "query": ("query", "q_proj", "query_proj", "q_lin", "q"),
    "key": ("key", "k_proj", "key_proj", "k_lin", "k"),
    "value": ("value", "v_proj", "value_proj", "v_lin", "v"),
    "attention_output": ("attention.output.dense", "o_proj", "out_proj", "out_lin", "attn.proj", "attn.Wo"),
    "fc1": ("fc1", "intermediate.dense", "lin1", "up_proj", "mlp.Wi"),
    "fc2": ("fc2", r"\d+.output.dense", "lin2", "down_proj", "mlp.Wo"),
}
FUSED_QKV = ("qkv", "Wqkv")
# Modules that compute with a child's weight without calling the child: an adapter there would get no gradient.
BYPASSED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),  # in evaluation only
}


@dataclass
class Target:
    """One linear to adapt; of a fused qkv only the ``parts`` asked for (indices into q, k, v)."""

    name: str
    module: nn.Linear
    parts: set[int]
    fused: bool


def select(net: nn.Module, settings: TargetSettings, trainable: Sequence[str] = ()) -> list[Target]:
    """The linears of ``net`` that ``settings`` ask for, in the network's order.

    Args:
        trainable: dotted names of what is new or trains whole, where no pairs belong.

    Raises:
        UserError: a name that matches nothing, something that is no plain linear layer, a weight that is tied, read
            without a call or trained whole, a weight in half precision, or a rank above min(out, in).
    """
    if any(isinstance(module, Adapter) for module in net.modules()):
        raise UserError("the network has adapters already, adapt a new one")
    modules = {name: module for name, module in net.named_modules() if name}
    blocks = _inside_blocks(net, modules)
    if settings.target_modules == ALL_LINEAR:
        wanted = _all_linear({n: m for n, m in blocks.items() if not is_below(n, trainable)}, modules)
    else:
        wanted = _named(modules, blocks, settings)
    _require_matches(settings.exclude_modules, modules, "exclude_modules")
    _require_matches(settings.rank_pattern, modules, "rank_pattern")
    _require_matches(settings.alpha_pattern, modules, "alpha_pattern")
    chosen = [
        target
        for target in wanted
        if not any(name_matches(pattern, target.name) for pattern in settings.exclude_modules)
        and settings.takes_layer(block_and_kind(target.name)[0])
    ]
    if not chosen:
        raise UserError(
            f"target_modules={settings.target_modules!r} with exclude_modules={settings.exclude_modules!r} and "
            f"layers={settings.layers!r} leaves no linear layer to adapt, widen one of them"
        )
    tied = _tied_weights(net)
    for target in chosen:
        _require_adaptable(target, modules, tied, trainable)
        _require_rank(target, settings)
    return chosen


def select_whole(net: nn.Module, settings: TargetSettings, trainable: Sequence[str], why: str) -> list[Target]:
    """As `select`, but a part of a fused linear alone is refused, because of ``why``."""
    targets = select(net, settings, trainable)
    for target in targets:
        if target.fused and len(target.parts) < 3:
            raise UserError(
                f"target_modules names a part of {target.name}, but {why}: name {target.name.rpartition('.')[2]!r}"
            )
    return targets


def _all_linear(inside: dict[str, nn.Module], modules: dict[str, nn.Module]) -> list[Target]:
    """Every linear ``inside`` the repeated blocks: so never an embedding, a pooler or a head."""
    for name, module in inside.items():
        if type(module).__name__ == "Conv1D":
            raise UserError(
                f"{name} is a Conv1D of transformers, which cannot be adapted: name plain linears in target_modules"
            )
    targets = [
        Target(name, module, {0, 1, 2}, _is_fused(name, modules))
        for name, module in inside.items()
        if isinstance(module, nn.Linear)
    ]
    if not targets:
        raise UserError(
            "target_modules='all-linear' found no linear layer inside repeated blocks, name the layers to adapt "
            "in target_modules"
        )
    return targets


def linears_in_blocks(net: nn.Module, taken: Sequence[str]) -> dict[str, nn.Linear]:
    """The linears inside the repeated blocks of ``net``, by dotted name; not those in ``taken``, which train whole."""
    inside = _inside_blocks(net, {name: module for name, module in net.named_modules() if name})
    return {n: m for n, m in inside.items() if isinstance(m, nn.Linear) and not is_below(n, taken)}


def _inside_blocks(net: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    children = list(net.children())
    if _is_block_list(net) and len(children) > 1 and not isinstance(children[0], nn.ModuleList | nn.Sequential):
        return modules
    blocks = tuple(f"{name}." for name, module in modules.items() if _is_block_list(module))
    return {name: module for name, module in modules.items() if name.startswith(blocks)}


def repeated_blocks(net: nn.Module) -> list[str]:
    """The dotted names of the repeated blocks of ``net``, the innermost where they are nested."""
    modules = dict(net.named_modules())
    lists = [name for name, module in modules.items() if _is_block_list(module)]
    blocks = [f"{name}.{child}".lstrip(".") for name in lists for child, _ in modules[name].named_children()]
    return [block for block in blocks if not any(is_below(name, [block]) for name in lists)]


def _is_block_list(module: nn.Module) -> bool:
    """A list of layers of one composite class, as ``blocks`` of timm and ``encoder.layer`` of transformers are."""
    children = list(module.children())
    return (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and len({type(child) for child in children}) == 1
        and any(True for _ in children[0].children())
    )


def _named(modules: dict[str, nn.Module], blocks: dict[str, nn.Module], settings: TargetSettings) -> list[Target]:
    given = settings.target_modules
    chosen: dict[str, set[int]] = defaultdict(set)
    for pattern in [given] if isinstance(given, str) else given:
        found = _resolve(pattern, modules, blocks)
        if not found:
            leaves = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
            near = did_you_mean(pattern.rpartition(".")[2], leaves) or f"; it has {', '.join(sorted(leaves))}"
            raise UserError(f"target_modules names {pattern!r}, which matches no layer of the model{near}")
        for name, parts in found.items():
            if not isinstance(modules[name], nn.Linear):
                raise UserError(
                    f"target_modules names {pattern!r}, but {name} is a {type(modules[name]).__name__} and only "
                    "linear layers can be adapted"
                )
            chosen[name] |= parts
    # in the order of the network, whatever the order of the patterns
    return [
        Target(name, module, chosen[name], _is_fused(name, modules))  # type: ignore[arg-type]
        for name, module in modules.items()
        if name in chosen
    ]


def _resolve(pattern: str, modules: dict[str, nn.Module], blocks: dict[str, nn.Module]) -> dict[str, set[int]]:
    """The modules that ``pattern`` means, and for a fused qkv which of its parts."""
    found = {name: {0, 1, 2} for name in modules if name_matches(pattern, name)}
    family = next((role for role, names in ALIASES.items() if pattern == role or pattern in names), None)
    if found or family is None:
        return found
    found = {n: {0, 1, 2} for n in blocks if any(name_matches(alias, n) for alias in ALIASES[family])}
    if family in QKV:
        found |= {n: {QKV.index(family)} for n in blocks if _is_fused(n, modules)}
    return found


def _is_fused(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether this is a linear whose rows are those of query, then key, then value, as many of each.

    Some of timm's hold them head by head (MaxViT's ``head_first``; TinyViT, EfficientFormer), or only two of them (the
    global blocks of GCViT): there the layer is one matrix, and no part of it has a name. So it is with the
    ``query_key_value`` of GPT-NeoX and BLOOM.
    """
    parent, _, child = name.rpartition(".")
    owner, module = modules.get(parent), modules[name]
    if child not in FUSED_QKV or not isinstance(module, nn.Linear) or module.out_features % 3:
        return False
    by_head = getattr(owner, "head_first", False) or hasattr(owner, "key_dim")
    return not (by_head or getattr(owner, "use_global", False))


def _require_matches(patterns: Iterable[str], modules: dict[str, nn.Module], where: str) -> None:
    for pattern in patterns:
        if not any(name_matches(pattern, name) for name in modules):
            leaves = {name.rpartition(".")[2] for name in modules}
            raise UserError(
                f"{where} names {pattern!r}, which matches no layer of the model{did_you_mean(pattern, leaves)}"
            )


def _require_adaptable(
    target: Target, modules: dict[str, nn.Module], tied: dict[str, str], trainable: Sequence[str]
) -> None:
    parent, _, child = target.name.rpartition(".")
    owner = modules.get(parent)
    if _bypasses(owner, child):
        raise UserError(
            f"{target.name} cannot be adapted because its {type(owner).__name__} reads the weight without calling the "
            f"layer, add {child!r} to exclude_modules"
        )
    if type(target.module) is not nn.Linear:
        raise UserError(
            f"{target.name} is a {type(target.module).__name__}, not a plain nn.Linear, and cannot be adapted: "
            f"add {child!r} to exclude_modules"
        )
    if _has_hooks(target.module):
        raise UserError(
            f"{target.name} has hooks (weight_norm, prune or your own), which are not called once it is adapted: "
            f"remove them before, or add {child!r} to exclude_modules"
        )
    if is_below(target.name, trainable):
        raise UserError(
            f"{target.name} is to have pairs, but is new or trains whole, as part of a head or of trainable: add "
            f"{target.name!r} to exclude_modules"
        )
    if whole := [entry for entry in trainable if is_below(entry, [target.name])]:
        raise UserError(
            f"trainable names {whole[0]!r}, but {target.name} is to have pairs, beside which nothing in it trains: "
            f"leave the one out, or add {target.name!r} to exclude_modules"
        )
    if target.name in tied:
        raise UserError(
            f"the weight of {target.name} is tied to {tied[target.name]} and cannot be adapted alone, "
            f"add {child!r} to exclude_modules"
        )
    if target.module.weight.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise UserError(
            f"the weight of {target.name} is {target.module.weight.dtype}, whose range is too small to train with: "
            "load the model in float32 and let trainer.precision do the rest"
        )


def _has_hooks(module: nn.Module) -> bool:
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks") and "state_dict" not in name)


def _bypasses(owner: nn.Module | None, child: str) -> bool:
    if any(isinstance(owner, cls) and child in children for cls, children in BYPASSED.items()):
        return True
    # timm's BEiT, EVA and Swin v2 join their own q and v biases to a qkv without bias
    joins_bias = getattr(owner, "q_bias", None) is not None and not getattr(owner, "qkv_bias_separate", False)
    return child in FUSED_QKV and joins_bias


def _require_rank(target: Target, settings: TargetSettings) -> None:
    out = target.module.out_features // (3 if target.fused else 1)
    largest, rank = min(out, target.module.in_features), settings.rank_of(target.name)
    if settings.limits_rank and rank > largest:
        raise UserError(
            f"rank {rank} is above min(out, in) = {largest} of {target.name}, lower rank or give this layer its own "
            "in rank_pattern"
        )


def _tied_weights(net: nn.Module) -> dict[str, str]:
    """Modules that share their weight with another, each with the other's name."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in net.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name.rpartition(".")[0])
    return {name: other for names in owners.values() for name in names for other in names if other != name}


def kind_of(name: str, blocks: Iterable[str]) -> str:
    """The place of a layer or a matrix in its block, one of ``blocks``, which may lie in a stage of several blocks.

    ``stages.1.blocks.2.mlp.fc1`` is ``mlp.fc1`` of the block ``stages.1.blocks.2``.
    """
    block = next((block for block in blocks if is_below(name, [block])), None)
    return block_and_kind(name)[1] if block is None else name.removeprefix(f"{block}.")


def block_and_kind(name: str) -> tuple[int | None, str]:
    """The number of the block that a layer or a matrix lies in, the first number in its name, and the rest of it.

    ``blocks.3.attn.qkv[q]`` is ``attn.qkv[q]`` of block 3; without a number it is of no block.
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return (int(found[1]), name[found.end() :]) if found else (None, name)
