"""Score the models of a run: on test rows and their variants for the table, on validation rows to choose."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import yaml
from torch import Tensor

from lightning_merge.data import Corruption
from lightning_merge.errors import UserError
from lightning_merge.evaluation import ModelFacts, Results, Score, predict, score_model, show, write_plots
from lightning_merge.modules import Encoder, HeadInfo, load_head
from lightning_merge.modules.adaptation_record import read_record, selection_of
from lightning_merge.modules.corrected import corrected_encoder
from lightning_merge.modules.correctors import FILE as CORRECTORS
from lightning_merge.modules.correctors import Correctors
from lightning_merge.parsing import build, make_parser
from lightning_merge.run_settings import RunSettings, add_run_arguments
from lightning_merge.weights import open_weights

# The fingerprints of the rows that were scored.
DATA_RECORD = ".stages/scored_rows"


def evaluate_run(folder: Path, models: Mapping[str, str], output: Path | None) -> int:
    """Score the models of a run, and further ones over its base, and print the table.

    Args:
        folder: A run's folder.
        models: Further models by name: folders with the base's architecture.
        output: Where ``results.*`` go, or nowhere.

    Raises:
        UserError: The folder is no run, or has not been evaluated yet.
    """
    if not (folder / "run.yaml").is_file():
        raise UserError(
            f"'{folder}' is no run: it holds no run.yaml. Expected the output folder of lightning-merge run."
        )
    if not (folder / "results.json").is_file():
        raise UserError(
            f"The run '{folder}' has no results yet. Finish it with lightning-merge run --config "
            f"{folder / 'run.yaml'} --output {folder}."
        )
    results = Results.load(folder)
    parser = make_parser("run", None)
    parser.add_argument("--config", action="config")
    add_run_arguments(parser)
    # run.yaml is the resolved form: every key of it is an option.
    known = {spec.name for spec in fields(RunSettings)}
    resolved = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    kept = yaml.safe_dump({key: value for key, value in resolved.items() if key in known})
    options, _ = build(parser, ["--config", kept])
    settings = RunSettings.of(options)
    made_from = {task: settings.data.fingerprint(task) for task in settings.data.task_names} if models else {}
    recorded = _scored_rows(folder) if models else {}
    for task in made_from:
        if made_from[task] != recorded.get(task):
            raise UserError(
                f"The rows of task '{task}' are no longer those that the run '{folder}' was scored on, so that nothing "
                "can be compared. Expected the same data; run lightning-merge run again."
            )
    for name, reference in models.items():
        if name in {"pretrained", "individual"}:
            raise UserError(f"The model's name '{name}' is taken by a row of the run. Expected another name.")
        started = time.monotonic()
        source = open_weights(reference)
        if source.folder is None:
            raise UserError(
                f"Model '{name}' ({reference}) is no Hugging Face folder. Expected config.json beside weights."
            )
        facts = given_facts(name, source.folder, source.numel)
        scores = folder_scores(settings, name, source.folder, folder / "heads", settings.data.task_names)
        results.add(replace(facts, seconds=time.monotonic() - started), scores, replace=True)
    show(results)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        results.save(output)
        write_plots(results, output / "plots")
    return 0


def given_facts(name: str, folder: Path, size: int) -> ModelFacts:
    """Say of a model that is given as a folder what is recorded beside its weights.

    Args:
        name: What it is called in the table.
        folder: Its folder; one that was adapted says in ``adaptation.json`` what was learned from which rows.
        size: Its stored parameters, where the folder says nothing else.
    """
    record = read_record(folder)
    return ModelFacts(
        name,
        method=str(record.get("method", "given")),
        selection=selection_of(folder, record),
        trained_parameters=int(record.get("trained_parameters", 0)),
        stored_parameters=int(record.get("stored_parameters", size)),
        active_parameters=int(record.get("active_parameters", size)),
        needs_task=(folder / CORRECTORS).is_file(),
    )


def _scored_rows(folder: Path) -> dict[str, str]:
    """Read the fingerprints of the rows that a run was scored on."""
    try:
        found = json.loads((folder / DATA_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"The run '{folder}' does not say which rows it was scored on: '{DATA_RECORD}' is missing or damaged. "
            f"Write it again with lightning-merge run --config {folder / 'run.yaml'} --output {folder}, which does "
            "nothing again that is done."
        )
    return found


def folder_scores(settings: RunSettings, name: str, folder: Path, heads: Path, tasks: list[str]) -> list[Score]:
    """Score the weights of one folder on some tasks: test rows, out-of-domain sets, corruptions."""
    scores: list[Score] = []
    encoder = Encoder.from_pretrained(folder)
    correctors = _correctors(folder)
    for task in tasks:
        head, info = load_head(heads / f"{task}.safetensors")
        kind = settings.data.get(task).kind
        corruptions = [c for c in map(Corruption.parse, settings.evaluate.corruptions) if c.kind == kind]
        seen = _seen(encoder, correctors, task, info)
        if info.dim != seen.dim:
            raise UserError(
                f"Model '{name}' has features of size {seen.dim}, the head of task '{task}' takes {info.dim}. "
                "Expected a model with the base's architecture."
            )
        with _progress(f"evaluating {name} on {task}") as on_progress:
            scores += score_model(
                name,
                seen,
                {task: head},
                settings.data,
                [task],
                corruptions,
                on_progress,
                device=settings.evaluate.chosen_device(),
                precision=settings.evaluate.precision,
            )
    return scores


def folder_dev_accuracy(settings: RunSettings, folder: Path, output: Path, tasks: list[str]) -> float:
    """Return the mean over tasks of the accuracy of a folder's model on validation rows, with its correctors if any."""
    return _dev_accuracy(settings, Encoder.from_pretrained(folder), _correctors(folder), output, tasks)


def dev_accuracy(settings: RunSettings, output: Path, tasks: list[str], state_dict: Mapping[str, Tensor]) -> float:
    """Return the mean over tasks of the accuracy of these weights on validation rows."""
    encoder = Encoder.from_pretrained(output / "base", tensors=dict(state_dict))
    reached = _dev_accuracy(settings, encoder, None, output, tasks)
    del encoder
    gc.collect()  # a candidate's weights go before the next one is made
    return reached


def _dev_accuracy(
    settings: RunSettings, encoder: Encoder, correctors: Correctors | None, output: Path, tasks: list[str]
) -> float:
    total = 0.0
    for task in tasks:
        head, info = load_head(head_path(output, task))
        seen = _seen(encoder, correctors, task, info)
        rows = settings.data.loader(task, "dev")
        predictions, labels = predict(seen, head, rows, settings.evaluate.chosen_device(), settings.evaluate.precision)
        total += float((predictions == labels).mean())
    return total / len(tasks)


def _correctors(folder: Path) -> Correctors | None:
    """Read what a surgery has left beside a merge, if anything."""
    return Correctors.load(folder) if (folder / CORRECTORS).is_file() else None


def _seen(encoder: Encoder, correctors: Correctors | None, task: str, info: HeadInfo) -> Encoder:
    """Return the encoder as a task's head takes its features: pooled and cut so, and corrected for the task."""
    seen = encoder.reconfigured(info.pooling, info.max_length)
    # Stands wherever an encoder is called.
    return seen if correctors is None else cast(Encoder, corrected_encoder(seen, correctors, task))


def head_path(output: Path, task: str) -> Path:
    """Return where a run keeps the head of a task."""
    return output / "heads" / f"{task}.safetensors"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str, str, int, int], None] | None]:
    """A spinner with the data set at hand, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda task, dataset, done, total: status.update(f"{what}: {dataset} ({done}/{total})")
