"""``srlora plan``: what it prints, what it advises, and what it refuses."""

import re
from pathlib import Path

import pytest

from tests.helpers.causal import tiny_llama
from tests.helpers.cli import SMALL_RUN, cli, complaint, contents

CAUSAL = """
model:
  class_path: srlora_pl.CausalLM
  init_args:
    backbone: net
    weights: float32
    method: {class_path: srlora_pl.SRLoRA, init_args: {rank: 4, alpha: 4, target_rank: 12}}
data:
  class_path: srlora_pl.InstructionData
  init_args: {root: nowhere.jsonl, max_length: 128, batch_size: 64}
trainer: {precision: bf16-mixed, accumulate_grad_batches: 2}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two configs, and a network that has a configuration alone."""
    (tmp_path / "small.yaml").write_text(SMALL_RUN)
    (tmp_path / "causal.yaml").write_text(CAUSAL)
    tiny_llama().config.save_pretrained(tmp_path / "net")
    config = tmp_path / "net/config.json"
    config.write_text(config.read_text().replace('"architectures": null', '"architectures": ["LlamaForCausalLM"]'))
    return tmp_path


def test_it_tells_the_parts_of_a_run_and_writes_nothing(home: Path) -> None:
    before = contents(home)
    code, out, err = cli("plan", "--config", "causal.yaml", "--memory", 1, home=home)
    assert (code, err) == (0, "")
    assert contents(home) == before
    for part in ("frozen weights, float32", "gradients", "states of the optimizer, adamw", "activations"):
        assert part in out
    assert "micro-batch 64 x 128 tokens" in out
    assert "singular directions on the disk" in out
    assert "It fits" in out
    kept, again = (float(re.search(rf"{way} .* ([\d.]+)$", out, re.M)[1]) for way in ("kept", "again"))
    assert kept > again > 0


def test_what_does_not_fit_gets_changes_until_it_does(home: Path) -> None:
    _, out, _ = cli("plan", "--config", "causal.yaml", "--memory", 0.0000001, home=home)
    ways = re.findall(r"^  (--\S+ \S+|\d+ devices).*: ([\d.]+) GB$", out, re.M)
    assert [way for way, _ in ways][:3] == [
        "--data.batch_size 1",
        "--model.activation_checkpointing true",
        "--model.weights bfloat16",
    ]
    assert "--trainer.accumulate_grad_batches 128" in out
    assert "That is not enough" in out
    enough = float(re.search(r"It does not fit: ([\d.]+) GB", out)[1])
    assert [float(size) for _, size in ways] == sorted((float(size) for _, size in ways), reverse=True)
    assert float(ways[0][1]) <= enough


def test_images_are_planned_for_and_data_that_are_not_here_are_told(home: Path) -> None:
    code, out, _ = cli("plan", "--config", "small.yaml", "--memory", 4, home=home)
    assert code == 0
    assert "micro-batch 32 pictures" in out
    assert "note:" not in out
    _, out, _ = cli("plan", "--config", "small.yaml", "--data.name=null", "--data.root=nowhere", home=home)
    assert "note: the head has 2 outputs here" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "0"], ["--memory is 0.0", "positive"]),
        (["--memory", "much"], ["--memory", "'much'"]),
        (["--devices", "0"], ["--devices is 0", "1 or more"]),
        (["--devices", "2", "--model.method", "srlora_pl.GaLore"], ["--devices is 2", "GaLore"]),
        (["--model.lr", "-1"], ["model.lr is -1.0"]),
        (["--ckpt_path", "causal.yaml"], ["plan takes no --ckpt_path"]),
        (["--model.backbone", "./nothing"], ["./nothing", "does not exist"]),
    ],
)
def test_mistakes_are_told_in_a_sentence(options: list[str], words: list[str], home: Path) -> None:
    code, out, err = cli("plan", "--config", "causal.yaml", *options, home=home)
    assert (code, out) == (2, "")
    assert all(word in complaint(err) for word in words)


def test_four_bits_are_counted_for_methods_that_leave_the_weights(home: Path) -> None:
    lora = ["--model.method", "srlora_pl.LoRA", "--model.method.rank", 4, "--model.weights", "nf4", "--memory", 1]
    _, out, _ = cli("plan", "--config", "causal.yaml", *lora, home=home)
    assert "frozen weights, nf4" in out
    assert "frozen weights, bfloat16" in out  # the embeddings and the head
    code, _, err = cli("plan", "--config", "causal.yaml", "--model.weights", "nf4", home=home)
    assert code == 2
    assert "SRLoRA changes pretrained weights" in complaint(err)
