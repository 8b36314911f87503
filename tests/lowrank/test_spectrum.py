import shutil
import weakref

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
from tests.helpers.toys import assert_same_state, optimizer_of, toy_batches, toy_net, train


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


def test_a_scattered_spectrum_keeps_its_first_directions_and_draws_the_others():
    found = Spectrum.of(torch.randn(400, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 20)
    scattered, again, other = (found.scattered(5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(scattered.sigma, found.sigma)
    for name, axis in (("U", 0), ("Vh", 1)):
        vectors, theirs = getattr(scattered, name), getattr(found, name)
        vectors, theirs = (vectors.T, theirs.T) if axis == 0 else (vectors, theirs)  # rows
        assert torch.equal(vectors[:5], theirs[:5])
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(20, dtype=torch.float64))
        assert torch.equal(getattr(scattered, name), getattr(again, name))
        assert not torch.equal(getattr(scattered, name), getattr(other, name))
        # Isotropic: about 1 / n of its length lies along any direction.
        shares = (vectors[5:] @ theirs.T).square()
        assert shares.mean().item() == pytest.approx(1 / vectors.shape[1], rel=0.3)
        assert shares.max() < 20 / vectors.shape[1]


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


def some_spectrum(directions: int = 6, rank: int = 8) -> Spectrum:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, rank, generator=generator) @ torch.randn(rank, 8, generator=generator)
    return Spectrum.of(weight, directions)


def assert_same(found: Spectrum | None, expected: Spectrum) -> None:
    assert found is not None
    for part in ("U", "sigma", "Vh"):
        assert torch.equal(getattr(found, part), getattr(expected, part))


def test_the_cache_gives_back_what_it_got_and_less(cache):
    spectrum = some_spectrum()
    assert cache.read("b[q]", 6) is None
    cache.write("b[q]", spectrum, 6)
    assert_same(cache.read("b[q]", 6), spectrum)
    assert_same(cache.read("b[q]", 2), spectrum.first(2))
    assert cache.read("b[q]", 7) is None
    assert cache.read("c", 1) is None
    assert [file.name for file in cache.folder.iterdir()] == ["b%5Bq%5D.safetensors"]


def test_a_spectrum_that_ended_early_is_found_again(cache):
    """Fewer directions than were asked for are all that there are."""
    spectrum = some_spectrum(rank=3)
    assert len(spectrum) == 3
    cache.write("a", spectrum, 6)
    assert_same(cache.read("a", 5), spectrum)


@pytest.mark.parametrize("harm", ["truncated", "damaged", "other weights", "another's", "no safetensors", "a folder"])
def test_a_file_that_cannot_be_trusted_counts_as_absent(harm, cache, tmp_path):
    cache.write("a", some_spectrum(), 6)
    file, asked = cache.file("a"), "a"
    assert cache.read("a", 6) is not None  # and is trusted from then on, as long as nobody touches it
    whole = file.read_bytes()
    if harm == "truncated":
        file.write_bytes(whole[:-100])
    elif harm == "damaged":
        file.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:])
    elif harm == "other weights":
        cache = SpectrumCache(tmp_path, "ffff")
        cache.folder.mkdir()
        cache.file("a").write_bytes(whole)
    elif harm == "another's":
        asked = "b"
        cache.file("b").write_bytes(whole)
    elif harm == "no safetensors":
        file.write_bytes(b"something else")
    else:
        file.unlink()
        file.mkdir()
    assert cache.read(asked, 6) is None


def started(cache_folder, **options) -> Adaptation:
    adaptation = Adaptation(toy_net(**options), SRLoRA(rank=4, alpha=8.0, target_rank=8))
    adaptation.start(spectra(cache=cache_folder))
    adaptation.plan(4)
    return adaptation


@pytest.fixture
def computed(monkeypatch):
    """The names of what was decomposed."""
    names: list[str] = []
    of = Spectrum.of
    monkeypatch.setattr(Spectrum, "of", lambda *args: names.append(args[-1]) or of(*args))
    return names


def test_a_start_takes_the_spectra_of_its_weights_from_the_cache(tmp_path, computed):
    expected = started(tmp_path)
    assert len(computed) == 12
    again = started(tmp_path)
    assert len(computed) == 12
    assert_same_state(expected.net, again.net)
    started(tmp_path, seed=5)
    started(tmp_path, dtype=torch.float64)  # the fp32 directions are no start for doubles
    assert len(computed) == 36
    assert len(list(tmp_path.iterdir())) == 3


def test_of_a_network_only_what_is_damaged_is_made_anew(tmp_path, computed):
    expected = started(tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    files[3].write_bytes(files[3].read_bytes()[:-9])
    files[5].unlink()
    computed.clear()
    again = started(tmp_path)
    assert len(computed) == 2
    assert_same_state(expected.net, again.net)


def trained(adaptation: Adaptation) -> Adaptation:
    train(adaptation.net, adaptation, optimizer_of(adaptation.net), toy_batches(4))
    assert adaptation.controller.progress().done == 1
    return adaptation


def test_one_spectrum_at_a_time_is_in_memory_at_a_start_and_at_a_switch(tmp_path, monkeypatch):
    expected, counts = trained(started(None)), []
    alive = weakref.WeakSet()  # type: ignore[var-annotated]

    def tracked(make, *args):
        counts.append(len(alive))
        if (spectrum := make(*args)) is not None:
            alive.add(spectrum)
        return spectrum

    of, read = Spectrum.of, SpectrumCache.read
    monkeypatch.setattr(Spectrum, "of", lambda *args: tracked(of, *args))
    monkeypatch.setattr(SpectrumCache, "read", lambda *args: tracked(read, *args))
    for _ in ("computed", "read"):
        adaptation = trained(started(tmp_path))
        assert_same_state(adaptation.net, expected.net)
        assert not alive
    assert len(counts) > 5 * 12
    assert max(counts) == 1  # what has just come from the first process, while its file is made


def test_a_folder_that_takes_no_file_is_only_warned_of_and_all_stays_in_memory(tmp_path):
    (tmp_path / "spectra").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=mentions("kept")) as warned:
        adaptation = trained(started(tmp_path / "spectra"))
    assert sum("cannot be kept" in str(each.message) for each in warned) == 1
    assert_same_state(adaptation.net, trained(started(None)).net)


def test_a_file_that_is_gone_at_a_switch_is_named(tmp_path):
    adaptation = started(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match=mentions("safetensors", "gone", "last checkpoint")):
        trained(adaptation)
