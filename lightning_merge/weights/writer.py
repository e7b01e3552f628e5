"""Safetensors files written in place, beside their target, and renamed when whole."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.weights.tensor_info import SAFETENSORS_DTYPES, TensorInfo

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def safetensors_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """Return a file's header, where in the file each tensor begins, and the file's size in bytes.

    Raises:
        UserError: A dtype that safetensors cannot hold.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offsets: dict[str, int] = {}
    offset = 0
    # Widest types first keeps every tensor aligned to its own item size.
    for name in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)):
        info = tensors[name]
        if info.dtype not in _DTYPE_NAMES:
            raise UserError(f"Tensor '{name}' has dtype {info.dtype}, which safetensors cannot hold.")
        header[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offsets[name] = offset
        offset += info.nbytes
    encoded = json.dumps(header, separators=(",", ":"), sort_keys=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    begin = 8 + len(encoded)
    return struct.pack("<Q", len(encoded)) + encoded, {name: begin + at for name, at in offsets.items()}, begin + offset


class SafetensorsWriter:
    """Write tensors, or flat pieces of them, in any order; the file appears under its name only when complete.

    The header goes first and the space is reserved, so that memory holds one piece at a time. Used as a context
    manager: on an exception the unfinished file is removed.

    Args:
        path: Where the finished file shall stand.
        tensors: Shape and dtype of every tensor that will be written.
        metadata: Free text for the header; safetensors allows strings only.

    Raises:
        UserError: A dtype that safetensors cannot hold; on closing, a tensor that was not written whole.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._tensors = dict(tensors)
        self._missing = {name: info.numel for name, info in tensors.items()}
        # Threads that finish chunks of one tensor at once share this count.
        self._counting = threading.Lock()
        header, self._offsets, end = safetensors_header(tensors, metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.pwrite(self._file, header, 0)
        os.truncate(self._file, end)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write ``values``, flattened, into tensor ``name`` from its flat index ``start`` on; safe from any thread."""
        info = self._tensors[name]
        if values.dtype != info.dtype or start + values.numel() > info.numel:
            raise ValueError(
                f"'{name}' announced {info}, got {values.numel()} entries of {values.dtype} at index {start}."
            )
        data = memoryview(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        position = self._offsets[name] + start * info.dtype.itemsize
        while data:
            written = os.pwrite(self._file, data, position)
            data, position = data[written:], position + written
        with self._counting:
            self._missing[name] -= values.numel()

    def close(self) -> None:
        """Check that every tensor is whole, flush to the disk and give the file its name."""
        incomplete = [name for name, count in self._missing.items() if count]
        if incomplete:
            self.abort()
            raise UserError(f"Tensor '{incomplete[0]}' was not written whole ({len(incomplete)} incomplete).")
        os.fsync(self._file)
        os.close(self._file)
        os.replace(self.partial, self.path)

    def abort(self) -> None:
        """Drop the unfinished file."""
        os.close(self._file)
        self.partial.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict to a safetensors file that appears whole or not at all.

    Args:
        state_dict: Tensors of any dtype safetensors holds; views and tied tensors are written out.
        path: The file to write; an existing one is replaced.
        metadata: Free text for the header.
    """
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state_dict.items()}
    with SafetensorsWriter(Path(path), infos, metadata) as writer:
        for name, value in state_dict.items():
            writer.write(name, value)
