"""Sources over other sources: every piece of a view is that piece of the tensor it stands for."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from lightning_merge.weights import MemorySource, SafetensorsSource, TensorInfo, save_safetensors
from lightning_merge.weights.views import CastTensor, GatheredRows, Rows, StoredTensor, ViewSource, renamed


@pytest.fixture
def source(tmp_path: Path) -> SafetensorsSource:
    generator = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(9, 2, 3, generator=generator), "b": torch.randn(7, 2, 3, generator=generator)}
    save_safetensors({**values, "half": values["b"].bfloat16()}, tmp_path / "x.safetensors")
    return SafetensorsSource("x", [tmp_path / "x.safetensors"])


def test_renamed(source: SafetensorsSource) -> None:
    view = renamed(source, {"layers.0": "a", "layers.1": "a", "c": "b"})
    assert set(view.tensors) == {"layers.0", "layers.1", "c"} and view.label == "x" and view.files == source.files
    assert torch.equal(view.read("layers.1"), source.read("a"))
    assert torch.equal(view.read_flat("c", 5, 11), source.read("b").reshape(-1)[5:11])
    assert view.bytes_read == 24
    with pytest.raises(KeyError):
        renamed(source, {"c": "d"})


def test_tied_names_are_found() -> None:
    shared = torch.arange(6.0)
    view = renamed(MemorySource("tied", {"embedding": shared, "head": shared}), {"out": "head"})
    assert torch.equal(view.read("out"), shared)


def test_cast(source: SafetensorsSource) -> None:
    tensor = CastTensor(StoredTensor(source, "half"), torch.float64)
    assert tensor.info == TensorInfo((7, 2, 3), torch.float64) and tensor.nominal == torch.float64
    assert torch.equal(tensor.read(), source.read("half").double())
    assert tensor.read_flat(3, 5).dtype == torch.float64


def gathered(source: SafetensorsSource, second: str = "b", padding: int = 2) -> tuple[GatheredRows, torch.Tensor]:
    """Rows of both tensors mixed, zeros, means and padding, and what they should be."""
    a, b = source.read("a"), source.read(second)
    donor = torch.tensor([0, 0, 0, 1, -1, 1, -1, 0, -1, 1] + [-1] * padding)
    row = torch.tensor([4, 5, 6, 0, 0, 6, 0, 0, 0, 3] + [0] * padding)
    averages = {4: [(0, 8), (1, 1)], 8: [(0, 1), (0, 2), (1, 3)]}
    rows = [a[4], a[5], a[6], b[0], (a[8] + b[1]) / 2, b[6], torch.zeros(2, 3), a[0], (a[1] + a[2] + b[3]) / 3, b[3]]
    expected = torch.stack([value.float() for value in rows])
    expected = torch.cat([expected, expected.mean(0, keepdim=True).expand(padding, 2, 3)])
    made = GatheredRows([StoredTensor(source, "a"), StoredTensor(source, second)], Rows(donor, row, averages, padding))
    return made, expected


def test_gathered_rows(source: SafetensorsSource) -> None:
    tensor, expected = gathered(source)
    assert tensor.info == TensorInfo((12, 2, 3), torch.float32)
    torch.testing.assert_close(tensor.read(), expected)
    whole = tensor.read().reshape(-1)
    for start in range(0, 72, 5):
        for stop in range(start, 72, 7):
            assert torch.equal(tensor.read_flat(start, stop), whole[start:stop]), (start, stop)


def test_the_dtype_of_gathered_rows(source: SafetensorsSource) -> None:
    """Means are left in fp32; without them rows stay as they are stored, and donors that are not used have no say."""
    half = StoredTensor(source, "half")
    rows = torch.tensor([0, 1])
    only = GatheredRows([half, StoredTensor(source, "a")], Rows(torch.zeros(2, dtype=torch.int64), rows, {}))
    assert only.info.dtype == only.nominal == torch.bfloat16
    mean = GatheredRows([half], Rows(torch.tensor([0, -1]), rows, {1: [(0, 1), (0, 2)]}))
    assert (mean.info.dtype, mean.nominal) == (torch.float32, torch.bfloat16)
    assert torch.equal(mean.read()[1], source.read("half")[1:3].double().mean(0).float())


def test_only_the_rows_that_are_touched_are_read(source: SafetensorsSource) -> None:
    tensor, _ = gathered(source, padding=0)
    before = source.bytes_read
    tensor.read_flat(0, 12)  # two rows of a that lie together
    assert source.bytes_read - before == 12 * 4


def test_no_columns(tmp_path: Path) -> None:
    tensor = GatheredRows(
        [StoredTensor(MemorySource("empty", {"x": torch.empty(3, 0)}), "x")],
        Rows(torch.tensor([0, 0]), torch.tensor([2, 1]), {}),
    )
    assert tensor.read().shape == (2, 0)


def test_a_view_travels_to_another_process(source: SafetensorsSource) -> None:
    tensor, expected = gathered(source)
    view = ViewSource("mixed", {"x": tensor, "half": CastTensor(StoredTensor(source, "half"), torch.float32)})
    again = pickle.loads(pickle.dumps(view))
    torch.testing.assert_close(again.read("x"), expected)
    assert again.files == source.files
