"""Checkpoints that several processes wrote together, read by one: shards are put together tensor by tensor.

The folders of ``torch.distributed.checkpoint`` (plain, or written by Lightning and Fabric under FSDP and
``ModelParallelStrategy``) hold ``.metadata``, which says where the shards of each tensor lie, and ``*.distcp`` files.
Those of its ``HuggingFaceStorageWriter`` hold safetensors files that say of which tensors they carry a part.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.weights.distributed_metadata import (
    COMPLETE,
    METADATA_FILE,
    SHARDING_KEY,
    Record,
    RestrictedUnpickler,
    Shard,
    read_metadata,
    read_sharded_safetensors,
)
from lightning_merge.weights.source import INDEX_FILE, SINGLE_FILE, WeightSource
from lightning_merge.weights.tensor_info import TensorInfo, read_safetensors_layout


def is_distributed(path: Path) -> bool:
    """Tell whether a folder holds a distributed checkpoint, complete or not."""
    if (path / METADATA_FILE).is_file() or next(path.glob("*.distcp"), None) is not None:
        return True
    if (path / INDEX_FILE).is_file() or (path / SINGLE_FILE).is_file():
        return False  # whole tensors, whoever wrote them
    first = next(iter(sorted(path.glob("*.safetensors"))), None)
    return first is not None and SHARDING_KEY in read_safetensors_layout(first)[1]


def open_distributed(path: Path, label: str, prefix: str = "") -> WeightSource:
    """Open a distributed checkpoint without a process group and without reading values.

    Optimizer, scheduler and loop entries are left out; the model's own part (``state_dict``, ``model``) loses its name.

    Args:
        path: The folder.
        label: How messages call it.
        prefix: Keep the tensors whose name begins with it, and drop it.

    Raises:
        UserError: The metadata holds objects that only running code could rebuild (they are named), files or shards
            are missing, truncated, compressed, or do not fit together.

    Cost: the metadata; later each tensor is read alone, in the pieces asked for.
    """
    if (path / METADATA_FILE).is_file():
        infos, shards = read_metadata(path)
    elif next(path.glob("*.distcp"), None) is not None:
        raise UserError(f"'{label}' lacks '{METADATA_FILE}': its save was not finished. {COMPLETE}")
    else:
        infos, shards = read_sharded_safetensors(path)
    if prefix:
        if not any(name.startswith(prefix) for name in infos):
            first = next(iter(infos), "none")
            raise UserError(f"No tensor of '{label}' begins with the prefix '{prefix}'. Its first is '{first}'.")
        infos = {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}
        shards = {name.removeprefix(prefix): held for name, held in shards.items() if name.startswith(prefix)}
    if not infos:
        raise UserError(f"'{label}' holds no tensors of a model. Expected them under 'state_dict' or 'model'.")
    sizes: dict[Path, int] = {}
    for name, info in infos.items():
        if not _tiles(info.shape, [(shard.offsets, shard.sizes) for shard in shards[name]]):
            raise UserError(
                f"The {len(shards[name])} shards of tensor '{name}' in '{label}' do not make up its shape "
                f"{list(info.shape)}: a part is missing or stands there twice. {COMPLETE}"
            )
        for shard in shards[name]:
            if shard.file not in sizes:
                if not shard.file.is_file():
                    raise UserError(
                        f"'{label}' lacks the file '{shard.file.name}', which holds a part of '{name}'. {COMPLETE}"
                    )
                sizes[shard.file] = shard.file.stat().st_size
            needed = shard.position + (shard.record or shard.numel * info.dtype.itemsize)
            if needed > sizes[shard.file]:
                raise UserError(
                    f"'{shard.file}' is truncated: tensor '{name}' ends at byte {needed}, the file holds "
                    f"{sizes[shard.file]}. {COMPLETE}"
                )
    return DistributedSource(path, label, prefix, infos, shards)


class DistributedSource(WeightSource):
    """Weights in shards of several files; pieces are read and put together when they are asked for."""

    def __init__(
        self,
        path: Path,
        label: str,
        prefix: str,
        infos: Mapping[str, TensorInfo],
        shards: Mapping[str, list[Shard]],
    ) -> None:
        self.label = label
        self.prefix = prefix
        self.folder = path if (path / "config.json").is_file() else None
        metadata = [path / METADATA_FILE] if (path / METADATA_FILE).is_file() else []
        self.files = tuple(sorted({shard.file for held in shards.values() for shard in held} | set(metadata)))
        self.tensors = dict(infos)
        self.aliases = {}
        self._shards = dict(shards)
        self._starts: dict[Shard, int | None] = {}
        self._descriptors: dict[Path, _Descriptor] = {}

    def read(self, name: str) -> Tensor:
        """Return a tensor put together from its shards, in memory of its own."""
        info = self.tensors[name]
        return self.read_flat(name, 0, info.numel).reshape(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return a flat piece; only the shards that hold a part of it are read, and of those only the rows needed."""
        info = self.tensors[name]
        ones = next((axis for axis, size in enumerate(info.shape) if size != 1), len(info.shape))
        shape = info.shape[ones:] or (1,)  # leading axes of size 1 tell nothing
        inner = math.prod(shape[1:])
        if stop <= start or not inner:
            return torch.empty(0, dtype=info.dtype)
        if any(shard.sizes[ones + 1 :] != shape[1:] for shard in self._shards[name]):
            return self._read_rows(name, ones, shape, start, stop)
        flat = torch.empty(stop - start, dtype=info.dtype)
        for shard in self._shards[name]:
            offset = shard.offsets[ones] * inner if len(shard.offsets) > ones else 0
            begin, end = max(start, offset), min(stop, offset + shard.numel)
            if (begin, end) == (start, stop):
                return self._values(name, shard, start - offset, stop - offset)
            if begin < end:
                flat[begin - start : end - start] = self._values(name, shard, begin - offset, end - offset)
        return flat

    def _read_rows(self, name: str, ones: int, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Return a flat piece of a tensor that is cut along other axes than its first: the rows it lies in, whole."""
        inner = math.prod(shape[1:])
        first, last = start // inner, -(-stop // inner)
        rows = torch.empty(last - first, *shape[1:], dtype=self.tensors[name].dtype)
        for shard in self._shards[name]:
            offsets, sizes = shard.offsets[ones:], shard.sizes[ones:]
            begin, end = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
            if begin < end:
                width = math.prod(sizes[1:])
                values = self._values(name, shard, (begin - offsets[0]) * width, (end - offsets[0]) * width)
                across = (slice(offset, offset + size) for offset, size in zip(offsets[1:], sizes[1:], strict=True))
                place = (slice(begin - first, end - first), *across)
                rows[place] = values.reshape(end - begin, *sizes[1:])
        return rows.reshape(-1)[start - first * inner : stop - first * inner]

    def _values(self, name: str, shard: Shard, start: int, stop: int) -> Tensor:
        """Return a flat piece of one shard."""
        dtype = self.tensors[name].dtype
        try:
            if shard.file not in self._descriptors:
                self._descriptors[shard.file] = _Descriptor(shard.file)
            descriptor = self._descriptors[shard.file]
            if shard not in self._starts:
                self._starts[shard] = _find_values(descriptor, shard, dtype)
            position = self._starts[shard]
            self._bytes_read += (stop - start) * dtype.itemsize  # threads may lose a count: it is for reports
            if position is not None:
                return descriptor.read(position + start * dtype.itemsize, stop - start, dtype)
            record = io.BytesIO(descriptor.read(shard.position, shard.record or 0, torch.uint8).numpy().tobytes())
            values = torch.load(record, map_location="cpu", weights_only=True)
            if not isinstance(values, Tensor) or tuple(values.shape) != shard.sizes or values.dtype != dtype:
                raise ValueError("it is not the tensor that the metadata announces")
            return values.detach().reshape(-1)[start:stop]
        except Exception as error:  # of any kind: the bytes may say anything
            reason = re.split(r"\.\s|\n", str(error))[0]
            raise UserError(f"Tensor '{name}' cannot be read from '{shard.file}' ({reason}). {COMPLETE}") from error

    def __getstate__(self) -> dict[str, Any]:
        # A file descriptor does not travel to another process; it is opened again on first use.
        return {**self.__dict__, "_descriptors": {}}


def _tiles(shape: tuple[int, ...], boxes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Tell whether boxes (offsets, sizes) fill a shape, each entry once; they lie as a grid, axis by axis."""
    filled = [(offsets, sizes) for offsets, sizes in boxes if math.prod(sizes)]
    if not math.prod(shape):
        return not filled
    if not shape:
        return len(filled) == 1
    groups: dict[tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for offsets, sizes in filled:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return False
        groups.setdefault((offsets[0], sizes[0]), []).append((offsets[1:], sizes[1:]))
    reached = 0
    for (offset, size), rest in sorted(groups.items(), key=lambda item: item[0]):
        if offset != reached or not _tiles(shape[1:], rest):
            return False
        reached += size
    return reached == shape[0]


# --- files -----------------------------------------------------------------------------------------------------------


class _Descriptor:
    """A file open for reading as long as this object lives; any thread may read anywhere."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def read(self, position: int, count: int, dtype: torch.dtype) -> Tensor:
        """Read ``count`` entries into memory of their own."""
        values = torch.empty(count, dtype=dtype)
        place = memoryview(values.view(torch.uint8).numpy().data)
        while place:
            done = os.preadv(self.number, [place], position)
            if not done:
                raise OSError("the file ends before the tensor does")
            place, position = place[done:], position + done
        return values

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _Window(io.RawIOBase):
    """A stretch of a file, as a file of its own."""

    def __init__(self, descriptor: _Descriptor, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._position = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(
            0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        )
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        done = os.preadv(self._descriptor.number, [memoryview(buffer)[:count]], self._start + self._position)
        self._position += done
        return done


class _TensorUnpickler(RestrictedUnpickler):
    """Reads how a record of torch.save rebuilds its one tensor: from which storage, offset, sizes and strides."""

    known = {("torch._utils", f"_rebuild_tensor_{version}"): Record for version in ("v2", "v3")} | {
        ("collections", "OrderedDict"): dict
    }

    def find_class(self, module: str, name: str) -> Any:
        if module in {"torch", "torch.storage"} and name.endswith("Storage"):
            return name
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _find_values(descriptor: _Descriptor, shard: Shard, dtype: torch.dtype) -> int | None:
    """Return where in the file a shard's values begin; nothing if its record is of a rarer form than torch.save's."""
    if shard.record is None:
        return shard.position
    window = _Window(descriptor, shard.position, shard.record)
    with zipfile.ZipFile(io.BufferedReader(window)) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
        try:
            rebuilt = _TensorUnpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load()
            storage, offset, sizes, strides = rebuilt.arguments[:4]
            data = entries[f"data/{storage[2]}"]
        except (pickle.UnpicklingError, AttributeError, TypeError, ValueError, KeyError, IndexError):
            return None
        rows_first = _row_major(tuple(sizes)) == tuple(strides) or math.prod(sizes) <= 1
        held = (offset + shard.numel) * dtype.itemsize <= data.file_size
        expected = tuple(sizes) == shard.sizes and rows_first and held and data.compress_type == zipfile.ZIP_STORED
        if not expected or order != sys.byteorder.encode():
            return None
        local = shard.position + data.header_offset
        # In front of the values: 30 bytes, of which the last four tell the length of the name and of the padding.
        lengths = descriptor.read(local + 26, 4, torch.uint8).numpy().tobytes()
        begin = local + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return begin + offset * dtype.itemsize


def _row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
