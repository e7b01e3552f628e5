"""Pictures come with their numbers, and the report holds all and trusts nothing."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_merge.evaluation import ModelFacts, Results, Score, task_vector_statistics, write_plots, write_report
from lightning_merge.evaluation.plots import CAPTIONS, plot_id_ood
from lightning_merge.evaluation.style import PALETTE, model_styles


class Vectors:
    names = ("a", "b")
    tensor_names = ("embeddings.weight", "layer.0.weight", "layer.1.weight")

    def delta(self, model: str, name: str) -> torch.Tensor:
        return torch.randn(4, 5, generator=torch.Generator().manual_seed(len(name) + ord(model)))

    def base_tensor(self, name: str) -> torch.Tensor:
        return torch.ones(4, 5)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def plots(results: Results, tmp_path: Path) -> list[Path]:
    return write_plots(results, tmp_path / "plots", task_vector_statistics(Vectors()))


def test_every_picture_is_a_png_with_its_data(plots: list[Path]) -> None:
    of_one_model = ["trace.png", "coefficients.png"]  # drawn by what learned
    assert [path.name for path in plots] == [name for name in CAPTIONS if name not in of_one_model]
    for path in plots:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
        assert read(path.with_suffix(".csv"))
    assert len(list(plots[0].parent.iterdir())) == 2 * len(plots)  # no leftovers
    bars = {(row["task"], row["model"]): row for row in read(plots[0].with_suffix(".csv"))}
    assert float(bars["a", "merged <i>"]["accuracy"]) == 0.6
    assert float(bars["a", "merged <i>"]["normalized"]) == pytest.approx(0.75)
    assert not any(model == "broken" for _, model in bars)
    scatter = {row["model"]: row for row in read(plots[1].with_suffix(".csv"))}
    assert float(scatter["merged <i>"]["ood_accuracy"]) == 0.75 and set(scatter) == {"individual", "merged <i>"}
    assert float(scatter["merged <i>"]["id_accuracy"]) == pytest.approx(0.675)
    assert len(read(plots[4].with_suffix(".csv"))) == 2 * 3


def test_pictures_leave_pyplot_and_its_settings_alone(plots: list[Path]) -> None:
    import subprocess
    import sys

    code = (
        "import sys, pathlib, tempfile, numpy as np, lightning_merge.evaluation as e\n"
        "assert 'matplotlib' not in sys.modules\n"
        "r = e.Results(['a']); r.add(e.ModelFacts('m'), [e.Score('m', 'a', 'id', 'test', np.array([True]))])\n"
        "e.write_plots(r, tempfile.mkdtemp())\n"
        "import matplotlib\n"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.rcParams['axes.spines.top']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_out_of_domain_sets_there_is_no_scatter(tmp_path: Path) -> None:
    results = Results(["a"])
    results.add(ModelFacts("m"), [Score("m", "a", "id", "test", np.array([True, False]))])
    assert plot_id_ood(results, tmp_path / "id_ood.png") is None
    assert [path.name for path in write_plots(results, tmp_path)] == ["tasks.png"]
    assert not (tmp_path / "id_ood.png").exists()


def test_a_model_keeps_its_colour_when_others_fail_or_come(results: Results) -> None:
    before = model_styles(results)
    results.add(ModelFacts("late", error="no"))
    after = model_styles(results)
    assert {name: after[name] for name in before} == before
    assert before["merged <i>"].color == PALETTE[0]
    for place in range(3 * len(PALETTE)):
        results.add(ModelFacts(f"m{place}"))
    looks = list(model_styles(results).values())
    assert len(set(looks)) == len(looks)


class Reader(HTMLParser):
    """Tags that open, with their attributes, and whether all close."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_file_and_escapes_what_it_is_given(results: Results, plots: list[Path], tmp_path: Path) -> None:
    results.add(ModelFacts("x", error="<script>alert(1)</script>"))
    path = write_report(
        tmp_path / "new" / "report.html",
        results,
        plots,
        config={"base": "<b>base</b>", "folder": tmp_path},
        title="A & B <run>",
        notes=["at most 10 rows <each>"],
    )
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not {"script", "i", "run", "each", "link", "iframe"} & set(reader.tags)
    assert "merged &lt;i&gt;" in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "A &amp; B &lt;run&gt;" in text and "&lt;b&gt;base&lt;/b&gt;" in text
    assert len(reader.links) == len(plots) and all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert not re.search(r"url\(|@import|https?://", text)
    for said in ("validation labels", "not data-free", "typos-3", "−20.0 ±19.0", "density = 0.2", "torch "):
        assert said in text
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_report_stands_without_pictures_config_or_a_merge(tmp_path: Path) -> None:
    text = write_report(tmp_path / "report.html", Results(["a"])).read_text(encoding="utf-8")
    assert "no merged model" in text and "pretrained" in text and "Pictures" not in text


def test_config_text_is_shown_as_it_is(results: Results, tmp_path: Path) -> None:
    text = write_report(tmp_path / "r.html", results, config="base: x  # why\n").read_text(encoding="utf-8")
    assert "base: x  # why" in text
