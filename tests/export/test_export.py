"""Exported folders load with timm, transformers and peft themselves, and give the trained model's outputs."""

import json
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import srlora_pl.export.command
import srlora_pl.models.family
from srlora_pl import DyLoRA, ImageClassifier, LoRA, PiSSA, SRLoRA, UserError, export_model
from srlora_pl.data.images.transforms import ImageTransform
from srlora_pl.lowrank.delta import change
from tests.helpers.cli import cli
from tests.helpers.encoders import BERT, DEBERTA, folder
from tests.helpers.errors import mentions
from tests.helpers.models import CLASSES, VIT, batch_for, encoder_folder, fit, image_task, text_task, vit_folder
from tests.helpers.texts import PAD, SEP, WORDS, cola, save_tokenizer

NAMES = ["ant", "bee", "cat", "dog", "eel"]
SRLORA = partial(SRLoRA, rank=2, alpha=5.0)
METHODS = {
    "lora": LoRA(rank=2, alpha=5.0),
    "pissa": PiSSA(rank=2, alpha=1.0),
    "no switch": SRLORA(target_rank=2),
    "one switch": SRLORA(target_rank=4),
    "many switches": SRLORA(target_rank=8),
    "some of qkv, rslora": SRLORA(target_rank=8, target_modules=["query", "value", "fc1"], use_rslora=True),
    "beyond the smaller side": SRLORA(target_rank=18),
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return vit_folder(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return {config["model_type"]: encoder_folder(home / config["model_type"], config) for config in (BERT, DEBERTA)}


def outputs(net, batch):
    with torch.no_grad():
        if "image" in batch:
            return net.eval()(batch["image"])
        return net.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def assert_same_outputs(net, task, untrained):
    """``net`` gives what ``task`` gives, and not what the untrained network gives."""
    batch = batch_for(task, seed=99)
    wanted = outputs(task.net, batch)
    assert (outputs(untrained, batch) - wanted).abs().max() > 1e-2
    torch.testing.assert_close(outputs(net, batch), wanted, atol=1e-5, rtol=0)


# -- images


@pytest.mark.parametrize("name", METHODS)
def test_a_vit_loads_with_timm_and_with_peft(vit, tmp_path, name):
    from peft import PeftModel

    task = fit(image_task(vit, METHODS[name]), steps=17)
    assert task.adaptation.controller.progress().done == {"one switch": 1, "beyond the smaller side": 15}.get(
        name, 5 if "target_rank" in task.adaptation.method.spec()["init_args"] and name != "no switch" else 0
    )
    merged = export_model(task, tmp_path / "merged", class_names=NAMES)
    peft = export_model(task, tmp_path / "peft", "peft", class_names=NAMES)
    assert 0 <= merged.difference < 1e-5
    assert 0 <= peft.difference < 1e-5
    assert set(merged.files) == {path.name for path in merged.folder.iterdir()} == {"config.json", "model.safetensors"}
    files = {"adapter_config.json", "adapter_model.safetensors", "model_config.json"}
    assert set(peft.files) == {path.name for path in peft.folder.iterdir()} == files
    about = json.loads((tmp_path / "peft/model_config.json").read_text())
    assert about["label_names"] == NAMES
    about = about["pretrained_cfg"]
    assert (about["input_size"], about["mean"], about["interpolation"]) == ([3, 16, 16], [0.5] * 3, "bicubic")

    untrained = image_task(vit, LoRA(rank=1)).net
    net = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True)
    assert net.num_classes == CLASSES
    assert net.pretrained_cfg["label_names"] == NAMES
    assert_same_outputs(net, task, untrained)

    base = timm.create_model(f"local-dir:{vit}", pretrained=True, num_classes=CLASSES)
    assert_same_outputs(PeftModel.from_pretrained(base, tmp_path / "peft"), task, untrained)


def test_the_exact_adapter_has_the_rank_of_the_change(vit, tmp_path):
    task = fit(image_task(vit, SRLORA(target_rank=6)), steps=9)
    export_model(task, tmp_path / "peft", "peft")
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 10  # 5 directions: the last switch would fall on the last step
    assert settings["rank_pattern"] == settings["alpha_pattern"]
    assert set(settings["rank_pattern"].values()) == {30}  # the fused qkv
    assert settings["base_model_name_or_path"] == vit
    assert settings["task_type"] is None
    assert settings["modules_to_save"] == ["head"]
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert tensors["base_model.model.blocks.1.attn.qkv.lora_A.weight"].shape == (30, 32)
    assert tensors["base_model.model.blocks.1.mlp.fc1.lora_B.weight"].shape == (128, 10)
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_a_compressed_adapter_is_what_peft_loads(vit, tmp_path):
    from peft import PeftModel

    task = fit(image_task(vit, SRLORA(target_rank=8)), steps=17)
    report = export_model(task, tmp_path / "peft", "peft", rank=3)
    assert {each.rank for each in report.factors.values()} == {3}
    assert report.difference > 1e-4
    lines = "\n".join(report.lines())
    assert f"blocks.0.attn.qkv: rank 3, relative error {report.factors['blocks.0.attn.qkv'].error:.2e}" in lines
    assert "relative error of all changes together: " in lines
    base = timm.create_model(f"local-dir:{vit}", pretrained=True, num_classes=CLASSES)
    weights = {name: base.get_parameter(f"{name}.weight").detach().clone() for name in task.adaptation.layers}
    loaded = PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload()
    batch = batch_for(task, seed=99)
    assert (outputs(loaded, batch) - outputs(task.net, batch)).abs().max() > 1e-4
    for name, exact in change(task.adaptation).items():
        got = loaded.get_parameter(f"{name}.weight").detach() - weights[name]
        tail = torch.linalg.svdvals(exact.B @ exact.A)[3:].norm()
        assert float((got - exact.B @ exact.A).norm()) == pytest.approx(float(tail), abs=1e-5)


@pytest.mark.parametrize("mode", ["merged", "peft"])
def test_a_nested_model_is_exported_at_any_rank(vit, tmp_path, mode):
    task = image_task(vit, DyLoRA(rank=3, alpha=5.0))
    fit(task)
    report = export_model(task, tmp_path / "out", mode, rank=2)
    assert not any(factors.lost for factors in report.factors.values())
    assert {factors.rank for factors in report.factors.values()} == ({2, 6} if mode == "peft" else set())
    full = outputs(task.net, batch_for(task, seed=99))
    with task.adaptation.at_rank(2):
        assert (outputs(task.net, batch_for(task, seed=99)) - full).abs().max() > 1e-3
        if mode == "merged":
            net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
            torch.testing.assert_close(
                outputs(net, batch_for(task, seed=99)), outputs(task.net, batch_for(task, seed=99)), atol=1e-5, rtol=0
            )
    with pytest.raises(UserError, match="rank 4 does not lie between"):
        export_model(task, tmp_path / "other", mode, rank=4)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("rank", [None, 3])
def test_without_peft_the_adapter_is_checked_in_memory(vit, tmp_path, monkeypatch, rank):
    task = fit(image_task(vit, SRLORA(target_rank=4)), steps=6)
    installed = export_model(task, tmp_path / "with", "peft", rank)
    monkeypatch.setattr(srlora_pl.export.command, "find_spec", lambda name: None)
    report = export_model(task, tmp_path / "without", "peft", rank)
    assert "peft is not installed, so the files were not loaded back" in report.notes
    assert report.difference == pytest.approx(installed.difference, abs=1e-6)
    assert (report.difference > 1e-4) == (rank is not None)


@pytest.mark.parametrize("mode", ["squash", "center"])
@pytest.mark.parametrize("pct", [0.8, 0.85, None])
def test_timm_prepares_images_as_the_run_did(mode, pct, vit, tmp_path):
    task = image_task(vit, LoRA(rank=1))
    task.take_data_settings("srlora_pl.ImageData", {"test_crop_pct": pct, "crop_mode": mode})
    export_model(task, tmp_path / "merged")
    net = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    picture = Image.effect_noise((50, 31), 80).convert("RGB")
    ours = ImageTransform.for_model(task.data_config, test_crop_pct=pct, crop_mode=mode)
    wanted = ours.normalise(ours.test_one(picture)[None])[0]
    torch.testing.assert_close(prepare(picture), wanted, atol=0.02, rtol=0)


ARCHITECTURES = {
    "vit_tiny_patch16_224": VIT,
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 16,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 2, 2),
        "img_size": 112,
    },
}


@pytest.mark.parametrize("names", [["cat", "dog"], NAMES, []])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_folder_of_timm_loads_with_transformers_too(tmp_path, name, names):
    options = {"pretrained": False, **ARCHITECTURES[name]}
    task = image_task(name, LoRA(rank=1), num_classes=len(names) or 3, backbone_kwargs=options)
    place = export_model(task, tmp_path / "out", class_names=names).folder
    net = AutoModelForImageClassification.from_pretrained(place)
    if names:
        assert net.config.id2label == dict(enumerate(names))
    batch = batch_for(task)
    wanted = outputs(task.net, batch)
    assert wanted.std() > 0
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(pixel_values=batch["image"]).logits, wanted, atol=1e-5, rtol=0)
    with_timm = timm.create_model(f"local-dir:{place}", pretrained=True)
    torch.testing.assert_close(outputs(with_timm, batch), wanted, atol=1e-5, rtol=0)


def test_kwargs_of_the_backbone_are_in_the_folder(vit, tmp_path):
    options = {"img_size": 24, "drop_path_rate": 0.1}
    task = fit(image_task(vit, SRLORA(target_rank=4), backbone_kwargs=options), steps=4)
    report = export_model(task, tmp_path / "merged")
    net = timm.create_model(f"local-dir:{report.folder}", pretrained=True)
    assert net.pretrained_cfg["input_size"] == (3, 24, 24)
    assert_same_outputs(net, task, image_task(vit, LoRA(rank=1), backbone_kwargs=options).net)
    assert "pretrained=True, num_classes=5, img_size=24, drop_path_rate=0.1)" in "\n".join(
        export_model(task, tmp_path / "peft", "peft").lines()
    )


def test_double_precision_is_exported_in_single(vit, tmp_path):
    task = image_task(vit, SRLORA(target_rank=4)).double()
    task.adaptation.start()
    for layer in task.adaptation.layers.values():
        layer.lora_A.data += 0.1
    for mode in ("merged", "peft"):
        report = export_model(task, tmp_path / mode, mode)
        assert report.difference < 1e-5
    assert task.net.head.weight.dtype == torch.float64
    assert {v.dtype for v in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.float32}


def test_the_model_stays_as_it_was(vit, tmp_path):
    task = fit(image_task(vit, SRLORA(target_rank=4)), steps=4)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    modes = {name: module.training for name, module in task.named_modules()}
    for mode in ("merged", "peft"):
        export_model(task, tmp_path / mode, mode)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert {name: module.training for name, module in task.named_modules()} == modes


# -- texts


@pytest.mark.parametrize("train_pooler", [True, False])
@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_an_encoder_loads_with_transformers_and_with_peft(encoders, tmp_path, family, train_pooler):
    from peft import PeftModel

    fast = {"fast_attention": True} if family == "deberta-v2" and train_pooler else {}
    task = fit(text_task(encoders[family], SRLORA(target_rank=8), train_pooler=train_pooler, **fast), steps=13)
    assert task.adaptation.controller.progress().done == 5
    merged = export_model(task, tmp_path / "merged", class_names=["no", "yes"])
    peft = export_model(task, tmp_path / "peft", "peft", class_names=["no", "yes"])
    assert max(merged.difference, peft.difference) < 1e-5
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in merged.folder.iterdir()} == files

    # the untrained network: a new head, and of DeBERTa a new pooler
    untrained = AutoModelForSequenceClassification.from_pretrained(encoders[family], num_labels=2)
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert net.config.id2label == {0: "no", 1: "yes"}
    assert net.config.problem_type == "single_label_classification"
    assert_same_outputs(net, task, untrained)
    tokens = [AutoTokenizer.from_pretrained(place)("w3 w7 w1") for place in (tmp_path / "merged", encoders[family])]
    assert tokens[0]["input_ids"] == tokens[1]["input_ids"]

    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"
    assert settings["base_model_name_or_path"] == encoders[family]
    config = AutoConfig.from_pretrained(tmp_path / "peft/model_config.json")
    assert (config.id2label, config.label2id) == ({0: "no", 1: "yes"}, {"no": 0, "yes": 1})
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "peft", config=config)
    assert_same_outputs(net, task, untrained)
    assert AutoTokenizer.from_pretrained(tmp_path / "peft")("w3 w7 w1")["input_ids"] == tokens[0]["input_ids"]
    base = AutoModelForSequenceClassification.from_pretrained(encoders[family], num_labels=2)
    assert_same_outputs(PeftModel.from_pretrained(base, tmp_path / "peft"), task, untrained)


@pytest.mark.parametrize(
    ("problem", "classes", "called"),
    [("regression", 1, "regression"), ("multi_label", 3, "multi_label_classification")],
)
def test_other_problems_keep_their_kind(encoders, tmp_path, problem, classes, called):
    task = text_task(encoders["bert"], LoRA(rank=1), num_classes=classes, problem=problem)
    export_model(task, tmp_path / "merged")
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert net.config.problem_type == called
    assert net.config.num_labels == classes


def test_a_tokenizer_cannot_write_elsewhere(encoders, tmp_path):
    place = Path(encoder_folder(tmp_path / "bert", BERT))
    settings = json.loads((place / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": "x"} for name in ("default", "../../../evil")]
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    report = export_model(text_task(str(place), LoRA(rank=1)), tmp_path / "a/b/merged")
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(report.folder.rglob("*.jinja"))
    assert AutoTokenizer.from_pretrained(report.folder)("w3")["input_ids"]


def test_a_model_without_tokenizer_is_exported_with_a_word_about_it(encoders, tmp_path):
    place = Path(encoder_folder(tmp_path / "bert", BERT))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / name).unlink()
    report = export_model(text_task(str(place), LoRA(rank=1)), tmp_path / "merged")
    assert any(note.startswith("without a tokenizer: ") for note in report.notes)


SEQ2SEQ = {
    "d_model": 16,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 2,
}
SEQ2SEQ |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


@pytest.mark.parametrize("mode", ["merged", "peft"])
@pytest.mark.parametrize("family", ["bart", "mbart", "plbart", "t5", "umt5"])
def test_a_network_that_reads_at_the_end_of_the_text_is_exported(tmp_path, family, mode):
    sizes = {"vocab_size": len(WORDS), "eos_token_id": SEP, "decoder_start_token_id": SEP, "pad_token_id": PAD}
    place = folder(
        tmp_path / family, {"model_type": family, "init_std": 0.3, "initializer_factor": 1.0} | SEQ2SEQ | sizes
    )
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(place, num_labels=5)).save_pretrained(
        place
    )
    save_tokenizer(Path(place))
    task = text_task(place, LoRA(rank=2))
    with torch.no_grad():
        for layer in task.adaptation.layers.values():
            layer.lora_B.normal_(std=0.3)
    report = export_model(task, tmp_path / "out", mode)
    ids = torch.tensor([[5, 6, 7, SEP], [9, 8, SEP, PAD]])
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    wanted = outputs(task.net, batch)
    if mode == "merged":
        net = AutoModelForSequenceClassification.from_pretrained(report.folder)
    else:
        from peft import PeftModel

        net = PeftModel.from_pretrained(named_base(report), report.folder)
    torch.testing.assert_close(outputs(net, batch), wanted, atol=1e-5 * float(wanted.abs().max().clamp(1)), rtol=0)


def named_base(report):
    """The network that the report says a PEFT folder belongs on."""
    names = {"torch": torch, "timm": timm, "AutoModelForSequenceClassification": AutoModelForSequenceClassification}
    return eval(report.notes[0].removeprefix("it belongs on "), names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_base_that_the_report_names_is_that_of_the_adapter(tmp_path, dtype):
    """Also where it has a head of another size, and where its files hold half precision."""
    from peft import PeftModel

    place = encoder_folder(tmp_path / "bert", BERT)
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(place, num_labels=5)
    AutoModelForSequenceClassification.from_config(config, dtype=dtype).save_pretrained(place)
    assert {value.dtype for value in load_file(tmp_path / "bert/model.safetensors").values()} == {dtype}
    task = fit(text_task(place, SRLORA(target_rank=4), train_pooler=False), steps=6)
    report = export_model(task, tmp_path / "peft", "peft")
    batch = batch_for(task, seed=99)
    wanted = outputs(task.net, batch)
    got = outputs(PeftModel.from_pretrained(named_base(report), report.folder), batch)
    torch.testing.assert_close(got, wanted, atol=1e-6 * float(wanted.abs().max().clamp(1)), rtol=0)
    net = AutoModelForSequenceClassification.from_pretrained(export_model(task, tmp_path / "merged").folder)
    assert net.dtype == torch.float32
    torch.testing.assert_close(outputs(net, batch), wanted, atol=1e-6 * float(wanted.abs().max().clamp(1)), rtol=0)


def test_the_base_of_an_image_adapter_may_lie_there_in_half_precision(vit, tmp_path):
    from peft import PeftModel

    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((Path(vit) / "config.json").read_text())
    state = load_file(Path(vit) / "model.safetensors")
    save_file({key: value.half() for key, value in state.items()}, half / "model.safetensors")
    task = fit(image_task(str(half), SRLORA(target_rank=4)), steps=6)
    report = export_model(task, tmp_path / "peft", "peft")
    net = PeftModel.from_pretrained(named_base(report), report.folder)
    assert_same_outputs(net, task, image_task(vit, LoRA(rank=1)).net)


# -- sizes


def test_merged_is_advised_where_it_is_smaller(vit, tmp_path):
    small = export_model(fit(image_task(vit, SRLORA(target_rank=2)), 3), tmp_path / "small", "peft")
    large = export_model(fit(image_task(vit, SRLORA(target_rank=18)), 17), tmp_path / "large", "peft")
    advice = "--format merged is the smaller file here"
    assert small.size < small.dense_size
    assert advice not in "\n".join(small.lines())
    assert large.size > large.dense_size
    assert advice in "\n".join(large.lines())
    for report in (small, large):
        written = (report.folder / "adapter_model.safetensors").stat().st_size
        assert report.size <= written < report.size + 10_000
    dense = (export_model(image_task(vit, LoRA(rank=1)), tmp_path / "merged").folder / "model.safetensors").stat()
    assert large.dense_size <= dense.st_size < large.dense_size + 10_000


# -- nothing half


def test_files_in_the_way_are_kept_or_asked_about(vit, tmp_path):
    task, target = image_task(vit, LoRA(rank=1)), tmp_path / "out"
    target.mkdir()
    export_model(task, target)  # empty
    (target / "notes.txt").write_text("mine")
    (target / "config.json").write_text("old")
    with pytest.raises(UserError, match=mentions("out", "--force")):
        export_model(task, target)
    assert (target / "config.json").read_text() == "old"
    export_model(task, target, force=True)
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
    assert json.loads((target / "config.json").read_text())["num_classes"] == CLASSES
    assert (target / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_adapter_in_the_way_goes_with_its_weights(vit, tmp_path):
    task, target = image_task(vit, LoRA(rank=1)), tmp_path / "out"
    export_model(task, target, format="peft")
    export_model(task, target, force=True)
    assert {path.name for path in target.iterdir()} >= {"config.json", "model.safetensors"}
    assert not any(path.name.startswith("adapter") for path in target.iterdir())
    export_model(task, target, format="peft", force=True)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in target.iterdir()}
    assert not (target / "model.safetensors").exists()


def test_a_crash_between_old_and_new_files_leaves_no_weights(vit, tmp_path, monkeypatch):
    task, target = image_task(vit, LoRA(rank=1)), tmp_path / "out"
    export_model(task, target)
    replace, moved = Path.replace, []

    def crash(self, other):
        moved.append(self.name)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        export_model(task, target, force=True)
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_the_files_can_be_read_by_others(vit, tmp_path):
    before = os.umask(0o022)
    try:
        report = export_model(image_task(vit, LoRA(rank=1)), tmp_path / "out")
    finally:
        os.umask(before)
    assert report.folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in report.folder.iterdir()} == {0o644}


@pytest.mark.parametrize("mode", ["merged", "peft"])
def test_files_that_give_other_outputs_are_not_left(vit, tmp_path, monkeypatch, mode):
    def damage(path, tensors):
        key = next(key for key in tensors if key.endswith(("fc2.weight", "fc2.lora_B.weight")))
        save_file(tensors | {key: tensors[key] * 1.02}, path, {"format": "pt"})

    write = srlora_pl.models.peft_folder.write
    if mode == "merged":
        original = srlora_pl.models.timm_family.Timm.save

        def broken(self, net, folder, *rest):
            notes = original(self, net, folder, *rest)
            damage(folder / "model.safetensors", load_file(folder / "model.safetensors"))
            return notes

        monkeypatch.setattr(srlora_pl.models.timm_family.Timm, "save", broken)
    else:

        def broken(folder, *rest):
            size = write(folder, *rest)
            damage(folder / "adapter_model.safetensors", load_file(folder / "adapter_model.safetensors"))
            return size

        monkeypatch.setattr(srlora_pl.models.peft_folder, "write", broken)
    task = fit(image_task(vit, SRLORA(target_rank=4)), steps=6)
    with pytest.raises(UserError, match=mentions("exported", "differ", "nothing was written")):
        export_model(task, tmp_path / "a/b/out", mode)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(vit, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    task = image_task(vit, LoRA(rank=1))
    with pytest.raises(UserError, match=mentions("--output", "/file", "folder")):
        export_model(task, tmp_path / "file")
    with pytest.raises(UserError, match=mentions("--output", "/file/out")):
        export_model(task, tmp_path / "file/out")

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(srlora_pl.models.peft_folder, "save_file", full)
    with pytest.raises(UserError, match=mentions("out", "No space left on device")):
        export_model(task, tmp_path / "out", "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mode", ["merged", "peft"])
@pytest.mark.parametrize("name", ["head.weight", "blocks.0.mlp.fc1.lora_B", "blocks.1.norm1.bias"])
def test_weights_that_are_not_finite_are_refused(vit, tmp_path, name, mode):
    task = image_task(vit, LoRA(rank=1))
    task.net.get_parameter(name).data.view(-1)[3] = float("nan")
    with pytest.raises(UserError, match=mentions("NaN", "infinity")):
        export_model(task, tmp_path / "out", mode)
    assert not list(tmp_path.iterdir())


# -- refusals


def refused(vit, tmp_path, words, task=None, **options):
    with pytest.raises(UserError, match=mentions(*words)):
        export_model(task or image_task(vit, LoRA(rank=1)), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused(vit, tmp_path):
    refused(vit, tmp_path, ["--format tflite", "merged, peft, onnx, pt2"], format="tflite")
    refused(vit, tmp_path, ["--rank 4", "--format peft"], rank=4)
    for rank in (0, 33):
        refused(vit, tmp_path, [f"rank {rank}", "32", "blocks.0.attn.qkv"], format="peft", rank=rank)


def test_a_peft_folder_needs_pretrained_weights(vit, tmp_path):
    task = image_task(vit, LoRA(rank=1), backbone_kwargs={"pretrained": False})
    refused(vit, tmp_path, ["random weights", "--format merged"], task, format="peft")
    assert export_model(task, tmp_path / "merged").difference < 1e-5


def test_a_peft_folder_holds_no_other_changes(vit, tmp_path):
    task = image_task(vit, LoRA(rank=1))
    task.net.norm.weight.data[0] += 1
    refused(vit, tmp_path, ["norm.weight", "--format merged"], task, format="peft")
    assert export_model(task, tmp_path / "merged").difference < 1e-5


def test_other_modules_are_refused(vit, tmp_path):
    class Other(ImageClassifier):
        pass

    assert export_model(Other(vit, CLASSES, LoRA(rank=1)), tmp_path / "out").difference < 1e-5
    with pytest.raises(UserError, match=mentions("SimpleNamespace", "ImageClassifier", "TextClassifier")):
        export_model(SimpleNamespace(), tmp_path / "new")  # type: ignore[arg-type]


# -- the command


RUN = """
seed_everything: 3
model:
  class_path: srlora_pl.ImageClassifier
  init_args:
    backbone: vit
    method: {class_path: srlora_pl.SRLoRA, init_args: {rank: 2, alpha: 5, target_rank: 8}}
    optimizer: adamw
    lr: 0.02
data:
  class_path: srlora_pl.ImageData
  init_args: {name: digits, batch_size: 8, hflip: false, test_crop_pct: 0.8}
trainer:
  accelerator: cpu
  max_steps: 12
  val_check_interval: 6
  check_val_every_n_epoch: null
  limit_val_batches: 2
  limit_test_batches: 1
  enable_model_summary: false
  enable_progress_bar: false
"""
CHECKPOINT = "runs/small-srlora/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run on the digits: with the backbone in vit/, and small.yaml."""
    home = tmp_path_factory.mktemp("run")
    vit_folder(home / "vit")
    (home / "small.yaml").write_text(RUN)
    code, _, err = cli("fit", "--config", "small.yaml", home=home)
    assert code == 0, err
    return home


def export(home, *options, checkpoint=CHECKPOINT):
    return cli("export", "--ckpt_path", checkpoint, *options, home=home)


def test_the_command_exports_a_run(run, tmp_path):
    from peft import PeftModel

    for mode in ("merged", "peft"):
        code, out, err = export(run, "--format", mode, "--output", tmp_path / mode)
        assert (code, err) == (0, "")
        assert "largest output difference to the trained model: " in out
        assert f"written to {tmp_path / mode}" in out
    task = ImageClassifier.load_from_checkpoint(run / CHECKPOINT, backbone=str(run / "vit"))
    untrained = image_task(str(run / "vit"), LoRA(rank=1), num_classes=10).net
    net = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True)
    assert net.pretrained_cfg["label_names"] == list("0123456789")
    assert (net.pretrained_cfg["crop_pct"], net.pretrained_cfg["crop_mode"]) == (0.8, "squash")
    assert_same_outputs(net, task, untrained)
    base = timm.create_model(f"local-dir:{run / 'vit'}", pretrained=True, num_classes=10)
    assert_same_outputs(PeftModel.from_pretrained(base, tmp_path / "peft"), task, untrained)


def test_the_command_compresses(run, tmp_path):
    code, out, _ = export(run, "--format", "peft", "--output", tmp_path / "out", "--rank", "2")
    assert code == 0
    assert out.count(": rank 2, relative error ") == 8
    assert "adapter of rank 2: " in out
    assert "it belongs on timm.create_model('local-dir:" in out


def test_the_command_exports_texts(tmp_path):
    encoder_folder(tmp_path / "encoder", BERT)
    cola(tmp_path / "glue")
    model = {"backbone": "encoder", "method": {"class_path": "srlora_pl.PiSSA", "init_args": {"rank": 2}}, "lr": 0.02}
    data = {"task": "cola", "root": "glue", "batch_size": 8, "max_length": 32, "cache_dir": str(tmp_path / "cache")}
    settings = {
        "model": {"class_path": "srlora_pl.TextClassifier", "init_args": model},
        "data": {"class_path": "srlora_pl.GLUEData", "init_args": data},
        "trainer": {"accelerator": "cpu", "max_steps": 4, "enable_progress_bar": False, "enable_model_summary": False},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    code, _, err = cli("fit", "--config", "small.yaml", home=tmp_path)
    assert code == 0, err
    checkpoint = CHECKPOINT.replace("srlora", "pissa")
    code, _, err = export(tmp_path, "--format", "merged", "--output", "out", checkpoint=checkpoint)
    assert (code, err) == (0, "")
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert len(net.config.id2label) == 2
    assert "LABEL_0" not in net.config.label2id
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1")["input_ids"]
    assert export(tmp_path, "--format", "peft", "--output", "peft", checkpoint=checkpoint)[0] == 0
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "encoder")  # not where the command was given


def test_a_run_whose_backbone_moved(run, tmp_path):
    options = ("--ckpt_path", run / CHECKPOINT, "--format", "peft", "--output", "out")
    code, _, err = cli("export", *options, home=tmp_path)
    assert code == 2
    assert "model.backbone 'vit' is no timm model, local folder" in err
    vit_folder(tmp_path / "elsewhere")
    (tmp_path / "moved.yaml").write_text(RUN.replace("backbone: vit", "backbone: elsewhere"))
    assert cli("export", *options, "--config", "moved.yaml", home=tmp_path)[0] == 0
    weights = load_file(tmp_path / "elsewhere/model.safetensors")
    weights["blocks.0.mlp.fc1.weight"][0] += 1e-6
    save_file(weights, tmp_path / "elsewhere/model.safetensors")
    code, _, err = cli("export", *options, "--config", "moved.yaml", "--force", home=tmp_path)
    assert code == 2
    assert "was made from other pretrained weights than this model's" in err


def test_a_run_from_an_adapter(run, tmp_path):
    home, start = tmp_path, ("fit", "--config", run / "small.yaml", "--model.backbone", run / "vit")
    assert export(run, "--format", "peft", "--output", home / "adapter", "--rank", "3")[0] == 0
    code, _, err = cli(*start, "--model.adapter", "nowhere", home=home)
    assert code == 2
    assert re.search(mentions("model.adapter nowhere", "adapter_config.json", "give a folder"), err)
    short = ("--model.method.target_rank", "4", "--trainer.max_steps", "2", "--trainer.val_check_interval", "1")
    code, _, err = cli(*start, "--model.adapter", "adapter", *short, home=home)
    assert code == 0, err
    code, _, err = export(home, "--format", "peft", "--output", "out")
    assert code == 0, err
    ranks = json.loads((home / "out/adapter_config.json").read_text())
    assert ranks["r"] == 3 + 2 * 3  # the adapter, and 3 directions that were walked


REFUSED = {
    "no --format": ((), "the following arguments are required: --format"),
    "no --output": (("--format", "merged"), "the following arguments are required: --output"),
    "unknown option": (("--format", "merged", "--output", "new", "--ranks", "3"), "unrecognized arguments: --ranks 3"),
    "rank in words": (("--format", "peft", "--output", "new", "--rank", "four"), "--rank: invalid int value: 'four'"),
    "unknown format": (("--format", "tflite", "--output", "new"), "--format tflite is unknown"),
    "rank of merged": (("--format", "merged", "--output", "new", "--rank", "2"), "--rank 2 belongs to --format peft"),
    "rank too large": (("--format", "peft", "--output", "new", "--rank", "99"), "rank 99 does not lie between 1 and"),
    "folder in use": (("--format", "merged", "--output", "vit"), "--output vit holds files already"),
    "a file": (("--format", "merged", "--output", "small.yaml"), "--output small.yaml is a file"),
    "no such config": (("--format", "merged", "--output", "new", "--config", "no.yaml"), "no.yaml does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_in_a_sentence(run, case):
    options, sentence = REFUSED[case]
    code, out, err = export(run, *options)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (run / "new").exists()


def test_bad_checkpoints_are_refused_in_a_sentence(run, tmp_path):
    whole = torch.load(run / CHECKPOINT, weights_only=True)
    files = {
        "foreign": {key: whole[key] for key in ("state_dict", "global_step", "pytorch-lightning_version")},
        "unadapted": {key: value for key, value in whole.items() if key != "srlora"},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((run / CHECKPOINT).read_bytes()[:5000])
    for name, sentence in {
        "missing": "missing.ckpt' does not exist",
        "cut": "cut.ckpt cannot be read",
        "foreign": "foreign.ckpt holds no model that this package adapted",
        "unadapted": "unadapted.ckpt holds no model that this package adapted",
    }.items():
        options = ("--format", "merged", "--output", tmp_path / "new")
        code, _, err = export(run, *options, checkpoint=tmp_path / f"{name}.ckpt")
        assert code == 2
        assert sentence in err
        assert not (tmp_path / "new").exists()


def test_the_config_names_the_class(run, tmp_path):
    alone = tmp_path / "a/checkpoints/last.ckpt"
    alone.parent.mkdir(parents=True)
    alone.write_bytes((run / CHECKPOINT).read_bytes())
    options = ("--format", "merged", "--output", tmp_path / "new")
    assert "config.yaml is not in" in export(run, *options, checkpoint=alone)[2]
    own = tmp_path / "a/config.yaml"
    for path, sentence in {
        "antigravity.Model": "give --config .* if you trust it",
        "srlora_pl.ImageData": "'srlora_pl.ImageData' in .*config.yaml is no task of this package",
        "srlora_pl.Nothing": "'srlora_pl.Nothing' in .*config.yaml is no task of this package",
    }.items():
        own.write_text(RUN.replace("srlora_pl.ImageClassifier", path))
        code, _, err = export(run, *options, checkpoint=alone)
        assert code == 2
        assert re.search(sentence, err), err
    assert export(run, *options, "--config", "small.yaml", checkpoint=alone)[0] == 0


def test_help_is_answered_at_once(tmp_path):
    code, out, _ = cli("export", "--help", home=tmp_path)
    assert code == 0
    assert "--format merged|peft|onnx|pt2" in out
