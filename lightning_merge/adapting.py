"""The stages of ``run`` that learn: coefficients of task vectors, and correctors of a merge, on streams of the tasks.

Each is a stage as a merge is: known by the hash of what goes into it, and one that fails costs the others nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_merge.adapt_settings import AdaptSettings
from lightning_merge.errors import UserError
from lightning_merge.evaluation import ModelFacts
from lightning_merge.methods import SimpleAverage, TaskArithmetic, Transform
from lightning_merge.methods.schedule import ByTensor, depths, settle
from lightning_merge.modules import AdaptiveMerge, DistilledEncoder, RepresentationSurgery
from lightning_merge.modules.adaptive_merge import COEFFICIENTS, RECORD
from lightning_merge.modules.correctors import FILE as CORRECTORS
from lightning_merge.modules.tuning import quiet_lightning
from lightning_merge.recipe import describe
from lightning_merge.run_settings import MergeSettings, RunSettings
from lightning_merge.scoring import folder_dev_accuracy, head_path
from lightning_merge.stages import Stages, is_follower, say, training
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights import open_weights, peak_memory_bytes, sha256_of_source
from lightning_merge.weights.folder import companions_sha256
from lightning_merge.weights.hashing import sha256_of_file

VALIDATION = "validation labels"
# What each kind leaves beside weights and record.
_FILES: dict[str, list[str]] = {"AdaMerging": [COEFFICIENTS], "Surgery": [CORRECTORS], "Distilled": []}


@dataclass(frozen=True)
class Start:
    """Where an adaptation starts.

    Args:
        initial: Of coefficients, as ``AdaptiveMerge`` takes it.
        transforms: Of the task vectors.
        sha256: Of a folder that it starts from; empty where it starts from numbers.
        selection: The data that chose the start.
        merge: A merge that is one more direction, where no sum of task vectors is it.
    """

    initial: Any
    transforms: list[Transform]
    sha256: str = ""
    selection: tuple[str, ...] = ()
    merge: Path | None = None


def adapt(settings: RunSettings, spec: AdaptSettings, output: Path, stages: Stages) -> ModelFacts:
    """Learn one merge, or say why not.

    Args:
        settings: The run's.
        spec: What is learned.
        output: The run's folder, its models and merges finished.
        stages: What of the run is done.

    Returns:
        The row of the table; a failed one says why.
    """
    tasks = settings.data.task_names
    folder = output / "merged" / spec.name
    files = [folder / "model.safetensors", folder / RECORD]
    files += [folder / name for name in _FILES[spec.what]]
    files += [folder / "heads" / f"{task}.safetensors" for task in tasks]
    try:
        starts = [_start(settings, candidate, output, stages) for _, candidate in spec.candidates()]
        inputs = {
            "spec": spec.plain(),
            "starts": [[str(s.initial), [describe(step) for step in s.transforms], s.sha256] for s in starts],
            "base": model_sha256(output / "base"),
            "models": {task: model_sha256(output / "finetuned" / task) for task in tasks},
            "heads": {task: sha256_of_source(open_weights(head_path(output, task))) for task in tasks},
            "stream": {task: settings.data.fingerprint(task, spec.split) for task in tasks},
            "dev": {task: settings.data.fingerprint(task, "dev") for task in tasks} if spec.grid else None,
            "scored": [settings.evaluate.precision, settings.evaluate.chosen_device()] if spec.grid else None,
            "seed": settings.seed,
        }
        with training():
            made = stages.do(
                f"adapt-{spec.name}", inputs, files, lambda: _work(settings, spec, starts, output), trains=True
            )
    except Exception as error:  # one of them must not cost the others
        if is_follower():
            raise
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        say(f"adapt-{spec.name} failed: {told}")
        return ModelFacts(spec.name, method=_describe(spec, None), error=told)
    return ModelFacts(**made) if made is not None else ModelFacts(spec.name)


def trace_plots(output: Path, adaptations: Sequence[AdaptSettings]) -> list[Path]:
    """Copy the pictures of what was learned, and the numbers behind them, among the run's plots.

    Args:
        output: The run's folder.
        adaptations: Those of the run.

    Returns:
        The pictures, such as ``plots/adamerging.trace.png``.
    """
    pictures = []
    for spec in adaptations:
        for path in sorted((output / "merged" / spec.name / "adaptation").glob("*.*")):
            if path.suffix in {".png", ".csv"}:
                copy = output / "plots" / f"{spec.name}.{path.name}"
                shutil.copyfile(path, copy)
                pictures += [copy] if path.suffix == ".png" else []
    return pictures


def model_sha256(folder: Path) -> str:
    """Return one hash over a model's weights, config and tokenizer, and its correctors where it has some."""
    import hashlib

    known = f"{sha256_of_source(open_weights(folder))}:{companions_sha256(folder)}"
    if (folder / CORRECTORS).is_file():
        known += f":{sha256_of_file(folder / CORRECTORS)}"
    return hashlib.sha256(known.encode()).hexdigest()


# --- one adaptation -----------------------------------------------------------------------------------------------


def _work(settings: RunSettings, spec: AdaptSettings, starts: Sequence[Start], output: Path) -> dict[str, Any]:
    """Learn, choosing on validation rows where there is a grid; the folder is then in its place."""
    started = time.monotonic()
    folder, best = output / "merged" / spec.name, output / "merged" / f".{spec.name}.best"
    shutil.rmtree(best, ignore_errors=True)
    reached, place = -1.0, 0
    candidates = spec.candidates()
    for number, (values, candidate) in enumerate(candidates):
        _fit(settings, candidate, starts[number], output, folder)
        if is_follower() or not spec.grid:
            continue
        accuracy = folder_dev_accuracy(settings, folder, output, settings.data.task_names)
        say(f"adapt-{spec.name}: {number + 1}/{len(candidates)} {values} validation {accuracy:.4f}")
        if accuracy > reached:  # the first of equals stays
            reached, place = accuracy, number
            shutil.rmtree(best, ignore_errors=True)
            os.replace(folder, best)
    if is_follower():
        return {}
    if spec.grid:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(best, folder)
    values, made = candidates[place]
    return asdict(_facts(settings, made, values, starts[place], output, time.monotonic() - started))


def _fit(settings: RunSettings, spec: AdaptSettings, start: Start, output: Path, folder: Path) -> None:
    """Learn once, by Lightning's Trainer; the module writes the folder, in whichever process that is."""
    common: dict[str, Any] = {
        "run": str(output),
        "tasks": settings.data.task_names,
        "learning_rate": spec.rate,
        "output": str(folder),
        "seed": settings.seed,
        **spec.module,
    }
    shutil.rmtree(folder, ignore_errors=True)
    with isolate_rng(), quiet_lightning():
        # A merge is learned in evaluation mode.
        warnings.filterwarnings("ignore", ".*module.s. in eval mode.*")
        torch.manual_seed(settings.seed)
        module: AdaptiveMerge
        if spec.what == "Surgery":
            assert spec.over is not None
            version: Any = spec.version
            module = RepresentationSurgery(spec.over, version=version, rank=spec.rank, **common)
        elif spec.what == "Distilled":
            assert spec.over is not None
            module = DistilledEncoder(spec.over, guard=spec.guard, **common)
        else:
            module = AdaptiveMerge(
                by=spec.by,
                initial=start.initial,
                start=None if start.merge is None else str(start.merge),
                constraint=spec.constraint,
                transforms=list(start.transforms),
                objectives=spec.objectives or None,
                guard=spec.guard,
                **common,
            )
        trainer = _trainer(spec)
        trainer.fit(module, datamodule=spec.streams(settings.data, settings.seed))
        trainer.strategy.barrier()


def _trainer(spec: AdaptSettings) -> L.Trainer:
    """Make Lightning's Trainer; what it refuses is a setting of the user's."""
    options: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stderr.isatty(),
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        **spec.trainer,
        "max_epochs": spec.max_epochs,
        "limit_train_batches": spec.batches,
        "precision": spec.precision,
    }
    try:
        return L.Trainer(**options)
    except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"Lightning's Trainer refuses adapt.{spec.name}.trainer {spec.trainer} with precision {spec.precision}: "
            f"{told}. Expected what this machine and Lightning {L.__version__} can do."
        ) from error


def _facts(
    settings: RunSettings,
    spec: AdaptSettings,
    chosen: Mapping[str, Any],
    start: Start,
    output: Path,
    seconds: float,
) -> ModelFacts:
    """Say what was learned of what, and what it takes to keep it."""
    folder = output / "merged" / spec.name
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    weights = open_weights(folder).numel
    rows = {"train": "training", "dev": "validation"}.get(spec.split, spec.split)
    learned = f"{rows} labels" if spec.supervised else f"unlabeled {spec.split}"
    selection = [*start.selection]
    if chosen or settings.finetune.patience is not None:
        selection.append(VALIDATION)
    default = AdaptSettings(spec.name, spec.what).plain()
    parameters = {name: value for name, value in spec.plain().items() if value != default[name] and name != "grid"}
    parameters |= {"steps": record["steps"], "drift": round(record["drift"], 4)}
    if record.get("rolled_back"):
        stopped = "" if record["stopped_step"] is None else f"stopped at step {record['stopped_step']}, "
        parameters["guard"] = f"{stopped}back to step {record['best_step']}"
    return ModelFacts(
        spec.name,
        method=_describe(spec, start),
        parameters=parameters,
        selection=" + ".join(dict.fromkeys([*selection, learned])),
        selected=dict(chosen),
        seed=settings.seed,
        trained_parameters=record["trained_parameters"],
        stored_parameters=record.get("stored_parameters", weights),
        active_parameters=record.get("active_parameters", weights),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        needs_task=(folder / CORRECTORS).is_file(),
    )


def _describe(spec: AdaptSettings, start: Start | None) -> str:
    """Return an adaptation in one line."""
    if spec.what == "Surgery":
        return f"Surgery(version={spec.version}, rank={spec.rank}) over {spec.over}"
    if spec.what == "Distilled":
        return f"Distilled(cross={spec.module.get('cross', 0.0):g}) over {spec.over}"
    objectives = " + ".join(
        f"{'' if objective.weight == 1 else f'{objective.weight:g} '}{type(objective).__name__}"
        for objective in spec.objectives
    )
    shown = f"AdaMerging(by={spec.by}, initial={spec.initial}, objective={objectives or 'Entropy'})"
    return " → ".join([*(describe(step) for step in (start.transforms if start else ())), shown])


# --- where it starts ----------------------------------------------------------------------------------------------


def _start(settings: RunSettings, spec: AdaptSettings, output: Path, stages: Stages) -> Start:
    """Find where an adaptation starts, in what the stages before it have left."""
    transforms: list[Any] = list(spec.transforms)
    if spec.before is None:
        return Start(spec.initial, transforms)
    earlier_ones: list[MergeSettings | AdaptSettings] = [*settings.merges, *settings.adapt]
    before = next(one for one in earlier_ones if one.name == spec.before)
    adapted = isinstance(before, AdaptSettings)
    made = stages.result(f"{'adapt' if adapted else 'merge'}-{before.name}")
    folder = output / "merged" / before.name
    if made is None or not (folder / "model.safetensors").is_file():
        raise UserError(f"It starts from '{before.name}', which failed.")
    selection = tuple(part for part in made["selection"].split(" + ") if part != "none")
    if spec.what != "AdaMerging":
        return Start(None, [], model_sha256(folder), selection)
    if isinstance(before, AdaptSettings) and before.what == "AdaMerging":
        earlier = _start(settings, _chosen(before, made), output, stages)
        own = transforms or list(earlier.transforms)
        # The same coefficients may belong to another merge.
        known = f"{sha256_of_file(folder / COEFFICIENTS)}:{model_sha256(folder)}"
        return Start(str(folder / COEFFICIENTS), own, known, selection, merge=earlier.merge)
    if isinstance(before, AdaptSettings) or not isinstance(before.method, (TaskArithmetic, SimpleAverage)):
        return Start(0.0, transforms, model_sha256(folder), selection, merge=folder)
    _, method, taken = next(
        (candidate for candidate in before.candidates() if _same(candidate[0], made["selected"])),
        (None, before.method, before.transforms),
    )
    return Start(_coefficients(method, before, output, settings), transforms or list(taken), "", selection)


def _chosen(spec: AdaptSettings, made: Mapping[str, Any]) -> AdaptSettings:
    return next((one for values, one in spec.candidates() if _same(values, made["selected"])), spec)


def _same(values: Mapping[str, Any], selected: Mapping[str, Any]) -> bool:
    """Whether a candidate of a grid is the one that was chosen, as a record holds it."""
    known = json.loads(json.dumps(dict(values), default=str))
    return all(name in selected and selected[name] == value for name, value in known.items())


def _coefficients(method: Any, before: MergeSettings, output: Path, settings: RunSettings) -> Any:
    """Return the coefficients of a merge that is a sum of task vectors."""
    tasks = settings.data.task_names
    if not isinstance(method, TaskArithmetic):
        return 1.0 / len(tasks)  # SimpleAverage
    if method.weights != 1.0 or method.normalize:
        raise UserError(f"It starts from '{before.name}', whose task vectors are weighted. Expected a scale alone.")
    if not method.varying:
        return method.scale
    names = TaskVectors.open(output / "base", {task: output / "finetuned" / task for task in tasks}).tensor_names
    places = depths(names)
    return ByTensor({name: settle("scale", method.scale, name, places[name]) for name in names})
