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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_merge.errors import UserError, unknown
from lightning_merge.methods import MergeMethod, Transform
from lightning_merge.methods.base import Step
from lightning_merge.methods.streaming import Chain, resolve, round_to
from lightning_merge.recipe import COMPUTED, describe, resolved_recipe
from lightning_merge.task_vectors import TaskVector, TaskVectors
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
    bytes_written: int = 0
    peak_memory_bytes: int = 0
    already_there: bool = False
    findings: list[Finding] = field(default_factory=list)
    # The models that went in: a method that selects may have left some out.
    models: tuple[str, ...] = ()


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

    Cost: see the method; memory holds pieces of 2¹⁸ entries of T models for each core (for ``.ckpt`` the whole model).
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
    computed = [name for name, vector in task_vectors.items() if vector.finetuned is None]
    opened = {"": task_vectors.base, **task_vectors.models}
    sources = {name: source for name, source in opened.items() if source and name not in computed}
    hashes = {name: sha256_of_source(source) for name, source in sources.items()}
    hashes |= {name: _sha256_of_values(task_vectors[name]) for name in computed}
    hashing_seconds = time.perf_counter() - started_hashing
    # A method that selects may have left models out, by a score that no recipe states.
    identity = {"recipe": recipe, "sha256": hashes, "models": list(chosen.names)}
    recipe_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if _already_there(output, recipe_hash) and not overwrite:
        return MergeReport(output, recipe, already_there=True, hashing_seconds=hashing_seconds)
    _check_output(output, task_vectors, overwrite)

    started = time.perf_counter() - (started_hashing - started_planning)
    chain = Chain(steps, chosen, seed)
    is_folder = output.suffix not in {".safetensors", ".ckpt"}
    # The name carries the process, so that two merges into one place do not write into each other.
    work = output.with_name(f"{output.name}.{os.getpid()}.partial")
    _remove_leftovers(output)
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if is_folder:
            shutil.rmtree(work, ignore_errors=True)  # of a killed process that had the same number
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
            models=chosen.names,
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
            # No record may vouch for weights it does not describe, even if the process is killed between the two.
            _record_of(output).unlink(missing_ok=True)
            os.replace(work, output)
            write_text(_record_of(output), json.dumps(record, indent=2) + "\n")
    except BaseException as error:
        with suppress(OSError):
            shutil.rmtree(work) if work.is_dir() else work.unlink(missing_ok=True)
            for parent in made:
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"The output '{output}' cannot be written ({error}). Expected a place to write.") from error
        raise
    return report


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
    records = {
        name: SourceRecord.of(name or "base", sources[name], sha256)
        if name in sources
        else SourceRecord(name, COMPUTED, sha256, None)
        for name, sha256 in hashes.items()
    }
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
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


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


def _sha256_of_values(vector: TaskVector) -> str:
    """Return the sha256 of a task vector that algebra made: of its values, since no file holds them."""
    digest = hashlib.sha256()
    for name in vector.space.tensor_names:
        digest.update(f"{name}:{vector.space.shape(name)};".encode())
        for start, stop in vector.space.chunks(name):
            digest.update(vector.read(name, start, stop).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_output(output: Path, task_vectors: TaskVectors, overwrite: bool) -> None:
    """Refuse to write over a source, or over anything that is not an earlier merge."""
    for source in [task_vectors.base, *task_vectors.models.values()]:
        places = [*(source.files if source else ()), *([source.folder] if source and source.folder else [])]
        if output.exists() and any(output.resolve() in [p.resolve(), *p.resolve().parents[:-1]] for p in places):
            raise UserError(f"The output '{output}' is or holds a model being merged. Expected another place.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    ours = (output / "merge.json").is_file() or _record_of(output).is_file()
    if not ours:
        raise UserError(f"The output '{output}' already holds something else. Expected a new or empty place.")
    if not overwrite:
        raise UserError(f"The output '{output}' already holds another merge. Expected a new place, or --overwrite.")


def _remove_leftovers(output: Path) -> None:
    """Remove what killed merges into this place have left beside it."""
    for leftover in output.parent.glob(f"{output.name}.*.partial"):
        process = leftover.name.removeprefix(f"{output.name}.").removesuffix(".partial")
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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
    references = {
        name or "base": {"reference": sources[name].label if name in sources else COMPUTED, "sha256": sha256}
        for name, sha256 in identity["sha256"].items()
    }
    return {
        "recipe_hash": recipe_hash,
        "recipe": report.recipe,
        "sources": references,
        "versions": {"python": platform.python_version(), **versions},
        "seconds": round(report.seconds, 3),
        "hashing_seconds": round(report.hashing_seconds, 3),
        "models_merged": list(report.models),
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
        rounded = round_to(values, infos[name].dtype, name)
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
    # Lightning migrates a checkpoint by the version that wrote it, and refuses one that names none.
    defaults = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": version("lightning")}
    with path.open("wb") as stream:  # given a path, torch would write the file's name into the file
        torch.save({**defaults, **content, "state_dict": state_dict}, stream)
