"""``python cli.py compare``: from its options to the files that it ends with."""

import csv
import hashlib
import json
import math
import re
import subprocess
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from srlora_pl import config, figures, system
from srlora_pl.comparison.cells import Cell, Plan, Runner, runner, writing_to
from srlora_pl.comparison.paper import NUMBERS, TABLES
from srlora_pl.comparison.results import Outcome, at_the_edge, best_point, table
from srlora_pl.errors import UserError, did_you_mean
from srlora_pl.files import relative, replacing

_REPOSITORY = Path(__file__).parents[2]
_PLAN = "plan.json"
_PROBE_STEPS = 4


def compare(given: Namespace, options: Sequence[str]) -> int:
    """Run what ``given`` asks for, all with ``options``, and return the exit code: 1 if a run failed.

    Raises:
        UserError: the options contradict each other, name what is not there, or the output holds other runs.
    """
    console = Console(highlight=False, soft_wrap=True)
    plans = plans_of(given, tuple(options))
    if given.dry_run:
        for plan in plans:
            _dry_run(plan, console)
        return 0
    with runner(Path(given.output)) as work:
        for plan in plans:
            with writing_to(plan.folder):
                _keep_plan(plan)
        for plan in plans:
            outcomes, best = _run(plan, work, console)
            if outcomes:
                console.print(_write(plan, outcomes, best), markup=False)
                console.print(f"results in {relative(plan.folder)}", markup=False)
    for folder, sentence in work.failed.items():
        console.print(f"failed: {relative(folder)}: {sentence}", markup=False)
    return 1 if work.failed else 0


# -- what to run


def plans_of(given: Namespace, options: tuple[str, ...]) -> list[Plan]:
    """One plan for the config files, or one for each task of the paper's table.

    Raises:
        UserError: see `compare`.
    """
    if bool(given.config) == bool(given.table):
        raise UserError("compare needs --config FILE or --table 3|4, and not both")
    if given.table and given.table not in TABLES:
        raise UserError(f"--table is {given.table}, but compare knows the paper's tables {' and '.join(TABLES)}")
    names, methods = TABLES[given.table] if given.table else ((), ("lora", "pissa", "srlora"))
    chosen = _methods(given.methods.split(",") if given.methods else methods)
    if given.seeds < 1:
        raise UserError(f"--seeds is {given.seeds}, it must be 1 or more")
    output, grid = Path(given.output), _grid(given.grid)
    tasks = {name: (str(_own_file(f"{name}.yaml")),) for name in names} or {"": tuple(given.config)}
    plans = []
    for name, files in tasks.items():
        settings, _ = config.combine([config.read(file) for file in files])
        first = settings.get("seed_everything", 0)
        first = 0 if isinstance(first, bool) or not isinstance(first, int) else first
        seeds = tuple(range(first, first + given.seeds))
        plans.append(Plan(files, chosen, grid, seeds, options, output / name))
    return plans


def _methods(names: Sequence[str]) -> dict[str, Path]:
    """The overlay file of each method: one of ``configs/methods/``, or any YAML file."""
    files = {}
    for name in map(str.strip, names):
        if not name:
            raise UserError("--methods has an empty name, write it as lora,pissa,srlora")
        file = Path(name) if name.endswith((".yaml", ".yml")) else _own_file(f"methods/{name}.yaml")
        config.read(str(file))
        if file.stem in files:
            raise UserError(f"--methods names {file.stem} twice, give each overlay a name of its own")
        files[file.stem] = file
    return files


def _own_file(name: str) -> Path:
    """``name`` in ``configs/``, here or where this package lies."""
    for home in (Path(), _REPOSITORY):
        if (file := home / "configs" / name).is_file():
            return file
    near = did_you_mean(Path(name).stem, [file.stem for file in (_REPOSITORY / "configs" / name).parent.glob("*.yaml")])
    raise UserError(f"there is no configs/{name}{near}, give the path of a YAML file")


def _grid(entries: Sequence[str]) -> dict[str, list[str]]:
    """The values of each setting; commas inside brackets belong to a value."""
    grid: dict[str, list[str]] = {}
    for entry in entries:
        key, equals, values = entry.partition("=")
        found = [value.strip() for value in re.split(r",(?![^\[]*\])", values)]
        if not (key and equals and all(found)):
            raise UserError(f"--grid {entry!r} must be a setting and its values, such as model.lr=0.001,0.003")
        if len(set(found)) < len(found):
            raise UserError(f"--grid {entry!r} names a value twice")
        if key in grid:
            raise UserError(f"--grid gives {key} twice, put all its values behind one {key}=")
        grid[key] = found
    return grid


def _keep_plan(plan: Plan) -> None:
    """Refuse to mix these runs with others; more methods, seeds and points may be added to what is there.

    A plan that no run has come of, since a setting was mistyped, is forgotten.
    """
    files, options = _digests(plan), list(plan.options)
    file = plan.folder / _PLAN
    if file.is_file() and any(plan.folder.glob("*/*/version_*")):
        earlier = json.loads(file.read_text())
        files = earlier["files"] | files
        if (earlier["options"], earlier["files"]) != (options, {name: files[name] for name in earlier["files"]}):
            raise UserError(
                f"{plan.folder} holds runs with other config files or options: give another --output, or the same "
                "files and options again"
            )
    _write_text(file, json.dumps({"files": files, "options": options}, indent=1))


def _digests(plan: Plan) -> dict[str, str]:
    """Of the content of every config file; not by its path, which differs where the project is copied to."""
    files = {f"config {i}": Path(file) for i, file in enumerate(plan.configs, 1)}
    files |= {f"method {name}": file for name, file in plan.methods.items()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}


# -- running


def _run(plan: Plan, work: Runner, console: Console) -> tuple[list[Outcome], dict[str, Cell]]:
    """All finished runs, and each method's cell that was the best of the grid."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True), console=console
    ) as bar:
        task = bar.add_task("", total=plan.size)

        def finished(cells: Sequence[Cell]) -> Iterator[Outcome]:
            for cell in cells:
                bar.update(task, description=cell.name)
                if work.run(plan, cell):
                    outcome = Outcome.read(cell, plan.summary(cell) or {})
                    if len(plan.points) > 1 and not outcome.summary["best"]:
                        raise UserError(
                            "a grid is chosen from by validation, but the runs have none: set data.val_fraction above 0"
                        )
                    yield outcome
                else:
                    console.print(f"failed: {cell.name}: {work.failed[str(plan.folder / cell.name)]}", markup=False)
                bar.advance(task)

        outcomes = list(finished(plan.trials))
        best = {}
        for method in plan.methods:
            mine = [outcome for outcome in outcomes if outcome.cell.method == method]
            if len(mine) == len(plan.points):  # else the best of what is left may not be the best
                best[method] = best_point(mine) if len(plan.points) > 1 else mine[0].cell
        outcomes += finished(plan.repetitions({method: cell.point for method, cell in best.items()}))
    return outcomes, best


# -- what it ends with


def _write(plan: Plan, outcomes: Sequence[Outcome], best: Mapping[str, Cell]) -> str:
    """results.csv, results.json, results.md and Figure 3; returns the table."""
    chosen = {
        method: [each for each in outcomes if each.cell.method == method and each.cell.point == cell.point]
        for method, cell in best.items()
    }
    rows = [outcome.row() for outcome in outcomes]
    _write_csv(plan.folder / "results.csv", rows)
    about = {
        "configs": list(plan.configs),
        "config_hash": _digests(plan),
        "options": list(plan.options),
        "grid": {key: list(values) for key, values in plan.grid.items()},
        "chosen": {method: dict(cell.point) for method, cell in best.items()},
        "seeds": list(plan.seeds),
        "commit": _commit(),
        "devices": sorted({outcome.summary["device"] for outcome in outcomes}),
        "versions": system.versions(),
    }
    _write_text(plan.folder / "results.json", json.dumps(about | {"runs": rows}, indent=1))
    lines = [table(chosen, NUMBERS.get(Path(plan.configs[0]).stem, {})), *at_the_edge(plan.grid, best)]
    text = "\n".join(lines).rstrip("\n") + "\n"
    _write_text(plan.folder / "results.md", text)
    curves = {method: each[0].curve("train/loss") for method, each in chosen.items() if each}
    if curves:
        figures.write([figures.drawing_of_losses(curves, plan.folder)])
    return text


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _commit() -> str | None:
    """Of the code that runs, with a + if it was changed; None outside a repository."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(_REPOSITORY), *words], capture_output=True, text=True, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")


# -- a look ahead


def _dry_run(plan: Plan, console: Console) -> None:
    """List the runs, and say how long they would train, from a few steps of the first one."""
    cells = plan.trials
    seconds, steps = _probe(plan, cells[0])
    console.print(f"{plan.folder}: {plan.size} runs of {steps:,} steps", markup=False)
    for cell in cells:
        done = ", finished" if plan.summary(cell) else ""
        console.print(f"  {cell.name}{done}", markup=False)
    if len(plan.seeds) > 1:
        rest = f"seeds {plan.seeds[1]} to {plan.seeds[-1]}" if len(plan.seeds) > 2 else f"seed {plan.seeds[1]}"
        console.print(f"  then each method's best point with {rest}", markup=False)
    left = plan.size - sum(plan.summary(cell) is not None for cell in cells)
    hours = seconds * steps * left / 3600
    console.print(
        f"  training the {left} that are left, alone, about {hours:.1f} h: {seconds:.3g} s a step over {_PROBE_STEPS} "
        f"steps of {cells[0].name}",
        markup=False,
    )


def _probe(plan: Plan, cell: Cell) -> tuple[float, int]:
    """Seconds of a training step here and now, and the optimizer steps of a whole run."""
    from lightning.pytorch.callbacks import LambdaCallback

    from srlora_pl.run import Run

    files = [*plan.configs, str(plan.methods[cell.method])]
    words = [f"--{key}={value}" for key, value in cell.point]
    few = ["--trainer.fast_dev_run", str(_PROBE_STEPS + 1)]
    few += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    run = Run("fit", files, [config.read(file) for file in files], [*plan.options, *words, *few])
    clock = LambdaCallback(on_train_batch_end=lambda *_: ends.append(time.perf_counter()))
    ends: list[float] = []
    run.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    run.trainer.fit(run.model, datamodule=run.datamodule)
    asked = run.config.trainer
    per_epoch = math.ceil(len(run.datamodule.train_set) / run.datamodule.batch_size / asked.accumulate_grad_batches)
    longest = [n for n in (asked.max_steps, (asked.max_epochs or -1) * per_epoch) if n > 0]
    seconds = (ends[-1] - ends[0]) / _PROBE_STEPS * asked.accumulate_grad_batches  # each end is a micro-batch's
    return seconds, min(longest, default=1000 * per_epoch)
