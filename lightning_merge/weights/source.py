"""Anything that holds weights, opened lazily: names, shapes and dtypes first, values on demand."""

from __future__ import annotations

import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.weights.tensor_info import TensorInfo, read_safetensors_layout

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class WeightSource(ABC):
    """A set of named tensors whose values are read when asked for.

    Attributes:
        label: How messages call this source: its path, or the class of the module.
        tensors: Shape and dtype by name, tied copies left out.
        aliases: Names that share memory with another tensor, each with the name it is stored under.
        buffers: Names known to be buffers (only a live module knows).
        folder: The folder with config and tokenizer, where there is one.
        files: The files that hold the values.
        metadata: Free text the file carries about itself.
        prefix: What was dropped from the names of the file.
        inner: The sources that a view reads from.
    """

    label: str
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    buffers: frozenset[str] = frozenset()
    folder: Path | None = None
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = {}
    prefix: str = ""
    # The sources that this one reads from, where it is a view of others.
    inner: tuple[WeightSource, ...] = ()
    # Whether values are computed when they are read, so that their dtype says nothing of how models were stored.
    computed: bool = False
    # Whose card states the licence, where that is another than ``folder``; and what a user should know.
    card_folder: Path | None = None
    notes: tuple[str, ...] = ()
    _bytes_read: int = 0

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far, piece by piece."""
        return self._bytes_read + sum(source.bytes_read for source in self.inner)

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return the tensor called ``name`` (or one of its tied names); memory-mapped where the source is a file.

        The values are the source's own: read them, never write to them.
        """

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return the entries ``start:stop`` of the flattened tensor, in the stored dtype; to read, not to write to."""
        return self.read(name).reshape(-1)[start:stop]

    def read_into(self, out: Tensor, name: str, start: int) -> None:
        """Write the entries of the flattened tensor from ``start`` on into ``out``, flat, in the dtype of ``out``."""
        out.copy_(self.read_flat(name, start, start + out.numel()))

    def stored_name(self, name: str) -> str | None:
        """Return the name under which ``name`` is stored here (itself, or the tensor it is tied to), or ``None``."""
        if name in self.tensors:
            return name
        return self.aliases.get(name)

    @property
    def config(self) -> dict[str, Any] | None:
        """The ``config.json`` of the folder, where there is one."""
        path = self.folder / "config.json" if self.folder else None
        if path is None or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"'{path}' is no JSON ({error}). Expected the config of a Hugging Face model.") from error
        return content if isinstance(content, dict) else None

    @property
    def numel(self) -> int:
        """Number of entries over all stored tensors."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self.label}', {len(self.tensors)} tensors)"


class SafetensorsSource(WeightSource):
    """Weights in one or several safetensors files; whole tensors are memory-mapped, pieces read into memory."""

    def __init__(self, label: str, files: list[Path], folder: Path | None = None) -> None:
        self.label = label
        self.folder = folder
        self.files = tuple(files)
        self.aliases = {}
        self.tensors = {}
        self.metadata = {}
        self._file_of: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self._descriptors: dict[Path, _Descriptor] = {}
        self._offsets: dict[str, int] = {}
        for file in files:
            tensors, metadata, offsets = read_safetensors_layout(file)
            self._offsets.update(offsets)
            self.metadata = {**self.metadata, **metadata}
            for name, info in tensors.items():
                if name in self._file_of:
                    raise UserError(
                        f"Tensor '{name}' stands in two shards of '{label}': {self._file_of[name].name} and "
                        f"{file.name}. Expected each tensor once."
                    )
                self.tensors[name] = info
                self._file_of[name] = file

    def read(self, name: str) -> Tensor:
        """Return the tensor called ``name``, memory-mapped."""
        from safetensors import SafetensorError, safe_open

        file = self._file_of[name]
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(str(file), framework="pt").__enter__()
            return self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"Tensor '{name}' cannot be read from '{file}' ({error}). Expected an undamaged safetensors file."
            ) from error

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return a flat piece in memory of its own, by one read of the file."""
        values = torch.empty(stop - start, dtype=self.tensors[name].dtype)
        self._fill(values.view(torch.uint8).numpy().data, name, start)
        return values

    def read_into(self, out: Tensor, name: str, start: int) -> None:
        """Fill ``out``; what has to be converted passes a buffer that stays in the processor's cache."""
        dtype = self.tensors[name].dtype
        if out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu":
            self._fill(out.view(torch.uint8).numpy().data, name, start)
            return
        size = out.numel() * dtype.itemsize
        if size > _SCRATCH:
            out.copy_(self.read_flat(name, start, start + out.numel()))
            return
        buffer, place = _scratch()
        self._fill(place[:size], name, start)
        out.copy_(buffer[:size].view(dtype))

    def _fill(self, place: memoryview, name: str, start: int) -> None:
        """Read bytes of a tensor from its flat index ``start`` on."""
        file = self._file_of[name]
        position = self._offsets[name] + start * self.tensors[name].dtype.itemsize
        try:
            # Two threads may both open the file; one descriptor stays, and a local name keeps it open meanwhile.
            descriptor = self._descriptors.get(file) or self._descriptors.setdefault(file, _Descriptor(file))
            while place:
                count = os.preadv(descriptor.number, [place], position)
                if not count:
                    raise OSError("the file ends before the tensor does")
                place, position = place[count:], position + count
                self._bytes_read += count  # threads may lose a count: it is for reports
        except OSError as error:
            raise UserError(
                f"Tensor '{name}' cannot be read from '{file}' ({error}). Expected an undamaged safetensors file."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        # A file handle does not travel to another process; it is opened again on first use.
        return {**self.__dict__, "_handles": {}, "_descriptors": {}}


_SCRATCH = 1 << 21
_threads = threading.local()


def _scratch() -> tuple[Tensor, memoryview]:
    """Return this thread's buffer, as a tensor of bytes and as the memory below it."""
    if not hasattr(_threads, "scratch"):
        buffer = torch.empty(_SCRATCH, dtype=torch.uint8)
        _threads.scratch = buffer, buffer.numpy().data
    scratch: tuple[Tensor, memoryview] = _threads.scratch
    return scratch


class _Descriptor:
    """A file open for reading as long as this object lives."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class MemorySource(WeightSource):
    """Weights that live in memory (or in a memory-mapped checkpoint) as a state dict; tied tensors are recognised."""

    def __init__(
        self,
        label: str,
        state_dict: Mapping[str, Tensor],
        buffers: frozenset[str] = frozenset(),
        files: tuple[Path, ...] = (),
        folder: Path | None = None,
        prefix: str = "",
    ) -> None:
        self.label = label
        self.files = files
        self.prefix = prefix
        self.folder = folder
        self.buffers = buffers
        self.tensors = {}
        self.aliases = {}
        self._values: dict[str, Tensor] = {}
        owners: dict[tuple[Any, ...], str] = {}
        for name, value in state_dict.items():
            if not isinstance(value, Tensor):
                continue  # extra state of a module is no weight
            value = value.detach()
            key = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            if value.numel() and key in owners:
                self.aliases[name] = owners[key]
                continue
            owners[key] = name
            self.tensors[name] = TensorInfo(tuple(value.shape), value.dtype)
            self._values[name] = value

    def __getstate__(self) -> dict[str, Any]:
        # A checkpoint is opened again elsewhere: its values need not travel.
        reopened = len(self.files) == 1 and self.files[0].suffix in {".ckpt", ".pt", ".pth", ".bin"} and not self.folder
        return {**self.__dict__, "_values": {}} if reopened else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.tensors and not self._values:
            from lightning_merge.weights.opening import open_checkpoint

            opened = open_checkpoint(self.files[0], self.label, self.prefix)
            assert isinstance(opened, MemorySource)
            self._values = opened._values

    def read(self, name: str) -> Tensor:
        """Return the tensor called ``name``, sharing memory with its owner."""
        return self._values[self.aliases.get(name, name)]
