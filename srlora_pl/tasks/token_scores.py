"""Scores of predicted tokens, of options by likelihood, and of generated answers, as a task's `Evaluation`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from srlora_pl.data.graders import Grader, grader
from srlora_pl.data.protocols import Batch, Generation, Question
from srlora_pl.models.generation import Completion
from srlora_pl.tasks.answers import Answers, Row, counts
from srlora_pl.util.errors import UserError


class TokenScores(Metric):
    """The mean loss of the answer tokens of a split, e to its power, and the share that is the most probable token."""

    nll: Tensor
    right: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "right", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, right: Tensor) -> None:
        """Take the losses (n,) of answer tokens and whether each was the most probable, bool (n,)."""
        self.nll += losses.double().sum()
        self.right += right.sum()
        self.tokens += right.numel()

    def compute(self) -> dict[str, Tensor]:
        loss, accuracy = self.nll / self.tokens, self.right / self.tokens
        return {"loss": loss, "perplexity": loss.exp(), "token_accuracy": accuracy, "score": accuracy}


class TextScores:
    """Scores a split by what its batches ask for: the loss of answers, the likelihood of options, or generation.

    Of generated and of chosen answers the ``score`` is the accuracy.

    Attributes:
        answers: of the evaluation at hand.
        main: the score of each split that was computed.
    """

    names = ("loss", "perplexity", "token_accuracy", "score")

    def __init__(self) -> None:
        self.answers = Answers(None, "")
        self.main: dict[str, Tensor] = {}
        self._tokens: dict[str, TokenScores] = {}
        self._empty: set[str] = set()
        self._graders: dict[str, Grader | None] = {}

    def begin(self, answers: Answers) -> None:
        """Begin to test; the answers go to ``answers``."""
        self.answers = answers
        self.main.clear()

    def reset(self, split: str) -> None:
        self._tokens[split] = TokenScores()
        self._empty.discard(split)
        self._graders.clear()

    def update(self, task: Any, split: str, batch: Batch) -> None:
        if "labels" not in batch:
            self.generate(task, split, batch)
        elif "option" in batch:
            self.answers.add(_chosen(task, split, batch))
        else:
            losses, right = task.token_losses(batch)
            self._tokens[split].to(losses.device).update(losses, right)

    def compute(self, split: str) -> dict[str, Tensor]:
        rows = self.answers.of(split)
        values = counts(rows) if rows else self._tokens.pop(split).compute()
        if not rows and values["loss"].isnan():
            self._empty.add(split)
        self.main[split] = values["score"]
        return values

    def remark(self, split: str, class_names: Sequence[str]) -> str | None:
        """Says that there was nothing to score."""
        if split in self._empty:
            return f"No token of {split} has a label other than -100, so that its loss is no number: see to the labels."
        return None

    def generate(self, task: Any, split: str, batch: Batch) -> list[Row]:
        """Answer each prompt of ``batch``, unless an interrupted evaluation has; returns the answers."""
        data = task.data
        if data.tokenizer is None or data.generation is None or data.question is None:
            raise UserError(
                "prompts are answered with the tokenizer, generation(split) and question(split, index) of a "
                "DataModule, and the run's data have none: take srlora_pl.InstructionData"
            )
        settings = data.generation(split)
        indices = batch["index"].tolist()
        questions = [data.question(split, index) for index in indices]
        earlier = [self.answers.earlier(split, i, q.prompt) for i, q in zip(indices, questions, strict=True)]
        new = [place for place, row in enumerate(earlier) if row is None]
        rows = {index: row for index, row in zip(indices, earlier, strict=True) if row is not None}
        if new:
            completions = task.complete(_rows(batch, new), settings)
            for place, completion in zip(new, completions, strict=True):
                row = self.graded(settings, split, questions[place], completion)
                rows[indices[place]] = {"split": split, "index": indices[place], **row}
        self.answers.add([rows[index] for index in indices])
        return [rows[index] for index in indices]

    def graded(self, settings: Generation, split: str, question: Question, completion: Completion) -> Row:
        """A completion in words, with its grade if its split has a grader that can read the reference."""
        if split not in self._graders:
            name, options, math_grader = settings.grader, settings.options, settings.math_grader
            self._graders[split] = grader(name, options=options, math_grader=math_grader) if name else None
        judge = self._graders[split]
        try:
            grade = judge.grade(completion.text, question.reference) if judge else None
        except UserError:  # a reference that is none for this grader, which only a test must have
            if split not in ("val", "predict"):
                raise
            grade = None
        return {
            "prompt": question.prompt,
            "reference": question.reference,
            "text": completion.text,
            "finished": completion.finished,
            "correct": grade.correct if grade else None,
            "answer": grade.answer if grade else None,
            "grader": settings.grader,
            **({"options": list(settings.options)} if settings.options else {}),
        }


def _chosen(task: Any, split: str, batch: Batch) -> list[Row]:
    """A row for each question of ``batch``, whose rows are its options: the most likely one is the answer."""
    data, likely = task.data, task.log_likelihoods(batch).tolist()
    options = data.generation(split).options
    scores: dict[int, dict[str, float]] = {}
    for index, option, score in zip(batch["index"].tolist(), batch["option"].tolist(), likely, strict=True):
        scores.setdefault(index, {})[options[option]] = score
    rows = []
    for index, each in scores.items():
        question, answer = data.question(split, index), max(each, key=lambda option: each[option])
        row: Row = {"split": split, "index": index, "prompt": question.prompt, "reference": question.reference}
        right = answer == question.reference
        rows.append({**row, "correct": right, "answer": answer, "grader": "likelihood", "scores": each})
    return rows


def _rows(batch: Batch, places: list[int]) -> Batch:
    """The samples of ``batch`` at these places."""
    return {name: value[places] for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
