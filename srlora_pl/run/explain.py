"""jsonargparse's and Lightning's accounts of a rejected setting, in one sentence with its place."""

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from srlora_pl.run import config
from srlora_pl.util.errors import did_you_mean
from srlora_pl.util.program import program

NO_CONFIG = f"give a task's config with --config NAME, such as quickstart ({program()} configs lists all)"
# What users look for among the settings of images, and what timm calls it.
_OF_BACKBONE = dict.fromkeys(("img_size", "image_size", "input_size", "size", "resolution"), "img_size")
_OF_BACKBONE |= {name: name for name in ("patch_size", "drop_rate", "drop_path_rate", "pretrained")}


def explain(message: str, known: Sequence[str], files: Sequence[str], options: Sequence[str]) -> str:
    """The text of an ArgumentError of jsonargparse, an indented trace through nested types, as one sentence.

    Args:
        message: the text.
        known: the dotted keys of the parser and of the config files.
        files, options: the config files and the command line, where the setting stands.
    """
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    owners = re.findall(r"Problem with given class_path '([^']+)'", message)
    if found := re.search(r"argument (--[\w.]+): expected", message):
        following = zip(options, [*options[1:], "--"], strict=True)
        bare = next((o for o, then in following if o.startswith(found[1]) and then.startswith("--")), found[1])
        return f"{bare} needs a value after it"
    if message.startswith("the following arguments are required"):
        return f"{message}: {NO_CONFIG}"
    if found := re.search(r"unrecognized arguments: ([^-\s]\S*)", message):
        return f"{found[1]!r} on the command line belongs to no option (options are written --key value)"
    pattern = r"(?:unrecognized arguments: --|Group '(\w+)' does not accept option '|Option ')([^\s=']+)"
    if found := re.search(pattern, message):
        if "Option '" in found[0]:
            return unknown(f"{key}.{found[2]}".lstrip("."), owners[-1:], known, files, options)
        return unknown(f"{found[1]}.{found[2]}" if found[1] else found[2], [], known, files, options)
    place = written_at(key, files, options)
    if found := re.search(r"path string: ([\w.]+)|'([\w.]+)':\n.*(?:has no attribute|No module named)", message):
        return f"there is no class {found[1] or found[2]!r}{_near_class(found[1] or found[2])}, see {place}"
    return f"{place}: {_reason(message)}".removeprefix(": ")


def missing_package(message: str) -> str:
    """Who needs which package, where ``message`` is Lightning's of one that is not installed; else nothing."""
    if not (found := re.search(r"(?:not met|installed)\.[^`]*`pip install (?:-U )?'?([A-Za-z][\w.-]*)", message)):
        return ""
    owners = re.findall(r"Problem with given class_path '([^']+)'|To use the `(\w+)`", message[: found.start()])
    owner = "".join(owners[-1]) if owners else "a setting of the trainer"
    return f"{owner} needs the package {found[1]}, which is not installed: pip install {found[1]}, or choose another"


def written_at(key: str, files: Sequence[str], options: Sequence[str]) -> str:
    """``model.lr (configs/x.yaml, line 12)`` for a dotted key, or its option, as far as the place can be found."""
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


def unknown(key: str, owner: list[str], known: Sequence[str], files: Sequence[str], options: Sequence[str]) -> str:
    """The sentence on a setting that ``owner``, a class path if any, does not take; the rest is as for `explain`."""
    # A config file's own slip, and the keys above and below it, are known as well.
    others = [each for each in known if not (f"{each}.".startswith(f"{key}.") or key.startswith(f"{each}."))]
    last = key.rpartition(".")[2]
    if last in _OF_BACKBONE and any("Image" in each for each in owner):
        near = f" (did you mean 'model.backbone_kwargs.{_OF_BACKBONE[last]}'?)"
    elif same := next((each for each in others if each.rpartition(".")[2] == last), None):
        near = did_you_mean(same, [same])
    elif owner:
        near = did_you_mean(last, config.arguments_of(owner[0]))
    else:
        near = did_you_mean(key, others)
    return f"{written_at(key, files, options)} is unknown{''.join(f' to {each}' for each in owner)}{near}"


def _near_class(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    for home in (module, "srlora_pl", "lightning.pytorch.callbacks", "lightning.pytorch.loggers"):
        try:
            place = import_module(home)
        except (ImportError, ValueError):
            continue
        known = [each for each in dir(place) if isinstance(getattr(place, each, None), type)]
        if near := did_you_mean(name, known):
            return near.replace("'", f"'{home}.", 1)
    return ""


def _reason(message: str) -> str:
    """The innermost lines of the trace, and the value that they refuse."""
    values = re.findall(r"(?:Got|Given) value: (.*)", message)  # the innermost first
    message = re.sub(r"\. Got value: .*|\n *Subclass types expect one of:(?:\n *- a .*)*", "", message)
    lines = [line for line in message.splitlines() if line.strip()]
    depth = max(len(line) - len(line.lstrip()) for line in lines)
    inner = dict.fromkeys(line.strip(" -") for line in lines if len(line) - len(line.lstrip()) == depth)
    reason = re.sub(r"an? <class '(?:\w+\.)*(\w+)'>", r"\1", " or ".join(inner)).replace(" or Expected ", " or ")
    given = f", given {values[0]!r}" if values and "Namespace(" not in values[0] else ""
    if reason.endswith(" str") and given:  # YAML reads yes, no and 1 as something else
        given += ": put text in quotes of its own, such as ['yes', '1']"
    return f"{reason[0].lower()}{reason[1:]}{given}"
