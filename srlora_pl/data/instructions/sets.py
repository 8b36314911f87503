"""Data sets of tokens: answers to train on or score, prompts to continue, and options to choose from."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from srlora_pl.data.base import KeyedDataset, split_keys
from srlora_pl.data.instructions.tokens import Encoded
from srlora_pl.data.loader import Key
from srlora_pl.data.protocols import Batch
from srlora_pl.data.texts.datamodule import ROUND
from srlora_pl.data.texts.tokens import Tokens
from srlora_pl.util.randomness import derive, run_seed

NOT_TRAINED = -100  # the label that transformers and torch leave out of a loss
_PACKS = int.from_bytes(b"packs")


def rounded(lengths: Tensor, most: int) -> Tensor:
    """Lengths as padded: few distinct shapes, and whole tiles for matrix units."""
    return (-(-lengths // ROUND) * ROUND).clamp(max=most)


class Answers(KeyedDataset):
    """Samples with their labels, padded on the right by the batch.

    A batch has ``input_ids`` and ``labels``, int64 (b, L), each label at its own token's place and -100 where it is not
    trained; ``predicts``, int64 (n,), the places in (b x L) before a token with a label; ``index``, int64 (b,); and
    ``step_tokens``, int64 (): the trained tokens of the optimizer step that its keys tell, or its own.

    Args:
        encoded: of the whole split.
        rows: the samples of it in the set, int64 (n,).
        max_length: tokens behind it are cut.
        pad: the token to pad with.
        by_length: hand the samples out longest first, each with its position among ``rows`` as ``index``.
    """

    def __init__(
        self,
        encoded: Encoded,
        rows: Tensor,
        max_length: int,
        pad: int,
        by_length: bool,
        batch_size: int | None = None,
    ) -> None:
        self.encoded, self.rows, self.max_length, self.pad = encoded, rows, max_length, pad
        self.batch_size = batch_size
        cut = encoded.lengths.clamp(max=max_length)
        self.lengths, self.trained_tokens = cut[rows], encoded.trained_in(cut)[rows]
        longest_first = self.lengths.argsort(descending=True, stable=True)
        self.turns = longest_first if by_length else torch.arange(len(rows))

    def extremes(self) -> tuple[int, int]:
        """The longest and the shortest sample, so that one of them is padded."""
        order = self.lengths[self.turns].argsort()
        return int(order[0]), int(order[-1])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index = self.turns[split_keys(keys)[0]]
        batch = self.joined(index[:, None].tolist())
        del batch["position_ids"]  # they are as usual
        return {**batch, "index": index, "step_tokens": step_tokens(keys, self.trained_tokens[index])}

    def joined(self, groups: Sequence[Sequence[int]]) -> Batch:
        """Rows of one or more samples each, by their positions in the set; ``position_ids`` begin anew with each, and
        with the padding."""
        most = max(int(self.lengths[list(group)].sum()) for group in groups)
        shape = (len(groups), int(rounded(torch.tensor(most), self.max_length)))
        input_ids, labels = torch.full(shape, self.pad), torch.full(shape, NOT_TRAINED)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        for row, group in enumerate(groups):
            place = 0
            for sample in group:
                first, length = int(self.encoded.offsets[self.rows[sample]]), int(self.lengths[sample])
                ids, trained = self.encoded.ids[first : first + length], self.encoded.trained[first : first + length]
                here = slice(place, place + length)
                input_ids[row, here] = ids.long()
                labels[row, here] = torch.where(trained, ids.long(), NOT_TRAINED)
                position_ids[row, here] = torch.arange(length)
                place += length
            position_ids[row, place:] = torch.arange(shape[1] - place)
        # Found here, as the device would have to be waited for.
        predicts = (pad(labels[:, 1:], (0, 1), value=NOT_TRAINED).flatten() != NOT_TRAINED).nonzero()[:, 0]
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "predicts": predicts}


class Packs(KeyedDataset):
    """Samples packed into rows of ``max_length`` tokens; a batch has ``position_ids``, int64 (b, L), besides.

    Best-fit decreasing: the longest sample first, each into the row with the least space that takes it. Which samples
    of equal length go where is random, a function of (run seed, epoch); so the number of rows, and how full each is,
    are the same in every epoch.

    Args:
        samples: to pack.
        fixed: the rows of epoch 0 in every epoch.
    """

    unit = "packed row"

    def __init__(self, samples: Answers, fixed: bool = False) -> None:
        self.samples, self.fixed = samples, fixed
        longest_first = samples.lengths.sort(descending=True).values.tolist()
        packs = torch.tensor(best_fit(longest_first, samples.max_length))
        self._by_pack, self._sizes = packs.argsort(stable=True), packs.bincount().tolist()
        self._epoch: tuple[int, int] | None = None
        self._members: Sequence[Tensor] = ()

    @property
    def singles(self) -> KeyedDataset:
        return self.samples

    def __len__(self) -> int:
        return len(self._sizes)

    def members(self, epoch: int) -> Sequence[Tensor]:
        """The samples of each row in an epoch, by their positions in the set, int64 (m,) each."""
        place = (run_seed(), 0 if self.fixed else epoch)
        if place != self._epoch:
            generator = torch.Generator().manual_seed(derive(place[0], _PACKS, place[1]))
            order = torch.randperm(len(self.samples), generator=generator)
            order = order[self.samples.lengths[order].argsort(descending=True, stable=True)]
            self._members, self._epoch = order[self._by_pack].split(self._sizes), place
        return self._members

    def tokens(self, epoch: int) -> Tensor:
        """The trained tokens of each row in an epoch, int64 (n,)."""
        rows = torch.arange(len(self)).repeat_interleave(torch.tensor(self._sizes))
        tokens = self.samples.trained_tokens[torch.cat(list(self.members(epoch)))]
        return torch.zeros(len(self), dtype=torch.int64).index_add(0, rows, tokens)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index, epochs = split_keys(keys)
        members = self.members(0 if epochs is None else int(epochs[0]))
        groups = [members[row] for row in index]
        tokens = self.samples.trained_tokens[torch.cat(groups)]
        batch = self.samples.joined([group.tolist() for group in groups])
        return {**batch, "index": index, "step_tokens": step_tokens(keys, tokens)}


def best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """The bin of each of ``lengths``, none above ``capacity``: the one with the least space that takes it, or a new."""
    bins: list[int] = []
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of `with_space`, ascending
    count = 0
    for length in lengths:
        place = bisect_left(spaces, length)
        if place == len(spaces):
            chosen, space, count = count, capacity, count + 1
        else:
            space = spaces[place]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        left = space - length
        if left not in with_space:
            with_space[left] = []
            insort(spaces, left)
        with_space[left].append(chosen)
        bins.append(chosen)
    return bins


class Prompts(KeyedDataset):
    """Prompts to continue, padded on the left by the batch, and handed out longest first.

    A batch has ``input_ids``, ``attention_mask``, int64 (b, L), and ``index``, int64 (b,), the position in the split.

    Args:
        prompts: the tokens of each.
        pad: the token to pad with.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], pad: int, batch_size: int | None = None) -> None:
        offsets = torch.tensor([0, *map(len, prompts)]).cumsum(0)
        self.tokens = Tokens(torch.tensor([i for ids in prompts for i in ids], dtype=torch.int32), offsets, None, 0)
        self.rows, self.pad, self.batch_size = torch.arange(len(prompts)), pad, batch_size
        self.turns = self.tokens.lengths.argsort(descending=True, stable=True)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index = self.turns[split_keys(keys)[0]]
        length = int(self.tokens.lengths[index].max())
        return {**self.tokens.padded(index, length, self.pad, left=True), "index": index}


class Options(KeyedDataset):
    """Questions with the options to choose from, longest first; the rows of a batch are the options of its questions.

    A batch has ``input_ids`` and ``labels``, int64 (b, L), with a label at each token of the option itself; ``index``,
    int64 (b,), the question; and ``option``, int64 (b,), the option's number.

    Args:
        options: the tokens of all options, question by question.
        numbers: of the options, int64 (m,).
        counts: how many options each question has, int64 (n,).
        pad: the token to pad with.
        batch_size: questions in a batch.
    """

    def __init__(self, options: Encoded, numbers: Tensor, counts: Tensor, pad: int, batch_size: int) -> None:
        longest = int(options.lengths.max())
        self.options = Answers(options, torch.arange(len(options)), longest, pad, by_length=False)
        self.numbers, self.counts, self.first = numbers, counts, counts.cumsum(0) - counts
        self.batch_size, self.rows = batch_size, torch.arange(len(counts))
        self.turns = self.options.lengths[self.first].argsort(descending=True, stable=True)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        questions = self.turns[split_keys(keys)[0]]
        places = torch.cat([self.first[each] + torch.arange(int(self.counts[each])) for each in questions])
        batch = self.options.joined(places[:, None].tolist())
        del batch["position_ids"]
        index = questions.repeat_interleave(self.counts[questions])
        return {**batch, "index": index, "option": self.numbers[places]}


def step_tokens(keys: Sequence[Key], own: Tensor) -> Tensor:
    """The count that training keys carry, else the sum of the batch's ``own``, int64 ()."""
    first = keys[0]
    return torch.tensor(first[2]) if isinstance(first, tuple) and len(first) > 2 else own.sum()


def tokens_of_steps(tokens: Tensor, per_batch: int, batches: int, accumulate: int) -> list[int]:
    """The tokens of the step that each of an epoch's batches belongs to.

    A step is ``accumulate`` batches, or those left at the end of the epoch.

    Args:
        tokens: of the samples in their order, int64 (n,).
        per_batch: samples in a batch, on all devices together.
        batches: those of the epoch that are trained.
    """
    steps = tokens[: batches * per_batch].split(accumulate * per_batch)
    return [int(steps[batch // accumulate].sum()) for batch in range(batches)]
