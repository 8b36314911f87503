"""A network under adaptation as others see it: merged, without its adapters, counted, in groups for an optimizer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from srlora_pl.lowrank.checks import require_something_to_train, require_unmerged
from srlora_pl.lowrank.delta import merged_copy
from srlora_pl.lowrank.frozen import FrozenWeights
from srlora_pl.lowrank.groups import output_factors, param_groups
from srlora_pl.lowrank.linear import AdaptedLinear, Adapter
from srlora_pl.lowrank.method import Method
from srlora_pl.lowrank.nf4 import plain
from srlora_pl.lowrank.target_settings import is_below
from srlora_pl.util.errors import UserError


class Inference:
    """The part of `Adaptation` that changes nothing for good."""

    net: nn.Module
    method: Method
    trainable: list[str]
    layers: dict[str, Adapter]
    weights: FrozenWeights

    def merge(self) -> None:
        """Add all updates to the weights, for inference."""
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Undo `merge`, to the bit."""
        for layer in self.layers.values():
            layer.unmerge()

    def merged_copy(self) -> nn.Module:
        """A copy of the network with plain linears, see `srlora_pl.lowrank.delta.merged_copy`."""
        return merged_copy(self.net, self.layers)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the net computes with the pretrained weights W0 (equal to rounding) and without adapters.

        Parts that train beside the adapters, such as a head, stay as trained, and so do statistics that a forward pass
        updates (BatchNorm).

        Raises:
            UserError: the method trains the network's own parameters; or they are split over several processes.
        """
        if self.method.trains_weights:
            name = type(self.method).__name__
            raise UserError(f"{name} trains the network itself, so disabled() has nothing to leave out: build it anew")
        if any(layer.disabled for layer in self.layers.values()):
            yield
            return
        if self.weights.are_split:
            raise UserError("disabled() needs weights that are whole in one process: load the checkpoint there")
        with self.weights.replaced_by_pretrained():
            for layer in self.layers.values():
                layer.disabled = True
            try:
                yield
            finally:
                for layer in self.layers.values():
                    layer.disabled = False

    @contextmanager
    def at_rank(self, rank: int) -> Iterator[None]:
        """Inside, the first ``rank`` pairs of each matrix act outside training, for methods that are `nested`.

        Raises:
            UserError: the method is not; or it has no such rank; or the adapters are merged.
        """
        if not self.method.nested:
            raise UserError(f"the pairs of {type(self.method).__name__} act together, so it has no other rank")
        if not 1 <= rank <= self.method.rank:
            raise UserError(f"rank {rank} does not lie between 1 and method.rank {self.method.rank}, change it")
        layers = [layer for layer in self.layers.values() if isinstance(layer, AdaptedLinear)]
        require_unmerged(layers, before="another rank")
        before = [layer.evaluation_rank for layer in layers]
        try:
            for layer in layers:
                layer.evaluation_rank = rank
            yield
        finally:
            for layer, earlier in zip(layers, before, strict=True):
                layer.evaluation_rank = earlier

    def pretrained_weights(self) -> dict[str, Tensor]:
        """W0 of every adapted linear; equal to rounding where only W and the ledgers are left to tell it."""
        return {name: plain(weight) for name, weight in self.weights.pretrained().items()}

    def param_groups(
        self,
        lr: float,
        weight_decay: float = 0.0,
        head_lr: float | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> list[dict[str, Any]]:
        """What an optimizer trains, in groups: ``torch.optim.AdamW(adaptation.param_groups(lr=1e-3))``.

        Args:
            lr: learning rate; that of the factors B of low-rank updates is ``method.lr_ratio`` times as high.
            weight_decay: of matrices; vectors are not decayed.
            head_lr: learning rate of the parameters in ``trainable``, by default ``lr``.
            parameters: by default the network's.

        Raises:
            UserError: none of them trains.
        """
        parameters = list(self.net.parameters() if parameters is None else parameters)
        require_something_to_train(self.method, parameters)
        head = {id(p) for name, p in self.net.named_parameters() if is_below(name, self.trainable)}
        fast = {id(p) for p in output_factors(self.layers)}

        def rate_of(parameter: nn.Parameter) -> float:
            if head_lr is not None and id(parameter) in head:
                return head_lr
            return lr * self.method.lr_ratio if id(parameter) in fast else lr

        return param_groups(parameters, rate_of, weight_decay)

    def print_trainable_parameters(self) -> None:
        """Print how many of the network's parameters train."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.net.parameters()]
        trained, everything = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
        print(f"{trained:,} of {everything:,} parameters train ({trained / everything:.2%})")
