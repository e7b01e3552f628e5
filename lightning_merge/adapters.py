"""Adapters in, one adapter out: merges of PEFT adapters that act on ΔW itself, and adapters taken out of full models.

Factors are never added or averaged one by one: that would add the product of one adapter's factors with another's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_merge.adapter_extraction import extract
from lightning_merge.adapter_merging import OR_FULL_WEIGHTS, AdapterMerge, MergedAdapters
from lightning_merge.errors import UserError, unknown
from lightning_merge.methods import MergeMethod, SimpleAverage, Transform
from lightning_merge.methods.base import ModelMerge
from lightning_merge.recipe import describe
from lightning_merge.weights import WeightSource, open_weights, sha256_of_file
from lightning_merge.weights.adapter_config import CONFIG_FILE, is_inside
from lightning_merge.weights.adapter_layout import Layout
from lightning_merge.weights.adapter_names import parse_key
from lightning_merge.weights.adapter_writer import write_ia3, write_lora
from lightning_merge.weights.adapters import AdapterSource, open_adapter
from lightning_merge.weights.compatibility import find_incompatibilities, ignored
from lightning_merge.weights.folder import replace_folder, write_text

RECORD = "merge.json"


@dataclass(frozen=True)
class AdapterReport:
    """What became of each matrix.

    Attributes:
        output: The adapter's folder.
        ranks: Rank by module.
        errors: Relative Frobenius error of ΔW by module; empty where the adapter is exact.
        error: The same over all matrices.
        lost: Tensors whose change the adapter leaves out, each with the norm of that change.
        notes: What a user should know besides.
    """

    output: Path
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0
    lost: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def merge_adapters(
    base: Any,
    adapters: Mapping[str, Any],
    output: str | Path,
    method: MergeMethod | None = None,
    transforms: Sequence[Transform] = (),
    rank: int | None = None,
    seed: int = 0,
    knots: bool = False,
    ignore: Sequence[str] = (),
    overwrite: bool = False,
    rename: Mapping[str, str] | None = None,
) -> AdapterReport:
    """Merge PEFT adapters over one base into one adapter that PEFT loads.

    Without a rank, a linear method (``SimpleAverage``, ``WeightedAverage``, ``TaskArithmetic``) is exact: factors are
    concatenated, so that the new ΔW is Σ w_t ΔW_t to the rounding of fp32, whatever the ranks, alphas and scalings.
    (IA)³ adapters merge by the same rule, l = 1 + Σ w_t (l_t − 1). With a rank, any method merges what the adapters,
    DoRA included, make of each matrix, and its result is truncated to that rank. With ``knots`` any method merges
    LoRA adapters in a basis they share, and its result is an exact adapter again.

    Args:
        base: The model the adapters were trained over; anything :func:`~lightning_merge.weights.open_weights` opens.
        adapters: Adapter folders by name, or adapters opened over that base.
        output: A new folder.
        method: The merge; :class:`~lightning_merge.methods.SimpleAverage` by default.
        transforms: Transforms of the task vectors, in order, before the merge.
        rank: Of the new adapter, at least 1; none concatenates.
        seed: Of the methods that draw at random.
        knots: Merge the V_t of ``[ΔW_1 … ΔW_T] = U S [V_1 … V_T]ᵀ`` (Stoica et al., 2024, arXiv 2410.19735), which
            are coordinates in the basis U S; the configurations its authors released rank the entries of S V_tᵀ
            instead. A step with the scope of the model goes over the V_t of all matrices together; tensors held
            whole are merged by themselves.
        ignore: Patterns of tensors held whole (heads, biases) that stay out.
        overwrite: Replace an adapter that stands at the output.
        rename: See :func:`~lightning_merge.weights.adapters.open_adapter`.

    Raises:
        UserError: An adapter does not fit, a weight is missing or unknown, the result cannot be written as asked, or
            something stands at the output; nothing is then written.

    Cost: a concatenation reads the adapters alone. A rank costs a singular value decomposition of each matrix, of
    cores of Σ r_t x Σ r_t only where the method is linear; memory holds a few matrices of all adapters in fp64, and
    with ``knots`` and a step with the scope of the model all V_t at once, T Σ r_t n entries for each m x n matrix.
    Reference: Hu et al., 2021, arXiv 2106.09685; Zhang et al., 2023 (arithmetic of adapters), arXiv 2306.14870.
    """
    method = SimpleAverage() if method is None else method
    if not adapters:
        raise UserError("No adapters to merge. Expected at least one, for example --adapters '{cars: path/to/cars}'.")
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}. Expected a rank, or none for an exact concatenation.")
    if isinstance(method, ModelMerge):
        raise UserError(f"{type(method).__name__} needs whole models. Expected another method, {OR_FULL_WEIGHTS}.")
    opened = open_all(open_weights(base), adapters, ignore, rename)
    merge = AdapterMerge(opened, method, transforms, rank, seed, knots)
    place = Path(output)
    with written_beside(place, [source.adapter_folder for source in opened.values()], overwrite) as work:
        merged = merge.run()
        report = _report(place, merged, opened)
        _write(work, merge, merged)
        _write_record(work, report, opened, describe(method, transforms), {"rank": rank, "seed": seed, "knots": knots})
    return report


def open_all(
    base: WeightSource,
    adapters: Mapping[str, Any],
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> dict[str, AdapterSource]:
    """Open adapters over one base, without the whole tensors that are ignored.

    Raises:
        UserError: An adapter does not fit, or holds a head that the base lacks.
    """
    opened = {}
    for name, ref in sorted((str(name), ref) for name, ref in adapters.items()):
        source = ref if isinstance(ref, AdapterSource) else open_adapter(ref, base, rename=rename)
        layout = source.layout
        whole = {held: key for held, key in layout.replaced.items() if not ignored(held, ignore)}
        biases = {held: module for held, module in layout.biases.items() if not ignored(held, ignore)}
        for held in whole:
            shape = base.tensors[held].shape if held in base.tensors else None
            if source.tensors[held].shape != shape:
                has = "lacks it" if shape is None else f"has it in {list(shape)}"
                raise UserError(
                    f"The adapter '{name}' holds '{held}' whole, of shape {list(source.tensors[held].shape)}, and the "
                    f"base {has}: the two cannot be merged. Leave it out with --ignore REGEX."
                )
        kept = Layout(layout.modules, biases, whole, layout.notes)
        opened[name] = AdapterSource(source.label, base, source.adapter, source.adapter_config, kept)
    return opened


def extract_adapter(
    base: Any,
    finetuned: Any,
    output: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    target: Sequence[str] | str | None = None,
    rest: Literal["lose", "save"] = "lose",
    ignore: Sequence[str] = (),
    overwrite: bool = False,
) -> AdapterReport:
    """Write what fine-tuning changed in a full model as a LoRA adapter that PEFT loads.

    Each matrix W − W₀ is replaced by the nearest one of low rank, and the report says how near. What is no matrix of
    a linear module (biases, norms, embeddings) and has changed is named with the norm of its change, or saved whole.

    Args:
        base: The pretrained model.
        finetuned: The fine-tuned model.
        output: A new folder.
        rank: Of each matrix, at least 1; 16 by default, less where the matrix has less.
        energy: In place of a rank: the part, in (0, 1], of the sum of squared singular values that each matrix keeps.
        target: Modules to take, as PEFT reads ``target_modules``: ends of names, or one regular expression; embeddings
            and convolutions too. All linear modules by default. A matrix of a module whose name's last part holds
            "embed", or is wte, wpe or shared, counts as an embedding.
        rest: ``"lose"`` other changes, or ``"save"`` them whole: biases of adapted modules as biases, others by
            their module.
        ignore: Patterns of tensors that stay out, and need not fit.
        overwrite: Replace an adapter that stands at the output.

    Raises:
        UserError: The models do not fit, nothing differs, or something stands at the output.

    Cost: a truncated singular value decomposition of each changed matrix, for ``energy`` of the whole matrix; memory
    holds one matrix in fp64, a few times.
    Reference: Hu et al., 2021, arXiv 2106.09685; the truncation is Eckart and Young's, 1936.
    """
    if rank is not None and energy is not None:
        raise UserError(f"Both rank {rank} and energy {energy:g} are given. Expected one of them.")
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}.")
    if energy is not None and not 0 < energy <= 1:
        hint = f" Did you mean {energy / 100:g}?" if 1 < energy <= 100 else ""
        raise UserError(f"energy must be in (0, 1], got {energy:g}.{hint}")
    if rest not in ("lose", "save"):
        raise unknown("rest", rest, ["lose", "save"])
    place, start, model = Path(output), open_weights(base), open_weights(finetuned)
    findings = find_incompatibilities(start, {"finetuned": model}, ignore, sample=False)
    if errors := [finding.message for finding in findings if finding.level == "ERROR"]:
        raise UserError("\n".join(errors))
    sources = [source.folder for source in (start, model) if source.folder]
    with written_beside(place, sources, overwrite) as work:
        found = extract(start, model, target, rank or 16, energy, rest == "save", ignore)
        report = _report(place, found.merged, {})
        report = replace(report, lost=found.lost, notes=tuple(found.notes))
        settings = {"base_model_name_or_path": start.label}
        write_lora(work, found.merged.factors, found.merged.whole, found.saved, found.transposed, settings)
        how = {"rank": None if energy else rank or 16, "energy": energy, "rest": rest}
        _write_record(work, report, {"base": start, "finetuned": model}, "extract_adapter", how)
    return report


def _report(place: Path, merged: MergedAdapters, adapters: Mapping[str, AdapterSource]) -> AdapterReport:
    size = math.fsum(low.size**2 for low in merged.truncated.values())
    lost = math.fsum(low.lost**2 for low in merged.truncated.values())
    return AdapterReport(
        place,
        {name: held.rank for name, held in merged.factors.items()},
        {name: low.error for name, low in merged.truncated.items()},
        math.sqrt(lost / size) if size else 0.0,
        notes=tuple(note for source in adapters.values() for note in source.layout.notes),
    )


def _write(work: Path, merge: AdapterMerge, merged: MergedAdapters) -> None:
    """Write the new adapter under the names that the adapters give to modules and tensors."""
    adapters, names = merge.adapters.values(), {}
    vector_biases = {name for source in adapters for name in source.biases} if merge.is_ia3 else set()
    for name in merged.whole:
        for source in adapters:
            if name in source.replaced and (key := parse_key(source.replaced[name])):
                names[name] = f"{key.module}.{key.part}"
            elif name in source.biases:
                names[name] = f"{source.biases[name].name}.{name.rpartition('.')[2]}"
    # What an (IA)³ vector makes of a bias is said by the vector.
    whole = {names[name]: value for name, value in merged.whole.items() if name not in vector_biases}
    wanted = {module for source in adapters for module in source.adapter_config.modules_to_save}
    saved = [module for module in wanted if any(is_inside(name.rpartition(".")[0], [module]) for name in whole)]
    contents = [source.adapter_config.content for source in adapters]
    agreed = {
        entry: contents[0].get(entry)
        for entry in ("auto_mapping", "base_model_name_or_path", "revision", "task_type")
        if all(content.get(entry) == contents[0].get(entry) for content in contents)
    }
    transposed = any(module.transposed for module in merge.modules.values())
    if merge.is_ia3:
        inputs = [module.name for module in merge.modules.values() if module.feedforward]
        write_ia3(work, merged.vectors, inputs, whole, saved, transposed, agreed)
    else:
        write_lora(work, merged.factors, whole, saved, transposed, agreed)


def _write_record(
    work: Path, report: AdapterReport, sources: Mapping[str, WeightSource], method: str, settings: Mapping[str, Any]
) -> None:
    """Write where the adapter comes from, beside it."""
    from lightning_merge import __version__

    record = {
        "method": method,
        **settings,
        "sources": {
            name: {"reference": source.label, "sha256": {file.name: sha256_of_file(file) for file in own_files(source)}}
            for name, source in sources.items()
        },
        "versions": {"lightning_merge": __version__, "torch": torch.__version__},
        "relative_error": report.error,
        "relative_errors": report.errors,
        "lost": report.lost,
    }
    write_text(work / RECORD, json.dumps(record, indent=2) + "\n")


def own_files(source: WeightSource) -> tuple[Path, ...]:
    """The files that a source is made of; of an adapter not those of its base."""
    if isinstance(source, AdapterSource):
        return (*source.adapter.files, source.adapter_config.path)
    return source.files


@contextmanager
def written_beside(place: Path, sources: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    """Give a folder to write in, which takes its place only when all is written.

    Raises:
        UserError: Something stands at the place that is no adapter, or one and ``overwrite`` is not set.
    """
    if place.exists() and any(place.resolve() in [s.resolve(), *s.resolve().parents] for s in sources):
        raise UserError(f"The output '{place}' is or holds a source. Expected another place.")
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        if not (place / CONFIG_FILE).is_file() or (place / "config.json").is_file():
            raise UserError(f"The output '{place}' already holds something else. Expected a new or empty place.")
        if not overwrite:
            raise UserError(f"The output '{place}' already holds an adapter. Expected a new place, or --overwrite.")
    work = place.with_name(f"{place.name}.{os.getpid()}.partial")
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        replace_folder(work, place)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"The output '{place}' cannot be written ({error}). Expected a place to write.") from error
        raise
