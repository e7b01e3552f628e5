"""Learned merges on seven text tasks, over several seeds: in-domain, out-of-domain and weakest task, before and after.

python benchmarks/adaptation_text.py --data path/to/text --output runs/adaptation_text --seeds 0 1 2

Each seed is a run of its own (``OUTPUT/seed_N``, made by ``lightning-merge run``): the same command goes on where it
stopped, and fine-tunings that are there already are kept. Differences are paired: a row's difference is first averaged
over the seeds, which share their test rows; the standard error is that of rows. The spread over seeds stands beside.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_merge.evaluation import Results

ROOT = Path(__file__).resolve().parent.parent
REFERENCES = ("task_arithmetic", "individual")
BEFORE = ("task_arithmetic", "ties")

# A merge without data, beside those of the configuration.
MERGES = """
- {name: wudi, method: Wudi}
"""

# What is learned: 60 steps of 16 unlabeled test inputs of each task. AdaMerging and AdaMerging++ as published start at
# 0.3. ``distilled`` asks the individual models, not labels, what to answer, and ``distilled_wudi`` starts from WUDI,
# which is then one more direction beside the task vectors. ``distilled_weights`` trains all weights of WUDI instead,
# with every model asked about every task's inputs. Surgery must be told the task at inference.
ADAPT = """
- {name: adamerging, objectives: [Entropy], learning_rate: 3.0e-3}
- name: distilled_wudi
  initial: wudi
  objectives: [Distillation]
  learning_rate: 5.0e-3
  max_rows: 480
  module: {individuals: cached}
- {name: surgery, what: Surgery, over: task_arithmetic}
- {name: surgery_v2, what: Surgery, over: task_arithmetic, version: 2}
- {name: adamerging_pp, transforms: [ElectSign], objectives: [Entropy], learning_rate: 3.0e-3}
- name: distilled
  objectives: [Distillation]
  learning_rate: 1.0e-2
  max_rows: 480
  module: {individuals: cached}
- {name: surgery_wudi, what: Surgery, over: wudi}
- name: distilled_weights
  what: Distilled
  over: wudi
  learning_rate: 1.5e-4
  max_rows: 480
  max_epochs: 2
  batches: 30
  module: {cross: 2.0}
"""
STEPS = {"max_epochs": 6, "batches": 10, "precision": "bf16-mixed"}


def settings(config: Path, data: Path, seed: int) -> dict[str, Any]:
    """The settings of one seed's run: those of the text tasks, a few merges, and what is learned."""
    made: dict[str, Any] = copy.deepcopy(yaml.safe_load(config.read_text(encoding="utf-8")))
    made["seed"] = seed
    made["data"]["init_args"]["root"] = str(data)
    made["merges"] = [spec for spec in made["merges"] if spec["name"] in BEFORE]
    made["merges"] += yaml.safe_load(MERGES)
    made["adapt"] = [STEPS | spec for spec in yaml.safe_load(ADAPT)]
    return made


def run(made: dict[str, Any], output: Path) -> None:
    """Do what is left of one seed's run, in a process of its own."""
    output.mkdir(parents=True, exist_ok=True)
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-c", "from lightning_merge.cli import entry; entry()", "run"]
    code = subprocess.run([*command, "--config", str(config), "--output", str(output)], check=False).returncode
    if code not in (0, 1):  # 1: a merge failed and the others are there
        raise SystemExit(code)


def correct(results: Sequence[Results], model: str, task: str, split: str, dataset: str) -> np.ndarray | None:
    """Which rows a model answers rightly, ``(seeds, rows)``."""
    found = [one.score(model, task, split, dataset) for one in results]
    return np.stack([score.correct for score in found if score]).astype(float) if all(found) else None


def summary(
    results: Sequence[Results], model: str, split: str, reference: str | None = None
) -> tuple[float, float, float] | None:
    """Mean accuracy over tasks of the mean over their sets, or its difference to a reference, in points.

    Returns:
        The figure, its standard error over rows (paired), and its standard deviation over seeds.
    """
    figures, variances = [], []
    for task in results[0].tasks:
        datasets = results[0].datasets(split, task)
        rows = []
        for dataset in datasets:
            own = correct(results, model, task, split, dataset)
            other = correct(results, reference, task, split, dataset) if reference else 0.0
            if own is None or other is None:
                return None
            rows.append(100 * (own - other))
        if rows:
            figures.append(np.mean([row.mean(1) for row in rows], axis=0))  # (seeds,)
            variances.append(sum(row.mean(0).var() / row.shape[1] for row in rows) / len(rows) ** 2)
    over_seeds = np.mean(figures, axis=0)
    error = math.sqrt(sum(variances)) / len(variances)
    return float(over_seeds.mean()), error, float(over_seeds.std(ddof=1)) if len(over_seeds) > 1 else 0.0


def aggregate(results: Sequence[Results]) -> list[dict[str, Any]]:
    """One row for each model that every seed has."""
    rows = []
    for model in results[0].models:
        present = [one for one in results if model in one.models and not one.facts(model).error]
        if len(present) < len(results):
            continue
        row: dict[str, Any] = {"model": model, "selection": results[0].facts(model).selection}
        for split in ("id", "ood"):
            row[split] = summary(results, model, split)
            for reference in REFERENCES:
                row[f"{split} - {reference}"] = summary(results, model, split, reference)
        row["min"] = float(np.mean([100 * (one.minimum(model) or 0.0) for one in results]))
        row["weakest"] = sorted({str(one.weakest(model)) for one in results})
        row["share"] = float(np.mean([100 * (one.normalized_mean(model) or 0.0) for one in results]))
        accuracies = {task: [one.accuracy(model, task) or 0.0 for one in results] for task in results[0].tasks}
        row["tasks"] = {task: 100 * float(np.mean(values)) for task, values in accuracies.items()}
        row["seconds"] = float(np.mean([one.facts(model).seconds for one in results]))
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The table."""
    lines = [
        "| model | ID | − task arithmetic | − individual | weakest task | OOD | − task arithmetic | − individual | s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row["model"]]
        for split in ("id", "ood"):
            cells.append(_figure(row[split], plain=True))
            cells += [_figure(row[f"{split} - {reference}"]) for reference in REFERENCES]
            if split == "id":
                cells.append(f"{row['min']:.1f} ({', '.join(row['weakest'])})")
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
    told = (
        f"Seeds {', '.join(map(str, seeds))}. Accuracy in %, mean over tasks and seeds, in brackets its standard "
        "deviation over seeds; differences in points ± standard error over rows, paired. s: seconds the merge took."
    )
    return "\n".join([*lines, "", told]) + "\n"


def _figure(found: tuple[float, float, float] | None, plain: bool = False) -> str:
    if found is None:
        return "—"
    return f"{found[0]:.1f} ({found[2]:.1f})" if plain else f"{found[0]:+.1f} ± {found[1]:.1f}".replace("-", "−")


def main() -> None:
    """Run the seeds that are left, then write ``adaptation_text.json`` and ``.md`` into the output folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of text tasks")
    parser.add_argument("--output", type=Path, required=True, help="holds one run a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "text.yaml")
    parser.add_argument("--collect", action="store_true", help="only the table of what is there")
    options = parser.parse_args()
    for seed in options.seeds if not options.collect else []:
        run(settings(options.config, options.data, seed), options.output / f"seed_{seed}")
    results = [Results.load(options.output / f"seed_{seed}") for seed in options.seeds]
    rows = aggregate(results)
    for ending, text in (("json", json.dumps(rows, indent=1) + "\n"), ("md", markdown(rows, options.seeds))):
        target = options.output / f"adaptation_text.{ending}"
        target.with_suffix(".partial").write_text(text, encoding="utf-8")
        os.replace(target.with_suffix(".partial"), target)
    print(markdown(rows, options.seeds))


if __name__ == "__main__":
    main()
