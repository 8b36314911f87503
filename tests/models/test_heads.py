"""Heads that come with pretrained weights: each output means, from the first step on, the class that it meant there."""

from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from srlora_pl import ImageClassifier, LoRA, PiSSA, TextClassifier, export_model
from srlora_pl.models.heads import FoundHead, output_layers, settle
from tests.helpers.encoders import BERT, Data, folder, samples
from tests.helpers.models import VIT, batch_for, encoder_folder, fit, image_task, text_task, vit_folder

NAMES = ["no", "yes", "maybe"]
ROWS = samples(8, torch.arange(8) % 3)


def head_of(net: nn.Module, *names: Any) -> FoundHead:
    return FoundHead("model.backbone 'x'", output_layers(net, ["head"], 3), names)


def two_layers() -> Any:
    """A head whose hidden layer has as many outputs as there are classes."""
    torch.manual_seed(0)
    return nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Dropout())})


@pytest.mark.parametrize("theirs", [("no", "yes", "maybe"), ("maybe", "no", "yes"), ("Yes", "NO", "Maybe ")])
def test_rows_go_by_the_names_of_the_classes(theirs):
    net = two_layers()
    hidden, last = net["head"][0], net["head"][2]
    rows = {name.strip().lower(): place for place, name in enumerate(theirs)}
    wanted = [(last.weight[rows[name]].tolist(), last.bias[rows[name]].tolist()) for name in NAMES]
    kept = hidden.weight.clone()
    said = settle(net, head_of(net, *theirs), NAMES)
    assert list(zip(last.weight.tolist(), last.bias.tolist(), strict=True)) == wanted
    assert torch.equal(hidden.weight, kept)
    assert "the head of model.backbone 'x': its classes have the same names" in said
    assert ("order" in said) == (theirs != ("no", "yes", "maybe"))


def test_names_that_differ_in_case_alone_are_told_apart():
    net = two_layers()
    rows = net["head"][2].weight.tolist()
    settle(net, head_of(net, "a", "A", "b"), ["A", "b", "a"])
    assert net["head"][2].weight.tolist() == [rows[1], rows[2], rows[0]]


def test_other_classes_begin_with_a_new_head_that_follows_the_seed():
    heads = []
    for drawn in (0, 5):  # processes of one run may have drawn numbers of their own before
        net = two_layers()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        torch.manual_seed(drawn)
        torch.rand(drawn)
        position = torch.get_rng_state()
        said = settle(net, head_of(net, "contradiction", "neutral", "entailment"), NAMES)
        assert torch.equal(torch.get_rng_state(), position)
        assert "a new head: that of model.backbone 'x' is for other classes (contradiction, neutral and 1 more)" in said
        assert torch.equal(net["head"][0].weight, before["head.0.weight"])
        assert not torch.isclose(net["head"][2].weight, before["head.2.weight"]).any()
        heads.append(net["head"][2].weight)
    assert torch.equal(*heads)


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ((), NAMES, "names no classes to compare; their order must be that of the data (no, yes and 1 more)"),
        (("LABEL_0", "LABEL_1", "LABEL_2"), NAMES, "names no classes"),
        (("negative", "neutral", "positive"), ["0", "1", "2"], "names no classes"),
        (NAMES, [], "names no classes to compare."),
    ],
)
def test_without_names_to_compare_the_head_stays_and_that_is_said(theirs, ours, words):
    net = two_layers()
    before = net["head"][2].weight.clone()
    assert words in settle(net, head_of(net, *theirs), ours)
    assert torch.equal(net["head"][2].weight, before)


# -- where the two meet


def text_folder(path: Any, names: list[str] | None = None, classes: int = 3) -> str:
    """A BERT that is a classifier already."""
    torch.manual_seed(2)
    config = AutoConfig.from_pretrained(folder(path, BERT | {"initializer_range": 0.3}), num_labels=classes)
    if names:
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return str(path)


def text(backbone: str, **options: Any) -> TextClassifier:
    torch.manual_seed(7)
    return TextClassifier(backbone, **{"num_classes": 3, "method": LoRA(rank=1), "lr": 0.01, **options})


def weight_of(path: str) -> torch.Tensor:
    return AutoModelForSequenceClassification.from_pretrained(path).classifier.weight.detach()


@pytest.mark.parametrize("use", ["fit", "validate", "test", "predict"])
def test_a_text_classifier_keeps_its_classes(tmp_path, trainer, caplog, use):
    backbone = text_folder(tmp_path / "bert", ["maybe", "no", "yes"])
    model = text(backbone, optimizer="sgd", lr=1e-30)
    with caplog.at_level("INFO"):
        getattr(trainer(max_steps=1), use)(model, datamodule=Data(ROWS, class_names=NAMES))
    assert torch.equal(model.net.classifier.weight, weight_of(backbone)[[1, 2, 0]])
    said = [record.getMessage() for record in caplog.records if "begins with" in record.getMessage()]
    assert said == [
        f"The run begins with the head of model.backbone {backbone!r}: its classes have the same names, put into the "
        "order of the data's."
    ]


def test_a_head_is_settled_once(tmp_path, trainer, caplog):
    """Not again for the test after a run; and never one out of a checkpoint."""
    backbone = text_folder(tmp_path / "bert", ["maybe", "no", "yes"])
    model, run = text(backbone), trainer(max_steps=2)
    data = Data(ROWS, class_names=NAMES)
    with caplog.at_level("INFO"):
        run.fit(model, datamodule=data)
    assert "begins with" in caplog.text
    caplog.clear()
    run.save_checkpoint(tmp_path / "a.ckpt")
    trained = model.net.classifier.weight.detach().clone()
    with caplog.at_level("INFO"):
        run.test(model, datamodule=data)
        assert torch.equal(model.net.classifier.weight, trained)
        again = text(backbone)
        trainer().test(again, datamodule=data, ckpt_path=tmp_path / "a.ckpt")
        assert torch.equal(again.net.classifier.weight, trained)
        loaded = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
        trainer().test(loaded, datamodule=data)
        assert torch.equal(loaded.net.classifier.weight, trained)
    assert "begins with" not in caplog.text


def test_a_new_head_needs_no_word(tmp_path, trainer, caplog):
    bare = folder(tmp_path / "bare", BERT)
    AutoModel.from_config(AutoConfig.from_pretrained(bare)).save_pretrained(bare)
    with caplog.at_level("INFO"):
        for backbone in (text_folder(tmp_path / "other", classes=5), bare):
            model = text(backbone)
            assert model.found_head is None
            trainer().validate(model, datamodule=Data(ROWS, class_names=NAMES))
    assert "begins with" not in caplog.text


def test_the_head_of_a_regression_and_of_a_weights_file_are_said_to_be_taken(tmp_path, trainer, caplog):
    backbone = text_folder(tmp_path / "bert", classes=1)
    save_file(AutoModelForSequenceClassification.from_pretrained(backbone).state_dict(), tmp_path / "w.safetensors")
    rows = samples(4, torch.rand(4))
    with caplog.at_level("INFO"):
        for file, place in ((None, f"model.backbone {backbone!r}"), (str(tmp_path / "w.safetensors"), "the file ")):
            model = text(backbone, num_classes=1, backbone_checkpoint=file)
            trainer().validate(model, datamodule=Data(rows, class_names=[]))
            assert torch.equal(model.net.classifier.weight, weight_of(backbone))
            assert f"the head of {place}" in caplog.text
            caplog.clear()


def test_names_of_a_folder_say_nothing_of_a_weights_file(tmp_path):
    backbone = text_folder(tmp_path / "bert", NAMES)
    save_file(AutoModelForSequenceClassification.from_pretrained(backbone).state_dict(), tmp_path / "w.safetensors")
    assert text(backbone).found_head.names == ("no", "yes", "maybe")
    assert text(backbone, backbone_checkpoint=str(tmp_path / "w.safetensors")).found_head.names == ()


@pytest.mark.parametrize("names", [["maybe", "no", "yes"], {"1": "no", "0": "maybe", "2": "yes"}])
def test_an_image_classifier_keeps_its_classes(tmp_path, trainer, names):
    torch.manual_seed(3)
    source = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, **VIT)  # which has two heads
    for layer in (source.head, source.head_dist):
        nn.init.normal_(layer.weight)
    timm.models.save_for_hf(source, tmp_path / "deit", {"label_names": names}, safe_serialization=True)
    model = ImageClassifier(str(tmp_path / "deit"), 3, LoRA(rank=1))
    rows = [{"image": torch.zeros(3, 16, 16), "label": torch.tensor(0), "index": torch.tensor(0)}]
    trainer().validate(model, datamodule=Data(rows, class_names=NAMES, num_classes=3))
    for head, layer in (("head", source.head), ("head_dist", source.head_dist)):
        assert torch.equal(model.net.get_submodule(head).weight, layer.weight[[1, 2, 0]]), head


@pytest.mark.parametrize("kind", ["image", "text"])
def test_an_exported_adapter_carries_the_names_of_its_classes(tmp_path, trainer, kind, recwarn):
    def task(**more: Any) -> Any:
        arguments = {"num_classes": 3, "method": PiSSA(rank=1), **more}
        return image_task(vit, **arguments) if kind == "image" else text_task(bert, **arguments)

    vit, bert = vit_folder(tmp_path / "vit"), encoder_folder(tmp_path / "bert", BERT)
    first = fit(task(), steps=2)
    report = export_model(first, tmp_path / "peft", "peft", class_names=["maybe", "no", "yes"])  # PEFT read it, too
    assert not [warning for warning in recwarn if "Unexpected keyword" in str(warning.message)]

    second = task(adapter=str(report.folder))
    assert second.found_head.names == ("maybe", "no", "yes")
    batch = batch_for(first)
    wanted = first.eval().logits(batch)[:, [1, 2, 0]]
    rows = [{key: value[i] for key, value in {**batch, "index": torch.arange(6)}.items()} for i in range(6)]
    trainer().validate(second, datamodule=Data(rows, class_names=NAMES, num_classes=3))
    torch.testing.assert_close(second.eval().logits(batch), wanted, atol=1e-5, rtol=0)


def test_the_head_of_another_adapter_has_no_names(tmp_path):
    vit = vit_folder(tmp_path / "vit")
    adapter = str(export_model(image_task(vit, PiSSA(rank=1)), tmp_path / "peft", "peft").folder)
    assert image_task(vit, PiSSA(rank=1), adapter=adapter).found_head == FoundHead(
        f"model.adapter {adapter}", ("head",)
    )
    assert image_task(vit, PiSSA(rank=1), adapter=adapter, num_classes=3).found_head is None
