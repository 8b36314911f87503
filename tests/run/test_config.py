"""Reading config files, laying them over each other, and errors of the parser in one sentence."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from srlora_pl.run.config import beside_class_path, changes, combine, keys, read
from srlora_pl.run.explain import explain, missing_package
from srlora_pl.run.settings import drop_arguments, split_options
from srlora_pl.util import yaml_text
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions

# Texts that one reader of YAML or another takes for something else.
LIKE_OTHERS = [
    *("1e-3", "25921e05", "1e5", "0x10", "0o17", "012", "1_000", "1.0", ".5", "12:30", "1e400", ".inf", ".nan"),
    *("yes", "no", "on", "null", "~", "true", "2024-01-01", "=", "<<", "-", "?", "[1]", "{}", "#x", "&a", "a: b", ""),
    *(" a ", "a\nb", "\x85", "\u2028", "\udcff", "\ufeff", "'", '"'),
]


def task(**method_arguments: object) -> dict:
    method = {"class_path": "srlora_pl.SRLoRA", "init_args": method_arguments}
    return {"model": {"class_path": "srlora_pl.ImageClassifier", "init_args": {"lr": 0.1, "method": method}}}


def overlay(name: str, **arguments: object) -> dict:
    return {"model": {"init_args": {"method": {"class_path": f"srlora_pl.{name}", "init_args": arguments}}}}


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {class_path: M, init_args: {lr: 1e-4, big: 5E3, text: e4, n: -2e-1}}")
    arguments = read(str(tmp_path / "a.yaml"))["model"]["init_args"]
    assert arguments == {"lr": 1e-4, "big": 5000.0, "text": "e4", "n": -0.2}


@given(st.text() | st.from_regex(r"[-+.]?[0-9][-+.:_0-9a-fA-FxXoO]*", fullmatch=True) | st.sampled_from(LIKE_OTHERS))
def test_text_stays_text_in_a_file(text: str) -> None:
    written = yaml_text.write({"name": text, "more": [text], "deep": {"revision": text}})
    assert yaml_text.plain(yaml_text.load(written)) == {"name": text, "more": [text], "deep": {"revision": text}}


@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text())
def test_other_programs_read_the_same_from_a_written_file(value: object) -> None:
    assert yaml.safe_load(yaml_text.write({"value": value})) == {"value": value}


def test_only_text_in_quotes_is_marked() -> None:
    read_back = yaml_text.load("a: 25921e05\nb: '25921e05'\nc: word\nd: [\"null\"]\n")
    assert read_back == {"a": 25921e05, "b": "25921e05", "c": "word", "d": ["null"]}
    kinds = {"a": float, "b": yaml_text.Text, "c": str}
    assert {key: type(read_back[key]) for key in kinds} == kinds
    assert [
        type(each) for each in (read_back["d"][0], yaml_text.plain(read_back)["d"][0], yaml_text.plain(read_back)["b"])
    ] == [
        yaml_text.Text,
        str,
        str,
    ]


def test_no_setting_is_a_date() -> None:
    assert yaml_text.load("a: 2024-01-01\nb: 2024-13-45") == {"a": "2024-01-01", "b": "2024-13-45"}


@pytest.mark.parametrize("text", ["0", "false", "[]"])
def test_a_file_of_nothing_but_a_value_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(UserError, match=mentions("'key: value'")):
        read(str(tmp_path / "settings.yaml"))


def callbacks(*nodes: object) -> dict:
    return {"trainer": {"callbacks": [*nodes]}}


def callback(name: str, **arguments: object) -> dict:
    return {"class_path": name, "init_args": arguments}


def test_callbacks_of_all_files_count() -> None:
    first = callbacks(callback("EarlyStopping", monitor="val/loss", mode="max", patience=3), "LearningRateMonitor")
    keep = callback("ModelCheckpoint", save_top_k=-1)
    settings, _ = combine([first, callbacks(keep), {"trainer": {"callbacks": callback("Timer", duration="1")}}])
    assert settings == callbacks(*first["trainer"]["callbacks"], keep, callback("Timer", duration="1"))


def test_the_same_callback_once_more_is_laid_over_the_first() -> None:
    first = callback("lightning.pytorch.callbacks.EarlyStopping", monitor="val/loss", mode="max", patience=3)
    other = callback("EarlyStopping", monitor="val/accuracy")
    again = callback("EarlyStopping", monitor="val/loss", patience=20)
    another = callback("my.EarlyStopping", monitor="val/loss")
    settings, _ = combine([callbacks(first), callbacks(again, other, another)])
    merged = callback("lightning.pytorch.callbacks.EarlyStopping", monitor="val/loss", mode="max", patience=20)
    assert settings == callbacks(merged, other, another)
    assert first["init_args"]["patience"] == 3


@pytest.mark.parametrize("nothing", [None, []])
def test_a_later_file_can_say_that_there_are_no_callbacks(nothing: object) -> None:
    assert combine([callbacks("Timer"), {"trainer": {"callbacks": nothing}}])[0] == {"trainer": {"callbacks": nothing}}


def test_lists_of_loggers_are_joined_one_takes_anothers_place_and_lists_of_values_are_values() -> None:
    one, two = callback("CSVLogger"), callback("TensorBoardLogger")
    for first, second, expected in (([one], [two], [one, two]), (one, two, two)):
        assert combine([{"trainer": {"logger": first}}, {"trainer": {"logger": second}}])[0] == {
            "trainer": {"logger": expected}
        }
    columns = [{"data": {"init_args": {"text_column": each}}} for each in (["a", "b"], ["c"])]
    assert combine(columns)[0] == columns[1]


def test_later_files_win_key_by_key() -> None:
    settings, foreign = combine([task(rank=4), {"model": {"init_args": {"lr": 0.2}}, "trainer": {"max_steps": 3}}])
    assert settings["model"]["init_args"]["lr"] == 0.2
    assert settings["model"]["init_args"]["method"]["init_args"] == {"rank": 4}
    assert settings["trainer"] == {"max_steps": 3}
    assert foreign == set()


def test_another_class_does_not_inherit_arguments() -> None:
    data = [{"data": {"class_path": name, "init_args": {name: 1}}} for name in ("A", "B")]
    settings, _ = combine([task(), *data])
    assert settings["data"] == {"class_path": "B", "init_args": {"B": 1}}


CLASS_ONLY = {"model": {"init_args": {"method": "srlora_pl.LoRA"}}}
NO_CLASS = {"model": {"init_args": {"method": {"init_args": {"rank": 2, "target_rank": 9, "dropout": 0.3}}}}}


@pytest.mark.parametrize(
    ("files", "name", "expected"),
    [
        ([overlay("LoRA", dropout=0.1)], "LoRA", {"rank": 4, "dropout": 0.1}),
        ([CLASS_ONLY], "LoRA", {"rank": 4}),
        ([overlay("LoRA", rank=16)], "LoRA", {"rank": 16}),
        ([overlay("LoRA", rank=16, dropout=0.1), overlay("PiSSA", alpha=2.0)], "PiSSA", {"rank": 4, "alpha": 2.0}),
        ([CLASS_ONLY, overlay("SRLoRA", beta1=0.5)], "SRLoRA", {"rank": 4, "target_rank": 12, "beta1": 0.5}),
        ([overlay("SRLoRA", target_rank=8)], "SRLoRA", {"rank": 4, "target_rank": 8}),
        ([NO_CLASS], "SRLoRA", {"rank": 2, "target_rank": 9, "dropout": 0.3}),
        ([NO_CLASS, CLASS_ONLY], "LoRA", {"rank": 2, "dropout": 0.3}),
        ([overlay("LoRA", rank=16), NO_CLASS], "LoRA", {"rank": 2, "dropout": 0.3}),
        ([overlay("LoRA", target_rank=8)], "LoRA", {"rank": 4, "target_rank": 8}),  # for the parser to refuse
    ],
)
def test_the_method_of_an_overlay_keeps_the_shared_arguments(files: list[dict], name: str, expected: dict) -> None:
    settings, foreign = combine([task(rank=4, target_rank=12), *files])
    assert settings["model"]["init_args"]["method"] == {"class_path": f"srlora_pl.{name}", "init_args": expected}
    assert settings["model"]["init_args"]["lr"] == 0.1
    assert ("target_rank" in foreign) == (name != "SRLoRA")
    assert "rank" not in foreign


def test_a_slip_of_the_task_is_not_dropped_with_its_method() -> None:
    settings, _ = combine([task(rnk=4, beta1=0.5), overlay("LoRA")])
    assert settings["model"]["init_args"]["method"]["init_args"] == {"rnk": 4}


def test_a_task_without_a_method_of_its_own_gives_the_shared_arguments() -> None:
    shared = task()
    del shared["model"]["init_args"]["method"]["class_path"]
    shared["model"]["init_args"]["method"]["init_args"] = {"rank": 4}
    settings, _ = combine([shared, overlay("LoRA")])
    assert settings["model"]["init_args"]["method"] == {"class_path": "srlora_pl.LoRA", "init_args": {"rank": 4}}


def test_another_model_brings_its_own_method() -> None:
    other = {"model": {"class_path": "srlora_pl.TextClassifier", "init_args": {"method": "srlora_pl.SRLoRA"}}}
    assert combine([task(rank=4), CLASS_ONLY, other]) == (other, set())


@pytest.mark.parametrize("option", ["--model.method", "--model.method.class_path", "--model.init_args.method"])
@pytest.mark.parametrize("value", ["srlora_pl.LoRA", "{class_path: srlora_pl.LoRA}"])
def test_a_method_on_the_command_line_is_an_overlay(option: str, value: str) -> None:
    for words in ([option, value], [f"{option}={value}"]):
        content, rest = split_options(["--model.method.rank", "2", *words, "--model.lr=1"])
        assert rest == ["--model.method.rank", "2", "--model.lr=1"]
        settings, _ = combine([task(rank=4, target_rank=12), content])
        assert settings["model"]["init_args"]["method"] == {"class_path": "srlora_pl.LoRA", "init_args": {"rank": 4}}


def test_typed_arguments_of_a_replaced_method_are_dropped_and_named() -> None:
    words = ["--model.method.beta1=1", "--model.method.target_rank", "64", "--model.method.rank", "2", "--model.lr=1"]
    dropped, rest = drop_arguments({"target_rank", "beta1", "beta2"}, words)
    assert dropped == ["beta1", "target_rank"]
    assert rest == ["--model.method.rank", "2", "--model.lr=1"]


@pytest.mark.parametrize(
    ("node", "key"),
    [
        ({"model": {"class_path": "M", "lr": 3}}, "model.lr"),
        ({"model": {"class_path": "M", "init_args": {"method": {"class_path": "L", "rank": 3}}}}, "model.method.rank"),
        ({"model": {"class_path": "M", "init_args": {"kwargs": {"lr": 3}}, "dict_kwargs": {}}, "lr": 1}, None),
    ],
)
def test_an_argument_beside_its_class_path_is_found(node: dict, key: str | None) -> None:
    assert beside_class_path(node) == key


def test_combining_changes_no_input() -> None:
    contents = [task(rank=4), overlay("LoRA", rank=1), {"model": {"init_args": {"lr": 9}}}]
    combine(contents)
    assert contents == [task(rank=4), overlay("LoRA", rank=1), {"model": {"init_args": {"lr": 9}}}]


def test_an_overlay_alone_is_refused() -> None:
    with pytest.raises(UserError, match=mentions("before an overlay")):
        combine([overlay("LoRA")])


def test_a_task_after_its_overlay_is_refused() -> None:
    with pytest.raises(UserError, match=mentions("before an overlay")):
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


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("something\n  new", "new"),
        (
            "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: many",
            "expected int, given 'many'",
        ),
        (
            "Parser key \"trainer.logger\":\n  Does not validate\n  Errors:\n    - Expected a <class 'x.Logger'>\n"
            "    - Expected a <class 'bool'>\n  Given value type: <class 'float'>\n  Given value: 3.5",
            "expected Logger or bool, given '3.5'",
        ),
    ],
)
def test_other_messages_keep_their_innermost_lines_key_and_value(message: str, sentence: str) -> None:
    keys_ = [part.split('"')[1] for part in message.splitlines() if "Parser key" in part]
    assert explain(message, [], [], []) == ": ".join([*keys_, sentence])


def test_changes_are_named_as_on_a_command_line() -> None:
    kept = [callback("x.Stop", monitor="a", patience=n) for n in (3, 20)]
    before = {"gone": 1, "trainer": {"max_epochs": 3, "callbacks": [{"class_path": "x.A"}, kept[0]], "logger": None}}
    after = {"new": 1, "trainer": {"max_epochs": 5, "callbacks": [kept[1], "B"], "logger": {"class_path": "L"}}}
    before, after = before | task(rank=8, alpha=2), after | task(rank=4, alpha=2)
    after["model"]["init_args"]["lr"] = 1e-3
    assert changes(before, before) == []
    assert changes(before, after) == [
        "trainer.max_epochs 5 (was 3)",
        "trainer.callbacks Stop.patience 20 (was 3)",
        "trainer.callbacks with B",
        "trainer.callbacks without A",
        "trainer.logger {'class_path': 'L'} (was None)",
        "model.lr 0.001 (was 0.1)",
        "model.method.rank 4 (was 8)",
    ]


@pytest.mark.parametrize(
    ("message", "owner", "package"),
    [
        (
            "- Problem with given class_path 'x.WandbLogger':\n  Requirement 'wandb>=0.12.10' not met. HINT: Try "
            "running `pip install -U 'wandb>=0.12.10'`",
            "x.WandbLogger",
            "wandb",
        ),
        (
            "To use the `DeepSpeedStrategy`, you must have DeepSpeed installed. Install it by running `pip install -U "
            "deepspeed`.",
            "DeepSpeedStrategy",
            "deepspeed",
        ),
    ],
)
def test_a_missing_package_is_named_with_who_needs_it(message: str, owner: str, package: str) -> None:
    sentence = missing_package(message)
    assert sentence.startswith(f"{owner} needs the package {package}")
    assert f"pip install {package}," in sentence
    assert missing_package("try `pip install anything` some day") == ""
