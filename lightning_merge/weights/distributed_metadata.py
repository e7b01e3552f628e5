"""What a distributed checkpoint says of itself: which tensors there are and where their shards lie.

``.metadata`` is a pickle. It is read without running what it may hold: every class it may name is stood in for by an
inert record, and any other is refused by name.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_merge.errors import UserError
from lightning_merge.weights.tensor_info import TensorInfo, read_safetensors_layout

METADATA_FILE = ".metadata"
SHARDING_KEY = "DCP_SHARDING_INFO"  # in the header of safetensors files that hold parts of tensors
COMPLETE = "Expected the whole folder as torch.distributed.checkpoint wrote it; copy it again, or save again."
# What stands beside a model in a training checkpoint; under names of its own where the model has none.
_NO_MODEL = re.compile(
    r"(optim|optimizers?|optimizer_states?|lr_schedulers?|schedulers?|loops?|callbacks?|dataloaders?|train_state|rng(_states?)?"
    r"|hyper_parameters|hparams(_name)?|epoch|global_step|current_epoch)(_\d+)?"
)


@dataclass(frozen=True)
class Shard:
    """A box of a tensor, stored in row-major order; the file's bytes at ``position`` are it, or a record holding it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    position: int
    # Length of the record that torch.save wrote, or nothing where the bytes are the values.
    record: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


class Record:
    """Stands in for every class that metadata may name: keeps what is said of it and does nothing."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Record:
        record = super().__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, key: str) -> Any:
        return self.state[key]


class _Metadata(Record):
    pass


class _TensorMetadata(Record):
    pass


_METADATA = "torch.distributed.checkpoint.metadata"
_INERT = ("BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "TensorProperties")
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_HARMLESS: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _TensorMetadata,
    **{(_METADATA, name): Record for name in (*_INERT, "_MEM_FORMAT_ENCODING")},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Record,
    ("torch.serialization", "_get_layout"): Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, list, tuple, dict, int, float, bool, str)},
    **{(module, name): Record for module in ("pathlib", "pathlib._local") for name in _PATHS},
}


class Refused(pickle.UnpicklingError):
    """A class that metadata has no reason to name."""


class RestrictedUnpickler(pickle.Unpickler):
    """Rebuilds plain values and dtypes; of every other class it makes an inert record, or refuses it by name."""

    known: Mapping[tuple[str, str], Any] = _HARMLESS

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise Refused(f"{module}.{name}")


def read_metadata(path: Path) -> tuple[dict[str, TensorInfo], dict[str, list[Shard]]]:
    """Read ``.metadata`` without running what it may hold, and keep the model's tensors."""
    file = path / METADATA_FILE
    try:
        metadata = RestrictedUnpickler(io.BytesIO(file.read_bytes())).load()
    except Refused as error:
        raise UserError(
            f"'{file}' holds an object of {error}, and rebuilding it could run code, so it is not loaded. "
            "Expected the metadata of torch.distributed.checkpoint, which describes tensors only."
        ) from error
    except Exception as error:  # of any kind: the bytes may say anything
        reason = re.split(r"\.\s|\n", str(error))[0]
        raise UserError(f"'{file}' cannot be read as metadata ({reason}). {COMPLETE}") from error
    try:
        if not isinstance(metadata, _Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
        described: dict[str, Record] = {
            key: entry for key, entry in metadata["state_dict_metadata"].items() if isinstance(entry, _TensorMetadata)
        }
        names = _model_names(described, metadata.state.get("planner_data") or {})
        stored = {
            (index["fqn"], tuple(index.state.get("offset") or ())): (index, place)
            for index, place in metadata["storage_data"].items()
        }
        infos, shards = {}, {}
        for key, name in names.items():
            properties = described[key]["properties"].state
            dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
            infos[name] = TensorInfo(tuple(map(int, described[key]["size"])), dtype)
            shards[name] = [_shard(path, key, chunk, stored) for chunk in described[key]["chunks"]]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"'{file}' cannot be read as metadata ({error}). {COMPLETE}") from error
    return infos, {name: [shard for shard in held if shard.numel] for name, held in shards.items()}


def _shard(path: Path, key: str, chunk: Record, stored: Mapping[Any, Any]) -> Shard:
    """Find where one chunk of a tensor lies."""
    offsets, sizes = tuple(map(int, chunk["offsets"])), tuple(map(int, chunk["sizes"]))
    if not math.prod(sizes):
        return Shard(offsets, sizes, path, 0)
    place = stored[key, offsets][1]
    if place.state.get("transform_descriptors"):
        raise UserError(
            f"Tensor '{key}' in '{path}' was stored through {', '.join(map(str, place['transform_descriptors']))}. "
            "Expected shards as they are; save again without stream transforms."
        )
    file = path / str(place["relative_path"])
    if path.resolve() not in file.resolve().parents:
        raise UserError(
            f"'{path / METADATA_FILE}' places the tensor '{key}' in '{place['relative_path']}', outside its folder. "
            f"{COMPLETE}"
        )
    position, length = int(place["offset"]), int(place["length"])
    if position < 0 or length <= 0 or min([*offsets, *sizes, 0]) < 0:
        raise ValueError(f"'{key}' lies at byte {position} over {length} bytes")
    return Shard(offsets, sizes, file, position, record=length)


def _model_names(keys: Iterable[str], paths: Mapping[str, tuple[Any, ...]]) -> dict[str, str]:
    """Return the model's name of each key that belongs to it: its path in the saved dict without the model's own."""
    full = {key: tuple(map(str, paths.get(key, (key,)))) for key in keys}
    if not paths:  # nothing tells where the dict was nested; only Lightning's own name is certain
        heads = {key: key.split(".", 1) for key in full}
        if any(head[0] == "state_dict" for head in heads.values()):
            full = {key: tuple(head) for key, head in heads.items()}
    for group in ("state_dict", "model"):
        inner = {key: ".".join(path[1:]) for key, path in full.items() if len(path) > 1 and path[0] == group}
        if inner:
            return inner
    return {
        key: ".".join(path)
        for key, path in full.items()
        if not _NO_MODEL.fullmatch(path[0] if len(path) > 1 else path[0].partition(".")[0])
    }


def read_sharded_safetensors(path: Path) -> tuple[dict[str, TensorInfo], dict[str, list[Shard]]]:
    """Read the headers of safetensors files that hold parts of tensors, and where in the tensors the parts belong."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    shards: dict[str, list[Shard]] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors, metadata, starts = read_safetensors_layout(file)
        try:
            parts = json.loads(metadata[SHARDING_KEY])
            offsets = {name: tuple(int(offset) for offset in parts[name]["saved_offsets"]) for name in tensors}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"'{file}' does not say which parts of tensors it holds ({SHARDING_KEY} in its header). {COMPLETE}"
            ) from error
        for name, info in tensors.items():
            if len(offsets[name]) != len(info.shape) or dtypes.setdefault(name, info.dtype) != info.dtype:
                raise UserError(
                    f"The part of tensor '{name}' in '{file}' has shape {list(info.shape)} at {list(offsets[name])} in "
                    f"{info.dtype}, another in {dtypes[name]}. {COMPLETE}"
                )
            ends = tuple(offset + size for offset, size in zip(offsets[name], info.shape, strict=True))
            shapes[name] = tuple(map(max, ends, shapes[name])) if name in shapes else ends
            if info.numel:
                shards.setdefault(name, []).append(Shard(offsets[name], info.shape, file, starts[name]))
    return {name: TensorInfo(shapes[name], dtypes[name]) for name in shapes}, {
        name: shards.get(name, []) for name in shapes
    }
