"""The fast attention computes what transformers' own computes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from srlora_pl import SRLoRA, TextClassifier, UserError
from srlora_pl.models.deberta import FastDisentangledAttention, use_fast_attention
from tests.helpers.encoders import BERT, DEBERTA, folder
from tests.helpers.errors import mentions

# 8 buckets reach 4 distances each way and then widen: texts of 30 tokens meet all of them, some several times;
# those of 40 are longer than the encoder was made for.
SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "position_buckets": 8,
    "relative_attention": True,
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def slow_and_fast(**changes: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = DebertaV2Config(**(SHAPE | changes))
    slow = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").double()
    with torch.no_grad():
        for name, parameter in slow.named_parameters():
            if "bias" in name or "rel_embeddings" in name:
                parameter.normal_()  # they begin at zero or near it
    fast = copy.deepcopy(slow)
    use_fast_attention(fast, "toy")
    return slow, fast


def tokens(length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 50, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, (length + 1) // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("buckets", [8, -1])
@pytest.mark.parametrize("length", [1, 2, 5, 30, 40])
def test_outputs_attentions_and_gradients_are_those_of_transformers(length, buckets):
    slow, fast = slow_and_fast(position_buckets=buckets)
    assert sum(isinstance(m, FastDisentangledAttention) for m in fast.modules()) == 2
    assert list(fast.state_dict()) == list(slow.state_dict())
    expected, found = (net(**tokens(length), output_attentions=True) for net in (slow, fast))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-12)
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for output in (expected, found):
        output.logits.square().sum().backward()
    for (name, one), other in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-11, msg=name)
    if length > 1:
        rows = fast.deberta.encoder.rel_embeddings.weight.grad.abs().sum(1) > 0  # the positions play a part
        assert rows.sum() >= min(2 * length - 1, 7)


class Squared(nn.Module):
    """In place of dropout: it acts on each value alone too, and is the same in every shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


@pytest.mark.parametrize("places", [["dropout"], ["pos_dropout"], ["dropout", "pos_dropout"]])
def test_dropout_has_the_places_that_it_has_in_transformers(places):
    slow, fast = slow_and_fast(initializer_range=0.3)  # with smaller weights all attend to all alike
    plain = fast(**tokens(5)).logits
    for net in (slow, fast):
        for layer in net.deberta.encoder.layer:
            for place in places:
                setattr(layer.attention.self, place, Squared())
    expected, found = slow(**tokens(5)).logits, fast(**tokens(5)).logits
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [5, 30])
def test_dropped_positions_are_those_of_transformers(length):
    slow, fast = slow_and_fast(initializer_range=0.3)
    for net in (slow, fast):
        for layer in net.train().deberta.encoder.layer:
            layer.attention.self.pos_dropout = nn.Dropout(0.5)
    plain = fast.eval()(**tokens(length)).logits
    fast.train()
    logits = []
    for net in (slow, fast):
        torch.manual_seed(1)
        logits.append(net(**tokens(length)).logits)
    assert (logits[0] - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_what_it_was(training):
    slow, _ = slow_and_fast()
    slow.train(training)
    use_fast_attention(slow, "toy")
    assert {module.training for module in slow.modules()} == {training}


def test_dropout_acts_in_training_only():
    _, fast = slow_and_fast(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    batch = tokens(5)
    fast.eval()
    assert torch.equal(fast(**batch).logits, fast(**batch).logits)
    attention = fast.deberta.encoder.layer[0].attention.self
    assert (attention.dropout.p, attention.pos_dropout.p) == (0.3, 0.3)
    fast.train()
    assert attention.dropout.training
    assert not torch.equal(fast(**batch).logits, fast(**batch).logits)


@pytest.mark.parametrize("changes", [{"share_att_key": False}, {"pos_att_type": "c2p"}, {"relative_attention": False}])
def test_variants_that_it_does_not_compute_are_refused(changes):
    slow = AutoModelForSequenceClassification.from_config(DebertaV2Config(**(SHAPE | changes)))
    with pytest.raises(UserError, match=mentions("model.fast_attention", "'toy'")):
        use_fast_attention(slow, "toy")


def test_another_encoder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=mentions("model.fast_attention", "DeBERTa-v2")):
        TextClassifier(folder(tmp_path, BERT), 2, SRLoRA(), {"pretrained": False}, fast_attention=True)


def test_an_adapted_classifier_gives_the_same_loss_and_gradients(tmp_path: Path):
    batch = {**tokens(5), "label": torch.tensor([0, 1, 1])}
    path = folder(tmp_path, DEBERTA | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    losses, gradients = [], []
    for fast in (False, True):
        torch.manual_seed(0)
        method = SRLoRA(rank=2, target_rank=4)
        model = TextClassifier(path, 2, method, {"pretrained": False}, fast_attention=fast).double()
        model.adaptation.start()
        loss = model.training_loss(batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
    assert len([name for name in gradients[1] if name.endswith("query_proj.lora_A")]) == DEBERTA["num_hidden_layers"]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-12, msg=name)
