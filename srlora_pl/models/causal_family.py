"""Causal language models of transformers as a `family.ModelFamily`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from srlora_pl.data.protocols import Batch
from srlora_pl.data.texts.tokens import load_tokenizer
from srlora_pl.models import causal, pretrained
from srlora_pl.models.family import Backbone, about_of
from srlora_pl.models.heads import FoundHead
from srlora_pl.util.errors import UserError

_EXAMPLE = (2, 16)  # texts, tokens
_NOT_SERVED = "a causal language model has no program for a server here: use --format merged, or peft"


@dataclass(frozen=True)
class Causal(Backbone):
    """A causal language model, with all that it was pretrained with."""

    task_type: ClassVar[str | None] = "CAUSAL_LM"
    name: str
    kwargs: dict[str, Any] | None = None
    checkpoint: str | None = None
    weights: str = "float32"

    @property
    def base(self) -> tuple[str, str | None]:
        return pretrained.place_of(self.name, self.kwargs)

    @property
    def recipe(self) -> str:
        return self.recipe_of(f"AutoModelForCausalLM.from_pretrained({self.base[0]!r}, dtype=torch.{self.weights}")

    def build(self) -> tuple[nn.Module, FoundHead | None]:
        return causal.build(self.name, self.kwargs, self.checkpoint, self.weights), None

    def heads(self, net: nn.Module) -> tuple[str, ...]:
        return ()

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        return net(input_ids=batch["input_ids"], use_cache=False).logits

    def example_inputs(self, net: Any) -> list[Batch]:
        known = net.get_input_embeddings().num_embeddings
        ids = torch.randint(0, known, _EXAMPLE, generator=torch.Generator().manual_seed(0))
        return [{"input_ids": row} for row in ids.split(1)]

    def save(self, net: Any, folder: Path, class_names: Sequence[str], card: dict[str, Any]) -> list[str]:
        with pretrained.quiet():
            causal.cast(net, self.weights).save_pretrained(folder)  # with its generation_config.json
        try:
            tokenizer = load_tokenizer(self.base[0], pretrained.hub_options(self.kwargs))
        except UserError as error:
            return [f"without a tokenizer: {error}"]
        tokenizer.save_pretrained(folder)  # with its chat template
        return []

    def load(self, folder: Path) -> nn.Module:
        with pretrained.quiet():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, about_of(folder)["dtype"]))

    def served(self, net: nn.Module) -> nn.Module:
        raise UserError(_NOT_SERVED)

    def served_inputs(self, net: nn.Module, samples: int, length: int, seed: int) -> dict[str, Tensor]:
        raise UserError(_NOT_SERVED)

    def hub_name(self, net: nn.Module) -> str | None:
        return None if Path(self.base[0]).is_dir() else self.base[0]
