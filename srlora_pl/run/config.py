"""Config files: reading them, laying overlays on a task's file, and saying in one sentence what is wrong in them.

Nothing here imports torch or Lightning, so that a mistyped file name is answered at once.
"""

import ast
import re
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from srlora_pl.util.errors import UserError, did_you_mean
from srlora_pl.util.yaml_text import load

Node = dict[str, Any]
_TASK_FIRST = (
    "put a task's file before an overlay, as in --config configs/quickstart.yaml --config configs/methods/lora.yaml"
)


def read(path: str) -> Node:
    """The settings of a YAML file.

    Raises:
        UserError: there is no such file, or it is not a YAML mapping.
    """
    file = Path(path)
    if not file.is_file():
        siblings = map(str, file.parent.glob("*.yaml"))
        raise UserError(f"the config file {path} does not exist{did_you_mean(path, siblings)}")
    try:
        content = load(file.read_text("utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path} is not valid YAML: {error.problem} in line {line}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML text file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold settings as 'key: value' lines, not {_short(content)}")
    if not isinstance(content.get("trainer", {}), dict):
        raise UserError(f"trainer in {path} must hold settings of its own, not {_short(content['trainer'])}")
    return content


def combine(contents: Sequence[Node]) -> tuple[Node, Node | None]:
    """What several config files say together: the settings without overlays, and the last overlay's method.

    Later files win. A file that names another method after one was named is an overlay: its method and its own
    arguments stand apart, so that laying a second overlay on top leaves nothing of the first.

    Raises:
        UserError: the files hold arguments of a model, but no model; or a task's file after an overlay.
    """
    settings: Node = {}
    overlay: Node | None = None
    for content in contents:
        method = _method(content)
        if _names_model(content) and isinstance(settings.get("model"), dict) and not _names_model(settings):
            raise UserError(f"a config file's settings of a model come before model.class_path: {_TASK_FIRST}")
        if method and "class_path" in method and _method(settings):
            overlay = method
            content = _without_method(content)
        settings = _merge(settings, content)
    if isinstance(settings.get("model"), dict) and not _names_model(settings):
        raise UserError(f"the config files give no model.class_path: {_TASK_FIRST}")
    return settings, overlay


def method_arguments(settings: Node, overlay: Node | None) -> set[str]:
    """The names of all arguments that the files give a method, its own or not."""
    nodes = (_method(settings), overlay)
    return {name for node in nodes if node for name in node.get("init_args") or {}}


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
    """What ``after`` sets otherwise than ``before``, as ``trainer.max_epochs 5 (was 3)``; only keys that both have."""
    found = []
    for key in (key for key in before if key in after and before[key] != after[key]):
        old, new = before[key], after[key]
        if isinstance(old, dict) and isinstance(new, dict):
            found += [change if key == "init_args" else f"{key}.{change}" for change in changes(old, new)]
        elif key in _JOINED and isinstance(old or [], list) and isinstance(new or [], list):
            found += _changed_objects(key, old or [], new or [])
        else:
            found.append(f"{key} {_short(new)} (was {_short(old)})")
    return found


def _changed_objects(key: str, old: list[Any], new: list[Any]) -> list[str]:
    before, after = ({_class_name(each): _as_object(each) for each in every} for every in (old, new))
    if len(before) < len(old) or len(after) < len(new):  # several of one class
        return [f"{key} {_short(new)} (was {_short(old)})"] if old != new else []
    both = [name for name in after if name in before]
    found = [f"{key} {name}.{change}" for name in both for change in changes(before[name], after[name])]
    found += [f"{key} with {name}" for name in after if name not in before]
    return found + [f"{key} without {name}" for name in before if name not in after]


def without_unwritable(node: Any, key: str = "") -> tuple[Any, list[str]]:
    """``node`` as the parser gives it to be written, without what it has no text for, and the dotted keys of that."""
    left_out: list[str] = []
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    kept = {}
    for name, value in pairs:
        place = f"{key} {_class_name(value)}" if isinstance(node, list) else f"{key}.{name}".lstrip(".")
        place = key if name == "init_args" else place
        if isinstance(value, str) and value.startswith("Unable to serialize instance"):
            left_out.append(place)
        else:
            kept[name], below = without_unwritable(value, place)
            left_out += below
    return (kept if isinstance(node, dict) else [*kept.values()] if isinstance(node, list) else node), left_out


def _names_model(content: Node) -> bool:
    model = content.get("model")
    return isinstance(model, dict) and "class_path" in model


def _method(content: Node) -> Node | None:
    model = content.get("model")
    arguments = model.get("init_args") if isinstance(model, dict) else None
    method = arguments.get("method") if isinstance(arguments, dict) else None
    if isinstance(method, str):
        return {"class_path": method}
    return method if isinstance(method, dict) else None


def _without_method(content: Node) -> Node:
    arguments = {k: v for k, v in content["model"]["init_args"].items() if k != "method"}
    return {**content, "model": {**content["model"], "init_args": arguments}}


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


# Settings that hold several objects, of which those of every file count; other lists are one value.
_JOINED = ("callbacks", "logger", "plugins")
# What tells two callbacks of one class apart, as Lightning does.
_APART = ("monitor", "every_n_train_steps", "every_n_epochs", "train_time_interval")


def _join(old: list[Any], new: list[Any]) -> list[Any]:
    """The objects of both; one that both have is that of ``old`` with the arguments of ``new`` laid over its own."""
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
    if paths[0] != paths[1] and (all("." in path for path in paths) or _class_name(one) != _class_name(other)):
        return False
    arguments = [_as_object(each).get("init_args") or {} for each in (one, other)]
    return all(arguments[0].get(name) == arguments[1].get(name) for name in _APART)


def _as_object(node: Any) -> Node:
    return node if isinstance(node, dict) else {"class_path": node}


def _class_name(node: Any) -> str:
    return str(_as_object(node).get("class_path")).rpartition(".")[2]


# -- errors of the parser


def explain(message: str, known: Sequence[str], files: Sequence[str], options: Sequence[str]) -> str:
    """jsonargparse's account of a rejected setting, in one sentence.

    ``message``: the text of its ArgumentError, an indented trace through nested types. ``known``: the dotted keys
    of the parser and of the config files. ``files`` and ``options``: the config files and the command line, to say
    where the setting stands. A message of an unknown form comes back as it is, on one line.
    """
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    owners = re.findall(r"Problem with given class_path '([^']+)'", message)
    owner = owners[-1] if owners else ""

    def where(name: str) -> str:
        return written_at(name, files, options)

    def unknown(place: str, owner: str = "") -> str:
        # A config file's own slip, and what it has below it, are known as well.
        others = [each for each in known if not f"{each}.".startswith(f"{place}.")]
        last = place.rpartition(".")[2]
        if same := next((each for each in others if each.rpartition(".")[2] == last), None):
            near = did_you_mean(same, [same])
        else:
            near = did_you_mean(last, _arguments(owner)) if owner else did_you_mean(place, others)
        return f"{where(place)} is unknown{f' to {owner}' if owner else ''}{near}"

    if found := re.search(r"unrecognized arguments: (?:--)?([^\s=]+)", message):
        if f"--{found[1]}" not in message:
            return f"{found[1]!r} on the command line belongs to no option (options are written --key value)"
        return unknown(found[1])
    if found := re.search(r"argument (--[\w.]+): expected", message):
        following = zip(options, [*options[1:], "--"], strict=True)
        bare = next((o for o, then in following if o.startswith(found[1]) and then.startswith("--")), found[1])
        return f"{bare} needs a value after it"
    if found := re.search(r"Group '(\w+)' does not accept option '([^']+)'", message):
        return unknown(f"{found[1]}.{found[2]}")
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        return unknown(f"{key}.{found[1]}".lstrip("."), owner)
    if found := re.search(r"the following arguments are required: (.+)", message):
        if not key:
            return f"{found[1]} not given, name a task's file with --config configs/NAME.yaml"
        return f"{owner or key} needs {found[1]}, which {key}.init_args does not give"
    if wrong := _wrong_class(message, owner):
        return f"{wrong}, see {where(key)}"
    if found := re.search(r"Not a valid subclass of (\w+)", message):
        if extra := _extra_key(message):
            return f"{where(f'{key}.{extra}')} stands beside class_path, it belongs below init_args"
        return f"{where(key)} must name a {found[1]} as class_path, with its arguments below init_args"
    return _wrong_type(message, where(key)) or " ".join(message.split())


def missing_package(message: str) -> str:
    """Who needs which package, where ``message`` is Lightning's of one that is missing; else nothing."""
    if not (found := re.search(r"(?:not met|installed)\.[^`]*`pip install (?:-U )?'?([A-Za-z][\w.-]*)", message)):
        return ""
    owners = re.findall(r"Problem with given class_path '([^']+)'|To use the `(\w+)`", message[: found.start()])
    owner = "".join(owners[-1]) if owners else "a setting of the trainer"
    return f"{owner} needs the package {found[1]}, which is not installed: pip install {found[1]}, or choose another"


def written_at(key: str, files: Sequence[str], options: Sequence[str]) -> str:
    """``model.lr (configs/x.yaml, line 12)`` for a dotted key, as far as it can be told where it was written."""
    for option in (re.split("[=+]", option)[0] for option in options):
        # jsonargparse leaves out the class that --model.methd.rank belongs to
        if option == f"--{key}" or ("." in key and option.startswith("--") and option.endswith(f".{key}")):
            return option
    name = re.escape(key.rsplit(".", 1)[-1])
    for file in reversed(files):
        for number, line in enumerate(Path(file).read_text("utf-8").splitlines(), 1):
            if re.match(rf"[\s\-{{]*['\"]?{name}['\"]?\s*:", line):
                return f"{key} ({file}, line {number})"
    return key


def _wrong_class(message: str, owner: str) -> str:
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", message):
        return f"{found[1]} is not a {found[2]}"
    bare = re.search(r"Expected a dot import path string: ([\w.]+)", message)
    if not (bare or re.search(r"has no attribute '\w+'|No module named", message)):
        return ""
    wanted = bare[1] if bare else owner
    module, _, name = wanted.rpartition(".")
    for home in (module, "srlora_pl", "lightning.pytorch.callbacks", "lightning.pytorch.loggers"):
        try:
            known = dir(import_module(home))
        except (ImportError, ValueError):
            continue
        # Wrong capitals are the likeliest slip, and further apart for did_you_mean than another name.
        same = next((right for right in known if right.lower() == name.lower()), name)
        if near := did_you_mean(same, known):
            return f"there is no class {wanted!r}" + near.replace("'", f"'{home}.", 1)
    return f"there is no class {wanted!r}"


def _wrong_type(message: str, where: str) -> str:
    got = re.search(r"Got value: (.*)", message) or re.search(r"Given value: (.*)", message)
    innermost = message.rsplit('Parser key "', 1)[-1]
    expected = [_type_name(text) for text in re.findall(r"Expected (.+?)(?:\. Got value|$)", innermost, re.M)]
    if not (got and expected):
        return ""
    return f"{where} must be {' or '.join(filter(None, expected)) or 'null'}, not {got[1]!r}"


def _type_name(text: str) -> str:
    names = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": ""}
    if found := re.match(r"an? <class '(?:\w+\.)*(\w+)'>", text):
        return names.get(found[1], f"a {found[1]}")
    return re.sub(r"^an? typing\.Literal\[(.*)\]$", r"one of \1", text)


def _extra_key(message: str) -> str:
    """The first key of the given value that stands beside ``class_path`` and ``init_args``."""
    given = re.search(r"Given value: (\{.*\})", message)
    try:
        value = ast.literal_eval(given[1]) if given else {}
    except (ValueError, SyntaxError):
        return ""
    return next((key for key in value if key not in ("class_path", "init_args", "dict_kwargs")), "")


def _arguments(class_path: str) -> list[str]:
    """Names of the arguments of a class, its bases' too where it passes them on."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(import_module(module), name)
    return [argument for base in cls.__mro__ for argument in signature(base.__init__).parameters]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
