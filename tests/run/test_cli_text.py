"""Texts through the command line: a small encoder, GLUE's files and a CSV, and what is left behind."""

import csv
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from srlora_pl import GLUEData, SRLoRA, TextClassifier
from tests.helpers.cli import cli, scores
from tests.helpers.encoders import BERT, folder
from tests.helpers.texts import GLUE_HEADS, WORDS, cola, save_tokenizer, sentence, write


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with an encoder and its tokenizer in it."""
    folder(tmp_path / "encoder", BERT | {"vocab_size": len(WORDS), "max_position_embeddings": 128})
    save_tokenizer(tmp_path / "encoder", model_max_length=128)
    return tmp_path


def config(home: Path, data: dict[str, Any]) -> Path:
    method = {"class_path": "srlora_pl.SRLoRA", "init_args": {"rank": 2, "alpha": 2, "target_rank": 6}}
    model = {"backbone": "encoder", "backbone_kwargs": {"pretrained": False}, "method": method, "lr": 0.01}
    trainer = {"accelerator": "cpu", "max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None}
    quiet = {"log_every_n_steps": 2, "enable_model_summary": False, "enable_progress_bar": False}
    kind = "TextData" if "text_column" in data else "GLUEData"
    data = {"batch_size": 8, "cache_dir": str(home / "cache")} | data
    settings = {
        "model": {"class_path": "srlora_pl.TextClassifier", "init_args": model},
        "data": {"class_path": f"srlora_pl.{kind}", "init_args": data},
        "trainer": trainer | quiet,
    }
    file = home / "text.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def fit(home: Path, data: dict[str, Any]) -> tuple[Path, str]:
    """A run, as its folder and what it printed."""
    code, out, err = cli("fit", "--config", config(home, data), home=home)
    assert code == 0, err
    return home / "runs/text-srlora/version_0", out


def predict(home: Path, run: Path, *options: str) -> tuple[int, str, str]:
    return cli("predict", "--config", "text.yaml", "--ckpt_path", run / "checkpoints/last.ckpt", *options, home=home)


def test_glue_from_fit_to_submission(home):
    cola(home / "glue")
    run, out = fit(home, {"task": "cola", "root": "glue", "val_fraction": 0.2})
    assert set(scores(out)) >= {"test/loss"}
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"val/matthews", "val/score", "val/loss", "test/matthews"} <= set(rows[0])
    assert [row["step"] for row in rows if row["val/loss"]] == ["3", "7", "11"]
    code, out, err = predict(home, run)
    assert code == 0, err
    assert "7 predictions written to runs/text-srlora/version_0/CoLA.tsv" in out
    for part in ("--trainer.limit_predict_batches=1", "--trainer.fast_dev_run=true"):
        code, out, err = predict(home, run, "--data.batch_size=4", part)
        assert code == 0, err
        assert "4 of 7 predictions written to runs/text-srlora/version_0/CoLA.part.tsv\n" in out
    lines = (run / "CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(7)]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}
    assert predict(home, run, "--output", "mine")[0] == 0
    assert (home / "mine/CoLA.tsv").read_text() == (run / "CoLA.tsv").read_text()


def test_mnli_has_two_dev_sets_and_two_submissions(home):
    words = ("entailment", "neutral", "contradiction")
    with_label, without = GLUE_HEADS["MNLI"]
    for split, count in {"train": 40, "dev_matched": 9, "dev_mismatched": 12}.items():
        rows = (f"{i}\tg\tp\t{sentence(3, i)}\t{sentence(2, i)}\tx\t{words[i % 3]}" for i in range(count))
        write(home / "glue/MNLI" / f"{split}.tsv", with_label, *rows)
    for split, count in {"test_matched": 5, "test_mismatched": 4}.items():
        rows = (f"{i}\tg\tp\t{sentence(3, i)}\t{sentence(2, i)}" for i in range(count))
        write(home / "glue/MNLI" / f"{split}.tsv", without, *rows)
    run, out = fit(home, {"task": "mnli", "root": "glue"})
    assert set(scores(out)) == {f"test{mm}/{name}" for mm in ("", "_mm") for name in ("loss", "accuracy", "score")}
    with (run / "metrics.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["val/loss"]][-1]
    assert float(last["val_mm/accuracy"]) * 12 == pytest.approx(round(float(last["val_mm/accuracy"]) * 12), abs=1e-5)
    assert last["val_mm/loss"] != last["val/loss"]
    code, out, err = predict(home, run)
    assert code == 0, err
    assert "9 predictions written to" in out
    for file, count in {"MNLI-m.tsv": 5, "MNLI-mm.tsv": 4}.items():
        lines = [line.split("\t") for line in (run / file).read_text().splitlines()]
        assert [line[0] for line in lines] == ["index", *map(str, range(count))]
        assert {line[1] for line in lines[1:]} <= set(words)


def test_own_texts_with_several_labels(home):
    labels = ("a", "b", '"a,b"', '""')
    for split, count in {"train": 40, "val": 10, "test": 6}.items():
        write(home / f"texts/{split}.csv", "text,label", *(f"{sentence(3, i)},{labels[i % 4]}" for i in range(count)))
    run, out = fit(home, {"root": "texts", "text_column": "text", "problem": "multi_label"})
    assert set(scores(out)) == {"test/loss", "test/f1", "test/accuracy", "test/score"}
    code, out, err = predict(home, run)
    assert code == 0, err
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["sample", "label", "probability_a", "probability_b"]
    assert [row["sample"] for row in rows] == [str(i) for i in range(6)]
    for row in rows:
        assert row["label"] == "|".join(name for name in "ab" if float(row[f"probability_{name}"]) > 0.5)

    (home / "texts/test.csv").rename(home / "new.csv")
    shutil.rmtree(home / "texts")  # what the model was trained on is not needed any more
    code, out, err = predict(home, run, "--data.predict_root=new.csv", "--output=mine.csv")
    assert code == 0, err
    assert (home / "mine.csv").read_text() == (run / "predictions.csv").read_text()
    code, out, err = predict(home, run, "--data.predict_root=new.csv", "--data.problem=regression")
    assert code == 2
    assert "data.problem is 'regression', but the model was trained on 2 classes" in err
    code, out, err = cli("fit", "--config", "text.yaml", "--data.class_names=[a,b]", home=home)
    assert code == 2
    assert "data.class_names stands for the files of a trained model: leave it out" in err


def test_class_weights_by_name_outlive_the_config_file(home):
    """YAML reads the names of these classes as true, as a number and as nothing."""
    labels = ("yes", "1e-3", "null")
    write(home / "texts/train.csv", "text,label", *(f"{sentence(3, i)},{labels[i % 3]}" for i in range(40)))
    weights = "{null: 2, yes: 4, 1e-3: 3}"
    file = config(home, {"root": "texts", "text_column": "text"})
    code, _, err = cli("fit", "--config", file, "--model.class_weights", weights, home=home)
    assert code == 0, err
    run = home / "runs/text-srlora/version_0"
    last = run / "checkpoints/last.ckpt"

    def kept() -> tuple[list[str], list[float]]:
        content = torch.load(last, weights_only=True)
        return content["TextData"]["class_names"], content["hyper_parameters"]["class_weights"]

    assert kept() == (["1e-3", "null", "yes"], [3.0, 2.0, 4.0])
    own = ("--config", run / "config.yaml", "--ckpt_path", "last")
    code, _, err = cli("fit", *own, "--trainer.max_steps=14", home=home)
    assert code == 0, err
    assert kept() == (["1e-3", "null", "yes"], [3.0, 2.0, 4.0])
    write(home / "new.csv", "text", "w1 w2")
    shutil.rmtree(home / "texts")
    code, _, err = cli("predict", *own, "--data.predict_root=new.csv", home=home)
    assert code == 0, err
    code, _, err = cli("export", "--ckpt_path", last, "--format", "merged", "--output", "merged", home=home)
    assert code == 0, err


def test_a_resumed_run_on_texts_equals_the_uninterrupted_one(home, monkeypatch):
    monkeypatch.chdir(home)
    cola(home / "glue")

    def run(checkpoint: str | None, *callbacks: ModelCheckpoint) -> TextClassifier:
        L.seed_everything(5, verbose=False)
        method = SRLoRA(rank=2, target_rank=6)
        model = TextClassifier("encoder", 2, method, {"pretrained": False}, lr=0.01, warmup_steps=3)
        data = GLUEData("cola", "glue", batch_size=8, val_fraction=0.2, cache_dir=str(home / "cache"))
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=12,
            val_check_interval=4,
            check_val_every_n_epoch=None,
            callbacks=list(callbacks),
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=bool(callbacks),
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return model

    keep = ModelCheckpoint(home / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(None, keep)
    assert whole.adaptation.controller.progress().done == 3
    for step in (3, 7):  # at a switch; inside an epoch
        resumed = run(str(home / f"kept/step={step}.ckpt"))
        states = whole.state_dict(), resumed.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
