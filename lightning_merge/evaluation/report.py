"""One HTML file that holds a run's tables, pictures and configuration; needs nothing from the network."""

from __future__ import annotations

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_merge.evaluation.plots import CAPTIONS
from lightning_merge.evaluation.results import Results
from lightning_merge.evaluation.table import (
    CAPTION,
    Column,
    cost_columns,
    errors,
    percent,
    quality_columns,
    rows,
    task_columns,
)

PACKAGES = ("lightning_merge", "torch", "lightning", "transformers", "safetensors", "numpy")

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbf9; --card: #ffffff; --text: #1c1e21; --soft: #5d6570;
  --line: #dfe1e4; --accent: #00568a; --best: #e5f1f9; --warn: #a33a00; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1c2025; --text: #e6e8ea; --soft: #9aa4af;
  --line: #333a42; --accent: #7cc0ee; --best: #15354a; --warn: #ff9d66; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.6rem; }
p { max-width: 46rem; overflow-wrap: anywhere; }
.soft, figcaption, caption { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.45rem 0.8rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
th[scope=row], th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
th[scope=row] { font-weight: 500; max-width: 16rem; white-space: normal; overflow-wrap: break-word; }
td.text, th.text { text-align: left; white-space: normal; min-width: 9rem; overflow-wrap: break-word; }
td small { display: block; color: var(--soft); font-size: 0.82em; }
td.best { background: var(--best); } td.best b { color: var(--accent); }
.failed { color: var(--warn); }
figure { margin: 0 0 1.6rem; } figure h3 { font-size: 1rem; margin: 0 0 0.4rem; }
.picture { overflow-x: auto; background: #fff; padding: 0.7rem; border: 1px solid var(--line); border-radius: 8px; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: 0.4rem; max-width: 46rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 0 1.5rem; }
.pictures .wide { grid-column: 1 / -1; }
details { margin: 0.6rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem;
  font-size: 0.85rem; }
@media (max-width: 40rem) { .wide img { max-width: none; width: 42rem; }
  th[scope=row] { max-width: 8rem; } th, td { padding: 0.4rem 0.5rem; } }
"""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_report(
    path: str | Path,
    results: Results,
    plots: Sequence[str | Path] = (),
    config: str | Mapping[str, Any] | None = None,
    title: str = "Merged models",
    notes: Sequence[str] = (),
) -> Path:
    """Write the report as one self-contained HTML file and return its path.

    Args:
        path: file to write.
        results: tasks x models.
        plots: PNG files, put into the file itself; those that ``CAPTIONS`` knows get their title and caption, also
            as pictures of one model (``adamerging.trace.png``).
        config: configuration of the run, as text or as a mapping (shown as YAML).
        title: heading.
        notes: further sentences, such as how many rows were used.
    """
    path = Path(path)
    text = html_report(results, plots, config, title, notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def html_report(
    results: Results,
    plots: Sequence[str | Path] = (),
    config: str | Mapping[str, Any] | None = None,
    title: str = "Merged models",
    notes: Sequence[str] = (),
) -> str:
    """Build the text of the report; see `write_report`."""
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in (*_headline(results), *notes))]
    for name, error in errors(results).items():
        parts.append(f'<p class="failed"><strong>{escape(name)}</strong> failed: {escape(error)}</p>')
    parts += ["<h2>Over all tasks</h2>", _table(results, quality_columns(results))]
    parts += ["<h2>Accuracy by task</h2>", _table(results, task_columns(results, paired_stderr=True))]
    parts += [f'<p class="soft">{escape(line)}</p>' for line in CAPTION]
    if plots:
        parts += ["<h2>Pictures</h2>", '<div class="pictures">', *(_figure(Path(plot)) for plot in plots), "</div>"]
    parts += ["<h2>Parameters and cost</h2>", _table(results, cost_columns(results))]
    for split, heading in (("ood", "Out-of-domain sets"), ("corrupted", "Corrupted sets")):
        columns = _set_columns(results, split)
        if columns:
            parts += [f"<h2>{heading}</h2>", _table(results, columns)]
    parts += ["<h2>How each model was made</h2>", _table(results, _recipe_columns(results))]
    if config is not None:
        parts += ["<h2>Configuration</h2>", "<details><summary>The run as it was asked for</summary>"]
        parts += [f"<pre>{escape(_config_text(config))}</pre>", "</details>"]
    found = ", ".join(f"{package} {version}" for package, version in versions().items())
    parts.append(f'<p class="soft">Made with {escape(found)}.</p>')
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _headline(results: Results) -> list[str]:
    """Say in a sentence what came out."""
    means = {name: mean for name in results.models if (mean := results.mean(name)) is not None}
    merged = {name: mean for name, mean in means.items() if results.facts(name).kind == "merged"}
    if not merged:
        return [f"{len(results.tasks)} tasks; no merged model has been evaluated on all of them."]
    best = max(merged, key=lambda name: merged[name])
    share, weakest = results.normalized_mean(best), results.weakest(best)
    sentence = f"Of {len(merged)} merged models, {best} answers the {len(results.tasks)} tasks best: "
    sentence += f"{percent(merged[best])} %"
    sentence += f" on average, {percent(share)} % of the individual models" if share is not None else " on average"
    sentence += f"; its weakest task is {weakest} at {percent(results.minimum(best))} %."
    if "pretrained" in means:
        sentence += f" The pretrained model stands at {percent(means['pretrained'])} %."
    return [sentence, "Naming the best one by its test rows is a choice too: expect a little less of it on fresh data."]


def _table(results: Results, columns: Sequence[Column]) -> str:
    head = "".join(
        f'<th scope="col"{"" if column.numeric else " class=text"}>{escape(column.header)}</th>' for column in columns
    )
    lines = [f'<div class="scroll"><table><thead><tr><th scope="col">model</th>{head}</tr></thead><tbody>']
    for row, name in enumerate(rows(results)):
        cells = []
        for column in columns:
            figure, *below = (escape(line) for line in column.cells[row])
            best = row in column.best
            classes = [*([] if column.numeric else ["text"]), *(["best"] if best else [])]
            classes += ["failed"] if figure == "failed" else []
            attribute = f' class="{" ".join(classes)}"' if classes else ""
            small = "".join(f"<small>{line}</small>" for line in below)
            cells.append(f"<td{attribute}>{f'<b>{figure}</b>' if best else figure}{small}</td>")
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _set_columns(results: Results, split: str) -> list[Column]:
    """One column for each data set of a split, accuracy ± standard error and the share of the individual model."""
    columns = []
    for task in results.tasks:
        for dataset in results.datasets(split, task):
            cells = []
            for model in rows(results):
                score = results.score(model, task, split, dataset) if model in results.models else None
                if score is None:
                    cells.append(("—",))
                    continue
                share = results.normalized(model, task, split, dataset)
                below = () if share is None else (f"{percent(share)}%",)
                cells.append((f"{percent(score.value)} ±{percent(score.stderr)}", *below))
            columns.append(Column(f"{task}: {dataset.removeprefix('ood_')}", tuple(cells)))
    return columns


def _recipe_columns(results: Results) -> list[Column]:
    known = [results.facts(model) if model in results.models else None for model in rows(results)]

    def column(header: str, texts: Sequence[str]) -> Column:
        return Column(header, tuple((text or "—",) for text in texts), numeric=False)

    return [
        column("method", [facts.method if facts else "" for facts in known]),
        column("parameters", [_pairs(facts.parameters) if facts else "" for facts in known]),
        column("chosen by", [facts.selection if facts else "" for facts in known]),
        column("chosen", [_pairs(facts.selected) if facts else "" for facts in known]),
        column("seed", ["" if facts is None or facts.seed is None else str(facts.seed) for facts in known]),
    ]


def _pairs(settings: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return ", ".join(f"{key} = {text(value)}" for key, value in settings.items())


def _figure(path: Path) -> str:
    model, _, kind = path.name.partition(".")
    title, caption = CAPTIONS.get(path.name, (path.stem.replace("_", " "), ""))
    if kind in CAPTIONS:  # a picture of one model: adamerging.trace.png
        title, caption = f"{CAPTIONS[kind][0]}: {model}", CAPTIONS[kind][1]
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f"<figure{' class=wide' if path.name == 'tasks.png' else ''}><h3>{escape(title)}</h3>"
        f'<div class="picture"><img alt="{escape(title)}. {escape(caption)}" '
        f'src="data:image/png;base64,{content}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _config_text(config: str | Mapping[str, Any]) -> str:
    if isinstance(config, str):
        return config
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False, allow_unicode=True)
