"""What stands at a merge's output: checks before, and the record, recipe and card beside the weights after."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.journal import begun
from lightning_merge.recipe import COMPUTED, to_yaml
from lightning_merge.weights import WeightSource, read_checkpoint
from lightning_merge.weights.card import Provenance, SourceRecord, model_card

if TYPE_CHECKING:
    from lightning_merge.merging import MergeReport


def is_folder(output: Path) -> bool:
    """Tell whether a folder is meant, by the name: files end in ``.safetensors`` or ``.ckpt``."""
    return output.suffix not in {".safetensors", ".ckpt"}


def record_of(output: Path) -> Path:
    """Where the provenance of an output stands: inside a folder, beside a file."""
    return output / "merge.json" if is_folder(output) else output.with_name(output.name + ".merge.json")


def refuse_other_content(output: Path, sources: Sequence[WeightSource], overwrite: bool) -> None:
    """Refuse to write over a source, or over anything that is not an earlier merge.

    Raises:
        UserError: With what stands there.
    """
    workplace = output.with_name(output.name + ".partial").resolve()
    for source in sources:
        if any(workplace in path.resolve().parents for path in source.files):
            raise UserError(
                f"The model '{source.label}' lies in '{workplace}', where the work on '{output.name}' happens. "
                "Expected another output."
            )
        places = [*source.files, *([source.folder] if source.folder else [])]
        if output.exists() and any(output.resolve() in [p.resolve(), *p.resolve().parents[:-1]] for p in places):
            raise UserError(f"The output '{output}' is or holds a model being merged. Expected another place.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    # Between the weights and their record a merge into one file may have been killed.
    halfway = not output.is_dir() and begun(output)
    if not ((output / "merge.json").is_file() or record_of(output).is_file() or halfway):
        raise UserError(f"The output '{output}' already holds something else. Expected a new or empty place.")
    if not overwrite and not halfway:
        raise UserError(f"The output '{output}' already holds another merge. Expected a new place, or --overwrite.")


def holds(output: Path, recipe_hash: str) -> bool:
    """Tell whether this very merge stands there already."""
    try:
        known = json.loads(record_of(output).read_text(encoding="utf-8"))
        sizes = known["files"]
        whole = all((output.parent / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # damaged, or of another version
    return bool(whole and known.get("recipe_hash") == recipe_hash)


def digest(content: Any) -> str:
    """Return a sha256 of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what took part in a merge."""
    import safetensors

    from lightning_merge import __version__

    return {
        "python": platform.python_version(),
        "lightning_merge": __version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }


def provenance(
    report: MergeReport,
    recipe_hash: str,
    sources: Mapping[str, WeightSource],
    hashes: Mapping[str, str],
    files: Mapping[str, int],
) -> dict[str, Any]:
    """Return what goes into ``merge.json``; ``files`` are the bytes of each file of weights, beside the output."""
    called_base = "base" if "base" not in hashes else "(base)"
    return {
        "recipe_hash": recipe_hash,
        "files": dict(files),
        "recipe": report.recipe,
        "sources": {
            name or called_base: {"reference": sources[name].label if name in sources else COMPUTED, "sha256": sha256}
            for name, sha256 in hashes.items()
        },
        "versions": versions(),
        "seconds": round(report.seconds, 3),
        "hashing_seconds": round(report.hashing_seconds, 3),
        "models_merged": list(report.models),
        "passes": report.passes,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "peak_memory_bytes": report.peak_memory_bytes,
        "findings": [asdict(finding) for finding in report.findings],
    }


def card_text(
    report: MergeReport,
    how: str,
    sources: Mapping[str, WeightSource],
    hashes: Mapping[str, str],
    title: str | None,
    results: str = "",
) -> str:
    """Return the model card of a finished merge; ``how`` names methods and papers in a line."""
    records = {
        name: SourceRecord.of(name or "base", sources[name], sha256)
        if name in sources
        else SourceRecord(name, COMPUTED, sha256, None)
        for name, sha256 in hashes.items()
    }
    return model_card(
        title or report.output.name,
        how,
        to_yaml(report.recipe),
        records.pop("", None),
        list(records.values()),
        {"seed": str(report.recipe.get("seed", 0)), "bytes": f"{report.bytes_written:,}"},
        results,
        provenance=Provenance(
            versions(),
            {"draws and rounding": int(report.recipe.get("seed", 0))},
            round(report.seconds, 2),
            round(report.hashing_seconds, 2),
        ),
    )


def write_checkpoint(merged: Mapping[str, Tensor], path: Path, template: WeightSource) -> None:
    """Write a Lightning checkpoint with the template's hyper-parameters and other tensors; optimizers no longer apply.

    Args:
        merged: The merged tensors by the template's names, in their shapes.
        path: The file.
        template: What the merged model looks like.
    """
    content: dict[str, Any] = {}
    if template.files and template.files[0].suffix == ".ckpt":
        content = read_checkpoint(template.files[0])
    content = {k: v for k, v in content.items() if k not in {"optimizer_states", "lr_schedulers", "loops", "callbacks"}}
    state_dict = dict(content.get("state_dict", {}))
    state_dict.update({template.prefix + name: values for name, values in merged.items()})
    # Lightning migrates a checkpoint by the version that wrote it, and refuses one that names none.
    defaults = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": version("lightning")}
    with path.open("wb") as stream:  # given a path, torch would write the file's name into the file
        torch.save({**defaults, **content, "state_dict": state_dict}, stream)
