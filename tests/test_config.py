"""Reading config files, overlays, and errors of the parser in one sentence."""

from pathlib import Path

import pytest

from srlora_pl.config import changes, combine, explain, keys, method_arguments, read
from srlora_pl.errors import UserError


def task(**method_arguments: object) -> dict:
    method = {"class_path": "srlora_pl.SRLoRA", "init_args": method_arguments}
    return {"model": {"class_path": "srlora_pl.ImageClassifier", "init_args": {"lr": 0.1, "method": method}}}


def overlay(name: str, **arguments: object) -> dict:
    return {"model": {"init_args": {"method": {"class_path": f"srlora_pl.{name}", "init_args": arguments}}}}


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {class_path: M, init_args: {lr: 1e-4, big: 5E3, text: e4, n: -2e-1}}")
    arguments = read(str(tmp_path / "a.yaml"))["model"]["init_args"]
    assert arguments == {"lr": 1e-4, "big": 5000.0, "text": "e4", "n": -0.2}


@pytest.mark.parametrize("text", ["0", "false", "[]"])
def test_a_file_of_nothing_but_a_value_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(UserError, match="must hold settings as 'key: value' lines, not "):
        read(str(tmp_path / "settings.yaml"))


def test_later_files_win_key_by_key() -> None:
    settings, method = combine([task(rank=4), {"model": {"init_args": {"lr": 0.2}}, "trainer": {"max_steps": 3}}])
    assert settings["model"]["init_args"]["lr"] == 0.2
    assert settings["model"]["init_args"]["method"]["init_args"] == {"rank": 4}
    assert settings["trainer"] == {"max_steps": 3}
    assert method is None


def test_another_class_does_not_inherit_arguments() -> None:
    data = [{"data": {"class_path": name, "init_args": {name: 1}}} for name in ("A", "B")]
    settings, _ = combine([task(), *data])
    assert settings["data"] == {"class_path": "B", "init_args": {"B": 1}}


def test_of_two_overlays_only_the_last_remains() -> None:
    settings, method = combine([task(rank=4), overlay("LoRA", rank=16, dropout=0.1), overlay("PiSSA", alpha=2.0)])
    assert settings["model"]["init_args"]["method"] == {"class_path": "srlora_pl.SRLoRA", "init_args": {"rank": 4}}
    assert method == {"class_path": "srlora_pl.PiSSA", "init_args": {"alpha": 2.0}}
    assert method_arguments(settings, method) == {"rank", "alpha"}


def test_arguments_without_a_class_belong_to_the_task() -> None:
    mine = {"model": {"init_args": {"method": {"init_args": {"rank": 2}}}}}
    settings, method = combine([task(rank=4), mine, overlay("LoRA")])
    assert settings["model"]["init_args"]["method"]["init_args"] == {"rank": 2}
    assert method is not None
    assert method["class_path"] == "srlora_pl.LoRA"


def test_combining_changes_no_input() -> None:
    contents = [task(rank=4), overlay("LoRA", rank=1), {"model": {"init_args": {"lr": 9}}}]
    combine(contents)
    assert contents == [task(rank=4), overlay("LoRA", rank=1), {"model": {"init_args": {"lr": 9}}}]


def test_an_overlay_alone_is_refused() -> None:
    with pytest.raises(UserError, match="before an overlay"):
        combine([overlay("LoRA")])


def test_a_task_after_its_overlay_is_refused() -> None:
    with pytest.raises(UserError, match="put a task's file before an overlay"):
        combine([overlay("LoRA"), task(rank=4)])


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("unrecognized arguments: --lr 0.1", "lr is unknown (did you mean 'model.lr'?)"),
        ("unrecognized arguments: --model.rank=4", "model.rank is unknown (did you mean 'model.method.rank'?)"),
        ("unrecognized arguments: --modle.lr=4", "modle.lr is unknown (did you mean 'model.lr'?)"),
        ("unrecognized arguments: --width=4", "width is unknown"),
    ],
)
def test_an_unknown_setting_and_where_one_of_its_name_is(message: str, sentence: str) -> None:
    known = keys(task(rank=4))
    assert known == ["model", "model.lr", "model.method", "model.method.rank"]
    assert explain(message, known, [], []) == sentence


def test_what_stands_below_a_slip_is_no_mend_for_it() -> None:
    known = ["model", "data", *keys({"modle": {"init_args": {"x": 1}}})]
    assert explain("unrecognized arguments: --modle", known, [], []) == "modle is unknown (did you mean 'model'?)"


def test_an_unknown_form_of_message_stays_on_one_line() -> None:
    assert explain("something\n  new", [], [], []) == "something new"


def test_changes_are_named_as_on_a_command_line() -> None:
    before = {"gone": 1, "trainer": {"max_epochs": 3, "callbacks": [{"class_path": "A"}], "logger": None}}
    after = {"new": 1, "trainer": {"max_epochs": 5, "callbacks": [{"class_path": "B"}], "logger": {"class_path": "L"}}}
    before, after = before | task(rank=8, alpha=2), after | task(rank=4, alpha=2)
    after["model"]["init_args"]["lr"] = 1e-3
    assert changes(before, before) == []
    assert changes(before, after) == [
        "trainer.max_epochs 5 (was 3)",
        "trainer.callbacks [{'class_path': 'B'}] (was [{'class_path': 'A'}])",
        "trainer.logger {'class_path': 'L'} (was None)",
        "model.lr 0.001 (was 0.1)",
        "model.method.rank 4 (was 8)",
    ]
