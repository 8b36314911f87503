"""Answers to MATH's problems as normalised strings (Hendrycks et al., 2021, arXiv:2103.03874)."""

# In this order. Degrees, dollars and blanks after a backslash mean nothing; a decimal begins with 0.
_BEFORE_UNITS = {
    "\n": "",
    r"\!": "",
    r"\\": "\\",
    "tfrac": "frac",
    "dfrac": "frac",
    r"\left": "",
    r"\right": "",
    r"^{\circ}": "",
    r"^\circ": "",
    r"\$": "",
}
_AFTER_UNITS = {r"\%": "", " .": " 0.", "{.": "{0."}


def equal(answer: str, gold: str) -> bool:
    """Whether two answers in LaTeX are the same once `normalised`; where one cannot be, as they are written."""
    try:
        return normalised(answer) == normalised(gold)
    except (ValueError, IndexError):
        return answer == gold


def normalised(text: str) -> str:
    r"""One spelling for several: ``0.5``, ``1/2``, ``\frac12`` and ``x = \dfrac{1}{2}`` are ``\frac{1}{2}``.

    Raises:
        ValueError, IndexError: two units, a command without its argument, or one slash between other things than whole
            numbers.
    """
    text = _replaced(text, _BEFORE_UNITS)
    text = _replaced(_without_unit(text), _AFTER_UNITS)
    if text.startswith("."):
        text = f"0{text}"
    before, *after = text.split("=")
    if len(after) == 1 and len(before) <= 2:  # x=
        text = after[0]
    text = _with_braces_of_fractions(_with_braces_of_roots(text).replace(" ", ""))
    return r"\frac{1}{2}" if text == "0.5" else _as_fraction(text)


def boxed(solution: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, or where there is none, ``\fbox{...}``; None without a whole one."""
    command = r"\boxed{" if r"\boxed{" in solution else r"\fbox{"
    _, found, content = solution.rpartition(command)
    depth = 1
    for place, sign in enumerate(content if found else ""):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if not depth:
            return content[:place]
    return None


def _replaced(text: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def _without_unit(text: str) -> str:
    before, *after = text.split(r"\text{ ")
    if len(after) > 1:
        raise ValueError(f"two units in {text}")
    return before


def _with_braces_of_roots(text: str) -> str:
    before, *arguments = text.split(r"\sqrt")
    braced = (rest if rest[0] == "{" else f"{{{rest[0]}}}{rest[1:]}" for rest in arguments)
    return r"\sqrt".join([before, *braced])


def _with_braces_of_fractions(text: str) -> str:
    before, *arguments = text.split(r"\frac")
    braced = [before]
    for rest in arguments:
        if rest[0] == "{":
            braced.append(rest)
        elif len(rest) < 2:
            return text
        else:
            above, below = rest[0], rest[1]
            braced.append(f"{{{above}}}{below if below == '{' else f'{{{below}}}'}{rest[2:]}")
    return r"\frac".join(braced)


def _as_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    above, below = map(int, parts)
    return rf"\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
