"""Texts are tokenised once, and what is kept of it on disk is never trusted further than it can be checked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from srlora_pl.data.texts import tokens as module
from srlora_pl.data.texts.tokens import Tokens, load_tokenizer, tokenize
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions
from tests.helpers.texts import CLS, PAD, SEP, W0, save_tokenizer, sentence

FIRST = ["w0", "w1 w2 w3 w4 w5 w6", "w7 nonsense"]
SECOND = ["w9 w9", "w8", "w8 w8 w8 w8 w8 w8"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return load_tokenizer(save_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each call tokenised."""
    seen: list[int] = []
    original = module._tokenize

    def counted(tokenizer: Any, first: Any, *rest: Any) -> Tokens:
        seen.append(len(first))
        return original(tokenizer, first, *rest)

    monkeypatch.setattr(module, "_tokenize", counted)
    return seen


def samples(tokens: Tokens) -> list[list[int]]:
    return [part.tolist() for part in tokens.input_ids.split(tokens.lengths.tolist())]


def test_texts_and_pairs(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2)
    alone = tokenize(tokenizer, FIRST, None, 6, tmp_path)
    assert samples(alone) == [[CLS, W0, SEP], [CLS, W0 + 1, W0 + 2, W0 + 3, W0 + 4, SEP], [CLS, W0 + 7, 1, SEP]]
    assert alone.truncated == 1
    pairs = tokenize(tokenizer, FIRST, SECOND, 8, tmp_path)
    assert [len(ids) for ids in samples(pairs)] == [6, 8, 8]
    # The longer of the two is cut.
    assert samples(pairs)[1:] == [
        [CLS, W0 + 1, W0 + 2, W0 + 3, W0 + 4, SEP, W0 + 8, SEP],
        [CLS, W0 + 7, 1, SEP, W0 + 8, W0 + 8, W0 + 8, SEP],
    ]
    assert pairs.token_type_ids is not None
    assert pairs.token_type_ids[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert pairs.truncated == 2


@pytest.mark.parametrize("left", [False, True])
def test_padding_equals_the_tokenizers_own(left: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer", padding_side="left" if left else "right"))
    tokens = tokenize(tokenizer, FIRST, SECOND, 12, tmp_path)
    options = {"truncation": "longest_first", "max_length": 12, "padding": "max_length", "return_tensors": "pt"}
    expected = tokenizer(FIRST, SECOND, **options)
    rows = torch.tensor([2, 0, 1])
    batch = tokens.padded(rows, 12, PAD, left)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, value in batch.items():
        assert value.dtype == torch.int64
        assert torch.equal(value, expected[name][rows]), name


def test_a_tokenizer_without_types(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer", names=("input_ids", "attention_mask"))
    tokens = tokenize(load_tokenizer(folder), FIRST, SECOND, 12, tmp_path)
    assert tokens.token_type_ids is None
    assert "token_type_ids" not in tokens.padded(torch.tensor([0]), 8, PAD, False)


def test_a_second_start_does_not_tokenise(tokenizer: Any, tmp_path: Path, calls: list[int]) -> None:
    once = tokenize(tokenizer, FIRST, SECOND, 8, tmp_path / "cache")
    again = tokenize(load_tokenizer(str(tmp_path / "tokenizer")), FIRST, SECOND, 8, tmp_path / "cache")
    assert calls == [3]
    assert torch.equal(once.input_ids, again.input_ids)
    assert torch.equal(once.offsets, again.offsets)
    assert once.token_type_ids is not None
    assert again.token_type_ids is not None
    assert torch.equal(once.token_type_ids, again.token_type_ids)
    assert once.truncated == again.truncated == 2


def test_whatever_the_tokens_depend_on_makes_other_tokens(tokenizer: Any, tmp_path: Path, calls: list[int]) -> None:
    other = load_tokenizer(save_tokenizer(tmp_path / "other", truncation_side="left"))
    cases: list[Any] = [
        (tokenizer, FIRST, SECOND, 8),
        (tokenizer, FIRST, SECOND, 9),
        (tokenizer, SECOND, FIRST, 8),
        (tokenizer, FIRST, None, 8),
        (tokenizer, [*FIRST[:2], "w7 nonsens"], SECOND, 8),
        (tokenizer, [FIRST[0] + FIRST[1][:1], FIRST[1][1:], FIRST[2]], SECOND, 8),  # the same letters, cut elsewhere
        (other, FIRST, SECOND, 8),
    ]
    for case in cases:
        tokenize(*case, tmp_path / "cache")
    assert len(calls) == len(cases)
    assert len(list((tmp_path / "cache").iterdir())) == len(cases)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_cache_is_made_again(share: float, tokenizer: Any, tmp_path: Path, calls: list[int]) -> None:
    cache = tmp_path / "cache"
    once = tokenize(tokenizer, FIRST, None, 8, cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    again = tokenize(tokenizer, FIRST, None, 8, cache)
    assert samples(again) == samples(once)
    assert calls == [3, 3]
    assert file.read_bytes() == whole
    assert list(cache.iterdir()) == [file]


def test_a_cache_of_other_contents_is_made_again(tokenizer: Any, tmp_path: Path, calls: list[int]) -> None:
    cache = tmp_path / "cache"
    tokenize(tokenizer, FIRST, None, 8, cache)
    (file,) = cache.iterdir()
    tokenize(tokenizer, FIRST[:2], None, 8, cache)
    (other,) = set(cache.iterdir()) - {file}
    file.write_bytes(other.read_bytes())
    assert len(tokenize(tokenizer, FIRST, None, 8, cache)) == 3
    assert calls == [3, 2, 3]
    parts = {name: part.clone() for name, part in load_file(file).items() if name != "token_type_ids"}
    save_file(parts | {"input_ids": parts["input_ids"][:-1].clone()}, file)
    tokenize(tokenizer, FIRST, None, 8, cache)
    assert calls == [3, 2, 3, 3]


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=mentions("data.cache_dir", "kept")):
        assert len(tokenize(tokenizer, FIRST, None, 8, tmp_path / "file")) == 3


@pytest.mark.parametrize(("second", "length", "least"), [(None, 2, 3), (SECOND, 4, 5), (None, 65, 3)])
def test_a_length_that_the_model_does_not_take(
    second: list[str] | None, length: int, least: int, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=mentions("max_length", length, least, "64")):
        tokenize(tokenizer, FIRST, second, length, tmp_path)


def test_the_shortest_and_longest_length(tokenizer: Any, tmp_path: Path) -> None:
    assert tokenize(tokenizer, FIRST, None, 3, tmp_path).lengths.tolist() == [3, 3, 3]
    assert tokenize(tokenizer, [sentence(70)], None, 64, tmp_path).lengths.tolist() == [64]


# -- the tokenizer itself


def test_no_tokenizer_at_hand(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=mentions("model.backbone", "tokenizer", tmp_path, "loaded")):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=mentions("tokenizer.json", "vocab.txt")):
        load_tokenizer(str(tmp_path))


def test_the_network_is_asked_only_for_what_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    folder, asked = save_tokenizer(tmp_path), []
    original = AutoTokenizer.from_pretrained

    def from_pretrained(name: str, local_files_only: bool = False, **options: Any) -> Any:
        asked.append(local_files_only)
        if name == "owner/absent":
            raise OSError("We couldn't connect to the hub.\nMore lines.")
        return original(name, local_files_only=local_files_only, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    load_tokenizer(folder)
    assert asked == [True]
    with pytest.raises(UserError, match=mentions("'owner/absent'", "connect")):
        load_tokenizer("owner/absent")
    assert asked == [True, True, False]


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    """CANINE reads characters and has no fast tokenizer."""
    (tmp_path / "config.json").write_text('{"model_type": "canine"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    with pytest.raises(UserError, match=mentions("CanineTokenizer", "tokenizer")):
        load_tokenizer(str(tmp_path))
