"""How timm and transformers, each in its own layout, build, write and read the networks that are exported."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from srlora_pl.data.tokens import load_tokenizer
from srlora_pl.errors import UserError
from srlora_pl.tasks import backbones, encoders
from srlora_pl.tasks.base import Task
from srlora_pl.tasks.image import ImageClassifier
from srlora_pl.tasks.text import TextClassifier


class Library:
    """How one library builds, writes and reads the networks of ``task``, and runs them on a batch for comparison."""

    task_type: str | None = None  # in PEFT's terms
    heads: tuple[str, ...]  # modules that the pretrained weights do not bring along
    base_name: str  # what the pretrained network is loaded from
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
        modes = {module: module.training for module in net.modules()}
        net.eval()
        try:
            return self.run(net, torch.Generator().manual_seed(0)).double().cpu()
        finally:
            for module, mode in modes.items():
                module.training = mode

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
        self.heads = backbones.head_names(task.net)
        source = backbones.timm_name(self.arguments[0])
        self.base_name = source.removeprefix("local-dir:").removeprefix("hf-hub:")
        self.recipe = self._with_options(
            f"timm.create_model({source!r}, pretrained={self.arguments[-1] is None}, num_classes={task.num_classes}"
        )

    def run(self, net: nn.Module, generator: torch.Generator) -> Tensor:
        like = next(net.parameters())
        return net(torch.randn(2, *self.task.data_config["input_size"], generator=generator).to(like))

    def build(self) -> nn.Module:
        return backbones.build_backbone(*self.arguments)

    def write(self, net: nn.Module, folder: Path, class_names: list[str]) -> list[str]:
        labels = {"label_names": class_names} if class_names else {}
        try:
            timm.models.save_for_hf(
                net, str(folder), labels, safe_serialization=True, data_config=self.task.data_config
            )
        except ValueError as error:
            raise UserError(f"timm cannot describe this model in a config.json ({error})") from error
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
        self.recipe = self._with_options(
            f"AutoModelForSequenceClassification.from_pretrained({self.base_name!r}, num_labels={task.num_classes}"
        )

    def run(self, net: Any, generator: torch.Generator) -> Tensor:
        device = next(net.parameters()).device
        # Up from 5, because the first tokens are often special ones, such as padding.
        ids = torch.randint(5, net.config.vocab_size, (2, 16), generator=generator).to(device)
        return net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

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
        try:
            tokenizer = load_tokenizer(self.base_name)
        except UserError as error:
            return [f"without a tokenizer: {error}"]
        tokenizer.chat_template = None  # its parts would be written under names that a file gives
        tokenizer.save_pretrained(folder)
        return []

    def read(self, folder: Path) -> nn.Module:
        with encoders.quiet():
            return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def library_of(task: Task) -> Library:
    if isinstance(task, ImageClassifier):
        return Timm(task)
    if isinstance(task, TextClassifier):
        return Transformers(task)
    raise UserError(
        f"{type(task).__name__} is neither an ImageClassifier nor a TextClassifier, so its files have no known layout: "
        "take srlora_pl.lowrank.export.plain_copy(model.adaptation)"
    )
