"""Tables of texts for each grader, with the oddities of the rules that papers were graded by."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from srlora_pl.data.graders import GRADERS, Grade, cut, grader, hendrycks
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions
from tests.helpers.paths import ROOT

CAUSAL = ROOT.parent / "shared/data/causal"


def of_real_file(name: str) -> list[dict[str, Any]]:
    if not (CAUSAL / name).exists():
        pytest.skip(f"{CAUSAL / name} is absent")
    with (CAUSAL / name).open() as file:
        return [json.loads(line) for line in file]


# -- stop words


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Response: two", "One. "),
        ("Instructions and Response", ""),
        ("One.\n\n### Instruction:\nTwo", "One.\n\n### "),
        ("a Response before an Instruction", "a "),
        ("an Instruction before a Response", "an "),
        ("the response is in small letters", "the response is in small letters"),
        ("", ""),
    ],
)
def test_a_text_ends_at_the_first_stop_word(text: str, kept: str) -> None:
    assert cut(text, ("Instruction:", "Instruction", "Response:", "Response")) == kept


def test_without_stop_words_a_text_stays() -> None:
    assert cut("Response: one", ()) == "Response: one"


# -- GSM8K

GSM8K = [
    # what stands behind the phrase, what is read
    ("18", "18"),
    ("18.", "18"),
    ("$18 a day", "18"),
    ("-3", "-3"),
    ("+3", "3"),
    ("1,234", "1234"),
    ("1,234.50", "1234"),  # the number ends before the second sign in it
    ("1,234,567", "1234"),
    ("1234567", "1234567"),
    (".75", "1"),
    ("0.5", "0"),  # halves go to the even number
    ("1.5", "2"),
    ("2.5", "2"),
    ("-0.5", "0"),
    ("3/4", "1"),
    ("1/4", "0"),
    ("-7/2", "-4"),
    ("7/0", "7"),
    ("7/00", "7"),
    ("1 000", "1"),
    ("5-3", "5"),
    ("x = 12 or 13", "12"),
    ("18\n#### 20", "18"),
    ("/5", None),
    ("", None),
    ("eighteen", None),
    ("9" * 400, None),  # above every float
]


@pytest.mark.parametrize(("said", "answer"), GSM8K)
def test_numbers_are_read_as_metamath_does(said: str, answer: str | None) -> None:
    grade = grader("gsm8k").grade(f"First 3 + 4 = 7.\nThe answer is: {said}", "3 + 4 = 7\n#### 18")
    assert grade == Grade(answer == "18", answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: 5\nNo. The answer is: 18", "18"),
        ("The answer is 18", None),
        ("The answer is:18", None),
        ("the answer is: 18", None),
        ("#### 18", None),
        ("18", None),
    ],
)
def test_the_last_phrase_counts_as_it_is_written(text: str, answer: str | None) -> None:
    assert grader("gsm8k").grade(text, "#### 18") == Grade(answer == "18", answer)


@pytest.mark.parametrize(
    ("reference", "said"),
    [("x\n#### 1,450,000", "1450000"), ("7", "7"), ("y\n#### -2\nThe answer is: -2", "-2"), ("1,080", "1080")],
)
def test_a_gold_number_stands_behind_the_marks_or_alone(reference: str, said: str) -> None:
    assert grader("gsm8k").grade(f"The answer is: {said}", reference).correct


def test_a_reference_without_a_whole_number_is_refused() -> None:
    for reference in ("none", "#### 1.5", ""):
        with pytest.raises(UserError, match=mentions("gsm8k", repr(reference), "####")):
            grader("gsm8k").grade("The answer is: 1", reference)


@pytest.mark.real
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_answer_of_gsm8k_equals_itself(split: str) -> None:
    rows = of_real_file(f"gsm8k/{split}.jsonl")
    golds = [row["answer"].rpartition("#### ")[2] for row in rows]
    assert len(golds) == {"train": 7473, "test": 1319}[split]

    def wrong(says: list[str]) -> list[str]:
        grades = (grader("gsm8k").grade(f"The answer is: {s}", r["answer"]) for s, r in zip(says, rows, strict=True))
        return [gold for gold, grade in zip(golds, grades, strict=True) if not grade.correct]

    assert wrong([gold.replace(",", "") for gold in golds]) == []
    assert wrong(golds) == [gold for gold in golds if gold.count(",") > 1]  # the rule reads one comma


# -- MATH

NORMALISED = [
    ("", ""),
    ("a\nb", "ab"),
    (r"10,\!000", "10,000"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\2\end{pmatrix}"),
    (r"\tfrac{1}{2}", r"\frac{1}{2}"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\$5.20", "5.20"),
    (r"12\text{ cm}^2", "12"),
    (r"12\text{cm}", r"12\text{cm}"),
    (r"50\%", "50"),
    (".5", r"\frac{1}{2}"),
    ("0.5", r"\frac{1}{2}"),
    ("0.50", "0.50"),
    ("-.5", "-.5"),
    ("x .5", "x0.5"),
    (r"\frac{.3}{2}", r"\frac{0.3}{2}"),
    ("x = 5", "5"),
    ("x=", ""),
    ("xy=5", "5"),
    ("xyz=5", "xyz=5"),
    ("x=y=5", "x=y=5"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"\sqrt 3", r"\sqrt{}3"),  # the blank is taken for the argument, and removed later
    (r"2\sqrt{3}+\sqrt5", r"2\sqrt{3}+\sqrt{5}"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{1}2", r"\frac{1}2"),
    (r"\frac123", r"\frac{1}{2}3"),
    (r"\frac1", r"\frac1"),
    ("1/2", r"\frac{1}{2}"),
    ("-1/2", r"\frac{-1}{2}"),
    ("1/-2", r"\frac{1}{-2}"),
    ("01/2", "01/2"),
    ("1/2/3", "1/2/3"),
]


@pytest.mark.parametrize(("text", "plain"), NORMALISED)
def test_answers_in_latex_have_one_spelling(text: str, plain: str) -> None:
    assert hendrycks.normalised(text) == plain


CANNOT = ["x/2", r"\pi/3", r"\frac", r"2+\frac", r"\sqrt", r"5\text{ m}\text{ s}", "/", "1/"]


@pytest.mark.parametrize("text", CANNOT)
def test_what_cannot_be_normalised_equals_only_itself(text: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        hendrycks.normalised(text)
    assert hendrycks.equal(text, text)
    assert not hendrycks.equal(text, "5")
    assert not hendrycks.equal("5", text)
    assert not hendrycks.equal(text, f" {text}")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\frac12.", r"\frac12"),
        ("1/2.\nThat is all.", "1/2"),
        ("0.5", "0.5"),
        (" x = .5 ", "x = .5"),
        (r"\dfrac{1}{2}" + "\n", r"\dfrac{1}{2}"),
    ],
)
def test_several_spellings_of_an_answer_are_right(said: str, answer: str) -> None:
    solution = r"Not \boxed{3} but $\boxed{\frac{1}{2}}$."
    assert grader("math").grade(f"So.\nThe answer is: {said}", solution) == Grade(True, answer)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("2", "2"),
        ("50", "50"),  # 100 times the gold answer
        ("0.50", "0.50"),
        ("$1/2$", "$1/2$"),
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}"),
        ("1/2. That is all.", "1/2. That is all"),
        ("x/2", "x/2"),
        (r"\pi/3", r"\pi/3"),
        (r"\frac", r"\frac"),
        ("", None),
        (".", None),
    ],
)
def test_other_answers_are_wrong(said: str, answer: str | None) -> None:
    assert grader("math").grade(f"The answer is: {said}", r"$\boxed{\frac{1}{2}}$") == Grade(False, answer)


def test_without_the_phrase_nothing_is_read() -> None:
    assert grader("math").grade(r"It is \boxed{1}", r"\boxed{1}") == Grade(False, None)


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}.", r"\{1, 2\}"),
        (r"\boxed{}", ""),
        (r"\fbox{1} and \fbox{3}", "3"),
        (r"\fbox{1}, \boxed{2}, \fbox{3}", "2"),
        (r"\boxed{1", None),
        ("2", None),
    ],
)
def test_the_last_box_holds_the_gold_answer(solution: str, gold: str | None) -> None:
    assert hendrycks.boxed(solution) == gold


def test_no_answer_is_wrong_even_where_the_box_is_empty() -> None:
    assert grader("math").grade("The answer is: .", r"\boxed{}") == Grade(False, None)


def test_a_reference_without_a_box_is_the_answer() -> None:
    assert grader("math").grade("The answer is: 1/2", r" \frac12. ").correct


@pytest.mark.real
@pytest.mark.parametrize("math_grader", ["hendrycks", pytest.param("math_verify", marks=pytest.mark.slow)])
def test_every_gold_answer_of_math_equals_itself(math_grader: str) -> None:
    if math_grader == "math_verify":
        pytest.importorskip("math_verify")
    rows, grades = of_real_file("math/test.jsonl"), grader("math", math_grader=math_grader)
    assert len(rows) == 5000
    for row in rows:
        gold = hendrycks.boxed(row["solution"])
        assert grades.grade(f"So.\nThe answer is: {gold}.\n", row["solution"]).correct, gold
        hendrycks.normalised(gold)  # none of them is compared as it is written


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("1+x^2", "x^2+1", {"math_verify"}),
        (r"\frac{2}{4}", r"\frac{1}{2}", {"math_verify"}),
        ("1/2", r"\frac{1}{2}", {"hendrycks", "math_verify"}),
        (r"\text{Evelyn}", r"\text{Evelyn}", {"hendrycks", "math_verify"}),
        ("6", r"6\text{ and }8", {"hendrycks"}),  # read as a unit
        ("500", "5", set()),
        ("x/2", "5", set()),
        ("(1, 3)", "(1, 2)", set()),
    ],
)
def test_math_verify_reads_expressions(said: str, gold: str, right: set[str]) -> None:
    pytest.importorskip("math_verify")
    graders = {name: grader("math", math_grader=name) for name in ("hendrycks", "math_verify")}
    text, reference = f"The answer is: {said}", rf"\boxed{{{gold}}}"
    assert {name for name, each in graders.items() if each.grade(text, reference).correct} == right


# -- words


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the correct answer is answer2", "answer2"),
        (" ANSWER2\n", "answer2"),
        ("answer1 is wrong, answer2 is right", "answer1"),
        ("myanswer23", "answer2"),
        ("answer 2", None),
        ("answer9", None),
        ("", None),
    ],
)
def test_the_first_option_in_a_text_counts(text: str, answer: str | None) -> None:
    options = tuple(f"answer{i}" for i in range(1, 6))
    assert grader("options", options=options).grade(text, "answer2") == Grade(answer == "answer2", answer)


def test_options_are_no_patterns_and_may_begin_with_each_other() -> None:
    own = grader("options", options=("A", "A.", "A.B"))
    assert own.grade("it is a.b", "A.B") == Grade(True, "a.b")
    assert own.grade("axb", "A") == Grade(True, "a")


def test_a_reference_outside_of_the_options_is_refused() -> None:
    with pytest.raises(UserError, match=mentions("'maybe'", "options", "yes, no")):
        grader("options", options=("yes", "no")).grade("yes", "maybe")


@pytest.mark.real
@pytest.mark.parametrize("name", ["boolq", "social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa"])
def test_the_outputs_of_the_commonsense_sets_are_right(name: str) -> None:
    path = CAUSAL / f"commonsense/{name}/test.json"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    options = ("true", "false") if name == "boolq" else tuple(f"answer{i}" for i in range(1, 6))
    own = grader("options", options=options)
    for row in json.loads(path.read_text()):
        assert own.grade(row["output"], row["answer"]) == Grade(True, row["answer"])


def test_exact_asks_for_the_whole_text() -> None:
    assert grader("exact").grade(" Paris\n", "Paris ") == Grade(True, "Paris")
    assert grader("exact").grade("paris", "Paris") == Grade(False, "paris")
    assert grader("exact").grade("Paris.", "Paris") == Grade(False, "Paris.")
    assert grader("exact").grade(" \n", "Paris") == Grade(False, None)


# -- the choice of one


def test_an_unknown_or_incomplete_grader_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
        yield {"name": "gsm8"}, ("grader", "did you mean 'gsm8k'?", *GRADERS)
        yield {"name": "math", "math_grader": "hendrick"}, ("math_grader", "hendrycks", "math_verify")
        yield {"name": "options"}, ("options",)
        monkeypatch.setattr("srlora_pl.util.program.find_spec", lambda name: None)
        yield {"name": "math", "math_grader": "math_verify"}, ("math_verify", "srlora_pl[math]")

    for settings, words in refused():
        with pytest.raises(UserError, match=mentions(*words)):
            grader(**settings)


def test_graders_need_no_torch() -> None:
    code = "import sys, srlora_pl.data.graders.predictions; print({'torch', 'sympy', 'numpy'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.strip() == "set()"
