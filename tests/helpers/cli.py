"""The command line inside the tests' own process, and a small run for it."""

import contextlib
import io
import re
from pathlib import Path

from srlora_pl.cli import main
from tests.helpers.paths import ROOT

LORA = ROOT / "configs/methods/lora.yaml"
SMALL_RUN = """
seed_everything: 3
model:
  class_path: srlora_pl.ImageClassifier
  init_args:
    backbone: vit_tiny_patch16_224
    backbone_kwargs:
      {pretrained: false, img_size: 16, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, class_token: true}
    method: {class_path: srlora_pl.SRLoRA, init_args: {rank: 4, alpha: 4, target_rank: 12}}
    optimizer: adamw
    lr: 0.01
data:
  class_path: srlora_pl.ImageData
  init_args: {name: digits, batch_size: 32, hflip: false, crop_scale: [0.7, 1.0]}
trainer:
  accelerator: cpu
  max_steps: 12
  val_check_interval: 4
  check_val_every_n_epoch: null
  log_every_n_steps: 2
  limit_val_batches: 2
  limit_test_batches: 3
  enable_model_summary: false
"""


def cli(*arguments: object, home: Path) -> tuple[int, str, str]:
    """`main` on ``arguments`` in the folder ``home``: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def scores(text: str) -> dict[str, float]:
    """The scores of a printed table."""
    return {name: float(value) for name, value in re.findall(r"│ (\w+/\w+)\s*│ ([\d.]+)", text)}


def contents(home: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(home)): path.read_bytes() if path.is_file() else None for path in home.rglob("*")}


def complaint(err: str) -> str:
    """The one sentence in what a command wrote to stderr; notes may stand before it."""
    *notes, last = err.splitlines()
    assert last.startswith("error: "), err
    assert all(line.startswith(("note: ", "Generating ")) for line in notes if line), err
    return last
