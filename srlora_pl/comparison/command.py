"""``compare``: its options, its runs and the files with their results."""

import hashlib
import json
import math
import re
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from srlora_pl.comparison.cells import Cell, Plan, comparing_in, run
from srlora_pl.comparison.paper import NUMBERS, TABLES
from srlora_pl.comparison.results import Outcome, at_the_edge, best_point, made_with, table, unequal_terms
from srlora_pl.figures import runs as figures
from srlora_pl.run import config
from srlora_pl.util import json_text, system, yaml_text
from srlora_pl.util.errors import UserError, causes, did_you_mean, listed
from srlora_pl.util.files import relative, write_whole, writing_to
from srlora_pl.util.program import CONFIGS
from srlora_pl.util.tables import csv_of

_PLAN = "plan.json"
_PROBE_STEPS = 4
# The settings that a comparison gives to every run.
_OWN = ("seed_everything", "ckpt_path", "trainer.default_root_dir", "model.method", "model.method.class_path")
# Settings that make another task of a config than the paper's.
_TASK = {"model.backbone", "data.task", "data.name"}


def compare(given: Namespace, options: Sequence[str]) -> int:
    """Run a comparison and return the exit code: 1 if a run failed.

    Args:
        given: the options of ``compare``.
        options: for every run.

    Raises:
        UserError: the options contradict each other, name what is not there, or the output holds other runs.
    """
    plans = plans_of(given, tuple(options))
    if given.dry_run:
        _dry_run(plans)
        return 0
    failed: list[str] = []
    with comparing_in(Path(given.output)) as held:
        for plan in plans:
            with writing_to(f"--output {plan.folder}"):
                _save_plan(plan)
        for plan in plans:
            outcomes, best = _run(plan, held, failed)
            if outcomes:
                print(_write(plan, outcomes, best))
                print(f"results in {relative(plan.folder)}")
    if failed:
        print(f"{len(failed)} of {sum(plan.size for plan in plans)} runs failed, as said above: {listed(failed)}")
    return 1 if failed else 0


# -- what to run


def plans_of(given: Namespace, options: tuple[str, ...]) -> list[Plan]:
    """One plan for the config files, or one for each task of the paper's table."""
    names, methods = TABLES[given.table] if given.table else ((), ("lora", "pissa", "srlora"))
    chosen = config.overlays(given.methods.split(",") if given.methods else methods)
    if given.seeds < 1:
        raise UserError(f"--seeds is {given.seeds}, it must be 1 or more")
    output, grids = Path(given.output), _grids(given.grid, [*chosen])
    _refuse_settings(_keys(options), list(dict.fromkeys(key for grid in grids.values() for key in grid)))
    tasks = {name: [name] for name in names} or {"": given.config}
    plans = []
    for name, configs in tasks.items():
        files = tuple(map(config.find, configs))
        settings, _ = config.combine([config.read(file) for file in files])
        first = settings.get("seed_everything")
        first = first if type(first) is int else 0  # true and null are no seeds
        seeds = tuple(range(first, first + given.seeds))
        plans.append(Plan(files, chosen, grids, seeds, options, output / name))
    return plans


def _grids(entries: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """By method, the values of each setting: those of an entry that begins with its name, or of one for all methods.

    Commas inside brackets belong to a value.
    """
    of_all: dict[str, list[str]] = {}
    of_each: dict[str, dict[str, list[str]]] = {method: {} for method in methods}
    for entry in entries:
        place, equals, values = entry.partition("=")
        method = next((each for each in methods if place.startswith(f"{each}.")), None)
        if method is None and place.split(".")[1:2] in (["model"], ["data"], ["trainer"]):
            first = place.partition(".")[0]
            raise UserError(
                f"--grid {entry!r} is for {first}, which --methods does not name{did_you_mean(first, methods)}"
            )
        grid, key = (of_all, place) if method is None else (of_each[method], place.removeprefix(f"{method}."))
        found = [value.strip() for value in re.split(r",(?![^\[]*\])", values)]
        if not (key and equals and all(found)):
            raise UserError(f"--grid {entry!r} must be a setting and its values, such as model.lr=0.001,0.003")
        if len(set(map(_canonical, found))) < len(found):
            raise UserError(f"--grid {entry!r} names a value twice")
        if key in grid:
            raise UserError(f"--grid gives {place} twice, put all its values behind one {place}=")
        grid[key] = found
    return {method: {**of_all, **own} for method, own in of_each.items()}


def _canonical(value: str) -> str:
    """The same text for 0.001 and 1e-3, as runs read them, but not for 1 and 1.0, a number and a share of batches."""
    try:
        return repr(yaml_text.load(value))
    except yaml.YAMLError:
        return value


def _keys(options: Sequence[str]) -> list[str]:
    """The settings that ``options`` give, written either way: ``--key value`` or ``--key=value``."""
    return [word[2:].partition("=")[0] for word in options if word.startswith("--")]


def _short_key(key: str) -> str:
    """``key`` without ``init_args``, which may be left out, and without the ``+`` that appends to lists."""
    return key.replace(".init_args", "").rstrip("+")


def _refuse_settings(options: Sequence[str], grid: Sequence[str]) -> None:
    """Refuse settings that the plan gives itself, or that are given twice."""
    for place, key in [*((f"--{key}", key) for key in options), *((f"--grid {key}", key) for key in grid)]:
        if _short_key(key) in _OWN:
            raise UserError(
                f"{place} is set by compare itself: leave it out, --methods names methods or an overlay of your own, "
                "--output the folder, and --seeds counts from seed_everything in the config file"
            )
    for key in grid:
        if _short_key(key) in map(_short_key, options):
            raise UserError(f"--grid {key} is an option too: give the one or the other")


def _save_plan(plan: Plan) -> None:
    """Write down the files and options of these runs, and refuse to mix them with others.

    More methods, seeds and points may be added to earlier ones. A plan without a run, as a setting was mistyped, is
    replaced.
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
    write_whole(file, json.dumps({"files": files, "options": options}, indent=1))


def _digests(plan: Plan) -> dict[str, str]:
    """The hash of every config file's content; its path differs where the project is copied to."""
    files = {f"config {i}": Path(file) for i, file in enumerate(plan.configs, 1)}
    files |= {f"method {name}": file for name, file in plan.methods.items()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}


# -- running


def _run(plan: Plan, held: BinaryIO, failed: list[str]) -> tuple[list[Outcome], dict[str, Cell]]:
    """All finished runs, and each method's best cell of the grid; adds the folders of all others to ``failed``."""
    with _progress() as bar:
        task = bar.add_task("", total=plan.size)

        def finished(cells: Sequence[Cell]) -> Iterator[Outcome]:
            for cell in cells:
                bar.update(task, description=cell.name)
                if why := run(plan, cell, held):
                    failed.append(str(relative(plan.folder / cell.name)))
                    print(f"failed: {cell.name}: {why}")
                else:
                    yield from _finished(plan, [cell])
                bar.advance(task)

        outcomes = list(finished(plan.trials))
        best = _best(plan, outcomes)
        outcomes += finished(plan.repetitions(best.values()))
    return outcomes, best


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn())


def _finished(plan: Plan, cells: Sequence[Cell]) -> list[Outcome]:
    """The finished ones of ``cells``.

    Raises:
        UserError: they are points of a grid, and have no validation to choose by.
    """
    outcomes = [Outcome.read(cell, summary) for cell in cells if (summary := plan.summary(cell))]
    if plan.chooses and not all(outcome.summary["best"] for outcome in outcomes):
        raise UserError("a grid is chosen from by validation, but the runs have none: set data.val_fraction above 0")
    return outcomes


def _best(plan: Plan, trials: Sequence[Outcome]) -> dict[str, Cell]:
    """Each method's best point; of a method that lacks one there is none, as the best may be the one that it lacks."""
    of = {method: [trial for trial in trials if trial.cell.method == method] for method in plan.methods}
    return {method: best_point(mine) for method, mine in of.items() if len(mine) == len(plan.points(method))}


# -- results


def _write(plan: Plan, outcomes: Sequence[Outcome], best: Mapping[str, Cell]) -> str:
    """Write results.csv, results.json, results.md and Figure 3; return the table."""
    chosen = {
        method: [each for each in outcomes if each.cell.method == method and each.cell.point == cell.point]
        for method, cell in best.items()
    }
    rows, made = [outcome.row() for outcome in outcomes], made_with(outcomes)
    nothing = "No method has finished all its runs with the first seed, so there is nothing to compare.\n"
    lines = [table(chosen, _papers(plan)) if chosen else nothing, *_left_out(plan, outcomes, best)]
    edges, wider = at_the_edge(plan.grids, best)
    lines += [*edges, *([f"* To look there: {plan.command(wider)}"] if edges else []), *unequal_terms(chosen)]
    if plan.chooses and (remedy := outcomes[0].remedy):
        lines.append(f"* The grid was chosen from by the same data that the scores are of, so they flatter: {remedy}.")
    if differing := [name for name, found in made.items() if len(found) > 1]:
        lines.append(
            f"* Not all runs had the same {', '.join(differing)}, see results.json: begin anew in another --output."
        )
    text = "\n".join(lines).rstrip("\n") + "\n"
    about = {
        "configs": plan.configs,
        "config_hash": _digests(plan),
        "options": plan.options,
        "grids": plan.grids,
        "chosen": {method: dict(cell.point) for method, cell in best.items()},
        "seeds": plan.seeds,
        "commit": system.commit(),  # of the code that writes this; of the runs:
        "commits": made.pop("commit"),
        "versions": made,
        "devices": sorted({each.summary["device"] for each in outcomes}),
        "runs": rows,
    }
    write_whole(plan.folder / "results.csv", csv_of(rows))
    write_whole(plan.folder / "results.json", json_text.write(about))
    write_whole(plan.folder / "results.md", text)
    curves = {method: each[0].curve("train/loss") for method, each in chosen.items()}
    # A run shorter than trainer.log_every_n_steps logs no loss.
    if curves := {method: curve for method, curve in curves.items() if curve[0]}:
        figures.write([figures.drawing_of_losses(curves, plan.folder)])
    return text


def _left_out(plan: Plan, outcomes: Sequence[Outcome], best: Mapping[str, Cell]) -> list[str]:
    """A line for each method without a best point."""
    lines, done = [], {outcome.cell for outcome in outcomes}
    for method in (method for method in plan.methods if method not in best):
        failed = [cell.name for cell in plan.trials if cell.method == method and cell not in done]
        lines.append(
            f"* {method} is left out: {len(failed)} of its {len(plan.points(method))} runs with the first seed failed "
            f"({', '.join(failed)}): mend it, or leave the value out of --grid or the method out of --methods."
        )
    return lines


def _papers(plan: Plan) -> Mapping[str, Mapping[str, float]]:
    """The paper's numbers, where the config file is this package's own and no setting makes another task of it."""
    file, more = Path(plan.configs[0]), [*plan.configs[1:], *map(str, plan.methods.values())]
    own = CONFIGS / file.name
    given = {*map(_short_key, (*_keys(plan.options), *(key for grid in plan.grids.values() for key in grid)))}
    given |= {key for each in more for key in config.keys(config.read(each))}
    is_own = own.is_file() and own.read_bytes() == file.read_bytes() and not given & _TASK
    return NUMBERS.get(file.stem, {}) if is_own else {}


# -- a look ahead


class _NoEstimateError(Exception):
    """A few steps cannot be trained here; the message says what is missing."""


def _dry_run(plans: Sequence[Plan]) -> None:
    """List the runs, and then estimate how long they train, from a few steps of the first one of each task."""
    told: list[str] = []
    for plan, left in [(plan, _listed(plan)) for plan in plans]:
        try:
            seconds, steps = _probe(plan, plan.trials[0])
        except _NoEstimateError as error:
            missing = str(error)
            print(f"{plan.folder}: no estimate of the time: {'as above' if missing in told else missing}", flush=True)
            told.append(missing)
        else:
            hours = seconds * steps * left / 3600
            print(
                f"{plan.folder}: training the {left} that are left, alone, about {hours:.1f} h: {steps:,} steps a run, "
                f"{seconds:.3g} s a step over {_PROBE_STEPS} steps of {plan.trials[0].name}",
                flush=True,
            )


def _listed(plan: Plan) -> int:
    """List the runs of ``plan``; return how many are left."""
    print(f"{plan.folder}: {plan.size} runs")
    for cell in plan.trials:
        print(f"  {cell.name}{', finished' if plan.summary(cell) else ''}")
    if others := plan.seeds[1:]:
        what = "each method's best point" if plan.chooses else "each method"
        print(f"  then {what} with seeds {', '.join(map(str, others))}", flush=True)
    trials = _finished(plan, plan.trials)
    return plan.size - len(trials) - len(_finished(plan, plan.repetitions(_best(plan, trials).values())))


def _probe(plan: Plan, cell: Cell) -> tuple[float, int]:
    """The seconds of an optimizer step on this machine, and the optimizer steps of a whole run.

    Raises:
        _NoEstimateError: the model or the data cannot be had here.
        UserError: a setting is wrong.
    """
    from lightning.pytorch.callbacks import LambdaCallback

    from srlora_pl.run.run import Run

    class Trial(Run):
        def instantiate_classes(self) -> None:
            with _telling_what_is_missing():
                super().instantiate_classes()

    files = [*plan.configs, str(plan.methods[cell.method])]
    words = [f"--{key}={value}" for key, value in cell.point]
    few = ["--trainer.fast_dev_run", str(_PROBE_STEPS + 1)]
    few += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    trial = Trial("fit", files, [config.read(file) for file in files], [*plan.options, *words, *few])
    ends: list[float] = []
    clock = LambdaCallback(on_train_batch_end=lambda *_: ends.append(time.perf_counter()))
    trial.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    with _telling_what_is_missing():
        trial.trainer.fit(trial.model, datamodule=trial.datamodule)
    asked = trial.config.trainer
    per_epoch = math.ceil(len(trial.datamodule.train_set) / trial.datamodule.batch_size / asked.accumulate_grad_batches)
    longest = [n for n in (asked.max_steps, (asked.max_epochs or -1) * per_epoch) if n > 0]
    seconds = (ends[-1] - ends[0]) / _PROBE_STEPS * asked.accumulate_grad_batches  # each end is a micro-batch's
    return seconds, min(longest, default=1000 * per_epoch)


@contextmanager
def _telling_what_is_missing() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if missing := next((each for each in causes(error) if isinstance(each, UserError)), None):
            raise _NoEstimateError(missing) from error
        raise
