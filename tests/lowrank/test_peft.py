"""PEFT's tuners beyond the contract, which three of them keep: what is the library's, and what is refused."""

import copy
import pickle
import sys

import pytest
import torch

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, Peft
from tests.helpers.errors import mentions
from tests.helpers.toys import assert_same_state, optimizer_of, toy_batches, toy_net, train

peft = pytest.importorskip("peft")
LINEARS = ["proj", "fc1", "fc2"]
TUNERS = {
    "LORA": {"r": 2, "use_dora": True},
    "IA3": {"feedforward_modules": ".*fc2"},
    "OFT": {"r": 0, "oft_block_size": 4},
    "HRA": {"r": 2},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "LN_TUNING": {},
    "DELORA": {"r": 2},
    "RANDLORA": {"r": 2},
}


def adapted(config, seed: int = 0, dtype=torch.float64, **settings) -> Adaptation:
    net = toy_net(dtype=dtype)
    torch.manual_seed(seed)
    adaptation = Adaptation(net, Peft(config, **{"target_modules": LINEARS, **settings}), ["head"])
    adaptation.start()
    adaptation.plan(6)
    return adaptation


@pytest.mark.parametrize("name", TUNERS)
def test_a_tuner_trains_and_goes_on_and_merges_as_in_peft(name) -> None:
    batches, config = toy_batches(6, dtype=torch.float64), {"peft_type": name, **TUNERS[name]}
    ours = adapted(config)
    made = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name](target_modules=LINEARS, **TUNERS[name])
    theirs = peft.get_peft_model(toy_net(dtype=torch.float64), made).double()
    theirs.base_model.model.load_state_dict(ours.net.state_dict())
    theirs.base_model.model.head.requires_grad_(True)
    trained = [[n for n, p in net.named_parameters() if p.requires_grad] for net in (ours.net, theirs.base_model.model)]
    assert trained[0] == trained[1]
    train(ours.net, ours, optimizer_of(ours.net), batches[:3])
    # from a compact state, in a network that comes with other random values
    resumed = adapted(config, seed=1)
    left_out = {id(p) for p in ours.restorable_parameters()}
    resumed.load_state_dict(copy.deepcopy(ours.state_dict(compact=True)))
    saved = {n: v for n, v in ours.net.state_dict(keep_vars=True).items() if id(v) not in left_out}
    assert not resumed.net.load_state_dict(saved, strict=False).unexpected_keys
    assert_same_state(resumed.net, ours.net)
    reference = optimizer_of(theirs)
    for x, y in batches[:3]:
        reference.zero_grad()
        torch.nn.functional.cross_entropy(theirs(x), y).backward()
        reference.step()
    x = batches[5][0]
    torch.testing.assert_close(ours.net(x), theirs(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.merged_copy().double()(x), theirs.merge_and_unload()(x), rtol=0, atol=1e-5)


def test_a_configuration_may_be_an_object_or_a_mapping() -> None:
    config = peft.LoraConfig(r=4, target_modules=["fc1", "proj"], lora_alpha=16, rank_pattern={"fc1": 2})
    plain = {
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["fc1", "proj"],
        "lora_alpha": 16,
        "rank_pattern": {"fc1": 2},
    }
    method = Peft(config)
    assert method.config == plain
    assert method.spec() == Peft(plain).spec() == Peft(**method.spec()["init_args"]).spec()
    assert method.spec()["class_path"] == "srlora_pl.Peft"
    layers = Adaptation(toy_net(), method).layers
    assert [*layers] == [f"blocks.{block}.{name}" for block in range(2) for name in ("proj", "fc1")]


def test_the_random_start_depends_on_the_seed_alone() -> None:
    one, other, third = (adapted({"peft_type": "LORA", "r": 2}, seed) for seed in (1, 1, 2))
    assert_same_state(one.net, other.net)
    assert not torch.equal(one.net.blocks[0].fc1.lora_A.default.weight, third.net.blocks[0].fc1.lora_A.default.weight)
    after = torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(1), after)


def test_an_adaptation_can_be_copied_and_pickled() -> None:
    adaptation = adapted({"peft_type": "IA3", "feedforward_modules": ".*fc2"})
    for copied in (copy.deepcopy(adaptation), pickle.loads(pickle.dumps(adaptation))):
        layer = copied.layers["blocks.0.fc1"]
        assert layer.module is copied.net.blocks[0].fc1
        assert layer.adapter_parameters()[0].requires_grad
        for trains in (True, False):
            layer.adapter_parameters()[0].requires_grad_(trains)
            with copied.disabled():
                pass
            assert layer.adapter_parameters()[0].requires_grad == trains


def test_what_was_frozen_stays_so_and_is_saved() -> None:
    adaptation = adapted({"peft_type": "LORA", "r": 2, "init_lora_weights": "mica"}, dtype=torch.float32)
    layer = adaptation.layers["blocks.0.fc1"]
    trains = dict(zip(layer.adapter_names, (p.requires_grad for p in layer.adapter_parameters()), strict=True))
    assert trains == {"lora_A.default.weight": True, "lora_B.default.weight": False}
    assert not {id(p) for p in layer.adapter_parameters()} & {id(p) for p in adaptation.restorable_parameters()}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "VERA"}, ["VERA", "layers share"]),
        ({"peft_type": "VBLORA"}, ["VBLORA", "layers share"]),
        ({"peft_type": "PROMPT_TUNING"}, ["PROMPT_TUNING", "srlora_pl.PromptTuning"]),
        ({"peft_type": "PREFIX_TUNING"}, ["PREFIX_TUNING", "prompt"]),
        ({"peft_type": "ADALORA"}, ["ADALORA", "srlora_pl.AdaLoRA"]),
        ({"peft_type": "XLORA"}, ["XLORA"]),
        ({"peft_type": "IA4"}, ["method.config.peft_type", "'IA4'", "'IA3'"]),
        ({"r": 4}, ["method.config", "peft_type"]),
        (4, ["method.config", "peft_type"]),
        ({"peft_type": "LORA", "rank": 4}, ["method.config", "LoraConfig", "rank"]),
        ({"peft_type": "LORA", "modules_to_save": ["head"]}, ["modules_to_save"]),
    ],
)
def test_what_it_cannot_serve_is_refused_at_once(config, words) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        Peft(config)


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (
            {"peft_type": "LORA", "init_lora_weights": "pissa"},
            {"dtype": torch.float32},
            ["LoraConfig", "pretrained weights"],
        ),
        ({"peft_type": "LORA", "bias": "all"}, {}, ["bias", "beside PEFT's layers"]),
        ({"peft_type": "LORA", "target_modules": ["fc1", "head"]}, {}, ["target_modules takes head", "leave it out"]),
        ({"peft_type": "IA3"}, {}, ["PEFT cannot place IA3Config", "feedforward_modules"]),
        ({"peft_type": "LORA"}, {"target_modules": ["query"]}, ["blocks.0.qkv", "'qkv'"]),
        ({"peft_type": "LORA", "target_modules": ["nothing"]}, {}, ["PEFT cannot place LoraConfig", "nothing"]),
    ],
)
def test_what_does_not_fit_the_network_is_refused(config, settings, words) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        adapted(config, **settings)


def test_a_network_takes_no_second_tuner() -> None:
    adaptation = adapted({"peft_type": "LORA"})
    with pytest.raises(UserError, match="has adapters already"):
        Adaptation(adaptation.net, Peft({"peft_type": "HRA"}))


def test_a_tuner_that_cannot_be_merged_is_refused_by_name() -> None:
    adaptation = adapted({"peft_type": "LILY"})
    for refuse in (adaptation.merge, adaptation.merged_copy):
        with pytest.raises(UserError, match=mentions("PEFT's lily", "cannot be merged")):
            refuse()


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"Peft needs .* pip install peft"):
        Peft({"peft_type": "IA3"})
