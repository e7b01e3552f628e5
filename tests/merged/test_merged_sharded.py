"""Two processes with half the rows each find the λ-gradient of one process with all of them, sharded or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_models import autograd_gradient, contracted_gradient, error, vit
from sharded_worker import make

WORLD = 2
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "sharded_worker.py")]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=180)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in range(WORLD)]


def single(folder: Path, even: bool) -> dict[str, Any]:
    """The same in this one process: the gradient of autograd, and of the live merge."""
    case = make(folder, 8, 12) if even else make(folder)
    merged = case.merged()
    first = autograd_gradient(case, merged, merged.scalars())
    assert error(contracted_gradient(case, merged), first) < 1e-5
    with torch.no_grad():
        merged.scalars.raw.add_(0.25)  # type: ignore[attr-defined]
        merged.materialise()
        logits = case.module(case.batches[0]["ids"])
        with merged.individual("sun"):
            sun = case.module(case.batches[0]["ids"])
    second = autograd_gradient(case, merged, merged.scalars())
    return {"first": first, "second": second, "logits": logits, "sun": sun, "bytes": merged.nbytes, "merged": merged}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return single(tmp_path_factory.mktemp("alone"), even=False)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return single(tmp_path_factory.mktemp("alone"), even=True)


LAYOUTS = ["data_parallel", "fsdp", "host", "files", "hsdp", "columns"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_that_of_one_process_with_all_rows(
    found: list[dict[str, Any]], uneven: dict[str, Any], even: dict[str, Any], layout: str
) -> None:
    expected = even if layout == "columns" else uneven
    for rank in range(WORLD):
        for step in ("first", "second"):
            assert error(found[rank][layout][step], expected[step]) < 1e-5
    # The very same numbers everywhere, so that λ stays one.
    assert torch.equal(found[0][layout]["second"], found[1][layout]["second"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_process_answers_as_the_whole_merge(
    found: list[dict[str, Any]], uneven: dict[str, Any], even: dict[str, Any], layout: str
) -> None:
    """After λ has moved, though the outermost module had gathered the weights of before for a forward pass."""
    expected = even if layout == "columns" else uneven
    for rank in range(WORLD):
        torch.testing.assert_close(found[rank][layout]["logits"], expected["logits"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[rank][layout]["sun"], expected["sun"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[rank][layout]["back"], expected["logits"], rtol=1e-5, atol=1e-6)


def test_each_process_holds_its_own_shard(found: list[dict[str, Any]], uneven: dict[str, Any], even: Any) -> None:
    for key in ("task_vectors", "base"):
        whole = uneven["bytes"][key]
        parts = [found[rank]["fsdp"]["bytes"][key] for rank in range(WORLD)]
        assert sum(parts) == whole
        assert max(parts) <= 0.65 * whole  # half, and a row more of each tensor here
        columns = [found[rank]["columns"]["bytes"][key] for rank in range(WORLD)]
        assert sum(columns) == even["bytes"][key] and max(columns) <= 0.51 * even["bytes"][key]
        assert [found[rank]["data_parallel"]["bytes"][key] for rank in range(WORLD)] == [whole] * 2
    assert 2 * found[0]["bf16"]["bytes"]["task_vectors"] == found[0]["fsdp"]["bytes"]["task_vectors"]
    assert found[0]["host"]["bytes"] == {"task_vectors": found[0]["fsdp"]["bytes"]["task_vectors"], "base": 0}
    assert found[0]["files"]["bytes"] == {"task_vectors": 0, "base": 0}


def test_a_row_that_only_one_process_holds_is_learned_by_all(found: list[dict[str, Any]]) -> None:
    assert found[0]["fsdp"]["unchanged"] == found[1]["fsdp"]["unchanged"] == []


def test_low_precision(found: list[dict[str, Any]], uneven: dict[str, Any]) -> None:
    assert error(found[0]["bf16"]["first"], uneven["first"]) < 0.01
    assert error(found[0]["mixed"]["first"], uneven["first"]) < 0.05  # forward and backward in bf16, 8 bits


def test_scalars_of_whole_tensors_are_given_them_and_the_rows_held_here(
    found: list[dict[str, Any]], uneven: dict[str, Any]
) -> None:
    task_vectors = uneven["merged"].task_vectors
    for rank in range(WORLD):
        assert error(found[rank]["whole"]["gradient"], found[rank]["whole"]["expected"]) < 1e-6
    for name, (shape, rows) in found[0]["whole"]["seen"].items():
        assert shape == (3, *task_vectors.shape(name))
        other = found[1]["whole"]["seen"][name][1]
        assert rows.start == 0 and rows.stop == other.start and other.stop == shape[1]


def test_scalars_of_whole_tensors_need_rows(found: list[dict[str, Any]]) -> None:
    assert "sharded along another axis" in found[0]["refused"]


def test_every_process_finds_the_names_of_files(found: list[dict[str, Any]]) -> None:
    module, names = vit(), found[0]["names"]
    assert names == found[1]["names"]
    (target,) = names.values()
    assert target in dict(module.named_parameters()) and target not in names
