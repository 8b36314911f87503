"""A causal language model on the command line: fit, test, grade, predict, export, and a kill while it answers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.helpers.causal import save_llama
from tests.helpers.cli import cli, complaint, scores
from tests.helpers.instructions import write
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = {
    "seed_everything": 3,
    "model": {
        "class_path": "srlora_pl.CausalLM",
        "init_args": {
            "backbone": "llama",
            "method": {"class_path": "srlora_pl.SRLoRA", "init_args": {"rank": 2, "target_rank": 4}},
            "lr": 0.01,
            "samples": 2,
        },
    },
    "data": {
        "class_path": "srlora_pl.InstructionData",
        "init_args": {
            "root": "texts",
            "template": "Question: {prompt}\nAnswer: ",
            "batch_size": 2,
            "max_length": 64,
            "grader": "exact",
            "max_new_tokens": 4,
            "cache_dir": "tokens",
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 8,
        "val_check_interval": 4,
        "log_every_n_steps": 2,
        "enable_model_summary": False,
    },
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run and what it said."""
    home = tmp_path_factory.mktemp("causal")
    save_llama(home / "llama")
    rows = [{"prompt": f"how {i}", "answer": "yes " * (1 + i % 5)} for i in range(20)]
    for name, part in {"train": rows, "val": rows[:4], "test": rows[4:9]}.items():
        write(home / "texts" / f"{name}.jsonl", part)
    write(home / "asked.jsonl", [{"prompt": "what now"}, {"prompt": "how"}])
    (home / "own.yaml").write_text(yaml.safe_dump(CONFIG))
    code, out, err = cli("fit", "--config", "own.yaml", home=home)
    assert code == 0, err
    return home, out


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_shows_what_it_trains_on_and_scores_its_answers(fitted):
    home, out = fitted
    assert "Question: how" in out
    assert ">>>yes" in out
    assert {"test/accuracy", "test/unfinished", "test/unreadable", "test/score"} <= scores(out).keys()
    (version,) = home.glob("runs/own-srlora/version_0")
    answers = rows(version / "predictions.jsonl")
    assert [row["index"] for row in answers] == list(range(5))
    assert all(row["prompt"].startswith("Question: how") and row["reference"].startswith("yes") for row in answers)
    assert scores(out)["test/accuracy"] == sum(bool(row["correct"]) for row in answers) / 5
    samples = rows(version / "samples.jsonl")
    assert [(row["step"], row["index"]) for row in samples] == [(4, 0), (4, 1), (8, 0), (8, 1)]


def test_a_test_of_the_checkpoint_gives_the_answers_again_and_grade_reads_them(fitted):
    home, out = fitted
    (version,) = home.glob("runs/own-srlora/version_0")
    before = (version / "predictions.jsonl").read_text()
    best = next(file for file in (version / "checkpoints").iterdir() if file.name.startswith("best"))
    code, said, err = cli("test", "--config", "own.yaml", "--ckpt_path", best, home=home)
    assert code == 0, err
    assert scores(said) == {name: value for name, value in scores(out).items() if name.startswith("test")}
    assert (version / "predictions.jsonl").read_text() == before
    code, said, err = cli("grade", version / "predictions.jsonl", home=home)
    assert code == 0, err
    assert f"| {100 * scores(out)['test/accuracy']:.2f} |" in said


def test_prompts_are_answered_in_json_lines(fitted):
    home, _ = fitted
    asked = ("predict", "--config", "own.yaml", "--ckpt_path", "last", "--data.predict_root", "asked.jsonl")
    code, out, err = cli(*asked, "--output", "answers.jsonl", home=home)
    assert code == 0, err
    assert "2 predictions written to answers.jsonl" in out
    found = rows(home / "answers.jsonl")
    assert [row["prompt"] for row in found] == ["Question: what now\nAnswer: ", "Question: how\nAnswer: "]
    assert all(set(row) == {"index", "prompt", "text", "finished"} for row in found)
    code, out, err = cli(*asked, home=home)
    assert code == 0, err
    assert (home / "runs/own-srlora/version_0/completions.jsonl").read_text() == (home / "answers.jsonl").read_text()


def test_the_merged_folder_answers_as_the_run_did(fitted):
    home, _ = fitted
    code, _, err = cli(
        "export", "--ckpt_path", "last", "--format", "merged", "--output", "merged", "--model_card", home=home
    )
    assert code == 0, err
    card = (home / "merged/README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    net = AutoModelForCausalLM.from_pretrained(home / "merged")
    code, _, err = cli(
        "test", "--config", "own.yaml", "--model.backbone", "merged", "--config", ROOT / "configs/methods/lora.yaml",
        home=home,
    )  # fmt: skip
    assert code == 0, err
    assert net.dtype == torch.float32
    untrained = rows(next(home.glob("runs/own-lora/untrained/predictions.jsonl")))
    assert untrained == rows(home / "runs/own-srlora/version_0/predictions.jsonl")


def test_predictions_replace_nothing_that_is_read(fitted):
    home, _ = fitted
    before = (home / "asked.jsonl").read_bytes(), (home / "texts/train.jsonl").read_bytes()
    for output in ("asked.jsonl", "texts/train.jsonl"):
        asked = ("predict", "--config", "own.yaml", "--ckpt_path", "last", "--data.predict_root", "asked.jsonl")
        code, _, err = cli(*asked, "--output", output, home=home)
        assert code == 2
        assert "which would be gone" in complaint(err)
    assert before == ((home / "asked.jsonl").read_bytes(), (home / "texts/train.jsonl").read_bytes())


def test_a_template_on_the_command_line_is_text_and_another_one_than_the_runs_is_told(fitted):
    home, _ = fitted
    asked = ("predict", "--config", "own.yaml", "--ckpt_path", "last", "--data.predict_root", "asked.jsonl")
    code, _, err = cli(*asked, "--data.template", r"Q: {prompt}\nA: ", "--output", "other.jsonl", home=home)
    assert code == 0, err
    assert [row["prompt"] for row in rows(home / "other.jsonl")] == ["Q: what now\nA: ", "Q: how\nA: "]
    assert "data.template is 'Q: {prompt}\\nA: ', but the run was trained with 'Question" in err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.weights=nf4", "SRLoRA"),
        ("--model.weights=int8", "model.weights"),
        ("--model.loss_chunk=0", "model.loss_chunk"),
        ("--model.train_head=true", "model.train_head"),
        ("--trainer.precision=bf16-true", "bf16-true"),
        ("--model.backbone=no/such-model", "no/such-model"),
        ("--data.grader=gsm9k", "gsm8k"),
        ("--data.max_length=4096", "data.max_length"),
        ("--data.options=[yes, no]", "put text in quotes"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(option, said, fitted):
    home, _ = fitted
    before = {*home.rglob("*")}
    code, _, err = cli("fit", "--config", "own.yaml", option, "--name", "bad", home=home)
    assert code == 2
    assert said in complaint(err)
    assert {path for path in {*home.rglob("*")} - before if "cache" not in str(path)} == set()


_KILLED = """
import os, signal, sys
from srlora_pl.cli import main
from srlora_pl.tasks.causal import CausalLM
complete, calls = CausalLM.complete, []
def killed(self, batch, settings):
    calls.append(1)
    if len(calls) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return complete(self, batch, settings)
CausalLM.complete = killed
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_kill_while_it_answers_loses_nothing(fitted):
    home, _ = fitted
    (version,) = home.glob("runs/own-srlora/version_0")
    whole = (version / "predictions.jsonl").read_text()
    (version / "predictions.jsonl").unlink()
    best = next(file for file in (version / "checkpoints").iterdir() if file.name.startswith("best"))
    test = ["test", "--config", "own.yaml", "--ckpt_path", str(best), "--data.eval_batch_size=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", _KILLED, *test], cwd=home, env=environment, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    (part,) = version.glob("predictions.jsonl.*.part")
    left = rows(part)
    assert len(left) == 2
    left[0]["text"] = "kept"  # so that it is seen to be taken
    part.write_text("".join(f"{json.dumps(row)}\n" for row in left) + '{"split": "te')
    code, _, err = cli(*test, home=home)
    assert code == 0, err
    after = rows(version / "predictions.jsonl")
    assert sum(row["text"] == "kept" for row in after) == 1
    expected = [json.loads(line) for line in whole.splitlines()]
    assert [row for row in after if row["text"] != "kept"] == [
        e for e, a in zip(expected, after, strict=True) if a["text"] != "kept"
    ]
