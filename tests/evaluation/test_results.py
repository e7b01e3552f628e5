"""Figures against worked examples, and what is written against what is read."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_merge.errors import UserError
from lightning_merge.evaluation import ModelFacts, Results, Score


def test_standard_error_is_binomial() -> None:
    score = Score("m", "a", "id", "test", np.array([True] * 30 + [False] * 10))
    assert (score.value, score.n) == (0.75, 40)
    assert score.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
    assert Score("m", "a", "id", "test", np.ones(5, dtype=bool)).stderr == 0.0


def test_score_refuses_what_cannot_be_paired_and_keeps_its_own_copy() -> None:
    correct = np.array([True, False])
    score = Score("m", "a", "id", "test", correct)
    correct[:] = False
    assert score.value == 0.5
    for wrong in (np.array([1, 0]), np.zeros((2, 2), dtype=bool), np.array([], dtype=bool)):
        with pytest.raises(UserError, match="a non-empty"):
            Score("m", "a", "id", "test", wrong)
    with pytest.raises(UserError, match="Did you mean 'ood'"):
        Score("m", "a", "oood", "x", correct)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'dev'"):
        Score("m", "a", "id", "dev", correct)


def test_paired_difference(results: Results) -> None:
    # a: merged 1111110000 against individual 1111011110: row 4 gained, rows 6, 7, 8 lost, so d has mean -0.2.
    found = results.difference("merged <i>", "a")
    assert found is not None
    assert (found.gained, found.lost, found.n) == (1, 3, 10)
    d = np.array([0, 0, 0, 0, 1, 0, -1, -1, -1, 0], dtype=float)
    assert found.value == pytest.approx(-0.2)
    assert found.stderr == pytest.approx(d.std() / math.sqrt(10))
    own, other = results.score("merged <i>", "a"), results.score("individual", "a")
    assert own is not None and other is not None
    assert found.stderr < math.hypot(own.stderr, other.stderr)  # pairing is what makes it small
    other_way = results.difference("individual", "a", reference="merged <i>")
    assert other_way is not None and (other_way.value, other_way.stderr) == (-found.value, found.stderr)
    same = results.difference("individual", "b")
    assert same is not None and (same.value, same.stderr) == (0.0, 0.0)


def test_difference_over_other_rows_is_refused(results: Results) -> None:
    results.add(ModelFacts("short"), [Score("short", "b", "id", "test", np.ones(3, dtype=bool))])
    with pytest.raises(UserError, match=r"b/test.*3 and 4 rows"):
        results.difference("short", "b")


def test_normalized_mean_minimum(results: Results) -> None:
    assert results.accuracy("merged <i>", "a") == 0.6
    assert results.normalized("merged <i>", "a") == pytest.approx(0.6 / 0.8)
    assert results.normalized("merged <i>", "a", "ood", "ood_x") == pytest.approx(0.25 / 0.5)
    assert results.normalized("merged <i>", "a", "corrupted", "typos-3") is None  # the ceiling has no such score
    assert results.mean("merged <i>") == pytest.approx((0.6 + 0.75) / 2)  # over tasks, not over the 14 rows
    assert results.normalized_mean("merged <i>") == pytest.approx((0.75 + 0.75) / 2)
    assert (results.minimum("merged <i>"), results.weakest("merged <i>")) == (0.6, "a")
    assert results.normalized_mean("individual") == 1.0


def test_ood_mean_is_a_mean_over_tasks_of_means_over_sets(results: Results) -> None:
    assert results.ood_mean("merged <i>") == pytest.approx(((0.25 + 0.75) / 2 + 1.0) / 2)
    assert results.corrupted_mean("merged <i>") == pytest.approx((0.2 + 0.4) / 2)  # task b has none and does not count


def test_a_mean_over_fewer_sets_than_the_others_is_not_given(results: Results) -> None:
    results.add(ModelFacts("half"), [
        Score("half", "b", "id", "test", np.ones(4, dtype=bool)),
        Score("half", "b", "ood", "ood_x", np.ones(4, dtype=bool)),
    ])  # fmt: skip
    assert results.mean("half") is results.minimum("half") is results.ood_mean("half") is None
    assert results.mean("broken") is results.difference("broken", "a") is results.accuracy("broken", "a") is None


def test_a_ceiling_of_zero_normalizes_nothing() -> None:
    results = Results(["a"])
    results.add(
        ModelFacts("individual", "individual"), [Score("individual", "a", "id", "test", np.zeros(3, dtype=bool))]
    )
    assert results.normalized("individual", "a") is None


def test_json_round_trip_is_exact(results: Results) -> None:
    again = Results.from_json(results.to_json())
    assert again.models == results.models == ["pretrained", "individual", "merged <i>", "broken"]
    assert [again.facts(name) for name in again.models] == [results.facts(name) for name in results.models]
    assert again.scores == results.scores
    assert again.to_json() == results.to_json()
    assert again.to_markdown() == results.to_markdown()


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 1001])
def test_packed_rows_of_any_number_come_back(n: int) -> None:
    correct = np.random.Generator(np.random.Philox(n)).random(n) < 0.5
    results = Results(["a"])
    results.add(ModelFacts("m"), [Score("m", "a", "id", "test", correct)])
    again = Results.from_json(results.to_json()).score("m", "a")
    assert again is not None and np.array_equal(again.correct, correct)


def test_parameters_of_any_type_become_plain() -> None:
    facts = ModelFacts("m", parameters={"x": np.float32(0.5), "y": (1, 2), "z": float("inf"), "w": {3: None}})
    assert facts.parameters == {"x": 0.5, "y": [1, 2], "z": "inf", "w": {"3": None}}


def test_csv_is_long_with_the_columns_of_the_design(results: Results) -> None:
    lines = results.to_csv().splitlines()
    assert lines[0] == "model,task,split,dataset,metric,value,stderr,n,normalized,selection,seed"
    read = list(csv.DictReader(io.StringIO(results.to_csv())))
    assert len(read) == len(results.scores) == 14
    row = next(r for r in read if r["model"] == "merged <i>" and r["dataset"] == "ood_x" and r["task"] == "a")
    assert row == {
        "model": "merged <i>", "task": "a", "split": "ood", "dataset": "ood_x", "metric": "accuracy", "value": "0.25",
        "stderr": "0.2165063509", "n": "4", "normalized": "0.5", "selection": "validation labels", "seed": "3",
    }  # fmt: skip


def test_add_names_what_is_wrong(results: Results) -> None:
    right = Score("m", "a", "id", "test", np.ones(2, dtype=bool))
    for facts, scores, said in (
        (ModelFacts("broken"), [], "'broken' is there already"),
        (ModelFacts("n"), [right], "score of 'm'"),
        (ModelFacts("m"), [replace(right, task="aa")], "Did you mean 'a'"),
        (ModelFacts("m"), [right, right], "two scores on a/test"),
    ):
        with pytest.raises(UserError, match=said):
            results.add(facts, scores)
    assert "m" not in results.models and "n" not in results.models  # nothing half added
    results.add(ModelFacts("broken"), [replace(right, model="broken")], replace=True)
    assert results.facts("broken").error is None
    with pytest.raises(UserError, match="Did you mean 'merged <i>'"):
        results.accuracy("merged_i", "a")


def test_names_of_floor_and_ceiling_are_reserved() -> None:
    for name, kind in (("pretrained", "merged"), ("base", "pretrained"), ("individual", "pretrained")):
        with pytest.raises(UserError, match=f"'{name}'"):
            ModelFacts(name, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "lightning_merge.results", "version": 99}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not the text of"):
        Results.from_json(text)


def test_damaged_rows_are_refused(results: Results) -> None:
    with pytest.raises(UserError, match="bytes for 999 rows"):
        Results.from_json(results.to_json().replace('"n": 10', '"n": 999', 1))


def test_save_and_load(results: Results, tmp_path) -> None:
    paths = results.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["results.csv", "results.json", "results.md"]
    assert Results.load(tmp_path / "run").scores == Results.load(paths[0]).scores == results.scores
    with pytest.raises(UserError, match="no results at"):
        Results.load(tmp_path)
