import pytest
import torch

from srlora_pl.util.precision import full_precision


def test_a_precision_that_was_set_for_one_backend_is_kept():
    backend = torch.backends.cuda.matmul
    backend.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError):  # what torch says then
            torch.get_float32_matmul_precision()
        with full_precision():
            assert (torch.get_float32_matmul_precision(), backend.fp32_precision) == ("highest", "ieee")
        assert backend.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
