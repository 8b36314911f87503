"""A text's output is the same alone and beside longer texts, whatever network and tokenizer call padding."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from srlora_pl import GLUEData, LoRA, TextClassifier, UserError, export_model
from tests.helpers.errors import mentions
from tests.helpers.texts import PAD, SEP, W0, WORDS, cola, save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = SIZES | {"num_key_value_heads": 1, "head_dim": 16}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SEQ2SEQ |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "eos_token_id": SEP, "bos_token_id": 2}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}
GPT_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
GEMMA3 = {
    "text_config": DECODER | {"vocab_size": len(WORDS), "max_position_embeddings": 64, "pad_token_id": W0},
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"image_size": 32, "patch_size": 16},
}


def backbone(path: Path, kind: str, settings: dict[str, Any], pad: int | None = PAD, **tokenizer: Any) -> str:
    """A network of one kind whose configuration calls ``pad`` its padding, and a tokenizer that pads with ``[PAD]``."""
    torch.manual_seed(1)
    config = {"vocab_size": len(WORDS), "max_position_embeddings": 64, "num_labels": 2, "pad_token_id": pad} | settings
    if kind == "xlnet":
        del config["max_position_embeddings"]
    net = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **config))
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    net.save_pretrained(path)
    return save_tokenizer(path, ["input_ids", "attention_mask"], **tokenizer)


def outputs(model: TextClassifier, root: Path, size: int, **options: Any) -> Tensor:
    data = GLUEData("cola", str(root), size, max_length=32, cache_dir=str(root.parent / "cache"), **options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    found = L.Trainer(accelerator="cpu", enable_model_summary=False, **quiet).predict(model, datamodule=data)
    index, probability = (torch.cat([batch[key] for batch in found]) for key in ("index", "probability"))
    return probability[index.argsort()]


def assert_independent(model: TextClassifier, root: Path) -> None:
    alone, together = outputs(model, root, 1), outputs(model, root, 11)
    assert alone.std() > 1e-3
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return cola(tmp_path / "glue", test=11)


@pytest.mark.parametrize(
    ("kind", "settings", "pad"),
    [
        ("llama", DECODER, W0),
        ("llama", DECODER, None),
        ("gpt_neo", GPT_NEO, W0),
        ("gemma3", GEMMA3, W0),
        ("mbart", SEQ2SEQ, W0),
        ("bart", SEQ2SEQ, W0),
        ("bert", SIZES, W0),
        ("roberta", SIZES, W0),
        ("longformer", SIZES | {"attention_window": 8}, W0),
    ],
)
def test_the_padding_of_network_and_tokenizer_may_differ(root, tmp_path, kind, settings, pad):
    modules = {"gpt_neo": ["out_proj"], "gemma3": ["q_proj"]}.get(kind, "all-linear")
    model = TextClassifier(backbone(tmp_path / kind, kind, settings, pad), 2, LoRA(2, target_modules=modules))
    assert_independent(model, root)
    assert export_model(model, tmp_path / "merged").difference < 1e-5
    again = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config.get_text_config().pad_token_id
    )
    # The families that number their positions by their own padding token keep it, and BERT does not ask for it.
    assert again == (PAD if kind in ("llama", "gpt_neo", "gemma3", "mbart", "bart") else pad)


@pytest.mark.parametrize(
    ("kind", "settings", "side"),
    [("xlnet", XLNET, "right"), ("xlnet", XLNET, "left"), ("gpt_neo", GPT_NEO, "left"), ("bert", SIZES, "left")],
)
def test_the_network_decides_on_which_side_texts_are_padded(root, tmp_path, kind, settings, side):
    assert_independent(TextClassifier(backbone(tmp_path / kind, kind, settings, padding_side=side), 2, LoRA(2)), root)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("fnet", SIZES),
        ("convbert", SIZES | {"embedding_size": 32, "head_ratio": 1}),
        ("mobilebert", SIZES | {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32}),
        ("nystromformer", SIZES),
        ("yoso", SIZES | {"use_expectation": True}),
    ],
)
def test_a_network_that_sees_its_padding_always_sees_the_same(root, tmp_path, kind, settings, caplog):
    model = TextClassifier(backbone(tmp_path / kind, kind, settings), 2, LoRA(2))
    with caplog.at_level("INFO"):
        assert_independent(model, root)
    assert (
        f"{str(tmp_path / kind)!r} sees the padding of a text, so all are padded to data.max_length 32" in caplog.text
    )
    caplog.clear()
    assert torch.equal(outputs(model, root, 4, pad_to_max_length=True), outputs(model, root, 4))


def test_the_padding_that_a_decoder_learned_from_its_tokenizer_goes_with_it(root, tmp_path, caplog):
    place = backbone(tmp_path / "llama", "llama", DECODER, None)
    model = TextClassifier(place, 2, LoRA(2))
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["default_root_dir"] = tmp_path
    data = GLUEData("cola", str(root), 8, max_length=32, cache_dir=str(tmp_path / "cache"))
    trainer = L.Trainer(accelerator="cpu", max_steps=2, **quiet)
    with caplog.at_level("INFO"):
        trainer.fit(model, datamodule=data)
    assert "The network takes token 0 for padding, as the data do: it had None." in caplog.text
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert again.net.config.pad_token_id == PAD
    tokens = torch.tensor([[W0 + 1, W0, SEP, PAD], [W0 + 2, W0 + 3, W0 + 4, SEP]])
    with torch.no_grad():
        batch = again(tokens, (tokens != PAD).long())
        alone = again(tokens[:1, :3], torch.ones(1, 3, dtype=torch.long))
    torch.testing.assert_close(batch[:1], alone, atol=1e-6, rtol=0)
    L.Trainer(accelerator="cpu", max_steps=3, **quiet).fit(  # goes on, and from the command line's settings as well
        TextClassifier(place, 2, LoRA(2)), datamodule=data, ckpt_path=tmp_path / "a.ckpt"
    )
    notes = export_model(model, tmp_path / "peft", "peft").notes
    assert "pad_token_id=0)" in notes[0]


def without_padding_token(place: str, **special: str) -> str:
    file = Path(place, "tokenizer_config.json")
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings | special))
    file = Path(place, "tokenizer.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding": None}))
    return place


@pytest.mark.parametrize(
    ("own", "special", "taken"),
    [(None, {"eos_token": "[SEP]"}, SEP), (W0, {"eos_token": "[SEP]"}, W0), (-1, {"eos_token": "[SEP]"}, SEP)],
)
def test_a_tokenizer_without_a_padding_token(root, tmp_path, own, special, taken):
    place = without_padding_token(backbone(tmp_path / "gpt_neo", "gpt_neo", GPT_NEO, own), **special)
    model = TextClassifier(place, 2, LoRA(2))
    assert_independent(model, root)
    assert model.net.config.pad_token_id == taken


def test_a_decoder_that_nothing_pads_is_refused(root, tmp_path):
    place = without_padding_token(backbone(tmp_path / "gpt_neo", "gpt_neo", GPT_NEO | {"eos_token_id": None}, None))
    with pytest.raises(UserError, match=mentions('"pad_token"', "tokenizer")):
        outputs(TextClassifier(place, 2, LoRA(2)), root, 4)
