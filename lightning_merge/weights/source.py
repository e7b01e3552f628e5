"""Anything that holds weights, opened lazily: names, shapes and dtypes first, values on demand."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.errors import UserError
from lightning_merge.weights.tensor_info import TensorInfo, read_safetensors_layout

ACCEPTED = (
    "Accepted: a Hugging Face folder (config.json beside model.safetensors or its shards), a .safetensors file, "
    "a Lightning .ckpt or another file of torch.save that loads with weights_only=True, "
    "'package:NAME/FOLDER' for a folder inside an installed package, 'owner/name@revision' on the Hub, "
    "an nn.Module, a state dict."
)
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
            if file not in self._descriptors:
                self._descriptors[file] = _Descriptor(file)
            number = self._descriptors[file].number
            while place:
                count = os.preadv(number, [place], position)
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

    def read(self, name: str) -> Tensor:
        """Return the tensor called ``name``, sharing memory with its owner."""
        return self._values[self.aliases.get(name, name)]


def open_weights(ref: Any, prefix: str = "") -> WeightSource:
    """Open anything that holds weights without reading the values.

    Args:
        ref: A Hugging Face folder (sharded or not), a ``.safetensors`` file, a Lightning ``.ckpt`` (or another file
            of ``torch.save``), ``package:NAME/FOLDER``, ``owner/name@revision`` on the Hub, an ``nn.Module``, a state
            dict, or a :class:`WeightSource`, which is returned as it is.
        prefix: For checkpoints: keep the tensors whose name begins with it, and drop it (``model.``).

    Raises:
        UserError: Nothing is there, the file is damaged, or loading it would run code.

    Cost: the headers are read, nothing else.
    """
    from lightning_merge.weights.distributed import is_distributed, open_distributed
    from lightning_merge.weights.quantized import refuse_quantized_file, restored

    if isinstance(ref, WeightSource):
        return ref
    if isinstance(ref, nn.Module):
        state_dict = ref.state_dict(keep_vars=True)
        parameters = {id(parameter) for parameter in ref.parameters()}
        buffers = frozenset(name for name, value in state_dict.items() if id(value) not in parameters)
        return restored(MemorySource(type(ref).__name__, state_dict, buffers=buffers))
    if isinstance(ref, Mapping):
        return restored(MemorySource("state dict", ref))
    if not isinstance(ref, (str, Path)):
        raise UserError(f"An object of type {type(ref).__name__} holds no weights that can be opened. {ACCEPTED}")
    path = resolve_path(ref)
    if path.is_dir():
        if is_distributed(path):
            return restored(open_distributed(path, str(ref), prefix))
        return restored(_open_folder(path, str(ref)))
    refuse_quantized_file(path)
    if path.suffix == ".safetensors":
        folder = path.parent if (path.parent / "config.json").is_file() else None
        return restored(SafetensorsSource(str(ref), [path], folder=folder))
    if path.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        return _open_checkpoint(path, str(ref), prefix)
    raise UserError(f"'{ref}' has the unknown suffix '{path.suffix}'. {ACCEPTED}")


def resolve_path(ref: str | Path) -> Path:
    """Return the local path a reference names: itself, a folder of an installed package, or a snapshot of the Hub.

    Raises:
        UserError: Nothing is there.
    """
    text = str(ref)
    if not text.strip():
        raise UserError(f"'{text}' names no model. {ACCEPTED}")
    if text.startswith("package:"):
        package, _, inner = text.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None  # does not import it
        if spec is None or spec.origin is None:
            if not package.isidentifier():
                raise UserError(f"'{text}' names no top-level package. Expected package:NAME/FOLDER.")
            hint = f"pip install {package.replace('_', '-')}"
            raise UserError(f"'{text}' names the package '{package}', which is not installed. Try: {hint}")
        path = Path(spec.origin).parent / inner
        if not path.exists():
            raise UserError(f"The package '{package}' holds no '{inner}'. Expected a folder or file inside it.")
        return path
    path = Path(text).expanduser()
    if path.exists():
        return path
    # A path with a typing error must not be looked up on the network: its first part would be a folder here.
    if re.fullmatch(r"[\w][\w.-]*/[\w.-]+(@[\w./-]+)?", text) and not path.parent.is_dir():
        return _snapshot(text)
    raise UserError(f"Nothing is at '{ref}'. {ACCEPTED}")


def _snapshot(ref: str) -> Path:
    """Fetch ``owner/name[@revision]`` from the Hub (weights, config, tokenizer and card; never code or pickles)."""
    from huggingface_hub import snapshot_download

    repository, _, revision = ref.partition("@")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md"]  # the card states the licence
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises many kinds: offline, unknown repository, gated, ...
        raise UserError(f"'{ref}' could not be fetched from the Hub: {error}. {ACCEPTED}") from error


def _open_folder(path: Path, label: str) -> WeightSource:
    """Open a Hugging Face folder: a single file, or shards with their index."""
    from lightning_merge.weights.quantized import refuse_quantized_file

    refuse_quantized_file(path)
    if (path / INDEX_FILE).is_file():
        try:
            weight_map = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"'{path / INDEX_FILE}' is no index of shards ({error}). Expected a 'weight_map'."
            ) from error
        for name, shard in weight_map.items():
            if not (path / shard).is_file():
                raise UserError(
                    f"'{label}' lacks the shard '{shard}', in which its index places the tensor '{name}'. "
                    "Expected every shard; copy or download it again."
                )
        source = SafetensorsSource(label, [path / name for name in shards], folder=path)
        missing = sorted(set(weight_map) - set(source.tensors))
        if missing:
            raise UserError(
                f"'{label}' lacks the tensor '{missing[0]}' ({len(missing)} missing), which its index places in "
                f"'{weight_map[missing[0]]}'. Expected complete shards."
            )
        return source
    if (path / SINGLE_FILE).is_file():
        return SafetensorsSource(label, [path / SINGLE_FILE], folder=path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"'{label}' is a PEFT adapter, not a full model. Expected it among the --models, with its model as --base."
        )
    safetensors = sorted(path.glob("*.safetensors"))
    if len(safetensors) == 1:
        return SafetensorsSource(label, safetensors, folder=path)
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    raise UserError(f"The folder '{label}' holds no model.safetensors (it holds {held}). {ACCEPTED}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a file of ``torch.save`` memory-mapped and without running any code it may hold.

    Raises:
        UserError: The file is damaged, or it holds objects that only running code could rebuild.
    """
    import warnings
    import zipfile

    if not path.stat().st_size:
        raise UserError(f"'{path}' is empty. Expected a checkpoint with a state_dict.")
    zipped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a damaged file seems to be
            # Checkpoints of old versions of PyTorch are no zip archives and cannot be memory-mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of any kind: the bytes may say anything
        with path.open("rb") as stream:
            begin = stream.read(1)
        named = re.search(r"GLOBAL\s+(\S+)", str(error))
        if named or ("nsupported" in str(error) and (zipped or begin == b"\x80")):
            what = f"an object of {named.group(1).rstrip('.,')}" if named else "an object"
            raise UserError(
                f"'{path}' holds {what}, and rebuilding it could run code, so it is not loaded. "
                "Expected plain tensors: save with save_weights_only=True, or as safetensors."
            ) from error
        known = zipped or begin in {b"\x80", b"P"}
        reason = re.split(r"\.\s|\n", str(error))[0] if known else "it was not written by torch.save"
        raise UserError(f"'{path}' cannot be read as a checkpoint ({reason}). {ACCEPTED}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}. Expected a checkpoint or a state dict.")
    return content


def _open_checkpoint(path: Path, label: str, prefix: str) -> WeightSource:
    """Open the state dict of a checkpoint; ``prefix`` selects and is dropped."""
    from lightning_merge.weights.quantized import restored

    content = read_checkpoint(path)
    state_dict = content.get("state_dict", content)
    state_dict = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    if prefix:
        chosen = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if not chosen:
            first = next(iter(state_dict), "none")
            raise UserError(f"No tensor of '{label}' begins with the prefix '{prefix}'. Its first is '{first}'.")
        state_dict = chosen
    if not state_dict:
        raise UserError(f"'{label}' holds no tensors. Expected a checkpoint with a state_dict.")
    return restored(MemorySource(label, state_dict, files=(path,), prefix=prefix))
