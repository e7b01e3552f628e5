"""Worked examples and properties of the methods that trim, drop at random and elect signs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from contract import in_chunks
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.methods import Breadcrumbs, Dare, Della, IsoC, MergeMethod, Sce, TaskArithmetic, Ties, Transform
from lightning_merge.methods.della import by_magnitude, drop_by_rank, keep_probabilities
from lightning_merge.methods.rescale import keep_only, norm_factors
from lightning_merge.methods.sce import spread
from lightning_merge.methods.ties import disjoint_merge, elect_sign
from lightning_merge.methods.top_k import LargestEntries
from lightning_merge.tensor_view import GRID

State = dict[str, Tensor]


def fp64(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def opened(taus: dict[str, Tensor], base: Tensor | None = None) -> TaskVectors:
    """One tensor ``w``, over a base of zeros by default, so that task vectors are what the models hold."""
    zero = torch.zeros_like(next(iter(taus.values()))) if base is None else base
    return TaskVectors.open(base={"w": zero}, models={t: {"w": zero + tau} for t, tau in taus.items()}, check=False)


def of_two(a: list[float], b: list[float]) -> TaskVectors:
    return opened({"a": fp64(a), "b": fp64(b)})


def thinned(transform: Transform, tau: Tensor, seed: int = 0) -> Tensor:
    return TaskArithmetic(scale=1)(opened({"m": tau}), transforms=[transform], seed=seed)["w"]


def close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(found, fp64(expected), rtol=0, atol=1e-12)


# --- task arithmetic ------------------------------------------------------------------------------------------------


def test_weights_count_apart_from_the_scale() -> None:
    vectors = of_two([1.0, 2.0], [3.0, -2.0])
    weights = {"a": 1.0, "b": 3.0}
    close(TaskArithmetic(scale=0.5, weights=weights)(vectors)["w"], [5.0, -2.0])
    close(TaskArithmetic(scale=0.5, weights=weights, normalize=True)(vectors)["w"], [1.25, -0.5])
    close(TaskArithmetic(scale={"a": 1.0, "b": 0.0}, weights=weights, normalize=True)(vectors)["w"], [0.25, 0.5])


def test_weights_that_sum_to_zero_are_refused_unless_as_mergekit_has_it() -> None:
    vectors = of_two([1.0, 2.0], [3.0, -2.0])
    balanced: dict[str, Any] = {"weights": {"a": 1.0, "b": -1.0}, "normalize": True, "scale": 1.0}
    with pytest.raises(UserError, match="weights sum to 0"):
        TaskArithmetic(**balanced)(vectors)
    close(TaskArithmetic(**balanced, compat="mergekit")(vectors)["w"], [-2.0, 4.0])
    with pytest.raises(UserError, match="weights names the model 'c'"):
        TaskArithmetic(weights={"a": 1.0, "b": 1.0, "c": 1.0})(vectors)


# --- TIES -----------------------------------------------------------------------------------------------------------


def test_mergekit_ties_weighs_before_the_election_and_divides_by_signed_weights() -> None:
    """Entry by entry: the weight outvotes; a sum of 0 elects +; a negative weight votes the other way."""
    theirs: dict[str, Any] = {"density": 1.0, "compat": "mergekit"}
    vectors = of_two([1.0, 1.0, 2.0, 0.0], [-2.0, -2.0, 4.0, -1.0])
    close(Ties(**theirs)(vectors)["w"], [-2.0, -2.0, 3.0, -1.0])
    close(Ties(**theirs, weights={"a": 3.0, "b": 1.0})(vectors)["w"], [1.0, 1.0, 2.5, -1.0])
    close(Ties(**theirs, weights={"a": 2.0, "b": 1.0})(vectors)["w"], [1.0, 1.0, 8 / 3, -1.0])
    close(Ties(**theirs, weights={"a": 2.0, "b": 1.0}, operation="sum")(vectors)["w"], [2.0, 2.0, 8.0, -1.0])
    # Weights 1 and −1: w τ is (1, 2), (1, 2), (2, −4), (0, 1); where both agree the weights sum to 0, and 1 divides.
    close(Ties(**theirs, weights={"a": 1.0, "b": -1.0})(vectors)["w"], [3.0, 3.0, 4.0, -1.0])


def test_mergekit_ties_trims_each_tensor_even_if_the_model_is_asked_for() -> None:
    base = {"x": torch.zeros(4), "y": torch.zeros(4)}
    tau = {"x": torch.tensor([5.0, -6.0, 7.0, 8.0]), "y": torch.tensor([0.1, 0.4, -0.3, 0.2])}
    merged = Ties(density=0.5, compat="mergekit")(TaskVectors.open(base=base, models={"a": tau}, check=False))
    assert merged["x"].tolist() == [0, 0, 7, 8]
    assert torch.equal(merged["y"], torch.tensor([0, 0.4, -0.3, 0]))


def test_mergekit_ties_rescales_to_the_norm_and_counts_by_truncation() -> None:
    vectors = of_two([4.0, -1.0, 3.0, 0.0], [0.0] * 4)
    merged = Ties(density=0.5, compat="mergekit", rescale=True)(vectors)["w"]
    close(merged, [4.0 * 8 / 7, 0.0, 3.0 * 8 / 7, 0.0])
    # 0.29 · 100 is a little less than 29 in binary.
    hundred = torch.arange(1, 101).double()
    assert int((Ties(density=0.29, compat="mergekit")(opened({"a": hundred}))["w"] != 0).sum()) == 28
    assert int((Ties(density=0.29)(opened({"a": hundred}))["w"] != 0).sum()) == 29


def test_weights_belong_to_mergekits_ties() -> None:
    with pytest.raises(UserError, match=r"Ties: weights is a setting of mergekit's form\. Expected compat: mergekit"):
        Ties(weights={"a": 1.0})
    with pytest.raises(UserError, match="rescale is a setting of mergekit's form"):
        Ties(rescale=True)


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_task_vectors_are_rounded_as_stored_in_mergekits_form_only(compat: Any) -> None:
    """1.0078125 − 2⁻¹⁰ has more than eight bits: bf16 holds 1.0078125 there."""
    base, model = torch.tensor([2.0**-10, 0.0]).bfloat16(), torch.tensor([1.0078125, 0.0]).bfloat16()
    exact = float(model[0]) - float(base[0])
    rounded = float(torch.tensor(exact).bfloat16())
    assert exact != rounded
    vectors = TaskVectors.open(base={"w": base}, models={"a": {"w": model}}, check=False)
    for step in (TaskArithmetic(scale=4.0, compat=compat), Ties(scale=4.0, compat=compat, density=1.0)):
        merged = step(vectors, dtype=torch.float32)["w"]
        assert merged[0] == np.float32(2.0**-10 + 4 * (exact if compat == "paper" else rounded))


def test_weighted_disjoint_merge_and_what_it_divides_by_at_least() -> None:
    weights = [0.5, 2.0]
    rows = fp64([[1.0, 2.0, 0.0], [-8.0, 2.0, 0.0]])
    sign = elect_sign(rows, majority=1.0)
    assert sign.tolist() == [-1, 1, 1]
    assert disjoint_merge(rows, sign, "mean", weights).tolist() == [-4.0, 1.6, 0.0]
    assert disjoint_merge(rows, sign, "mean", weights, smallest=2.25).tolist() == [-8 / 2.25, 1.6, 0.0]


@pytest.mark.parametrize("count", [255, 256, 300])
def test_agreeing_models_are_counted_beyond_a_byte(count: int) -> None:
    rows = torch.ones(count, 3)
    assert disjoint_merge(rows, torch.ones(3), "mean").tolist() == [1.0, 1.0, 1.0]


# --- thinning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_dropped_is_plus_zero(dtype: torch.dtype) -> None:
    values = torch.tensor([-1.5, -0.0, 3.0, -2.0], dtype=dtype)
    found = keep_only(values, np.array([True, True, False, False]))
    assert found.tolist() == [-1.5, 0.0, 0.0, 0.0]
    assert torch.signbit(found).tolist() == [True, True, False, False]


@pytest.mark.parametrize("transform", [Dare(drop_rate=0.7, compat="mergekit"), Della(density=0.3, compat="mergekit")])
def test_mergekits_rescaling_restores_the_norm(transform: Transform) -> None:
    tau = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    found = thinned(transform, tau).double()
    assert abs(found.abs().sum() / tau.double().abs().sum() - 1) < 1e-6
    kept = found != 0
    assert kept.double().mean() == pytest.approx(0.3, abs=0.01)
    ratio = found[kept] / tau.double()[kept]
    assert float(ratio.std() / ratio.mean()) < 1e-6 and float(ratio.mean()) != pytest.approx(1 / 0.3, rel=1e-6)


def test_tiny_norms_are_left_alone_in_mergekits_form() -> None:
    for before, after, factor in [(2.0, 0.5, 4.0), (1e-8, 1e-9, 1.0), (1.0, 0.0, 1.0)]:
        assert norm_factors({("norm", "w", 0): [[[before]], [[after]]]}) == [factor]
    # Entries of 1e-12 sum to less than 1e-7.
    tau = torch.full((100,), 1e-12)
    assert set(thinned(Dare(drop_rate=0.5, compat="mergekit"), tau).tolist()) <= {0.0, tau[0].item()}


def test_drop_rates_by_model() -> None:
    taus = {name: torch.ones(5000) for name in "ab"}
    rates = {"a": 0.0, "b": 0.8}
    alone = [
        TaskArithmetic(scale={"a": 1.0 * (t == "a"), "b": 1.0 * (t == "b")})(
            opened(taus), transforms=[Dare(drop_rate=rates)]
        )["w"]
        for t in "ab"
    ]
    assert torch.equal(alone[0], taus["a"])
    assert alone[1].max().item() == pytest.approx(5.0)
    assert (alone[1] != 0).double().mean() == pytest.approx(0.2, abs=0.03)


def test_breadcrumbs_window_slides_in_mergekits_form() -> None:
    """Density 0.9 and gamma 0.2 cannot both hold: fewer outliers go. With density 1 none do."""
    tau = torch.arange(1, 101).double()
    kept = thinned(Breadcrumbs(density=0.9, gamma=0.2, compat="mergekit"), tau)
    assert kept.nonzero().ravel().tolist() == list(range(90))
    assert torch.equal(thinned(Breadcrumbs(density=1.0, gamma=0.2, compat="mergekit"), tau), tau)
    middle = thinned(Breadcrumbs(density=0.5, gamma=0.1, compat="mergekit", rescale=True), tau)
    assert middle.nonzero().ravel().tolist() == list(range(40, 90))
    assert float(middle.sum()) == pytest.approx(5050)


def test_breadcrumbs_refuses_model_by_model() -> None:
    with pytest.raises(UserError, match=r"density \+ gamma must be at most 1, got 0.9 \+ 0.2"):
        Breadcrumbs(density={"a": 0.5, "b": 0.9}, gamma={"a": 0.5, "b": 0.2})
    Breadcrumbs(density={"a": 0.5, "b": 0.8}, gamma={"a": 0.5, "b": 0.2})
    with pytest.raises(UserError, match="rescale is a setting of mergekit's form"):
        Breadcrumbs(rescale=True)


# --- DELLA ----------------------------------------------------------------------------------------------------------


def test_keep_probabilities_fall_in_a_line_around_the_density() -> None:
    assert keep_probabilities(5, 0.5, 0.2) == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3])
    assert keep_probabilities(1, 0.4, 0.2).tolist() == [0.4]


@pytest.mark.parametrize("coarse", [False, True])
def test_ranks_by_magnitude_in_each_row(coarse: bool) -> None:
    rows = torch.tensor([[1.0, -3.0, 2.0, -2.0], [0.0, -0.0, 5.0, -7.0]])
    assert by_magnitude(rows, coarse).tolist() == [[1, 2, 3, 0], [7, 6, 4, 5]]
    # fp32 tells apart what bf16 does not.
    close_by = torch.tensor([[1.0, 1.0 + 2.0**-20]])
    assert by_magnitude(close_by, coarse).tolist() == ([[0, 1]] if coarse else [[1, 0]])


def test_della_kernel() -> None:
    rows = torch.tensor([[1.0, -3.0, 2.0]])
    draws = torch.tensor([[0.55, 0.55, 0.35]])  # of the largest, the middle and the smallest
    chances = np.array([0.6, 0.5, 0.4])
    torch.testing.assert_close(drop_by_rank(rows, draws, chances, True), torch.tensor([[2.5, -5.0, 0.0]]))
    torch.testing.assert_close(drop_by_rank(rows, draws, chances, False), torch.tensor([[1.0, -3.0, 0.0]]))


def test_della_keeps_large_entries_more_often_and_the_expectation() -> None:
    """Of 2,000 equal rows, the entry of rank r stays in a share p_r; the mean over rows is the row. Five deviations."""
    row = torch.tensor([0.1, -2.0, 0.5, -0.2, 1.0])
    found = thinned(Della(density=0.5, epsilon=0.3), row.repeat(2000, 1))
    order = row.abs().argsort(descending=True)
    chances = torch.tensor([0.8, 0.65, 0.5, 0.35, 0.2])
    share = (found != 0).double().mean(0)[order]
    assert ((share - chances).abs() < 5 * (chances * (1 - chances) / 2000).sqrt()).all()
    deviation = row.abs()[order] * ((1 - chances) / chances / 2000).sqrt()
    assert ((found.double().mean(0) - row)[order].abs() < 5 * deviation).all()


def test_della_rows_are_slices_along_the_first_axis_or_lie_along_the_second_in_mergekits_form() -> None:
    """In a convolution, one output's entry per input at one position; the largest there stays surely enough."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([1.0, 100.0])  # the second position holds what is large
    tau = torch.rand(400, 10, 1, 2, generator=generator).add(0.5) * scale
    kept = (thinned(Della(density=0.5, epsilon=0.49), tau) != 0).double()
    theirs = (thinned(Della(density=0.5, epsilon=0.49, compat="mergekit"), tau) != 0).double()
    assert kept[..., 1].mean() > 0.7 > 0.3 > kept[..., 0].mean()
    assert theirs[..., 1].mean() == pytest.approx(0.5, abs=0.05) == theirs[..., 0].mean()
    top = tau.argmax(1, keepdim=True)
    assert theirs.gather(1, top).mean() > 0.95


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("shape", [(), (1,), (7, 1), (1, 1, 1), (0, 3), (3, 0)])
def test_della_handles_rows_of_one_entry(shape: tuple[int, ...], compat: Any) -> None:
    found = thinned(Della(density=0.5, compat=compat), torch.ones(shape))
    kept = found[found != 0]
    grown = 2.0 if compat == "paper" else found.numel() / max(kept.numel(), 1)
    assert found.shape == shape
    torch.testing.assert_close(kept, torch.full_like(kept, grown))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3), (0, 2, 2)])
@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_della_leaves_empty_tensors_empty_in_any_layout(shape: tuple[int, ...], compat: Any) -> None:
    assert thinned(Della(density=0.5, compat=compat), torch.ones(shape)).shape == shape
    # A method that sees whole tensors is given the empty ones too.
    found = IsoC()(opened({"m": torch.ones(shape)}), transforms=[Della(density=0.5, compat=compat)])["w"]
    assert found.shape == shape


@pytest.mark.parametrize("density", [4e-6, 2.28e-5, 1e-3])
def test_della_keeps_the_expectation_at_small_densities(density: float) -> None:
    """16 bits would keep no entry at 4e-6, and 1.53e-5 of them where 2.28e-5 is divided by."""
    tau = torch.ones(64, GRID)
    kept = int((thinned(Della(density=density, epsilon=0.0), tau) != 0).sum())
    expected = density * tau.numel()
    assert abs(kept - expected) < 2.5 * math.sqrt(expected)


def test_della_ranks_a_long_vector_in_blocks_wherever_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tau = torch.randn(2 * GRID + 77, generator=torch.Generator().manual_seed(2))
    expected = thinned(Della(density=0.4, epsilon=0.3), tau)
    for blocks in (1, 2):
        in_chunks(monkeypatch, blocks)
        assert torch.equal(thinned(Della(density=0.4, epsilon=0.3), tau), expected)


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.1), (0.1, 0.1), (0.05, 0.07), (0.95, 0.07)])
def test_della_refuses_probabilities_beyond_zero_and_one(density: float, epsilon: float) -> None:
    with pytest.raises(UserError, match=r"must lie between 0 and 1.*epsilon must be below 0\.\d+"):
        Della(density=density, epsilon=epsilon)
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        Della(density={"a": 0.5, "b": density}, epsilon=epsilon)
    Della(density=1.0, epsilon=epsilon)


# --- SCE ------------------------------------------------------------------------------------------------------------


def test_spread_is_the_variance_up_to_a_factor_and_zero_for_equal_models() -> None:
    rows = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(3))
    expected = 16 * rows.double().var(0, unbiased=False)
    torch.testing.assert_close(spread(rows)[0].double(), expected, rtol=1e-6, atol=0)
    assert not spread(rows[:1].repeat(3, 1) * 1e-3).any() and not spread(rows[:1]).any()
    # A shared part far larger than what differs costs no digits.
    shifted = rows.double() + 1e6
    torch.testing.assert_close(spread(shifted)[0].double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(shifted, rows.double() + 1e6)


def test_sce() -> None:
    """Of four entries the models differ on three; one is selected: the second, with squares 9 and 1."""
    vectors = of_two([1.0, 3.0, 2.0, -1.0], [1.0, -1.0, 4.0, -2.0])
    # Weights 0.9 and 0.1; where both agree the weighted mean, else the elected one alone.
    close(Sce(density=0.34)(vectors)["w"], [1.0, 3.0, 2.2, -1.1])
    # All differing entries: 14 and 21 of the squares.
    close(Sce(density=1.0)(vectors)["w"], [1.0, 3.0, (15 * 2 + 22 * 4) / 37, -(15 + 44) / 37])


def test_mergekits_sce_leaves_what_is_not_selected_and_counts_small_models_alike() -> None:
    vectors = of_two([1.0, 3.0, 2.0, -1.0], [1.0, -1.0, 4.0, -2.0])
    close(Sce(density=0.34, compat="mergekit")(vectors)["w"], [0.0, 3.0, 0.0, 0.0])
    small = opened({"a": fp64([3e-4, 1e-4]), "b": fp64([1e-4, 1e-4])})
    close(1e4 * Sce(density=1.0, compat="mergekit")(small)["w"], [2.0, 1.0])
    close(1e4 * Sce(density=1.0)(small)["w"], [3 * 10 / 12 + 2 / 12, 1.0])


def test_sce_does_not_depend_on_scale() -> None:
    taus = {t: torch.randn(500, generator=torch.Generator().manual_seed(n)) for n, t in enumerate("abc")}
    merged = Sce(density=0.2)(opened(taus))["w"]
    for factor in (2.0**-40, 2.0**20):
        scaled = Sce(density=0.2)(opened({t: tau * factor for t, tau in taus.items()}))["w"]
        assert torch.equal(scaled, merged * factor)


def test_sce_of_models_that_differ_nowhere_is_that_model() -> None:
    tau = torch.randn(100, generator=torch.Generator().manual_seed(4))
    for density in (0.1, 1.0):
        torch.testing.assert_close(Sce(density=density)(opened(dict.fromkeys("abc", tau)))["w"], tau)


# --- what they share ------------------------------------------------------------------------------------------------

EVERY: list[tuple[MergeMethod, list[Transform]]] = [
    (Ties(compat="mergekit", rescale=True), []),
    (Sce(), []),
    (Sce(density=0.4, compat="mergekit"), []),
    (Ties(density=1.0, compat="mergekit"), [Dare(drop_rate=0.5, compat="mergekit")]),
    (Ties(density=1.0, compat="mergekit"), [Della(density=0.5, compat="mergekit")]),
    (TaskArithmetic(compat="mergekit", normalize=True), [Breadcrumbs(compat="mergekit", rescale=True)]),
]


@pytest.mark.parametrize(("method", "transforms"), EVERY, ids=lambda value: str(value)[:40])
def test_few_distinct_magnitudes_across_chunks(
    monkeypatch: pytest.MonkeyPatch, method: MergeMethod, transforms: list[Transform]
) -> None:
    """bf16 models, where many entries tie at every threshold: all chunks make the same bytes."""
    generator = torch.Generator().manual_seed(5)
    base = {"w": (0.02 * torch.randn(3, GRID + 100, generator=generator)).bfloat16()}
    models = {
        t: {"w": (base["w"].float() + 1e-3 * torch.randn(base["w"].shape, generator=generator)).bfloat16()}
        for t in "abc"
    }
    vectors = TaskVectors.open(base=base, models=models, check=False)
    merged = []
    for blocks in (1, 2, 8):
        in_chunks(monkeypatch, blocks)
        merged.append(method(vectors, transforms=transforms, seed=3)["w"])
    assert torch.equal(merged[0], merged[1]) and torch.equal(merged[1], merged[2])
    assert not torch.equal(merged[0], base["w"])


def test_ranks_by_task_and_of_what_is_not_zero() -> None:
    """Each task has its own count; with ``nonzero`` counts go by the entries that are not 0."""
    generator = torch.Generator().manual_seed(6)
    size = 3 * GRID + 5
    taus = {t: torch.randn(size, generator=generator) for t in "ab"}
    taus["b"][torch.rand(size, generator=generator) < 0.9] = 0.0
    vectors = opened(taus)
    for nonzero in (False, True):
        largest = LargestEntries(
            tensors={"w": vectors.info("w")}, ranks=lambda n: [[n // 4], [n // 3, 0]], nonzero=nonzero
        )
        while not largest.complete:
            (view,) = [vectors.view("w")]
            largest = largest.conclude(largest.measure(view))
        counts = [int((tau != 0).sum()) if nonzero else size for tau in taus.values()]
        kept = [int((tau != 0).sum()) for tau in largest.trim(view)]
        assert kept == [counts[0] // 4, min(counts[1] // 3, int((taus["b"] != 0).sum()))]
        assert math.isclose(largest.groups[""].cuts[1][1].rank, 0)
