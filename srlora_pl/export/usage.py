"""How to load an exported folder, as Python that stands on its model card."""

from pathlib import Path

from srlora_pl.models.family import ModelFamily


def usage(family: ModelFamily, format: str, place: str, on_hub: bool) -> str:
    """The code for a folder at ``place``, or for a repository of the hub of that name."""
    kind = _KINDS[family.task_type]
    recipe, path = family.recipe, family.base[0]
    if Path(path).is_dir():
        # Of a folder on another machine only the name tells anything, and of a shipped backbone its own.
        recipe = recipe.replace(path, Path(family.name).name)
    code = _CODE[format, kind]
    if on_hub and "FOLDER" in code:
        code = f"from huggingface_hub import snapshot_download\n{code}"
    for word, value in {
        "FOLDER": f"snapshot_download({place!r})" if on_hub else repr(place),
        "PLACE": repr(place),
        "TIMM": repr(f"{'hf-hub' if on_hub else 'local-dir'}:{place}"),
        "BASE": recipe,
    }.items():
        code = code.replace(word, value)
    return code


_IMAGE = """\
folder = FOLDER
config = json.load(open(f"{folder}/config.json"))
about = config["pretrained_cfg"]
_, height, width = about["input_size"]
image = Image.open("photo.jpg").convert("RGB")
big = [int(side / about["crop_pct"]) for side in (width, height)]
if about["crop_mode"] == "center":
    ratio = min(image.width / big[0], image.height / big[1])
    big = [max(int(side / ratio), least) for side, least in zip(image.size, big)]
image = image.resize(big, Image.Resampling[about["interpolation"].upper()])
left, top = round((big[0] - width) / 2), round((big[1] - height) / 2)
pixels = np.asarray(image.crop((left, top, left + width, top + height))) / 255
pixels = ((pixels - about["mean"]) / about["std"]).astype(np.float32).transpose(2, 0, 1)[None]
"""
_KINDS = {None: "image", "SEQ_CLS": "text", "CAUSAL_LM": "causal"}
_GENERATE = """\
inputs = tokenizer("A prompt, written as in training.", return_tensors="pt")
tokens = model.generate(**inputs, do_sample=False, max_new_tokens=256)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_CODE = {
    ("merged", "image"): """\
import timm
from PIL import Image

model = timm.create_model(TIMM, pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(prepare(Image.open("photo.jpg").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][logits[0].argmax()])
""",
    ("merged", "text"): """\
from transformers import pipeline

model = pipeline("text-classification", PLACE)
print(model("A text."))
""",
    ("merged", "causal"): f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PLACE)
tokenizer = AutoTokenizer.from_pretrained(PLACE)
{_GENERATE}""",
    ("peft", "causal"): f"""\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = BASE
model = PeftModel.from_pretrained(base, PLACE).eval()
tokenizer = AutoTokenizer.from_pretrained(PLACE)
{_GENERATE}""",
    ("peft", "image"): """\
import timm
from peft import PeftModel

base = BASE
model = PeftModel.from_pretrained(base, PLACE).eval()
""",
    ("peft", "text"): """\
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = BASE
model = PeftModel.from_pretrained(base, PLACE).eval()
tokenizer = AutoTokenizer.from_pretrained(PLACE)
print(model(**tokenizer("A text.", return_tensors="pt")).logits)
""",
    ("onnx", "image"): f"""\
import json

import numpy as np
import onnxruntime
from PIL import Image

{_IMAGE}\
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
(logits,) = session.run(None, {{"pixel_values": pixels}})
print(config["label_names"][logits[0].argmax()])
""",
    ("onnx", "text"): """\
import json

import onnxruntime
from transformers import AutoTokenizer

folder = FOLDER
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
(logits,) = session.run(None, dict(tokenizer(["A text."], padding=True, truncation=True, return_tensors="np")))
print(json.load(open(f"{folder}/config.json"))["id2label"][str(logits[0].argmax())])
""",
    ("pt2", "image"): f"""\
import json

import numpy as np
import torch
from PIL import Image

{_IMAGE}\
model = torch.export.load(f"{{folder}}/model.pt2").module()
logits = model(pixel_values=torch.from_numpy(pixels))
print(config["label_names"][int(logits[0].argmax())])
""",
    ("pt2", "text"): """\
import json

import torch
from transformers import AutoTokenizer

folder = FOLDER
tokenizer = AutoTokenizer.from_pretrained(folder)
model = torch.export.load(f"{folder}/model.pt2").module()
logits = model(**tokenizer(["A text."], padding=True, truncation=True, return_tensors="pt"))
print(json.load(open(f"{folder}/config.json"))["id2label"][str(int(logits[0].argmax()))])
""",
}
