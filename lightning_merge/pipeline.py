"""The stages of ``run``: base, fine-tuning, merging, adapting, evaluation, report; each skipped while its inputs stay.

A stage is known by the hash of everything that goes into it. Its record in ``.stages/`` is written when it is done, so
that an interrupted run goes on where it stopped, and a failed merge costs the others nothing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from lightning_merge.adapting import adapt, model_sha256, trace_plots
from lightning_merge.data import TaskData
from lightning_merge.errors import UserError
from lightning_merge.evaluation import ModelFacts, Results, Score, show, task_vector_statistics
from lightning_merge.merging import merge
from lightning_merge.modules.tuning import FineTuneSettings, Tuned, fine_tune, pretrain
from lightning_merge.recipe import as_config, describe
from lightning_merge.run_settings import MergeSettings, RunSettings, VariantSettings
from lightning_merge.scoring import DATA_RECORD, dev_accuracy, folder_scores, head_path
from lightning_merge.stages import Stages, is_follower, refuse_launchers, say, training
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights import WeightSource, open_weights, peak_memory_bytes, sha256_of_source
from lightning_merge.weights.card import with_results
from lightning_merge.weights.folder import copy_model, write_text

SELECTED_ON_VALIDATION = "validation labels"


def run(settings: RunSettings, output: Path, resolved: str, overwrite: bool = False) -> int:
    """Do all stages of a run, or those that are left.

    Args:
        settings: What to do.
        output: The run's folder; an earlier run there goes on.
        resolved: The settings as YAML, kept as ``run.yaml``.
        overwrite: Do every stage again.

    Returns:
        0, or 1 where a merge or an adaptation failed and the others were done.

    Raises:
        UserError: The settings do not fit, or the folder holds something else.
    """
    refuse_launchers()
    settings.check()
    if output.exists() and not (output.is_dir() and ((output / "run.yaml").is_file() or not any(output.iterdir()))):
        raise UserError(
            f"The output '{output}' already holds something else. Expected a new folder, or an earlier run."
        )
    started = time.monotonic()
    # Whatever can be refused is refused before anything is written: all data is read and checked, the base opened.
    for task in settings.data.task_names if settings.pretrain is None else ["pretrain", *settings.data.task_names]:
        settings.data.get(task)
    for spec in settings.adapt:
        for task in settings.data.task_names:
            spec.streams(settings.data, settings.seed).stream(task)
    source = _given_base(settings)
    if not is_follower():
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "run.yaml", _rerunnable(resolved))
    stages = Stages(output / ".stages", overwrite)

    with training():
        _base(settings, source, output, stages)
    if is_follower() and not stages.waiting:
        return 0
    base_sha256 = model_sha256(output / "base")
    with training():
        tuned = _fine_tune_all(settings, output, stages, base_sha256)
    if is_follower() and not stages.waiting:
        return 0
    facts = [] if is_follower() else [_merge(settings, s, output, stages, base_sha256, tuned) for s in settings.merges]
    facts += [adapt(settings, spec, output, stages) for spec in settings.adapt]
    if is_follower():
        return 0
    results = Results(settings.data.task_names)
    for model in _models(settings, output, tuned, facts):
        results.add(*_evaluate(settings, model, output, stages))
    _report(settings, output, results, resolved)
    rows = json.dumps({task: settings.data.fingerprint(task) for task in settings.data.task_names})
    record = output / DATA_RECORD
    if not record.is_file() or record.read_text(encoding="utf-8") != rows:
        write_text(record, rows)
    show(results)
    failed = [results.facts(name) for name in results.models if results.facts(name).error]
    peak = max(stages.peak_memory_bytes, peak_memory_bytes()) / 1e6
    say(f"{time.monotonic() - started:.0f} s, peak memory {peak:,.0f} MB. {output / 'report.html'}")
    for model in failed:
        say(f"The merge '{model.name}' failed: {model.error}")
    return 1 if failed else 0


# --- stages -------------------------------------------------------------------------------------------------------


def _given_base(settings: RunSettings) -> WeightSource | None:
    """Open the base that the settings name, if any."""
    if settings.base is None:
        return None
    source = open_weights(settings.base)
    if source.folder is None:
        raise UserError(f"The base '{settings.base}' is no Hugging Face folder. Expected config.json beside weights.")
    return source


def _base(settings: RunSettings, source: WeightSource | None, output: Path, stages: Stages) -> None:
    """Put the pretrained model into ``base/``."""
    folder = output / "base"
    made = settings.pretrain
    if made is not None:
        inputs = {"pretrain": made, "seed": settings.seed, **_data_inputs(settings.data, "pretrain", made)}
        work = lambda: pretrain(made, settings.data, folder, settings.seed, not is_follower())  # noqa: E731
    else:
        assert source is not None and source.folder is not None
        files, original = source.files, source.folder
        inputs = {"base": model_sha256(original)}
        work = lambda: copy_model(files, original, folder)  # type: ignore[assignment,return-value]  # noqa: E731
    stages.do("base", inputs, [folder / "config.json", *_weights_of(folder)], work, trains=made is not None)


def _weights_of(folder: Path) -> list[Path]:
    """The weight files of a folder; the usual name where there are none."""
    return sorted(folder.glob("*.safetensors")) or [folder / "model.safetensors"]


def _data_inputs(data: TaskData, task: str, fit: FineTuneSettings) -> dict[str, Any]:
    """What a fit depends on in the data: the rows it sees, their order, and how many a step takes.

    Test rows are not among them: a run that adds some must not train again.
    """
    splits = ("train",) if fit.patience is None else ("train", "dev")
    return {"data": data.fingerprint(task, *splits), "batch_size": data.batch_size, "data_seed": data.seed}


def _fine_tune_all(settings: RunSettings, output: Path, stages: Stages, base_sha256: str) -> dict[str, Tuned]:
    """Fine-tune one model for each task and variant."""
    variants = {task: VariantSettings(task, settings.seed) for task in settings.data.task_names} | settings.variants
    tuned = {}
    for name, variant in variants.items():
        changed = replace(
            settings.finetune,
            # The run's seed, whatever the variant's: models that are merged must share the fixed vectors of their head.
            module={"seed": settings.seed, **settings.finetune.module, **variant.module},
            max_epochs=variant.max_epochs or settings.finetune.max_epochs,
        )
        head = head_path(output, variant.task)
        if name != variant.task:
            head = output / "finetuned" / name / "heads" / f"{variant.task}.safetensors"
        result = stages.do(
            f"finetune-{name}",
            {
                "base": base_sha256,
                **_data_inputs(settings.data, variant.task, changed),
                "settings": changed,
                "seed": variant.seed,
            },
            [output / "finetuned" / name / "model.safetensors", head],
            lambda v=variant, n=name, c=changed, h=head: asdict(  # type: ignore[misc]
                fine_tune(
                    c, settings.data, v.task, output / "base", output / "finetuned" / n, h, v.seed, not is_follower()
                )
            ),
            trains=True,
        )
        if result is not None:
            tuned[name] = Tuned(**result)
    return tuned


def _merge(
    settings: RunSettings,
    spec: MergeSettings,
    output: Path,
    stages: Stages,
    base_sha256: str,
    tuned: Mapping[str, Tuned],
) -> ModelFacts:
    """Choose on validation rows where there is a grid, merge, and put the heads beside the weights."""
    folder = output / "merged" / spec.name
    names = spec.models or settings.data.task_names
    tasks = list(dict.fromkeys(tuned[name].task for name in names))
    selects = bool(spec.grid) or spec.method.needs_score
    inputs = {
        "spec": [as_config(step) for step in [*spec.transforms, spec.method]],
        "grid": list(spec.grid.items()),  # its order decides between equals
        "models": {name: model_sha256(output / "finetuned" / name) for name in names},
        "heads": _heads_sha256(settings, output),
        "base": base_sha256,
        "seed": settings.seed,
        "dev": {task: settings.data.fingerprint(task, "dev") for task in tasks} if selects else None,
        "scored": [settings.evaluate.precision, settings.evaluate.chosen_device()] if selects else None,
    }

    def work() -> dict[str, Any]:
        started = time.monotonic()
        vectors = TaskVectors.open(output / "base", {name: output / "finetuned" / name for name in names})

        def score(state_dict: Mapping[str, Tensor]) -> float:
            return dev_accuracy(settings, output, tasks, state_dict)

        chosen, method, transforms = spec.candidates()[0]
        if spec.grid:
            best = -1.0
            for number, (values, candidate, steps) in enumerate(spec.candidates()):
                merged = candidate(vectors, steps, settings.seed, score=score)  # type: ignore[arg-type]
                reached = score(merged)
                say(f"merge-{spec.name}: {number + 1}/{len(spec.candidates())} {values} validation {reached:.4f}")
                # The first of equals stays, so that the order of the grid decides ties.
                if reached > best:
                    best, chosen, method, transforms = reached, values, candidate, steps
        report = merge(
            method,
            vectors,
            folder,
            transforms,  # type: ignore[arg-type]
            settings.seed,
            score=score,
            overwrite=True,
            title=spec.name,
            max_shard_size=None,
        )
        (folder / "heads").mkdir()
        for task in settings.data.task_names:
            shutil.copyfile(head_path(output, task), folder / "heads" / f"{task}.safetensors")
        if len(report.models) < len(names):
            chosen = {**chosen, "models": " + ".join(report.models)}
        size = vectors.template.numel
        return asdict(
            ModelFacts(
                spec.name,
                method=describe(method, transforms),  # type: ignore[arg-type]
                parameters={"method": as_config(method), "transforms": [as_config(step) for step in transforms]},
                selection=SELECTED_ON_VALIDATION if selects or settings.finetune.patience is not None else "none",
                selected=chosen,
                seed=settings.seed,
                stored_parameters=size,
                active_parameters=size,
                seconds=time.monotonic() - started,
                peak_memory_bytes=report.peak_memory_bytes,
            )
        )

    heads = [folder / "heads" / f"{task}.safetensors" for task in settings.data.task_names]
    try:
        return ModelFacts(**stages.do(f"merge-{spec.name}", inputs, [folder / "model.safetensors", *heads], work))
    except Exception as error:  # one merge must not cost the others
        # What a method says is written for users; of anything else its kind helps to find it.
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        say(f"merge-{spec.name} failed: {told}")
        return ModelFacts(spec.name, method=describe(spec.method, spec.transforms), error=told)  # type: ignore[arg-type]


def _models(
    settings: RunSettings, output: Path, tuned: Mapping[str, Tuned], merged: list[ModelFacts]
) -> Iterator[ModelFacts]:
    """The rows of the table: pretrained, individual, merges."""
    size = open_weights(output / "base").numel
    tasks = settings.data.task_names
    yield ModelFacts("pretrained", kind="pretrained", stored_parameters=size, active_parameters=size)
    yield ModelFacts(
        "individual",
        kind="individual",
        method="one model a task",
        selection=SELECTED_ON_VALIDATION if settings.finetune.patience is not None else "none",
        seed=settings.seed,
        trained_parameters=sum(tuned[task].trained_parameters for task in tasks),
        stored_parameters=size * len(tasks),
        active_parameters=size,
        seconds=sum(tuned[task].seconds for task in tasks),
        peak_memory_bytes=max(tuned[task].peak_memory_bytes for task in tasks),
    )
    yield from merged


def _evaluate(settings: RunSettings, model: ModelFacts, output: Path, stages: Stages) -> tuple[ModelFacts, list[Score]]:
    """Score one row of the table on all tasks (individual models on their own task); a merge may fail here too."""
    if model.error:
        return model, []
    tasks = settings.data.task_names
    folders = {
        "pretrained": dict.fromkeys(tasks, output / "base"),
        "individual": {task: output / "finetuned" / task for task in tasks},
    }.get(model.kind, dict.fromkeys(tasks, output / "merged" / model.name))
    inputs = {
        "weights": {task: model_sha256(folders[task]) for task in tasks},
        "heads": _heads_sha256(settings, output),
        "data": {task: settings.data.fingerprint(task) for task in tasks},
        "evaluate": settings.evaluate,
    }

    def work() -> str:
        scores: list[Score] = []
        for folder in dict.fromkeys(folders.values()):
            own = [task for task in tasks if folders[task] == folder]
            scores += folder_scores(settings, model.name, folder, output / "heads", own)
        one = Results(tasks)
        one.add(ModelFacts(model.name, kind=model.kind), scores)
        return one.to_json()

    try:
        return model, list(Results.from_json(stages.do(f"evaluate-{model.name}", inputs, [], work)).scores)
    except UserError as error:
        if model.kind != "merged":
            raise
        say(f"evaluate-{model.name} failed: {error}")
        return replace(model, error=str(error)), []


def _report(settings: RunSettings, output: Path, results: Results, resolved: str) -> None:
    """Write results, plots, the report, and the results into each merge's card."""
    from lightning_merge.evaluation import markdown, write_plots, write_report

    results.save(output)
    tasks = settings.data.task_names
    vectors = TaskVectors.open(output / "base", {task: output / "finetuned" / task for task in tasks})
    plots = write_plots(results, output / "plots", task_vector_statistics(vectors))
    plots += trace_plots(output, [spec for spec in settings.adapt if not results.facts(spec.name).error])
    write_report(output / "report.html", results, plots, config=resolved, title=output.name)
    table = markdown(results)
    for name in results.models:
        card = output / "merged" / name / "README.md"
        if card.is_file():
            write_text(card, with_results(card.read_text(encoding="utf-8"), table))


# --- small parts --------------------------------------------------------------------------------------------------


def _heads_sha256(settings: RunSettings, output: Path) -> dict[str, str]:
    return {task: sha256_of_source(open_weights(head_path(output, task))) for task in settings.data.task_names}


def _rerunnable(resolved: str) -> str:
    """The resolved options as they are kept: running them again must go on, not start over."""
    options = yaml.safe_load(resolved)
    if isinstance(options, dict):
        options.pop("overwrite", None)
    return yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
