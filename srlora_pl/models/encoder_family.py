"""Text encoders of transformers as a `family.ModelFamily`."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from srlora_pl.data.protocols import Batch
from srlora_pl.data.texts.tokens import load_tokenizer
from srlora_pl.models import encoders, pretrained
from srlora_pl.models.family import Classifier, about_of, write_about
from srlora_pl.models.heads import FoundHead
from srlora_pl.models.weights import store
from srlora_pl.util.errors import UserError


class Transformers(Classifier):
    """A text encoder of transformers."""

    task_type: ClassVar[str | None] = "SEQ_CLS"

    @property
    def base(self) -> tuple[str, str | None]:
        return pretrained.place_of(self.name, self.kwargs)

    @property
    def recipe(self) -> str:
        # Where the base has a head of its own it is of another size, and transformers 5 keeps the precision of a file.
        return self.recipe_of(
            f"AutoModelForSequenceClassification.from_pretrained({self.base[0]!r}, num_labels={self.num_classes}, "
            "ignore_mismatched_sizes=True, dtype=torch.float32"
        )

    def build(self) -> tuple[nn.Module, FoundHead | None]:
        net, head = encoders.find_head(self.name, self.num_classes, self.kwargs, self.checkpoint)
        return store(net, self.weights, self.heads(net)), head

    def heads(self, net: Any) -> tuple[str, ...]:
        return encoders.head_names(net)

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        # Never labels=: the network's own loss breaks the graph and waits for the device in every step.
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
        return net(**inputs).logits

    def example_inputs(self, net: Any) -> list[Batch]:
        # One by one, as a decoder may not know its padding.
        ids = _random_texts(net, 2, 16, seed=0)
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.split(1)]

    def save(self, net: Any, folder: Path, class_names: Sequence[str], card: dict[str, Any]) -> list[str]:
        net.config.update(card)
        if class_names:
            net.config.id2label = dict(enumerate(class_names))
            net.config.label2id = {name: i for i, name in enumerate(class_names)}
        with pretrained.quiet():
            net.save_pretrained(folder)
        # transformers leaves its usual names of 2 classes out, and of a family whose default is 3, as BART, reads 3.
        write_about(folder, {"id2label": net.config.id2label, "label2id": net.config.label2id} | about_of(folder))
        try:
            tokenizer = load_tokenizer(self.base[0], pretrained.hub_options(self.kwargs))
        except UserError as error:
            return [f"without a tokenizer: {error}"]
        tokenizer.chat_template = None  # its parts would be written under names that a file gives
        tokenizer.save_pretrained(folder)
        return []

    def load(self, folder: Path) -> nn.Module:
        with pretrained.quiet():
            return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    def served(self, net: nn.Module) -> nn.Module:
        return _Served(net)

    def served_inputs(self, net: Any, samples: int, length: int, seed: int) -> dict[str, Tensor]:
        ids = _random_texts(net, samples, min(length, encoders.max_tokens(net) or length), seed)
        mask = torch.ones_like(ids)
        mask[1:, ids.shape[1] // 2 :] = 0  # all but the first are padded
        inputs = {"input_ids": ids, "attention_mask": mask}
        try:  # what the tokenizer makes can be handed on as it is
            made = load_tokenizer(self.base[0], pretrained.hub_options(self.kwargs)).model_input_names
        except UserError:
            made = ["token_type_ids"] if encoders.token_types(net) else []
        if "token_type_ids" in made and "token_type_ids" in inspect.signature(net.forward).parameters:
            inputs["token_type_ids"] = torch.zeros_like(ids)
        return inputs

    def hub_name(self, net: nn.Module) -> str | None:
        return None if Path(self.base[0]).is_dir() else self.base[0]


class _Served(nn.Module):
    """With tensors by name only, and no others in its output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.net(input_ids=input_ids, attention_mask=attention_mask, **types).logits


def _random_texts(net: Any, samples: int, length: int, seed: int) -> Tensor:
    """Tokens (samples, length), int64."""
    known = pretrained.vocab_size(net) or int(getattr(net.config, "vocab_size", 100))
    end = getattr(net.config, "eos_token_id", None)
    # Up from 5, because the first tokens are often special ones, such as padding.
    ids = torch.randint(5, known, (samples, length), generator=torch.Generator().manual_seed(seed))
    end = end[0] if isinstance(end, list) else end
    if end is not None and end < known:  # BART and T5 read there, and want one in each text
        ids = torch.where(ids == end, 5 + (end == 5), ids)
        ids[:, -1] = end
    return ids
