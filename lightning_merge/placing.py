"""Give a finished merge its name: the weights, and everything that stands beside them, appear at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_merge.journal import Workplace
from lightning_merge.outputs import is_folder, record_of
from lightning_merge.recipe import to_yaml
from lightning_merge.weights import WeightSource
from lightning_merge.weights.folder import copy_companions, write_text
from lightning_merge.weights.quantized import quantization_settings

if TYPE_CHECKING:
    from lightning_merge.merging import MergeReport


def put_in_place(
    place: Workplace,
    output: Path,
    report: MergeReport,
    record: dict[str, Any],
    card: str,
    template: WeightSource,
    companions: Mapping[str, str | bytes | Path] | None,
    dtype: torch.dtype | None,
) -> None:
    """Write what stands beside the weights, and give everything its name."""
    files = place.files
    text = json.dumps(record, indent=2) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    if not is_folder(output):
        # No record may vouch for weights it does not describe, even if the process is killed between the two.
        place.placing()
        record_of(output).unlink(missing_ok=True)
        os.replace(files / output.name, output)
        write_text(record_of(output), text)
        return
    if companions is None:
        if template.folder:
            stated = template.folder / "config.json"
            restored = stated.is_file() and bool(quantization_settings(json.loads(stated.read_text(encoding="utf-8"))))
            copy_companions(template.folder, files, torch.float32 if restored and not dtype else dtype, restored)
    else:
        for name, content in companions.items():
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, files / name)
            else:
                (files / name).write_bytes(content.encode() if isinstance(content, str) else content)
    write_text(files / "merge.yaml", to_yaml(report.recipe))
    write_text(files / "merge.json", text)
    write_text(files / "README.md", card)
    if output.exists():
        try:
            os.replace(output, place.replaced)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            for path in sorted(files.iterdir(), key=lambda path: path.name == "merge.json"):
                shutil.move(path, output / path.name)  # a place where a disk is mounted keeps its own name
            return
    os.replace(files, output)
