import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, Spectrum, SRLoRA
from srlora_pl.lowrank.starts.spectrum import SpectrumCache, spectra
from srlora_pl.util.cache import fingerprint
from tests.helpers.errors import mentions
from tests.helpers.toys import toy_net


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


@pytest.mark.parametrize("decay", [0.9, 0.77, 0.5])  # the last of 48 at 7e-3, 5e-6 and, cut off, 7e-15
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
    with pytest.raises(UserError, match=mentions("layer7", says)):
        Spectrum.of(weight, 1, "layer7")


def test_fingerprint_sees_every_bit_and_name():
    weight = torch.randn(4, 5)
    changed = weight.clone()
    changed[3, 4] = torch.nextafter(changed[3, 4], torch.tensor(9.0))
    base = fingerprint({"a": weight})
    assert base == fingerprint({"a": weight.clone()}) == fingerprint({"a": weight.double()})
    assert len({base, fingerprint({"a": changed}), fingerprint({"b": weight}), fingerprint({"a": weight.T})}) == 4
    finer = weight.double()
    finer[3, 4] = torch.nextafter(finer[3, 4], torch.tensor(9.0, dtype=torch.float64))
    assert torch.equal(finer.float(), weight)
    assert fingerprint({"a": finer}) != base


# --- the cache ---


@pytest.fixture
def cache(tmp_path):
    return SpectrumCache(tmp_path / "spectra", "0123abcd")


def some_spectra(directions: int = 6) -> dict[str, Spectrum]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(12, 8, generator=generator) for name in ("a", "b[q]")}
    return {name: Spectrum.of(weight, directions) for name, weight in weights.items()}


def assert_same(found, spectra, directions):
    assert set(found) == set(directions)
    for name, count in directions.items():
        for part in ("U", "sigma", "Vh"):
            assert torch.equal(getattr(found[name], part), getattr(spectra[name].first(count), part))


def test_the_cache_gives_back_what_it_got_and_less(cache):
    spectra = some_spectra()
    assert cache.read({"a": 6}) is None
    cache.write(spectra, {"a": 6, "b[q]": 6})
    for directions in ({"a": 6, "b[q]": 6}, {"a": 2}, {"a": 6, "b[q]": 1}):
        assert_same(cache.read(directions), spectra, directions)
    assert cache.read({"a": 7}) is None
    assert cache.read({"a": 6, "c": 1}) is None
    assert [file.name for file in cache.file.parent.iterdir()] == ["0123abcd.safetensors"]


def test_a_spectrum_that_ended_early_is_found_again(cache):
    """Fewer directions than were asked for are all that there are."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    spectra = {"a": Spectrum.of(weight, 6)}
    assert len(spectra["a"]) == 3
    cache.write(spectra, {"a": 6})
    assert_same(cache.read({"a": 5}), spectra, {"a": 5})


@pytest.mark.parametrize("harm", ["truncated", "damaged", "another's", "no safetensors", "a folder"])
def test_a_file_that_cannot_be_trusted_counts_as_absent(harm, cache, tmp_path):
    cache.write(some_spectra(), {"a": 6, "b[q]": 6})
    whole = cache.file.read_bytes()
    if harm == "truncated":
        cache.file.write_bytes(whole[:-100])
    elif harm == "damaged":
        cache.file.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:])
    elif harm == "another's":
        cache = SpectrumCache(tmp_path, "ffff")
        cache.file.write_bytes(whole)
    elif harm == "no safetensors":
        cache.file.write_bytes(b"something else")
    else:
        cache.file.unlink()
        cache.file.mkdir()
    assert cache.read({"a": 6, "b[q]": 6}) is None


def test_a_cache_that_cannot_be_written_is_only_warned_of(tmp_path):
    (tmp_path / "spectra").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=mentions("kept")):
        SpectrumCache(tmp_path / "spectra", "0123").write(some_spectra(), {"a": 6, "b[q]": 6})


def test_a_start_takes_the_spectra_of_its_weights_from_the_cache(tmp_path, monkeypatch):
    def start(**options):
        net = toy_net(**options)
        adaptation = Adaptation(net, SRLoRA(rank=4, target_rank=8))
        adaptation.start(spectra(cache=tmp_path))
        return net

    expected = start()
    computed = []
    of = Spectrum.of
    monkeypatch.setattr(Spectrum, "of", lambda *args: computed.append(args[-1]) or of(*args))
    again = start()
    assert computed == []
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), again.parameters(), strict=True))
    start(seed=5)
    start(dtype=torch.float64)  # the fp32 directions are no start for doubles
    assert len(computed) == 24
    assert len(list(tmp_path.iterdir())) == 3
