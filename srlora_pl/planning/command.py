"""``srlora plan``: what a run needs, from its config alone, and what to change if that is too much."""

import os
from argparse import Namespace
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch

from srlora_pl.models.weights import NF4
from srlora_pl.planning.advice import Plan, advice, can_split
from srlora_pl.planning.needs import Needs
from srlora_pl.run import config
from srlora_pl.run.run import Run
from srlora_pl.tasks.base import Task
from srlora_pl.util.errors import UserError, one_line, require
from srlora_pl.util.signatures import class_at

_READING_VALUES = {"class_weights": None, "mixup": 0.0, "cutmix": 0.0}


class Planned(Run):
    """The settings of a run that is only planned: they are read and refused as those of a fit, and nothing is made."""

    def _choose_checkpoint(self) -> None:
        if self.ckpt_path:
            raise UserError("plan takes no --ckpt_path: a run that goes on needs what it needed, leave it out")

    def instantiate_classes(self) -> None:
        """No weights, no data, no folder."""

    def task(self, **changes: Any) -> Task:
        """The task on the meta device, with random weights.

        Args:
            changes: of its arguments.
        """
        kind, arguments = self._parts()
        random = {**(arguments.get("backbone_kwargs") or {}), "pretrained": False}
        arguments |= {"backbone_kwargs": random, "backbone_checkpoint": None, "adapter": None, "compile": False}
        # They read values, and take next to no memory.
        arguments |= {name: none for name, none in _READING_VALUES.items() if name in arguments}
        arguments |= changes
        # Four bits are packed from values, so that they are counted and not made.
        in_four_bits = arguments.get("weights") == NF4
        if in_four_bits:
            arguments["weights"] = kind.beside_nf4
        with torch.device("meta"):
            task = kind(**arguments)
        method = task.adaptation.method
        if in_four_bits and (method.moves_weights or method.trains_weights):
            raise UserError(
                f"model.weights is 'nf4', but {type(method).__name__} changes pretrained weights, which cannot be done "
                "in four bits: take bfloat16 or float32"
            )
        if in_four_bits:
            task.hparams["weights"] = NF4
        return task

    def real_task(self) -> Task:
        """The task with its weights, to compare with."""
        kind, arguments = self._parts()
        return kind(**arguments)

    def _parts(self) -> tuple[type[Task], dict[str, Any]]:
        """The class of the task, and its arguments."""
        node = self.config.model
        kind, arguments = class_at(node.class_path), {**node.init_args.as_dict(), **(node.get("dict_kwargs") or {})}
        known = signature(kind.__init__).parameters
        if "backbone_kwargs" not in known:
            raise UserError(
                f"plan builds networks without their weights, for which {kind.__name__} would need backbone_kwargs "
                "(pretrained: false): plan a task of this package"
            )
        class_at(arguments["method"]["class_path"])  # a class of the user's own is known once it is imported
        if "num_classes" in known:
            arguments["num_classes"] = self.classes
        return kind, arguments

    @property
    def classes(self) -> int:
        """The outputs of the head, from the data if these are here."""
        if "classes" not in vars(self):
            node = self.config.data
            try:
                data = class_at(node.class_path)(**node.init_args.as_dict())
                self._classes, self.guess = data.num_classes, ""
            except UserError as error:
                self._classes = 2
                self.guess = f"the head has 2 outputs here, as the data cannot tell their number ({one_line(error)})"
        return self._classes


def plan(given: Namespace, files: Sequence[str], contents: Sequence[config.Node], options: list[str]) -> list[str]:
    """The lines to print.

    Args:
        given: ``memory`` in GB or None, and ``devices``.
        files: names of the config files.
        contents: their settings.
        options: the rest of the command line.
    """
    require("--memory", given.memory, "positive", given.memory is None or given.memory > 0)
    require("--devices", given.devices, "1 or more", given.devices >= 1)
    run = Planned("fit", files, contents, options)
    data = run.config.data.init_args
    size = data.get("batch_size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"data.batch_size is {size!r}: set the samples of a micro-batch, which plan counts with")
    on_gpu = torch.cuda.is_available() and run.config.trainer.accelerator not in ("cpu", "mps")
    memory = given.memory * 1e9 if given.memory else _memory(on_gpu)
    separate = on_gpu or run.config.trainer.accelerator in ("gpu", "cuda", "auto")
    made = Plan(
        run.task,
        size,
        data.get("max_length"),
        str(run.config.trainer.precision or "32-true"),
        devices=given.devices,
        accumulated=run.config.trainer.accumulate_grad_batches,
        separate=separate,
    )
    if given.devices > 1 and not can_split(made.task):
        raise UserError(
            f"--devices is {given.devices}, but fsdp2 splits neither weights in four bits nor those whose optimizer "
            "needs whole gradients, as GaLore's: leave it out"
        )
    lines = [*_told(run, made), "", *_table(made.needs), "", *_work(made)]
    return [*lines, "", *advice(made, memory)]


def _memory(on_gpu: bool) -> float:
    """Bytes of the first GPU, or of this machine."""
    if on_gpu:
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _told(run: Planned, made: Plan) -> list[str]:
    """What is planned, in numbers of parameters and samples."""
    task, layers = made.task, made.task.adaptation.weights.layers.values()
    counts = [
        sum(each.numel() for each in task.net.parameters()),
        sum(layer.weight.numel() for layer in layers),
        sum(each.numel() for each in task.net.parameters() if each.requires_grad),
    ]
    total, adapted, trained = (f"{count / 1e6:,.2f} M" for count in counts)
    samples = f"{made.size} pictures"
    if made.length:
        samples = f"{made.size} x {made.step.tokens // made.size} tokens, the most that data.max_length allows"
    lines = [
        f"{run.config.name}: {type(task.adaptation.method).__name__}, {task.hparams['backbone']}",
        f"parameters {total}, in adapted linears {adapted}, trained {trained}",
        f"micro-batch {samples}; {made.precision}; {made.devices} device{'s' * (made.devices > 1)}",
    ]
    return [*lines, f"note: {run.guess}"] if vars(run).get("guess") else lines


def _table(found: Needs) -> list[str]:
    def line(name: str, device: int | str, host: int | str) -> str:
        cells = (each if isinstance(each, str) else f"{each / 1e9:.3f}" if each else "-" for each in (device, host))
        return f"{name:52}{next(cells):>10}{next(cells):>10}"

    lines = [line("GB", "a device", "host")]
    for title, parts in (("a step, all at once", found.step), ("before the first step", found.start)):
        lines += [line(f"  {part.name}", part.device, part.host) for part in parts]
        lines.append(line(title, sum(part.device for part in parts), sum(part.host for part in parts)))
    return [*lines, *([f"singular directions on the disk: {found.on_disk / 1e9:.3f} GB"] if found.on_disk else [])]


def _work(made: Plan) -> list[str]:
    """Operations for a token or a picture, and the activations, with and without computing these again."""
    adapted = sum(layer.weight.numel() for layer in made.task.adaptation.weights.layers.values())
    one = "token" if made.length else "picture"
    lines = [f"{f'GFLOP a {one}':40}{'forward':>12}{'a step':>12}{'activations, GB':>18}"]
    ways = [("all activations kept", False), ("activations computed again", True)]
    if "activation_checkpointing" not in made.task.hparams:
        ways = ways[:1]
    for name, again in ways:
        step = made.checkpointed(again).step if len(ways) > 1 else made.step
        work = (each / step.tokens / 1e9 for each in (step.forward, step.forward + step.backward))
        lines.append(f"  {name:38}{next(work):12.3f}{next(work):12.3f}{step.activations / 1e9:18.3f}")
    if made.length:
        lines.append(f"  of these the adapted linears forward, {2 * adapted / 1e9:.3f}")
    if made.step.logits:
        rows = made.task.hparams["loss_chunk"]
        lines.append(f"logits, {rows} rows at a time: {made.step.logits / 1e9:.3f} GB of the working memory")
    return lines
