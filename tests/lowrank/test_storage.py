"""An adaptation in a folder: it comes back to the bit and trains on, and no other folder is taken for one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_flatten

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, storage
from tests.helpers.toys import METHODS, assert_same_state, optimizer_of, srlora, toy_batches, toy_net, train

# With target_rank 6 the updates stay smaller than the weights, with 12 they do not.
SAVED = METHODS | {"ledger": srlora(rank=2, target_rank=6), "list": srlora(target_modules=["query", "fc1"], layers=[1])}
FILES = {storage.TENSORS, storage.CONTENT}


def half_done(method, stop=13, steps=40, **options):
    net = toy_net(**options)
    adaptation = Adaptation(net, method, trainable=["head"])
    adaptation.start()
    adaptation.plan(steps)
    optimizer = optimizer_of(net)
    train(net, adaptation, optimizer, toy_batches(stop))
    return net, adaptation, optimizer


@pytest.fixture
def folder(tmp_path):
    half_done(srlora())[1].save(tmp_path / "saved")
    return tmp_path / "saved"


def assert_same_adaptation(adaptation, other):
    assert_same_state(adaptation.net, other.net)
    ours, theirs = (tree_flatten(each.state_dict(compact=True)) for each in (adaptation, other))
    assert ours[1] == theirs[1]
    for value, expected in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected


@pytest.mark.parametrize("how", ["attach", "start and plan"])
@pytest.mark.parametrize("method", SAVED)
def test_what_was_saved_comes_back_to_the_bit_and_trains_on(method, how, tmp_path):
    net, adaptation, optimizer = half_done(SAVED[method])
    adaptation.save(tmp_path / "new" / "folder")
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == FILES

    other = toy_net()
    loaded = Adaptation.load(other, tmp_path / "new" / "folder")
    assert_same_adaptation(loaded, adaptation)
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in net.parameters()]

    again = optimizer_of(other)
    again.load_state_dict(optimizer.state_dict())
    rest = toy_batches(40)[13:]
    if how == "attach":
        loaded.attach(again, 40)
        for x, y in rest:
            again.zero_grad()
            nn.functional.cross_entropy(other(x), y).backward()
            again.step()
    else:
        loaded.start()
        loaded.plan(40)
        train(other, loaded, again, rest, first_step=13)
    whole, expected, _ = half_done(SAVED[method], stop=40)
    assert_same_adaptation(loaded, expected)
    assert not torch.equal(net.head.weight, whole.head.weight)  # all this while


@pytest.mark.parametrize("method", METHODS)
def test_an_adaptation_that_has_not_started_comes_back_too(method, tmp_path):
    net = toy_net()
    adaptation = Adaptation(net, METHODS[method])
    adaptation.save(tmp_path)
    loaded = Adaptation.load(toy_net(), tmp_path)
    assert_same_adaptation(loaded, adaptation)
    assert loaded.started == (method == "lora")
    adaptation.start()
    loaded.start()
    assert_same_state(loaded.net, net)


def test_the_files_hold_no_frozen_weight(tmp_path):
    _, adaptation, _ = half_done(METHODS["lora"])
    adaptation.net.register_buffer("mean", torch.arange(3.0))
    adaptation.save(tmp_path)
    trained = {name for name, p in adaptation.net.named_parameters() if p.requires_grad}
    content = storage.read(tmp_path)
    assert content["net"].keys() == trained | {"mean"}
    assert content["trainable"] == ["head"]
    sizes = sum(value.numel() for value in load_file(tmp_path / storage.TENSORS).values())
    assert sizes == sum(adaptation.net.state_dict()[name].numel() for name in trained | {"mean"})
    net = toy_net()
    net.register_buffer("mean", torch.zeros(3))
    Adaptation.load(net, tmp_path)
    assert net.mean.tolist() == [0, 1, 2]


def test_a_weight_that_somebody_else_trains_is_saved(tmp_path):
    net, adaptation, _ = half_done(srlora())
    net.embed.bias.requires_grad_(True)
    with torch.no_grad():
        net.embed.bias += 1
    adaptation.save(tmp_path)
    loaded = Adaptation.load(toy_net(), tmp_path)
    assert_same_adaptation(loaded, adaptation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_adapters_are_saved_as_they_are_apart(dtype, tmp_path):
    net, adaptation, _ = half_done(METHODS["pissa"], steps=0, stop=0, dtype=dtype)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    adaptation.merge()
    adaptation.save(tmp_path)
    assert all(layer.merged for layer in adaptation.layers.values())
    loaded = Adaptation.load(toy_net(dtype=dtype), tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.net.state_dict().items())
    assert not any(layer.merged for layer in loaded.layers.values())


def test_a_folder_may_be_saved_to_again(folder):
    _, adaptation, _ = half_done(METHODS["pissa"], stop=3)
    adaptation.save(str(folder))
    assert {file.name for file in folder.iterdir()} == FILES
    assert_same_adaptation(Adaptation.load(toy_net(), str(folder)), adaptation)


def test_what_is_loaded_may_be_saved_compactly_where_its_weights_can_be_reloaded(folder):
    loaded = Adaptation.load(toy_net(), folder, pretrained=lambda: toy_net().state_dict())
    pristine, x = toy_net(), toy_batches(1)[0][0]
    pristine.head = loaded.net.head
    frozen = sum(not p.requires_grad for p in loaded.net.parameters())
    assert len(loaded.restorable_parameters()) == frozen
    with loaded.disabled():
        assert torch.equal(loaded.net(x), pristine(x))


# --- damaged and foreign folders


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def change_content(folder, **changes):
    file = folder / storage.CONTENT
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


HARMS = {
    "no folder": shutil.rmtree,
    "an empty folder": empty,
    "no JSON": lambda folder: (folder / storage.CONTENT).unlink(),
    "no tensors": lambda folder: (folder / storage.TENSORS).unlink(),
    "a folder for a file": lambda folder: ((folder / storage.CONTENT).unlink(), (folder / storage.CONTENT).mkdir()),
    "truncated JSON": lambda folder: (folder / storage.CONTENT).write_text(
        (folder / storage.CONTENT).read_text()[:-40]
    ),
    "another JSON": lambda folder: (folder / storage.CONTENT).write_text('{"peft_type": "LORA"}'),
    "a list": lambda folder: (folder / storage.CONTENT).write_text("[1]"),
    "no text": lambda folder: (folder / storage.CONTENT).write_bytes(b"\xff\xfe\x00"),
    "nested too deep": lambda folder: (folder / storage.CONTENT).write_text("[" * 100_000),
    "truncated tensors": lambda folder: (folder / storage.TENSORS).write_bytes(
        (folder / storage.TENSORS).read_bytes()[:-100]
    ),
    "other tensors": lambda folder: (folder / storage.TENSORS).write_bytes(b"something else"),
    "another value": lambda folder: (folder / storage.CONTENT).write_text(
        (folder / storage.CONTENT).read_text().replace('"alpha": 8.0', '"alpha": 9.0')
    ),
    "another digest": lambda folder: change_content(folder, digest="0"),
    "no content": lambda folder: change_content(folder, content=None),
    "other content": lambda folder: change_content(folder, content={"net": {}}),
    "a tensor that is not there": lambda folder: change_content(folder, content={"net": {storage._TENSOR: "999"}}),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_folder_without_a_sound_adaptation_is_refused_in_one_sentence(harm, folder):
    HARMS[harm](folder)
    with pytest.raises(UserError, match="saved") as error:
        Adaptation.load(toy_net(), folder)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_refused(folder):
    file = folder / storage.TENSORS
    content = file.read_bytes()
    file.write_bytes(content[:-50] + bytes([content[-50] ^ 1]) + content[-49:])
    with pytest.raises(UserError, match="do not belong together"):
        Adaptation.load(toy_net(), folder)


def test_files_that_were_not_written_together_are_refused(folder, tmp_path):
    half_done(srlora(), stop=12)[1].save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / storage.TENSORS, folder)
    with pytest.raises(UserError, match=r"adaptation\.json and adaptation\.safetensors do not belong together"):
        Adaptation.load(toy_net(), folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 5}, "other pretrained weights"),
        ({"depth": 3}, "adapts other layers"),
        ({"classes": 4}, r"head\.weight has shape \(3, 12\) .* \(4, 12\)"),
        ({"hidden": 24}, "other pretrained weights"),
    ],
)
def test_another_network_is_refused_in_one_sentence(options, says, folder):
    with pytest.raises(UserError, match=says) as error:
        Adaptation.load(toy_net(**options), folder)
    assert "\n" not in str(error.value)


def test_a_network_with_more_than_was_saved_is_refused_in_one_sentence(folder):
    net = toy_net()
    net.register_buffer("mean", torch.zeros(3))
    with pytest.raises(UserError, match=r"mean is absent .* has shape \(3,\)") as error:
        Adaptation.load(net, folder)
    assert "\n" not in str(error.value)


def test_a_network_without_what_was_trained_is_refused_in_one_sentence(folder):
    net = toy_net()
    net.head = nn.Identity()
    with pytest.raises(UserError, match="trainable names 'head'") as error:
        Adaptation.load(net, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("adaptation", "format"), 99, "has format 99 .* update srlora_pl"),
        (("adaptation", "method", "class_path"), "os.system", "'os.system'.* names no method"),
    ],
)
def test_a_later_version_and_an_unknown_method_are_refused(where, value, says, folder):
    node = content = storage.read(folder)
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    storage.write(folder, content)
    with pytest.raises(UserError, match=says):
        Adaptation.load(toy_net(), folder)


# --- the format of the files


def test_nested_containers_come_back(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    content = {
        "tensors": [base, base.T, base[:, 1], torch.tensor(1.5), torch.empty(0, 2), torch.tensor([True, False])],
        "types": {"bf16": base.bfloat16(), "fp64": base.double() / 3, "int": torch.tensor([2**40])},
        "plain": [1, 0.1, 1e-300, "ä", None, True, [], {}],
        "tensor": {"tensor": 4},  # a name as good as any other
        "pair": (base, 2),
    }
    storage.write(tmp_path, content)
    found = storage.read(tmp_path)
    assert found["plain"] == content["plain"]
    assert found["tensor"] == content["tensor"]
    tensors = [*content["tensors"], *content["types"].values(), content["pair"][0]]
    for value, expected in zip([*found["tensors"], *found["types"].values(), found["pair"][0]], tensors, strict=True):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)
    assert found["pair"][1:] == [2]
