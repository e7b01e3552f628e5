"""The merging engine: plan from headers, read piece by piece, merge, write in place.

Nothing is written under the output's name until it is whole: work happens beside it and is renamed at the end. A merge
that was killed goes on where it stopped when the same is asked for again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.digests import Digests
from lightning_merge.errors import UserError, unknown
from lightning_merge.execution import Done, Job, Part, carry_out, cores
from lightning_merge.journal import Workplace, remove_leftovers
from lightning_merge.methods import MergeMethod, Transform
from lightning_merge.methods.base import Step
from lightning_merge.methods.schedule import unused_patterns
from lightning_merge.methods.streaming import Rounding, resolve
from lightning_merge.outputs import (
    card_text,
    digest,
    holds,
    is_folder,
    provenance,
    record_of,
    refuse_other_content,
    versions,
    write_checkpoint,
)
from lightning_merge.placing import put_in_place
from lightning_merge.planning import Plan, plan
from lightning_merge.recipe import describe, resolved_recipe, to_yaml
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights import Finding, SafetensorsSource, TensorInfo, WeightSource
from lightning_merge.weights.folder import companions_sha256
from lightning_merge.weights.output_files import OutputFiles, parse_size

__all__ = ["MergeReport", "Part", "merge", "merge_parts"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SECONDS_BETWEEN_REPORTS = 0.1
MAX_SHARD_SIZE = "5GB"
PROCESSES_FOR_EACH_CORE = 4


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
    # Tensors that an earlier, killed process had finished.
    resumed_tensors: int = 0
    # Tensors that an earlier process had finished of another merge into this place.
    discarded_tensors: int = 0
    findings: list[Finding] = field(default_factory=list)
    # The models that went in: a method that selects may have left some out.
    models: tuple[str, ...] = ()
    plan: Plan | None = None


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
    max_shard_size: int | str | None = MAX_SHARD_SIZE,
    num_workers: int = 1,
    threads: int | None = None,
    rounding: Rounding = "nearest",
    device: str = "cpu",
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
        dry_run: Check and plan only; nothing is written.
        title: Heading of the model card.
        on_progress: Called now and then with entries merged and entries in all.
        max_shard_size: How large a file in an output folder may become, such as ``"5GB"``; ``None`` for one file.
        num_workers: Processes that own disjoint tensors; any number gives the same bytes.
        threads: Threads of each process; by default the cores are shared out.
        rounding: Into bf16 to the ``nearest`` number, or ``stochastic``, which keeps small updates on average.
        device: Where methods that can compute off the host do; ``cpu`` or ``cuda``.

    Returns:
        What was done; for a dry run with the ``plan``.

    Raises:
        UserError: The models do not fit, the disk is too small, or the output holds something else; nothing is then
            written.

    Cost: see the method; memory holds pieces of 2¹⁷ entries of T models for each thread (for ``.ckpt`` the whole
        model). Interrupted, it goes on from its journal in ``OUTPUT.partial``.
    """
    wanted = _dtype(dtype)
    return merge_parts(
        [Part(method, task_vectors, tuple(transforms))],
        output,
        recipe=resolved_recipe(method, task_vectors, transforms, seed, wanted, rounding, max_shard_size),
        seed=seed,
        dtype=wanted,
        score=score,
        overwrite=overwrite,
        dry_run=dry_run,
        title=title,
        on_progress=on_progress,
        max_shard_size=max_shard_size,
        num_workers=num_workers,
        threads=threads,
        rounding=rounding,
        device=device,
    )


def merge_parts(
    parts: Sequence[Part],
    output: str | Path,
    recipe: dict[str, Any],
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    score: Callable[[dict[str, Tensor]], float] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    title: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    max_shard_size: int | str | None = MAX_SHARD_SIZE,
    num_workers: int = 1,
    threads: int | None = None,
    rounding: Rounding = "nearest",
    device: str = "cpu",
    companions: Mapping[str, str | bytes | Path] | None = None,
    findings: Sequence[Finding] = (),
) -> MergeReport:
    """Merge parts of a model, each in its own way, into one output; see :func:`merge`.

    Args:
        parts: Each makes the tensors of its template; no two make the same.
        output: See :func:`merge`; so for the arguments not named here.
        recipe: What stands in ``merge.yaml`` and makes the same merge again.
        companions: Content or origin of the files beside the weights; by default those of the first part's template.
        findings: To be noted beside those of the parts.

    Raises:
        UserError: See :func:`merge`.
    """
    started = time.perf_counter()
    output, wanted = Path(output), _dtype(dtype)
    output = output.resolve() if output.is_symlink() else output
    _check_options(num_workers, threads, rounding, device)
    seed = int(seed)
    to_yaml(recipe)  # what cannot be written down is noticed now
    shard_bytes = None if max_shard_size is None or not is_folder(output) else parse_size(max_shard_size)
    every = [source for part in parts for source in part.task_vectors.sources]
    template = parts[0].task_vectors.template
    refuse_other_content(output, every, overwrite=True)
    # A method that must score candidates reads them already when it is planned; a dry run stops before.
    resolved: list[tuple[list[Step], TaskVectors]] = [
        ([], part.task_vectors)
        if dry_run and part.method.needs_score
        else resolve(part.method, part.task_vectors, part.transforms, seed, score)
        for part in parts
    ]
    with_aliases = output.suffix == ".safetensors" or not template.folder
    infos, names = _output_tensors([vectors for _, vectors in resolved], wanted, with_aliases)
    file_name = {".safetensors": output.name, ".ckpt": "weights.safetensors"}.get(output.suffix, "model.safetensors")
    workplace = output.with_name(output.name + ".partial") / "files"
    job = Job(resolved, names, OutputFiles(workplace, infos, shard_bytes, file_name), seed, rounding, device)
    noted = [*(finding for part in parts for finding in part.task_vectors.findings), *findings]
    for steps, vectors in resolved:
        for step in steps:
            for setting in step.varying:
                for pattern in unused_patterns(getattr(step, setting), vectors.tensor_names):
                    message = f"{type(step).__name__}: {setting} has the pattern '{pattern}', which fits no tensor."
                    noted.append(Finding("WARN", message))
    if num_workers > PROCESSES_FOR_EACH_CORE * cores():
        noted.append(Finding("WARN", f"{num_workers} processes are too many for {cores()} cores: fewer are used."))
        num_workers = PROCESSES_FOR_EACH_CORE * cores()
    if dry_run and not overwrite and record_of(output).is_file():
        noted.append(
            Finding("WARN", f"The output '{output}' holds a merge already; another one there needs --overwrite.")
        )
    foreseen = plan(job, output, threads or max(1, cores() // num_workers), num_workers, noted)
    report = MergeReport(
        output,
        recipe,
        passes=foreseen.pass_count,
        bytes_read=foreseen.bytes_read,
        bytes_written=sum(info.nbytes for info in infos.values()),
        peak_memory_bytes=foreseen.peak_memory_bytes,
        findings=foreseen.findings,
        models=tuple(dict.fromkeys(name for _, vectors in resolved for name in vectors.names)),
        plan=foreseen,
    )
    if dry_run:
        return report

    hashing = Digests(parts)
    identity = {
        "recipe": recipe,
        "models": list(report.models),
        "companions": _named(companions) if companions is not None else _companions_of(template),
        "layouts": hashing.layouts,
    }
    known = record_of(output).is_file() and not overwrite
    if known and holds(output, digest({**identity, "sha256": hashing.result()})):
        remove_leftovers(output)
        return MergeReport(output, recipe, already_there=True, hashing_seconds=hashing.seconds)
    refuse_other_content(output, every, overwrite)
    too_little = [finding.message for finding in foreseen.findings if finding.level == "ERROR"]
    if too_little:
        raise UserError("\n".join(too_little))
    made_of = {
        **identity,
        "sources": hashing.fingerprints,
        "dtype": str(wanted),
        "device": device,
        "versions": versions(),
    }
    try:
        with Workplace(output, digest(made_of)) as place:
            refuse_other_content(output, every, overwrite)  # again: another process may just have finished here
            done, resumed = _make(job, place, output, template, num_workers, threads, on_progress)
            hashing.refuse_changed()
            place.whole = True
            working = time.perf_counter()
            hashes = hashing.result()
            waited = time.perf_counter() - working
            refuse_other_content(output, every, overwrite)
            report = MergeReport(
                output,
                recipe,
                seconds=time.perf_counter() - started - waited,
                hashing_seconds=hashing.seconds,
                passes=done.passes,
                bytes_read=done.bytes_read,
                bytes_written=report.bytes_written,
                peak_memory_bytes=done.peak_memory_bytes,
                resumed_tensors=resumed,
                discarded_tensors=place.discarded,
                findings=foreseen.findings,
                models=report.models,
                plan=foreseen,
            )
            inside = f"{output.name}/" if is_folder(output) else ""
            sizes = {inside + path.name: path.stat().st_size for path in sorted(place.files.iterdir())}
            record = provenance(report, digest({**identity, "sha256": hashes}), hashing.sources, hashes, sizes)
            card = card_text(report, _how(parts), hashing.sources, hashes, title)
            put_in_place(place, output, report, record, card, template, companions, wanted)
    except OSError as error:
        raise UserError(f"The output '{output}' cannot be written ({error}). Expected a place to write.") from error
    return report


def _make(
    job: Job,
    place: Workplace,
    output: Path,
    template: WeightSource,
    workers: int,
    threads: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Done, int]:
    """Make the tensors that are not there yet; returns how it went, and how many were there."""
    if place.done and not job.output.stand():
        place.forget()
    if not place.done:
        job.output.create()
    wanted = [(part, name) for part, name in job.tensors if f"{part}:{name}" not in place.done]
    total = sum(vectors.numel for _, vectors in job.parts)
    left = set(wanted)
    merges = [(part, name) for part, (_, vectors) in enumerate(job.parts) for name in vectors.tensor_names]
    made = sum(job.parts[part][1].info(name).numel for part, name in merges if (part, name) not in left)
    last = 0.0

    def progress(count: int) -> None:
        nonlocal made, last
        made += count
        if on_progress and (made >= total or time.monotonic() - last > SECONDS_BETWEEN_REPORTS):
            last = time.monotonic()
            on_progress(min(made, total), total)

    try:
        done = carry_out(
            job,
            wanted,
            threads,
            workers,
            on_done=lambda part, name: place.record(f"{part}:{name}"),
            on_entries=progress,
            inherited=[place.lock],
        )
        job.output.finish()
    finally:
        job.output.close()
    if output.suffix == ".ckpt":
        [path] = job.output.paths
        source = SafetensorsSource(str(path), [path])
        try:
            write_checkpoint({n: source.read(n) for n in job.output.tensors}, path.with_name(output.name), template)
        except RuntimeError as error:  # how torch.save speaks of a full disk
            raise OSError(str(error)) from error
        path.unlink()
    return done, len(job.tensors) - len(wanted)


def _companions_of(template: WeightSource) -> str | None:
    """Return a digest of the files that come along with the weights."""
    return companions_sha256(template.folder) if template.folder else None


def _named(companions: Mapping[str, str | bytes | Path] | None) -> list[str] | None:
    if companions is None:
        return None
    return [f"{name}:{digest(repr(content))}" for name, content in sorted(companions.items())]


def _how(parts: Sequence[Part]) -> str:
    """One line naming methods and papers."""
    ways = dict.fromkeys(describe(part.method, part.transforms) for part in parts)
    papers = dict.fromkeys(step.paper for part in parts for step in [*part.transforms, part.method] if step.paper)
    shown = [*ways][:3] + ([f"and {len(ways) - 3} more settings"] if len(ways) > 3 else [])
    return f"Method: {'; '.join(shown)}. Papers: {'; '.join(papers)}."


def _check_options(num_workers: int, threads: int | None, rounding: str, device: str) -> None:
    """Refuse options that mean nothing here.

    Raises:
        UserError: With what is accepted.
    """
    for name, value in (("num_workers", num_workers), ("threads", threads)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if rounding not in ("nearest", "stochastic"):
        raise unknown("rounding", rounding, ["nearest", "stochastic"])
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise unknown("device", device, ["cpu", "cuda"])
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device '{device}' is not there: torch {torch.__version__} finds no GPU. Expected cpu.")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def _output_tensors(
    parts: Sequence[TaskVectors], dtype: torch.dtype | None, with_aliases: bool
) -> tuple[dict[str, TensorInfo], list[dict[str, list[str]]]]:
    """Shapes and dtypes of the result, and the output's names of each part's tensors.

    Tied names get their own copy where no config could tie them again.
    """
    infos: dict[str, TensorInfo] = {}
    names: list[dict[str, list[str]]] = []
    for vectors in parts:
        template = vectors.template
        written = {name: [name] for name in template.tensors}
        if with_aliases:
            for alias, owner in template.aliases.items():
                written[owner].append(alias)
        for owner, outputs in written.items():
            info = template.tensors[owner]
            floating = dtype is not None and info.dtype.is_floating_point
            for name in outputs:
                if name in infos:
                    raise UserError(f"Two parts of the merge make the tensor '{name}'. Expected one.")
                infos[name] = TensorInfo(info.shape, dtype) if floating and dtype else info
        names.append(written)
    return infos, names
