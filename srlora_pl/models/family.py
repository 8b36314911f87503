"""How timm and transformers, each in its own layout, build, run, save and load their networks."""

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from srlora_pl.data.protocols import Batch
from srlora_pl.data.texts.tokens import load_tokenizer
from srlora_pl.models import encoders, timm_models
from srlora_pl.models.heads import FoundHead
from srlora_pl.util.errors import UserError


class ModelFamily(Protocol):
    """One network of one library: tasks build and run it, the export saves and loads it."""

    task_type: ClassVar[str | None]  # PEFT's name of the task

    @property
    def random(self) -> bool:
        """Whether its weights are random, so that they cannot be loaded again."""

    @property
    def base(self) -> tuple[str, str | None]:
        """The folder or hub name of the pretrained network, as PEFT's settings give it, and its revision."""

    @property
    def recipe(self) -> str:
        """The call that loads the pretrained network with the library alone."""

    def build(self) -> tuple[nn.Module, FoundHead | None]:
        """The network in float32, in training mode, and its head if that is not new."""

    def heads(self, net: nn.Module) -> tuple[str, ...]:
        """Dotted names of the modules that the pretrained weights do not bring along."""

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The outputs of ``net`` for a batch of the task's."""

    def example_inputs(self, net: nn.Module) -> list[Batch]:
        """A few random inputs of the right shape for ``net``, the same in every call, float32 or int64 on the CPU."""

    def save(self, net: nn.Module, folder: Path, class_names: Sequence[str], card: dict[str, Any]) -> list[str]:
        """Write ``net`` in the library's layout, with ``card`` in its configuration; returns notes for the user."""

    def load(self, folder: Path) -> nn.Module:
        """Load what `save` wrote, with nothing but the library."""

    def served(self, net: nn.Module) -> nn.Module:
        """``net`` as a server calls it: tensors of the `served_inputs` by name to logits (B, classes)."""

    def served_inputs(self, net: nn.Module, samples: int, length: int, seed: int) -> dict[str, Tensor]:
        """Random inputs by name, whose first axis and, of texts, second one may have any size."""

    def hub_name(self, net: nn.Module) -> str | None:
        """The repository of the pretrained network on the hub, ``owner/name``; None where it has none."""


@torch.no_grad()
def example_outputs(family: ModelFamily, net: nn.Module, like: nn.Module) -> Tensor:
    """The outputs of ``net`` in evaluation mode for the example inputs of ``like``, float64 on the CPU."""
    weight = next(net.parameters())

    def there(batch: Batch) -> Batch:
        return {name: x.to(weight) if x.is_floating_point() else x.to(weight.device) for name, x in batch.items()}

    with in_evaluation(net):
        return torch.cat([family.logits(net, there(batch)) for batch in family.example_inputs(like)]).cpu().double()


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Puts ``module`` into evaluation mode; afterwards modes and buffers (a count of calls, say) are as before."""
    modes = [(each, each.training) for each in module.modules()]
    buffers = [
        (each, name, buffer, buffer.clone())
        for each in module.modules()
        for name, buffer in each.named_buffers(recurse=False)
    ]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
        for each, name, buffer, value in buffers:
            setattr(each, name, buffer.copy_(value))


@dataclass(frozen=True)
class _Classifier:
    """A classification network by the arguments of a task.

    Attributes:
        name: ``model.backbone``.
        num_classes: outputs of the head.
        kwargs: ``model.backbone_kwargs``.
        checkpoint: ``model.backbone_checkpoint``.
    """

    name: str
    num_classes: int
    kwargs: dict[str, Any] | None = None
    checkpoint: str | None = None

    @property
    def random(self) -> bool:
        return not (self.checkpoint or (self.kwargs or {}).get("pretrained", True))

    def _recipe(self, call: str) -> str:
        options = {key: value for key, value in (self.kwargs or {}).items() if key != "pretrained"}
        arguments = "".join(f", {key}={value!r}" for key, value in options.items())
        return f"{call}{arguments})" + (f" with the weights of {self.checkpoint}" if self.checkpoint else "")


class Timm(_Classifier):
    """An image network of timm."""

    task_type: ClassVar[str | None] = None

    @property
    def base(self) -> tuple[str, str | None]:
        source = timm_models.timm_name(self.name)
        if not source.startswith("hf-hub:"):
            return source.removeprefix("local-dir:"), None
        name, _, revision = source.removeprefix("hf-hub:").partition("@")
        return name, revision or None

    @property
    def recipe(self) -> str:
        source = timm_models.timm_name(self.name)
        return self._recipe(
            f"timm.create_model({source!r}, pretrained={self.checkpoint is None}, num_classes={self.num_classes}"
        )

    def build(self) -> tuple[nn.Module, FoundHead | None]:
        return timm_models.find_head(self.name, self.num_classes, self.kwargs, self.checkpoint)

    def heads(self, net: nn.Module) -> tuple[str, ...]:
        return timm_models.head_names(net)

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        return net(batch["image"])

    def example_inputs(self, net: nn.Module) -> list[Batch]:
        size = timm_models.data_config(net, self.kwargs)["input_size"]
        return [{"image": torch.randn(2, *size, generator=torch.Generator().manual_seed(0))}]

    def save(self, net: nn.Module, folder: Path, class_names: Sequence[str], card: dict[str, Any]) -> list[str]:
        labels = {"label_names": list(class_names)} if class_names else {}
        try:
            timm.models.save_for_hf(net, str(folder), labels, safe_serialization=True, **card)
        except ValueError as error:
            raise UserError(f"timm cannot describe this model in a config.json ({error})") from error
        about = _about(folder)
        # transformers gives these to timm beside the number of classes, which must not be there twice.
        about["model_args"].pop("num_classes", None)
        _write_about(folder, about)
        return []

    def load(self, folder: Path) -> nn.Module:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)

    def served(self, net: nn.Module) -> nn.Module:
        return _ServedImages(net)

    def served_inputs(self, net: nn.Module, samples: int, length: int, seed: int) -> dict[str, Tensor]:
        size = timm_models.data_config(net, self.kwargs)["input_size"]
        return {"pixel_values": torch.randn(samples, *size, generator=torch.Generator().manual_seed(seed))}

    def hub_name(self, net: Any) -> str | None:
        return None if Path(self.base[0]).is_dir() else net.pretrained_cfg.get("hf_hub_id") or None


class Transformers(_Classifier):
    """A text encoder of transformers."""

    task_type: ClassVar[str | None] = "SEQ_CLS"

    @property
    def base(self) -> tuple[str, str | None]:
        source = encoders.resolve(self.name)
        source = str(Path(source).resolve()) if Path(source).is_dir() else source
        return source, encoders.hub_options(self.kwargs).get("revision")

    @property
    def recipe(self) -> str:
        # Where the base has a head of its own it is of another size, and transformers 5 keeps the precision of a file.
        return self._recipe(
            f"AutoModelForSequenceClassification.from_pretrained({self.base[0]!r}, num_labels={self.num_classes}, "
            "ignore_mismatched_sizes=True, dtype=torch.float32"
        )

    def build(self) -> tuple[nn.Module, FoundHead | None]:
        return encoders.find_head(self.name, self.num_classes, self.kwargs, self.checkpoint)

    def heads(self, net: Any) -> tuple[str, ...]:
        return encoders.head_names(net)

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        # Never labels=: the network's own loss breaks the graph and waits for the device in every step.
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
        return net(**inputs).logits

    def example_inputs(self, net: Any) -> list[Batch]:
        # One by one, as a decoder may not know its padding.
        ids = self._random_texts(net, 2, 16, seed=0)
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.split(1)]

    def _random_texts(self, net: Any, samples: int, length: int, seed: int) -> Tensor:
        """Tokens (samples, length)."""
        known = encoders.vocab_size(net) or int(getattr(net.config, "vocab_size", 100))
        end = getattr(net.config, "eos_token_id", None)
        # Up from 5, because the first tokens are often special ones, such as padding.
        ids = torch.randint(5, known, (samples, length), generator=torch.Generator().manual_seed(seed))
        end = end[0] if isinstance(end, list) else end
        if end is not None and end < known:  # BART and T5 read there, and want one in each text
            ids = torch.where(ids == end, 5 + (end == 5), ids)
            ids[:, -1] = end
        return ids

    def save(self, net: Any, folder: Path, class_names: Sequence[str], card: dict[str, Any]) -> list[str]:
        net.config.update(card)
        if class_names:
            net.config.id2label = dict(enumerate(class_names))
            net.config.label2id = {name: i for i, name in enumerate(class_names)}
        with encoders.quiet():
            net.save_pretrained(folder)
        # transformers leaves its usual names of 2 classes out, and of a family whose default is 3, as BART, reads 3.
        _write_about(folder, {"id2label": net.config.id2label, "label2id": net.config.label2id} | _about(folder))
        try:
            tokenizer = load_tokenizer(self.base[0], encoders.hub_options(self.kwargs))
        except UserError as error:
            return [f"without a tokenizer: {error}"]
        tokenizer.chat_template = None  # its parts would be written under names that a file gives
        tokenizer.save_pretrained(folder)
        return []

    def load(self, folder: Path) -> nn.Module:
        with encoders.quiet():
            return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    def served(self, net: nn.Module) -> nn.Module:
        return _ServedTexts(net)

    def served_inputs(self, net: Any, samples: int, length: int, seed: int) -> dict[str, Tensor]:
        ids = self._random_texts(net, samples, min(length, encoders.max_tokens(net) or length), seed)
        mask = torch.ones_like(ids)
        mask[1:, ids.shape[1] // 2 :] = 0  # all but the first are padded
        inputs = {"input_ids": ids, "attention_mask": mask}
        try:  # what the tokenizer makes can be handed on as it is
            made = load_tokenizer(self.base[0], encoders.hub_options(self.kwargs)).model_input_names
        except UserError:
            made = ["token_type_ids"] if encoders.token_types(net) else []
        takes = inspect.signature(net.forward).parameters
        if "token_type_ids" in made and "token_type_ids" in takes:
            inputs["token_type_ids"] = torch.zeros_like(ids)
        return inputs

    def hub_name(self, net: nn.Module) -> str | None:
        return None if Path(self.base[0]).is_dir() else self.base[0]


class _ServedImages(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values)


class _ServedTexts(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.net(input_ids=input_ids, attention_mask=attention_mask, **types).logits


def _about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(about, indent=2), "utf-8")
