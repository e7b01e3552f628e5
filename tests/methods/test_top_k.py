"""The exact largest entries, found by counting bit patterns, against a stable sort; ties go by (tensor name, index)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from contract import in_chunks
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.methods import Breadcrumbs, TaskArithmetic, Ties, top_k
from lightning_merge.methods.base import Partial
from lightning_merge.methods.streaming import add_partial
from lightning_merge.methods.top_k import LargestEntries, magnitude_bits
from lightning_merge.tensor_view import GRID
from lightning_merge.weights import TensorInfo

State = dict[str, Tensor]
SMALLEST = 2.0**-149  # the smallest positive fp32 number


@pytest.fixture(params=["sampled", "too wide", "missed"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every property holds with a good bracket, with one that would collect too much, and with one that misleads."""
    if request.param == "too wide":
        monkeypatch.setattr(top_k, "_bracket", lambda share, ordered, whole: (None, []))
    if request.param == "missed":
        monkeypatch.setattr(top_k, "_bracket", lambda share, ordered, whole: ((7, 9), []))
    return request.param


def opened(taus: dict[str, State]) -> TaskVectors:
    """Task vectors over a base of zeros, so that they are what the models hold."""
    base = {name: torch.zeros_like(value) for name, value in next(iter(taus.values())).items()}
    return TaskVectors.open(base=base, models=taus, check=False)


def draw(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    return {
        "normal": lambda: normal,
        "bf16": lambda: normal.bfloat16().float(),
        "few values": lambda: torch.randint(-2, 3, shape, generator=generator).float(),
        "one value": lambda: torch.where(normal > 0, 0.5, -0.5),
        "zeros": lambda: torch.zeros(shape),
        "mostly zeros": lambda: torch.where(normal > 2, normal, torch.where(normal > 0, 0.0, -0.0)),
        "denormal": lambda: torch.randint(-50, 51, shape, generator=generator) * SMALLEST,
        "all magnitudes": lambda: normal * 10.0 ** torch.randint(-44, 38, shape, generator=generator).double(),
    }[kind]().float()


KINDS = ["normal", "bf16", "few values", "one value", "zeros", "mostly zeros", "denormal", "all magnitudes"]


def sorted_masks(tau: State, count: Callable[[int], int], scope: str) -> State:
    """Which entries stay, by a stable sort of magnitudes over tensors in the order of their names."""
    groups = [sorted(tau)] if scope == "model" else [[name] for name in sorted(tau)]
    masks = {}
    for group in groups:
        flat = np.concatenate([tau[name].numpy().ravel() for name in group])
        mask = np.zeros(flat.size, dtype=bool)
        mask[np.argsort(-np.abs(flat), kind="stable")[: count(flat.size)]] = True
        for name in group:
            masks[name], mask = torch.from_numpy(mask[: tau[name].numel()].copy()), mask[tau[name].numel() :]
    return masks


def counted_masks(vectors: TaskVectors, ranks: list[int], scope: str = "model") -> tuple[LargestEntries, list[State]]:
    """Run the passes by hand; for each rank the masks of the first model."""
    tensors = {name: vectors.info(name) for name in vectors.tensor_names}
    largest = LargestEntries(
        tensors=tensors, ranks=lambda _: ranks, group=lambda name: name if scope == "tensor" else ""
    )
    while not largest.complete:
        total: Partial = {}
        # The order in which pieces are counted must not matter.
        for name in sorted(tensors, reverse=True):
            for at in vectors.chunks(name):
                add_partial(total, largest.measure(vectors.view(name, *at)))
        largest = largest.conclude(total)
    masks: list[State] = []
    for rank in range(len(ranks)):
        masks.append({})
        for name in tensors:
            views = [vectors.view(name, *at) for at in vectors.chunks(name)]
            masks[-1][name] = torch.cat([largest.mask(v, magnitude_bits(v.deltas), rank)[0] for v in views])
    return largest, masks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_the_set_is_that_of_a_stable_sort(kind: str, scope: str) -> None:
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    tau = {name: draw(kind, (size,), generator) for name, size in [("b", 700), ("a.10", 1), ("a.9", 300), ("c", 23)]}
    vectors = opened({"m": tau})
    total = 1024
    ranks = [0, 1, 2, 3, 204, 512, 1000, 1023, 1024]
    _, masks = counted_masks(vectors, ranks, scope)
    for rank, found in zip(ranks, masks, strict=True):
        expected = sorted_masks(tau, lambda size, rank=rank: min(rank, size), scope)
        kept = 0
        for name, mask in found.items():
            # Which zeros stay is nobody's business: they are all alike.
            nonzero = tau[name] != 0
            assert torch.equal(mask & nonzero, expected[name] & nonzero), (rank, name)
            kept += int((mask & nonzero).sum())
        assert scope == "tensor" or kept == min(rank, sum(int((value != 0).sum()) for value in tau.values()))
        assert rank or not any(mask.any() for mask in found.values())
    assert total == sum(value.numel() for value in tau.values())


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_ties_at_the_threshold_stay_in_order_across_blocks_and_tensors(
    monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """One magnitude everywhere: the first k by (tensor name, flat index), wherever the chunks end."""
    in_chunks(monkeypatch, blocks)
    size = 2 * GRID + 11
    generator = torch.Generator().manual_seed(1)
    # "z" is listed first and sorts last; "A" sorts before "a".
    tau = {name: draw("one value", (count,), generator) for name, count in [("z", 50), ("a", size), ("A", 7)]}
    vectors = opened({"m": tau})
    for kept in (1, 7, 8, 7 + GRID, 8 + GRID, 7 + 2 * GRID + 5, 7 + size, 8 + size, 57 + size):
        _, (masks,) = counted_masks(vectors, [kept])
        order = torch.cat([masks["A"], masks["a"], masks["z"]])
        assert int(order.sum()) == kept
        assert order[:kept].all()


def test_models_are_ranked_each_by_itself() -> None:
    generator = torch.Generator().manual_seed(2)
    taus = {
        model: {"w": draw(kind, (999,), generator)}
        for model, kind in [("a", "normal"), ("b", "few values"), ("c", "zeros")]
    }
    for model, tau in taus.items():
        scale = {name: float(name == model) for name in taus}
        crumbs = Breadcrumbs(density=0.3, gamma=0.0)
        merged = TaskArithmetic(scale=scale)(opened(taus), transforms=[crumbs])["w"]
        mask = sorted_masks(tau, lambda size: 3 * size // 10, "model")["w"]
        assert torch.equal(merged, torch.where(mask, tau["w"], 0.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_trimming_one_task_vector(kind: str, density: float, scope: str) -> None:
    """TIES of one model is the trim alone; it takes a faster way than the masks."""
    generator = torch.Generator().manual_seed(3)
    tau = {"u": draw(kind, (10, 60), generator), "v": draw(kind, (400,), generator)}
    merged = Ties(density=density, scope=scope)(opened({"m": tau}))
    masks = sorted_masks(tau, lambda size: max(1, int(round(density * 1000) * size // 1000)), scope)
    for name, value in tau.items():
        assert torch.equal(merged[name], torch.where(masks[name].reshape(value.shape), value, 0.0))


def test_neighbouring_numbers_are_told_apart() -> None:
    """Magnitudes that differ in the last bit only, across the border of the upper 16 bits, and next to 0."""
    near_one = torch.tensor([1.0]).view(torch.int32) + torch.arange(-40_000, 40_000, dtype=torch.int32)
    values = torch.cat([near_one.view(torch.float32), torch.arange(1, 50) * SMALLEST])
    shuffled = values[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(4))]
    for kept in (1, 39_999, 40_000, 40_001, 72_768, 80_000, 80_001, 80_048):
        merged = Ties(density=kept / values.numel())(opened({"m": {"w": shuffled}}))["w"]
        threshold = values.sort(descending=True).values[kept - 1]
        assert torch.equal(merged, torch.where(shuffled >= threshold, shuffled, 0.0))


def test_fp64_models_are_ranked_by_their_fp32_differences() -> None:
    """Beyond fp32's range all are infinite, and equal: the first by index stay."""
    tau = torch.tensor([1e300, 2.0, 1e301, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    kept = [Ties(density=k / 5)(opened({"m": {"w": tau}}))["w"] for k in (1, 2, 3, 4)]
    assert [value.nonzero().ravel().tolist() for value in kept] == [[0], [0, 2], [0, 1, 2], [0, 1, 2, 3]]
    assert all(torch.equal(value[value != 0], tau[value != 0]) for value in kept)


def test_ties_are_counted_only_where_they_matter() -> None:
    generator = torch.Generator().manual_seed(5)
    distinct = torch.randperm(1000, generator=generator).float() + 1
    for values, tied in [(distinct, False), (torch.zeros(1000), False), (torch.ones(1000), True)]:
        largest, _ = counted_masks(opened({"m": {"w": values}}), [200])
        assert bool(largest.groups[""].cuts[0][0].equal_before) is tied


def test_a_sample_brackets_a_large_vector(way: str) -> None:
    """Few entries are collected, and the result is exact also where the sample sees other values."""
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(3 << 18, generator=generator)
    stride = LargestEntries(tensors={"w": TensorInfo((values.numel(),), torch.float32)}).groups[""].stride
    assert stride > 1
    misleading = values.clone()
    misleading[::stride] *= 100  # the sample sees these alone
    for tau in (values, misleading):
        vectors = opened({"m": {"w": tau}})
        _, masks = counted_masks(vectors, [tau.numel() // 5])
        assert torch.equal(masks[0]["w"], sorted_masks({"w": tau}, lambda n: n // 5, "model")["w"])
    if way == "sampled":
        largest = LargestEntries(tensors={"w": vectors.info("w")}, ranks=lambda n: [n // 5])
        total: Partial = {}
        for at in opened({"m": {"w": values}}).chunks("w"):
            add_partial(total, largest.measure(opened({"m": {"w": values}}).view("w", *at)))
        low, high = largest.conclude(total).groups[""].cuts[0][0].bracket  # type: ignore[misc]
        inside = magnitude_bits(values)
        assert 0 < int(((inside >= low) & (inside < high)).sum()) < 0.03 * values.numel()


def test_few_distinct_magnitudes_take_one_pass(way: str) -> None:
    """Where a sample meets the same magnitudes again and again, they are counted by block: nothing is read again."""
    generator = torch.Generator().manual_seed(7)
    values = (torch.randn(5 * GRID + 77, generator=generator) * 8).round() / 1024
    # A magnitude too rare for the sample decides some ranks, and ties there.
    values[torch.randperm(values.numel(), generator=generator)[:9]] = 5 / 2048
    vectors = opened({"m": {"w": values}})
    order = values.abs().sort(descending=True).values
    rare = int((order > 5 / 2048).sum())
    for rank in (1, 100, 50_000, rare, rare + 1, rare + 5, rare + 9, rare + 10, 300_000, values.numel()):
        largest, (mask,) = counted_masks(vectors, [rank])
        expected = sorted_masks({"w": values}, lambda n, rank=rank: rank, "model")["w"]
        assert torch.equal(mask["w"] & (values != 0), expected & (values != 0)), rank
        assert int((largest.trim(vectors.view("w"))[0] != 0).sum()) == min(rank, int((values != 0).sum()))
    if way == "sampled":
        largest = LargestEntries(tensors={"w": vectors.info("w")}, ranks=lambda n: [n // 5])
        passes = 0
        while not largest.complete:
            largest, passes = largest.conclude(largest.measure(vectors.view("w"))), passes + 1
        assert passes == 2 and largest.cuts(vectors.view("w"))[0].tied


def test_where_all_tensors_are_in_the_sample_the_bracket_is_as_narrow_as_can_be(way: str) -> None:
    if way != "sampled":
        pytest.skip("the bracket is forced")
    values = torch.randn(5000, generator=torch.Generator().manual_seed(8))
    largest = LargestEntries(tensors={"w": TensorInfo((5000,), torch.float32)}, ranks=lambda n: [1000])
    low, high = largest.conclude(largest.measure(opened({"m": {"w": values}}).view("w"))).groups[""].cuts[0][0].bracket
    bits = magnitude_bits(values)
    assert int(((bits >= low) & (bits < high)).sum()) <= 3
