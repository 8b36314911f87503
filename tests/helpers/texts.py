"""A tokenizer of a few words, made on the spot, and files of texts."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from srlora_pl.data.texts.datamodule import TextDataModule
from tests.helpers.data import attach

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(20))]
PAD, UNK, CLS, SEP, W0 = range(5)
GLUE_HEADS = {
    "CoLA": ("", "index\tsentence"),
    "SST-2": ("sentence\tlabel", "index\tsentence"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "index\t#1 ID\t#2 ID\t#1 String\t#2 String"),
    "STS-B": ("index\tgenre\tsentence1\tsentence2\tscore", "index\tgenre\tsentence1\tsentence2"),
    "QNLI": ("index\tquestion\tsentence\tlabel", "index\tquestion\tsentence"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "index\tsentence1\tsentence2"),
    "MNLI": (
        "index\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "index\tgenre\tsentence1_parse\tsentence1\tsentence2",
    ),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "id\tquestion1\tquestion2"),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "index\tsentence1\tsentence2"),
}


def save_tokenizer(
    folder: Path, names: Iterable[str] = ("input_ids", "token_type_ids", "attention_mask"), **options: Any
) -> str:
    """A fast tokenizer of whole words in BERT's form, [CLS] a [SEP] b [SEP], and its folder."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    # What some published tokenizers carry along, and what must not act here.
    core.enable_padding(length=30)
    core.enable_truncation(max_length=5)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    options = {"model_max_length": 64, "model_input_names": list(names), **special, **options}
    PreTrainedTokenizerFast(tokenizer_object=core, **options).save_pretrained(folder)
    return str(folder)


def with_model(data: TextDataModule, tokenizer: str, processed: int = 0, **more: Any) -> Any:
    """``data`` with a stand-in for a trainer whose model has this tokenizer."""
    attach(data, processed, **more)
    data.trainer.lightning_module = SimpleNamespace(backbone_name=tokenizer)  # type: ignore[union-attr, misc]
    return data


def sentence(words: int, first: int = 0) -> str:
    return " ".join(f"w{(first + i) % 20}" for i in range(words))


def write(path: Path, *lines: str, bom: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + "".join(f"{line}\n" for line in lines).encode())
    return path


def cola(root: Path, train: int = 50, dev: int = 11, test: int = 7) -> Path:
    """CoLA's folder with sentences of 1 to 30 words; the label of sentence i is i % 2."""
    for name, count in {"train": train, "dev": dev}.items():
        write(root / "CoLA" / f"{name}.tsv", *(f"gj\t{i % 2}\t\t{sentence(1 + 7 * i % 30, i)}" for i in range(count)))
    write(root / "CoLA" / "test.tsv", "index\tsentence", *(f"{i}\t{sentence(1 + 5 * i % 9, i)}" for i in range(test)))
    return root
