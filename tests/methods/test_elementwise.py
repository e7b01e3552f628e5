"""Worked examples, properties and bad input of the methods that go entry by entry; each fails on a likely mistake."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.methods import (
    ArceeFusion,
    Breadcrumbs,
    Consensus,
    Emr,
    Expo,
    MagMax,
    MergeMethod,
    NearSwap,
    Passthrough,
    Pcb,
    Ram,
    RamPlus,
    TallMask,
    TaskArithmetic,
)
from lightning_merge.methods.arcee_fusion import joined, softmax_moments
from lightning_merge.tensor_view import GRID

State = dict[str, Tensor]


def fp64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def vectors_of(models: dict[str, list[float]], base: float = 0.0) -> TaskVectors:
    """Task vectors over one tensor ``w`` of equal base entries, in fp64."""
    size = len(next(iter(models.values())))
    states = {name: {"w": fp64(values) + base} for name, values in models.items()}
    return TaskVectors.open({"w": torch.full((size,), base, dtype=torch.float64)}, states, check=False)


def merged(method: MergeMethod, models: dict[str, list[float]]) -> list[float]:
    return method(vectors_of(models))["w"].tolist()


def random_models(count: int = 3, size: int = 2000, scale: float = 0.01, seed: int = 0) -> dict[str, list[float]]:
    random = np.random.default_rng(seed)
    return {name: (scale * random.normal(size=size)).tolist() for name in "abcdefgh"[:count]}


# --- PCB --------------------------------------------------------------------------------------------------------------

TWO = {"a": [0.4, -0.1, 0.2, -0.6], "b": [0.2, 0.5, -0.4, -0.3]}


def test_pcb_worked_example_of_the_paper() -> None:
    """Task a keeps its first and last entry, b the two between: each goes in whole."""
    assert merged(Pcb(ratio=0.5), TWO) == pytest.approx([0.4, 0.5, -0.4, -0.6], abs=1e-15)


def test_pcb_worked_example_of_the_code() -> None:
    """The largest of four magnitudes is cut to the third; of two kept entries the smaller has weight 0."""
    assert merged(Pcb(ratio=0.5, variant="code"), TWO) == pytest.approx([0, 0.4, 0, -0.4], abs=1e-7)


def test_pcb_code_leaves_out_the_smallest_kept_entry_however_its_score_rounds() -> None:
    """A score beyond its own fp32 rounding by 1e-8 is no weight: divided by itself it would count in full."""
    base = {"w": torch.zeros(4)}
    found = Pcb(ratio=0.5, variant="code")(TaskVectors.open(base, {m: {"w": torch.tensor(v)} for m, v in TWO.items()}))
    assert found["w"].tolist() == pytest.approx([0, 0.4, 0, -0.4], abs=1e-7)
    for seed in range(30):
        kept = np.count_nonzero(merged(Pcb(ratio=0.1, variant="code"), random_models(1, 1000, seed=seed)))
        assert kept == 99


def test_pcb_shared_entries_are_averaged_by_their_scores() -> None:
    """Both keep all: the mean weighs by β, so the larger and better agreed entry has more say than a plain mean."""
    found = merged(Pcb(ratio=1.0), {"a": [1.0, 0.0, 0.0, 0.0], "b": [0.5, 0.0, 0.0, 0.2]})
    assert 0.75 < found[0] < 1.0
    assert found[1:3] == [0, 0]
    assert 0 < found[3] < 0.2


@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
def test_pcb_of_one_task_keeps_its_largest_entries_as_they_are(ratio: float) -> None:
    (values,) = random_models(1).values()
    found = np.array(merged(Pcb(ratio=ratio, scale=2.0), {"a": values}))
    kept = np.argsort(-np.abs(values))[: int(ratio * len(values))]
    assert set(np.flatnonzero(found)) == set(kept)
    assert (found[kept] == 2 * np.array(values)[kept]).all()


def test_pcb_code_of_one_task_cuts_its_outliers() -> None:
    (values,) = random_models(1, size=40_000).values()
    found, size = np.array(merged(Pcb(ratio=0.2, variant="code"), {"a": values})), np.sort(np.abs(values))
    most = size[int(40_000 * 0.9999 - 1)]
    kept = np.abs(values) > np.sort(np.abs(values))[int(40_000 * 0.8)]
    assert (np.abs(values) > most).sum() == 4
    np.testing.assert_allclose(found[kept], np.clip(np.array(values)[kept], -most, most), rtol=1e-6)
    assert not found[~kept].any()


def test_pcb_scales_with_the_task_vectors() -> None:
    """The paper's scores do not depend on the common size of the task vectors; the code's do, by tanh."""
    small = np.array(merged(Pcb(ratio=0.3), random_models(scale=1e-6)))
    large = np.array(merged(Pcb(ratio=0.3), random_models(scale=1.0)))
    np.testing.assert_allclose(small * 1e6, large, rtol=1e-9, atol=1e-12)
    code = [np.array(merged(Pcb(ratio=0.3, variant="code"), random_models(scale=scale))) / scale for scale in (1e-3, 3)]
    assert not np.allclose(code[0], code[1], rtol=1e-2)


def test_pcb_a_model_that_did_not_move_takes_no_part() -> None:
    """Its scores would all be equal, and the first entries by index would be diluted."""
    models = random_models(2)
    alone = merged(Pcb(ratio=0.2), models)
    assert merged(Pcb(ratio=0.2), {**models, "aa": [0.0] * 2000}) == alone


def test_pcb_equal_magnitudes_do_not_divide_by_zero() -> None:
    """min = max in every product: all scores are equal, and the first entries stay."""
    assert merged(Pcb(ratio=0.5), {"a": [0.5, 0.5, 0.5, 0.5], "b": [0.5, 0.5, 0.5, 0.5]}) == [0.5, 0.5, 0, 0]
    assert merged(Pcb(ratio=0.5, variant="code"), {"a": [0.5] * 4, "b": [0.5] * 4}) == [0, 0, 0, 0]


def test_pcb_competes_over_the_whole_model() -> None:
    """The tensor that moved ten times as far takes the whole budget."""
    base = {"far": torch.zeros(5), "near": torch.zeros(5)}
    model = {"far": torch.arange(10.0, 15.0), "near": torch.arange(1.0, 6.0)}
    found = Pcb(ratio=0.5)(TaskVectors.open(base, {"a": model}))
    assert torch.equal(found["far"], model["far"]) and not found["near"].any()


# --- MagMax -----------------------------------------------------------------------------------------------------------


def test_magmax_takes_the_largest_and_of_equal_ones_the_first_name() -> None:
    models = {"b": [0.3, -2.0, 1.0], "a": [-0.3, 1.0, -0.5]}
    assert merged(MagMax(scale=1.0), models) == [-0.3, -2.0, 1.0]
    assert merged(MagMax(), models) == [-0.15, -1.0, 0.5]


def test_magmax_selects_entries_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": 1e-3 * torch.randn(500, generator=generator)}
    models = {name: {"w": torch.randn(500, generator=generator)} for name in "ab"}
    found = MagMax(scale=1)(TaskVectors.open(base, models, check=False))["w"]
    first = (models["a"]["w"] - base["w"]).abs() >= (models["b"]["w"] - base["w"]).abs()
    assert torch.equal(found, torch.where(first, models["a"]["w"], models["b"]["w"]))
    assert (base["w"] + (models["a"]["w"] - base["w"]) != models["a"]["w"]).any(), "the example must round"


def test_magmax_sees_what_transforms_left() -> None:
    crumbs = [Breadcrumbs(density=0.5, gamma=0.0)]
    vectors = vectors_of({"a": [4.0, 3.0, 0.1, 0.2], "b": [0.5, 0.4, 1.0, 2.0]}, base=1.0)
    assert (MagMax(scale=1)(vectors, transforms=crumbs)["w"] - 1).tolist() == [4.0, 3.0, 1.0, 2.0]
    vectors = vectors_of({"a": [4.0, 3.0, 2.0, 2.0], "b": [0.5, 0.4, 1.0, 1.5]}, base=1.0)
    assert (MagMax(scale=1)(vectors, transforms=crumbs)["w"] - 1).tolist() == [4.0, 3.0, 1.0, 1.5]


# --- TALL-masks and consensus -----------------------------------------------------------------------------------------

# The sum is [1.5, 0.5, 0.1, 1.0]; entry 0 is shared, 1 is a's own, 2 a conflict, 3 is b's own.
CONFLICT = {"a": [1.0, 0.5, 3.0, 0.0], "b": [0.5, 0.0, -2.9, 1.0]}


def test_tall_mask_worked_example() -> None:
    assert merged(TallMask(task="a", threshold=0.9), CONFLICT) == pytest.approx([1.5, 0.5, 0.1, 0])
    assert merged(TallMask(task="a", threshold=1.1), CONFLICT) == pytest.approx([1.5, 0.5, 0, 0])
    # |0.5| against 0.9 · |1.0|: b's share of the first entry is too small.
    assert merged(TallMask(task="b", threshold=0.9), CONFLICT) == pytest.approx([0, 0, 0.1, 1.0])


def test_tall_mask_compares_task_vectors_not_weights() -> None:
    """A base far from 0 changes nothing; comparing |θ₀ − τ_t| instead keeps nearly every entry."""
    found = TallMask(task="b", threshold=0.9)(vectors_of(CONFLICT, base=8.0))["w"] - 8
    assert found.tolist() == pytest.approx([0, 0, 0.1, 1.0])


def test_tall_mask_with_threshold_zero_keeps_what_the_task_changed() -> None:
    assert merged(TallMask(task="b", threshold=0.0), CONFLICT) == pytest.approx([1.5, 0, 0.1, 1.0])


def test_consensus_drops_selfish_and_catastrophic_entries() -> None:
    # With λ = 1.05: a's mask is 1, 1, 0, 0 (3.0 against 1.05 · 2.9), b's 0, 0, 0, 1.
    models = {**CONFLICT, "c": [0.0, 0.0, 0.0, 0.0]}
    assert merged(Consensus(k=0, scale=1.0), models) == pytest.approx([1.5, 0.5, 0.1, 1.0])
    assert merged(Consensus(k=1, threshold=1.05, scale=1.0), models) == pytest.approx([1.5, 0.5, 0, 1.0])
    assert merged(Consensus(k=2, threshold=0.4, scale=1.0), models) == pytest.approx([1.5, 0, 0.1, 0])
    assert merged(Consensus(k=3, threshold=0.0, scale=1.0), models) == [0, 0, 0, 0]


def test_consensus_with_k_zero_is_task_arithmetic_and_more_masks_keep_less() -> None:
    models = random_models(5)
    assert merged(Consensus(k=0, scale=0.4), models) == pytest.approx(merged(TaskArithmetic(scale=0.4), models))
    kept = [set(np.flatnonzero(merged(Consensus(k=k), models))) for k in range(6)]
    assert all(more > less for more, less in pairwise(kept))


def test_consensus_uses_each_tasks_own_threshold() -> None:
    strict = {"a": 0.4, "b": 5.0}
    # Only a's entry 0 and 2 pass; b's threshold of 5 leaves it entry 3 alone.
    assert merged(Consensus(k=1, threshold=strict, scale=1.0), CONFLICT) == pytest.approx([1.5, 0.5, 0.1, 1.0])
    assert merged(Consensus(k=2, threshold=strict, scale=1.0), CONFLICT) == [0, 0, 0, 0]


def test_consensus_that_nothing_can_reach_is_refused() -> None:
    with pytest.raises(UserError, match=r"k is 3, but there are 2 models.*Expected at most 2"):
        merged(Consensus(k=3), CONFLICT)


# --- EMR --------------------------------------------------------------------------------------------------------------


def test_emr_worked_example() -> None:
    """Signs +, −, +, and 0 where the sum is; magnitudes 2, 3, 1; a agrees in the first and third: 4.5 / 3."""
    models = {"a": [2.0, 1.0, 1.0, 0.5], "b": [1.0, -3.0, 0.5, -0.5]}
    assert merged(Emr(task="a"), models) == pytest.approx([3.0, 0, 1.5, 0])
    # b agrees in the first three: 5 / 6.
    assert merged(Emr(task="b"), models) == pytest.approx([5 / 3, -2.5, 5 / 6, 0])


@pytest.mark.parametrize("task", ["a", "b", "c"])
def test_emr_keeps_the_size_of_the_task_vector_and_never_its_opposite(task: str) -> None:
    models = random_models(3)
    own, found = np.array(models[task]), np.array(merged(Emr(task=task), models))
    assert np.abs(found).sum() == pytest.approx(np.abs(own).sum())
    assert (own * found >= 0).all() and (found != 0).sum() > 1000


def test_emr_rescales_by_the_whole_model_or_by_each_tensor() -> None:
    base = {"u": torch.zeros(2), "v": torch.zeros(2)}
    models = {
        "a": {"u": torch.tensor([1.0, 1.0]), "v": torch.tensor([1.0, 1.0])},
        "b": {"u": torch.tensor([3.0, 3.0]), "v": torch.tensor([1.0, 1.0])},
    }
    vectors = TaskVectors.open(base, models, check=False)
    whole, each = Emr(task="a")(vectors), Emr(task="a", scope="tensor")(vectors)
    assert (whole["u"].tolist(), whole["v"].tolist()) == ([1.5, 1.5], [0.5, 0.5])
    assert (each["u"].tolist(), each["v"].tolist()) == ([1, 1], [1, 1])


def test_emr_of_a_task_that_never_agrees_is_the_base() -> None:
    assert merged(Emr(task="b"), {"a": [2.0, -2.0], "b": [-1.0, 1.0]}) == [0, 0]


@pytest.mark.parametrize("method", [Emr, TallMask])
def test_the_task_must_be_one_of_the_models(method: type[MergeMethod]) -> None:
    models = {"cars": [1.0], "sun397": [2.0]}
    with pytest.raises(UserError, match=r"task must name one of the models, got 'car'.*Did you mean 'cars'\?"):
        merged(method(task="car"), models)  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"got ''. Expected one of cars, sun397"):
        merged(method(), models)


# --- RAM --------------------------------------------------------------------------------------------------------------

SPARSE = {"a": [1.0, 2.0, 0.0, 0.0, 3.0, 0.0], "b": [3.0, 0.0, 5.0, 0.0, 0.0, 0.0], "c": [2.0, 0.0, 0.0, 0.0, 1.0, 7.0]}


def test_ram_keeps_unique_changes_and_averages_shared_ones() -> None:
    """The fifth entry is shared by two of three: it is divided by 2, not by 3."""
    assert merged(Ram(), SPARSE) == [2.0, 2.0, 5.0, 0.0, 2.0, 7.0]


def test_ram_plus_enlarges_unique_changes_by_how_much_is_shared() -> None:
    """a shares two and owns one, b one and one, c two and one: of the ratios 2, 1 and 2 no more than 1.5 counts."""
    found = merged(RamPlus(r=0.5, alpha=1.5), SPARSE)
    assert found == pytest.approx([2.0, 2 * 1.75, 5 * 1.5, 0.0, 2.0, 7 * 1.75])
    assert merged(RamPlus(r=0.0), SPARSE) == merged(Ram(), SPARSE)


def test_ram_plus_counts_over_the_model_and_mergekit_over_each_tensor() -> None:
    base = {"u": torch.zeros(3), "v": torch.zeros(3)}
    models = {
        "a": {"u": torch.tensor([1.0, 1.0, 0.0]), "v": torch.tensor([1.0, 1.0, 1.0])},
        "b": {"u": torch.tensor([1.0, 0.0, 0.0]), "v": torch.tensor([0.0, 0.0, 0.0])},
    }
    vectors = TaskVectors.open(base, models, check=False)
    whole, each = (RamPlus(r=1.0, alpha=9.0, compat=compat)(vectors) for compat in ("paper", "mergekit"))
    assert whole["u"].tolist() == [1.0, 1.25, 0.0] and whole["v"].tolist() == [1.25] * 3  # one shared, four unique
    assert each["u"].tolist() == [1.0, 2.0, 0.0] and each["v"].tolist() == [1.0] * 3  # one and one; none and three


@pytest.mark.parametrize("method", [Ram, RamPlus])
def test_ram_goes_by_the_scale_of_the_changes_and_mergekit_by_the_unit(method: type[MergeMethod]) -> None:
    """Changes of 5e-6 are as good as others; compared with 1e-5 they vanish."""
    small = {name: [5e-6 * value for value in values] for name, values in SPARSE.items()}
    expected = [5e-6 * value for value in merged(method(), SPARSE)]
    assert merged(method(), small) == pytest.approx(expected, rel=1e-9, abs=0)
    lost = merged(method(compat="mergekit"), small)  # type: ignore[call-arg]
    assert lost[1] == 0 and lost[2] != 0


def test_ram_leaves_out_what_is_tiny_beside_the_tensors_other_changes() -> None:
    noisy = {"a": [1.0, 2.0, 3.0, 1e-7], "b": [1e-7, 1e-7, 3.0, 1e-7]}
    assert merged(Ram(), noisy) == [1.0, 2.0, 3.0, 0.0]
    assert merged(Ram(epsilon=0.0), noisy)[0] == pytest.approx(0.5)


# --- two models -------------------------------------------------------------------------------------------------------


def test_nearswap_moves_by_at_most_t_and_takes_what_is_nearer() -> None:
    found = NearSwap(t=0.5)(vectors_of({"a": [0.2, -0.5, 0.75, -3.0]}, base=2.0))["w"]
    assert found.tolist() == [2.2, 1.5, 2.5, 1.5]


def test_expo_is_task_arithmetic_with_one_more() -> None:
    models = random_models(1)
    for alpha in (-0.5, 0.3, 2.0):
        assert merged(Expo(alpha=alpha), models) == pytest.approx(merged(TaskArithmetic(scale=1 + alpha), models))
    found = Expo(alpha=0.5)(vectors_of({"a": [1.0, -2.0]}, base=10.0))["w"]
    assert found.tolist() == [11.5, 7.0]


def test_passthrough_needs_no_base_and_scales() -> None:
    model = {"w": torch.tensor([-0.0, 1.0, 3.3])}
    vectors = TaskVectors.open(None, {"a": model})
    assert torch.equal(Passthrough()(vectors)["w"].view(torch.int32), model["w"].view(torch.int32))
    assert Passthrough(scale=2.0)(vectors)["w"].tolist() == (2 * model["w"]).tolist()


@pytest.mark.parametrize("method", [ArceeFusion(), Expo(), NearSwap(), Passthrough()])
def test_methods_of_one_model_refuse_two(method: MergeMethod) -> None:
    with pytest.raises(UserError, match=f"{type(method).__name__} takes exactly 1 model, got 2"):
        merged(method, TWO)


# --- Arcee Fusion -----------------------------------------------------------------------------------------------------


def divergence(theta: Tensor, base: Tensor) -> float:
    """KL(softmax θ ‖ softmax θ₀) by the definition."""
    p, q = torch.log_softmax(theta, 0), torch.log_softmax(base, 0)
    return float((p.exp() * (p - q)).sum())


def fuse(base: Tensor, model: Tensor) -> Tensor:
    return ArceeFusion()(TaskVectors.open({"w": base}, {"a": {"w": model}}, check=False))["w"]


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-6])
def test_fusion_divergence_holds_for_changes_of_any_size(size: float) -> None:
    """The definition, a difference of logarithms, loses small changes even in fp64; half the variance holds."""
    generator = torch.Generator().manual_seed(1)
    theta, delta = (torch.randn(1, 4000, generator=generator, dtype=torch.float64) for _ in range(2))
    moments = softmax_moments(theta, size * delta)
    found = float(np.log1p(moments[0, 3]))
    if size > 1e-2:
        assert found == pytest.approx(divergence(theta[0], theta[0] - size * delta[0]), rel=1e-9)
    else:
        p = torch.softmax(theta[0], 0)
        variance = float((p * delta[0].square()).sum() - (p * delta[0]).sum() ** 2)
        assert found == pytest.approx(size**2 * variance / 2, rel=20 * size)


def test_fusion_divergence_of_a_vector_is_that_of_its_parts() -> None:
    generator = torch.Generator().manual_seed(2)
    theta, delta = (torch.randn(1, 900, generator=generator, dtype=torch.float64) for _ in range(2))
    theta[0, 300] = 6.0  # the parts' largest values differ, and how far they moved
    delta[0, 512:] += 3.0
    parts = [softmax_moments(theta[:, at], delta[:, at]) for at in (slice(0, 256), slice(256, 512), slice(512, 900))]
    assert joined(np.concatenate(parts)) == pytest.approx(divergence(theta[0], (theta - delta)[0]), rel=1e-9)


def test_fusion_of_a_long_vector_takes_one_softmax_over_all_of_it() -> None:
    """All entries of a vector share one divergence, so the score ranks by |τ| alone, over all its grid blocks."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(3 * GRID + 77, generator=generator)
    model = base + 0.01 * torch.randn(base.shape, generator=generator) * (1 + (torch.arange(len(base)) > GRID))
    size = (model - base).abs()
    ordered = size.sort().values
    first, median, third = (float(ordered[(len(base) - 1) * part // 4]) for part in (1, 2, 3))
    taken = size > median + 1.5 * (third - first)
    found = fuse(base, model)
    differs = (found == model) != taken
    assert taken.sum() > 1000 and differs.sum() <= 2, "but for the rounding of scores at the threshold"


def test_fusion_prefers_rows_whose_distribution_moved() -> None:
    """Adding one number to a whole row leaves its softmax: no importance, however large the change."""
    generator = torch.Generator().manual_seed(4)
    base, delta = (torch.randn(6, 50, generator=generator) for _ in range(2))
    model = base + 0.1 * delta
    model[0] = base[0] + 5.0
    model[1, 7] += 2.0
    found = fuse(base, model)
    assert torch.equal(found[0], base[0])
    assert found[1, 7] == model[1, 7] and (found[1] == model[1]).sum() > 5
    assert 0.05 < (found != base).double().mean() < 0.4


def test_fusion_takes_all_where_quartiles_are_equal() -> None:
    """Half of the scores and more are 0: the threshold is 0, and every entry reaches it (≥, not >)."""
    base = torch.zeros(4, 8)
    model = base.clone()
    model[0, 0], model[3, 4] = 1.0, -2.0
    assert torch.equal(fuse(base, model), model)


def test_fusion_takes_scalars_and_columns_whole() -> None:
    """A softmax over one entry is 1 before and after: all scores are 0, as is the threshold."""
    for shape in ((), (6, 1)):
        base = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        assert torch.equal(fuse(base, base + 1), base + 1)


def test_fusion_chooses_the_same_entries_for_smaller_changes() -> None:
    """Scores of 1e-45 must not vanish in fp32: changes of 1e-15 are chosen as those of 1e-7 are."""
    generator = torch.Generator().manual_seed(6)
    base, delta = (1e-6 * torch.randn(40, 60, generator=generator, dtype=torch.float64) for _ in range(2))
    chosen = [(fuse(base, base + size * delta) != base) for size in (1e-1, 1e-5, 1e-9)]
    assert 0.02 < chosen[0].double().mean() < 0.3
    assert (chosen[0] != chosen[1]).sum() <= 1
    # Exponentials of 1e-15 have few digits left even in fp64.
    assert (chosen[0] != chosen[2]).sum() <= 20
