import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srlora_pl import UserError
from srlora_pl.lowrank import Spectrum
from srlora_pl.lowrank.spectrum import fingerprint


@settings(max_examples=30, deadline=None)
@given(out=st.integers(2, 40), in_=st.integers(2, 40), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_equals_numpys_svd(out, in_, k, seed):
    weight = torch.randn(out, in_, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    spectrum = Spectrum.of(weight, k)
    U, sigma, Vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    k = min(k, out, in_)
    assert len(spectrum) == k
    np.testing.assert_allclose(spectrum.sigma.numpy(), sigma[:k], rtol=1e-9)
    for j in range(k):
        product = torch.outer(spectrum.U[:, j], spectrum.Vh[j]).numpy()
        gap = min([1.0, *np.abs(np.delete(sigma, j) - sigma[j])]) / sigma[0]
        np.testing.assert_allclose(product, np.outer(U[:, j], Vt[j]), atol=1e-12 / gap)


@pytest.mark.parametrize("decay", [0.9, 0.5])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_far_directions_are_exact_and_orthonormal(shape, decay):
    """Down to where the Gram matrix alone would have lost its digits."""
    generator = torch.Generator().manual_seed(0)
    n = min(shape)
    U = torch.linalg.qr(torch.randn(shape[0], n, dtype=torch.float64, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(shape[1], n, dtype=torch.float64, generator=generator)).Q
    sigma = decay ** torch.arange(n, dtype=torch.float64)
    spectrum = Spectrum.of(U * sigma @ V.T, n)
    k = len(spectrum)
    assert k == int((sigma >= 1e-6).sum())
    torch.testing.assert_close(spectrum.sigma, sigma[:k], rtol=1e-9, atol=0)
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(spectrum.U.T @ spectrum.U, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        (spectrum.U * U[:, :k]).sum(0).abs(), torch.ones(k, dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_pairs_carry_their_part_of_the_weight():
    weight = torch.randn(9, 7, dtype=torch.float64)
    spectrum = Spectrum.of(weight, 7)
    B, A = spectrum.pairs(2, 3, 2.5, like=weight)
    torch.testing.assert_close(2.5 * B @ A, (spectrum.U[:, 2:5] * spectrum.sigma[2:5]) @ spectrum.Vh[2:5])
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_no_more_than_the_triplets(dtype):
    spectrum = Spectrum.of(torch.randn(100, 80, dtype=dtype), 5)
    for tensor, size in ((spectrum.U, 500), (spectrum.sigma, 5), (spectrum.Vh, 400)):
        assert tensor.untyped_storage().nbytes() == dtype.itemsize * size


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.zeros(3, 4), "is zero"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinity"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinity"),
    ],
)
def test_refuses_a_weight_without_directions(weight, says):
    with pytest.raises(UserError, match=rf"layer7.*{says}"):
        Spectrum.of(weight, 1, "layer7")


def test_fingerprint_sees_every_bit_and_name():
    weight = torch.randn(4, 5)
    changed = weight.clone()
    changed[3, 4] = torch.nextafter(changed[3, 4], torch.tensor(9.0))
    base = fingerprint({"a": weight})
    assert base == fingerprint({"a": weight.clone()}) == fingerprint({"a": weight.double()})
    assert len({base, fingerprint({"a": changed}), fingerprint({"b": weight}), fingerprint({"a": weight.T})}) == 4
