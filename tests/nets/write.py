"""Write the trajectories and checkpoints of this folder; run with version 0.1 (commit 93f6c26) and never again.

``python -m tests.nets.write`` from the root of the project, with that version's package.
"""

import json
import shutil
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from tests.helpers import resumed, trajectories
from tests.helpers.texts import WORDS, save_tokenizer, sentence, write

WHOLE = ("srlora-sgd", "srlora-adamw")  # trajectories whose last tensors are kept as they are
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    # Masks of a dropout would differ from machine to machine.
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def write_trajectories() -> None:
    tensors = {}
    for name, case in trajectories.CASES.items():
        snapshots = trajectories.run(case, torch.float64, compact=False)
        for key in snapshots[0]:
            digests = [trajectories.digest(snapshot[key]) for snapshot in snapshots]
            tensors[f"{name}/{key}"] = torch.stack(digests)
        if name in WHOLE:
            tensors |= {f"{name}/last/{key}": value.contiguous() for key, value in snapshots[-1].items()}
    save_file(tensors, trajectories.FILE)


def write_inputs() -> None:
    torch.manual_seed(5)
    net = timm.create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=0, **VIT)
    with torch.no_grad():
        for parameter in net.blocks.parameters():
            parameter.mul_(10 if parameter.ndim == 2 else 1)  # else the images would hardly matter
    timm.models.save_for_hf(net, str(resumed.FOLDER / "image"), safe_serialization=True)
    AutoModel.from_config(AutoConfig.for_model("bert", **BERT)).save_pretrained(resumed.FOLDER / "text")
    save_tokenizer(resumed.FOLDER / "text", model_max_length=32)
    for split, first, count in (("train", 0, 48), ("val", 48, 12), ("test", 60, 32)):
        rows = (f"{sentence(3 + i % 7, 3 * i)},{'odd' if i % 3 else 'even'}" for i in range(first, first + count))
        write(resumed.FOLDER / f"texts/{split}.csv", "text,label", *rows)


def write_checkpoints() -> None:
    """Each run's files, the scores of each, and a digest of the weights that it leads to at the end."""
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        home = resumed.prepare(Path(folder))
        for run, (_, _, moments) in resumed.RUNS.items():
            written = resumed.fit(run, home)
            for moment, name in moments.items():
                shutil.copyfile(written / f"{name}.ckpt", resumed.FOLDER / f"{run}-{moment}.ckpt")
        for file in resumed.FILES:
            scores, merged = resumed.score(resumed.FOLDER / f"{file}.ckpt", home)
            last = resumed.resume(file, home)
            expected[file] = {"scores": scores, "merged": _digests(merged), "last": _digests(last)}
    lines = ",\n".join(f"{json.dumps(file)}: {json.dumps(results)}" for file, results in expected.items())
    resumed.EXPECTED.write_text(f"{{\n{lines}\n}}\n")


def _digests(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: trajectories.digest(tensor).tolist() for name, tensor in tensors.items()}


if __name__ == "__main__":
    shutil.rmtree(resumed.FOLDER, ignore_errors=True)
    write_trajectories()
    write_inputs()
    write_checkpoints()
