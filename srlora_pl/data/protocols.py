"""What a task asks of its data, and a DataModule of its model: all that the two know of each other.

Either side may be a user's own class. Every member is optional: where an object lacks one, the default below holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, cast

Batch = dict[str, Any]
UNSAID: Any = object()  # of a member whose None means something
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Generation:
    """How the answers of a split are generated and graded.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        stop: words before the first of which an answer is cut.
        grader: its name in `srlora_pl.data.graders`; None where answers are not graded.
        options: of the grader ``options``, its words.
        math_grader: of the grader ``math``, how it compares.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    grader: str | None = None
    options: tuple[str, ...] = ()
    math_grader: str = "hendrycks"


@dataclass(frozen=True)
class Question:
    """A sample of a split in words.

    Attributes:
        prompt: the text that is continued.
        reference: the text that the grader compares with, empty where there is none.
    """

    prompt: str
    reference: str = ""


class DataForTask(Protocol):
    """A DataModule, as tasks and reports see it.

    Attributes:
        num_classes: outputs that the model needs, 1 for numbers.
        class_names: of the outputs, in their order; empty where nothing names them.
        names_numbers: whether older checkpoints call these classes by their numbers.
        problem: ``single_label``, ``multi_label`` or ``regression``; None leaves it to the task.
        score_names: the scores to report, the main one first; None leaves them to the task.
        split_names: of the data loaders of ``val`` and ``test``, in their order, such as ``val`` and ``val_mm``; a
            second or later loader without a name has its number, as ``val_2``.
        has_validation: whether there is a validation split.
        has_test_labels: whether there is a test split to score on.
        batch_size: samples in a batch, per device.
        padding_token: the token that shorter texts are padded with, None if there is none.
        trial_batch: makes a small training batch to try before training, without moving a loader or a random state.
        sampled_batches: batches of that many random training samples, see `srlora_pl.data.base.DataModule`.
        sample_name: the name of the predicted sample with this index.
        tokenizer: of the texts, None where there are none.
        generation: how a split's answers are generated and graded. Splits of generation have the names in
            ``split_names``, and ``predict``.
        question: the sample with this index of a split, in words.
        generation_batch: the prompts of these samples of a split as a batch to generate from.
    """

    num_classes: int | None = None
    class_names: Sequence[str] = ()
    names_numbers: bool = False
    problem: str | None = None
    score_names: Sequence[str] | None = None
    split_names: Mapping[str, Sequence[str]] = _NOTHING
    has_validation: bool = True
    has_test_labels: bool = False
    batch_size: int | None = None
    padding_token: int | None = UNSAID
    trial_batch: Callable[[], Batch] | None = None
    sampled_batches: Callable[[float], Iterator[Batch]] | None = None
    sample_name: Callable[[int], str] = str
    tokenizer: Any = None
    generation: Callable[[str], Generation] | None = None
    question: Callable[[str, int], Question] | None = None
    generation_batch: Callable[[str, Sequence[int]], Batch] | None = None


class ModelForData(Protocol):
    """A LightningModule, as DataModules see it.

    Attributes:
        num_classes: outputs of its head.
        data_config: ``mean``, ``std``, ``input_size`` (C, H, W) and ``interpolation`` of its images; `ImageData` needs
            it.
        backbone_name: where transformers finds its tokenizer; the DataModules of text need it.
        tokenizer_options: for loading the tokenizer, such as ``revision``.
        max_tokens: the longest text it has positions for; None for any length.
        vocab_size: tokens it has embeddings for; None where it computes them.
        token_types: kinds of tokens it tells apart; None where it does not.
        padding_token: the token that it calls padding.
        pads_left: whether texts are padded on the left; None leaves it to the tokenizer.
        sees_padding: whether an output depends on how far the text is padded, in spite of the attention mask.
    """

    num_classes: int | None = None
    data_config: dict[str, Any] | None = None
    backbone_name: str | None = None
    tokenizer_options: Mapping[str, Any] = _NOTHING
    max_tokens: int | None = None
    vocab_size: int | None = None
    token_types: int | None = None
    padding_token: int | None = None
    pads_left: bool | None = None
    sees_padding: bool = False


class _WithDefaults:
    """``given``, which may be None, with the defaults of ``protocol`` for what it lacks."""

    def __init__(self, given: Any, protocol: type) -> None:
        self._given, self._protocol = given, protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name, getattr(self._protocol, name))


def data_of(trainer: Any) -> DataForTask:
    """The DataModule of ``trainer``; all defaults where it has none, or where there is no trainer."""
    return cast(DataForTask, _WithDefaults(trainer and trainer.datamodule, DataForTask))


def model_of(trainer: Any) -> ModelForData:
    """The LightningModule of ``trainer``; all defaults where there is no trainer."""
    return cast(ModelForData, _WithDefaults(trainer and trainer.lightning_module, ModelForData))
