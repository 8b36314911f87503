"""Config files: reading them and laying them over each other.

Nothing here imports torch or Lightning, so that a mistyped file name is answered at once.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from srlora_pl.run import source
from srlora_pl.util.errors import UserError, did_you_mean, listed, shortened
from srlora_pl.util.files import relative, writing_to
from srlora_pl.util.program import CONFIGS
from srlora_pl.util.signatures import arguments_of_class, class_at
from srlora_pl.util.yaml_text import load

Node = dict[str, Any]
_TASK_FIRST = "put a task's file before an overlay, as in --config quickstart --config methods/lora"
_OBJECT = ("class_path", "init_args", "dict_kwargs")
# Settings that hold several objects, of which those of every file count; other lists are one value.
_JOINED = ("callbacks", "logger", "plugins")
# What tells two callbacks of one class apart, as in Lightning's state keys.
_APART = ("monitor", "every_n_train_steps", "every_n_epochs", "train_time_interval")


def find(name: str) -> str:
    """The file that ``name`` means: a path, or one of ``configs/``, here or in this package: ``methods/pissa``.

    Raises:
        UserError: there is no such file.
    """
    if Path(name).is_file():
        return name
    inner = Path(name.removeprefix("configs/"))
    inner = inner if inner.suffix in (".yaml", ".yml") else inner.with_name(f"{inner.name}.yaml")
    for home in (Path("configs"), CONFIGS):
        if (file := home / inner).is_file():
            return str(relative(file))
    folder = Path(name).parent
    known = [*folder.glob("*.yaml"), *(each.relative_to(CONFIGS) for each in CONFIGS.rglob("*.yaml"))]
    names = [*map(str, known), *(str(each.with_suffix("")) for each in known)]
    raise UserError(f"the config file {name} does not exist{did_you_mean(name, names)}")


def name_of(file: str | Path) -> str:
    """The shortest that `find` takes for ``file``: the name of one of this package, else the path as it is given."""
    path, home = Path(file).resolve(), CONFIGS.resolve()
    if not path.is_relative_to(home):
        return str(file)
    name = str(path.relative_to(home).with_suffix(""))
    return name if Path(find(name)).resolve() == path else str(file)


def read(path: str) -> Node:
    """The settings of a YAML file; one that is missing, or no mapping, is refused."""
    file = Path(find(path))
    try:
        content = load(file.read_text("utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path} is not valid YAML: {error.problem} in line {line}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML text file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold settings as 'key: value' lines, not {shortened(content)}")
    if not isinstance(content.get("trainer", {}), dict):
        raise UserError(f"trainer in {path} must hold settings of its own, not {shortened(content['trainer'])}")
    return content


def overlays(names: Sequence[str]) -> dict[str, Path]:
    """The overlay file of each method: one of ``configs/methods/``, or any YAML file."""
    files = {}
    for name in map(str.strip, names):
        file = Path(name) if name.endswith((".yaml", ".yml")) else Path(find(f"methods/{name}"))
        read(str(file))
        if file.stem in files:
            raise UserError(f"--methods names {file.stem} twice, give each overlay a name of its own")
        files[file.stem] = file
    return files


def overview() -> list[str]:
    """A line for each config of this package: its name, and what its file says first."""
    lines = []
    for file in sorted(CONFIGS.rglob("*.yaml")):
        first = file.read_text("utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"{file.relative_to(CONFIGS).with_suffix('')!s:33}{re.split(r'[.:;](?= |$)', first)[0]}")
    return lines


def copy_to(folder: Path) -> list[str]:
    """Copy the configs of this package into ``folder``, over no file that is there; returns what to say."""
    files = sorted(CONFIGS.rglob("*.yaml"))
    places = [folder / file.relative_to(CONFIGS) for file in files]
    if there := [place for place in places if place.exists()]:
        raise UserError(f"--to {folder} has {listed(there, 3)} already: give another folder")
    with writing_to(f"--to {folder}"):
        for file, place in zip(files, places, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    return [f"{len(files)} configs copied to {folder}"]


def combine(contents: Sequence[Node]) -> tuple[Node, set[str]]:
    """Lay several config files over each other; later ones win. A task's file after an overlay is refused.

    A file that names another ``model.method`` after one was named is an overlay. Of the arguments of the first method
    its class keeps those that it takes as well; the first method's own are dropped, and so is an earlier overlay.
    Arguments in a file that names no class count for whichever method the run has.

    Returns:
        The settings, and the names of the first method's arguments that the last one does not take.
    """
    settings: Node = {}
    overlay: Node | None = None
    for content in contents:
        model, method, before = model_class(content), _method(content), model_class(settings)
        if model and not before and isinstance(settings.get("model"), dict):
            raise UserError(f"a config file's settings of a model come before model.class_path: {_TASK_FIRST}")
        if model and before and model != before:
            overlay = None  # with another model everything of the first one goes
        elif method and "class_path" in method and _method(settings):
            overlay = method
            content = _with_method(content, None)
        elif method and overlay:
            given, own = method.get("init_args") or {}, overlay.get("init_args") or {}
            overlay = _merge(overlay, {"init_args": {name: given[name] for name in given if name in own}})
        settings = _merge(settings, content)
    if isinstance(settings.get("model"), dict) and not model_class(settings):
        raise UserError(f"the config files give no model.class_path: {_TASK_FIRST}")
    first = _method(settings)
    if not (first and overlay):
        return settings, set()
    foreign = arguments_of(first.get("class_path")) - arguments_of(overlay["class_path"])
    shared = {name: value for name, value in (first.get("init_args") or {}).items() if name not in foreign}
    arguments = {**shared, **(overlay.get("init_args") or {})}
    return _with_method(settings, {**overlay, "init_args": arguments}), foreign


def beside_class_path(node: Any, key: str = "") -> str | None:
    """The dotted key of a setting that stands beside a ``class_path`` instead of below ``init_args``, if any."""
    for name, value in node.items() if isinstance(node, dict) else ():
        place = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        if "class_path" in node and name not in _OBJECT:
            return place
        if found := beside_class_path(value, place):
            return found
    return None


def keys(settings: Node) -> list[str]:
    """The dotted keys of all settings as they are written on a command line, ``model.method.rank``."""
    found = []
    for key, value in settings.items():
        below = keys(value) if isinstance(value, dict) else []
        if key == "init_args":
            found += below
        elif key != "class_path":
            found += [key, *(f"{key}.{name}" for name in below)]
    return found


def changes(before: Node, after: Node) -> list[str]:
    """The settings of ``after`` that differ from ``before``, as ``trainer.max_epochs 5 (was 3)``.

    Keys that only one of them has are left out.
    """
    found = []
    for key in (key for key in before if key in after and before[key] != after[key]):
        old, new = before[key], after[key]
        if isinstance(old, dict) and isinstance(new, dict):
            found += [change if key == "init_args" else f"{key}.{change}" for change in changes(old, new)]
        elif key in _JOINED and isinstance(old or [], list) and isinstance(new or [], list):
            found += _changed_objects(key, old or [], new or [])
        else:
            found.append(f"{key} {shortened(new)} (was {shortened(old)})")
    return found


def _changed_objects(key: str, old: list[Any], new: list[Any]) -> list[str]:
    before, after = ({class_name(each): _as_object(each) for each in every} for every in (old, new))
    if len(before) < len(old) or len(after) < len(new):  # several of one class
        return [f"{key} {shortened(new)} (was {shortened(old)})"]
    both = [name for name in after if name in before]
    found = [f"{key} {name}.{change}" for name in both for change in changes(before[name], after[name])]
    found += [f"{key} with {name}" for name in after if name not in before]
    return found + [f"{key} without {name}" for name in before if name not in after]


def model_class(content: Node) -> Any:
    """``model.class_path``, or None."""
    model = content.get("model")
    return model.get("class_path") if isinstance(model, dict) else None


def classes(content: Node) -> dict[str, str]:
    """The class paths that ``content`` names of the model, of its method and of the data, by their keys."""
    nodes = {"model": content.get("model"), "data": content.get("data"), "model.method": _method(content)}
    return {
        key: str(each["class_path"]) for key, each in nodes.items() if isinstance(each, dict) and "class_path" in each
    }


def class_name(node: Any) -> str:
    """The name of an object's class, without its module."""
    return str(_as_object(node).get("class_path")).rpartition(".")[2]


# -- the method


def _method(content: Node) -> Node | None:
    model = content.get("model")
    arguments = model.get("init_args") if isinstance(model, dict) else None
    method = arguments.get("method") if isinstance(arguments, dict) else None
    if isinstance(method, str):
        return {"class_path": method}
    return method if isinstance(method, dict) else None


def _with_method(content: Node, method: Node | None) -> Node:
    """``content`` with another method, or without one."""
    arguments = {name: value for name, value in content["model"]["init_args"].items() if name != "method"}
    if method:
        arguments["method"] = method
    return {**content, "model": {**content["model"], "init_args": arguments}}


def data_setting(run: Path | None, name: str) -> Any:
    """What the ``config.yaml`` in the folder of a run says of its data; None where there is no such thing."""
    try:
        settings = read(str(run / "config.yaml")) if run else {}
    except UserError:  # it is gone or broken
        return None
    return ((settings.get("data") or {}).get("init_args") or {}).get(name)


def arguments_of(class_path: Any) -> set[str]:
    """The arguments of a class and of those that it passes arguments on to; none where there is no such class."""
    known = source.arguments(str(class_path))
    if known is not None:
        return set(known)
    try:
        return set(arguments_of_class(class_at(str(class_path))))
    except (ImportError, AttributeError):  # for the parser to refuse
        return set()


# -- merging


def _merge(old: Any, new: Any, key: str = "") -> Any:
    """``new`` over ``old``, mappings key by key; arguments of one class are not handed to another."""
    if key in _JOINED and old and new:
        # One logger takes the place of another; one callback or plugin is a list of one.
        several = [each if isinstance(each, list) or key == "logger" else [each] for each in (old, new)]
        if all(isinstance(each, list) for each in several):
            return _join(*several)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    if new.get("class_path", old.get("class_path")) != old.get("class_path"):
        return new
    return {**old, **{key: _merge(old.get(key), value, key) for key, value in new.items()}}


def _join(old: list[Any], new: list[Any]) -> list[Any]:
    """The objects of both lists; the arguments of ``new`` are laid over those of the same object in ``old``."""
    joined, added = list(old), []
    for each in new:
        place = next((i for i, other in enumerate(old) if _is_same_object(other, each)), None)
        if place is None:
            added.append(each)
        else:
            one = _as_object(joined[place])
            joined[place] = _merge(one, {**_as_object(each), "class_path": one["class_path"]})
    return joined + added


def _is_same_object(one: Any, other: Any) -> bool:
    paths = [str(_as_object(each).get("class_path")) for each in (one, other)]
    if paths[0] != paths[1] and (all("." in path for path in paths) or class_name(one) != class_name(other)):
        return False
    arguments = [_as_object(each).get("init_args") or {} for each in (one, other)]
    return all(arguments[0].get(name) == arguments[1].get(name) for name in _APART)


def _as_object(node: Any) -> Node:
    return node if isinstance(node, dict) else {"class_path": node}
