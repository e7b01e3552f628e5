"""Geometry of task vectors against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.evaluation import diagnostics, sign_conflict, task_vector_statistics
from lightning_merge.evaluation.diagnostics import blocks_of

A = torch.tensor([[0.4, -0.1, 0.0], [0.2, 0.3, -0.6]])
B = torch.tensor([[-0.2, 0.5, 0.1], [0.2, -0.4, -0.3]])


class Vectors:
    """Just what the diagnostics may use of TaskVectors."""

    def __init__(self, deltas: dict[str, dict[str, Tensor]], base: dict[str, Tensor]) -> None:
        self.names = list(deltas)
        self.tensor_names = list(base)
        self._deltas, self._base = deltas, base

    def delta(self, model: str, name: str) -> Tensor:
        return self._deltas[model][name]

    def base_tensor(self, name: str) -> Tensor:
        return self._base[name]


def test_cosine_and_conflict_of_the_worked_example() -> None:
    statistics = task_vector_statistics(Vectors({"A": {"w": A}, "B": {"w": B}}, {"w": torch.ones(2, 3)}), bins=4)
    assert statistics.cosine[0, 1] == pytest.approx(-0.0480754, abs=1e-7)  # -0.03 / sqrt(0.66 * 0.59)
    assert statistics.cosine[1, 0] == statistics.cosine[0, 1] and statistics.cosine.diagonal() == pytest.approx(1.0)
    assert statistics.norms == pytest.approx([math.sqrt(0.66), math.sqrt(0.59)])
    # (.4, -.2): 2/3. (-.1, .5): 1/3. (0, .1): one task alone, not compared. (.2, .2): 0. (.3, -.4): 6/7. (-.6, -.3): 0.
    assert statistics.conflict_counts.tolist() == [2, 1, 1, 1]
    assert (statistics.compared, statistics.entries) == (5, 6)
    assert statistics.conflict_mean == pytest.approx((2 / 3 + 1 / 3 + 6 / 7) / 5, abs=1e-6)
    assert sign_conflict(torch.stack([A.flatten(), B.flatten()])).tolist() == pytest.approx(
        [2 / 3, 1 / 3, 0, 6 / 7, 0], abs=1e-6
    )
    assert statistics.relative_block_norms[:, 0] == pytest.approx(statistics.norms / math.sqrt(6))


def test_full_cancellation_falls_into_the_last_bin_and_agreement_of_many_is_exactly_zero() -> None:
    assert sign_conflict(torch.tensor([[0.1], [-0.1]])).tolist() == [1.0]
    same = torch.rand(7, 1000, generator=torch.Generator().manual_seed(0)) + 0.1
    assert sign_conflict(-same).max() == 0.0
    one = task_vector_statistics(
        Vectors({"A": {"w": torch.tensor([0.1])}, "B": {"w": torch.tensor([-0.1])}}, {"w": torch.ones(1)}), bins=3
    )
    assert one.conflict_counts.tolist() == [0, 0, 1]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {f"layer.{place}.weight": torch.randn(7, 11, generator=generator) for place in range(3)}
    deltas = {m: {n: torch.randn(7, 11, generator=generator).to(torch.float32) for n in base} for m in "xyz"}
    whole = task_vector_statistics(Vectors(deltas, base))
    monkeypatch.setattr(diagnostics, "CHUNK", 10)
    parts = task_vector_statistics(Vectors(deltas, base))
    assert parts.conflict_counts.tolist() == whole.conflict_counts.tolist()
    assert parts.cosine == pytest.approx(whole.cosine) and parts.block_norms == pytest.approx(whole.block_norms)
    flat = np.stack([np.concatenate([deltas[m][n].flatten().numpy() for n in base]) for m in "xyz"]).astype(np.float64)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    assert whole.cosine == pytest.approx(unit @ unit.T)  # of whole vectors, not a mean over tensors


def test_blocks_follow_the_forward_pass() -> None:
    names = [f"bert.encoder.layer.{i}.{w}.weight" for i in (10, 2, 0) for w in ("q", "output.dense")]
    names += ["bert.pooler.dense.weight", "bert.embeddings.word.weight", "bert.embeddings.LayerNorm.bias"]
    base = {name: torch.full((2,), 3.0) for name in names}
    deltas = {"m": {name: torch.full((2,), 4.0) for name in names}}
    statistics = task_vector_statistics(Vectors(deltas, base))
    assert statistics.blocks == ("embeddings", "encoder.layer.0", "encoder.layer.2", "encoder.layer.10", "pooler")
    assert statistics.block_norms[0, 1] == pytest.approx(math.sqrt(4 * 16))  # two tensors of two entries
    assert statistics.relative_block_norms == pytest.approx(4 / 3)
    assert statistics.norms[0] ** 2 == pytest.approx((statistics.block_norms[0] ** 2).sum())


def test_block_names() -> None:
    assert blocks_of(["w"]) == {"w": "w"}
    assert blocks_of(["0.weight", "2.weight"]) == {"0.weight": "0", "2.weight": "2"}
    assert blocks_of(["m.a", "m"]) == {"m.a": "m", "m": "m"}


def test_zero_task_vector_and_zero_base_give_nan_and_nan_is_named() -> None:
    zero = torch.zeros(2, 3)
    statistics = task_vector_statistics(Vectors({"A": {"w": A}, "0": {"w": zero}}, {"w": zero}))
    assert math.isnan(statistics.cosine[0, 1]) and statistics.cosine[0, 0] == pytest.approx(1.0)
    assert statistics.compared == 0 and math.isnan(statistics.conflict_mean)
    assert np.isnan(statistics.relative_block_norms).all()
    with pytest.raises(UserError, match="'w' of 'B'"):
        task_vector_statistics(Vectors({"A": {"w": A}, "B": {"w": B / 0}}, {"w": A}))
