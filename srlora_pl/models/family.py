"""How timm and transformers, each in its own layout, build, write and read the networks that are exported."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from srlora_pl.data.texts.tokens import load_tokenizer
from srlora_pl.models import encoders, timm_models
from srlora_pl.tasks.base import Task
from srlora_pl.tasks.guards import in_evaluation
from srlora_pl.tasks.image import ImageClassifier
from srlora_pl.tasks.text import TextClassifier
from srlora_pl.util.errors import UserError


class Library:
    """How one library builds, writes and reads the networks of ``task``, and runs them on a batch for comparison."""

    task_type: str | None = None  # in PEFT's terms
    heads: tuple[str, ...]  # modules that the pretrained weights do not bring along
    base_name: str  # what the pretrained network is loaded from
    revision: str | None = None  # of what
    recipe: str  # how, in words

    def __init__(self, task: Any) -> None:
        self.task = task
        hparams = task.hparams
        self.arguments = (
            hparams["backbone"],
            task.num_classes,
            hparams["backbone_kwargs"],
            hparams["backbone_checkpoint"],
        )
        self.options = {**(hparams["backbone_kwargs"] or {})}
        self.random = not self.options.pop("pretrained", True) and not hparams["backbone_checkpoint"]

    @torch.no_grad()
    def outputs(self, net: nn.Module) -> Tensor:
        """Logits of a few seeded random inputs, float64 on the CPU."""
        with in_evaluation(net):
            return self.run(net, torch.Generator().manual_seed(0)).cpu().double()

    def run(self, net: nn.Module, generator: torch.Generator) -> Tensor:
        """Logits of random inputs of the right shape."""
        raise NotImplementedError

    def base(self) -> nn.Module:
        """The pretrained network with a new head."""
        if self.random:
            raise UserError(
                "the run started from random weights (model.backbone_kwargs.pretrained is false), so there is no "
                "pretrained model that a PEFT folder could be put on: use --format merged"
            )
        return self.build().float().eval()

    def build(self) -> nn.Module:
        raise NotImplementedError

    def write(self, net: nn.Module, folder: Path, class_names: list[str]) -> list[str]:
        """Write ``net`` to ``folder`` in the library's own layout; what is worth saying about it."""
        raise NotImplementedError

    def read(self, folder: Path) -> nn.Module:
        """Load what `write` wrote, with nothing but the library."""
        raise NotImplementedError

    def _with_options(self, call: str) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        file = self.arguments[-1]
        return f"{call}{options})" + (f" with the weights of {file}" if file else "")


class Timm(Library):
    def __init__(self, task: ImageClassifier) -> None:
        super().__init__(task)
        self.heads = timm_models.head_names(task.net)
        source = timm_models.timm_name(self.arguments[0])
        self.base_name = source.removeprefix("local-dir:")
        if source.startswith("hf-hub:"):
            self.base_name, _, revision = source.removeprefix("hf-hub:").partition("@")
            self.revision = revision or None
        self.recipe = self._with_options(
            f"timm.create_model({source!r}, pretrained={self.arguments[-1] is None}, num_classes={task.num_classes}"
        )

    def run(self, net: nn.Module, generator: torch.Generator) -> Tensor:
        like = next(net.parameters())
        return net(torch.randn(2, *self.task.data_config["input_size"], generator=generator).to(like))

    def build(self) -> nn.Module:
        return timm_models.build_backbone(*self.arguments)

    def write(self, net: nn.Module, folder: Path, class_names: list[str]) -> list[str]:
        labels = {"label_names": class_names} if class_names else {}
        try:
            timm.models.save_for_hf(
                net, str(folder), labels, safe_serialization=True, data_config=self.task.data_config
            )
        except ValueError as error:
            raise UserError(f"timm cannot describe this model in a config.json ({error})") from error
        about = _about(folder)
        # transformers gives these to timm beside the number of classes, which must not be there twice.
        about["model_args"].pop("num_classes", None)
        _write_about(folder, about)
        return []

    def read(self, folder: Path) -> nn.Module:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)


class Transformers(Library):
    task_type = "SEQ_CLS"

    def __init__(self, task: TextClassifier) -> None:
        super().__init__(task)
        self.heads = encoders.head_names(self.task.net)
        place = Path(task.backbone_name)
        self.base_name = str(place.resolve()) if place.is_dir() else task.backbone_name
        self.revision = task.tokenizer_options.get("revision")
        # Where the base has a head of its own it is of another size, and transformers 5 keeps the precision of a file.
        self.recipe = self._with_options(
            f"AutoModelForSequenceClassification.from_pretrained({self.base_name!r}, num_labels={task.num_classes}, "
            "ignore_mismatched_sizes=True, dtype=torch.float32"
        )

    def run(self, net: Any, generator: torch.Generator) -> Tensor:
        known = self.task.vocab_size or getattr(net.config, "vocab_size", 100)
        end = getattr(net.config, "eos_token_id", None)
        # Up from 5, because the first tokens are often special ones, such as padding.
        ids = torch.randint(5, known, (2, 16), generator=generator)
        end = end[0] if isinstance(end, list) else end
        if end is not None and end < known:  # BART and T5 read there, and want one in each text
            ids = torch.where(ids == end, 5 + (end == 5), ids)
            ids[:, -1] = end
        ids = ids.to(next(net.parameters()).device)
        # One by one, as a decoder may not know its padding.
        return torch.cat([net(input_ids=row, attention_mask=torch.ones_like(row)).logits for row in ids.split(1)])

    def build(self) -> nn.Module:
        return encoders.build_encoder(*self.arguments)

    def write(self, net: Any, folder: Path, class_names: list[str]) -> list[str]:
        problem = {"single_label": "single_label_classification", "multi_label": "multi_label_classification"}
        net.config.problem_type = problem.get(self.task.problem, "regression")
        if class_names:
            net.config.id2label = dict(enumerate(class_names))
            net.config.label2id = {name: i for i, name in enumerate(class_names)}
        with encoders.quiet():
            net.save_pretrained(folder)
        # transformers leaves its usual names of 2 classes out, and of a family whose default is 3, as BART, reads 3.
        _write_about(folder, {"id2label": net.config.id2label, "label2id": net.config.label2id} | _about(folder))
        try:
            tokenizer = load_tokenizer(self.base_name, self.task.tokenizer_options)
        except UserError as error:
            return [f"without a tokenizer: {error}"]
        tokenizer.chat_template = None  # its parts would be written under names that a file gives
        tokenizer.save_pretrained(folder)
        return []

    def read(self, folder: Path) -> nn.Module:
        with encoders.quiet():
            return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def _about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(about, indent=2), "utf-8")


def library_of(task: Task) -> Library:
    if isinstance(task, ImageClassifier):
        return Timm(task)
    if isinstance(task, TextClassifier):
        return Transformers(task)
    raise UserError(
        f"{type(task).__name__} is neither an ImageClassifier nor a TextClassifier, so its files have no known layout: "
        "take model.adaptation.merged_copy()"
    )
