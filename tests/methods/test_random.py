"""DARE's draws: the right distribution, and the same on every machine, in every process, in any order."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from contract import in_chunks
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.methods import Dare, TaskArithmetic, Ties
from lightning_merge.methods.random import keep_mask
from lightning_merge.tensor_view import GRID

ENTRIES = 2 * GRID + 4321


def opened(names: str = "ab", entries: int = ENTRIES, value: float = 1.0) -> TaskVectors:
    base = {"w": torch.zeros(entries), "v": torch.zeros(3, 5)}
    models = {name: {key: torch.full_like(tensor, value) for key, tensor in base.items()} for name in names}
    return TaskVectors.open(base=base, models=models, check=False)


def thinned(vectors: TaskVectors, dare: Dare, seed: int = 0, model: str = "a") -> dict[str, Tensor]:
    """One model's task vector after dropping: the base is 0."""
    scale = {name: float(name == model) for name in vectors.names}
    return TaskArithmetic(scale=scale)(vectors, transforms=[dare], seed=seed)


@pytest.mark.parametrize("drop_rate", [0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_drop_rate(drop_rate: float) -> None:
    """Within five standard deviations of a binomial; biased draws (a rounded p) would leave it."""
    entries = 20 * GRID
    kept = int(keep_mask(1 - drop_rate, 0, "model", "tensor", 0, entries).sum())
    deviation = math.sqrt(entries * drop_rate * (1 - drop_rate))
    assert abs(kept - entries * (1 - drop_rate)) < 5 * deviation


@pytest.mark.parametrize("probability", [2.0**-17, 3 * 2.0**-17, 0.1])
def test_probabilities_hold_beyond_16_bits(probability: float) -> None:
    """With 16 random bits alone, 2⁻¹⁷ would be never or twice as often."""
    entries = 600 * GRID if probability < 0.01 else 40 * GRID
    step = 100 * GRID
    kept = sum(
        int(keep_mask(probability, 1, "m", "t", start, min(start + step, entries)).sum())
        for start in range(0, entries, step)
    )
    assert abs(kept - entries * probability) < 5 * math.sqrt(entries * probability)


def test_certain_draws() -> None:
    assert keep_mask(1.0, 0, "m", "t", 0, 70_000).all()
    assert not keep_mask(0.0, 0, "m", "t", 0, 70_000).any()
    assert keep_mask(0.5, 0, "m", "t", 0, 0).shape == (0,)


@pytest.mark.parametrize("drop_rate", [0.25, 0.9, 0.99])
def test_what_stays_grows_by_exactly_one_over_one_minus_p(drop_rate: float) -> None:
    vectors = opened(value=0.7)
    found = thinned(vectors, Dare(drop_rate=drop_rate))["w"]
    expected = torch.tensor(0.7) / torch.tensor(1 - drop_rate, dtype=torch.float32)
    assert set(found.unique().tolist()) == {0.0, expected.item()}
    plain = thinned(vectors, Dare(drop_rate=drop_rate, rescale=False))["w"]
    assert torch.equal(plain != 0, found != 0)
    assert set(plain.unique().tolist()) == {0.0, torch.tensor(0.7).item()}


def test_unbiased() -> None:
    """The mean over seeds, entry by entry and over all, is τ: five standard deviations (six for the extreme entry)."""
    generator = torch.Generator().manual_seed(0)
    tau = torch.randn(2000, generator=generator)
    vectors = TaskVectors.open(base={"w": torch.zeros(2000)}, models={"a": {"w": tau}}, check=False)
    drop_rate, seeds = 0.7, 200
    total = sum(thinned(vectors, Dare(drop_rate=drop_rate), seed)["w"].double() for seed in range(seeds))
    # Var(m/(1-p)) = p/(1-p) for a kept-or-dropped entry.
    deviation = tau.abs() * math.sqrt(drop_rate / (1 - drop_rate) / seeds)
    error = (total / seeds - tau).abs() / deviation
    assert error.max() < 6
    assert abs(error.square().mean() - 1) < 5 * math.sqrt(2 / 2000) + 0.05, (
        "draws of different seeds must be independent"
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda: keep_mask(0.5, 1, "a", "w", 0, GRID),
        lambda: keep_mask(0.5, 0, "b", "w", 0, GRID),
        lambda: keep_mask(0.5, 0, "a", "v", 0, GRID),
        lambda: keep_mask(0.5, 0, "a", "w", GRID, 2 * GRID),
    ],
    ids=["seed", "model", "tensor", "block"],
)
def test_streams_are_independent(other) -> None:  # type: ignore[no-untyped-def]
    """Two independent fair masks agree in half of the entries, to five standard deviations."""
    agree = int((keep_mask(0.5, 0, "a", "w", 0, GRID) == other()).sum())
    assert abs(agree - GRID / 2) < 5 * math.sqrt(GRID) / 2


def test_neighbours_are_independent() -> None:
    mask = keep_mask(0.5, 0, "a", "w", 0, 4 * GRID)
    for lag in (1, 2, 3, 4, GRID // 2, GRID):
        pairs = mask.numel() - lag
        assert abs(int((mask[lag:] == mask[:-lag]).sum()) - pairs / 2) < 5 * math.sqrt(pairs) / 2


def test_renaming_a_model_changes_its_draws_only() -> None:
    before, after = opened("ab"), opened("az")
    assert torch.equal(thinned(before, Dare(), model="a")["w"], thinned(after, Dare(), model="a")["w"])
    assert not torch.equal(thinned(before, Dare(), model="b")["w"], thinned(after, Dare(), model="z")["w"])


def test_seed_changes_the_draws() -> None:
    vectors = opened()
    one, two = (TaskArithmetic()(vectors, transforms=[Dare()], seed=seed)["w"] for seed in (0, 1))
    assert not torch.equal(one, two)
    assert torch.equal(one, TaskArithmetic()(vectors, transforms=[Dare()], seed=0)["w"])


def test_chunks_and_other_random_numbers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, dare = opened(), Dare(drop_rate=0.6)
    expected = Ties(density=0.3)(vectors, transforms=[dare])["w"]
    for blocks in (1, 2, 8):
        in_chunks(monkeypatch, blocks)
        torch.manual_seed(blocks)
        state = torch.get_rng_state()
        assert torch.equal(Ties(density=0.3)(vectors, transforms=[dare])["w"], expected)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is the caller's"


SCRIPT = """
import hashlib, torch
from lightning_merge import TaskVectors
from lightning_merge.methods import Dare, LwPTV, Ties
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
base = {f"block.{n}.w": torch.randn(90, 1000, generator=g) for n in range(3)}
models = {m: {k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in base.items()} for m in ("x", "é", "y")}
vectors = TaskVectors.open(base=base, models=models)
merged = Ties(density=0.4)(vectors, transforms=[LwPTV(eta=0.34), Dare(drop_rate=0.5)], seed=5)
print(hashlib.sha256(b"".join(merged[k].numpy().tobytes() for k in sorted(merged))).hexdigest())
"""


def test_another_process_with_another_hash_seed_gives_the_same_bytes() -> None:
    scope: dict[str, object] = {}
    exec(SCRIPT.replace("print(", "digest = ("), scope)  # the same lines, in this process
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == scope["digest"]


def test_the_stream_is_pinned() -> None:
    """A merge of today must be the merge of tomorrow: the draws may change only in a release that says so."""
    mask = keep_mask(0.3, 42, "cars", "encoder.layer.0.weight", 0, GRID + 100)
    assert hashlib.sha256(mask.numpy().tobytes()).hexdigest()[:16] == "89d70eab3c33c2bf"
