"""Settings on their way from files and the command line through a run to its own config.yaml, and back."""

import argparse
import typing
from pathlib import Path
from typing import Any, Optional, Union

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from srlora_pl import UserError
from srlora_pl.run import config
from srlora_pl.run.run import Run
from srlora_pl.run.settings import writable
from srlora_pl.util import yaml_text
from tests.helpers.cli import SMALL_RUN, cli

TASK = yaml_text.load(SMALL_RUN)


class Parsed(Run):
    """Stops where objects would be made."""

    def instantiate_classes(self) -> None:
        pass


def parse(*contents: config.Node, options: tuple[str, ...] = ()) -> Parsed:
    return Parsed("fit", [], contents, [*options])


def text_of(run: Run) -> str:
    """The text of the run's config.yaml."""
    return yaml_text.write(writable(run.parser, run.config)[0])


def arguments(run: Run) -> dict[str, Any]:
    """The settings that may hold any text."""
    model, data = run.config.model.init_args, run.config.data.init_args
    return {
        "name": run.config.name,
        "root": data.root,
        "column": data.image_column,
        "backbone": model.backbone,
        "revision": model.backbone_kwargs.get("revision"),
        "layer": model.method.init_args.target_modules[0],
    }


def given_everywhere(text: str) -> config.Node:
    """A config file that gives ``text`` to each of them."""
    model = {
        "backbone": text,
        "backbone_kwargs": {"revision": text},
        "method": {"init_args": {"target_modules": [text]}},
    }
    return {"name": text, "model": {"init_args": model}, "data": {"init_args": {"root": text, "image_column": text}}}


@given(st.text(min_size=1).filter(lambda text: text not in (".", "..") and not {"/", "\0"} & set(text)))
@settings(max_examples=4, deadline=None)
@example("1e-3")
@example("25921e05")
@example("0x10")
@example("012")
@example("1_000")
@example("12:30")
@example("no")
@example("null")
@example("2024-01-01")
@example("1e400")
@example("=")
@example("[1]")
@example("#x")
@example("\udcff")
def test_text_in_quotes_comes_through_a_run_and_its_own_config(text: str) -> None:
    run = parse(TASK, yaml_text.load(yaml_text.write(given_everywhere(text))))
    assert set(arguments(run).values()) == {text}
    again = parse(yaml_text.load(text_of(run)))
    assert set(arguments(again).values()) == {text}
    assert text_of(again) == text_of(run)


@pytest.mark.parametrize(
    "text", ["1e-3", "25921e05", "0x10", "012", "1_000", ".5", "12:30", "no", "2024-01-01", "1e400"]
)
def test_text_on_the_command_line_needs_no_quotes(text: str) -> None:
    places = ("--name", "--data.root", "--data.image_column", "--model.backbone", "--model.backbone_kwargs.revision")
    options = [word for place in places for word in (place, text)]
    for each in (options, [f"{place}={text}" for place in places]):
        run = parse(TASK, options=(*each, f"--model.method.target_modules+={text}"))
        assert set(arguments(run).values()) == {text}
        assert run.config.model.init_args.backbone_kwargs["img_size"] == 16


@pytest.mark.parametrize(
    ("key", "default"),
    [("data.root", "'data'"), ("data.batch_size", ""), ("model.lr", ""), ("model.compile", "False")],
)
def test_an_empty_value_is_refused_where_none_may_stand(key: str, default: str) -> None:
    part, name = key.split(".")
    for content, options in (({part: {"init_args": {name: None}}}, ()), ({}, (f"--{key}", "null"))):
        with pytest.raises(UserError) as caught:
            parse(TASK, content, options=options)
        assert f"{key} is null" in str(caught.value)
        assert default in str(caught.value)
    assert parse(TASK, {"data": {"init_args": {"predict_root": None}}}).config.data.init_args.predict_root is None


def test_numbers_in_free_arguments_stay_numbers() -> None:
    run = parse(TASK, options=("--model.backbone_kwargs.drop_rate=1e-1", "--model.backbone_kwargs.depth=3"))
    kwargs = run.config.model.init_args.backbone_kwargs
    assert {name: kwargs[name] for name in ("drop_rate", "depth", "pretrained")} == {
        "drop_rate": 0.1,
        "depth": 3,
        "pretrained": False,
    }


@pytest.mark.parametrize("name", ["limit_train_batches", "limit_predict_batches", "val_check_interval"])
def test_a_limit_is_a_number_of_batches_or_a_share_as_it_is_written(name: str) -> None:
    """Though typing may hold Optional[Union[float, int]] for Lightning's annotation, by which 1 would be 1.0."""
    for clear in typing._cleanups:
        clear()
    assert str(Optional[Union[float, int]]).startswith("typing.Union[float")  # noqa: UP007, UP045
    for text, value in (("1", 1), ("1.0", 1.0), ("0.5", 0.5)):
        found = parse(TASK, options=(f"--trainer.{name}={text}",)).config.trainer[name]
        assert (type(found), found) == (type(value), value)


def with_callback(name: str, **init_args: Any) -> config.Node:
    return {"trainer": {"callbacks": [{"class_path": name, "init_args": init_args}]}}


class Odd(Callback):
    def __init__(self, what: object = print, also: Any = argparse.ArgumentParser()) -> None:  # noqa: B008
        pass


def test_an_enumeration_is_written_as_its_text() -> None:
    run = parse(TASK, with_callback("lightning.pytorch.callbacks.Timer", duration="00:00:10:00"))
    (timer,) = yaml_text.load(text_of(run))["trainer"]["callbacks"]
    assert timer["init_args"] == {"duration": "00:00:10:00", "interval": "step", "verbose": True}
    assert text_of(parse(yaml_text.load(text_of(run)))) == text_of(run)


@pytest.mark.parametrize("value", [{"seconds": 30}, "00:00:05:00"])
def test_a_duration_comes_through_a_run_and_its_own_config(value: Any) -> None:
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": value}}
    run = parse(TASK, {"trainer": {"max_time": value, "callbacks": [timer]}})
    kept = yaml_text.load(text_of(run))["trainer"]
    assert kept["max_time"] == value
    assert kept["callbacks"][0]["init_args"]["duration"] == value


def test_a_default_that_has_no_text_is_left_out_with_a_word(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL_RUN)
    options = (f"--trainer.callbacks+={__name__}.Odd", "--trainer.max_steps=1")
    code, _, err = cli("fit", "--config", "small.yaml", *options, home=tmp_path)
    assert code == 0, err
    assert "note: config.yaml has no way to say trainer.callbacks Odd.also" in err
    settings = yaml_text.load((tmp_path / "runs/small-srlora/version_0/config.yaml").read_text())
    (odd,) = settings["trainer"]["callbacks"]
    assert "also" not in odd["init_args"]


class NotInstalled(CSVLogger):
    def __init__(self) -> None:
        raise ModuleNotFoundError(
            "Requirement 'nowhere>=1.2' not met. HINT: Try running `pip install -U 'nowhere>=1.2'`"
        )


def test_a_logger_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL_RUN)
    code, out, err = cli("fit", "--config", "small.yaml", f"--trainer.logger={__name__}.NotInstalled", home=tmp_path)
    assert (code, out) == (2, "")
    assert f"{__name__}.NotInstalled needs the package nowhere" in err.splitlines()[-1]
    assert "pip install nowhere," in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_a_strategy_that_is_not_installed_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
    (tmp_path / "small.yaml").write_text(SMALL_RUN)
    code, _, err = cli("fit", "--config", "small.yaml", "--trainer.strategy=deepspeed", home=tmp_path)
    assert code == 2
    assert "DeepSpeedStrategy needs the package deepspeed" in err.splitlines()[-1]
    assert not [*tmp_path.glob("runs/*")]
