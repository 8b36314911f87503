"""Fine-tuning of a small random Llama: loss and gradients of a step, packs, generation, resume and export."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from srlora_pl import CausalLM, Full, InstructionData, LoRA, SRLoRA, UserError, export_model
from srlora_pl.models import causal
from srlora_pl.models.generation import generate
from srlora_pl.util.signatures import arguments_of_class, class_at
from tests.helpers.causal import Largest, save_llama
from tests.helpers.errors import mentions
from tests.helpers.instructions import write
from tests.helpers.paths import ROOT

OVERLAYS = {file.stem: file for file in sorted((ROOT / "configs/methods").glob("*.yaml"))}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A folder with the network and its tokenizer."""
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """20 prompts and answers of very unequal lengths to train on, and 5 questions."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"prompt": "how " * (1 + i % 5), "answer": "yes " * (1 + 7 * i % 13)} for i in range(20)]
    write(folder / "train.jsonl", rows)
    write(folder / "val.jsonl", rows[:3])
    write(folder / "test.jsonl", rows[3:8])
    return folder


def data(texts: Path, kind: type[InstructionData] = InstructionData, **options: Any) -> InstructionData:
    defaults = {"max_length": 64, "template": "{prompt}", "cache_dir": str(texts / "tokens"), "batch_size": 8}
    return kind(str(texts), **{**defaults, **options})


def trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "use_distributed_sampler")
    defaults = {"accelerator": "cpu", "default_root_dir": tmp_path, "max_steps": 1, "limit_val_batches": 0}
    return L.Trainer(**{**dict.fromkeys(quiet, False), **defaults, **options}, callbacks=list(callbacks))


def method_of(overlay: str) -> dict[str, Any]:
    """The method of a config, small enough for the network and for four steps."""
    spec = yaml.safe_load(OVERLAYS[overlay].read_text())["model"]["init_args"]["method"]
    known = arguments_of_class(class_at(spec["class_path"]))
    sizes = {key: value for key, value in {"rank": 2, "target_rank": 4, "tokens": 3}.items() if key in known}
    return {**spec, "init_args": {**(spec.get("init_args") or {}), **sizes}}


class InOrder(InstructionData):
    """In the order of the file, so that a step has the same samples whatever its micro-batches are."""

    def train_order(self, epoch: int) -> Tensor:
        return torch.arange(len(self.train_set))


class Gradients(Callback):
    """The gradients that the optimizer sees in each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        self.steps.append(found)


def gradients(llama: str, texts: Path, tmp_path: Path, batch_size: int, accumulate: int, **options: Any) -> Gradients:
    L.seed_everything(1, verbose=False)
    task, seen = CausalLM(llama, LoRA(4, alpha=8.0), lr=1e-9), Gradients()
    source = data(texts, InOrder, batch_size=batch_size)
    trainer(tmp_path, seen, accumulate_grad_batches=accumulate, **options).fit(task, source)
    return seen


# -- one step


def test_a_step_is_the_same_however_it_is_accumulated(llama, texts, tmp_path):
    """Of 20 samples the third step has but 4: a short last window."""
    runs = [
        gradients(llama, texts, tmp_path, size, parts, max_steps=3).steps for size, parts in ((8, 1), (4, 2), (1, 8))
    ]
    assert [len(run) for run in runs] == [3, 3, 3]
    for run in runs[1:]:
        for step, expected in zip(run, runs[0], strict=True):
            assert step.keys() == expected.keys()
            largest = max(float(each.abs().max()) for each in expected.values())
            for name in expected:
                torch.testing.assert_close(step[name], expected[name], rtol=0, atol=1e-6 * largest, msg=name)


def test_a_step_minimises_the_mean_over_all_its_answer_tokens(llama, texts, tmp_path):
    """By the network's own logits, with all of a step's samples one by one."""
    (step,) = gradients(llama, texts, tmp_path, 2, 4).steps
    L.seed_everything(1, verbose=False)
    task, source = CausalLM(llama, LoRA(4, alpha=8.0)), data(texts)
    source.trainer = trainer(tmp_path)
    source.trainer.strategy.connect(task)
    source.setup("fit")
    batch = source.train_set.__getitems__([(index, 0, 0) for index in range(8)])
    total, count = 0.0, 0
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        length = int((labels != -100).nonzero().max()) + 1
        logits = task(ids[None, :length])[0, :-1]
        total = total + F.cross_entropy(logits, labels[1:length], ignore_index=-100, reduction="sum")
        count += int((labels[1:length] != -100).sum())
    (total / count).backward()
    expected = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    for name, value in step.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_a_batch_without_an_answer_has_the_loss_0(llama):
    task = CausalLM(llama, LoRA(4))
    ids = torch.arange(5, 15).view(2, 5)
    loss = task.training_loss({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert loss == 0
    loss.backward()


def test_padding_on_the_right_needs_no_mask(llama):
    task, ids = CausalLM(llama, LoRA(4)).eval(), torch.randint(5, 90, (1, 9))
    padded = F.pad(ids, (0, 7), value=0)
    hidden, alone = (causal.hidden_states(task.net, each) for each in (padded, ids))
    torch.testing.assert_close(hidden[:, :9], alone, rtol=0, atol=1e-6)


def test_padding_on_the_left_is_known_by_its_mask(llama):
    task, ids = CausalLM(llama, LoRA(4)).eval(), torch.randint(5, 90, (1, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    alone = task.training_loss({"input_ids": ids, "labels": labels})
    padded = {"input_ids": F.pad(ids, (7, 0), value=0), "labels": F.pad(labels, (7, 0), value=-100)}
    mask = F.pad(torch.ones_like(ids), (7, 0))
    torch.testing.assert_close(task.training_loss({**padded, "attention_mask": mask}), alone, rtol=1e-6, atol=0)
    assert abs(task.training_loss(padded) - alone) > 1e-4


def test_what_the_users_own_data_lack_is_told(llama, tmp_path):
    task = CausalLM(llama, LoRA(4))
    ids = torch.arange(5, 15).view(2, 5)
    with pytest.raises(UserError, match="a batch has no labels"):
        task.training_loss({"input_ids": ids})
    asked = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.arange(2)}]
    with pytest.raises(UserError, match=r"srlora_pl\.InstructionData"):
        trainer(tmp_path).predict(task, DataLoader(asked, batch_size=None))


def test_a_split_without_labels_is_told(llama, tmp_path, caplog):
    ids = torch.arange(5, 15).view(2, 5)
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100), "index": torch.arange(2)}
    with caplog.at_level("INFO"):
        trainer(tmp_path, limit_val_batches=1).validate(
            CausalLM(llama, LoRA(4)), DataLoader([batch], batch_size=None), verbose=False
        )
    assert "No token of val has a label" in caplog.text


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_do_not_see_each_other(llama, attention):
    net: Any = CausalLM(llama, LoRA(4), {"attn_implementation": attention}).eval().net
    first, second = torch.randint(5, 90, (2, 1, 6))
    row = torch.cat([first, second], 1)
    positions = torch.arange(6).repeat(2)[None]
    packed = causal.hidden_states(net, row, positions)
    torch.testing.assert_close(packed[:, 6:], causal.hidden_states(net, second), rtol=0, atol=1e-6)
    # And with a mask of ones they would.
    seen = net.base_model(input_ids=row, position_ids=positions, attention_mask=torch.ones_like(row), use_cache=False)
    assert (seen.last_hidden_state[:, 6:] - packed[:, 6:]).abs().max() > 1e-3


def test_packs_train_as_the_same_samples_apart(llama, texts, tmp_path):
    apart = gradients(llama, texts, tmp_path, 20, 1)
    L.seed_everything(1, verbose=False)
    task, seen = CausalLM(llama, LoRA(4, alpha=8.0), lr=1e-9), Gradients()
    source = data(texts, batch_size=1, padding="pack")
    run = trainer(tmp_path, seen, accumulate_grad_batches=100, max_epochs=1, max_steps=-1)
    run.fit(task, source)
    assert len(source.train_set) < 20
    for name, value in seen.steps[0].items():
        torch.testing.assert_close(value, apart.steps[0][name], rtol=1e-4, atol=1e-7, msg=name)


def test_soft_capped_tied_heads_give_the_networks_own_logits(tmp_path):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=3.0, query_pre_attn_scalar=16, pad_token_id=0,
    )  # fmt: skip
    net = Gemma2ForCausalLM(config)
    net.model.norm.weight.data.fill_(50.0)  # so that the cap acts
    causal.require_known_head(net, "gemma", torch.arange(5, 12)[None])
    hidden = causal.hidden_states(net, torch.arange(5, 12)[None])
    expected = net(torch.arange(5, 12)[None]).logits
    torch.testing.assert_close(causal.head(net).logits(hidden[0]), expected[0], rtol=1e-5, atol=1e-6)
    net.config.final_logit_softcapping = None
    assert not torch.allclose(causal.head(net).logits(hidden[0]), expected[0], rtol=1e-2)


def test_activation_checkpointing_changes_no_gradient(llama, texts, tmp_path):
    found = []
    for checkpointing in (False, True):
        L.seed_everything(1, verbose=False)
        task, seen = CausalLM(llama, LoRA(4, dropout=0.5), activation_checkpointing=checkpointing), Gradients()
        trainer(tmp_path, seen).fit(task, data(texts))
        assert task.net.is_gradient_checkpointing == checkpointing
        found.append(seen.steps[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("overlay", sorted(set(OVERLAYS) - {"linear_probe", "bitfit"}))
def test_every_method_trains_answers_and_validates(overlay, llama, texts, tmp_path):
    task = CausalLM(llama, method_of(overlay), lr=1e-2)
    before = {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}
    run = trainer(tmp_path, max_steps=4, limit_val_batches=1.0)
    source = data(texts, grader="exact", max_new_tokens=3)
    run.fit(task, source)
    assert any(not torch.equal(value, task.get_parameter(name)) for name, value in before.items())
    assert 0 < run.callback_metrics["val/loss"] < 10
    state = {name: value.clone() for name, value in task.net.state_dict().items()}
    (scores,) = run.test(task, source, verbose=False)
    assert {"test/accuracy", "test/unfinished", "test/unreadable", "test/score"} <= scores.keys()
    assert all(torch.equal(value, state[name]) for name, value in task.net.state_dict().items())


@pytest.mark.parametrize("overlay", ["linear_probe", "bitfit"])
def test_methods_with_nothing_to_train_are_refused(overlay, llama, texts, tmp_path):
    with pytest.raises(UserError, match=r"nothing trains|has no biases"):
        trainer(tmp_path).fit(CausalLM(llama, method_of(overlay)), data(texts))


def test_a_training_step_never_holds_all_logits(llama, texts, tmp_path):
    task, source = CausalLM(llama, LoRA(4), loss_chunk=8), data(texts)
    source.trainer = trainer(tmp_path)
    source.trainer.strategy.connect(task)
    source.setup("fit")
    batch = source.train_set.__getitems__([(index, 0, 0) for index in range(20)])
    rows = int((batch["labels"] != -100).sum())
    with Largest() as seen:
        task.training_loss(batch).backward()
    assert 8 * task.vocab_size <= seen.numel < rows * task.vocab_size / 2


# -- validation


def test_validation_scores_all_answer_tokens_alike(llama, texts, tmp_path):
    task, source = CausalLM(llama, LoRA(4)), data(texts, eval_batch_size=1)
    run = trainer(tmp_path, limit_val_batches=1.0)
    (scores,) = run.validate(task, source, verbose=False)
    total, right, count = 0.0, 0, 0
    for key in range(3):
        batch = source.val_set.__getitems__([key])
        losses, hits = task.token_losses(batch)
        total, right, count = total + float(losses.sum()), right + int(hits.sum()), count + len(losses)
    assert scores["val/loss"] == pytest.approx(total / count, rel=1e-6)
    assert scores["val/perplexity"] == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-6)
    assert scores["val/token_accuracy"] == scores["val/score"] == pytest.approx(right / count)


# -- generation


def test_a_batch_generates_as_its_prompts_one_by_one(llama):
    task, tokenizer = CausalLM(llama, LoRA(4)).eval(), AutoTokenizer.from_pretrained(llama)
    prompts = [list(range(5, 5 + n)) for n in (3, 9, 1, 6)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    together = generate(task.net, tokenizer, ids, mask, 12, ())
    apart = [
        generate(task.net, tokenizer, torch.tensor([p]), torch.ones(1, len(p), dtype=torch.long), 12, ())[0]
        for p in prompts
    ]
    assert together == apart
    assert len({each.text for each in apart}) > 1


def test_a_text_ends_before_a_stop_word_and_generation_with_it(llama):
    task, tokenizer = CausalLM(llama, LoRA(4)).eval(), AutoTokenizer.from_pretrained(llama)
    ids = torch.arange(5, 12)[None]
    whole = generate(task.net, tokenizer, ids, torch.ones_like(ids), 20, ())[0].text
    word = whole[6:9]
    (cut,) = generate(task.net, tokenizer, ids, torch.ones_like(ids), 20, [word])
    assert cut.text == whole[: whole.find(word)]
    assert cut.finished
    calls = []
    task.net.register_forward_hook(lambda *_: calls.append(1))
    generate(task.net, tokenizer, ids, torch.ones_like(ids), 20, [word])
    assert len(calls) < 20


def test_the_models_own_sampling_has_no_say(llama):
    task, tokenizer = CausalLM(llama, LoRA(4)).eval(), AutoTokenizer.from_pretrained(llama)
    ids = torch.arange(5, 12)[None]
    greedy = generate(task.net, tokenizer, ids, torch.ones_like(ids), 8, ())
    task.net.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    assert generate(task.net, tokenizer, ids, torch.ones_like(ids), 8, ()) == greedy
    assert task.net.generation_config.temperature == 5.0


def test_merged_and_unmerged_weights_give_the_same_answers(llama, texts, tmp_path):
    task = CausalLM(llama, LoRA(4))
    for layer in task.adaptation.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    source = data(texts, grader="exact", max_new_tokens=5)
    task.answers = tmp_path / "merged.jsonl"
    trainer(tmp_path).test(task, source, verbose=False)
    task.answers = tmp_path / "apart.jsonl"
    task.adaptation.merge = lambda: None
    trainer(tmp_path).test(task, source, verbose=False)
    merged, apart = ((tmp_path / name).read_text() for name in ("merged.jsonl", "apart.jsonl"))
    assert merged == apart


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class StoppedError(Exception):
    pass


def test_an_interrupted_test_goes_on_where_it_stopped(llama, texts, tmp_path, monkeypatch):
    source = data(texts, grader="exact", max_new_tokens=5, eval_batch_size=2)
    task = CausalLM(llama, LoRA(4))
    task.answers = tmp_path / "whole.jsonl"
    trainer(tmp_path).test(task, source, verbose=False)
    task.answers, asked, complete = tmp_path / "predictions.jsonl", [], task.complete

    def watched(batch: Any, settings: Any) -> Any:
        if len(asked) == 2:
            raise StoppedError
        asked.append(batch["index"].tolist())
        return complete(batch, settings)

    monkeypatch.setattr(task, "complete", watched)
    with pytest.raises(StoppedError):
        trainer(tmp_path).test(task, source, verbose=False)
    assert not task.answers.exists()
    asked.clear()
    trainer(tmp_path).test(task, source, verbose=False)
    assert sum(map(len, asked)) == 1  # of 5 questions 4 were answered
    assert rows(task.answers) == rows(tmp_path / "whole.jsonl")
    assert [*tmp_path.glob("*.part")] == []


def test_answers_of_other_weights_are_not_taken(llama, texts, tmp_path):
    source = data(texts, grader="exact", max_new_tokens=5)
    task = CausalLM(llama, LoRA(4))
    task.answers = tmp_path / "predictions.jsonl"
    trainer(tmp_path).test(task, source, verbose=False)
    before = rows(task.answers)
    part = "".join(json.dumps({**row, "text": "left", "model": "another"}) + "\n" for row in before)
    (tmp_path / "predictions.jsonl.0.part").write_text(part)
    trainer(tmp_path).test(task, source, verbose=False)
    assert rows(task.answers) == before


def test_samples_are_graded_only_if_their_references_can_be(llama, texts, tmp_path):
    """None of the references is a number."""
    source = data(texts, grader="gsm8k", max_new_tokens=5)
    task = CausalLM(llama, LoRA(4), samples=2)
    trainer(tmp_path, limit_val_batches=1).validate(task, source, verbose=False)
    assert [(row["reference"][:3], row["correct"]) for row in task.sample_answers()] == [("yes", None)] * 2
    assert len([row for batch in trainer(tmp_path).predict(task, source) for row in batch]) == 5
    with pytest.raises(UserError, match=mentions("line 1 of", "test.jsonl", "gsm8k")):
        trainer(tmp_path).test(task, source, verbose=False)


# -- resume


@pytest.mark.parametrize("padding", ["buckets", "pack"])
def test_a_run_stopped_within_an_epoch_goes_on_to_the_bit(padding, llama, texts, tmp_path):
    def fit(*callbacks: Callback, ckpt_path: Path | None = None) -> CausalLM:
        L.seed_everything(3, verbose=False)
        task = CausalLM(llama, SRLoRA(2, alpha=4.0, target_rank=6), lr=1e-2, schedule="constant")
        run = trainer(tmp_path, *callbacks, max_steps=12, accumulate_grad_batches=2)
        run.fit(task, data(texts, batch_size=2, padding=padding), ckpt_path=ckpt_path, weights_only=True)
        return task

    class Save(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 7 and not (tmp_path / "mid.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    whole, resumed = fit(Save()), fit(ckpt_path=tmp_path / "mid.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert whole.adaptation.controller.progress().done > 1


# -- export


@pytest.mark.parametrize("method", [LoRA(4), SRLoRA(2, target_rank=6)], ids=["lora", "srlora"])
def test_the_merged_folder_and_the_adapter_give_the_trained_logits(method, llama, texts, tmp_path):
    task = CausalLM(llama, method, lr=1e-2)
    trainer(tmp_path, max_steps=6).fit(task, data(texts))
    ids = torch.arange(5, 12)[None]
    task.eval()
    expected = task(ids).detach()
    export_model(task, tmp_path / "merged")
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-5)
    assert not hasattr(merged.config, "quantization_config")
    assert (tmp_path / "merged" / "generation_config.json").is_file()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(AutoTokenizer.from_pretrained(llama))
    from peft import PeftModel

    export_model(task, tmp_path / "peft", "peft")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "peft")
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("method", [LoRA(4), SRLoRA(4, target_rank=8)], ids=["lora", "srlora"])
def test_weights_in_bfloat16_are_merged_in_float32_and_rounded_once(llama, texts, tmp_path, method):
    task = CausalLM(llama, method, lr=1e-2, weights="bfloat16")
    assert {p.dtype for p in task.parameters() if p.requires_grad} == {torch.float32}
    trainer(tmp_path, max_steps=6, precision="bf16-mixed").fit(task, data(texts))
    name = "model.layers.1.mlp.down_proj"
    layer = task.adaptation.layers[name]
    assert layer.weight.dtype == torch.bfloat16
    assert task.net.model.rotary_emb.inv_freq.dtype == torch.float32
    W = layer.frozen.dense().double()  # of a switch and a start exact beyond bfloat16
    exact = W + layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    report = export_model(task, tmp_path / "merged")
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged.get_parameter(f"{name}.weight"), exact.float().bfloat16())
    assert 0 < report.difference < 0.02 * report.largest
    report = export_model(task, tmp_path / "peft", "peft")
    assert report.difference < 1e-5 * report.largest


def test_methods_that_train_the_weights_want_them_in_float32(llama):
    with pytest.raises(UserError, match=r"Full.*torch\.bfloat16"):
        CausalLM(llama, Full(), weights="bfloat16")


def test_bf16_true_is_refused(llama, texts, tmp_path):
    with pytest.raises(UserError, match=r"trainer\.precision is 'bf16-true'"):
        trainer(tmp_path, precision="bf16-true").fit(CausalLM(llama, LoRA(4)), data(texts))


def test_programs_for_servers_are_refused(llama, tmp_path):
    with pytest.raises(UserError, match="--format merged"):
        export_model(CausalLM(llama, LoRA(4)), tmp_path / "out", "pt2")
    assert not (tmp_path / "out").exists()
