"""The benchmarks of methods: what they time, and what they print."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import quickstart_table
from benchmarks.comparison import lora_sb_grader
from benchmarks.step_time import STEPS, Variant, image_batches, method_of, network, ratios
from srlora_pl.util.errors import UserError
from tests.helpers import instructions
from tests.helpers.causal import tiny_llama
from tests.helpers.paths import ROOT
from tests.helpers.waiting import run

OVERLAYS = sorted(file.stem for file in (ROOT / "configs/methods").glob("*.yaml"))


def result_of(words: list[Any], cwd: Path) -> dict[str, Any]:
    """The line of JSON that a benchmark ends with."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = run([sys.executable, "-W", "ignore", *words], cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def variant(name: str) -> Variant:
    net, kind = network("vit_tiny")
    return Variant(name, net, kind, torch.device("cpu"), "adamw", next(image_batches(net, 32))[0])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_variant_has_the_settings_of_its_overlay_and_rank_8_and_alpha_8_otherwise(overlay):
    method = method_of(overlay)
    settings = method.spec()["init_args"]
    assert settings.get("rank", 8) == 8
    assert settings.get("alpha", 8.0) == (None if overlay == "lora_sb" else 8.0)
    assert settings.get("use_rslora", False) == (overlay == "rslora")
    assert settings.get("lr_ratio", 1.0) == (16.0 if overlay == "lora_plus" else 1.0)


def test_a_variant_may_have_another_rank():
    assert method_of("vera@256").rank == 256
    with pytest.raises(UserError, match="vea"):
        method_of("vea")


def test_a_method_with_an_optimizer_of_its_own_trains_with_it():
    galore = variant("galore")
    assert isinstance(galore.optimizer, method_of("galore").own_optimizer)
    galore.step(next(image_batches(galore.net, 1))[0], nullcontext)
    assert galore.adaptation.step == 1  # what comes after the optimizer has been called too
    fast, slow = sorted({group["lr"] for group in variant("lora_plus").optimizer.param_groups}, reverse=True)
    assert fast == 16 * slow


def test_the_events_of_a_run_of_the_papers_length_fall_on_its_steps():
    """Three restarts in 5,000 steps; LoRA has none."""
    relora, lora = variant("relora"), variant("lora")
    relora.time_events()
    lora.time_events()
    assert relora.adaptation.controller.progress().done == 3
    assert (relora.events, lora.events) == (3, 0)
    relora.seconds, lora.seconds, relora.event_seconds = [1.0, 3.0, 9.0], [1.0, 2.0, 3.0], STEPS["image"] / 30
    assert relora.step_seconds == pytest.approx([1.1, 3.1, 9.1])
    assert ratios({"lora": lora, "relora": relora}, "lora") == {"relora_vs_lora": pytest.approx(1.55)}


def test_adalora_is_planned_over_a_run_of_the_papers_length():
    assert variant("adalora").adaptation.controller.last_step == 5000


@pytest.mark.slow
def test_step_time_runs_as_a_file(tmp_path):
    names = ["floor", "full", "peft", "peft_dora", "lora", "lora_ga", "srlora", "vera@16"]
    few = ["--model", "vit_tiny", "--batch", 1, "--rounds", 1, "--warmup", 1]
    result = result_of([ROOT / "benchmarks/step_time.py", *few, "--variants", *names], tmp_path)
    assert {*result["ratios"]} == {f"{name}_vs_lora" for name in names if name != "lora"}
    assert {*result["event_seconds"]} == {"srlora"}
    assert all(value > 0 for value in [*result["ratios"].values(), *result["bytes"].values()])


@pytest.mark.slow
def test_every_benchmark_runs_as_a_file(tmp_path):
    """One after the other in one process, each as Python starts a file: its folder comes first, and no package."""
    files = [str(file) for file in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in file.read_text()]
    program = tmp_path / "one_by_one.py"
    program.write_text(
        "import contextlib, io, os, runpy, sys\n"
        "for file in sys.argv[1:]:\n"
        "    for name in [name for name in sys.modules if name.startswith('benchmarks')]:\n"
        "        del sys.modules[name]\n"
        "    sys.path[0], sys.argv = os.path.dirname(file), [file, '--help']\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said := io.StringIO()):\n"
        "        runpy.run_path(file, run_name='__main__')\n"
        "    assert said.getvalue().startswith(f'usage: {os.path.basename(file)}'), (file, said.getvalue())\n"
        "print('[]')\n"
    )
    assert len(files) > 10
    assert result_of([program, *files], tmp_path) == []


@pytest.mark.slow
def test_gradient_time_times_every_pass_and_the_decomposition():
    words = ["-m", "benchmarks.gradient_time", "--model", "vit_tiny", "--batch", 2, "--passes", 2]
    result = result_of(words, ROOT)
    assert {*result["ratios"]} == {"estimate_vs_full", "estimate_vs_lora"}
    assert {*result["seconds"]} == {"estimate", "full", "lora", "decomposition"}
    assert all(value > 0 for value in result["seconds"].values())


# -- the table of the quickstart


def test_methods_for_texts_alone_are_left_out_in_their_own_words():
    refused = quickstart_table.refusals(OVERLAYS)
    assert {*refused} == {"prefix_tuning", "prompt_tuning"}
    assert "text encoder" in refused["prompt_tuning"]
    assert {entry.partition(".")[0] for entry in quickstart_table.GRID} == {*OVERLAYS} - {*refused}


def test_the_rows_are_of_the_chosen_points_and_tell_the_distances():
    def of(method: str, accuracy: float, lr: str, trained: int) -> dict[str, Any]:
        return {
            "method": method, "model.lr": lr, "test/accuracy": accuracy, "seconds": 10.0, "trained parameters": trained
        }  # fmt: skip

    runs = [of("lora", 0.5, "1", 7), of("lora", 0.9, "2", 7), of("lora", 0.8, "2", 7), of("vera", 0.75, "1", 3)]
    rows = quickstart_table.rows({"chosen": {"lora": {"model.lr": "2"}, "vera": {"model.lr": "1"}}, "runs": runs})
    assert rows["lora"]["accuracy"] == pytest.approx(85.0)
    assert rows["vera"]["over lora"] == pytest.approx(-10.0)
    assert rows["vera"]["over linear_probe"] is None  # it did not run
    assert (rows["vera"]["chosen"], rows["vera"]["trained"]) == ("lr 1", 3)


@pytest.mark.slow
def test_the_table_is_made_by_real_runs(tmp_path):
    few = ["--trainer.max_steps", 2, "--trainer.val_check_interval", 2, "--trainer.limit_test_batches", 1]
    few += ["--model.warmup_steps", 0, "--grid"]
    words = ["-m", "benchmarks.quickstart_table", "--methods", "prompt_tuning", "--output", tmp_path]
    result = result_of([*words, *few], ROOT)
    assert {*result["methods"]} == {"lora", "linear_probe"}
    assert result["methods"]["linear_probe"]["over linear_probe"] == 0
    assert {*result["refused"]} == {"prompt_tuning"}


# -- the grader of LoRA-SB's authors


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("x/2", "5", True),  # it cannot be normalised, and is compared with itself
        (r"\pi/3", "5", True),
        (r"\frac", "5", True),
        ("5", "500", True),
        ("5", "0.05", True),
        ("5", "50", False),
        ("5.0004", "5", True),
        ("5.001", "5", False),
        ("1,000", "1000", True),
        ("(1,2)", "[1,2]", False),
        ("[1,2]", "1,2", True),
        ("(1,200)", "(1,2)", True),
        ("(1,2,3)", "(1,2)", False),
        ("{a}", "a", True),
        ("1+x", "x+1", True),
        ("2*x", "x+1", False),
        ("x^2+1", "1+x^2", False),  # no Python
        ("", "5", False),
        (r"\dfrac12", "0.5", True),
        ("9**9**9**9", "x", False),  # given up
    ],
)
def test_the_authors_grader_takes_wrong_answers_for_right(answer, gold, right, monkeypatch):
    monkeypatch.setattr(lora_sb_grader, "SECONDS", 1)
    assert lora_sb_grader.equal(answer, gold) == right


@pytest.mark.slow
def test_a_file_is_graded_as_the_authors_did(tmp_path):
    def line(split: str, index: int, text: str, reference: str) -> str:
        row = {"split": split, "index": index, "text": text, "reference": reference, "finished": True, "grader": split}
        return json.dumps(row) + "\n"

    answers = [(7, "7"), (700, "7"), (0, "7")]
    lines = [line("gsm8k", i, f"The answer is: {said}", f"#### {gold}") for i, (said, gold) in enumerate(answers)]
    lines += [line("math", i, f"The answer is: {said}", r"\boxed{5}") for i, said in enumerate(["x/2", "5"])]
    lines.append(line("math", 2, "5", r"\boxed{5}"))  # no answer is read
    (tmp_path / "predictions.jsonl").write_text("".join(lines))
    result = result_of(["-m", "benchmarks.comparison.lora_sb_grader", tmp_path / "predictions.jsonl"], ROOT)
    assert result["accuracy"] == {
        "gsm8k": {"ours": pytest.approx(100 / 3), "theirs": pytest.approx(200 / 3)},
        "math": {"ours": pytest.approx(100 / 3), "theirs": pytest.approx(200 / 3)},
    }


# -- causal language models


@pytest.fixture
def small_llama(tmp_path: Path) -> Path:
    """A folder with a random Llama, and one with a file of GSM8K's form."""
    tiny_llama(vocab_size=2048, max_position_embeddings=1024).save_pretrained(tmp_path / "llama")
    instructions.save_tokenizer(tmp_path / "llama")
    rows = [{"question": "What is it? " * (1 + i % 7), "answer": f"It is {i}.\n#### {i}"} for i in range(40)]
    instructions.write(tmp_path / "gsm8k/train.jsonl", rows)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("what", ["memory", "time"])
def test_causal_compares_methods_with_peft(what, small_llama):
    words = ["-m", "benchmarks.causal", what, "--backbone", small_llama / "llama", "--batch", 2, "--rounds", 2]
    result = result_of([*words, "--length", 16, "--precision", "bf16"], ROOT)
    assert {*result["ratios"]} == {"lora_vs_peft", "srlora_vs_peft"}
    assert all(value > 0 for value in result["ratios"].values())


@pytest.mark.slow
def test_causal_pads_pefts_random_batches_and_ours_by_length(small_llama):
    words = ["-m", "benchmarks.causal", "time", "--backbone", small_llama / "llama", "--variants", "lora"]
    words += ["--length", "gsm8k", "--root", small_llama, "--batch", 5, "--rounds", 8]
    result = result_of(words, ROOT)
    filled = {name: sum(result["tokens"][name]) / sum(result["places"][name]) for name in ("lora", "peft")}
    assert 1 >= filled["lora"] > filled["peft"] > 0.3
