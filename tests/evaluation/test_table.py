"""What a reader sees in the terminal and in Markdown."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from lightning_merge.evaluation import ModelFacts, Results, Score, markdown, show
from lightning_merge.evaluation.table import human_bytes, human_count, human_seconds, percent


def printed(results: Results, width: int, **options: bool) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False, **options).print(results.table())  # type: ignore[arg-type]
    return stream.getvalue()


def many(tasks: int) -> Results:
    results = Results([f"task_{place}" for place in range(tasks)])
    for name, right in (("individual", 95), ("good", 90), ("bad", 50)):
        scores = [Score(name, task, "id", "test", np.arange(100) < right) for task in results.tasks]
        results.add(ModelFacts(name, "individual" if name == "individual" else "merged"), scores)
    return results


def test_cell_shows_raw_normalized_and_difference(results: Results) -> None:
    text = printed(results, 100)
    assert "60.0 ±15.5" in text  # sqrt(.6 * .4 / 10)
    assert "75.0% −20.0" in text
    assert "22.7M" in text and "45.4M" in text
    assert "broken failed: the tensor 'w' holds NaN" in text
    assert "not data-free" in text and "paired over the same rows" in " ".join(text.split())
    assert "scale=0.3" in text and "validation labels" in text
    assert "\x1b" not in text  # plain where there is no terminal


def test_pretrained_and_individual_always_have_a_row() -> None:
    results = Results(["a"])
    results.add(ModelFacts("m"), [Score("m", "a", "id", "test", np.array([True, False]))])
    for text in (printed(results, 100), markdown(results)):
        assert "pretrained" in text and "individual" in text and "50.0" in text


@pytest.mark.parametrize("width", [60, 100, 120])
def test_no_line_is_wider_than_the_console_and_no_task_is_lost(width: int) -> None:
    text = printed(many(8), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert all(f"task_{place}" in text for place in range(8))
    assert text.count("90.0 ±3.0") == 8  # a cell is never cut or folded
    assert ("continued" in text) == (width < 120)


def test_bold_is_the_best_merged_model_and_not_the_ceiling(results: Results) -> None:
    text = printed(many(2), 100, force_terminal=True)
    assert len(re.findall(r"\x1b\[1m *90\.0 ±3\.0", text)) == 2
    assert not re.search(r"\x1b\[1m *(95|50)\.0", text)
    table = markdown(many(2))
    assert table.count("**90.0 ±3.0**") == 2 and "**95" not in table and "**50" not in table
    assert "**" not in markdown(results)  # the best of one says nothing


def test_markdown_escapes_what_ends_a_cell_and_every_row_has_all_columns(results: Results) -> None:
    results.add(ModelFacts("a|b", error="first line\nsecond | line"))
    text = results.to_markdown()
    assert "merged &lt;i&gt;" in text and "<i>" not in text
    assert "a\\|b" in text and "first line second \\| line" in text
    tables = text.split("## ")[1:]
    for table in tables:
        lines = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + 5 and len({line.count("|") for line in lines}) == 1
    assert "| 60.0 ±15.5<br>75.0%<br>−20.0 ±19.0 |" in text  # paired: sqrt((0.4 - 0.04) / 10)


def test_an_ascii_stream_gets_ascii(results: Results) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    show(results, file=stream)
    stream.flush()
    assert b"60.0 +-15.5" in raw.getvalue() and b"-20.0" in raw.getvalue()


def test_a_name_is_not_markup() -> None:
    results = Results(["a"])
    results.add(ModelFacts("[red]m[/red]"), [Score("[red]m[/red]", "a", "id", "test", np.array([True]))])
    assert "[red]m[/red]" in printed(results, 100)


def test_human_units() -> None:
    assert [human_count(v) for v in (0, 999, 1000, 999_949, 22_713_216, 999_960_000, 7.24e9)] == [
        "0", "999", "1.0K", "1.0M", "22.7M", "1.0B", "7.2B",
    ]  # fmt: skip
    assert [human_bytes(v) for v in (0, 5, 2048, 310_000_000, 3 * 2**30)] == [
        "—",
        "5 B",
        "2.0 KiB",
        "296 MiB",
        "3.0 GiB",
    ]
    assert [human_seconds(v) for v in (0, 0.042, 12.34, 59.96, 125, 3725)] == [
        "—", "0.04 s", "12.3 s", "1 m 00 s", "2 m 05 s", "1 h 02 m",
    ]  # fmt: skip
    assert [percent(v, signed=True) for v in (None, -0.0001, -0.0144, 0.02)] == ["—", "+0.0", "−1.4", "+2.0"]
