"""A user's folder, with everything in it that commands can be given by mistake."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.cli import LORA, SMALL_RUN, cli
from tests.helpers.encoders import BERT, folder
from tests.helpers.texts import GLUE_HEADS, WORDS, save_tokenizer, sentence

FIT, TEST, PREDICT = (
    [command, "--config", "small.yaml", *(["--ckpt_path", "image.ckpt"] if command != "fit" else [])]
    for command in ("fit", "test", "predict")
)


def pictures(root: str, *options: str, command: list[str] = FIT) -> list[str]:
    return [*command, "--data.name=null", f"--data.root={root}", "--data.batch_size=2", *options]


def texts(root: str, *options: str, command: str = "fit") -> list[str]:
    return [command, "--config", "text.yaml", f"--data.root={root}", *options]


def encoder(name: str) -> list[str]:
    return texts("reviews", f"--model.backbone={name}")


GOOD = "text,label\nw1 w2,no\nw3,yes\nw4,maybe\n"
ROWS = "".join(f"{sentence(1 + i % 5, i)},{('no', 'yes', 'maybe')[i % 3]}\n" for i in range(24))
FILES: dict[str, str | bytes] = {
    # settings
    "broken.yaml": "a: [1\nb: 2\n",
    "binary.yaml": b"\xff\xfe\x00\x80",
    "evil.yaml": "!!python/object/apply:os.mkdir [ran]\n",
    "list.yaml": "- 1\n",
    "trainer.yaml": "trainer: 3\n",
    "overlay.yaml": LORA.read_text(),
    "key0.yaml": "modle: 1\n",
    "key1.yaml": "trainer:\n  max_step: 3\n",
    "key2.yaml": "model:\n  init_args:\n    lrr: 3\n",
    "key3.yaml": "model:\n  init_args:\n    method:\n      init_args:\n        rnk: 3\n",
    "key4.yaml": "model:\n  lr: 3\n",
    "class0.yaml": "model:\n  init_args:\n    method:\n      class_path: srlora_pl.SRLORA\n",
    "class1.yaml": "model:\n  class_path: srlora_pl.ImageClassifer\n",
    "type0.yaml": "trainer:\n  max_steps: many\n",
    "empty.ckpt": b"",
    # texts
    "reviews/train.csv": f"text,label\n{ROWS}",
    "twice/train.csv": GOOD,
    "twice/train.tsv": GOOD.replace(",", "\t"),
    "semicolons.csv": GOOD.replace(",", ";"),
    "fields.csv": "text,label\nw1,no\nw2, w3,yes\n",
    "quote.csv": 'text,label\nw1,no\n"w2,yes\nw3,no\n',
    "rowless.csv": "text,label\n",
    "empty.csv": f"{GOOD} ,yes\n",
    "number.jsonl": '{"text": "w1", "label": "no"}\n{"text": 3, "label": "yes"}\n',
    "unknown/train.csv": GOOD,
    "unknown/val.csv": "text,label\nw1,yes\nw2,yess\n",
    "single.csv": "text,label\nw1,no\nw2,no\n",
    "pairs.csv": "a,b,label\n" + "".join(f"w{i},w{i + 1},{i % 2}\n" for i in range(16)),
    "nan.csv": f"{GOOD}w5,NaN\n",
    "nan_number.csv": "text,label\nw1,1\nw2,nan\n",
    "list.jsonl": '{"text": "w1", "label": ["a"]}\n',
    "unlabelled/train.csv": GOOD,
    "unlabelled/val.csv": "text\nw1\n",
    "bare_texts/train.csv": GOOD,
    "bare_texts/test.csv": "text,label\nw1,\nw2,\n",
    "binary.csv": f"text,label\n{ROWS.replace('maybe', 'no')}",
    "latin.csv": GOOD.encode() + b"\xe4h,no\n",
    "broken.jsonl": '{"text": "w1", "label": "no"}\n{"text": \n',
    "fake.parquet": GOOD,
    "glue/WNLI/train.tsv": f"{GLUE_HEADS['WNLI'][0]}\n0\tw1\tw2\t1\n",
    "glue/RTE/train.tsv": f"{GLUE_HEADS['RTE'][0]}\n0\tw1\tw2\tentail\n",
    "glue/STS-B/train.tsv": f"{GLUE_HEADS['STS-B'][0]}\n0\tnews\tw1\tw2\thigh\n",
    "long/train.csv": f"text,label\n{ROWS}" + f"{sentence(9)},no\n" * 3,
    "long/val.csv": f"text,label\n{ROWS}",
    "long/test.csv": f"text,label\n{sentence(7)},no\n{sentence(6)},yes\n",
    # adapters
    "adapters/ia3/adapter_config.json": '{"peft_type": "IA3"}',
    "adapters/pickle/adapter_config.json": '{"peft_type": "LORA", "r": 4, "lora_alpha": 4}',
    "adapters/pickle/adapter_model.bin": b"",
    "adapters/other/adapter_config.json": '{"peft_type": "LORA", "r": 4, "lora_alpha": 4}',
    # tokenizers
    "bytes/config.json": json.dumps(BERT),
    "bytes/tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}',
    "wordless/config.json": json.dumps(BERT),
}
TEXT_RUN: dict[str, Any] = {
    "model": {
        "class_path": "srlora_pl.TextClassifier",
        "init_args": {
            "backbone": "encoder",
            "backbone_kwargs": {"pretrained": False},
            "method": {"class_path": "srlora_pl.SRLoRA", "init_args": {"rank": 2, "alpha": 2, "target_rank": 6}},
        },
    },
    "data": {
        "class_path": "srlora_pl.TextData",
        "init_args": {"root": "reviews", "batch_size": 4, "max_length": 32, "cache_dir": "../cache"},
    },
    "trainer": {"accelerator": "cpu", "max_steps": 8, "enable_model_summary": False, "enable_progress_bar": False},
}


def picture(path: Path, mode: str = "RGB", size: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def make_pictures(home: Path) -> None:
    spoilt = ("spoilt/text", "spoilt/cut", "spoilt/mode")
    for root in ("pictures", "hollow", *spoilt, "bare/train", "labelled/train", "labelled/test"):
        for name in ("a", "b"):
            for i in range(4):
                picture(home / root / name / f"{i}.png")
    (home / "hollow/c").mkdir()
    picture(home / "bare/test/0.png")
    picture(home / "lonely/only/0.png")
    for name in ("train/ant", "train/bee", "val/ants"):
        picture(home / "stranger" / name / "0.png")
    (home / "spoilt/text/b/3.png").write_text("not an image")
    content = (home / "spoilt/cut/b/3.png").read_bytes()
    (home / "spoilt/cut/b/3.png").write_bytes(content[: len(content) // 2])
    (home / "spoilt/mode/b/3.png").unlink()
    picture(home / "spoilt/mode/b/3.tiff", "F")


def make_tables(home: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": Value("string"), "weight": Value("float32")})
    images = [str(path) for path in sorted((home / "pictures").rglob("*.png"))]
    columns = {"image": images, "label": ["a", "b"] * 4, "weight": [0.5] * 8}
    table = Dataset.from_dict(columns, features)
    for name in ("table/train", "trainless/test"):
        (home / name).parent.mkdir()
        table.to_parquet(home / f"{name}.parquet")


def make_weights(home: Path) -> None:
    kwargs = yaml.safe_load(SMALL_RUN)["model"]["init_args"]["backbone_kwargs"]

    def weights(name: str, factor: float = 1.0, seed: int = 5, **other: int) -> None:
        torch.manual_seed(seed)
        state = timm.create_model("vit_tiny_patch16_224", **kwargs | other).state_dict()
        state["blocks.0.attn.qkv.weight"] *= factor
        save_file(state, home / name)

    weights("other.safetensors")
    weights("another.safetensors", seed=6)
    weights("wide.safetensors", embed_dim=64)
    weights("deep.safetensors", depth=3)
    weights("zero.safetensors", 0.0)
    weights("nan.safetensors", float("nan"))
    name = "base_model.model.blocks.7.mlp.fc1.lora_{}.weight"
    pairs = {name.format("A"): torch.ones(4, 32), name.format("B"): torch.ones(128, 4)}
    save_file(pairs, home / "adapters/other/adapter_model.safetensors")
    whole = (home / "other.safetensors").read_bytes()
    (home / "cut.safetensors").write_bytes(whole[: len(whole) // 2])


def make_checkpoints(home: Path) -> None:
    """Of three runs, of images, of texts, and of images on weights from a file; and files that look like theirs."""
    for kind, config, *options in (
        ("image", "small"),
        ("text", "text"),
        ("compact", "small", "--model.backbone_checkpoint=other.safetensors"),
    ):
        code, _, err = cli("fit", "--config", f"{config}.yaml", "--name", kind, *options, home=home)
        assert code == 0, err
        shutil.copy(home / f"runs/{kind}-srlora/version_0/checkpoints/last.ckpt", home / f"{kind}.ckpt")
    content = (home / "image.ckpt").read_bytes()
    (home / "truncated.ckpt").write_bytes(content[: len(content) // 2])
    torch.save({"head.weight": torch.zeros(2)}, home / "weights.ckpt")
    foreign = torch.load(home / "image.ckpt", weights_only=True)
    torch.save({k: v for k, v in foreign.items() if k != "srlora"}, home / "foreign.ckpt")


def make_home(home: Path) -> None:
    for name, content in FILES.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (home / "nothing").mkdir()
    (home / "small.yaml").write_text(SMALL_RUN)
    (home / "text.yaml").write_text(yaml.safe_dump(TEXT_RUN))
    data = {"task": "cola", "max_length": 32, "cache_dir": "../cache"}
    glue_run = TEXT_RUN | {"data": {"class_path": "srlora_pl.GLUEData", "init_args": data}}
    (home / "glue.yaml").write_text(yaml.safe_dump(glue_run))
    folder(home / "encoder", BERT | {"vocab_size": len(WORDS), "max_position_embeddings": 64})
    save_tokenizer(home / "encoder")
    make_pictures(home)
    make_tables(home)
    make_weights(home)
    make_checkpoints(home)
