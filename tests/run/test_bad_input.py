"""Whatever a user can get wrong, through the command line: one sentence, no training, nothing left, nothing lost."""

import re
from pathlib import Path
from typing import Any

import pytest

from srlora_pl.tasks.base import Task
from tests.helpers.cli import cli, complaint, contents
from tests.helpers.errors import mentions
from tests.helpers.user_folder import FIT, PREDICT, TEST, encoder, pictures, texts

pytestmark = pytest.mark.usefixtures("no_network")
Case = tuple[list[str], list[str]]
METHOD = "--model.method."


def glue(task: str, root: str, *options: str) -> list[str]:
    return ["fit", "--config", "glue.yaml", f"--data.task={task}", f"--data.root={root}", *options]


def export(*options: str, checkpoint: str = "image.ckpt", output: str = "new") -> list[str]:
    return ["export", "--config", "small.yaml", f"--ckpt_path={checkpoint}", f"--output={output}", *options]


COMMAND_LINE: dict[str, Case] = {
    "unknown subcommand": (["fitt"], ["'fitt'", "'fit'"]),
    "options before the subcommand": (["--config", "small.yaml", "fit"], ["'--config'", "fit, validate"]),
    "no config": (["fit"], ["task's config", "--config", "configs lists"]),
    "config without a name": (["fit", "--config"], ["--config"]),
    "missing config": (["fit", "--config", "smal.yaml"], ["smal.yaml", "'small.yaml'"]),
    "invalid YAML": (["fit", "--config", "broken.yaml"], ["broken.yaml", "line 2"]),
    "not a text": (["fit", "--config", "binary.yaml"], ["binary.yaml"]),
    "code in YAML": (["fit", "--config", "evil.yaml"], ["evil.yaml", "line 1"]),
    "no mapping": (["fit", "--config", "list.yaml"], ["list.yaml", "[1]"]),
    "trainer no mapping": (["fit", "--config", "trainer.yaml"], ["trainer.yaml", "3"]),
    "config is a folder": (["fit", "--config", "reviews"], ["reviews", "does not exist"]),
    "overlay alone": (["fit", "--config", "overlay.yaml"], ["class_path", "before an overlay"]),
    "top-level key": ([*FIT, "--config", "key0.yaml"], ["modle", "key0.yaml, line 1", "'model'"]),
    "trainer key": ([*FIT, "--config", "key1.yaml"], ["max_step", "key1.yaml, line 2", "'trainer.max_steps'"]),
    "model key": ([*FIT, "--config", "key2.yaml"], ["model.lrr", "key2.yaml, line 3", "'lr'"]),
    "method key": ([*FIT, "--config", "key3.yaml"], ["model.method.rnk", "key3.yaml, line 5", "'rank'"]),
    "key beside class_path": ([*FIT, "--config", "key4.yaml"], ["model.lr", "key4.yaml, line 2", "init_args"]),
    "data key": ([*FIT, "--data.batchsize", "4"], ["--data.batchsize", "'batch_size'"]),
    "method class": ([*FIT, "--config", "class0.yaml"], ["srlora_pl.SRLORA", "class0.yaml", "'srlora_pl.SRLoRA'"]),
    "model class": ([*FIT, "--config", "class1.yaml"], ["'srlora_pl.ImageClassifer'", "'srlora_pl.ImageClassifier'"]),
    "unknown module": ([*FIT, "--model.method", "nowhere.Thing"], ["'nowhere.Thing'", "--model.method"]),
    "class of another kind": ([*FIT, "--model.method", "srlora_pl.ImageData"], ["srlora_pl.ImageData", "Method"]),
    "wrong capitals": ([*FIT, "--model.method", "Lora"], ["'Lora'", "'srlora_pl.LoRA'"]),
    "callback": ([*FIT, "--trainer.callbacks+=EarlyStoping"], ["'EarlyStoping'", "EarlyStopping"]),
    "option": ([*FIT, "--model.lrr", "1"], ["--model.lrr", "'lr'"]),
    "shortened option": ([*FIT, "--lr", "1"], ["--lr", "'model.lr'"]),
    "option of the method": ([*FIT, "--model.rank", "1"], ["--model.rank", "'model.method.rank'"]),
    "mistyped group": ([*FIT, "--model.methd.rank", "1"], ["--model.methd.rank is", "'model.method.rank'"]),
    "abbreviated option": ([*FIT, "--trainer.max_step", "1"], ["--trainer.max_step ", "'trainer.max_steps'"]),
    "option without a value": ([*FIT, "--model.lr"], ["--model.lr needs a value"]),
    "stray word": ([*FIT, "stray"], ["'stray'"]),
    "float": ([*FIT, "--model.lr", "fast"], ["--model.lr", "float", "'fast'"]),
    "int in a file": ([*FIT, "--config", "type0.yaml"], ["trainer.max_steps", "type0.yaml, line 2", "'many'"]),
    "bool": ([*FIT, "--data.hflip", "maybe"], ["--data.hflip", "bool", "'maybe'"]),
    "choice": ([*FIT, "--model.schedule", "cosin"], ["--model.schedule", "'cosine', 'linear'", "'cosin'"]),
    "pair": ([*FIT, "--data.crop_scale", "[0.1]"], ["--data.crop_scale", "2 elements", "[0.1]"]),
    "number of classes": ([*FIT, "--model.num_classes", "7"], ["model.num_classes", "7", "leave it out"]),
    "name that is not UTF-8": ([*FIT, "--name", "caf\udce9"], [r"'caf\udce9'", "UTF-8", "rename"]),
    "folder that is not UTF-8": ([*PREDICT, "--data.predict_root=caf\udce9"], [r"caf\udce9'", "UTF-8", "rename"]),
    "name that is a path": ([*FIT, "--name", "../elsewhere"], ["--name", "'../elsewhere'", "without folders"]),
    "folder for runs": ([*FIT, "--trainer.default_root_dir", "small.yaml"], ["trainer.default_root_dir", "small.yaml"]),
    "predict without weights": (["predict", "--config", "small.yaml"], ["--ckpt_path"]),
    "predict into a folder": ([*PREDICT, "--output", "reviews"], ["--output", "reviews", "reviews/predictions.csv"]),
    "predict below a file": ([*PREDICT, "--output", "small.yaml/out.csv"], ["into small.yaml", "--output"]),
    "GLUE's files into one": (
        ["predict", "--config", "glue.yaml", "--ckpt_path", "text.ckpt", "--output", "mine.tsv"],
        ["--output", "mine.tsv", "folder"],
    ),
}
TRAINER: dict[str, Case] = {
    "accelerator": ([*FIT, "--trainer.accelerator", "gpu"], ["gpu"]),
    "accelerator's name": ([*FIT, "--trainer.accelerator", "cuba"], ["cuba"]),
    "precision": ([*FIT, "--trainer.precision", "16-true"], ["trainer.precision", "'16-true'", "16-mixed"]),
    "validation after no step": ([*FIT, "--trainer.val_check_interval=0"], ["trainer.val_check_interval", "0"]),
    "validation after no epoch": (
        [*FIT, "--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=0"],
        ["trainer.check_val_every_n_epoch", "0"],
    ),
    "negative clipping": ([*FIT, "--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val", "-1"]),
    "no steps in accumulation": ([*FIT, "--trainer.accumulate_grad_batches", "0"], ["accumulate_grad_batches", "0"]),
    "validation beyond the epoch": (
        [*FIT, "--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=999"],
        ["val_check_interval", "999"],
    ),
    "endless run": ([*FIT, "--trainer.max_steps=-1", "--trainer.max_epochs=-1"], ["trainer.max_steps"]),
    "no batch at all": ([*FIT, "--trainer.limit_train_batches=0"], ["trainer.limit_train_batches", "0", "no batch of"]),
    "no batches": ([*FIT, "--trainer.limit_train_batches=0.001"], ["0.001", "limit_train_batches"]),
    "no batch to predict": ([*PREDICT, "--trainer.limit_predict_batches=0"], ["trainer.limit_predict_batches", "0"]),
    "averaged weights": (
        [*FIT, "--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"],
        ["EMAWeightAveraging", "SRLoRA"],
    ),
    "checkpoint by an unknown score": (
        [*FIT, "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/acuracy"],
        ["val/acuracy", "'val/accuracy'"],
    ),
    "stopping by a validation there is none of": (
        [*FIT, "--data.val_fraction=0", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
        ["val/loss", "no validation", "data.val_fraction"],
    ),
    "stopping by an unknown score": (
        [*FIT, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
        ["val_loss", "'val/loss'"],
    ),
}
MODEL: dict[str, Case] = {
    "lr 0": ([*FIT, "--model.lr=0"], ["model.lr", "0", "positive"]),
    "lr below 0": ([*FIT, "--model.lr=-0.1"], ["model.lr", "-0.1", "positive"]),
    "lr NaN": ([*FIT, "--model.lr=.nan"], ["model.lr", "nan", "positive"]),
    "head's lr": ([*FIT, "--model.head_lr=-1"], ["model.head_lr", "-1", "positive"]),
    "momentum": ([*FIT, "--model.momentum=1"], ["model.momentum", "1"]),
    "weight decay": ([*FIT, "--model.weight_decay=-1"], ["model.weight_decay", "-1"]),
    "weight decay nobody does": (
        [*FIT, "--model.optimizer=torch.optim.Rprop", "--model.weight_decay=0.1"],
        ["torch.optim.Rprop", "model.weight_decay to 0"],
    ),
    "warm-up below 0": ([*FIT, "--model.warmup_steps=-1"], ["model.warmup_steps", "-1"]),
    "warm-up beyond the run": ([*FIT, "--model.warmup_steps=13"], ["model.warmup_steps", "13", "12 optimizer steps"]),
    "optimizer": ([*FIT, "--model.optimizer=adamv"], ["'adamv'", "'adamw'"]),
    "optimizer of one group": (
        [*FIT, "--model.optimizer=torch.optim.LBFGS", "--model.head_lr=0.1"],
        ["torch.optim.LBFGS", "another one"],
    ),
    "label smoothing": ([*FIT, "--model.label_smoothing=1"], ["model.label_smoothing", "1"]),
    "mixup": ([*FIT, "--model.mixup=-0.1"], ["model.mixup", "-0.1"]),
    "backbone": ([*FIT, "--model.backbone=vit_tiny_in46"], ["'vit_tiny_in46'", "'vit_tiny_in64'"]),
    "backbone's folder": ([*FIT, "--model.backbone=./nowhere"], ["./nowhere", "does not exist"]),
    "backbone's folder without config": ([*FIT, "--model.backbone=reviews"], ["'reviews'", "config.json"]),
    "backbone's arguments": ([*FIT, "--model.backbone_kwargs.depht=3"], ["depht", "correct"]),
    "backbone without a network": (
        [*FIT, "--model.backbone_kwargs={}", "--model.backbone=vit_base_patch16_224"],
        ["'vit_base_patch16_224'", "model.backbone_checkpoint"],
    ),
    "weights missing": ([*FIT, "--model.backbone_checkpoint=no.pth"], ["'no.pth'", "model.backbone_checkpoint"]),
    "weights truncated": ([*FIT, "--model.backbone_checkpoint=cut.safetensors"], ["cut.safetensors", "whole"]),
    "weights that are text": ([*FIT, "--model.backbone_checkpoint=small.yaml"], ["small.yaml", "else than tensors"]),
    "weights of other shapes": ([*FIT, "--model.backbone_checkpoint=wide.safetensors"], ["wide.safetensors", "(64,)"]),
    "weights of other keys": ([*FIT, "--model.backbone_checkpoint=deep.safetensors"], ["also holds 'blocks.2."]),
    "weights of zeros": ([*FIT, "--model.backbone_checkpoint=zero.safetensors"], ["blocks.0", "zero"]),
    "weights with NaN": ([*FIT, "--model.backbone_checkpoint=nan.safetensors"], ["blocks.0", "NaN"]),
}
METHODS: dict[str, Case] = {
    "method's argument": ([*FIT, f"{METHOD}rnk=3"], ["--model.method.rnk", "'rank'"]),
    "rank 0": ([*FIT, f"{METHOD}rank=0"], ["method.rank", "0"]),
    "rank above the matrix": ([*FIT, f"{METHOD}rank=40", f"{METHOD}target_rank=40"], ["rank", "40", "32", "blocks.0"]),
    "alpha": ([*FIT, f"{METHOD}alpha=0"], ["method.alpha", "0"]),
    "dropout": ([*FIT, f"{METHOD}dropout=1"], ["method.dropout", "1"]),
    "beta": ([*FIT, f"{METHOD}beta1=1"], ["method.beta1", "1"]),
    "gamma above 1": ([*FIT, f"{METHOD}fusion_ratio=3"], ["fusion_ratio", "3"]),
    "gamma 0": ([*FIT, f"{METHOD}fusion_ratio=0"], ["fusion_ratio", "0"]),
    "gamma * r not whole": ([*FIT, f"{METHOD}rank=3"], ["fusion_ratio", "0.5", "1.5"]),
    "gamma * r below 1": ([*FIT, f"{METHOD}fusion_ratio=0.1"], ["fusion_ratio", "0.1", "0.4"]),
    "r_target below r": ([*FIT, f"{METHOD}target_rank=3"], ["target_rank", "3", "rank", "4"]),
    "more switches than steps": ([*FIT, "--trainer.max_steps=3"], ["4 switches", "3 optimizer steps", "max_steps"]),
    "scores' reset": ([*FIT, f"{METHOD}reset_scores=some"], [f"{METHOD}reset_scores", "'all', 'recycled'", "'some'"]),
    "no such target": ([*FIT, f"{METHOD}target_modules=[fcc1]"], ["'fcc1'", "'fc1'"]),
    "target that is no linear": ([*FIT, f"{METHOD}target_modules=[norm1]"], ["'norm1'", "LayerNorm"]),
    "pattern": ([*FIT, f"{METHOD}target_modules=fc("], ["'fc('", "regular expression"]),
    "nothing left": ([*FIT, f"{METHOD}exclude_modules=[qkv,proj,fc1,fc2]"], ["exclude_modules", "no linear layer"]),
    "excluded name": ([*FIT, f"{METHOD}exclude_modules=[fcc1]"], ["exclude_modules", "'fcc1'", "'fc1'"]),
    "layers": ([*FIT, f"{METHOD}layers=first"], ["method.layers", "'first'"]),
    "layers that are not there": ([*FIT, f"{METHOD}layers=5-6"], ["layers='5-6'", "no linear layer"]),
    "rank of no layer": ([*FIT, f"{METHOD}rank_pattern={{fcc1: 2}}"], ["rank_pattern", "'fcc1'", "'fc1'"]),
}
CHECKPOINTS: dict[str, Case] = {
    "missing checkpoint": (
        [*FIT, "--ckpt_path", "imag.ckpt"],
        ["--ckpt_path", "imag.ckpt", "does not exist", "'image."],
    ),
    "truncated checkpoint": ([*FIT, "--ckpt_path", "truncated.ckpt"], ["truncated.ckpt", "truncated"]),
    "empty checkpoint": ([*FIT, "--ckpt_path", "empty.ckpt"], ["empty.ckpt", "truncated"]),
    "folder as checkpoint": ([*FIT, "--ckpt_path", "reviews"], ["--ckpt_path", "reviews"]),
    "no checkpoint": ([*FIT, "--ckpt_path", "small.yaml"], ["--ckpt_path", "small.yaml"]),
    "weights for a checkpoint": ([*FIT, "--ckpt_path", "weights.ckpt"], ["weights.ckpt", "backbone_checkpoint"]),
    "foreign checkpoint": ([*FIT, "--ckpt_path", "foreign.ckpt"], ["another program"]),
    "checkpoint of another method": (
        [*FIT, "--config", "overlay.yaml", "--ckpt_path", "image.ckpt"],
        ["SRLoRA", "LoRA"],
    ),
    "checkpoint of another rank": ([*FIT, f"{METHOD}rank=2", "--ckpt_path", "image.ckpt"], ["rank", "4", "2"]),
    "tested with another method": ([*TEST, "--config", "overlay.yaml"], ["SRLoRA", "LoRA"]),
    "checkpoint of another backbone": (
        [*FIT, "--model.backbone=vit_small_patch16_224", "--ckpt_path", "image.ckpt"],
        ["model.backbone", "'vit_tiny_patch16_224'", "'vit_small_patch16_224'"],
    ),
    "checkpoint of another shape": (
        [*TEST, "--model.backbone_kwargs.depth=3"],
        ["model.backbone_kwargs", "'depth': 2", "'depth': 3"],
    ),
    "checkpoint of other pretrained weights": (
        [*FIT, "--model.backbone_checkpoint=other.safetensors", "--ckpt_path", "image.ckpt"],
        ["other pretrained weights", "backbone"],
    ),
    "tested on other pretrained weights": (
        ["test", *FIT[1:], "--model.backbone_checkpoint=another.safetensors", "--ckpt_path", "compact.ckpt"],
        ["other pretrained weights", "backbone"],
    ),
    "checkpoint of another task": (texts("reviews", "--ckpt_path", "image.ckpt"), ["model.backbone"]),
    "checkpoint of other classes": (
        pictures("labelled", command=TEST),
        ["model.num_classes", "10", "2", "data of as many classes"],
    ),
    "checkpoint of another seed": (
        [*FIT, "--seed_everything=4", "--ckpt_path", "image.ckpt"],
        ["seed_everything", "3"],
    ),
    "checkpoint of another lr": ([*FIT, "--model.lr=0.5", "--ckpt_path", "image.ckpt"], ["model.lr", "0.01", "0.5"]),
    "checkpoint of other batches": (
        [*FIT, "--data.batch_size=16", "--ckpt_path", "image.ckpt"],
        ["data.batch_size", "32", "16"],
    ),
    "checkpoint of other steps": (
        [*FIT, "--trainer.accumulate_grad_batches=2", "--ckpt_path", "image.ckpt"],
        ["trainer.accumulate_grad_batches", "2", "1"],
    ),
}
IMAGES: dict[str, Case] = {
    "data set": ([*FIT, "--data.name=digit"], ["'digit'", "'digits'"]),
    "batch of 0": ([*FIT, "--data.batch_size=0"], ["data.batch_size", "0"]),
    "batch above the data": ([*FIT, "--data.batch_size=5000"], ["5000", "smaller batch"]),
    "workers below 0": ([*FIT, "--data.num_workers=-1"], ["data.num_workers", "-1"]),
    "all held out": ([*FIT, "--data.val_fraction=1"], ["data.val_fraction", "1"]),
    "not one image held out": (pictures("pictures", "--data.val_fraction=0.01"), ["0.01", "larger fraction"]),
    "crop": ([*FIT, "--data.crop_scale=[0.9,0.5]"], ["data.crop_scale", "[0.9, 0.5]"]),
    "image size of the data": ([*FIT, "--data.img_size=64"], ["--data.img_size", "model.backbone_kwargs.img_size"]),
    "image size of the model": ([*FIT, "--model.img_size=64"], ["--model.img_size", "model.backbone_kwargs.img_size"]),
    "test crop": ([*FIT, "--data.test_crop_pct=0"], ["data.test_crop_pct", "0"]),
    "no folder of images": (pictures("nowhere"), ["data.root 'nowhere' does not exist"]),
    "file for a folder": (pictures("small.yaml"), ["data.root 'small.yaml' is a file"]),
    "empty folder": (pictures("nothing"), ["data.root", "'nothing'", "class folders"]),
    "one class": (pictures("lonely"), ["'lonely'", "'only'", "two classes"]),
    "empty class folder": (pictures("hollow"), ["hollow/c", "no images"]),
    "text for an image": (pictures("spoilt/text"), ["spoilt/text/b/3.png", "is not an image"]),
    "truncated image": (pictures("spoilt/cut"), ["spoilt/cut/b/3.png", "cannot be read"]),
    "image mode": (pictures("spoilt/mode"), ["spoilt/mode/b/3.tiff", "mode 'F'"]),
    "class of validation only": (pictures("stranger"), ["'ants'", "'ant'"]),
    "no labels to test on": (pictures("bare", command=["test", "--config", "small.yaml"]), ["no labelled test split"]),
    "nothing to validate": (
        pictures("pictures", "--data.val_fraction=0", command=["validate", "--config", "small.yaml"]),
        ["data.val_fraction"],
    ),
    "nothing to predict": ([*PREDICT, "--data.predict_root=nowhere"], ["data.predict_root", "'nowhere'", "not exist"]),
    "no images to predict": (
        [*PREDICT, "--data.predict_root=nothing"],
        ["data.predict_root", "'nothing'", "no images"],
    ),
    "text to predict": ([*PREDICT, "--data.predict_root=small.yaml"], ["small.yaml", "is not an image"]),
    "data set without a network": (pictures("owner/name"), ["'owner/name'", "give the folder"]),
    "download without a network": (
        [*FIT, "--data.name=cifar10", "--data.root=nothing"],
        ["cifar10", "cifar-10-python.tar.gz into nothing"],
    ),
    "image column": (pictures("table", "--data.image_column=imag"), ["'imag'", "'image'"]),
    "image column without images": (pictures("table", "--data.image_column=label"), ["'label'", "no images"]),
    "class column": (pictures("table", "--data.label_column=weight"), ["'weight'", "not classes"]),
    "no train split": (pictures("trainless"), ["no split 'train'"]),
}
TEXTS: dict[str, Case] = {
    "no file": (texts("reviews/trian.csv"), ["reviews/trian.csv", "does not exist", "'train.csv'"]),
    "no train in the folder": (texts("nothing"), ["'nothing'", "train.csv"]),
    "two trains": (texts("twice"), ["train.csv and train.tsv", "keep one"]),
    "kind of file": (texts("small.yaml"), ["small.yaml", ".csv, .tsv, .jsonl, .parquet"]),
    "text column": (texts("reviews", "--data.text_column=texts"), ["'texts'", "'text'", "data.text_column"]),
    "label column": (texts("reviews", "--data.label_column=lable"), ["'lable'", "'label'", "data.label_column"]),
    "separator": (texts("semicolons.csv"), ["semicolons.csv", 'data.separator to ";"']),
    "long separator": (texts("reviews", "--data.separator=||"), ["data.separator", "'||'"]),
    "fields": (texts("fields.csv"), ["line 3", "fields.csv", "3", "2"]),
    "open quote": (texts("quote.csv"), ["line 3 of quote.csv", "quote"]),
    "no rows": (texts("rowless.csv"), ["rowless.csv", "no rows"]),
    "empty text": (texts("empty.csv"), ["'text'", "line 5 of empty.csv"]),
    "number for a text": (texts("number.jsonl"), ["'text'", "3", "line 2 of number.jsonl"]),
    "unknown label": (texts("unknown"), ["'yess'", "line 3 of unknown/val.csv", "'yes'"]),
    "one class of text": (texts("single.csv"), ["single.csv", "1 class"]),
    "label that is no number": (
        texts("reviews/train.csv", "--data.problem=regression"),
        ["'no'", "line 2 of reviews/train.csv", "not a finite number"],
    ),
    "NaN label": (texts("nan.csv"), ["'label'", "line 5 of nan.csv", "NaN"]),
    "NaN number": (texts("nan_number.csv", "--data.problem=regression"), ["line 3 of nan_number.csv", "NaN"]),
    "list of labels": (texts("list.jsonl"), ["line 1 of list.jsonl", "multi_label"]),
    "validation without labels": (texts("unlabelled"), ["unlabelled/val.csv", "'label'"]),
    "test without labels": (texts("bare_texts", command="test"), ["no labelled test split", "validate"]),
    "fewer classes than the head": (
        texts("binary.csv", "--ckpt_path=text.ckpt", command="validate"),
        ["model.num_classes", "3", "2", "data of as many classes"],
    ),
    "undecodable bytes": (texts("latin.csv"), ["Line 5 of latin.csv", "0xe4", "UTF-8"]),
    "no JSON": (texts("broken.jsonl"), ["Line 2 of broken.jsonl", "JSON"]),
    "no parquet": (texts("fake.parquet"), ["fake.parquet", "not a parquet file"]),
    "file to predict": (
        texts("reviews", "--data.predict_root=new.csv", "--ckpt_path=text.ckpt", command="predict"),
        ["new.csv", "does not exist"],
    ),
    "problem": (texts("reviews", "--data.problem=regresion"), ["--data.problem", "'regression'", "'regresion'"]),
    "another problem": (texts("reviews", "--model.problem=multi_label"), ["model.problem", "'multi_label'", "leave"]),
    "score": (texts("reviews", "--model.score_names=[acuracy]"), ["'acuracy'", "'accuracy'"]),
    "class weights": (texts("reviews", "--model.class_weights=[1,2]"), ["model.class_weights", "3 numbers"]),
    "class weights by name": (
        texts("reviews", "--model.class_weights={no: 1, yess: 2, maybe: 1}"),
        ["model.class_weights", "'yess'", "'yes'"],
    ),
    "length of 0": (texts("reviews", "--data.max_length=0"), ["data.max_length", "0"]),
    "length without room": (texts("reviews", "--data.max_length=2"), ["data.max_length", "2", "at least 3"]),
    "length above the model's": (texts("reviews", "--data.max_length=999"), ["data.max_length", "999", "at most 64"]),
    "tokenizer of another model": (
        texts("reviews", '--model.backbone_kwargs={"pretrained": false, "vocab_size": 10}'),
        ["tokenizer of model.backbone", "of 'train'", "knows 10"],
    ),
    "pairs without token types": (
        texts(
            "pairs.csv",
            "--data.text_column=[a,b]",
            '--model.backbone_kwargs={"pretrained": false, "type_vocab_size": 1}',
        ),
        ["token type 1 of 'train'", "knows 1"],
    ),
    "unknown task": (glue("SST-3", "glue"), ["'SST-3'", "'sst2'"]),
    "no task folder": (glue("cola", "glue"), ["'glue'", "CoLA/train.tsv"]),
    "no folder of tasks": (glue("rte", "./gleu"), ["./gleu", "RTE/train.tsv"]),
    "no dev file": (glue("wnli", "glue"), ["WNLI/dev.tsv", "does not exist"]),
    "GLUE label": (glue("rte", "glue"), ["'entail'", "line 2 of glue/RTE/train.tsv", "'entailment'"]),
    "GLUE number": (glue("stsb", "glue"), ["'high'", "line 2 of glue/STS-B/train.tsv", "finite number"]),
    "GLUE without a network": (glue("cola", "nyu-mll/glue"), ["'nyu-mll/glue'", "CoLA/train.tsv", "data.root"]),
    "encoder without a network": (
        encoder("microsoft/deberta-v3-base"),
        ["'microsoft/deberta-v3-base'", "config.json, model.safetensors", "tokenizer.json", "model.backbone"],
    ),
    "encoder's folder": (encoder("./nowhere"), ["./nowhere", "does not exist"]),
    "encoder's folder without config": (encoder("reviews"), ["'reviews'", "config.json"]),
    "encoder without weights": (
        texts("reviews", "--model.backbone_kwargs={}"),
        ["encoder", "model.safetensors", "model.backbone_checkpoint"],
    ),
    "encoder's arguments": (texts("reviews", "--model.backbone_kwargs.dropuot=0.1"), ["'dropuot'", "configuration"]),
    "slow tokenizer": (encoder("bytes"), ["'bytes'", "no fast tokenizer", "tokenizer.json"]),
    "no vocabulary": (encoder("wordless"), ["'wordless'", "without words"]),
}
EXPORT: dict[str, Case] = {
    "export without a checkpoint": (["export", "--format", "merged", "--output", "new"], ["--ckpt_path", "--help"]),
    "export's format": (export("--format=onix"), ["--format", "onix", "merged, peft, onnx"]),
    "export's option": (export("--format=merged", "--ranks=3"), ["--ranks=3", "--help"]),
    "export's rank": (export("--format=peft", "--rank=few"), ["--rank", "'few'"]),
    "export of rank 0": (export("--format=peft", "--rank=0", checkpoint="compact.ckpt"), ["rank", "0", "between 1"]),
    "rank of merged weights": (export("--format=merged", "--rank=2"), ["--rank", "2", "--format", "peft"]),
    "export of nothing": (export("--format=merged", checkpoint="imag.ckpt"), ["'imag.ckpt' does not exist", "'image."]),
    "export of half a file": (export("--format=merged", checkpoint="truncated.ckpt"), ["truncated.ckpt", "truncated"]),
    "export of another program's": (export("--format=merged", checkpoint="foreign.ckpt"), ["foreign.ckpt", "exported"]),
    "export into a full folder": (export("--format=merged", output="reviews"), ["--output", "reviews", "--force"]),
    "export into a file": (export("--format=merged", output="small.yaml"), ["--output small.yaml is a file"]),
    "export below a file": (
        export("--format=merged", output="small.yaml/new"),
        ["small.yaml/new", "another place"],
    ),
    "export without settings": (
        ["export", "--ckpt_path=image.ckpt", "--format=merged", "--output=new"],
        ["config.yaml", "--config"],
    ),
    "LoRA on weights from nowhere": (export("--format=peft"), ["random weights", "--format", "merged"]),
    "no adapter": ([*FIT, "--model.adapter=nowhere"], ["model.adapter", "nowhere", "folder"]),
    "adapter without config": ([*FIT, "--model.adapter=reviews"], ["model.adapter", "reviews", "adapter_config.json"]),
    "adapter of another kind": ([*FIT, "--model.adapter=adapters/ia3"], ["IA3", "LORA"]),
    "adapter as a pickle": ([*FIT, "--model.adapter=adapters/pickle"], ["adapter_model.bin", "safe_serialization"]),
    "adapter of another model": ([*FIT, "--model.adapter=adapters/other"], ["adapters/other", "blocks.7"]),
    "kind of checkpoints": (
        [*FIT, "--model.checkpoints=small"],
        ["--model.checkpoints", "'compact', 'full'", "'small'"],
    ),
    "no last checkpoint": (
        ["test", "--config", "small.yaml", "--name", "never", "--ckpt_path", "last"],
        ["--ckpt_path", "last", "runs/never-srlora"],
    ),
}
BAD_INPUT = COMMAND_LINE | TRAINER | MODEL | METHODS | CHECKPOINTS | IMAGES | TEXTS | EXPORT


@pytest.mark.parametrize("case", BAD_INPUT)
def test_one_sentence_and_nothing_else(case: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: Any) -> None:
        pytest.fail("a training step was taken")

    monkeypatch.setattr(Task, "training_step", trained)
    arguments, words = BAD_INPUT[case]
    before = contents(home)
    code, _, err = cli(*arguments, home=home)
    sentence = complaint(err)
    assert code == 2
    assert re.search(mentions(*words), sentence)
    assert len(sentence) < 500
    assert contents(home) == before


def test_texts_that_are_too_long_are_cut_counted_and_said_once(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--data.max_length=8", "--trainer.max_steps=4", "--trainer.val_check_interval=2"]
    code, _, err = cli(*texts("long", *options, f"--trainer.default_root_dir={tmp_path}"), home=home)
    assert code == 0, err
    assert [message for message in caplog.messages if "max_length" in message] == [
        "3 of the 27 samples in 'train' are longer than data.max_length 8 tokens and were cut.",
        "1 of the 2 samples in 'test' are longer than data.max_length 8 tokens and were cut.",
    ]
