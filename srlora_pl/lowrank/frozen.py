"""The frozen weights of a network under adaptation: where they come from, and all that became of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from srlora_pl.lowrank import checks
from srlora_pl.lowrank.ledger import Ledger, Update
from srlora_pl.lowrank.linear import Adapter, Matrix
from srlora_pl.lowrank.nf4 import plain
from srlora_pl.lowrank.shards import is_split, whole
from srlora_pl.lowrank.target_settings import is_below
from srlora_pl.util.cache import fingerprint
from srlora_pl.util.errors import UserError
from srlora_pl.util.precision import full_precision

Reload = Callable[[], Mapping[str, Tensor]]


def freeze(
    net: nn.Module,
    layers: Mapping[str, Adapter],
    still: Sequence[str],
    trains_too: Callable[[str, nn.Parameter], bool],
    trainable: Sequence[str],
    new: Sequence[str],
) -> list[str]:
    """Freeze all of ``net`` but its adapters, ``trainable``, and the parameters that the method trains too.

    Args:
        layers: the adapters.
        still: names of adapter parameters that do not train either; nor do those that were made so.
        trains_too: of a parameter's dotted name and the parameter; see `Method.trains`.
        trainable: dotted names that train whole.
        new: dotted names that the pretrained state dict does not hold.

    Returns:
        The names of the frozen parameters that it holds.
    """
    ours = {
        id(parameter): parameter.requires_grad and name not in still
        for layer in layers.values()
        for name, parameter in zip(layer.adapter_names, layer.adapter_parameters(), strict=True)
    }
    frozen = []
    for name, parameter in net.named_parameters():
        trains = ours[id(parameter)] if id(parameter) in ours else trains_too(name, parameter)
        parameter.requires_grad_(trains or is_below(name, trainable))
        if not parameter.requires_grad and id(parameter) not in ours and not is_below(name, new):
            frozen.append(name)
    return frozen


class FrozenWeights:
    """The parameters of a network that are frozen and that its pretrained state dict holds.

    Args:
        net: with its adapters in place.
        names: of these parameters.
        matrices: the adapted ones among them, whose weights may change through `add`.
        reload: reloads the pretrained state dict of ``net``, if anything can.

    Attributes:
        fingerprint: a digest of the weights as pretrained; known from a start or from a loaded state on.
        changed: names of those that somebody else has trained.
        ledgers: the updates of each adapted matrix.
        device: of the run, where weights are changed and replayed; None: where each weight is.
    """

    def __init__(self, net: nn.Module, names: Iterable[str], matrices: Sequence[Matrix], reload: Reload | None) -> None:
        self.net, self.names, self.matrices, self.reload = net, list(names), matrices, reload
        self.fingerprint: str | None = None
        self.changed: set[str] = set()
        self.layers = {matrix.layer_name: matrix.layer for matrix in matrices}
        self.ledgers = {matrix: Ledger(matrix.shape) for matrix in matrices}
        self.device: torch.device | None = None
        # Torch's counts of writes.
        self._versions = {name: parameter._version for name, parameter in self._parameters().items()}
        # W0 by layer, on the CPU, and its digest: from a start until training, for a load in between; from a load until
        # a start.
        self._kept: tuple[dict[str, Tensor], str] | None = None

    def _parameters(self) -> dict[str, Tensor]:
        parameters = dict(self.net.named_parameters())
        return {name: parameters[name] for name in self.names}

    @property
    def _have_moved(self) -> bool:
        """Whether a weight is no longer W0, merged adapters aside."""
        return any(ledger.rank for ledger in self.ledgers.values())

    @property
    def are_split(self) -> bool:
        """Whether each process has a part of them only."""
        return any(map(is_split, self._parameters().values()))

    # --- identity

    def identify(self) -> None:
        """Take the weights as they are now for the pretrained ones."""
        if any(p._version != self._versions[name] for name, p in self._parameters().items()):
            self.reload = None  # other weights were loaded after the adapters were put in
        self.fingerprint = fingerprint(self._parameters())

    def require(self, expected: str | None) -> None:
        """Refuse a state that was made from other weights."""
        if self.fingerprint != expected:
            raise UserError(
                "the checkpoint was made from other pretrained weights than this model's, use the backbone and "
                "backbone_checkpoint that it was made with"
            )

    def unchanged(self, trained: Iterable[Tensor] = ()) -> dict[str, Tensor]:
        """What nobody trains or has trained of the state dict, by name; a compact state makes up for it.

        Args:
            trained: all that the optimizer trains.
        """
        trained_ids = {id(parameter) for parameter in trained}
        ours = self._parameters()
        self.changed |= {name for name, p in ours.items() if p.requires_grad or id(p) in trained_ids}
        ours |= {f"{name}.rest": layer.rest for name, layer in self.layers.items() if layer.rest is not None}
        return {name: value for name, value in ours.items() if name not in self.changed}

    # --- change

    def add(self, matrix: Matrix, B: Tensor, A: Tensor, alpha: float) -> None:
        """W += alpha B A, with B (out, k) and A (k, in), and enter it into the ledger."""
        checks.require_unmerged([matrix.layer], before="a change of its weight")
        update = Update(B, A, alpha)
        matrix.frozen.add_(update, self.device)  # rounded as a compact state will be replayed there
        self.ledgers[matrix].enter(update, may_forget=self.reload is not None)

    # --- W0

    def keep_pretrained(self) -> None:
        """Keep W0, which the weights are now."""
        if self.are_split:  # a load in between reads them from their file again
            return
        kept = {name: layer.weight.detach().to("cpu", copy=True) for name, layer in self.layers.items()}
        self._kept = kept, self.fingerprint or fingerprint(self._parameters())

    def forget_pretrained(self) -> None:
        self._kept = None

    def require_pretrained(self) -> None:
        """Refuse where W0 is not at hand, neither in place nor kept."""
        if self._kept is not None:
            self.require(self._kept[1])
        elif self._have_moved:
            raise UserError(
                "the model has already started and its pretrained weights are gone, so their singular directions "
                "cannot be computed: call start() before loading weights, or let the trainer load with ckpt_path"
            )

    def pretrained_weight(self, matrix: Matrix) -> Tensor:
        """W0 (out, in), on the run's device; where it is in place or kept."""
        weight = matrix.layer.weight.detach() if self._kept is None else self._kept[0][matrix.layer_name]
        return matrix.of_weight(plain(weight, matrix.dtype)).to(self.device or matrix.device)

    @full_precision()
    def pretrained(self) -> dict[str, Tensor]:
        """W0 of every adapted layer, new tensors; equal to rounding where only W and the ledgers are left."""
        if any(layer.disabled for layer in self.layers.values()):  # W0 is in place
            return {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        if self.are_split:
            weights = {name: whole(layer.unmerged_weight).cpu() for name, layer in self.layers.items()}
        else:
            weights = {name: layer.unmerged_weight.clone() for name, layer in self.layers.items()}
        if not self._have_moved:
            return weights
        if self._kept is not None and self._kept[1] == self.fingerprint:
            source: Mapping[str, Tensor] = self._kept[0]
        elif self.reload is not None:
            state = self.reload()
            self.require(fingerprint({name: state[name] for name in self.names}))
            source = {name: state[f"{name}.weight"] for name in self.layers}
        else:
            source = {name: layer.frozen.dense().clone() for name, layer in self.layers.items()}
            for matrix, ledger in self.ledgers.items():
                ledger.undo(matrix.of_weight(source[matrix.layer_name]))
        return {name: source[name].to(weight, copy=True) for name, weight in weights.items()}

    @contextmanager
    def replaced_by_pretrained(self) -> Iterator[None]:
        """Inside, W0 stands in place of W."""
        weights = {name: layer.weight for name, layer in self.layers.items()}
        pretrained = self.pretrained()
        try:
            for name, layer in self.layers.items():
                layer.put(pretrained[name])
            yield
        finally:
            for name, layer in self.layers.items():
                layer.put(weights[name])

    # --- state

    def state_dict(self, compact: bool) -> dict[str, Any]:
        """Identity and ledgers; with ``compact`` also the weights of matrices whose ledgers are larger or forgotten."""
        matrices = {}
        for matrix, ledger in self.ledgers.items():
            dense = ledger.updates is None or (compact and ledger.is_larger_than_weight)
            place = "cpu" if self.are_split else matrix.device  # gathered weights do not fit onto the device together
            weight = matrix.weight.to(place, copy=True) if dense and compact else None
            matrices[matrix.name] = {**ledger.state_dict(with_updates=not dense), "weight": weight}
        return {"base_fingerprint": self.fingerprint, "changed": sorted(self.changed), "matrices": matrices}

    def _require_same(self, state: dict[str, Any]) -> None:
        """Refuse a ``state`` of other layers or of other pretrained weights."""
        if list(state["matrices"]) != [matrix.name for matrix in self.matrices]:
            raise UserError("the checkpoint adapts other layers than this model has, use the backbone it was made with")
        # Weights that have no identity yet come from the file; only a later start needs W0, and checks it then.
        if self.fingerprint is not None:
            self.require(state["base_fingerprint"])

    def load_state_dict(self, state: dict[str, Any], compact: bool) -> None:
        """Go on from ``state``; with ``compact`` set every adapted weight, from W0.

        Raises:
            UserError: it is a state of other layers or of other pretrained weights.
        """
        moved = self._have_moved
        if compact and self.fingerprint is None:
            self.fingerprint = fingerprint(self._parameters())
        self._require_same(state)
        if not moved and any(saved["rank"] for saved in state["matrices"].values()):
            self.keep_pretrained()
        source = self.pretrained() if compact and moved else {}
        for matrix, ledger in self.ledgers.items():
            saved = state["matrices"][matrix.name]
            ledger.load_state_dict(saved)
            if compact and (moved or ledger.rank):
                W0 = source.get(matrix.layer_name)
                W0 = matrix.of_weight(whole(matrix.layer.weight.detach()) if W0 is None else W0)
                with full_precision():
                    W = saved["weight"] if ledger.updates is None else ledger.replay(W0, self.device or W0.device)
                    matrix.frozen.copy_(W)
        self.fingerprint, self.changed = state["base_fingerprint"], set(state["changed"])
