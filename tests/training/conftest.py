import pytest
import timm
import torch

from tests.helpers.digits import BACKBONE, SHAPE


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Weights in a folder, so that checkpoints can leave them out."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("backbone")
    timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", **SHAPE), folder, safe_serialization=True)
    BACKBONE["folder"] = str(folder)
