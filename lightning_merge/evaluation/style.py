"""How pictures look: a colour-blind-safe colour a model, labels that keep off each other, PNG with the data as CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_merge.evaluation.records import INDIVIDUAL, PRETRAINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_merge.evaluation.results import Results

# Okabe and Ito's colours without the yellow (too pale on white), then a dark teal, a wine and an olive.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#005F60", "#882255", "#7F7F00")
FLOOR, CEILING = "#7A7A7A", "#111111"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
HATCHES = ("", "////", "....", "xxxx")
DASHES = ("-", "--", "-.", ":")
DPI = 160
SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a picture is the same everywhere
}


class Style(NamedTuple):
    """Look of one model in every picture."""

    color: str
    marker: str
    hatch: str


def model_styles(results: Results) -> dict[str, Style]:
    """Give each model its look by its place among the merged ones; pretrained is grey, individual black."""
    styles = {PRETRAINED: Style(FLOOR, "H", ""), INDIVIDUAL: Style(CEILING, "*", "")}
    merged = [name for name in results.models if name not in styles]
    for place, name in enumerate(merged):
        lap = place // len(PALETTE)  # past the palette, marker and hatch tell models of one colour apart
        styles[name] = Style(
            PALETTE[place % len(PALETTE)], MARKERS[(place + lap) % len(MARKERS)], HATCHES[lap % len(HATCHES)]
        )
    return styles


def darker(color: str) -> str:
    """Darken ``#rrggbb`` by 30 %, so that text in a model's colour is legible on white."""
    return "#" + "".join(f"{int(0.7 * int(color[at : at + 2], 16)):02x}" for at in (1, 3, 5))


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with the house's settings and leave the caller's as they were."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of its own (inches), without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Figure, path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """Write the picture to ``path`` (.png) and the data behind it to the same name with .csv; return ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_suffix(".csv")
    partial = data.with_name(data.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    os.replace(partial, data)
    partial = path.with_name(path.name + ".partial")
    with drawing():
        figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": None})
    os.replace(partial, path)
    return path


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], colors: Sequence[str]
) -> None:
    """Write a label beside each point where it covers no other label and no point; far ones get a thin line.

    Greedy: for each point the nearest free place of several directions and distances; limits of the axes must be
    final.
    """
    figure = axes.get_figure()
    figure.draw_without_rendering()  # type: ignore[union-attr]
    frame = axes.get_window_extent()
    spots = [tuple(axes.transData.transform(point)) for point in points]
    unit = DPI / 72.0
    taken: list[tuple[float, float, float, float]] = [
        (x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in spots
    ]
    entries = sorted(zip(spots, texts, colors, strict=True), key=lambda entry: (-entry[0][1], entry[0][0]))
    for (x, y), text, color in entries:
        width, height = _text_size(axes, text)
        best: tuple[float, float, float, float, float] | None = None
        for distance in (8, 14, 22, 32, 44, 58, 74):
            for right, up in ((1, 0), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7), (0, 1), (0, -1)):
                center_x = x + right * (distance * unit + width / 2) if right else x
                center_y = y + up * (distance * unit + height / 2) if up else y
                box = (center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2)
                outside = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
                cost = distance + 40 * outside + 1000 * sum(_overlap(box, other) for other in taken)
                if best is None or cost < best[0]:
                    best = (cost, *box)
        if best is None:
            continue
        box = best[1:]
        taken.append(box)
        center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        gap = max(box[0] - x, x - box[2], box[1] - y, y - box[3])
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            text,
            xy=(x, y),
            xycoords="figure pixels",
            xytext=center,
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize=8,
            color=color,
            annotation_clip=False,
            arrowprops=arrow if gap > 12 * unit else None,
        ).set_in_layout(False)


def _text_size(axes: Axes, text: str) -> tuple[float, float]:
    probe = axes.text(0, 0, text, fontsize=8)
    extent = probe.get_window_extent()
    probe.remove()
    return extent.width + 2, extent.height + 2


def _overlap(first: tuple[float, float, float, float], second: tuple[float, float, float, float]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
