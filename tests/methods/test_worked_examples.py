"""Small examples whose results can be checked by hand, and the properties each method's page states."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.methods import (
    Breadcrumbs,
    Dare,
    GreedySoup,
    LwPTV,
    MergeMethod,
    SimpleAverage,
    TaskArithmetic,
    Ties,
    Transform,
    WeightedAverage,
    WiseFT,
)
from lightning_merge.methods.average import weighted_average
from lightning_merge.methods.dare import drop_and_rescale
from lightning_merge.methods.lwptv import layer_mask, layer_of
from lightning_merge.methods.ties import disjoint_merge, elect_sign

BASE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
TAU_A = [[0.4, -0.1, 0.0], [0.2, 0.3, -0.6]]
TAU_B = [[-0.2, 0.5, 0.1], [0.2, -0.4, -0.3]]

State = dict[str, Tensor]


def fp64(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def opened(base: State, taus: dict[str, State]) -> TaskVectors:
    models = {model: {name: base[name] + tau[name] for name in base} for model, tau in taus.items()}
    return TaskVectors.open(base=base, models=models, check=False)


@pytest.fixture
def two() -> TaskVectors:
    """θ₀, τ_A and τ_B of the worked examples, as one tensor ``w`` of 2 x 3."""
    return opened({"w": fp64(BASE)}, {"A": {"w": fp64(TAU_A)}, "B": {"w": fp64(TAU_B)}})


def close(merged: State, expected: object, name: str = "w") -> None:
    torch.testing.assert_close(merged[name], fp64(expected), rtol=0, atol=1e-12)


def change(merged: State, expected: object) -> None:
    """Compare what a merge added to the base."""
    torch.testing.assert_close(merged["w"] - fp64(BASE), fp64(expected), rtol=0, atol=1e-12)


# --- averages and lines ---------------------------------------------------------------------------------------------


def test_simple_average(two: TaskVectors) -> None:
    close(SimpleAverage()(two), [[1.1, 2.2, 3.05], [4.2, 4.95, 5.55]])


def test_weighted_average(two: TaskVectors) -> None:
    # 3/4 θ_A + 1/4 θ_B
    close(WeightedAverage(weights={"B": 1, "A": 3})(two), [[1.25, 2.05, 3.025], [4.2, 5.125, 5.475]])
    # not normalised: θ_A + 2 θ_B, which is three times as large
    close(WeightedAverage(weights={"A": 1, "B": 2}, normalize=False)(two), [[3.0, 6.9, 9.2], [12.6, 14.5, 16.8]])


def test_weights_that_sum_to_zero_are_refused(two: TaskVectors) -> None:
    with pytest.raises(UserError, match="weights sum to 0"):
        WeightedAverage(weights={"A": 1, "B": -1})(two)
    change(WeightedAverage(weights={"A": 1, "B": -1}, normalize=False)(two), fp64(TAU_A) - fp64(TAU_B) - fp64(BASE))


def test_weights_whose_sum_is_only_rounding_are_refused() -> None:
    """0.1 + 0.2 − 0.3 is 5.6e-17; divided by it, the average would be of the order of 1e16."""
    vectors = TaskVectors.open(models={name: {"w": torch.ones(2)} for name in "abc"}, check=False)
    assert 0.1 + 0.2 - 0.3 != 0
    with pytest.raises(UserError, match="weights sum to 0"):
        WeightedAverage(weights={"a": 0.1, "b": 0.2, "c": -0.3})(vectors)
    small = WeightedAverage(weights={"a": 1e-12, "b": 2e-12, "c": 1e-12})(vectors)["w"]
    torch.testing.assert_close(small, torch.ones(2))


def test_settings_by_model_name_must_name_the_models(two: TaskVectors) -> None:
    with pytest.raises(UserError, match=r"scale names the model 'a'.*Known: A, B"):
        TaskArithmetic(scale={"a": 1.0, "B": 1.0})(two)
    with pytest.raises(UserError, match="no value for the model 'B'"):
        TaskArithmetic(scale={"A": 1.0})(two)


def test_average_of_equal_models_is_exact_for_any_number_of_them() -> None:
    # In fp32 a running sum of 7 equal numbers rounds; a seventh of it is then another number.
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weighted_average(values.expand(7, -1), [1 / 7] * 7), values)
    for count in (3, 7, 11):
        models = {str(number): {"w": values.clone()} for number in range(count)}
        assert torch.equal(SimpleAverage()(TaskVectors.open(models=models, check=False))["w"], values)


def test_one_weight_takes_that_models_entries() -> None:
    a, b = torch.tensor([1.0, -0.0, 3e-8]), torch.tensor([1e8, 1e30, -1e8])
    vectors = TaskVectors.open(models={"a": {"w": a}, "b": {"w": b}}, check=False)
    merged = WeightedAverage(weights={"a": 0.3, "b": 0})(vectors)["w"]
    assert torch.equal(merged, a) and torch.signbit(merged[1])


def test_wise_ft() -> None:
    vectors = opened({"w": fp64(BASE)}, {"A": {"w": fp64(TAU_A)}})
    close(WiseFT(alpha=0.25)(vectors), [[1.1, 1.975, 3.0], [4.05, 5.075, 5.85]])
    assert torch.equal(WiseFT(alpha=0)(vectors)["w"], fp64(BASE))
    assert torch.equal(WiseFT(alpha=1)(vectors)["w"], vectors.models["A"].read("w"))


def test_wise_ft_with_two_models_ends_at_their_average(two: TaskVectors) -> None:
    assert torch.equal(WiseFT(alpha=1)(two)["w"], SimpleAverage()(two)["w"])
    change(WiseFT(alpha=0.5)(two), [[0.05, 0.1, 0.025], [0.1, -0.025, -0.225]])


# --- task arithmetic ------------------------------------------------------------------------------------------------


def test_task_arithmetic(two: TaskVectors) -> None:
    close(TaskArithmetic(scale=0.3)(two), [[1.06, 2.12, 3.03], [4.12, 4.97, 5.73]])
    change(TaskArithmetic(scale={"A": 0.5, "B": -1.0})(two), [[0.4, -0.55, -0.1], [-0.1, 0.55, 0.0]])


def test_negation_forgets_one_task(two: TaskVectors) -> None:
    change(TaskArithmetic(scale=-1)(two.subset(["A"])), -fp64(TAU_A))


def test_one_scale_of_one_takes_that_model_even_where_others_round_to_the_same_change() -> None:
    # θ₀ = 1: both differences round to −1 in fp32, yet the models differ.
    base = {"w": torch.ones(4)}
    a, b = torch.tensor([1e-9, 2e-9, 0.5, 1.0]), torch.tensor([2e-9, -1e-9, 0.25, 1.0])
    for names in ("ab", "ba"):
        vectors = TaskVectors.open(base=base, models=dict(zip(names, ({"w": a}, {"w": b}), strict=True)), check=False)
        merged = TaskArithmetic(scale={names[0]: 1.0, names[1]: 0.0})(vectors)
        assert torch.equal(merged["w"], a)


# --- TIES -----------------------------------------------------------------------------------------------------------


def test_ties_exact(two: TaskVectors) -> None:
    """Trimmed to 3 of 6: A keeps entries 0, 4, 5 and B keeps 1, 4, 5."""
    change(Ties(density=0.5)(two), [[0.4, 0.5, 0], [0, -0.4, -0.45]])
    change(Ties(density=0.5, operation="sum")(two), [[0.4, 0.5, 0], [0, -0.4, -0.9]])
    change(Ties(density=0.5, scale=0.5)(two), [[0.2, 0.25, 0], [0, -0.2, -0.225]])


def test_ties_untrimmed(two: TaskVectors) -> None:
    change(Ties(density=1)(two), [[0.4, 0.5, 0.1], [0.2, -0.4, -0.45]])


def test_ties_keeps_exactly_the_floor_and_at_least_one(two: TaskVectors) -> None:
    for density, kept in [(0.01, 1), (0.17, 1), (0.34, 2), (0.5, 3), (0.83, 4), (0.84, 5)]:
        merged = Ties(density=density)(two.subset(["B"]))["w"]
        assert int((merged != fp64(BASE)).sum()) == kept


def test_ties_ranks_over_the_whole_model_or_each_tensor() -> None:
    base = {"large": torch.zeros(4), "small": torch.zeros(4)}
    tau = {"large": torch.tensor([5.0, -6.0, 7.0, 8.0]), "small": torch.tensor([0.1, 0.4, -0.3, 0.2])}
    vectors = opened(base, {"a": tau})
    whole = Ties(density=0.5)(vectors)
    assert torch.equal(whole["large"], tau["large"]) and not whole["small"].any()
    each = Ties(density=0.5, scope="tensor")(vectors)
    assert each["large"].tolist() == [0, 0, 7, 8]
    assert torch.equal(each["small"], torch.tensor([0, 0.4, -0.3, 0]))


def test_elected_sign_and_disjoint_merge() -> None:
    deltas = fp64([[3.0, 1.0, -2.0, 0.0], [-1.0, 1.0, -4.0, 0.0], [-1.0, -5.0, 3.0, 2.0]])
    sign = elect_sign(deltas)
    assert sign.tolist() == [1, -1, -1, 1]
    assert disjoint_merge(deltas, sign, "mean").tolist() == [3, -5, -3, 2]
    assert disjoint_merge(deltas, sign, "sum").tolist() == [3, -5, -6, 2]


@pytest.mark.parametrize(("others", "winner"), [([1.0, 2.0, -3.0], 1.0), ([-1.0, -2.0, 3.0], -1.0)])
def test_an_entry_whose_sum_is_zero_takes_the_majority_sign(others: list[float], winner: float) -> None:
    """The majority counts entries, not mass: two of three against one that weighs as much as both."""
    tau_a, tau_b = [0.5, *others], [-0.5, 0.0, 0.0, 0.0]
    vectors = opened({"w": fp64([10.0] * 4)}, {"a": {"w": fp64(tau_a)}, "b": {"w": fp64(tau_b)}})
    close(Ties(density=1)(vectors), [10 + 0.5 * winner, *(10 + other for other in others)])


def test_the_majority_is_taken_over_the_whole_model_or_each_tensor() -> None:
    base = {"x": fp64([0.0] * 2), "y": fp64([0.0] * 4)}
    a = {"x": fp64([0.5, -1.0]), "y": fp64([1.0, 1.0, 1.0, 1.0])}
    b = {"x": fp64([-0.5, 0.0]), "y": fp64([0.0] * 4)}
    vectors = opened(base, {"a": a, "b": b})
    close(Ties(density=1)(vectors), [0.5, -1.0], "x")
    close(Ties(density=1, scope="tensor")(vectors), [-0.5, -1.0], "x")


def test_nothing_is_elected_where_signs_balance() -> None:
    vectors = opened({"w": fp64([1.0, 2.0])}, {"a": {"w": fp64([0.5, 0.25])}, "b": {"w": fp64([-0.5, -0.25])}})
    close(Ties(density=1)(vectors), [1.0, 2.0])


# --- DARE -----------------------------------------------------------------------------------------------------------


def test_dare_kernel() -> None:
    keep = torch.tensor([[True, False, True], [False, True, True]])
    found = drop_and_rescale(fp64(TAU_A), keep, 0.5)
    torch.testing.assert_close(found, fp64([[0.8, 0, 0], [0, 0.6, -1.2]]), rtol=0, atol=0)


def test_dare_composes_before_any_merge_and_alone_means_task_arithmetic(two: TaskVectors) -> None:
    dare = Dare(drop_rate=0.5)
    assert torch.equal(dare(two, seed=3)["w"], TaskArithmetic()(two, transforms=[dare], seed=3)["w"])
    doubled = 2 * two.delta("A", "w")
    alone = TaskArithmetic(scale=1)(two.subset(["A"]), transforms=[dare], seed=3)["w"] - fp64(BASE)
    assert all(any(abs(x - y) < 1e-12 for y in (0.0, d)) for x, d in zip(alone.ravel(), doubled.ravel(), strict=True))


# --- Breadcrumbs ----------------------------------------------------------------------------------------------------


def ranked(count: int, seed: int = 0) -> Tensor:
    """Magnitudes 1 ... count in random order, with random signs."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return (torch.randperm(count, generator=generator) + 1).double() * signs


def test_breadcrumbs_keeps_the_middle() -> None:
    """Of 100 ranks, density 0.5 and gamma 0.1 keep 41 ... 90 in ascending order."""
    tau = ranked(100)
    vectors = opened({"w": torch.zeros(100).double()}, {"a": {"w": tau}})
    merged = TaskArithmetic(scale=1)(vectors, transforms=[Breadcrumbs(density=0.5, gamma=0.1)])["w"]
    assert sorted(merged.abs()[merged != 0].int().tolist()) == list(range(41, 91))
    assert torch.equal(merged, torch.where((tau.abs() > 40) & (tau.abs() < 91), tau, 0.0))


@pytest.mark.parametrize(("density", "gamma"), [(0.143, 0.007), (0.5, 0.5), (0.29, 0.57), (0.999, 0.001), (0.001, 0.0)])
@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_breadcrumbs_counts(density: float, gamma: float, count: int) -> None:
    """⌊γ n⌋ outliers go and ⌊density · n⌋ stay, with the fractions taken as written (0.29 · 100 is 29, not 28)."""
    vectors = opened({"w": torch.zeros(count).double()}, {"a": {"w": ranked(count, 1)}})
    merged = TaskArithmetic(scale=1)(vectors, transforms=[Breadcrumbs(density=density, gamma=gamma)])["w"]
    outliers, kept = int(round(gamma * 1000) * count // 1000), int(round(density * 1000) * count // 1000)
    expected = list(range(count - outliers - kept + 1, count - outliers + 1))
    assert sorted(merged.abs()[merged != 0].int().tolist()) == expected


def test_breadcrumbs_refuses_more_than_everything() -> None:
    with pytest.raises(UserError, match=r"density \+ gamma must be at most 1, got 0.9 \+ 0.2.*up to 0.1"):
        Breadcrumbs(density=0.9, gamma=0.2)


# --- LwPTV ----------------------------------------------------------------------------------------------------------

LAYERS_A = {"l0": [0.1, -0.1], "l1": [0.6, 0.2], "l2": [-0.5, 0.5]}
LAYERS_B = {"l0": [0.1, -0.3], "l1": [0.0, 0.2], "l2": [0.2, 0.4]}


@pytest.fixture
def layers() -> TaskVectors:
    """Three layers of two entries in two tasks."""
    base = {name: fp64([1.0, 2.0]) for name in LAYERS_A}
    taus = ({name: fp64(values) for name, values in task.items()} for task in (LAYERS_A, LAYERS_B))
    return opened(base, dict(zip("AB", taus, strict=True)))


def kept_layers(vectors: TaskVectors, transform: Transform, task: str) -> list[int]:
    """m_t as 0 and 1, seen from outside: which tensors of one task alone still differ from the base."""
    scale = {name: float(name == task) for name in vectors.names}
    merged = TaskArithmetic(scale=scale)(vectors, transforms=[transform])
    return [int(not torch.equal(merged[name].double(), vectors.base_tensor(name).double())) for name in sorted(merged)]


def test_lwptv_masks_and_merge(layers: TaskVectors) -> None:
    third = LwPTV(eta=1 / 3, granularity="tensor")
    assert kept_layers(layers, third, "A") == [0, 1, 1]
    assert kept_layers(layers, third, "B") == [1, 0, 1]
    for task in "AB":
        assert kept_layers(layers, LwPTV(eta=2 / 3, granularity="tensor"), task) == [0, 0, 1]
    merged = TaskArithmetic(scale=0.5)(layers, transforms=[third])
    close(merged, [1.05, 1.85], "l0")
    close(merged, [1.3, 2.1], "l1")
    close(merged, [0.85, 2.45], "l2")


def test_lwptv_distance_is_the_same_for_both_of_two_tasks(layers: TaskVectors) -> None:
    """|τ_t − mean| is [.05, .15, .20] for A and for B, though their magnitudes rank the layers differently."""
    for eta, expected in [(1 / 3, [0, 1, 1]), (2 / 3, [0, 0, 1])]:
        transform = LwPTV(eta=eta, granularity="tensor", saliency="distance")
        assert kept_layers(layers, transform, "A") == kept_layers(layers, transform, "B") == expected


def test_lwptv_distance_takes_two_models() -> None:
    """A single model is its own mean: all scores would be 0, and the first layers would go."""
    vectors = opened({"w": fp64([1.0])}, {"a": {"w": fp64([0.5])}})
    with pytest.raises(UserError, match=r"saliency distance .* at least 2 models, got 1"):
        TaskArithmetic()(vectors, transforms=[LwPTV(saliency="distance")])
    TaskArithmetic()(vectors, transforms=[LwPTV(saliency="drift")])


def test_lwptv_refuses_a_pattern_that_is_none() -> None:
    with pytest.raises(UserError, match=r"the pattern '\(' to protect is no regular expression"):
        LwPTV(protect=["bias", "("])
    with pytest.raises(UserError, match=r"the pattern '3' to protect"):
        LwPTV(protect=[3])  # type: ignore[list-item]


def test_lwptv_prunes_equal_layers_as_they_are_counted() -> None:
    """As text, layer 10 comes before layer 2."""
    names = [f"layer.{number}.weight" for number in range(12)]
    vectors = opened({name: fp64([1.0]) for name in names}, {"a": {name: fp64([0.5]) for name in names}})
    merged = TaskArithmetic(scale=1)(vectors, transforms=[LwPTV(eta=0.25)])
    assert [name for name in names if torch.equal(merged[name], fp64([1.0]))] == names[:3]


def test_lwptv_drift_is_relative_to_the_base() -> None:
    """The layer that moves most in absolute terms moves least for its size; one that was 0 has drifted most."""
    base = {"l0": fp64([100.0, 0.0]), "l1": fp64([0.3, 0.4]), "l2": fp64([0.0, 0.0])}
    vectors = opened(base, {"a": {"l0": fp64([3.0, 4.0]), "l1": fp64([0.1, 0.0]), "l2": fp64([1e-3, 0.0])}})
    found = [
        kept_layers(vectors, LwPTV(eta=k / 3, saliency=saliency, granularity="tensor"), "a")
        for saliency in ("drift", "magnitude")
        for k in (1, 2)
    ]
    assert found == [[0, 1, 1], [0, 0, 1], [1, 1, 0], [1, 0, 0]]


def many_layers(count: int = 10, tasks: int = 3, seed: int = 0, scale: float = 1.0) -> TaskVectors:
    generator = torch.Generator().manual_seed(seed)
    names = [f"layer.{number}.weight" for number in range(count)]
    base = {name: torch.randn(3, 4, generator=generator) for name in names}
    taus = {
        str(task): {name: scale * torch.rand(1, generator=generator) * torch.randn(3, 4, generator=generator).double()
                    for name in names}
        for task in range(tasks)
    }  # fmt: skip
    return opened({name: values.double() for name, values in base.items()}, taus)


SALIENCIES = ["magnitude", "distance", "drift"]


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_lwptv_masks_are_nested_and_count_exactly(saliency: str) -> None:
    vectors = many_layers()
    for task in vectors.names:
        masks = [np.array(kept_layers(vectors, LwPTV(eta=k / 10, saliency=saliency), task)) for k in range(11)]
        assert [int(mask.sum()) for mask in masks] == [10 - k for k in range(11)]
        assert all((fewer <= more).all() for more, fewer in itertools.pairwise(masks))
    assert sum(kept_layers(vectors, LwPTV(eta=0.19, saliency=saliency), "0")) == 9, "⌊0.19 · 10⌋ is 1"


@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("ranking", ["task", "global"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_lwptv_masks_do_not_depend_on_the_scale_of_all_task_vectors(saliency: str, ranking: str, factor: float) -> None:
    transform = LwPTV(eta=0.4, saliency=saliency, ranking=ranking)
    for task in "012":
        assert kept_layers(many_layers(scale=factor), transform, task) == kept_layers(many_layers(), transform, task)


def test_lwptv_ranks_each_task_by_itself_or_all_together() -> None:
    base = {f"l{number}": fp64([0.0]) for number in range(4)}
    loud = {f"l{number}": fp64([10.0 + number]) for number in range(4)}
    quiet = {f"l{number}": fp64([1.0 + number]) for number in range(4)}
    vectors = opened(base, {"loud": loud, "quiet": quiet})
    each, together = (LwPTV(eta=0.5, granularity="tensor", ranking=ranking) for ranking in ("task", "global"))
    assert [kept_layers(vectors, each, task) for task in vectors.names] == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert [kept_layers(vectors, together, task) for task in vectors.names] == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_layer_mask_prunes_equal_scores_in_order() -> None:
    assert layer_mask([[1.0, 1.0, 1.0], [2.0, 0.0, 2.0]], 2, "task") == [[False, False, True], [False, False, True]]
    assert layer_mask([[1.0, 1.0, 1.0], [2.0, 0.0, 2.0]], 2, "global") == [[False, True, True], [True, False, True]]


@pytest.mark.parametrize(
    "merge", [TaskArithmetic(), Ties(), Ties(scale=0.5, operation="sum"), SimpleAverage(), WiseFT()]
)
def test_lwptv_eta_one_leaves_the_base_and_pruned_layers_equal_it_bit_for_bit(merge: MergeMethod) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {f"block.{number}.w": torch.randn(50, generator=generator) for number in range(4)}
    base["block.0.w"][::3] = -0.0
    # block 0 says least for every task
    taus = {
        task: {name: torch.randn(50, generator=generator) * (0.1 if name == "block.0.w" else 1) for name in base}
        for task in "abc"
    }
    vectors = opened(base, taus)

    def same(merged: State, name: str) -> bool:
        return merged[name].numpy().tobytes() == base[name].numpy().tobytes()

    everything = merge(vectors, transforms=[LwPTV(eta=1)])
    assert all(same(everything, name) for name in base)
    one = merge(vectors, transforms=[LwPTV(eta=0.25)])
    assert same(one, "block.0.w") and not same(one, "block.1.w")
    plain = merge(vectors, transforms=[LwPTV(eta=0)])
    assert all(torch.equal(plain[name], merge(vectors)[name]) for name in base)


def test_lwptv_scores_weigh_entries_not_tensors() -> None:
    """A bias of 2 entries must not outweigh its layer: the means are 1.18 and 1.5, the means of means 5.5 and 1.5."""
    base = {"m.0.weight": torch.zeros(98), "m.0.bias": torch.zeros(2), "m.1.weight": torch.zeros(100)}
    tau = {
        "m.0.weight": torch.full((98,), 1.0),
        "m.0.bias": torch.full((2,), 10.0),
        "m.1.weight": torch.full((100,), 1.5),
    }
    merged = TaskArithmetic(scale=1)(opened(base, {"a": tau}), transforms=[LwPTV(eta=0.5)])
    assert not merged["m.0.weight"].any() and not merged["m.0.bias"].any() and merged["m.1.weight"].all()


@pytest.mark.parametrize(
    ("name", "block", "module"),
    [
        ("encoder.layer.3.attention.self.query.weight", "encoder.layer.3", "encoder.layer.3.attention.self.query"),
        ("encoder.layer.11.output.LayerNorm.bias", "encoder.layer.11", "encoder.layer.11.output.LayerNorm"),
        ("layer4.1.conv2.weight", "layer4.1", "layer4.1.conv2"),
        ("0.weight", "0", "0"),
        ("model.layers.0.experts.7.w1.weight", "model.layers.0", "model.layers.0.experts.7.w1"),
        ("embeddings.word_embeddings.weight", "embeddings.word_embeddings", "embeddings.word_embeddings"),
        ("conv1.weight", "conv1", "conv1"),
        ("logit_scale", "logit_scale", "logit_scale"),
    ],
)
def test_layers(name: str, block: str, module: str) -> None:
    assert layer_of(name, "block") == block
    assert layer_of(name, "module") == module
    assert layer_of(name, "tensor") == name


def test_lwptv_protects_tensors_and_does_not_count_them() -> None:
    vectors = many_layers()
    protected = LwPTV(eta=0.5, protect=[r"layer\.[0-5]\."])
    for task in vectors.names:
        kept = kept_layers(vectors, protected, task)
        assert kept[:6] == [1] * 6, "protected"
        assert sum(kept[6:]) == 2, "half of the four layers that are left"
    assert kept_layers(vectors, LwPTV(eta=1, protect=["layer.2"]), "0") == [int(n == 2) for n in range(10)]
    with pytest.raises(UserError, match="protect must be a list"):
        LwPTV(protect="embed")  # type: ignore[arg-type]


@pytest.mark.parametrize("protect", [[], [r"layer\.[0-3]\."]])
def test_lwptv_rescale_norm_restores_each_task_vectors_norm(protect: list[str]) -> None:
    vectors = many_layers()
    transform = LwPTV(eta=0.5, rescale="norm", protect=protect)
    for task in vectors.names:
        scale = {name: float(name == task) for name in vectors.names}
        merged = TaskArithmetic(scale=scale)(vectors, transforms=[transform])
        norm = sum(float((merged[n] - vectors.base_tensor(n)).square().sum()) for n in vectors.tensor_names) ** 0.5
        assert norm == pytest.approx(vectors[task].norm(), rel=1e-12)
        for name in vectors.tensor_names[:4] if protect else []:
            expected = vectors.models[task].read(name)
            torch.testing.assert_close(merged[name], expected, rtol=1e-14, atol=0, msg="protected tensors stay")


def test_lwptv_rescale_inverse_keep(layers: TaskVectors) -> None:
    scale = {"A": 1.0, "B": 0.0}
    transform = LwPTV(eta=1 / 3, granularity="tensor", rescale="inverse_keep")
    merged = TaskArithmetic(scale=scale)(layers, transforms=[transform])
    close(merged, [1.0, 2.0], "l0")
    close(merged, [1.9, 2.3], "l1")
    close(merged, [0.25, 2.75], "l2")
    with pytest.raises(UserError, match="eta is 1"):
        LwPTV(eta=1, rescale="inverse_keep")


def test_lwptv_entries_prune_inside_each_layer(layers: TaskVectors) -> None:
    """η = ½ of two entries: the smaller of each layer goes; of equal ones (A, l0 and l2) the later goes."""
    merged = TaskArithmetic(scale={"A": 1.0, "B": 0.0})(
        layers, transforms=[LwPTV(eta=0.5, saliency="entry", granularity="tensor")]
    )
    close(merged, [1.1, 2.0], "l0")
    close(merged, [1.6, 2.0], "l1")
    close(merged, [0.5, 2.0], "l2")
    with pytest.raises(UserError, match="norm goes with whole layers"):
        LwPTV(saliency="entry", rescale="norm")


def test_lwptv_leaves_empty_tensors_aside() -> None:
    base = {"a": torch.zeros(0, 3), "b": torch.zeros(2), "c": torch.zeros(2)}
    tau = {"a": torch.zeros(0, 3), "b": torch.ones(2), "c": torch.full((2,), 2.0)}
    for saliency in (*SALIENCIES, "entry"):
        transform = LwPTV(eta=0.5, saliency=saliency, granularity="tensor")
        still = {name: 0 * value for name, value in tau.items()}
        merged = TaskArithmetic(scale=1)(opened(base, {"t": tau, "still": still}), transforms=[transform])
        assert merged["a"].shape == (0, 3)
        expected = [1.0, 0.0, 2.0, 0.0] if saliency == "entry" else [0.0, 0.0, 2.0, 2.0]
        assert [*merged["b"].tolist(), *merged["c"].tolist()] == expected


# --- greedy soup ----------------------------------------------------------------------------------------------------


def soup_of(points: dict[str, list[float]]) -> TaskVectors:
    return TaskVectors.open(models={name: {"w": fp64(point)} for name, point in points.items()}, check=False)


def near(target: list[float]) -> Callable[[State], float]:
    return lambda state: -float((state["w"] - fp64(target)).square().sum())


def test_greedy_soup_adds_what_helps() -> None:
    """The score is minus the squared distance to 0, and the mean of the soup is what is scored."""
    vectors = soup_of({"a": [2.0], "b": [-1.0], "c": [-3.0], "d": [5.0]})
    # b −1 → {b, a} mean .5: −.25 → {b, a, c} mean −2/3: −.44, refused → {b, a, d} mean 2: −4, refused
    assert GreedySoup()(vectors, score=near([0.0]))["w"].item() == 0.5


def test_greedy_soup_ties() -> None:
    """The second model leaves the score as it is: accepted with ≥, not with >; of equals the first by name begins."""
    flat = soup_of({"a": [1.0, 0.0], "b": [1.0, 4.0]})
    first_only: Callable[[State], float] = lambda state: -abs(float(state["w"][0]))  # noqa: E731
    assert GreedySoup()(flat, score=first_only)["w"].tolist() == [1.0, 2.0]
    assert GreedySoup(accept_ties=False)(flat, score=first_only)["w"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("accept_ties", [True, False])
def test_greedy_soup_never_scores_below_the_best_model_and_ignores_the_order(seed: int, accept_ties: bool) -> None:
    random = np.random.default_rng(seed)
    points = {name: random.normal(size=3).tolist() for name in "abcdef"}
    score = near([0.1, -0.2, 0.3])
    soup = GreedySoup(accept_ties=accept_ties)(soup_of(points), score=score)
    assert score(soup) >= max(score({"w": fp64(point)}) for point in points.values())
    shuffled = {name: points[name] for name in random.permutation(list(points))}
    assert torch.equal(GreedySoup(accept_ties=accept_ties)(soup_of(shuffled), score=score)["w"], soup["w"])


def test_greedy_soup_puts_a_model_that_scores_nan_last() -> None:
    """A diverged model named first must not become the soup."""
    vectors = soup_of({"a": [100.0], "b": [1.0], "c": [-1.0]})
    found = GreedySoup()(vectors, score=lambda s: float("nan") if abs(float(s["w"])) > 2 else -abs(float(s["w"])))
    assert found["w"].item() == 0.0


def test_greedy_soup_scores_each_model_once_alone_and_once_with_the_soup() -> None:
    seen: list[float] = []

    def score(state: State) -> float:
        seen.append(float(state["w"]))
        return -abs(seen[-1])

    GreedySoup()(soup_of({"a": [1.0], "b": [2.0], "c": [3.0]}), score=score)
    assert seen == [1.0, 2.0, 3.0, 1.5, 2.0]


def test_greedy_soup_needs_a_score() -> None:
    with pytest.raises(UserError, match="needs a score"):
        GreedySoup()(soup_of({"a": [1.0], "b": [2.0]}))


# --- composition ----------------------------------------------------------------------------------------------------


def test_transforms_compose_in_their_order() -> None:
    """Pruning layers, then trimming entries, is not the same as trimming first."""
    base = {"l0": torch.zeros(4), "l1": torch.zeros(4)}
    vectors = opened(base, {"a": {"l0": torch.tensor([9.0, 0, 0, 0]), "l1": torch.tensor([3.0, 3.5, 2.5, 4.0])}})
    trim, prune = Breadcrumbs(density=0.25, gamma=0.0), LwPTV(eta=0.5, granularity="tensor")
    first = TaskArithmetic(scale=1)(vectors, transforms=[prune, trim])  # means 2.25 and 3.25: l0 goes
    second = TaskArithmetic(scale=1)(vectors, transforms=[trim, prune])  # means 2.25 and 1: l1 goes
    assert [*first["l0"].tolist(), *first["l1"].tolist()] == [0, 0, 0, 0, 0, 0, 0, 4]
    assert [*second["l0"].tolist(), *second["l1"].tolist()] == [9, 0, 0, 0, 0, 0, 0, 0]


def test_only_transforms_are_transforms(two: TaskVectors) -> None:
    with pytest.raises(UserError, match="Ties is a merge method, not a transform"):
        TaskArithmetic()(two, transforms=[Ties()])  # type: ignore[list-item]
