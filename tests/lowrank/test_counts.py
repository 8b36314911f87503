"""How many parameters train in the networks of the papers."""

import pytest
import timm
import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from srlora_pl.lowrank import Adaptation, BitFit, Full, LinearProbe


def vit() -> nn.Module:
    return timm.create_model("vit_base_patch16_224", num_classes=100)


def deberta() -> nn.Module:
    """DeBERTa-v3-base."""
    attention = {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"}
    attention |= {"share_att_key": True, "pos_att_type": "p2c|c2p", "position_biased_input": False}
    config = DebertaV2Config(vocab_size=128100, hidden_size=768, intermediate_size=3072, type_vocab_size=0, **attention)
    config.num_hidden_layers = config.num_attention_heads = 12
    return DebertaV2ForSequenceClassification(config)


HEADS = {vit: 76_900, deberta: 592_130}


@pytest.mark.parametrize(
    ("make", "method", "beside_the_head"),
    [
        (vit, Full(), 85_875_556 - HEADS[vit]),
        (deberta, Full(), 184_423_682 - HEADS[deberta]),
        (vit, LinearProbe(), 0),
        (deberta, LinearProbe(), 0),
        (vit, BitFit(), 102_912),
        (deberta, BitFit(), 102_912),
    ],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_as_many_parameters_train_as_the_papers_say(make, method, beside_the_head) -> None:
    with torch.device("meta"):
        net = make()
    Adaptation(net, method, ["head"] if make is vit else ["pooler", "classifier"])
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == beside_the_head + HEADS[make]
