"""The merging engine: plan from headers, read piece by piece, merge, write in place.

Nothing is written under the output's name until it is whole: work happens beside it and is renamed at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods import MergeMethod, Transform
from lightning_merge.methods.base import Step
from lightning_merge.methods.streaming import Chain, resolve
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights import (
    Finding,
    SafetensorsWriter,
    TensorInfo,
    WeightSource,
    peak_memory_bytes,
    read_checkpoint,
    sha256_of_source,
)
from lightning_merge.weights.card import SourceRecord, model_card
from lightning_merge.weights.folder import copy_companions, replace_folder, write_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SECONDS_BETWEEN_REPORTS = 0.1


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or in a dry run would do."""

    output: Path
    recipe: dict[str, Any]
    seconds: float = 0.0
    hashing_seconds: float = 0.0
    passes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    peak_memory_bytes: int = 0
    already_there: bool = False
    findings: list[Finding] = field(default_factory=list)


def merge(
    method: MergeMethod,
    task_vectors: TaskVectors,
    output: str | Path,
    transforms: Sequence[Transform] = (),
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    score: Callable[[dict[str, Tensor]], float] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    title: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge into a file or folder without holding a model in memory.

    Args:
        method: The merge; see ``lightning-merge methods``.
        task_vectors: The models over their base, from :meth:`TaskVectors.open`.
        output: A folder (weights, config and tokenizer of the base, recipe, card), a ``.safetensors`` file, or a
            ``.ckpt`` file that Lightning loads strictly into the user's module.
        transforms: Transforms of the task vectors, in order, before the merge.
        seed: Seed of the methods that draw at random.
        dtype: Floating-point dtype of the result, by default that of the base.
        score: For methods that select by validation: a state dict to a score.
        overwrite: Replace an earlier merge.
        dry_run: Check and plan only; nothing is read or written.
        title: Heading of the model card.
        on_progress: Called now and then with entries merged and entries in all.

    Raises:
        UserError: The models do not fit, or the output holds something else; nothing is then written.

    Cost: see the method; memory holds pieces of 2¹⁷ entries of T models for each core (for ``.ckpt`` the whole model).
    """
    output = Path(output)
    wanted = _dtype(dtype)
    # A method that must score candidates reads them already when it is planned; a dry run stops before.
    steps: list[Step] = []
    if not (dry_run and method.needs_score):
        _check_output(output, task_vectors, overwrite=True)
        started_planning = time.perf_counter()
        steps, chosen = resolve(method, task_vectors, transforms, seed, score)
    else:
        started_planning, chosen = time.perf_counter(), task_vectors
    recipe = resolved_recipe(method, task_vectors, transforms, seed, wanted)
    infos = _output_tensors(chosen, wanted, with_aliases=output.suffix == ".safetensors" or not chosen.template.folder)
    planned = MergeReport(
        output, recipe, bytes_written=sum(info.nbytes for info in infos.values()), findings=task_vectors.findings
    )
    if dry_run:
        return planned

    started_hashing = time.perf_counter()
    sources = {name: source for name, source in [("", task_vectors.base), *task_vectors.models.items()] if source}
    hashes = {name: sha256_of_source(source) for name, source in sources.items()}
    hashing_seconds = time.perf_counter() - started_hashing
    identity = {"recipe": recipe, "sha256": hashes}
    recipe_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if _already_there(output, recipe_hash) and not overwrite:
        return MergeReport(output, recipe, already_there=True, hashing_seconds=hashing_seconds)
    _check_output(output, task_vectors, overwrite)

    started = time.perf_counter() - (started_hashing - started_planning)
    chain = Chain(steps, chosen, seed)
    is_folder = output.suffix not in {".safetensors", ".ckpt"}
    # The name carries the process, so that two merges into one place do not write into each other.
    work = output.with_name(f"{output.name}.{os.getpid()}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if is_folder:
            work.mkdir()
        target = work / "model.safetensors" if is_folder else work
        if output.suffix == ".ckpt":
            _write_checkpoint(chain, infos, target, task_vectors.template, on_progress)
        else:
            _write_safetensors(chain, infos, target, on_progress)
        report = MergeReport(
            output,
            recipe,
            seconds=time.perf_counter() - started,
            hashing_seconds=hashing_seconds,
            passes=chain.passes,
            bytes_read=chain.passes * sum(source.nbytes for source in sources.values()),
            bytes_written=planned.bytes_written,
            peak_memory_bytes=peak_memory_bytes(),
            findings=task_vectors.findings,
        )
        record = _record(report, identity, recipe_hash, sources)
        if is_folder:
            folder = task_vectors.template.folder
            if folder:
                copy_companions(folder, work, wanted)
            write_text(work / "merge.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
            write_text(work / "merge.json", json.dumps(record, indent=2) + "\n")
            write_text(work / "README.md", card_text(report, method, transforms, sources, hashes, title))
            replace_folder(work, output)
        else:
            os.replace(work, output)
            write_text(_record_of(output), json.dumps(record, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(work, ignore_errors=True) if work.is_dir() else work.unlink(missing_ok=True)
        raise
    return report


def resolved_recipe(
    method: MergeMethod,
    task_vectors: TaskVectors,
    transforms: Sequence[Transform],
    seed: int,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return the whole recipe as plain data, in the form that ``lightning-merge merge --config`` reads."""
    first = next(iter(task_vectors.models.values()), None)
    return {
        "method": as_config(method),
        "transforms": [as_config(step) for step in transforms],
        "base": task_vectors.base.label if task_vectors.base else None,
        "models": {name: source.label for name, source in sorted(task_vectors.models.items())},
        "ignore": list(task_vectors.ignore),
        "prefix": first.prefix if first else "",
        "batch_norm": task_vectors.batch_norm,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch.") if dtype else None,
    }


def as_config(step: Step) -> dict[str, Any]:
    """Return a method or transform as ``{class_path, init_args}``."""
    values = {spec.name: getattr(step, spec.name) for spec in fields(step)} if is_dataclass(step) else {}
    kind = type(step)
    ours = kind.__module__.startswith("lightning_merge.methods.")
    return {"class_path": kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}", "init_args": values}


def describe(method: MergeMethod, transforms: Sequence[Transform] = ()) -> str:
    """Return a merge in one line: ``LwPTV(eta=0.2, ...) → TaskArithmetic(scale=0.3)``."""
    parts = []
    for step in [*transforms, method]:
        settings = ", ".join(f"{name}={value}" for name, value in as_config(step)["init_args"].items())
        parts.append(f"{type(step).__name__}({settings})")
    return " → ".join(parts)


def card_text(
    report: MergeReport,
    method: MergeMethod,
    transforms: Sequence[Transform],
    sources: Mapping[str, WeightSource],
    hashes: Mapping[str, str],
    title: str | None,
    results: str = "",
) -> str:
    """Return the model card of a finished merge."""
    records = {name: SourceRecord.of(name or "base", source, hashes[name]) for name, source in sources.items()}
    papers = "; ".join(dict.fromkeys(step.paper for step in [*transforms, method] if step.paper))
    return model_card(
        title or report.output.name,
        f"Method: {describe(method, transforms)}. Papers: {papers}.",
        yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
        records.pop("", None),
        list(records.values()),
        {"seed": str(report.recipe["seed"]), "bytes": f"{report.bytes_written:,}"},
        results,
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"Unknown dtype '{dtype}'. Accepted: {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _output_tensors(task_vectors: TaskVectors, dtype: torch.dtype | None, with_aliases: bool) -> dict[str, TensorInfo]:
    """Shapes and dtypes of the result; tied names get their own copy where no config could tie them again."""
    template = task_vectors.template
    names = {name: name for name in template.tensors} | (template.aliases if with_aliases else {})
    infos = {}
    for name, owner in names.items():
        info = template.tensors[owner]
        floating = dtype is not None and info.dtype.is_floating_point
        infos[name] = TensorInfo(info.shape, dtype) if floating and dtype else info
    return infos


def _check_output(output: Path, task_vectors: TaskVectors, overwrite: bool) -> None:
    """Refuse to write over a source, or over anything that is not an earlier merge."""
    for source in [task_vectors.base, *task_vectors.models.values()]:
        places = [*(source.files if source else ()), *([source.folder] if source and source.folder else [])]
        if output.exists() and any(place.resolve() == output.resolve() for place in places):
            raise UserError(f"The output '{output}' is one of the models being merged. Expected another place.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    ours = (output / "merge.json").is_file() or _record_of(output).is_file()
    if not ours:
        raise UserError(f"The output '{output}' already holds something else. Expected a new or empty place.")
    if not overwrite:
        raise UserError(f"The output '{output}' already holds another merge. Expected a new place, or --overwrite.")


def _record_of(output: Path) -> Path:
    """Where the provenance of a single-file output stands."""
    return output.with_name(output.name + ".merge.json")


def _already_there(output: Path, recipe_hash: str) -> bool:
    record = output / "merge.json" if output.is_dir() else _record_of(output)
    weights = output / "model.safetensors" if output.is_dir() else output
    if not (record.is_file() and weights.is_file()):
        return False
    return json.loads(record.read_text(encoding="utf-8")).get("recipe_hash") == recipe_hash


def _record(
    report: MergeReport, identity: dict[str, Any], recipe_hash: str, sources: Mapping[str, WeightSource]
) -> dict[str, Any]:
    """The provenance that goes into merge.json."""
    import safetensors

    from lightning_merge import __version__

    versions = {"lightning_merge": __version__, "torch": torch.__version__, "safetensors": safetensors.__version__}
    base = {"base": {"reference": sources[""].label, "sha256": identity["sha256"][""]}} if "" in sources else {}
    return {
        "recipe_hash": recipe_hash,
        "recipe": report.recipe,
        "sources": base
        | {
            name: {"reference": source.label, "sha256": identity["sha256"][name]}
            for name, source in sources.items()
            if name
        },
        "versions": {"python": platform.python_version(), **versions},
        "seconds": round(report.seconds, 3),
        "hashing_seconds": round(report.hashing_seconds, 3),
        "passes": report.passes,
        "bytes_written": report.bytes_written,
        "peak_memory_bytes": report.peak_memory_bytes,
        "findings": [asdict(finding) for finding in report.findings],
    }


def _pieces(chain: Chain, infos: Mapping[str, TensorInfo], on_progress: Callable[[int, int], None] | None) -> Any:
    """Yield every piece of the output, rounded once into its dtype."""
    vectors = chain.task_vectors
    names: dict[str, list[str]] = {name: [name] for name in vectors.template.tensors}
    for alias, owner in vectors.template.aliases.items():
        if alias in infos:
            names[owner].append(alias)
    for name in (*vectors.averaged_names, *vectors.copied_names):
        values = vectors.unmerged(name).reshape(-1).to(infos[name].dtype)
        for written in names[name]:
            yield written, 0, values
    done, total, last = 0, vectors.numel, 0.0
    for name, start, values in chain.run():
        rounded = values.to(infos[name].dtype)
        for written in names[name]:
            yield written, start, rounded
        done += values.numel()
        if on_progress and (done == total or time.monotonic() - last > SECONDS_BETWEEN_REPORTS):
            last = time.monotonic()
            on_progress(done, total)


def _write_safetensors(
    chain: Chain, infos: Mapping[str, TensorInfo], path: Path, on_progress: Callable[[int, int], None] | None
) -> None:
    with SafetensorsWriter(path, infos) as writer:
        for name, start, values in _pieces(chain, infos, on_progress):
            writer.write(name, values, start)


def _write_checkpoint(
    chain: Chain,
    infos: Mapping[str, TensorInfo],
    path: Path,
    template: WeightSource,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Write a checkpoint with the template's hyper-parameters and other tensors; optimizers no longer apply."""
    merged = {name: torch.empty(info.numel, dtype=info.dtype) for name, info in infos.items()}
    for name, start, values in _pieces(chain, infos, on_progress):
        merged[name][start : start + values.numel()] = values
    content: dict[str, Any] = {}
    if template.files and template.files[0].suffix == ".ckpt":
        content = read_checkpoint(template.files[0])
    content = {k: v for k, v in content.items() if k not in {"optimizer_states", "lr_schedulers", "loops", "callbacks"}}
    prefix = template.prefix
    state_dict = dict(content.get("state_dict", {}))
    state_dict.update({prefix + name: values.reshape(infos[name].shape) for name, values in merged.items()})
    torch.save({"epoch": 0, "global_step": 0, **content, "state_dict": state_dict}, path)
