"""Values, values over the layers, filters, and which level wins."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_merge.errors import UserError
from lightning_merge.mergekit.parameters import Parameter, evaluate, resolve

T = Parameter("t")
FLAG = Parameter("flag", bool, default=False)
COUNT = Parameter("count", int, default=3)


@pytest.mark.parametrize(
    ("parameter", "setting", "t", "expected"),
    [
        (T, "1e-5", 0.0, 1e-5),
        (T, True, 0.0, 1.0),
        (T, [0.2, 1.0], 0.0, 0.2),
        (T, [0.2, 1.0], 1 / 3, 0.2 * 2 / 3 + 1.0 / 3),
        (T, [0.2, 1.0], 1.0, 1.0),
        (T, [0, 0.5, 0.3, 0.7, 1], 1 / 3, 0.5 * 2 / 3 + 0.3 / 3),
        (T, [0.4], 0.7, 0.4),
        (T, ["0", "1"], 0.5, 0.5),
        (FLAG, "off", 0.0, False),
        (FLAG, 1, 0.0, True),
        (FLAG, [True, False], 0.5, True),
        (FLAG, [True, False], 1.0, False),
        (COUNT, "12", 0.0, 12),
        (COUNT, [2, 4], 0.5, 3),
        (T, {"filter": "mlp", "value": 0.5}, 0.0, None),
        (T, {"filter": "attn", "value": [0, 1]}, 0.25, 0.25),
        (T, [{"filter": "attn", "value": 1}, {"filter": "self", "value": 2}, {"value": 3}], 0.0, 1.0),
        (T, [{"filter": "mlp", "value": 1}, {"filter": "*", "value": 2}, {"value": 3}], 0.0, 2.0),
    ],
)
def test_evaluate(parameter: Parameter, setting: Any, t: float, expected: Any) -> None:
    found = evaluate(setting, parameter, "model.layers.1.self_attn.q_proj.weight", t, "parameters.x")
    assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("parameter", "value", "said"),
    [
        (T, "much", "parameters.t is 'much'. Expected a number"),
        (FLAG, "maybe", "Expected true or false"),
        (COUNT, 2.5, "Expected a whole number"),
        (COUNT, "inf", "Expected a whole number"),
    ],
)
def test_a_value_of_another_kind(parameter: Parameter, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluate(value, parameter, "weight", 0.0, f"parameters.{parameter.name}")


def test_the_first_level_that_has_a_value_wins() -> None:
    levels = [
        ("source", {"t": [{"filter": "mlp", "value": 1}]}),
        ("slice", {}),
        ("module", {"t": 2}),
        ("parameters", {"t": 3}),
    ]
    assert resolve(T, levels, "mlp.weight", 0.0, "slerp") == 1
    assert resolve(T, levels, "attn.weight", 0.0, "slerp") == 2
    assert resolve(T, levels[3:], "attn.weight", 0.0, "slerp") == 3
    assert resolve(COUNT, levels, "attn.weight", 0.0, "karcher") == 3
    with pytest.raises(UserError, match=r"slerp has no 't' for the tensor 'attn.weight'"):
        resolve(T, levels[:2], "attn.weight", 0.0, "slerp")
