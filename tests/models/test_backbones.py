import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from srlora_pl import ImageClassifier, LoRA, export_model
from srlora_pl.models.timm_models import ASSETS, build_backbone, data_config, head_names
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions
from tests.helpers.images import SMALL_VIT
from tests.helpers.paths import SHARED

NAME = "vit_tiny_patch16_224"
VIT_TINY = SHARED / "models" / "vit_tiny_in64"


def small(num_classes: int = 5, **kwargs) -> nn.Module:
    return build_backbone(NAME, num_classes, SMALL_VIT | kwargs)


def saved(net: nn.Module, file: Path) -> str:
    save_file(net.state_dict(), file)
    return str(file)


def test_the_shipped_backbone_knows_its_images():
    net = build_backbone("vit_tiny_in64", 10)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net.training
    assert head_names(net) == ("head",)
    assert net.head.weight.shape == (10, 192)
    config = data_config(net)
    assert tuple(config["mean"]) == tuple(config["std"]) == (0.5, 0.5, 0.5)
    assert config["input_size"] == (3, 64, 64)
    stored = load_file(ASSETS / "vit_tiny_in64" / "model.safetensors")
    assert torch.equal(net.blocks[3].mlp.fc1.weight, stored["blocks.3.mlp.fc1.weight"].float())


@pytest.mark.real
@pytest.mark.skipif(not VIT_TINY.is_dir(), reason="needs ../shared")
def test_the_shipped_backbone_equals_the_original():
    original = timm.create_model(NAME, img_size=64, patch_size=8, depth=6, num_classes=200)
    original.load_state_dict(load_file(VIT_TINY / "model.safetensors"))
    images = torch.rand(32, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected, logits = original.eval()(images), build_backbone("vit_tiny_in64", 200).eval()(images)
    assert (expected - logits).abs().max() < 5e-3  # rounding to half precision
    assert expected.std() > 0.5


def test_weights_are_float32_whatever_is_asked():
    assert {p.dtype for p in small(dtype=torch.float16).parameters()} == {torch.float32}


def test_image_size_comes_from_the_arguments_that_shape_the_network():
    assert data_config(small(), SMALL_VIT)["input_size"] == (3, 16, 16)
    assert data_config(small(img_size=(16, 24)), {"img_size": (16, 24)})["input_size"] == (3, 16, 24)


def test_two_heads_and_other_names_are_found():
    kwargs = {"pretrained": False, "embed_dim": 32, "depth": 1, "num_heads": 2}
    assert head_names(build_backbone("deit_tiny_distilled_patch16_224", 3, kwargs)) == ("head", "head_dist")
    assert head_names(build_backbone("resnet10t", 3, {"pretrained": False})) == ("fc",)


@pytest.mark.parametrize("classes_in_file", [5, 9, 0])
def test_weights_file_loads_with_any_head(tmp_path, classes_in_file):
    source = small(classes_in_file) if classes_in_file else small()
    state = {k: v for k, v in source.state_dict().items() if classes_in_file or not k.startswith("head.")}
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "w.safetensors")
    fresh = build_backbone(NAME, 5, SMALL_VIT, str(tmp_path / "w.safetensors"))
    same = {k: torch.equal(v, source.state_dict()[k].half().float()) for k, v in fresh.state_dict().items()}
    assert fresh.blocks[0].attn.qkv.weight.dtype == torch.float32
    assert all(equal for key, equal in same.items() if not key.startswith("head."))
    assert same["head.weight"] == (classes_in_file == 5)


def test_torch_files_and_wrapped_states_load(tmp_path):
    source = small()
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    fresh = build_backbone(NAME, 5, SMALL_VIT, str(tmp_path / "w.pth"))
    assert torch.equal(fresh.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)


def test_positions_of_another_image_size_are_resampled(tmp_path):
    source = small(img_size=32)
    fresh = build_backbone(NAME, 5, SMALL_VIT, saved(source, tmp_path / "w.safetensors"))
    assert fresh.pos_embed.shape[1] == 5
    assert source.pos_embed.shape[1] == 17
    assert torch.equal(fresh.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_a_folder_in_timms_layout(tmp_path):
    source = small()
    timm.models.save_for_hf(source, tmp_path / "mine", safe_serialization=True)
    net = build_backbone(str(tmp_path / "mine"), 3)
    assert torch.equal(net.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert net.head.weight.shape == (3, 32)
    random = build_backbone(str(tmp_path / "mine"), 3, {"pretrained": False})
    assert not torch.equal(random.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_weights_that_do_not_fit_are_refused_with_examples(tmp_path):
    deeper = saved(small(depth=3), tmp_path / "deeper.safetensors")
    with pytest.raises(UserError, match=mentions("deeper.safetensors", "'blocks.2.attn.proj.bias'")):
        build_backbone(NAME, 5, SMALL_VIT, deeper)
    shallow = saved(small(depth=1), tmp_path / "shallow.safetensors")
    with pytest.raises(UserError, match=mentions("'blocks.1.norm1.weight'", "'blocks.1.norm1.bias'", "10 more")):
        build_backbone(NAME, 5, SMALL_VIT, shallow)
    wider = saved(small(embed_dim=64), tmp_path / "wider.safetensors")
    with pytest.raises(UserError, match=mentions("'blocks.0.attn.proj.bias'", "(64,)", "(32,)")):
        build_backbone(NAME, 5, SMALL_VIT, wider)


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_files_that_are_no_whole_weights_are_refused(tmp_path):
    whole = Path(saved(small(), tmp_path / "w.safetensors")).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save({"head.weight": torch.zeros(1), "x": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for file in ("cut.safetensors", "text.pth", "empty.pth", "evil.pth", "evil.pkl"):
        with pytest.raises(UserError, match=mentions(file, "cannot be read")):
            build_backbone(NAME, 5, SMALL_VIT, str(tmp_path / file))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=mentions("'nosuch.pth'", "model.backbone_checkpoint")):
        build_backbone(NAME, 5, SMALL_VIT, "nosuch.pth")


def test_the_payload_would_have_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_tiny_in46", ["'vit_tiny_in64'"]),
        ("vit_bas_patch16_224", ["'vit_base_patch16_224'"]),
        ("vit_base_patch16_224.orig_in21", ["'vit_base_patch16_224.orig_in21k'"]),
        ("./nosuch/folder", ["'./nosuch/folder'", "exist"]),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, words):
    with pytest.raises(UserError, match=mentions(*words)):
        build_backbone(name, 5, {"pretrained": False})


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=mentions("config.json", "holds")):
        build_backbone(str(tmp_path), 5)
    timm.models.save_for_hf(small(), tmp_path, safe_serialization=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=mentions("model.safetensors", "pytorch_model.bin")):
        build_backbone(str(tmp_path), 5)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"depht": 2}, ["backbone_kwargs", "'depht'"]),
        ({"patch_size": 0}, ["built", "model.backbone_kwargs"]),
        ({"in_chans": 1}, ["1 channel", "model.backbone_kwargs.in_chans"]),
        ({"num_classes": 3}, ["backbone_kwargs", "'num_classes'"]),
        ({"checkpoint_path": "w.pth"}, ["backbone_kwargs", "'checkpoint_path'", "model.backbone_checkpoint"]),
        ({"features_only": True}, ["backbone_kwargs", "'features_only'"]),
        ({"revision": "v1"}, ["backbone_kwargs", "'revision'", "model.backbone", "owner/name"]),
        ({"token": "hf_x"}, ["backbone_kwargs", "'token'"]),
    ],
)
def test_wrong_arguments_are_refused(kwargs, words):
    with pytest.raises(UserError, match=mentions(*words)):
        build_backbone(NAME, 5, SMALL_VIT | kwargs)


def test_a_folder_for_grey_images_is_refused(tmp_path):
    grey = timm.create_model("resnet10t", in_chans=1, num_classes=5)
    timm.models.save_for_hf(grey, tmp_path, safe_serialization=True)
    with pytest.raises(UserError, match=mentions(tmp_path, "1 channel", "3 channels")):
        build_backbone(str(tmp_path), 5)
    assert build_backbone(NAME, 5, SMALL_VIT | {"in_chans": 3}).patch_embed.proj.in_channels == 3


def hub_repository(cache: Path) -> None:
    """``me/vit`` as the hub's cache holds it, with weights of 1 and, at the revision ``v1``, of 2."""
    home = cache / "models--me--vit"
    (home / "refs").mkdir(parents=True)
    for number, revision in ((1, "main"), (2, "v1")):
        (home / "refs" / revision).write_text(str(number) * 40)
        net = small()
        for parameter in net.parameters():
            nn.init.constant_(parameter, float(number))
        timm.models.save_for_hf(net, home / "snapshots" / (str(number) * 40), safe_serialization=True)


@pytest.mark.parametrize(("name", "number"), [("me/vit", 1), ("me/vit@v1", 2), ("hf-hub:me/vit@v1", 2)])
def test_a_revision_of_the_hub_goes_with_the_name(tmp_path, name, number):
    hub_repository(tmp_path / "hub")
    task = ImageClassifier(name, 3, LoRA(rank=1), {"cache_dir": str(tmp_path / "hub")})
    assert set(task.net.blocks[0].mlp.fc1.weight.unique().tolist()) == {number}
    report = export_model(task, tmp_path / "peft", "peft")
    settings = json.loads((report.folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "me/vit"
    assert settings["revision"] == {1: None, 2: "v1"}[number]


def test_without_a_network_the_message_says_what_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=mentions("'vit_tiny_patch16_224'", "model.backbone_checkpoint")):
        build_backbone(NAME, 5)


def test_a_model_without_pretrained_weights_says_so():
    with pytest.raises(UserError, match=mentions("model.backbone_kwargs.pretrained", "false")):
        build_backbone("test_vit4", 5)
