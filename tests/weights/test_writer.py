from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from model_files import run_python
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_merge.errors import UserError
from lightning_merge.weights import SafetensorsSource, SafetensorsWriter, TensorInfo, save_safetensors
from lightning_merge.weights.tensor_info import SAFETENSORS_DTYPES, read_safetensors_header


def every_kind() -> dict[str, torch.Tensor]:
    """Tensors of many dtypes and shapes, in an order that is not that of the file."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, generator=generator)
    values[0, 0], values[0, 1] = float("nan"), -0.0
    return {
        "bool": values > 0,
        "zero-d": torch.tensor(3.5),
        "bf16": values.bfloat16(),
        "empty": torch.empty(0, 4),
        "int8": torch.arange(-3, 4, dtype=torch.int8),
        "float32": values,
        "float16": values.half(),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "float64": values.double(),
        "zero-d int": torch.tensor(7),
        "e4m3": values.to(torch.float8_e4m3fn),
        "transposed": values.T,
        "name with 'quotes' and ü": torch.ones(1),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    raw = [value.contiguous().reshape(-1).view(torch.uint8) for value in (a, b)]
    return torch.equal(*raw)


def test_what_is_written_is_what_safetensors_reads_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.safetensors"
    save_safetensors(every_kind(), path, metadata={"base": "abc"})
    for read in (load_file(path), {name: SafetensorsSource("m", [path]).read(name) for name in every_kind()}):
        assert read.keys() == every_kind().keys()
        assert all(same_bits(read[name], value) for name, value in every_kind().items())
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"format": "pt", "base": "abc"}
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]


def test_every_tensor_begins_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    import json
    import struct

    save_safetensors(every_kind(), tmp_path / "m.safetensors")
    raw = (tmp_path / "m.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    assert (8 + length) % 8 == 0
    for entry in header.values():
        assert entry["data_offsets"][0] % SAFETENSORS_DTYPES[entry["dtype"]].itemsize == 0


def test_pieces_come_in_any_order_and_from_any_thread(tmp_path: Path) -> None:
    tensors = {f"layer{i}.weight": torch.randn(64, 33, generator=torch.Generator().manual_seed(i)) for i in range(8)}
    whole, pieces = tmp_path / "whole.safetensors", tmp_path / "pieces.safetensors"
    save_safetensors(tensors, whole)
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in reversed(tensors.items())}
    jobs = [(name, start) for start in range(2000, -1, -500) for name in tensors]
    with SafetensorsWriter(pieces, infos) as writer, ThreadPoolExecutor(4) as pool:
        list(
            pool.map(lambda job: writer.write(job[0], tensors[job[0]].reshape(-1)[job[1] : job[1] + 500], job[1]), jobs)
        )
        assert not pieces.exists()
    assert pieces.read_bytes() == whole.read_bytes()


def test_an_exception_leaves_nothing_and_keeps_what_stood_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    infos = {"a": TensorInfo((4,), torch.float32)}
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), SafetensorsWriter(path, infos) as writer:
            writer.write("a", torch.zeros(4))
            raise error
        assert list(tmp_path.iterdir()) == []
    save_safetensors({"a": torch.ones(4)}, path)
    with pytest.raises(RuntimeError), SafetensorsWriter(path, infos):
        raise RuntimeError
    assert torch.equal(load_file(path)["a"], torch.ones(4)) and len(list(tmp_path.iterdir())) == 1


def test_an_incomplete_tensor_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    infos = {"a": TensorInfo((4,), torch.float32), "b": TensorInfo((2,), torch.float32)}
    with (
        pytest.raises(UserError, match=r"Tensor 'a' was not written whole \(1 incomplete\)"),
        SafetensorsWriter(tmp_path / "m.safetensors", infos) as writer,
    ):
        writer.write("b", torch.zeros(2))
        writer.write("a", torch.zeros(2), start=2)
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    infos = {"a": TensorInfo((4,), torch.float32)}
    for values, start in [(torch.zeros(4, dtype=torch.float64), 0), (torch.zeros(4), 1), (torch.zeros(5), 0)]:
        with (
            pytest.raises(ValueError, match="'a' announced"),
            SafetensorsWriter(tmp_path / "m.safetensors", infos) as writer,
        ):
            writer.write("a", values, start)
    with pytest.raises(UserError, match=r"Tensor 'c' has dtype torch.complex64, which safetensors cannot hold"):
        save_safetensors({"c": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_only_a_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    code = """
import os, signal, sys, torch
from pathlib import Path
from lightning_merge.weights import SafetensorsWriter, TensorInfo
writer = SafetensorsWriter(Path(sys.argv[1]), {"a": TensorInfo((4,), torch.float32)})
writer.write("a", torch.zeros(4))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_python(code, path)
    assert done.returncode == -9, done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors.partial"]
    save_safetensors({"a": torch.ones(2)}, path)  # the leftover is in nobody's way
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(path)["a"], torch.ones(2))


def test_a_header_states_shapes_and_sizes(tmp_path: Path) -> None:
    save_safetensors(every_kind(), tmp_path / "m.safetensors", metadata={"note": "x"})
    tensors, metadata = read_safetensors_header(tmp_path / "m.safetensors")
    assert metadata == {"format": "pt", "note": "x"}
    assert tensors["zero-d"] == TensorInfo((), torch.float32)
    assert (tensors["bf16"].numel, tensors["bf16"].nbytes) == (15, 30)
    assert (tensors["empty"].numel, tensors["empty"].nbytes) == (0, 0)
