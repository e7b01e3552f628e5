"""The pictures of an evaluation. Each function writes a PNG and, beside it, the numbers it shows as CSV."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from lightning_merge.evaluation.diagnostics import TaskVectorStatistics
from lightning_merge.evaluation.records import INDIVIDUAL, PRETRAINED
from lightning_merge.evaluation.results import Results
from lightning_merge.evaluation.style import (
    CEILING,
    DASHES,
    FLOOR,
    MARKERS,
    PALETTE,
    darker,
    drawing,
    model_styles,
    new_figure,
    place_labels,
    write_figure,
)

BARS_IN_A_ROW = 44

# File name -> title and what to see, for the report; in this order.
CAPTIONS = {
    "tasks.png": (
        "Accuracy by task",
        "Each merged model between the floor (pretrained, dashed grey) and the ceiling (the model fine-tuned on that "
        "task, black). Whiskers are one binomial standard error.",
    ),
    "id_ood.png": (
        "In-domain against out-of-domain",
        "Means over the tasks that have out-of-domain sets, on both axes. Up and to the right is better; on the "
        "diagonal another domain costs nothing.",
    ),
    "cosine.png": (
        "Cosine of the task vectors",
        "Near 0: the fine-tunings moved the weights in unrelated directions. The scale of the colours follows the "
        "largest value off the diagonal, and is at least 0.2 wide.",
    ),
    "conflict.png": (
        "Sign conflict",
        "Per entry of the weights: 1 − |Σ τ| / Σ |τ| over the tasks. 0: all tasks push the same way; 1: they cancel.",
    ),
    "layers.png": (
        "Where the tasks moved the model",
        "Norm of each task vector within a block, relative to the norm of the base's weights there.",
    ),
    "trace.png": (
        "While it learned",
        "What was minimised on the stream, how far coefficients have moved, and what the guard saw on the batches it "
        "watches: none of it knows a label.",
    ),
    "coefficients.png": (
        "Learned coefficients",
        "One column for each task vector, one row for each tensor (or each layer, where there are many).",
    ),
}


def plot_tasks(results: Results, path: str | Path) -> Path:
    """Draw per-task bars of the merged models with a floor (pretrained) and a ceiling (individual) line.

    Args:
        results: what to show; failed models are left out.
        path: PNG to write; the CSV goes beside it.
    """
    from matplotlib.patheffects import withStroke

    styles = model_styles(results)
    merged = [name for name in results.models if name not in (PRETRAINED, INDIVIDUAL) and not results.facts(name).error]
    tasks = list(results.tasks)
    most = max(1, BARS_IN_A_ROW // (len(merged) + 1))
    lines = math.ceil(len(tasks) / most)
    per_line = math.ceil(len(tasks) / lines)
    longest = max(len(task) for task in tasks)
    width = max(5.5, 1.4 + per_line * max(0.9, 0.2 * (len(merged) + 1.3), 0.085 * longest))
    legend_columns = max(1, min(len(merged) + 2, int(width / 1.9)))
    legend_lines = math.ceil((len(merged) + 2) / legend_columns)
    rows = []
    with drawing():
        figure = new_figure(width, 0.3 + 2.7 * lines + 0.22 * legend_lines)
        grid = figure.subplots(lines, 1, sharey=True, squeeze=False)[:, 0]
        handles = {}
        for line, axes in enumerate(grid):
            shown = tasks[line * per_line : (line + 1) * per_line]
            step = min(0.25, 0.8 / max(1, len(merged)))
            for column, task in enumerate(shown):
                for place, name in enumerate(merged):
                    score = results.score(name, task)
                    if score is None:
                        continue
                    handles[name] = axes.bar(
                        column + (place + 0.5 - len(merged) / 2) * step,
                        100 * score.value,
                        width=step * 0.88,
                        yerr=100 * score.stderr,
                        color=styles[name].color,
                        hatch=styles[name].hatch,
                        edgecolor="white",
                        linewidth=0,
                        error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
                    )
                for name, color, dash in ((PRETRAINED, FLOOR, "--"), (INDIVIDUAL, CEILING, "-")):
                    value = results.accuracy(name, task) if name in results.models else None
                    if value is not None:
                        (handles[name],) = axes.plot(
                            [column - 0.46, column + 0.46],
                            [100 * value] * 2,
                            color=color,
                            linestyle=dash,
                            linewidth=1.6,
                            clip_on=False,  # a ceiling of 100 % lies on the frame
                            path_effects=[withStroke(linewidth=3.2, foreground="white")],  # seen on any bar's colour
                        )
                for name in [PRETRAINED, INDIVIDUAL, *merged]:
                    score = results.score(name, task) if name in results.models else None
                    if score is not None:
                        rows.append([task, name, score.value, score.stderr, score.n, results.normalized(name, task)])
            axes.set_xticks(range(len(shown)), shown)
            axes.set_xlim(-0.6, per_line - 0.4)
            axes.set_ylim(0, 100)
            axes.set_ylabel("accuracy (%)")
            axes.tick_params(axis="x", length=0)
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        order = [name for name in [PRETRAINED, INDIVIDUAL, *merged] if name in handles]
        figure.legend(
            [handles[name] for name in order], order, loc="outside upper left", ncols=legend_columns, frameon=False
        )
    return write_figure(figure, Path(path), ("task", "model", "accuracy", "stderr", "n", "normalized"), rows)


def plot_id_ood(results: Results, path: str | Path) -> Path | None:
    """Draw every model's mean accuracy out of domain over that in domain, both over the tasks with OOD sets.

    Args:
        results: what to show.
        path: PNG to write.

    Returns:
        The path, or ``None`` (nothing written) where no model has scores on both.
    """
    tasks = [task for task in results.tasks if results.datasets("ood", task)]
    rows: list[tuple[str, float, float, int]] = []
    for name in results.models:
        inside = [value for task in tasks if (value := results.accuracy(name, task)) is not None]
        outside = results.ood_mean(name)
        if tasks and outside is not None and len(inside) == len(tasks):
            rows.append((name, sum(inside) / len(inside), outside, len(tasks)))
    if not rows:
        return None
    styles = model_styles(results)
    with drawing():
        figure = new_figure(6.4, 5.0)
        axes = figure.subplots()
        x, y = [100 * row[1] for row in rows], [100 * row[2] for row in rows]
        for row, right, up in zip(rows, x, y, strict=True):
            style = styles[row[0]]
            size = 110 if style.marker == "*" else 46
            axes.scatter(right, up, color=style.color, marker=style.marker, s=size, linewidths=0, zorder=3)
        for limits, values, highest in ((axes.set_xlim, x, 100.0), (axes.set_ylim, y, 100.0)):
            margin = max(2.0, 0.16 * (max(values) - min(values)))
            limits(max(0.0, min(values) - margin), min(highest + 1.0, max(values) + margin))
        low, high = max(axes.get_xlim()[0], axes.get_ylim()[0]), min(axes.get_xlim()[1], axes.get_ylim()[1])
        if high - low > 0.15 * (axes.get_ylim()[1] - axes.get_ylim()[0]):
            axes.plot([low, high], [low, high], color="#AAAAAA", linewidth=0.9, linestyle=":", zorder=1)
        axes.grid(color="#E6E6E6", linewidth=0.6)
        few = f"{len(tasks)} task{'s' if len(tasks) > 1 else ''} with OOD sets"
        axes.set_xlabel(f"in-domain accuracy (%), mean over the {few}")
        axes.set_ylabel("out-of-domain accuracy (%)")
        colors = [darker(styles[row[0]].color) for row in rows]
        place_labels(axes, list(zip(x, y, strict=True)), [row[0] for row in rows], colors)
    return write_figure(figure, Path(path), ("model", "id_accuracy", "ood_accuracy", "tasks"), rows)


def plot_cosine(statistics: TaskVectorStatistics, path: str | Path) -> Path:
    """Draw the matrix of cosines between task vectors, each cell with its value.

    Args:
        statistics: of T task vectors.
        path: PNG to write.
    """
    names, cosine = statistics.names, statistics.cosine
    count = len(names)
    off = cosine[~np.eye(count, dtype=bool)]
    off = off[np.isfinite(off)]
    limit = float(max(0.2, np.abs(off).max())) if off.size else 1.0
    size = max(3.4, 0.62 * count + 1.6)
    with drawing():
        figure = new_figure(size + 1.0 + 0.07 * max(len(name) for name in names), size)
        axes = figure.subplots()
        shown = np.where(np.eye(count, dtype=bool), np.nan, cosine)
        axes.set_facecolor("#D9D9D9")  # the diagonal is 1 by definition; it takes no part in the colours
        image = axes.imshow(shown, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        for row in range(count):
            for column in range(count):
                value = cosine[row, column]
                red, green, blue, _ = image.to_rgba(value) if row != column else (1.0, 1.0, 1.0, 1.0)
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                text = f"{value:.2f}".replace("-", "−") if np.isfinite(value) else "n/a"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "#111111")
        axes.set_xticks(range(count), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), names)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, label="cosine")
        bar.outline.set_visible(False)
    rows = [[names[i], names[j], float(cosine[i, j])] for i in range(count) for j in range(count)]
    return write_figure(figure, Path(path), ("task", "other_task", "cosine"), rows)


def plot_conflict(statistics: TaskVectorStatistics, path: str | Path) -> Path:
    """Draw the histogram of sign conflict, 1 - |sum of deltas| / (sum of magnitudes), over the entries compared.

    Args:
        statistics: of at least two task vectors; entries with fewer than two non-zero deltas take no part.
        path: PNG to write.
    """
    counts, edges = statistics.conflict_counts, statistics.conflict_edges
    shares = 100.0 * counts / max(1, int(counts.sum()))
    with drawing():
        figure = new_figure(6.0, 3.4)
        axes = figure.subplots()
        width = np.diff(edges)
        axes.bar(edges[:-1], shares, width=width, align="edge", color=PALETTE[0], edgecolor="white", linewidth=0.8)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, max(1.0, 1.18 * float(shares.max(initial=0.0))))
        if math.isfinite(statistics.conflict_mean):
            mean = statistics.conflict_mean
            axes.axvline(mean, color=PALETTE[1], linewidth=1.4)
            left = mean > 0.6
            axes.annotate(
                f"mean {mean:.2f}",
                (mean, 0.97),
                xycoords=("data", "axes fraction"),
                xytext=(-5 if left else 5, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="top",
                color=PALETTE[1],
            )
        axes.set_xlabel("sign conflict of an entry  (0: all agree, 1: they cancel)")
        axes.set_ylabel("share of entries (%)")
        share = 100.0 * statistics.compared / max(1, statistics.entries)
        axes.set_title(f"{share:.3g} % of {statistics.entries:,} entries are moved by two or more tasks", loc="left")
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    rows = [[edges[i], edges[i + 1], int(counts[i]), shares[i] / 100.0] for i in range(len(counts))]
    return write_figure(figure, Path(path), ("from", "to", "entries", "share"), rows)


def plot_layers(statistics: TaskVectorStatistics, path: str | Path) -> Path:
    """Draw the norm of each task vector within each block over the norm of the base there, one line a task.

    Args:
        statistics: of T task vectors over B blocks.
        path: PNG to write.
    """
    relative = statistics.relative_block_norms
    blocks = statistics.blocks
    labels = [_short(block) for block in blocks]
    with drawing():
        figure = new_figure(max(6.4, 2.6 + 0.34 * len(blocks)), 3.8)
        axes = figure.subplots()
        for place, name in enumerate(statistics.names):
            axes.plot(
                range(len(blocks)),
                100.0 * relative[place],
                color=PALETTE[place % len(PALETTE)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle=DASHES[place % len(DASHES)],
                markersize=4.5,
                linewidth=1.2,
                label=name,
            )
        steep = max((len(label) for label in labels), default=0) > 3
        axes.set_xticks(range(len(blocks)), labels)
        if steep:
            axes.tick_params(axis="x", labelrotation=40)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
                label.set_rotation_mode("anchor")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("block")
        axes.set_ylabel("‖τ‖ / ‖base‖ (%)")
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        figure.legend(loc="outside right upper", frameon=False)
    rows = [
        [name, block, statistics.block_norms[i, j], statistics.base_block_norms[j], relative[i, j]]
        for i, name in enumerate(statistics.names)
        for j, block in enumerate(blocks)
    ]
    return write_figure(figure, Path(path), ("task", "block", "norm", "base_norm", "relative_norm"), rows)


def write_plots(results: Results, folder: str | Path, statistics: TaskVectorStatistics | None = None) -> list[Path]:
    """Write every picture that the data allow into a folder, PNG and CSV, and return the paths of the PNGs.

    Args:
        results: scores of the models.
        folder: is created; the file names are the keys of ``CAPTIONS``.
        statistics: of the task vectors; without it the three pictures of them are left out.
    """
    folder = Path(folder)
    written = [plot_tasks(results, folder / "tasks.png"), plot_id_ood(results, folder / "id_ood.png")]
    if statistics is not None:
        if len(statistics.names) > 1:  # one task vector has nothing to be compared with
            written.append(plot_cosine(statistics, folder / "cosine.png"))
            written.append(plot_conflict(statistics, folder / "conflict.png"))
        written.append(plot_layers(statistics, folder / "layers.png"))
    return [path for path in written if path is not None]


def _short(block: str) -> str:
    """Shorten a numbered block to its number and its parent: ``encoder.layer.3`` to ``layer 3``."""
    parts = block.split(".")
    return " ".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
