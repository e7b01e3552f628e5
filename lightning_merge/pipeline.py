"""The stages of ``run``: base, fine-tuning, merging, evaluation, report; each skipped while its inputs stay the same.

A stage is known by the hash of everything that goes into it. Its record in ``.stages/`` is written when it is done, so
that an interrupted run goes on where it stopped, and a failed merge costs the others nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from lightning_merge.data import TaskData
from lightning_merge.errors import UserError, nearest, unknown
from lightning_merge.evaluation import ModelFacts, Results, Score, score_model, show, task_vector_statistics
from lightning_merge.merging import as_config, describe, merge
from lightning_merge.methods import MergeMethod
from lightning_merge.modules.tuning import FineTuneSettings, PretrainSettings, Tuned, fine_tune, pretrain
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights import open_weights, peak_memory_bytes, sha256_of_source
from lightning_merge.weights.card import with_results
from lightning_merge.weights.folder import copy_model, write_text

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SELECTED_ON_VALIDATION = "validation labels"


@dataclass
class VariantSettings:
    """One more fine-tuning of a task, as an ingredient of soups.

    Args:
        task: The task it learns.
        seed: Of its order of rows.
        module: Settings of ``FineTune`` in which it differs.
        max_epochs: Where it differs.
    """

    task: str
    seed: int = 1
    module: dict[str, Any] = field(default_factory=dict)
    max_epochs: int | None = None


@dataclass
class MergeSettings:
    """One merge of a run.

    Args:
        name: Its name in tables and its folder in ``merged/``.
        method: The merge method.
        transforms: Applied to the task vectors first, in order.
        grid: Settings to choose on validation rows, never on test rows: ``{method.scale: [0.1, 0.3]}``, or
            ``{transforms.0.eta: [...]}``.
        models: The fine-tuned models that are merged; by default one for each task.
    """

    name: str
    method: MergeMethod
    transforms: list[MergeMethod] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    models: list[str] | None = None

    def candidates(self) -> list[tuple[dict[str, Any], MergeMethod, list[MergeMethod]]]:
        """Return every combination of the grid, with the method and transforms it means."""
        found = []
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            method, transforms = self.method, list(self.transforms)
            for key, value in chosen.items():
                where, _, setting = key.rpartition(".")
                if where in {"", "method"}:
                    method = _changed(method, setting, value, self.name)
                elif where.startswith("transforms.") and where[11:].isdigit() and int(where[11:]) < len(transforms):
                    index = int(where[11:])
                    transforms[index] = _changed(transforms[index], setting, value, self.name)
                else:
                    raise UserError(
                        f"Merge '{self.name}': the grid's key '{key}' names no setting. Expected method.SETTING, or "
                        f"transforms.N.SETTING with N below {len(transforms)}."
                    )
            found.append((chosen, method, transforms))
        return found


@dataclass
class EvaluateSettings:
    """What the table holds besides test rows and out-of-domain sets.

    Args:
        corruptions: Such as ``typos-3``; those made for another kind of input are passed over.
    """

    corruptions: list[str] = field(default_factory=list)


@dataclass
class RunSettings:
    """One run: a base, tasks, how to fine-tune, the merges, and what is evaluated.

    Args:
        data: The tasks; a LightningDataModule of ``lightning_merge.data``.
        base: The pretrained model: a folder, ``package:NAME/FOLDER``, or ``owner/name@revision``.
        pretrain: Make the base instead, by training a small vision transformer on the data's ``pretrain`` task.
        finetune: How each task is learned.
        variants: Further fine-tunings by name, for soups.
        merges: The merges.
        evaluate: What is evaluated.
        seed: Of everything drawn at random.
    """

    data: TaskData
    base: str | None = None
    pretrain: PretrainSettings | None = None
    finetune: FineTuneSettings = field(default_factory=FineTuneSettings)
    variants: dict[str, VariantSettings] = field(default_factory=dict)
    merges: list[MergeSettings] = field(default_factory=list)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    seed: int = 0

    @classmethod
    def of(cls, options: Namespace) -> RunSettings:
        """Pick the settings out of parsed options."""
        return cls(**{spec.name: getattr(options, spec.name) for spec in fields(cls)})

    def check(self) -> None:
        """Check names and grids before any stage starts.

        Raises:
            UserError: No base or two, a repeated or reserved name, an unknown task, model or setting.
        """
        if (self.base is None) == (self.pretrain is None):
            raise UserError("A run needs either 'base' (a pretrained model) or 'pretrain' (settings to make one).")
        self.finetune.check()
        tasks = self.data.task_names
        for name, variant in self.variants.items():
            if name in tasks:
                raise UserError(f"The variant '{name}' has the name of a task. Expected another name.")
            if variant.task not in tasks:
                raise unknown(f"task of the variant '{name}'", variant.task, tasks)
        names = [spec.name for spec in self.merges]
        for name in names:
            if names.count(name) > 1 or name in {"pretrained", "individual"} or not name.replace("-", "_").isidentifier():
                raise UserError(
                    f"The merge's name '{name}' cannot be used. Expected letters, digits and _, each name once, and "
                    "neither 'pretrained' nor 'individual'."
                )
        for spec in self.merges:
            for model in spec.models or []:
                if model not in tasks and model not in self.variants:
                    raise unknown(f"model of the merge '{spec.name}'", model, [*tasks, *self.variants])
            spec.candidates()


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the settings of a run to a parser."""
    parser.add_class_arguments(RunSettings, None)


class Stages:
    """Remembers which stages of a run are done, by the hash of their inputs."""

    def __init__(self, folder: Path, overwrite: bool) -> None:
        self.folder, self.overwrite = folder, overwrite
        folder.mkdir(parents=True, exist_ok=True)

    def do(self, name: str, inputs: Mapping[str, Any], outputs: list[Path], work: Callable[[], Any]) -> Any:
        """Return what ``work`` returns (plain data), from the record if inputs and outputs are as they were."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=_plain).encode()).hexdigest()
        record = self.folder / f"{name}.json"
        if not self.overwrite and record.is_file() and all(path.exists() for path in outputs):
            known = json.loads(record.read_text(encoding="utf-8"))
            if known["key"] == key:
                say(f"{name}: done before")
                return known["result"]
        started = time.monotonic()
        record.unlink(missing_ok=True)
        result = work()
        write_text(record, json.dumps({"key": key, "result": result}, default=_plain))
        say(f"{name}: {time.monotonic() - started:.1f} s")
        return json.loads(json.dumps(result, default=_plain))


def run(settings: RunSettings, output: Path, resolved: str, overwrite: bool = False) -> int:
    """Do all stages of a run, or those that are left.

    Args:
        settings: What to do.
        output: The run's folder; an earlier run there goes on.
        resolved: The settings as YAML, kept as ``run.yaml``.
        overwrite: Do every stage again.

    Returns:
        0, or 1 where a merge failed and the others were done.

    Raises:
        UserError: The settings do not fit, or the folder holds something else.
    """
    settings.check()
    if output.exists() and any(output.iterdir()) and not (output / "run.yaml").is_file():
        raise UserError(f"The output '{output}' already holds something else. Expected a new folder, or an earlier run.")
    started = time.monotonic()
    for task in settings.data.task_names:  # read and check all data before anything is trained
        settings.data.get(task)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "run.yaml", resolved)
    stages = Stages(output / ".stages", overwrite)

    base_sha256 = _base(settings, output, stages)
    tuned = _fine_tune_all(settings, output, stages, base_sha256)
    facts = [_merge(settings, spec, output, stages, base_sha256, tuned) for spec in settings.merges]
    results = Results(settings.data.task_names)
    for model in _models(settings, output, tuned, facts):
        results.add(model, _evaluate(settings, model, output, stages, base_sha256, tuned))
    _report(settings, output, results, resolved)
    show(results)
    failed = [model for model in facts if model.error]
    say(f"{time.monotonic() - started:.0f} s, peak memory {peak_memory_bytes() / 1e6:,.0f} MB. {output / 'report.html'}")
    for model in failed:
        say(f"The merge '{model.name}' failed: {model.error}")
    return 1 if failed else 0


def evaluate_run(folder: Path, models: Mapping[str, str], output: Path | None) -> int:
    """Score the models of a run, and further ones over its base, and print the table.

    Args:
        folder: A run's folder.
        models: Further models by name: folders with the base's architecture.
        output: Where ``results.*`` go, or nowhere.

    Raises:
        UserError: The folder is no run, or has not been evaluated yet.
    """
    from lightning_merge.parsing import build, make_parser

    if not (folder / "run.yaml").is_file():
        raise UserError(f"'{folder}' is no run: it holds no run.yaml. Expected the output folder of lightning-merge run.")
    if not (folder / "results.json").is_file():
        raise UserError(f"The run '{folder}' has no results yet. Finish it with lightning-merge run --output {folder}.")
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
    for name, reference in models.items():
        started = time.monotonic()
        source = open_weights(reference)
        if source.folder is None:
            raise UserError(f"Model '{name}' ({reference}) is no Hugging Face folder. Expected config.json beside weights.")
        facts = ModelFacts(name, stored_parameters=source.numel, active_parameters=source.numel, method="given")
        scores = _scores(settings, name, source.folder, folder / "heads", settings.data.task_names)
        results.add(replace(facts, seconds=time.monotonic() - started), scores, replace=True)
    show(results)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        results.save(output)
    return 0


# --- stages -------------------------------------------------------------------------------------------------------


def _base(settings: RunSettings, output: Path, stages: Stages) -> str:
    """Put the pretrained model into ``base/`` and return the hash of its weights."""
    folder = output / "base"
    if settings.pretrain is not None:
        made = settings.pretrain
        inputs = {"pretrain": made, "seed": settings.seed, "data": settings.data.fingerprint("pretrain")}
        work = lambda: pretrain(made, settings.data, folder, settings.seed)  # noqa: E731
    else:
        source = open_weights(settings.base)
        if source.folder is None:
            raise UserError(f"The base '{settings.base}' is no Hugging Face folder. Expected config.json beside weights.")
        inputs = {"base": sha256_of_source(source)}
        work = lambda: copy_model(source.files, source.folder or folder, folder)  # noqa: E731
    stages.do("base", inputs, [folder / "config.json"], work)
    return sha256_of_source(open_weights(folder))


def _fine_tune_all(settings: RunSettings, output: Path, stages: Stages, base_sha256: str) -> dict[str, Tuned]:
    """Fine-tune one model for each task and variant."""
    variants = {task: VariantSettings(task, settings.seed) for task in settings.data.task_names} | settings.variants
    tuned = {}
    for name, variant in variants.items():
        changed = replace(
            settings.finetune,
            module={**settings.finetune.module, **variant.module},
            max_epochs=variant.max_epochs or settings.finetune.max_epochs,
        )
        head = output / "heads" / f"{variant.task}.safetensors"
        if name != variant.task:
            head = output / "finetuned" / name / "heads" / f"{variant.task}.safetensors"
        result = stages.do(
            f"finetune-{name}",
            {
                "base": base_sha256,
                "data": settings.data.fingerprint(variant.task),
                "batch_size": settings.data.batch_size,
                "settings": changed,
                "seed": variant.seed,
            },
            [output / "finetuned" / name / "model.safetensors", head],
            lambda v=variant, n=name, c=changed, h=head: asdict(  # type: ignore[misc]
                fine_tune(c, settings.data, v.task, output / "base", output / "finetuned" / n, h, v.seed)
            ),
        )
        tuned[name] = Tuned(**result)
    return tuned


def _merge(
    settings: RunSettings, spec: MergeSettings, output: Path, stages: Stages, base_sha256: str, tuned: Mapping[str, Tuned]
) -> ModelFacts:
    """Choose on validation rows where there is a grid, merge, and put the heads beside the weights."""
    folder = output / "merged" / spec.name
    names = spec.models or settings.data.task_names
    tasks = list(dict.fromkeys(tuned[name].task for name in names))
    selects = bool(spec.grid) or spec.method.needs_score
    inputs = {
        "spec": [as_config(step) for step in [*spec.transforms, spec.method]],
        "grid": spec.grid,
        "models": {name: tuned[name].sha256 for name in names},
        "heads": _heads_sha256(output),
        "base": base_sha256,
        "seed": settings.seed,
        "dev": {task: settings.data.fingerprint(task) for task in tasks} if selects else None,
    }

    def work() -> dict[str, Any]:
        started = time.monotonic()
        vectors = TaskVectors.open(output / "base", {name: output / "finetuned" / name for name in names})

        def score(state_dict: Mapping[str, Tensor]) -> float:
            return _dev_accuracy(settings, output, tasks, state_dict)

        chosen, method, transforms = spec.candidates()[0]
        if spec.grid:
            best = -1.0
            for number, (values, candidate, steps) in enumerate(spec.candidates()):
                reached = score(candidate(vectors, steps, settings.seed))  # type: ignore[arg-type]
                say(f"merge-{spec.name}: {number + 1}/{len(spec.candidates())} {values} validation {reached:.4f}")
                # The first of equals stays, so that the order of the grid decides ties.
                if reached > best:
                    best, chosen, method, transforms = reached, values, candidate, steps
        report = merge(
            method, vectors, folder, transforms, settings.seed, score=score, overwrite=True, title=spec.name,  # type: ignore[arg-type]
        )  # fmt: skip
        shutil.copytree(output / "heads", folder / "heads", dirs_exist_ok=True)
        size = vectors.template.numel
        return asdict(
            ModelFacts(
                spec.name,
                method=describe(method, transforms),  # type: ignore[arg-type]
                parameters={"method": as_config(method), "transforms": [as_config(step) for step in transforms]},
                selection=SELECTED_ON_VALIDATION if selects else "none",
                selected=chosen,
                seed=settings.seed,
                stored_parameters=size,
                active_parameters=size,
                seconds=time.monotonic() - started,
                peak_memory_bytes=report.peak_memory_bytes,
            )
        )

    try:
        return ModelFacts(**stages.do(f"merge-{spec.name}", inputs, [folder / "model.safetensors"], work))
    except Exception as error:  # one merge must not cost the others
        say(f"merge-{spec.name} failed: {error}")
        return ModelFacts(spec.name, method=describe(spec.method, spec.transforms), error=str(error))  # type: ignore[arg-type]


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


def _evaluate(
    settings: RunSettings, model: ModelFacts, output: Path, stages: Stages, base_sha256: str, tuned: Mapping[str, Tuned]
) -> list[Score]:
    """Score one row of the table on all tasks; individual models on their own task."""
    if model.error:
        return []
    tasks = settings.data.task_names
    folders = {
        "pretrained": {task: output / "base" for task in tasks},
        "individual": {task: output / "finetuned" / task for task in tasks},
    }.get(model.kind, {task: output / "merged" / model.name for task in tasks})
    hashes = {str(f): sha256_of_source(open_weights(f)) for f in dict.fromkeys(folders.values())}
    inputs = {
        "weights": list(hashes.values()),
        "heads": _heads_sha256(output),
        "data": {task: settings.data.fingerprint(task) for task in tasks},
        "corruptions": settings.evaluate.corruptions,
    }

    def work() -> str:
        scores: list[Score] = []
        for folder in dict.fromkeys(folders.values()):
            own = [task for task in tasks if folders[task] == folder]
            scores += _scores(settings, model.name, folder, output / "heads", own)
        one = Results(tasks)
        one.add(ModelFacts(model.name, kind=model.kind), scores)
        return one.to_json()

    return list(Results.from_json(stages.do(f"evaluate-{model.name}", inputs, [], work)).scores)


def _scores(settings: RunSettings, name: str, folder: Path, heads: Path, tasks: list[str]) -> list[Score]:
    """Score the weights of one folder on some tasks: test rows, out-of-domain sets, corruptions."""
    from lightning_merge.data import Corruption
    from lightning_merge.modules import Encoder, load_head

    scores: list[Score] = []
    encoder = Encoder.from_pretrained(folder)
    for task in tasks:
        head, info = load_head(heads / f"{task}.safetensors")
        kind = settings.data.get(task).kind
        corruptions = [c for c in map(Corruption.parse, settings.evaluate.corruptions) if c.kind == kind]
        seen = encoder.reconfigured(info.pooling, info.max_length)
        with _progress(f"evaluating {name} on {task}") as on_progress:
            scores += score_model(name, seen, {task: head}, settings.data, [task], corruptions, on_progress)
    return scores


def _dev_accuracy(settings: RunSettings, output: Path, tasks: list[str], state_dict: Mapping[str, Tensor]) -> float:
    """Return the mean over tasks of the accuracy on validation rows."""
    from lightning_merge.evaluation import predict
    from lightning_merge.modules import Encoder, load_head

    encoder = Encoder.from_pretrained(output / "base", tensors=dict(state_dict))
    total = 0.0
    for task in tasks:
        head, info = load_head(output / "heads" / f"{task}.safetensors")
        seen = encoder.reconfigured(info.pooling, info.max_length)
        predictions, labels = predict(seen, head, settings.data.loader(task, "dev"))
        total += float((predictions == labels).mean())
    return total / len(tasks)


def _report(settings: RunSettings, output: Path, results: Results, resolved: str) -> None:
    """Write results, plots, the report, and the results into each merge's card."""
    from lightning_merge.evaluation import markdown, write_plots, write_report

    results.save(output)
    tasks = settings.data.task_names
    vectors = TaskVectors.open(output / "base", {task: output / "finetuned" / task for task in tasks})
    plots = write_plots(results, output / "plots", task_vector_statistics(vectors))
    write_report(output / "report.html", results, plots, config=resolved, title=output.name)
    table = markdown(results)
    for name in results.models:
        card = output / "merged" / name / "README.md"
        if card.is_file():
            write_text(card, with_results(card.read_text(encoding="utf-8"), table))


# --- small parts --------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Print one line of progress."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str, str, int, int], None] | None]:
    """A spinner with the data set at hand, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda task, dataset, done, total: status.update(f"{what}: {dataset} ({done}/{total})")


def _heads_sha256(output: Path) -> dict[str, str]:
    return {path.stem: sha256_of_source(open_weights(path)) for path in sorted((output / "heads").glob("*.safetensors"))}


def _changed(step: MergeMethod, setting: str, value: Any, merge_name: str) -> MergeMethod:
    """Return a step with one setting changed; the step checks the value."""
    known = [spec.name for spec in fields(step)]
    if setting not in known:
        raise UserError(
            f"Merge '{merge_name}': {type(step).__name__} has no setting '{setting}'. "
            f"Known: {', '.join(known)}.{nearest(setting, known)}"
        )
    return replace(step, **{setting: value})


def _plain(value: Any) -> Any:
    """Turn settings into plain data for hashing and records."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    return repr(value)
