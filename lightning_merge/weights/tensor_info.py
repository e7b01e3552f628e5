"""Names, shapes and dtypes of tensors, as the header of a safetensors file states them."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_merge.errors import UserError

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}

# A header beyond this is not a header: the safetensors format itself allows 100 MB.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one tensor, known without reading its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes the values take."""
        return self.numel * self.dtype.itemsize


def read_safetensors_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read names, shapes and dtypes, and the free metadata, of a safetensors file without touching its values.

    Raises:
        UserError: The file is missing, truncated, or no safetensors file.
    """
    tensors, metadata, _ = read_safetensors_layout(path)
    return tensors, metadata


def read_safetensors_layout(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, int]]:
    """Like :func:`read_safetensors_header`, and where in the file, in bytes, each tensor begins."""
    accepted = "Expected a .safetensors file (https://huggingface.co/docs/safetensors)."
    if not path.is_file():
        raise UserError(f"No file at '{path}'. {accepted}")
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _LARGEST_HEADER:
            raise UserError(f"'{path}' is not a safetensors file: its first 8 bytes state no header length. {accepted}")
        if 8 + length > size:
            raise UserError(
                f"'{path}' is truncated or not a safetensors file: its header should take {length} bytes, "
                f"the file holds {size}. Expected the whole file; copy or download it again."
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        tensors: dict[str, TensorInfo] = {}
        offsets: dict[str, int] = {}
        end_of_data = 0
        for name, entry in header.items():
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise UserError(
                    f"Tensor '{name}' in '{path}' has dtype {entry['dtype']}. "
                    f"Accepted: {', '.join(SAFETENSORS_DTYPES)}."
                )
            info = TensorInfo(tuple(int(n) for n in entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])
            start, stop = entry["data_offsets"]
            if stop - start != info.nbytes:
                raise UserError(
                    f"Tensor '{name}' in '{path}' takes {stop - start} bytes in the file, its shape "
                    f"{list(info.shape)} needs {info.nbytes}. Expected an undamaged safetensors file."
                )
            end_of_data = max(end_of_data, stop)
            tensors[name] = info
            offsets[name] = 8 + length + start
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{path}' is not a safetensors file: its header cannot be read ({error}). {accepted}"
        ) from error
    if 8 + length + end_of_data > size:
        raise UserError(
            f"'{path}' is truncated: its header announces {8 + length + end_of_data} bytes, the file holds {size}. "
            "Expected the whole file; copy or download it again."
        )
    return tensors, metadata, offsets
