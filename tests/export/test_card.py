"""The model card says what is known of a run, and its code loads the folder."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from srlora_pl import ImageClassifier, LoRA, SRLoRA, export_model
from srlora_pl.data.images.transforms import ImageTransform
from srlora_pl.export.card import Facts
from srlora_pl.export.command import FORMATS
from srlora_pl.export.usage import usage
from tests.helpers.cli import SMALL_RUN, cli
from tests.helpers.encoders import BERT
from tests.helpers.models import VIT, batch_for, encoder_folder, fit, image_task, text_task, vit_folder

NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of 10 steps, with a checkpoint that was not tested: other.ckpt."""
    home = tmp_path_factory.mktemp("run")
    vit_folder(home / "vit")
    text = re.sub(r"backbone: .*\n.*\n.*\n", "backbone: vit\n", SMALL_RUN).replace("max_steps: 12", "max_steps: 10")
    (home / "small.yaml").write_text(text)
    code, _, err = cli("fit", "--config", "small.yaml", home=home)
    assert code == 0, err
    content = torch.load(best(home), weights_only=True)
    torch.save(content | {"global_step": 3}, best(home).with_name("other.ckpt"))
    return home


def best(home):
    (found,) = (home / "runs/small-srlora/version_0/checkpoints").glob("best*.ckpt")
    return found


def exported(home, out, *options, checkpoint="other.ckpt", form="merged"):
    """The card's metadata and text, and what the command printed."""
    file = home / "runs/small-srlora/version_0/checkpoints" / checkpoint
    options = ("--ckpt_path", file, "--format", form, "--output", out, "--model_card", *options)
    code, printed, err = cli("export", *options, home=home)
    assert code == 0, err
    card = ModelCard.load(out / "README.md")
    return card.data, card.text, printed


def test_the_card_of_the_tested_checkpoint_has_the_scores_of_the_run(run, tmp_path):
    data, text, _ = exported(run, tmp_path / "my_model", checkpoint=best(run).name)
    summary = json.loads((run / "runs/small-srlora/version_0/summary.json").read_text())
    results = {each.metric_type: each for each in data.eval_results}
    assert results["accuracy"].metric_value == summary["scores"]["test/accuracy"]
    assert (results["accuracy"].dataset_name, results["accuracy"].dataset_split) == ("digits", "test")
    assert "loss" not in results
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("timm", "image-classification", "my_model")
    assert data.tags == ["srlora_pl", "srlora"]
    assert data.base_model is None  # a folder is no repository
    assert f"| test/accuracy | {summary['scores']['test/accuracy']:.4f} |" in text
    assert f"| training | {summary['steps']} steps, " in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in text
    assert "rank 4, target_rank 12" in text
    assert str(run) not in text  # where it lay


def test_the_card_of_another_checkpoint_leaves_the_scores_out(run, tmp_path):
    data, text, printed = exported(run, tmp_path / "out")
    assert data.eval_results is None
    assert "test/accuracy" not in text
    for place in (text, printed):
        assert re.search(f"he run's scores are those of {best(run).name}, which is another checkpoint", place)
    assert "| training | 10 steps, " in text


def test_a_checkpoint_outside_a_run_has_a_card_of_what_is_known(run, tmp_path):
    shutil.copy(best(run), tmp_path / "alone.ckpt")
    config = run / "runs/small-srlora/version_0/config.yaml"
    data, text, printed = exported(run, tmp_path / "out", "--config", config, checkpoint=tmp_path / "alone.ckpt")
    assert data.eval_results is None
    for place in (text, printed):
        assert re.search("he checkpoint lies in no run's folder, so its scores, ", place)
    assert "SRLoRA: rank 4" in text
    assert "versions |" not in text


def test_without_the_option_there_is_no_card(run, tmp_path):
    file = best(run)
    assert cli("export", "--ckpt_path", file, "--format", "merged", "--output", tmp_path / "out", home=run)[0] == 0
    assert not (tmp_path / "out/README.md").exists()


def test_a_compressed_adapter_does_not_boast_of_the_scores_of_the_exact_one(run, tmp_path):
    data, text, _ = exported(run, tmp_path / "out", "--rank", "1", checkpoint=best(run).name, form="peft")
    assert (data.library_name, data.base_model) == ("peft", None)
    assert re.search(r"those of the exact LoRA; this one has a relative error of [1-9.]+e-\d+", text)


def test_the_repository_of_the_pretrained_weights_is_named(tmp_path):
    name, weights = "vit_tiny_patch16_224.augreg_in21k", vit_folder(tmp_path / "vit") + "/model.safetensors"
    task = image_task(name, LoRA(rank=1), backbone_kwargs=VIT, backbone_checkpoint=weights)
    export_model(task, tmp_path / "out", card=Facts(repository="me/mine"), class_names=NAMES)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.base_model, card.data.license) == (f"timm/{name}", "apache-2.0")
    assert card.data.base_model_relation == "finetune"
    assert f"`timm/{name}`, fine-tuned with LoRA" in card.text
    assert "None are known." in card.text
    assert "timm.create_model('hf-hub:me/mine', pretrained=True)" in card.text


def test_random_weights_have_no_base_model(tmp_path):
    options = {**VIT, "pretrained": False}
    task = image_task("vit_tiny_patch16_224.augreg_in21k", LoRA(rank=1), backbone_kwargs=options)
    export_model(task, tmp_path / "out", card=Facts())
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.base_model, card.data.license) == (None, None)
    assert "`random weights`, " in card.text


def code_of(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize("form", [*FORMATS[:2], *(pytest.param(each, marks=pytest.mark.slow) for each in FORMATS[2:])])
def test_the_code_on_the_card_loads_images(tmp_path, monkeypatch, capsys, form):
    monkeypatch.chdir(tmp_path)
    task = fit(image_task(vit_folder(tmp_path / "vit"), SRLoRA(rank=2, target_rank=4)), steps=8)
    task.data_config |= {"crop_pct": 0.8, "crop_mode": "squash"}
    export_model(task, "mine", form, class_names=NAMES, card=Facts())
    Image.effect_noise((50, 31), 80).save("photo.jpg")
    names: dict = {}
    exec(code_of(tmp_path / "mine"), names)
    if form == "peft":
        batch = batch_for(task, seed=9)["image"]
        with torch.no_grad():
            torch.testing.assert_close(names["model"](batch), task.net.eval()(batch), atol=1e-5, rtol=0)
        return
    with torch.no_grad():
        wanted = task.net.eval()(torch.as_tensor(prepared(task, "photo.jpg")))
    torch.testing.assert_close(torch.as_tensor(names["logits"]), wanted, atol=0.02, rtol=0)
    assert capsys.readouterr().out.split()[-1] == NAMES[wanted.argmax()]


def test_the_code_on_the_card_names_a_shipped_backbone_and_no_folder(tmp_path):
    (tmp_path / "model").mkdir()
    recipe = f"load('{tmp_path}/model')"
    family = SimpleNamespace(name="minilm", task_type="SEQ_CLS", base=(f"{tmp_path}/model", None), recipe=recipe)
    assert "base = load('minilm')" in usage(family, "peft", "mine", on_hub=False)


@pytest.mark.parametrize("mode", ["squash", "center"])
@pytest.mark.parametrize("pct", [0.85, 1.0])
@pytest.mark.parametrize("size", [(50, 31), (31, 50), (32, 32)])
def test_the_code_on_the_card_prepares_images_as_the_run_did(mode, pct, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = image_task(vit_folder(tmp_path / "vit"), LoRA(rank=1))
    task.take_data_settings("srlora_pl.ImageData", {"test_crop_pct": pct, "crop_mode": mode})
    export_model(task, "mine")
    Image.effect_noise(size, 80).save("photo.png")
    code = usage(task.family, "onnx", "mine", on_hub=False).partition("session")[0].replace("photo.jpg", "photo.png")
    names: dict = {}
    exec(code, names)
    wanted = prepared(task, "photo.png", pct, mode)
    torch.testing.assert_close(torch.as_tensor(names["pixels"]), wanted, atol=0.02, rtol=0)


def prepared(task: ImageClassifier, file: str, pct: float = 0.8, mode: str = "squash") -> torch.Tensor:
    ours = ImageTransform.for_model(task.data_config, test_crop_pct=pct, crop_mode=mode)
    return ours.normalise(ours.test_one(Image.open(file).convert("RGB"))[None])


@pytest.mark.parametrize("form", [*FORMATS[:2], *(pytest.param(each, marks=pytest.mark.slow) for each in FORMATS[2:])])
def test_the_code_on_the_card_loads_texts(tmp_path, monkeypatch, capsys, form):
    monkeypatch.chdir(tmp_path)
    task = fit(text_task(encoder_folder(tmp_path / "bert", BERT), SRLoRA(rank=2, target_rank=4)), steps=8)
    export_model(task, "mine", form, class_names=["no", "yes"], card=Facts())
    names: dict = {}
    exec(code_of(tmp_path / "mine").replace("A text.", "w3 w7 w1"), names)
    inputs = names["model"].tokenizer if form == "merged" else names["tokenizer"]
    with torch.no_grad():
        logits = task.net.eval()(**inputs("w3 w7 w1", return_tensors="pt")).logits[0]
    out = capsys.readouterr().out
    if form == "peft":
        assert [float(each) for each in re.findall(r"-?\d\.\d+", out)] == pytest.approx(logits.tolist(), abs=1e-3)
    else:
        assert ["no", "yes"][logits.argmax()] in out


# -- the hub


class Hub:
    """Stands for huggingface_hub.HfApi: keeps what it was asked."""

    calls: list
    fails = None

    def whoami(self):
        self.calls.append(("whoami", (), {}))
        if self.fails == "whoami":
            raise ConnectionError("Name or service not known")
        return {"name": "me", "orgs": [{"name": "lab"}]}

    def create_repo(self, *arguments, **options):
        self.calls.append(("create_repo", arguments, options))
        return f"https://huggingface.co/{arguments[0]}"

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", (), options))
        if self.fails == "upload_folder":
            raise ConnectionError("Connection reset")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("srlora_pl.export.hub.HfApi", Hub)
    monkeypatch.setattr("srlora_pl.export.hub.get_token", lambda: "a token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    return Hub


def push(home, out, *options):
    file = best(home)
    return cli("export", "--ckpt_path", file, "--format", "merged", "--output", out, *options, home=home)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("name", ["me/mine", "lab/mine", "mine"])
def test_a_folder_is_uploaded_with_its_card(run, tmp_path, hub, name, private):
    out = tmp_path / "out"
    out.mkdir()
    (out / "secret.txt").write_text("of the user")
    code, printed, err = push(run, out, "--push_to_hub", name, "--force", *["--private"] * private)
    assert (code, err) == (0, "")
    whole = name if "/" in name else f"me/{name}"
    assert f"pushed to https://huggingface.co/{whole}" in printed
    assert [call[0] for call in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1:] == ((whole,), {"private": private, "exist_ok": True})
    options = hub.calls[2][2]
    assert (options["repo_id"], Path(options["folder_path"])) == (whole, out)
    assert options["allow_patterns"] == ["README.md", "config.json", "model.safetensors"]
    assert {"model.onnx", "adapter_model.safetensors", "adapter_config.json"} <= set(options["delete_patterns"])
    card = ModelCard.load(out / "README.md")
    assert card.data.model_name == "mine"
    assert f"hf-hub:{whole}" in card.text


def test_what_the_hub_refuses_is_said_before_the_long_work(run, tmp_path, hub, monkeypatch):
    monkeypatch.setattr("srlora_pl.export.command.load_task", lambda *_: pytest.fail("loaded"))

    def refused(name, *words):
        code, out, err = push(run, tmp_path / "out", "--push_to_hub", name)
        assert (code, out, err.count("\n")) == (2, "", 1)
        for word in words:
            assert word in err
        assert not (tmp_path / "out").exists()

    refused("me/mi ne", "--push_to_hub 'me/mi ne' cannot be a repository", "USER/NAME")
    refused("a/b/c", "cannot be a repository")
    refused("you/mine", "the token is of me, lab, not of you")
    monkeypatch.setattr(hub, "fails", "whoami")
    refused("me/mine", "cannot be reached", "Name or service not known")
    monkeypatch.setattr("srlora_pl.export.hub.get_token", lambda: None)
    refused("me/mine", "hf auth login", "HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("me/mine", "HF_HUB_OFFLINE is set")


def test_a_broken_upload_leaves_the_folder_and_says_how_to_send_it(run, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(hub, "fails", "upload_folder")
    code, _, err = push(run, tmp_path / "out", "--push_to_hub", "me/mine")
    assert code == 2
    assert f"`hf upload me/mine {tmp_path / 'out'}` sends it" in err
    assert (tmp_path / "out/model.safetensors").exists()
