"""Files may come from anyone: none of them runs code, and no name in them says where to write or what to delete."""

import json
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torchvision.datasets import CIFAR10

from srlora_pl import ImageClassifier, ImageData, LoRA, UserError
from tests.helpers.cli import cli, complaint, contents
from tests.helpers.encoders import BERT, build_encoder, folder
from tests.helpers.errors import mentions
from tests.helpers.texts import save_tokenizer
from tests.helpers.user_folder import FIT, encoder, pictures, texts

pytestmark = pytest.mark.usefixtures("no_network")
CHECKPOINT_KEYS = ("state_dict", "srlora", "exact_resume", "hyper_parameters", "loops", "callbacks", "optimizer_states")


class Payload:
    """Writes ``marker`` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    """What a payload writes; it must not be there in the end."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


@pytest.fixture
def user(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with runs, checkpoints and data in it, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(home, tmp_path / "home"))


def program(marker: Path) -> str:
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"


def refused(*arguments: str, home: Path) -> str:
    code, _, err = cli(*arguments, home=home)
    assert code == 2, err
    return complaint(err)


def test_a_payload_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "pickle")))
    torch.save(Payload(tmp_path / "torch"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    exec(program(tmp_path / "program"))
    assert {path.name for path in tmp_path.iterdir()} == {"pickle", "torch", "program", "file"}


# -- checkpoints


def evil_checkpoint(file: Path, form: str, marker: Path) -> None:
    """In place of a sound checkpoint one with a payload: a bare pickle, torch's old form, or under a key."""
    content = torch.load(file, weights_only=True)
    if form == "pickle":
        file.write_bytes(pickle.dumps(Payload(marker)))
    elif form == "old":
        torch.save(content | {"more": Payload(marker)}, file, _use_new_zipfile_serialization=False)
    else:
        torch.save(content | {form: Payload(marker)}, file)


@pytest.mark.parametrize("form", ["pickle", "old", *CHECKPOINT_KEYS])
def test_checkpoints(form: str, user: Path, marker: Path) -> None:
    evil_checkpoint(user / "image.ckpt", form, marker)
    for command in ("fit", "validate", "test", "predict"):
        sentence = refused(command, "--config", "small.yaml", "--ckpt_path", "image.ckpt", home=user)
        assert "image.ckpt" in sentence
        assert "cannot be read" in sentence
    export = ("export", "--format", "merged", "--output", "exported", "--config", "small.yaml")
    assert "cannot be read" in refused(*export, "--ckpt_path", "image.ckpt", home=user)
    assert not (user / "exported").exists()
    with pytest.raises(pickle.UnpicklingError):
        ImageClassifier.load_from_checkpoint(user / "image.ckpt")
    model, trainer = ImageClassifier("vit_tiny_in64", 10, LoRA()), L.Trainer(accelerator="cpu", logger=False)
    with pytest.raises(pickle.UnpicklingError):
        trainer.fit(model, ImageData("digits"), ckpt_path=user / "image.ckpt")


def test_the_last_checkpoint(user: Path, marker: Path) -> None:
    run = user / "runs/image-srlora/version_0"
    evil_checkpoint(run / "checkpoints/last.ckpt", "srlora", marker)
    shutil.copy(run / "checkpoints/last.ckpt", run / "hpc_ckpt_1.ckpt")
    code, _, err = cli("test", "--config", "small.yaml", "--name", "image", "--ckpt_path", "last", home=user)
    assert code == 0, err
    assert "last.ckpt cannot be read and is passed over" in err
    assert "hpc_ckpt_1.ckpt cannot be read and is passed over" in err


def test_classes_named_in_checkpoints(user: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (user / "evil_module.py").write_text(program(marker) + "import torch\nclass Thing(torch.optim.SGD): pass\n")
    monkeypatch.syspath_prepend(user)
    content = torch.load(user / "image.ckpt", weights_only=True)
    arguments = content["hyper_parameters"]
    for change, word in (
        ({"optimizer": "evil_module.Thing"}, "model.optimizer"),
        ({"method": {"class_path": "evil_module.Thing", "init_args": {}}}, "model.method"),
    ):
        torch.save(content | {"hyper_parameters": arguments | change}, user / "image.ckpt")
        with pytest.raises(UserError, match=mentions(word)):
            ImageClassifier.load_from_checkpoint(user / "image.ckpt")
    assert "evil_module" not in sys.modules


# -- weights


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.safetensors", "w.npz", "w.ckpt"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_weights_files(name: str, form: str, user: Path, marker: Path) -> None:
    if form == "pickle":
        (user / name).write_bytes(pickle.dumps({"head.weight": Payload(marker)}))
    else:
        torch.save({"head.weight": torch.zeros(2), "x": Payload(marker)}, user / name)
    for command in (FIT, texts("reviews")):
        sentence = refused(*command, f"--model.backbone_checkpoint={name}", home=user)
        assert f"weights file {name} cannot be read" in sentence
        assert "weights_only=False" not in sentence


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_in_folders(name: str, user: Path, marker: Path) -> None:
    for backbone, config in (
        ("image_model", {"architecture": "vit_tiny_patch16_224", "num_classes": 0}),
        ("encoder", None),
    ):
        (user / backbone).mkdir(exist_ok=True)
        if config:
            (user / backbone / "config.json").write_text(json.dumps(config))
        torch.save({"x": Payload(marker)}, user / backbone / name)
    own = ("--model.backbone_kwargs={}",)
    assert name in refused(*FIT, *own, "--model.backbone=image_model", home=user)
    assert "cannot be read" in refused(*texts("reviews", *own), home=user)


@pytest.mark.parametrize("shard", ["part.bin", "../part.bin"])
def test_weights_in_parts(shard: str, user: Path, marker: Path) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": {"classifier.weight": shard}}
    (user / "encoder/pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"classifier.weight": Payload(marker)}, user / "encoder" / shard)
    assert "encoder" in refused(*texts("reviews", "--model.backbone_kwargs={}"), home=user)


@pytest.mark.parametrize("trust", [[], ["--model.backbone_kwargs.trust_remote_code=true"]])
@pytest.mark.parametrize("kind", ["config", "model", "tokenizer"])
def test_code_beside_weights(kind: str, trust: list[str], user: Path, marker: Path) -> None:
    folder(user / "evil", BERT if kind != "config" else {"model_type": "evil"})
    save_tokenizer(user / "evil")
    (user / "evil/code.py").write_text(program(marker))
    names = {"config": "AutoConfig", "model": "AutoModelForSequenceClassification", "tokenizer": "AutoTokenizer"}
    target = user / "evil" / ("tokenizer_config.json" if kind == "tokenizer" else "config.json")
    value: Any = ["code.Thing", "code.Thing"] if kind == "tokenizer" else "code.Thing"
    settings = json.loads(target.read_text()) | {"auto_map": {names[kind]: value}}
    if kind == "tokenizer":
        settings["tokenizer_class"] = "Thing"
    target.write_text(json.dumps(settings))
    code, _, err = cli(*encoder("evil"), *trust, "--trainer.fast_dev_run=true", home=user)
    if trust:
        assert code == 2
        assert "trust_remote_code" in complaint(err)
    elif kind == "config":
        assert "never run" in complaint(err)


def test_adapters(user: Path, marker: Path) -> None:
    (user / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["qkv"]}
    (user / "adapter/adapter_config.json").write_text(json.dumps(config))
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        torch.save({"base_model.model.x.lora_A.weight": Payload(marker)}, user / "adapter" / name)
        assert name.rpartition(".")[0] in refused(*FIT, "--model.adapter=adapter", home=user)


# -- caches


def test_caches(user: Path, marker: Path, tmp_path: Path) -> None:
    """Whatever lies there is made again."""
    command = [*texts("reviews"), f"--data.cache_dir={tmp_path}/cache/tokens", "--model.backbone_checkpoint=w.pth"]
    torch.save(build_encoder(str(user / "encoder"), 3, {"pretrained": False}).state_dict(), user / "w.pth")
    assert cli(*command, home=user)[0] == 0
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"tokens"}
    assert len({path.parent for path in files}) == 2  # tokens and singular directions
    sound = {path: load_file(path) for path in files}
    for path in files:
        path.unlink()  # what is read from it may be mapped into memory still
        path.write_bytes(pickle.dumps(Payload(marker)))
    assert cli(*command, home=user)[0] == 0
    for path, tensors in sound.items():
        again = load_file(path)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], value) for name, value in tensors.items())


# -- data


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_files_of_texts(suffix: str, user: Path, marker: Path) -> None:
    (user / f"evil.{suffix}").write_bytes(pickle.dumps(Payload(marker)))
    assert f"evil.{suffix}" in refused(*texts(f"evil.{suffix}"), home=user)


@pytest.mark.parametrize("line", ['{"text": ' + "[" * 100_000, '{"text": ' + "9" * 10_000 + "}"])
def test_lines_too_deep_or_too_long(line: str, user: Path) -> None:
    (user / "evil.jsonl").write_text(line)
    assert "Line 1 of evil.jsonl is not JSON" in refused(*texts("evil.jsonl"), home=user)


def test_images(user: Path, marker: Path) -> None:
    (user / "pictures/a/0.png").write_bytes(pickle.dumps(Payload(marker)))
    assert "pictures/a/0.png is not an image" in refused(*pictures("pictures"), home=user)


def test_no_image_is_handed_to_another_program(user: Path) -> None:
    """PIL knows PostScript, a program, by its first bytes, whatever the file is called, and calls Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\n(ran) (w) file\n%%EOF\n"
    for name in ("pictures/a/0.png", "pictures/b/3.png"):  # the first of all, and a later one
        sound = (user / name).read_bytes()
        (user / name).write_bytes(eps)
        assert f"{name} is not an image" in refused(*pictures("pictures"), home=user)
        (user / name).write_bytes(sound)


def test_folders_of_tables(user: Path, marker: Path) -> None:
    for name in ("table", "train"):
        (user / f"table/{name}.py").write_text(program(marker))
    assert "table" in refused(*pictures("table"), home=user)
    (user / "table/table.py").unlink()
    (user / "table/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: evil.pkl\n---\n")
    (user / "table/evil.pkl").write_bytes(pickle.dumps(Payload(marker)))
    assert "table" in refused(*pictures("table"), home=user)


BATCHES = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list] + ["batches.meta"]


def test_tampered_cifar(user: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = user / "data" / CIFAR10.base_folder
    home.mkdir(parents=True)
    for name in BATCHES:
        (home / name).write_bytes(pickle.dumps(Payload(marker)))
    command = [*FIT, "--data.name=cifar10", "--data.root=data"]
    assert "cifar10 is not whole" in refused(*command, home=user)
    with tarfile.open(user / "data" / CIFAR10.filename, "w:gz") as archive:
        archive.add(home, CIFAR10.base_folder)
    shutil.rmtree(home)
    assert "cifar10 is not whole" in refused(*command, home=user)
    assert not home.exists()


def test_the_sum_is_what_protects_from_a_tampered_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CIFAR10.base_folder).mkdir()
    for name in BATCHES:
        (tmp_path / CIFAR10.base_folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    with pytest.raises((TypeError, AttributeError)):
        ImageData("cifar10", root=str(tmp_path)).source.load("train")
    assert (tmp_path / "ran").exists()


def test_old_files_of_mnist(user: Path, marker: Path) -> None:
    home = user / "data/MNIST/processed"
    home.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save(Payload(marker), home / name)
    assert "mnist is not whole" in refused(*FIT, "--data.name=mnist", "--data.root=data", home=user)


# -- names


def test_labels_and_columns_are_no_paths(user: Path, tmp_path: Path) -> None:
    names = ["../../outside", str(tmp_path / "absolute"), "a/b"]
    rows = "".join(f"w{i},{names[i % 3]}\n" for i in range(24))
    (user / "evil").mkdir()
    (user / "evil/train.csv").write_text(f"../text,../label\n{rows}")
    (user / "evil/test.csv").write_text(f"../text,../label\n{rows}")
    options = ["--data.text_column=../text", "--data.label_column=../label", "--name=evil"]
    before = contents(tmp_path)
    assert cli(*texts("evil", *options), home=user)[0] == 0
    last = "--ckpt_path=runs/evil-srlora/version_0/checkpoints/last.ckpt"
    assert cli(*texts("evil", *options, last, command="predict"), home=user)[0] == 0
    said = (user / "runs/evil-srlora/version_0/predictions.csv").read_text()
    assert any(name in said for name in names)
    new = set(contents(tmp_path)) - set(before)
    assert all(path.startswith(("home/runs/evil-srlora", "cache")) for path in new), new


def test_a_checkpoint_does_not_say_what_to_delete(user: Path) -> None:
    """A ModelCheckpoint deletes the files that its state in the checkpoint names, once there are better ones."""
    folder = user / "runs/image-srlora/version_0/checkpoints"
    content = torch.load(folder / "last.ckpt", weights_only=True)
    victim = user / "victim.ckpt"
    victim.touch()
    path = f"{folder}/../../../../victim.ckpt"
    assert Path(path).resolve() == victim
    for state in content["callbacks"].values():
        if "best_model_path" in state:
            worst = torch.tensor(1e9)
            paths = {"best_model_path": path, "kth_best_model_path": path, "last_model_path": path}
            state |= {"kth_value": worst, "best_model_score": worst, "best_k_models": {path: worst}, **paths}
            state["dirpath"] = str(folder)
    torch.save(content, folder / "last.ckpt")
    command = [*FIT, "--name=image", "--trainer.max_steps=20", "--ckpt_path", str(folder / "last.ckpt")]
    code, _, err = cli(*command, home=user)
    assert code == 0, err
    assert victim.exists()
    assert len(list(folder.glob("best-*"))) >= 1
