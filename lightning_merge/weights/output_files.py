"""The safetensors file, or the shards with their index, of a model: space reserved first, written in place."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.weights.tensor_info import TensorInfo
from lightning_merge.weights.writer import safetensors_header

INDEX_FILE = "model.safetensors.index.json"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """Return a number of bytes, from ``"5GB"``, ``"200MiB"`` or a plain number.

    Raises:
        UserError: Not a size.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(text))
    unit = found.group(2).upper() if found else "?"
    if found is None or unit not in _UNITS or not float(found.group(1)) > 0:
        raise UserError(f"'{text}' is no size. Expected a number of bytes, or one such as 5GB, 500MB or 2GiB.")
    return int(float(found.group(1)) * _UNITS[unit])


class OutputFiles:
    """Where every tensor of the output lies, in one file or in several.

    Any number of threads and processes may write at once; each opens the files for itself (the object is pickled
    without them). Written are the same bytes, however the work is divided.

    Args:
        folder: Where the files stand.
        tensors: Shape and dtype of every tensor.
        max_shard_bytes: How large a file may become; a tensor that is larger has one of its own.
        file_name: Of the one file, if there is one.

    Cost: nothing of the tensors is held.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        max_shard_bytes: int | None = None,
        file_name: str = "model.safetensors",
    ) -> None:
        self.folder, self.tensors = folder, dict(tensors)
        shards: list[dict[str, TensorInfo]] = [{}]
        size = 0
        for name in sorted(tensors, key=_natural):
            if name == "__metadata__":
                raise UserError("A tensor cannot be called '__metadata__': safetensors keeps its own notes there.")
            nbytes = tensors[name].nbytes
            if max_shard_bytes is not None and shards[-1] and size + nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = tensors[name]
            size += nbytes
        count = len(shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        names = names if count > 1 else [file_name]
        self.shards = dict(zip(names, shards, strict=True))
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for file, held in self.shards.items():
            header, offsets, end = safetensors_header(held)
            self._headers[file], self._sizes[file] = header, end
            self._places.update({name: (file, offset) for name, offset in offsets.items()})
        self._open: dict[str, int] = {}
        self._opening = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.folder / file for file in self.shards]

    @property
    def reserved(self) -> int:
        """Bytes of the disk that the files take already."""
        return sum(path.stat().st_blocks * 512 for path in self.paths if path.is_file())

    def create(self) -> None:
        """Write the headers and reserve the space, so that a full disk is noticed before any work.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        for file, header in self._headers.items():
            descriptor = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                try:
                    os.posix_fallocate(descriptor, 0, self._sizes[file])
                except (AttributeError, OSError) as error:
                    if isinstance(error, OSError) and error.errno in {28, 122}:  # no space, quota
                        raise
                    os.truncate(descriptor, self._sizes[file])
                os.pwrite(descriptor, header, 0)
            finally:
                os.close(descriptor)

    def stand(self) -> bool:
        """Tell whether the files of this very layout stand there already, whole or begun."""
        for file, header in self._headers.items():
            path = self.folder / file
            if not path.is_file() or path.stat().st_size != self._sizes[file]:
                return False
            with path.open("rb") as stream:
                if stream.read(len(header)) != header:
                    return False
        return True

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write ``values``, flattened, into tensor ``name`` from its flat index ``start`` on."""
        info = self.tensors[name]
        if values.dtype != info.dtype or start + values.numel() > info.numel:
            raise ValueError(f"'{name}' announced {info}, got {values.numel()} of {values.dtype} at index {start}.")
        file, offset = self._places[name]
        data = memoryview(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        position = offset + start * info.dtype.itemsize
        descriptor = self._descriptor(file)
        while data:
            written = os.pwrite(descriptor, data, position)
            data, position = data[written:], position + written

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            with self._opening:
                if file not in self._open:
                    self._open[file] = os.open(self.folder / file, os.O_RDWR)
        return self._open[file]

    def finish(self) -> None:
        """Flush everything to the disk; write the index of several files."""
        for file in self.shards:
            os.fsync(self._descriptor(file))
        self.close()
        if len(self.shards) > 1:
            index = {
                "metadata": {"total_size": sum(info.nbytes for info in self.tensors.values())},
                "weight_map": {name: self._places[name][0] for name in sorted(self.tensors, key=_natural)},
            }
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_opening": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opening = threading.Lock()


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort layer 2 before layer 10, so that a shard holds neighbouring layers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
