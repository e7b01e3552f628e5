"""The tables that ``merge_speed.py`` prints and writes into the README."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MEMORY_TARGET, TENSORS_TARGET, STARTUP_TARGET = 300e6, 1.0, 0.5
MEMORY_SLACK = 1.1  # of the larger model over the smaller: the allocator's whims
README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- merge_speed -->", "<!-- /merge_speed -->"


def fill(text: str, readme: Path = README) -> None:
    """Put the tables between the README's markers."""
    before = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
    if not pattern.search(before):
        raise SystemExit(f"{readme} has no {BEGIN} ... {END}")
    readme.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text.strip()}\n\n{END}", before), encoding="utf-8")


def markdown(result: Mapping[str, Any], cases: Sequence[Any]) -> str:
    """All tables of one run."""
    machine = dict(result["machine"])
    blocks = [f"{machine.pop('CPU')}, " + ", ".join(f"{name} {value}" for name, value in machine.items()) + "."]
    for size, rows in result["sizes"].items():
        blocks += [f"**{size} parameters**, one thread, CPU seconds", speed_table(rows, cases), notes(rows)]
    if result["memory"]:
        blocks += ["**Private memory** above a process that has imported torch", memory_table(result["memory"])]
    lines = []
    if "tensors" in result:
        wall, cpu = (statistics.median(result["tensors"][name]) for name in ("wall", "cpu"))
        met = verdict(wall < TENSORS_TARGET)
        lines.append(f"- 4,000 tensors of 16 entries, two averaged: {wall:.2f} s, {cpu:.2f} CPU s ({met}: < 1 s)")
    if "startup" in result:
        extra = statistics.median(result["startup"])
        met = verdict(extra <= STARTUP_TARGET)
        lines.append(f"- `lightning-merge merge --help`: {extra:+.2f} CPU s to `import torch` ({met}: ≤ 0.5)")
    return "\n\n".join(block for block in [*blocks, "\n".join(lines)] if block) + "\n"


def verdict(met: bool) -> str:
    """Say whether a target is met."""
    return "met" if met else "**not met**"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose numbers stand right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Median, and the range where there is one."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}–{max(values):.2f})"


def ratios(measured: Sequence[Mapping[str, Any]], call: int = 0) -> list[float]:
    """Merge over floor, each pair neighbours in time."""
    return [pair["merge"][call] / pair["floor"][call] for pair in measured]


def speed_table(rows: Mapping[str, Any], cases: Sequence[Any]) -> str:
    """One row a method, and the floors."""
    heads = ["method", "form", "ours, CPU s", "ours / floor", "called again", "target", "met?"]
    heads += ["mergekit, CPU s", "mergekit / floor", "mergekit / ours"]
    lines = []
    for case in (case for case in cases if case.label in rows and rows[case.label]["ours"]):
        row = rows[case.label]
        over, seconds = ratios(row["ours"]), [pair["merge"][0] for pair in row["ours"]]
        inputs = f"{len(case.inputs)} inputs"
        again = ratios(row["ours"], 1)
        cells = [case.label, f"{case.form}, {inputs}" if case.form else inputs, spread(seconds), spread(over)]
        cells += [spread(again), f"≤ {case.target:g}" if case.target else "—", judged(over, again, case.target)]
        if row["theirs"]:
            slow = [pair["merge"][0] for pair in row["theirs"]]
            cells += [spread(slow), spread(ratios(row["theirs"]))]
            cells.append(f"{statistics.median(slow) / statistics.median(seconds):.1f}")
        else:
            cells += ["—"] * 3
        lines.append(cells)
    return table(heads, lines) + "\n\n" + floors(rows, cases)


def judged(first: Sequence[float], again: Sequence[float], target: float | None) -> str:
    """Whether a ratio meets its target in a new process and in one that has merged before."""
    if target is None:
        return "—"
    met = [statistics.median(values) <= target for values in (first, again)]
    return verdict(met[0]) if met[0] == met[1] else f"{verdict(met[0])}, again {verdict(met[1])}"


def floors(rows: Mapping[str, Any], cases: Sequence[Any]) -> str:
    """The floor itself, for each number of inputs; called again, the allocator has the memory already."""
    found: dict[int, list[list[float]]] = {}
    for case in (case for case in cases if case.label in rows):
        found.setdefault(len(case.inputs), []).extend(pair["floor"] for pair in rows[case.label]["ours"])
    parts = []
    for count, pairs in sorted(found.items()):
        if pairs:
            first, again = zip(*pairs, strict=True)
            parts.append(f"{count} inputs {spread(first)}, called again {spread(again)}")
    return "Floor, CPU s: " + "; ".join(parts) + "."


def notes(rows: Mapping[str, Any]) -> str:
    """What was not measured, and why."""
    return "\n".join(f"- {label}: not measured ({row['note']})" for label, row in rows.items() if row["note"])


def memory_table(memory: Mapping[str, Mapping[str, Any]]) -> str:
    """Peaks for every size, and what the dry run had said beside what came of it."""
    sizes = list(memory)
    heads = ["method", *[f"{size}, MB" for size in sizes], "≤ 300 MB", "no larger"]
    heads += ["dry run: peak / process, MB", "to write / written", "to read / read, MB", "passes"]
    lines = []
    for label in memory[sizes[0]]:
        found = [memory[size].get(label, {"note": ""}) for size in sizes]
        if any("note" in entry for entry in found):
            continue
        peaks, last = [entry["private"] for entry in found], found[-1]
        planned, done = last["planned"], last["reported"]
        cells = [label, *[f"{peak / 1e6:.0f}" for peak in peaks], verdict(max(peaks) <= MEMORY_TARGET)]
        cells.append(verdict(peaks[-1] <= MEMORY_SLACK * peaks[0]) if len(peaks) > 1 else "—")
        cells.append(f"{planned['peak_memory_bytes'] / 1e6:.0f} / {last['whole'] / 1e6:.0f}")
        cells.append(f"{planned['bytes_written'] / last['file']:.4f}")
        cells.append(f"{planned['bytes_read'] / 1e6:.0f} / {done['bytes_read'] / 1e6:.0f}")
        cells.append(f"{planned['passes']} / {done['passes']}")
        lines.append(cells)
    said = f"What the dry run said is of {sizes[-1]}; its peak is that of the whole process, torch included."
    return table(heads, lines) + "\n\n" + said
