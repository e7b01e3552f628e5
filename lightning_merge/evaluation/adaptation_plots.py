"""Pictures of a merge that learns: the trace of what was seen on the way, and the coefficients that were learned."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_merge.evaluation.style import CEILING, DASHES, FLOOR, PALETTE, drawing, new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

Table = Mapping[str, Mapping[str, float]]

# What panels are called, in this order; what is not listed comes first, by name: the terms that are minimised.
TITLES = {
    "entropy": "entropy (nats)",
    "overlap": "overlap with individual models",
    "agreement": "agreement with individual models",
    "agreement_with_start": "agreement with the start",
    "diversity": "diversity of predicted classes",
    "drift": "drift of coefficients (RMS)",
}
BOUNDED = ("overlap", "agreement", "agreement_with_start", "diversity")
# Groups up to which a heat map has a row for each, and up to which each row has its label.
MOST_ROWS, MOST_LABELS = 120, 36
# Colours span at least this much to each side, so that what has hardly moved looks like it.
LEAST_REACH = 0.05
_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")


class TraceRow(NamedTuple):
    """One number that was seen during an adaptation; ``task`` is empty for the mean over tasks."""

    step: int
    quantity: str
    task: str
    value: float


def plot_trace(
    rows: Sequence[TraceRow],
    path: str | Path,
    best_step: int | None = None,
    stopped_step: int | None = None,
    restored: bool = False,
) -> Path:
    """Draw one panel for each quantity over the steps: thin lines for the tasks, a thick one for their mean.

    Args:
        rows: What was seen.
        path: PNG to write; the CSV goes beside it.
        best_step: Where the best state was, by a vertical line.
        stopped_step: Where a guard has stopped the run, by another.
        restored: Whether the best state is the final one.

    Returns:
        The path of the PNG.
    """
    found = dict.fromkeys(row.quantity for row in rows if math.isfinite(row.value))
    shown = [q for q in found if q not in TITLES] + [q for q in TITLES if q in found]
    tasks = list(dict.fromkeys(row.task for row in rows if row.task))
    columns = 4 if len(shown) > 6 else max(1, min(3, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    with drawing():
        figure = new_figure(1.2 + 2.9 * columns + (0.9 if tasks else 0), 0.6 + 2.15 * lines)
        grid = figure.subplots(lines, columns, sharex=True, squeeze=False).flatten()
        handles: dict[str, Any] = {}
        titles: list[tuple[Axes, Text]] = []
        for axes, quantity in zip(grid, shown, strict=False):
            series: dict[str, list[TraceRow]] = {}
            for row in rows:
                if row.quantity == quantity and math.isfinite(row.value):
                    series.setdefault(row.task, []).append(row)
            for task, points in sorted(series.items(), key=lambda item: item[0] == ""):
                look = _look(tasks.index(task), len(tasks)) if task else _MEAN
                dot = "o" if len(points) == 1 else None
                (line,) = axes.plot(
                    [p.step for p in points], [p.value for p in points], marker=dot, markersize=4, **look
                )
                if not task or len(tasks) <= 2 * len(PALETTE):
                    handles.setdefault(task, line)
            _mark(axes, best_step, stopped_step)
            name = TITLES.get(quantity, quantity.replace("_", " "))
            titles.append((axes, axes.set_title(name, loc="left", fontsize=9)))
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
            if quantity in BOUNDED:
                low = min(p.value for points in series.values() for p in points)
                axes.set_ylim(max(0.0, math.floor(10 * (low - 0.02)) / 10), 1.02)
            axes.tick_params(labelbottom=True)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(shown) - columns) : len(shown)]:
            axes.set_xlabel("optimizer step")
        names = sorted(handles, key=lambda task: (task != "", tasks.index(task) if task else 0))
        entries = [handles[name] for name in names], [name or "mean" for name in names]
        _add_marks(entries, best_step, stopped_step, restored)
        if entries[0]:
            figure.legend(*entries, loc="outside right upper", frameon=False)
        figure.draw_without_rendering()
        _fit_titles(titles)
    ordered = sorted(rows, key=lambda row: (row.step, row.quantity, row.task))
    return write_figure(figure, Path(path), TraceRow._fields, [list(row) for row in ordered])


def plot_coefficients(table: Table, path: str | Path, start: Table | None = None) -> Path:
    """Draw the coefficients as a heat map, a column for each model and a row for each group of tensors.

    With a start the colours say which way each coefficient has gone: up (red), down (blue) or nowhere (white). Above
    120 groups a row is the mean over the tensors of a numbered layer; the CSV always holds every group.

    Args:
        table: λ by model and group.
        path: PNG to write; the CSV goes beside it.
        start: λ where the learning started, by model and group.

    Returns:
        The path of the PNG.
    """
    models = list(table)
    every = sorted({group for groups in table.values() for group in groups}, key=_natural)
    groups, values = _rows(table, models, every)
    before = None if start is None else _rows(start, models, every)[1]
    shown = values if before is None or _uniform(before) is not None else values - before
    with drawing():
        labelled = len(groups) <= MOST_LABELS
        height = 1.3 + len(groups) * (0.24 if labelled else 0.085)
        longest = max(len(_brief(group)) for group in groups)
        figure = new_figure(1.7 + 0.5 * len(models) + 0.062 * longest, max(2.6, height))
        axes = figure.subplots()
        centre = None if before is None else (_uniform(before) if _uniform(before) is not None else 0.0)
        if centre is None:
            middle = (float(np.nanmin(shown)) + float(np.nanmax(shown))) / 2
            reach = max(float(np.nanmax(shown)) - middle, LEAST_REACH)
            limits, colours = (middle - reach, middle + reach), "viridis"
        else:
            reach = max(float(np.nanmax(np.abs(shown - centre))), LEAST_REACH)
            limits, colours = (centre - reach, centre + reach), "RdBu_r"
        image = axes.imshow(shown, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="none")
        if len(groups) <= 16 and len(models) <= 10:
            _write_values(axes, image, shown)
        axes.set_xticks(range(len(models)), models, rotation=40, ha="left", rotation_mode="anchor")
        axes.xaxis.tick_top()
        _label_rows(axes, groups, labelled)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if centre is None:
            label = "coefficient λ"
        elif before is not None and _uniform(before) is None:
            label = "change of λ"
        else:
            label = f"coefficient λ (white: the start, {centre:.2g})"
        # A bar as long as the map is tall, but not as tall as a hundred rows.
        bar = figure.colorbar(image, ax=axes, fraction=0.08, pad=0.03, label=label, shrink=min(1.0, 3.4 / height))
        bar.outline.set_visible(False)
    rows = [
        [model, group, None if start is None else start.get(model, {}).get(group), table[model][group]]
        for model in models
        for group in table[model]
    ]
    return write_figure(figure, Path(path), ("model", "group", "start", "value"), rows)


def by_layer(table: Table) -> dict[str, dict[str, float]]:
    """Return the mean coefficient of each model over the groups of a numbered layer; others are as they were."""
    found: dict[str, dict[str, float]] = {}
    for model, groups in table.items():
        layers: dict[str, list[float]] = {}
        for group, value in groups.items():
            layers.setdefault(layer_of(group), []).append(value)
        found[model] = {layer: sum(values) / len(values) for layer, values in layers.items()}
    return found


def layer_of(group: str) -> str:
    """Return the numbered layer that a group belongs to, or what stands before the last dot of its name."""
    match = _LAYER.match(group)
    return match.group(0) if match else group.rpartition(".")[0] or group


def _rows(table: Table, models: Sequence[str], every: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the names of the rows, and λ as (rows, models)."""
    used = table if len(every) <= MOST_ROWS else by_layer(table)
    groups = list(dict.fromkeys(every if len(every) <= MOST_ROWS else map(layer_of, every)))
    return groups, np.array([[used.get(m, {}).get(g, math.nan) for m in models] for g in groups], dtype=float)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort numbers within names as numbers: ``layer.2`` before ``layer.10``."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _uniform(values: np.ndarray) -> float | None:
    """Return the one value that all have, or ``None``."""
    known = values[np.isfinite(values)]
    return float(known[0]) if len(known) and np.ptp(known) < 1e-6 else None


def _look(place: int, count: int) -> dict[str, Any]:
    if count > 2 * len(PALETTE):
        return {"color": FLOOR, "linewidth": 0.7, "alpha": 0.6}
    dash = DASHES[place // len(PALETTE) % len(DASHES)]
    return {"color": PALETTE[place % len(PALETTE)], "linewidth": 0.9, "alpha": 0.85, "linestyle": dash}


_MEAN: Any = {"color": CEILING, "linewidth": 2.0}
_BEST: Any = {"color": FLOOR, "linewidth": 2.4, "linestyle": "-", "alpha": 0.55, "zorder": 0}
_STOP: Any = {"color": "#B00020", "linewidth": 1.4, "linestyle": "--", "alpha": 0.9, "zorder": 0}


def _mark(axes: Axes, best_step: int | None, stopped_step: int | None) -> None:
    if best_step is not None:
        axes.axvline(best_step, **_BEST)
    if stopped_step is not None:
        axes.axvline(stopped_step, **_STOP)


def _add_marks(
    entries: tuple[list, list[str]], best_step: int | None, stopped_step: int | None, restored: bool
) -> None:
    from matplotlib.lines import Line2D

    for step, look, name in (
        (best_step, _BEST, f"best: step {best_step}{', restored' if restored else ''}"),
        (stopped_step, _STOP, f"stopped: step {stopped_step}"),
    ):
        if step is not None:
            entries[0].append(Line2D([], [], **look))
            entries[1].append(name)


def _fit_titles(titles: Iterable[tuple[Axes, Text]]) -> None:
    """Make titles that are wider than their panel smaller: the layout of a figure looks at their height only."""
    for axes, title in titles:
        width, room = title.get_window_extent().width, axes.get_window_extent().width
        if width > room:
            title.set_fontsize(float(title.get_fontsize()) * room / width)


def _brief(group: str) -> str:
    """Shorten a name from its left to its last 34 letters."""
    return group if len(group) <= 34 else "…" + group[-33:]


def _label_rows(axes: Axes, groups: Sequence[str], labelled: bool) -> None:
    """Label each row, or, where there are many, each layer in the middle of its rows, with a line between layers."""
    if labelled:
        axes.set_yticks(range(len(groups)), [_brief(group) for group in groups], fontsize=7.5)
        return
    spans: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        spans.setdefault(layer_of(group), []).append(place)
    labels: list[tuple[float, str]] = []
    for layer, places in spans.items():
        middle = (places[0] + places[-1]) / 2
        if not labels or middle - labels[-1][0] >= 1.6:  # nearer ones would lie on each other
            labels.append((middle, _brief(layer)))
        axes.axhline(places[0] - 0.5, color="white", linewidth=1.2)
    axes.set_yticks([at for at, _ in labels], [name for _, name in labels], fontsize=7.5)


def _write_values(axes: Axes, image: Any, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = image.to_rgba(value)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = f"{value:.2f}".replace("-", "−")
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "#111111")
