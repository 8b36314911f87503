"""``export --ckpt_path last``: which run, and which file of it."""

import os
import re

import pytest

from tests.helpers.cli import cli
from tests.helpers.models import vit_folder

RUN = """
model:
  class_path: srlora_pl.ImageClassifier
  init_args: {backbone: vit, method: {class_path: srlora_pl.LoRA, init_args: {rank: 1}}}
data: {class_path: srlora_pl.ImageData, init_args: {name: digits, batch_size: 4}}
trainer: {accelerator: cpu, max_steps: 2, limit_val_batches: 1, limit_test_batches: 1, enable_progress_bar: false}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs of two configs, the first twice, and one of an overlay; that of the other config was written to last."""
    home = tmp_path_factory.mktemp("runs")
    vit_folder(home / "vit")
    for name in ("one", "other"):
        (home / f"{name}.yaml").write_text(RUN)
    (home / "pissa.yaml").write_text("model: {init_args: {method: {class_path: srlora_pl.PiSSA}}}")
    for files in (("one",), ("one",), ("one", "pissa"), ("other",)):
        configs = [word for file in files for word in ("--config", f"{file}.yaml")]
        code, _, err = cli("fit", *configs, "--trainer.val_check_interval", "1", home=home)
        assert code == 0, err
    return home


def taken(home, out, *options):
    code, _, err = cli("export", "--ckpt_path", "last", "--format", "merged", "--output", out, *options, home=home)
    assert code == 0, err
    (found,) = re.findall(r"note: --ckpt_path last takes runs/(\S+), step 2", err)
    assert (out / "model.safetensors").exists()
    return re.sub("checkpoints/.*", "", found)


def test_without_a_config_it_is_the_run_that_was_written_to_last(home, tmp_path):
    assert taken(home, tmp_path / "out") == "other-lora/version_0/"
    for file in (home / "runs/one-lora/version_0/checkpoints").iterdir():
        os.utime(file, (4e9, 4e9))
    assert taken(home, tmp_path / "again") == "one-lora/version_0/"


def test_with_a_config_it_is_its_newest_run(home, tmp_path):
    assert taken(home, tmp_path / "a", "--config", "one.yaml") == "one-lora/version_1/"
    assert taken(home, tmp_path / "b", "--config", "one.yaml", "--config", "pissa.yaml") == "one-pissa/version_0/"


def test_with_a_runs_own_config_it_is_that_run(home, tmp_path):
    own = home / "runs/one-lora/version_0/config.yaml"
    assert taken(home, tmp_path / "out", "--config", own.relative_to(home)) == "one-lora/version_0/"


def test_where_there_is_none_one_sentence_says_so(home, tmp_path):
    options = ("export", "--ckpt_path", "last", "--format", "merged", "--output", "out")
    sentence = "error: --ckpt_path last finds no checkpoint in runs, run fit first or give a file\n"
    assert cli(*options, home=tmp_path) == (2, "", sentence)
    (home / "new.yaml").write_text(RUN)
    code, _, err = cli(*options, "--config", "new.yaml", home=home)
    assert (code, err.count("\n")) == (2, 1)
    assert "finds no checkpoint in runs/new-lora" in err
    assert not (home / "out").exists()
