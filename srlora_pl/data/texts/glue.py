"""The tasks of GLUE (Wang et al. 2019), from the folder of its TSV files or from the hub."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from srlora_pl.data.texts.datamodule import TextDataModule, Texts
from srlora_pl.data.texts.labels import encode_classes, encode_numbers, name_numbers
from srlora_pl.data.texts.tables import Table, read_table
from srlora_pl.util.errors import UserError, one_line, require_one_of
from srlora_pl.util.files import is_hub_name


@dataclass
class GLUETask:
    """The layout of one task's files, and its scores.

    ``folder``: of its TSV files; ``texts`` and ``label``: their columns; ``names``: of the classes, in the order of the
    hub's numbers, none for a regression; ``words``: the classes as the files and submissions write them; ``scores``:
    the main one first; ``header``: the columns of train and dev where the files do not name them; ``parts``: endings of
    the names of several dev and test files; ``skip_broken``: the official files have broken lines, which everybody
    leaves out.
    """

    folder: str
    texts: tuple[str, ...]
    names: tuple[str, ...]
    words: tuple[str, ...] = ("0", "1")
    label: str = "label"
    scores: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] | None = None
    parts: tuple[str, ...] = ("",)
    skip_broken: bool = False

    def __post_init__(self) -> None:
        short = {"": "", "_matched": "-m", "_mismatched": "-mm"}
        self.dev = [f"dev{part}" for part in self.parts]  # the files' names, without their ending
        self.test = [f"test{part}" for part in self.parts]
        # The files that GLUE's server takes, one for each of `test`.
        self.submissions = [f"{self.folder}{short[part]}.tsv" for part in self.parts]


_PAIR = ("sentence1", "sentence2")
_NLI, _MNLI = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
_F1 = ("f1", "accuracy")

TASKS = {
    "cola": GLUETask(
        "CoLA",
        ("sentence",),
        ("unacceptable", "acceptable"),
        scores=("matthews",),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GLUETask("SST-2", ("sentence",), ("negative", "positive")),
    "mrpc": GLUETask("MRPC", ("#1 String", "#2 String"), ("not_equivalent", "equivalent"), label="Quality", scores=_F1),
    "stsb": GLUETask("STS-B", _PAIR, (), (), "score", scores=("pearson", "spearman")),
    "qnli": GLUETask("QNLI", ("question", "sentence"), _NLI, _NLI),
    "rte": GLUETask("RTE", _PAIR, _NLI, _NLI),
    "mnli": GLUETask("MNLI", _PAIR, _MNLI, _MNLI, "gold_label", parts=("_matched", "_mismatched")),
    "qqp": GLUETask(
        "QQP",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        label="is_duplicate",
        scores=_F1,
        skip_broken=True,
    ),
    "wnli": GLUETask("WNLI", _PAIR, ("not_entailment", "entailment")),
}


class GLUEData(TextDataModule):
    """A task of GLUE. The labels of its test split are hidden, so ``val`` and ``test`` are both the dev split.

    With ``val_fraction`` above 0 the validation split is held out of train, and ``test`` alone takes dev. ``predict``
    takes the hidden test split. MNLI has two of each, matched and mismatched. Batches and the order are as in
    `TextDataModule`.

    Args:
        task: ``cola``, ``sst2``, ``mrpc``, ``stsb``, ``qnli``, ``rte``, ``mnli``, ``qqp`` or ``wnli``.
        root: a folder that holds the task's folder of TSV files (``CoLA/train.tsv``), or a name on the hub.
        batch_size: samples in a batch, per device.
        val_fraction: share of the training data held out for validation, in [0, 1); 0 validates on dev.
        kwargs: the other arguments of `TextDataModule`.

    Raises:
        UserError: the task is unknown; files are missing or not GLUE's; an argument is out of its range.
    """

    def __init__(
        self,
        task: str,
        root: str = "nyu-mll/glue",
        batch_size: int = 16,
        val_fraction: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, **kwargs)
        self.task_name = task.lower().replace("-", "").replace("_", "")
        if self.task_name not in TASKS:
            require_one_of("data.task", task, TASKS)
        self.task, self.root = TASKS[self.task_name], root
        self.class_names = list(self.task.names)
        self.num_classes = len(self.class_names) or 1
        self.problem = "single_label" if self.class_names else "regression"
        self.score_names = list(self.task.scores)
        self.split_names = {
            "val": ("val", "val_mm")[: len(self.splits("val")) or 1],
            "test": ("test", "test_mm")[: len(self.splits("test"))],
        }
        self.folder = _local_folder(root, self.task)

    def splits(self, use: str) -> list[str]:
        if use == "train":
            return ["train"]
        if use == "val":
            return [] if self.val_fraction > 0 else self.task.dev
        return self.task.dev if use == "test" else self.task.test

    def read(self, split: str) -> Texts:
        return self._read_hub(split) if self.folder is None else self._read_tsv(self.folder, split)

    def _read_tsv(self, folder: Path, split: str) -> Texts:
        task, hidden = self.task, split in self.task.test
        columns = dict.fromkeys(task.texts if hidden else (*task.texts, task.label), "that GLUE's file has")
        file = _tsv_file(folder, split)
        header, skip_broken = None if hidden else task.header, task.skip_broken and not hidden
        table = read_table(file, columns, header=header, skip_broken=skip_broken, may_be_quoted=False)
        if table.broken:
            self.left_out[f"lines of {task.folder}/{file.name} with too few or too many fields"] = table.broken
        texts = [table.texts(column, may_be_empty=task.skip_broken) for column in task.texts]
        labels: Tensor | None = None
        if not hidden:
            encode = partial(encode_classes, classes=task.words) if task.words else encode_numbers
            labels = encode(table, task.label)
        return Texts(*texts, labels=labels)

    def _read_hub(self, split: str) -> Texts:
        table = _load_hub(self.root, self.task_name, split.replace("dev", "validation"), self.task)
        texts = (list(table[name]) for name in table.column_names if name not in ("idx", "label"))
        return Texts(*texts, labels=None if split in self.task.test else self._hub_labels(table, split))

    def _hub_labels(self, table: Any, split: str) -> Tensor:
        """The labels by name: a copy of the data set may number them in another order."""
        names = getattr(table.features["label"], "names", None) or list(self.task.names)
        place = Path(self.root, self.task_name, split)
        labels = Table(place, {"label": list(table["label"])}, range(1, len(table) + 1), {"label": names})
        if self.problem == "regression":
            return encode_numbers(labels, "label")
        name_numbers(labels, "label")
        words = self.task.words
        return encode_classes(labels, "label", words if set(words) == set(names) else self.task.names)


def _local_folder(root: str, task: GLUETask) -> Path | None:
    """The task's folder under a local ``root``; None for a name on the hub."""
    path = Path(root).expanduser()
    if not path.is_dir() and is_hub_name(root):
        return None
    if not (path / task.folder).is_dir():
        raise UserError(f"data.root '{root}' has no folder {task.folder}; put {_files_of(task)} there.")
    return path / task.folder


def _files_of(task: GLUETask) -> str:
    return ", ".join(f"{task.folder}/{split}.tsv" for split in ("train", *task.dev, *task.test))


def _tsv_file(folder: Path, split: str) -> Path:
    file, subset = folder / f"{split}.tsv", folder / f"{split}_subset.tsv"
    if not file.is_file() and subset.is_file():
        rank_zero_info(f"There is no '{file}', so the run takes the part of it in '{subset.name}'.")
        return subset
    return file


def _load_hub(root: str, name: str, split: str, task: GLUETask) -> Any:
    from datasets import load_dataset  # takes a second, and local files need none of it

    try:
        return load_dataset(root, name, split=split)
    except Exception as error:  # whatever its readers, the hub client and the network raise
        reason = one_line(error)
        raise UserError(
            f"data.root {root!r} could not be loaded from the hub ({reason}); without a network, put {_files_of(task)} "
            f"into a folder and set data.root to it."
        ) from error
