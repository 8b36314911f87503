"""A step on shapes: what it counts equals what a step on values takes, and formulas."""

from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, RobertaConfig

from srlora_pl import CausalLM, Full, ImageClassifier, LinearProbe, LoRA, SRLoRA, TextClassifier
from srlora_pl.lowrank.methods import REGISTRY
from srlora_pl.planning.needs import needs
from srlora_pl.planning.shapes import Shapes
from srlora_pl.planning.step import Step, batch_for, measure
from srlora_pl.util.errors import UserError
from tests.helpers.causal import tiny_llama

RANDOM = {"pretrained": False}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 300}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MATRICES = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128  # of a block: q and o, k and v, the three of its MLP


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A folder with a configuration alone."""
    config = LlamaConfig(**SIZES, **HEADS, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def causal(folder: str, method=None, **kwargs) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(folder, method or LoRA(rank=4), RANDOM, **kwargs)


def parts_of(task, step, devices: int = 1) -> dict[str, tuple[int, int]]:
    return {part.name: (part.device, part.host) for part in needs(task, step, devices).step}


def test_integers_are_computed_and_what_touches_a_weight_is_a_shape() -> None:
    layer = torch.nn.Embedding(10, 4, device="meta")
    with Shapes() as shapes:
        shapes.take(layer)
        ids = torch.arange(6).view(2, 3) % 2
        assert bool((ids == torch.tensor([[0, 1, 0], [1, 0, 1]])).all())
        assert shapes.live == 10 * 4 * 4 + 6 * 8  # all else is gone
        out = layer(ids)
        assert (out.shape, out.device.type) == ((2, 3, 4), "cpu")
        live = shapes.live
        del out
        assert live - shapes.live == 2 * 3 * 4 * 4


def test_a_step_on_shapes_keeps_what_a_step_on_values_keeps(llama: str) -> None:
    step = measure(planned := causal(llama), batch_for(planned, 2, 24), "32-true")
    task = CausalLM(llama, LoRA(rank=4), RANDOM)
    batch = batch_for(task, 2, 24)
    held = {each.untyped_storage().data_ptr() for each in [*task.parameters(), *task.buffers(), *batch.values()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.training_loss(batch)
    assert step.activations - sum(saved.values()) in range(1024)  # the loss itself, and integers
    loss.backward()


def test_weights_optimizer_and_averages_are_those_of_the_formulas(llama: str) -> None:
    task = causal(llama, SRLoRA(rank=4, target_rank=16))
    step = measure(task, batch_for(task, 1, 16), "32-true")
    pairs = 3 * 4 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 128))  # r (in + out) of q, o, k, v and the MLP
    assert sum(p.numel() for p in task.parameters() if p.requires_grad) == pairs
    found = parts_of(task, step)
    frozen = 3 * (MATRICES + 2 * 64) + 64 + 2 * 300 * 64
    assert found["frozen weights, float32"][0] - 4 * frozen in range(257)  # the frequencies of positions
    assert found["adapters, and what else trains"][0] == step.gradients == 4 * pairs
    assert step.optimizer == pytest.approx(8 * pairs, rel=0.01)  # AdamW's two moments, and its counts of steps
    assert step.method == pytest.approx(8 * pairs, rel=0.2)  # two averages, and the history of the directions
    assert found["a copy of the adapted weights, until the first step"] == (0, 4 * 3 * MATRICES)
    spectra = 3 * 16 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 128) + 7)
    assert needs(task, step).on_disk == 4 * spectra


def test_work_is_that_of_the_products(llama: str) -> None:
    """A step with a frozen base takes two passes, with activations computed again three."""
    tokens, length = 32, 16
    kept, again = causal(llama), causal(llama, activation_checkpointing=True)
    step = measure(kept, batch_for(kept, 2, length), "32-true")
    pairs = sum(p.numel() for p in kept.parameters() if p.requires_grad)
    attention = 3 * 4 * length * 64  # scores and values, over the whole square, of a token
    head, base = 2 * 300 * 64, 2 * 3 * MATRICES
    # The head's gradient is computed on the way forward; the pairs' products have a column for the bias.
    forward = tokens * (base + attention + 2 * head + 2 * pairs)
    assert step.forward == pytest.approx(forward, rel=0.05)
    checkpointed = measure(again, batch_for(again, 2, length), "32-true")
    assert checkpointed.forward == step.forward
    assert checkpointed.backward - step.backward == pytest.approx(step.forward - tokens * 2 * head, rel=0.1)
    assert checkpointed.activations < step.activations / 3


def test_a_lower_precision_halves_activations_and_leaves_the_weights(llama: str) -> None:
    one, other = causal(llama), causal(llama)
    full, half = measure(one, batch_for(one, 2, 24), "32-true"), measure(other, batch_for(other, 2, 24), "bf16-mixed")
    assert 0.4 < half.activations / full.activations < 0.75
    assert parts_of(one, full)["frozen weights, float32"] == parts_of(other, half)["frozen weights, float32"]


def test_bfloat16_weights_that_change_keep_their_rest_in_the_machines_memory(llama: str) -> None:
    task = causal(llama, SRLoRA(rank=4, target_rank=16), weights="bfloat16")
    found = parts_of(task, measure(task, batch_for(task, 1, 16), "bf16-mixed"))
    assert found["int16 rests of the weights that change"] == (0, 2 * 3 * MATRICES)
    assert found["frozen weights, bfloat16"][0] >= 2 * 3 * MATRICES


def test_four_bits_a_weight_and_two_bytes_for_64(llama: str) -> None:
    task = causal(llama, weights="bfloat16")
    task.hparams["weights"] = "nf4"
    found = parts_of(task, Step(0, 0, 0, 0, 0, 0, 1, 0, 0))
    assert found["frozen weights, nf4"][0] == 3 * MATRICES * (4 + 16 / 64) / 8
    assert found["frozen weights, bfloat16"][0] >= 2 * 2 * 300 * 64
    assert found["a weight that is read out of four bits"][0] == 2 * 64 * 128


def test_devices_share_the_frozen_weights_of_blocks(llama: str) -> None:
    task = causal(llama)
    step = measure(task, batch_for(task, 1, 16), "32-true")
    alone, shared = parts_of(task, step), parts_of(task, step, devices=4)
    weights = "frozen weights, float32"
    assert shared[weights][0] == alone[weights][0] // 4
    block = 4 * (MATRICES + 2 * 64)
    assert shared["weights gathered for a block and outside of blocks"][0] == 2 * block + 4 * (2 * 300 * 64 + 64)
    assert shared["adapters, and what else trains"] == alone["adapters, and what else trains"]


def test_devices_share_all_of_full_fine_tuning(llama: str) -> None:
    task = causal(llama, {"class_path": "srlora_pl.Full"})
    step = measure(task, batch_for(task, 1, 16), "32-true")
    alone, shared = parts_of(task, step), parts_of(task, step, devices=4)
    for name in ("adapters, and what else trains", "gradients", "states of the optimizer, adamw"):
        assert shared[name][0] == alone[name][0] // 4, name
    block = 4 * (MATRICES + 2 * 64)  # two are whole at a time, and the gradients of one
    assert shared["weights gathered for a block and outside of blocks"][0] == 3 * block + 4 * (2 * 300 * 64 + 64)


def test_split_rests_lie_on_the_device(llama: str) -> None:
    srlora = {"class_path": "srlora_pl.SRLoRA", "init_args": {"rank": 4, "target_rank": 12}}
    task = causal(llama, srlora, weights="bfloat16")
    step, name = measure(task, batch_for(task, 1, 16), "bf16-mixed"), "int16 rests of the weights that change"
    size = 3 * MATRICES * 2
    assert parts_of(task, step)[name] == (0, size)
    assert parts_of(task, step, devices=4)[name] == (size // 4, 0)


FAST = (SRLoRA, Full, LinearProbe)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow, id=kind.__name__) for kind in REGISTRY],
)
def test_every_method_can_be_planned_for(kind, tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    arguments = {"config": {"peft_type": "IA3", "feedforward_modules": [".*down_proj"]}}
    spec = {"class_path": f"srlora_pl.{kind.__name__}", "init_args": arguments if kind.__name__ == "Peft" else {}}
    if kind.__name__ in ("BitFit", "LinearProbe"):  # of which this network has no biases, and no head
        with torch.device("meta"):
            task = ImageClassifier("vit_tiny_in64", 10, spec, RANDOM)
    else:
        task = causal(str(tmp_path), spec)
    step = measure(task, batch_for(task, 2, 16), "32-true")
    trained = sum(p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    assert step.gradients == trained > 0
    assert step.optimizer > 0
    assert step.activations > 0


def test_images_and_encoders_are_planned_for(tmp_path: Path) -> None:
    RobertaConfig(**{**SIZES, "num_attention_heads": 4}, architectures=["RobertaModel"]).save_pretrained(tmp_path)
    with torch.device("meta"):
        text = TextClassifier(str(tmp_path), 3, LoRA(rank=4), RANDOM)
        image = ImageClassifier("vit_tiny_in64", 10, LoRA(rank=4), RANDOM)
    one, two = (measure(text, batch_for(text, n, 32), "32-true").activations for n in (2, 4))
    assert one < two < 2.2 * one
    step = measure(image, batch_for(image, 2, 1), "32-true")
    assert step.tokens == 2
    assert step.forward > 2 * 2 * sum(layer.weight.numel() for layer in image.adaptation.weights.layers.values())


def test_a_network_that_reads_its_weights_is_refused(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = causal(llama)
    monkeypatch.setattr(task, "training_loss", lambda batch: float(task.net.lm_head.weight.sum()))
    with pytest.raises(UserError, match="needs the values of its weights"):
        measure(task, batch_for(task, 1, 16), "32-true")


# Layers, hidden, inner, heads of queries and of keys, size of a head, words, whether the head is the embeddings.
SHAPES = {
    "llama3.2_3b": (LlamaConfig, (28, 3072, 8192, 24, 8, 128, 128256), True),
    "mistral_7b": (MistralConfig, (32, 4096, 14336, 32, 8, 128, 32000), False),
    "gemma2_9b": (Gemma2Config, (42, 3584, 14336, 16, 8, 256, 256000), True),
}
NAMES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@pytest.mark.parametrize("name", SHAPES)
def test_the_papers_models_have_their_sizes(name: str, tmp_path: Path) -> None:
    kind, sizes, tied = SHAPES[name]
    config = kind(**dict(zip(NAMES, sizes, strict=True)), tie_word_embeddings=tied)
    config.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    layers, hidden, inner, heads, keys, size, words = sizes
    outs = [heads * size, keys * size, keys * size, hidden, inner, inner, hidden]
    ins = [hidden, hidden, hidden, heads * size, hidden, hidden, inner]
    adapted = layers * sum(i * o for i, o in zip(ins, outs, strict=True))
    pairs = 32 * layers * sum(ins + outs)
    norms = hidden * (1 + layers * (4 if kind is Gemma2Config else 2))
    task = causal(str(tmp_path), SRLoRA(rank=32), weights="bfloat16")
    parts = {part.name: part for part in needs(task, Step(0, 0, 0, 0, 0, 0, 1, 0, 0)).step}
    weights = 2 * (adapted + norms + words * hidden * (1 if tied else 2))
    assert parts["frozen weights, bfloat16"].device == weights
    assert parts["adapters, and what else trains"].device == 4 * pairs
    assert parts["int16 rests of the weights that change"].host == 2 * adapted


def test_a_start_holds_whole_weights_on_the_host_whatever_the_devices(llama: str) -> None:
    task = causal(llama, SRLoRA(rank=4, target_rank=16), weights="bfloat16")
    one, four = (needs(task, Step(0, 0, 0, 0, 0, 0, 1, 0, 0), devices) for devices in (1, 4))
    assert one.start == four.start
    weights = {part.name: part.host for part in one.start}
    assert weights["int16 rests of the weights that change"] == weights["a copy of the adapted weights"]
    assert weights["a copy of the adapted weights"] == 2 * 3 * MATRICES
