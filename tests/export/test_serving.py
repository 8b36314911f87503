"""Programs for servers: what onnxruntime and torch.export compute is what the trained model computes."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from srlora_pl import SRLoRA, UserError, export_model
from srlora_pl.export import serving
from tests.helpers.encoders import BERT, DEBERTA
from tests.helpers.errors import mentions
from tests.helpers.models import batch_for, encoder_folder, fit, image_task, text_task, vit_folder
from tests.helpers.waiting import run as run_program

onnxruntime = pytest.importorskip("onnxruntime")
NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A trained image task, exported in both formats."""
    home = tmp_path_factory.mktemp("images")
    task = fit(image_task(vit_folder(home / "vit"), SRLoRA(rank=2, target_rank=6)), steps=9)
    return task, {kind: export_model(task, home / kind, kind, class_names=NAMES) for kind in ("onnx", "pt2")}


@pytest.fixture(scope="module", params=["bert", "deberta-v2"])
def texts(request, tmp_path_factory):
    """The same of texts; DeBERTa with its own fast attention, which no program holds."""
    home = tmp_path_factory.mktemp("texts")
    config, fast = {"bert": (BERT, {}), "deberta-v2": (DEBERTA, {"fast_attention": True})}[request.param]
    task = text_task(encoder_folder(home / "encoder", config), SRLoRA(rank=2, target_rank=6), **fast)
    fit(task, steps=9)
    return task, {kind: export_model(task, home / kind, kind, class_names=["no", "yes"]) for kind in ("onnx", "pt2")}


def program(report):
    """The program in a folder: numpy arrays by name to logits."""
    if "model.onnx" in report.files:
        session = onnxruntime.InferenceSession(report.folder / "model.onnx")
        return lambda **inputs: session.run(None, inputs)[0]
    module = torch.export.load(report.folder / "model.pt2").module()
    return lambda **inputs: module(**{name: torch.from_numpy(x) for name, x in inputs.items()}).detach().numpy()


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_images_in_batches_of_any_size(images, kind, size):
    task, reports = images
    assert set(reports[kind].files) == {"config.json", f"model.{kind}"}
    image = batch_for(task, size, seed=99)["image"]
    with torch.no_grad():
        wanted = task.net.eval()(image).numpy()
    assert wanted.std() > 0.1
    np.testing.assert_allclose(program(reports[kind])(pixel_values=image.numpy()), wanted, atol=1e-5)
    about = json.loads((reports[kind].folder / "config.json").read_text())
    assert about["label_names"] == NAMES
    assert about["pretrained_cfg"]["input_size"] == [3, 16, 16]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_texts_in_batches_of_any_size_and_length(texts, kind):
    """As the tokenizer in the folder makes them, padding and all its inputs included."""
    task, reports = texts
    folder, run = reports[kind].folder, program(reports[kind])
    assert set(reports[kind].files) == {"config.json", f"model.{kind}", "tokenizer.json", "tokenizer_config.json"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for several in (["w3"], ["w3 w7 w1", "w4"], ["w5 " * 40, "w1", "w2 w9"]):
        inputs = dict(tokenizer(several, padding=True, return_tensors="pt"))
        with torch.no_grad():
            wanted = task.net.eval()(**inputs).logits.numpy()
        found = run(**{name: x.numpy() for name, x in inputs.items()})
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    about = json.loads((folder / "config.json").read_text())
    assert about["id2label"] == {"0": "no", "1": "yes"}
    assert about["label2id"] == {"no": 0, "yes": 1}


@pytest.mark.slow
def test_the_axes_of_onnx_have_names(images, texts):
    for (_, reports), axes in ((images, ["batch", 3, 16, 16]), (texts, ["batch", "length"])):
        session = onnxruntime.InferenceSession(reports["onnx"].folder / "model.onnx")
        assert [each.shape for each in session.get_inputs()] == [axes] * len(session.get_inputs())
        assert session.get_outputs()[0].name == "logits"
        assert session.get_outputs()[0].shape[0] == "batch"


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=pytest.mark.slow), "pt2"])
def test_a_program_of_other_outputs_is_not_left(images, tmp_path, monkeypatch, kind):
    task, _ = images
    original = serving.write

    def broken(family, net, *rest):
        with torch.no_grad():
            net.head.bias += 0.01
        original(family, net, *rest)

    monkeypatch.setattr(serving, "write", broken)
    with pytest.raises(UserError, match=mentions("exported", "differ", "1.0e-02", "nothing was written")):
        export_model(task, tmp_path / "out", kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=pytest.mark.slow), "pt2"])
def test_a_network_of_one_batch_size_is_refused(images, tmp_path, monkeypatch, kind):
    class Fixed(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, pixel_values):
            return self.net(pixel_values) if len(pixel_values) == 2 else self.net(pixel_values) + 1

    task, _ = images
    monkeypatch.setattr(type(task.family), "served", lambda self, net: Fixed(net))
    with pytest.raises(UserError, match=mentions("torch cannot write", f"--format {kind}", "--format merged")):
        export_model(task, tmp_path / "out", kind)
    assert not list(tmp_path.iterdir())


def test_a_program_that_runs_on_one_size_alone_is_refused(images, tmp_path, monkeypatch):
    task, _ = images
    original = serving._pt2

    def stubborn(folder):
        run = original(folder)

        def checked(inputs):
            assert len(inputs["pixel_values"]) == 2, "Guard failed: \x1b[96msize\x1b[0m"
            return run(inputs)

        return checked

    monkeypatch.setattr(serving, "_pt2", stubborn)
    with pytest.raises(UserError, match=mentions("--format pt2", "Guard failed: size", "--format merged")):
        export_model(task, tmp_path / "out", "pt2")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_said_before_anything_is_computed(images, tmp_path, monkeypatch):
    task, _ = images
    monkeypatch.setattr(task.adaptation, "merged_copy", lambda: pytest.fail("computed"))
    monkeypatch.setattr("srlora_pl.util.program.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=mentions("--format onnx", "onnxscript", "pip install", "srlora_pl[onnx]")):
        export_model(task, tmp_path / "out", "onnx")


# What a server has: neither this package nor torch, timm and transformers.
SERVER = """
import json, sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
(logits,) = session.run(None, {"pixel_values": np.load(sys.argv[2])})
names = json.load(open(sys.argv[1] + "/config.json"))["label_names"]
print(json.dumps([names[logits[0].argmax()], logits.tolist()]))
assert not {"torch", "timm", "srlora_pl"} & set(sys.modules)
"""


def test_another_process_predicts_the_same_without_torch(images, tmp_path):
    task, reports = images
    image = batch_for(task, 12, seed=5)["image"]
    np.save(tmp_path / "images.npy", image.numpy())
    arguments = [str(reports["onnx"].folder), str(tmp_path / "images.npy")]
    out = run_program([sys.executable, "-c", SERVER, *arguments], check=True)
    with torch.no_grad():
        wanted = task.net.eval()(image)
    name, found = json.loads(out.stdout)
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-5, rtol=0)
    assert name == NAMES[wanted[0].argmax()]
