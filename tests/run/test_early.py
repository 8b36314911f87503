"""What is refused before torch is imported, and that nothing is refused which an import would let pass."""

import sys
from importlib import import_module

import pytest

import srlora_pl
from srlora_pl.run import source
from srlora_pl.util.signatures import arguments_of_class
from tests.helpers.errors import mentions
from tests.helpers.waiting import run

CLASSES = [
    "srlora_pl.run.trainer.Trainer",
    "lightning.pytorch.callbacks.EarlyStopping",
    "torch.optim.AdamW",
    *(f"srlora_pl.{name}" for name in srlora_pl._METHODS),
    *(f"srlora_pl.{name}" for name in ("ImageClassifier", "TextClassifier", "ImageData", "TextData", "GLUEData")),
]
WATCHED = """
import sys
from srlora_pl.cli import main
code = main(sys.argv[1:])
print(*{"torch", "lightning", "timm", "transformers"} & set(sys.modules))
raise SystemExit(code)
"""


@pytest.mark.parametrize("path", CLASSES)
def test_the_source_says_what_an_import_says(path):
    module, _, name = path.rpartition(".")
    assert source.arguments(path) == arguments_of_class(getattr(import_module(module), name))


@pytest.mark.parametrize("path", ["srlora_pl.Nowhere", "nowhere.Thing", "Thing", "timm.models.VisionTransformer", ""])
def test_what_the_source_does_not_say_is_left_to_the_import(path):
    assert source.arguments(path) is None


OWN = """
from dataclasses import dataclass

from srlora_pl import ImageClassifier, LoRA

class Louder:
    def __init__(self, extra=1, **kwargs):
        super().__init__(**kwargs)

class Mixed(Louder, ImageClassifier):
    pass

@dataclass
class Decorated(LoRA):
    boost: float = 1.0
"""


def test_classes_of_the_user_are_read_as_an_import_reads_them(tmp_path, monkeypatch):
    (tmp_path / "of_the_user").mkdir()
    (tmp_path / "of_the_user/__init__.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert source.arguments("of_the_user.Mixed") == arguments_of_class(import_module("of_the_user").Mixed)
    assert source.arguments("of_the_user.Decorated") is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("fit", "give a task's config with --config NAME, such as quickstart"),
        ("test --ckpt_path last", "give a task's config with --config NAME, such as quickstart"),
        ("fit --config quickstart --model.lrr 1", "--model.lrr is unknown to srlora_pl.ImageClassifier"),
        ("fit --config quickstart --config methods/lora --model.method.rnk=1", "--model.method.rnk is unknown to"),
        ("fit --config quickstart --trainer.max_step 1", "(did you mean 'trainer.max_steps'?)"),
        ("fit --config quickstart --lr 1", "--lr is unknown (did you mean 'model.lr'?)"),
        ("fit --config quickstart --ckpt_path no.ckpt", "--ckpt_path 'no.ckpt' does not exist"),
        (
            "predict --config quickstart --ckpt_path last --data.predict_root no",
            "data.predict_root 'no' does not exist",
        ),
        ("export --ckpt_path no.ckpt --format merged --output out", "--ckpt_path 'no.ckpt' does not exist"),
        ("fit --config quikstart", "(did you mean 'quickstart'?)"),
        ("figures --run no", "--run 'no' does not exist"),
        ("grade no.jsonl", "predictions 'no.jsonl' does not exist"),
        ("compare --config quikstart --output out", "(did you mean 'quickstart'?)"),
        ("compare --config quickstart --methods lora,pisa --output out", "(did you mean 'methods/pissa'?)"),
    ],
)
def test_it_takes_no_import_to_say_so(words, sentence):
    said = run([sys.executable, "-c", WATCHED, *words.split()])
    assert (said.returncode, said.stdout.strip()) == (2, "")
    assert said.stderr.startswith("error: ")
    assert sentence in said.stderr


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        ("fit --config minilm_cola_srlora", "transformers", "text"),
        ("fit --config quickstart --model.method srlora_pl.Peft", "peft", "peft"),
        ("fit --config quickstart --model.weights nf4", "bitsandbytes", "nf4"),
        ("figures --run .", "matplotlib", "figures"),
        ("compare --config quickstart --output out", "scipy", "figures"),
        ("fit --config quickstart --data.name null --data.root me/somewhere", "datasets", "hub"),
    ],
)
def test_a_missing_extra_is_named(words, package, extra, monkeypatch, capsys):
    monkeypatch.setattr("srlora_pl.util.program.find_spec", lambda name: None if name == package else name)
    assert srlora_pl.cli.main(words.split()) == 2
    assert f"needs the package {package}: pip install 'srlora_pl[{extra}]'" in capsys.readouterr().err


def test_in_python_a_missing_extra_is_an_import_error(monkeypatch):
    monkeypatch.setattr("srlora_pl.util.program.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=mentions("srlora_pl.TextClassifier", "srlora_pl[text]")):
        from srlora_pl import TextClassifier  # noqa: F401
