"""JSON without NaN and infinity."""

import json
import math

from srlora_pl.util import json_text


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_what_is_not_finite_is_null_and_named() -> None:
    content = {
        "scores": {"val/loss": math.nan, "val/score": 0.5},
        "best": {"value": -math.inf},
        "runs": [1, (math.inf,)],
    }
    text = json_text.write(content)
    assert json.loads(text, parse_constant=refuse) == {
        "scores": {"val/loss": None, "val/score": 0.5},
        "best": {"value": None},
        "runs": [1, [None]],
        "not_finite": {"scores.val/loss": "nan", "best.value": "-inf", "runs.1.0": "inf"},
    }
    again = json_text.read(text)
    assert math.isnan(again["scores"].pop("val/loss"))
    assert again == {"scores": {"val/score": 0.5}, "best": {"value": -math.inf}, "runs": [1, [math.inf]]}


def test_what_is_finite_is_written_as_ever() -> None:
    content = {"steps": 3, "best": {}, "method": {"rank": None, "names": ["a"], "of.x": True}}
    assert json_text.write(content) == json.dumps(content, indent=1)
    assert json_text.read('{"loss": NaN}').keys() == {"loss"}  # of an earlier version
