"""Pictures of adaptations: they are written for the shapes that occur, and their CSV holds every number."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from lightning_merge.evaluation import adaptation_plots
from lightning_merge.evaluation.adaptation_plots import (
    TITLES,
    TraceRow,
    by_layer,
    layer_of,
    plot_coefficients,
    plot_trace,
)


def read(path: Path) -> list[dict[str, str]]:
    with path.with_suffix(".csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def is_drawn(path: Path) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels.shape[0] > 200 and pixels.shape[1] > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_layers_of_names() -> None:
    assert layer_of("encoder.layer.10.attention.weight") == "encoder.layer.10"
    assert layer_of("encoder.layer.10") == "encoder.layer.10"
    assert layer_of("embeddings.norm.weight") == "embeddings.norm"
    assert layer_of("all") == "all"
    table = {"a": {"layer.0.w": 1.0, "layer.0.b": 3.0, "layer.1.w": 5.0, "head": 7.0}}
    assert by_layer(table) == {"a": {"layer.0": 2.0, "layer.1": 5.0, "head": 7.0}}


@pytest.mark.parametrize("tensors", [1, 8, 100, 300])
@pytest.mark.parametrize("start", [None, 0.3, "each"])
def test_every_coefficient_stands_in_the_csv(tmp_path: Path, tensors: int, start: float | str | None) -> None:
    groups = [f"layer.{place // 8}.part{place % 8}" for place in range(tensors)]
    table = {m: {g: 0.3 + 0.01 * k - 0.1 * t for k, g in enumerate(groups)} for t, m in enumerate(("cars", "sun"))}
    before = None
    if start is not None:
        before = {m: {g: 0.3 if start == 0.3 else v - 0.1 for g, v in row.items()} for m, row in table.items()}
    path = plot_coefficients(table, tmp_path / "coefficients.png", before)
    assert is_drawn(path)
    rows = read(path)
    assert {(r["model"], r["group"]): float(r["value"]) for r in rows} == {
        (m, g): v for m, row in table.items() for g, v in row.items()
    }
    assert {r["start"] for r in rows} == {""} if start is None else all(r["start"] for r in rows)


def test_coefficients_that_have_not_moved_are_drawn(tmp_path: Path) -> None:
    table = {"a": {"all": 0.3}, "b": {"all": 0.3}}
    assert is_drawn(plot_coefficients(table, tmp_path / "same.png", table))


@pytest.mark.parametrize(("moved", "reach"), [(0.0, 0.05), (0.01, 0.05), (0.4, 0.4)])
def test_colours_reach_at_least_a_twentieth_from_the_start(
    moved: float, reach: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    limits: list[tuple[float, float]] = []
    draw = Axes.imshow

    def seen(self: Axes, *args: Any, **settings: Any) -> Any:
        limits.append((settings["vmin"], settings["vmax"]))
        return draw(self, *args, **settings)

    monkeypatch.setattr(Axes, "imshow", seen)
    start = {"a": {"all": 0.3, "other": 0.3}}
    plot_coefficients({"a": {"all": 0.3, "other": 0.3 + moved}}, tmp_path / "c.png", start)
    plot_coefficients({"a": {"all": 0.3, "other": 0.3}}, tmp_path / "c.png")
    assert limits[0] == pytest.approx((0.3 - reach, 0.3 + reach)) and limits[1] == pytest.approx((0.25, 0.35))


@pytest.mark.parametrize("long", [False, True])
def test_titles_end_where_their_panels_do(long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they run into the next panel, or the last one's into the legend."""
    figures: list[Any] = []
    make = adaptation_plots.new_figure
    monkeypatch.setattr(adaptation_plots, "new_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    names = ["minimised: entropy", *TITLES]
    if long:
        names[3] = "minimised: distance of features to the individual model's, and more"
    plot_trace([TraceRow(s, n, t, 0.5) for s in (0, 9) for n in names for t in ("", "cars")], tmp_path / "trace.png")
    figures[0].draw_without_rendering()
    shown = [axes for axes in figures[0].axes if axes.get_visible()]
    assert len(shown) == len(names)
    for axes in shown:
        (title,) = (t for t in axes.get_children() if isinstance(t, Text) and t.get_text())
        assert title.get_window_extent().x1 <= axes.get_window_extent().x1 + 2


@pytest.mark.parametrize("tasks", [0, 3, 30])
def test_every_number_of_a_trace_stands_in_the_csv(tmp_path: Path, tasks: int) -> None:
    rows = [TraceRow(step, "drift", "", 0.01 * step) for step in range(0, 50, 10)]
    for name in ("minimised: entropy", "entropy", "overlap", "agreement", "agreement_with_start", "diversity"):
        for step in range(0, 50, 10):
            rows += [TraceRow(step, name, f"task{place}", 0.5 + 0.001 * step) for place in range(tasks)]
            rows.append(TraceRow(step, name, "", 0.5))
    path = plot_trace(rows, tmp_path / "trace.png", best_step=20, stopped_step=40, restored=True)
    assert is_drawn(path)
    found = {(int(r["step"]), r["quantity"], r["task"], float(r["value"])) for r in read(path)}
    assert found == {tuple(row) for row in rows}


def test_a_trace_with_what_is_not_finite_or_of_one_step_is_drawn(tmp_path: Path) -> None:
    rows = [TraceRow(10, "entropy", "a", float("nan")), TraceRow(10, "entropy", "", 0.4), TraceRow(10, "x", "", 1.0)]
    assert is_drawn(plot_trace(rows, tmp_path / "trace.png"))
