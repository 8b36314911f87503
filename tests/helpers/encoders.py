"""Encoders and tokens of a few kilobytes, in the form that the text task meets them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from srlora_pl.data.base import DataModule, KeyedDataset, split_keys
from srlora_pl.data.loader import Key
from srlora_pl.data.protocols import Batch
from srlora_pl.models.encoders import find_head

VOCABULARY = 50
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DEBERTA: dict[str, Any] = BERT | {
    "model_type": "deberta-v2",
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
# What microsoft/deberta-v3-base's own config.json says.
DEBERTA_V3_BASE: dict[str, Any] = DEBERTA | {
    "vocab_size": 128_100,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "position_buckets": 256,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pooler_dropout": 0,
    "pooler_hidden_act": "gelu",
}


def folder(path: Path, config: dict[str, Any]) -> str:
    """A model's folder with nothing but its configuration."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def build_encoder(*arguments: Any) -> Any:
    """The network of `find_head`."""
    return find_head(*arguments)[0]


def samples(count: int, label: Tensor, length: int = 9) -> list[dict[str, Tensor]]:
    """Random tokens, padded; sample i has ``label[i]``."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (count, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(3, length + 1, (count, 1), generator=generator)).long()
    return [
        {"input_ids": tokens[i] * mask[i], "attention_mask": mask[i], "label": label[i], "index": torch.tensor(i)}
        for i in range(count)
    ]


class Data(L.LightningDataModule):
    """What a DataModule of texts says about itself, and loaders of ``sets``: two of them are MNLI's."""

    def __init__(self, *sets: list[dict[str, Tensor]], batch_size: int = 4, **says: Any) -> None:
        super().__init__()
        self.loaders = [DataLoader(each, batch_size=batch_size) for each in sets]  # type: ignore[arg-type]
        for name, value in says.items():
            setattr(self, name, value)

    def train_dataloader(self) -> DataLoader:
        return self.loaders[0]

    def val_dataloader(self) -> list[DataLoader]:
        return self.loaders

    test_dataloader = predict_dataloader = val_dataloader


class Rows(KeyedDataset):
    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        return default_collate([self.rows[i] for i in split_keys(keys)[0].tolist()])


class ShuffledData(DataModule):
    """``rows`` in batches of 4, in the package's own order, that resumes."""

    num_classes, class_names = 2, ["0", "1"]

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        super().__init__(batch_size=4, val_fraction=0.0, seed=0, num_workers=0)
        self.rows = rows

    def load(self, stage: str) -> None:
        self.train_set = Rows(self.rows)
