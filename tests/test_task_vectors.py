"""The algebra of task vectors, what is merged and what is not, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.methods import SimpleAverage, TaskArithmetic, WeightedAverage
from lightning_merge.task_vectors import TaskVector
from lightning_merge.tensor_view import GRID, block_sums

State = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (2, GRID + 100),
    "layer.weight": (4, 3),
    "layer.bias": (4,),
    "t": (),
}


def draw(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: (scale * torch.randn(shape, generator=generator)).to(dtype) for name, shape in SHAPES.items()}


def models_over(base: State, names: str = "abc", scale: float = 0.1) -> dict[str, State]:
    return {
        name: {key: base[key] + change for key, change in draw(ord(name), scale, base["t"].dtype).items()}
        for name in names
    }


@pytest.fixture
def base() -> State:
    return draw(0)


@pytest.fixture
def vectors(base: State) -> TaskVectors:
    return TaskVectors.open(base=base, models=models_over(base))


def exact(vectors: TaskVectors, vector: TaskVector) -> np.ndarray:
    """A task vector in fp64, all tensors one after another."""
    return np.concatenate([vector.delta(name).double().numpy().ravel() for name in sorted(vectors.tensor_names)])


def same(one: TaskVector, other: TaskVector, rtol: float = 0.0, atol: float = 0.0) -> None:
    for name in SHAPES:
        torch.testing.assert_close(one.delta(name), other.delta(name), rtol=rtol, atol=atol)


# --- a mapping --------------------------------------------------------------------------------------------------------


def test_is_a_mapping_in_the_order_of_names(base: State) -> None:
    models = models_over(base)
    vectors = TaskVectors.open(base=base, models={name: models[name] for name in "cab"})
    assert list(vectors) == ["a", "b", "c"] == list(vectors.names) and len(vectors) == 3
    assert "a" in vectors and "d" not in vectors
    assert all(isinstance(vector, TaskVector) for vector in vectors.values())
    with pytest.raises(UserError, match=r"Unknown model 'A'\. Known: a, b, c\."):
        vectors["A"]


def test_a_task_vector_is_the_difference(base: State, vectors: TaskVectors) -> None:
    for model, state in models_over(base).items():
        for name, shape in SHAPES.items():
            delta = vectors.delta(model, name)
            assert delta.shape == shape == vectors.shape(name) and delta.dtype == torch.float32
            assert torch.equal(delta, state[name] - base[name])
    assert vectors.numel == sum(math.prod(shape) for shape in SHAPES.values())


def test_differences_of_bf16_models_are_taken_in_fp32() -> None:
    base = {"w": torch.tensor([1.0, 256.0], dtype=torch.bfloat16)}
    model = {"w": torch.tensor([1.0078125, 0.001], dtype=torch.bfloat16)}
    vectors = TaskVectors.open(base=base, models={"a": model}, check=False)
    expected = model["w"].double() - base["w"].double()
    assert vectors.delta("a", "w").dtype == torch.float32
    torch.testing.assert_close(vectors.delta("a", "w").double(), expected, rtol=1e-7, atol=0)


# --- algebra ----------------------------------------------------------------------------------------------------------


def test_group_laws(vectors: TaskVectors) -> None:
    a, b, c = vectors.values()
    zero = a - a
    same(a + b, b + a)
    same((a + b) + c, a + (b + c), atol=1e-6)
    same(a + zero, a)
    same(a + (-a), zero)
    same(-1 * (-a), a)
    same(a.negate(), -1 * a)
    same(a - b, a + (-b))
    same(2 * a, a + a)
    same(a * 2, 2 * a)
    same((3 * a) / 2, 1.5 * a, rtol=1e-6)
    same(0.5 * (a + b), 0.5 * a + 0.5 * b)
    assert zero.norm() == 0 and not zero.delta("layer.weight").any()


def test_analogy(vectors: TaskVectors) -> None:
    """a is to b as c is to τ_c + (τ_b − τ_a)."""
    a, b, c = vectors.values()
    expected = exact(vectors, c) + exact(vectors, b) - exact(vectors, a)
    np.testing.assert_allclose(exact(vectors, vectors.analogy("a", "b", "c")), expected, atol=2e-7)
    same(vectors.analogy("a", "a", "c"), c)
    # as a merge: one task vector that algebra made
    merged = TaskArithmetic(scale=0.5)(TaskVectors.of(vectors, {"analogy": vectors.analogy("a", "b", "c")}))
    for name in SHAPES:
        half = vectors.base_tensor(name) + 0.5 * vectors.analogy("a", "b", "c").delta(name)
        torch.testing.assert_close(merged[name], half, rtol=0, atol=1e-7)


def test_products_and_norms(vectors: TaskVectors) -> None:
    a, b, _ = vectors.values()
    x, y = exact(vectors, a), exact(vectors, b)
    assert a.dot(b) == pytest.approx(math.fsum(x * y), rel=1e-13)
    assert a.dot(b) == b.dot(a)
    assert a.norm() == pytest.approx(math.sqrt(math.fsum(x * x)), rel=1e-14)
    assert a.cosine(b) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert (2 * a).cosine(-3 * b) == pytest.approx(-a.cosine(b), abs=1e-7)
    assert a.cosine(a) == pytest.approx(1, abs=1e-15) and a.cosine(a - a) == 0.0


def test_a_cosine_is_never_beyond_one() -> None:
    """Else its angle is NaN."""
    for seed in range(200):
        w = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        vectors = TaskVectors.open(base={"w": torch.zeros(3)}, models={"a": {"w": w}}, check=False)
        assert -1 <= vectors["a"].cosine(-vectors["a"]) <= vectors["a"].cosine(2 * vectors["a"]) <= 1


def test_products_do_not_depend_on_chunks(vectors: TaskVectors, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, _ = vectors.values()
    expected = (a.dot(b), a.norm(), b.project_out(a).norm())
    for blocks in (1, 2):

        def chunks(self: TaskVectors, name: str, size: int = blocks * GRID) -> Iterator[tuple[int, int]]:
            numel = self.info(name).numel
            return ((start, min(start + size, numel)) for start in range(0, numel, size))

        monkeypatch.setattr(TaskVectors, "chunks", chunks)
        assert (a.dot(b), a.norm(), b.project_out(a).norm()) == expected


def test_block_sums_belong_to_the_grid() -> None:
    values = torch.randn(2 * GRID + 77, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = block_sums(values)
    assert len(whole) == 3
    assert whole == [*block_sums(values[:GRID]), *block_sums(values[GRID:])]
    assert math.fsum(whole) == pytest.approx(math.fsum(values.tolist()), rel=1e-12)
    assert block_sums(values[:0]) == []


def test_sums_do_not_cancel() -> None:
    """Large products of both signs: an fp32 sum would be off by far more than the result."""
    a, b = torch.tensor([1e3, 1.0, -1e3]), torch.tensor([1e3, 1e-3, 1e3])
    vectors = TaskVectors.open(base={"w": torch.zeros(3)}, models={"a": {"w": a}, "b": {"w": b}}, check=False)
    assert vectors["a"].dot(vectors["b"]) == pytest.approx(1e-3, rel=1e-6)


def test_project_out_is_orthogonal_in_every_tensor(vectors: TaskVectors) -> None:
    a, b, _ = vectors.values()
    rest = a.project_out(b)
    for name in SHAPES:
        left, direction, whole = (v.delta(name).double().ravel() for v in (rest, b, a))
        assert abs(float(left @ direction)) <= 1e-6 * float(whole.norm() * direction.norm())
        share = (whole @ direction) / (direction @ direction)
        torch.testing.assert_close(left, whole - share * direction, rtol=1e-6, atol=1e-7)
    # Only tensor by tensor: over the model the same share would leave each tensor with a rest.
    model_wide = a.dot(b) / b.dot(b)
    assert abs(float((a - model_wide * b).delta("layer.weight").ravel() @ b.delta("layer.weight").ravel())) > 1e-4


def test_project_out_of_itself_and_of_nothing(vectors: TaskVectors) -> None:
    a, b, _ = vectors.values()
    assert a.project_out(a).norm() <= 1e-6 * a.norm()
    same(a.project_out(b - b), a)
    same(a.project_out(b).project_out(b), a.project_out(b), atol=1e-6)


def test_apply_and_its_inverse(base: State, vectors: TaskVectors) -> None:
    models = models_over(base)
    for name in SHAPES:
        assert torch.equal(vectors["a"].apply()[name], models["a"][name])
    doubles = {name: value.double() for name, value in base.items()}
    exact_models = models_over(doubles)
    fine = TaskVectors.open(base=doubles, models=exact_models, check=False)
    there = fine["a"].apply(0.7)
    back = (-0.7 * TaskVectors.open(base=doubles, models={"x": fine["a"].apply()}, check=False)["x"]).apply()
    for name in SHAPES:
        step = 0.7 * (exact_models["a"][name] - doubles[name])
        torch.testing.assert_close(there[name] - doubles[name], step, rtol=0, atol=1e-15)
        torch.testing.assert_close(back[name] - doubles[name], -step, rtol=0, atol=1e-15)
    # Removing from θ_a what was added gives the base again.
    moved = TaskVectors.open(base=exact_models["a"], models={"b": doubles}, check=False)
    for name, value in (-1 * moved["b"].negate()).apply().items():
        torch.testing.assert_close(value, doubles[name], rtol=0, atol=1e-15)


def test_apply_nothing_is_the_base_bit_for_bit(base: State) -> None:
    base["layer.bias"] = torch.tensor([-0.0, 0.0, 1.0, -0.0])
    vectors = TaskVectors.open(base=base, models=models_over(base))
    for made in (vectors["a"].apply(0), (vectors["a"] - vectors["a"]).apply()):
        assert all(made[name].numpy().tobytes() == base[name].numpy().tobytes() for name in SHAPES)


def test_algebra_is_lazy(base: State, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = TaskVectors.open(base=base, models=models_over(base), check=False)
    reads: list[str] = []
    read = TaskVectors._values

    def counted(self: TaskVectors, source: object, name: str, start: int, stop: int) -> Tensor:
        reads.append(name)
        return read(self, source, name, start, stop)  # type: ignore[arg-type]

    monkeypatch.setattr(TaskVectors, "_values", counted)
    made = 0.5 * (vectors["a"] - vectors["b"]) + vectors.analogy("a", "b", "c").negate() / 3
    assert not reads
    made.delta("layer.bias")
    assert set(reads) == {"layer.bias"}


def test_nothing_of_the_callers_is_changed_or_shared(base: State) -> None:
    models = models_over(base)
    before = {
        name: {key: value.clone() for key, value in state.items()} for name, state in {**models, "": base}.items()
    }
    vectors = TaskVectors.open(base=base, models=models)
    made = [vectors["a"].apply(), vectors["a"].apply(0.5), (vectors["a"] + vectors["b"]).apply()]
    for state in made:
        for value in state.values():
            value.fill_(float("nan"))
    for name, state in {**models, "": base}.items():
        assert all(torch.equal(value, before[name][key]) for key, value in state.items())


def test_vectors_over_different_bases_do_not_mix(base: State, vectors: TaskVectors) -> None:
    other = TaskVectors.open(base=base, models=models_over(base))
    for act in (
        lambda: vectors["a"] + other["a"],
        lambda: vectors["a"] - other["a"],
        lambda: vectors["a"].dot(other["a"]),
        lambda: vectors["a"].project_out(other["a"]),
        lambda: TaskVectors.of(vectors, {"x": other["a"]}),
    ):
        with pytest.raises(UserError, match="different bases"):
            act()


# --- sets -------------------------------------------------------------------------------------------------------------


def test_subset(base: State, vectors: TaskVectors) -> None:
    some = vectors.subset(["c", "a"])
    assert some.names == ("a", "c") and some.base is vectors.base
    models = models_over(base)
    merged = SimpleAverage()(some)
    for name in SHAPES:
        torch.testing.assert_close(merged[name], (models["a"][name] + models["c"][name]) / 2)
    with pytest.raises(UserError, match="Unknown model 'd'"):
        vectors.subset(["a", "d"])


def test_of_merges_what_algebra_made(vectors: TaskVectors) -> None:
    made = TaskVectors.of(vectors, {"sum": vectors["a"] + vectors["b"], "less": -vectors["c"]})
    assert made.names == ("less", "sum")
    merged = TaskArithmetic(scale=1)(made)
    for name in SHAPES:
        expected = vectors.base_tensor(name) + made.delta("less", name) + made.delta("sum", name)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="No task vectors"):
        TaskVectors.of(vectors, {})


# --- what is merged and what is not -----------------------------------------------------------------------------------


def with_statistics(base: State, mean: float, tracked: int) -> State:
    return {**base, "bn.running_mean": torch.full((3,), float(mean)), "bn.num_batches_tracked": torch.tensor(tracked)}


def test_batch_norm_statistics_are_averaged_or_the_bases(base: State) -> None:
    models = {
        name: with_statistics(state, mean, 7)
        for (name, state), mean in zip(models_over(base).items(), (1, 2, 6), strict=True)
    }
    start = with_statistics(base, 100.0, 5)
    for merge in (TaskArithmetic(scale=0.3), TaskArithmetic(scale=0), SimpleAverage()):
        averaged = merge(TaskVectors.open(base=start, models=models))
        assert averaged["bn.running_mean"].tolist() == [3, 3, 3]
        assert averaged["bn.num_batches_tracked"].item() == 5
        kept = merge(TaskVectors.open(base=start, models=models, batch_norm="base"))
        assert kept["bn.running_mean"].tolist() == [100, 100, 100]
    vectors = TaskVectors.open(base=start, models=models)
    assert vectors.averaged_names == ("bn.running_mean",) and vectors.copied_names == ("bn.num_batches_tracked",)
    assert TaskArithmetic()(vectors.subset(["a", "b"]))["bn.running_mean"].tolist() == [1.5, 1.5, 1.5]


def test_one_task_vector_applied_has_that_models_statistics(base: State) -> None:
    models = {
        name: with_statistics(state, mean, 7)
        for (name, state), mean in zip(models_over(base).items(), (1, 2, 6), strict=True)
    }
    vectors = TaskVectors.open(base=with_statistics(base, 100.0, 5), models=models)
    assert vectors["c"].apply()["bn.running_mean"].tolist() == [6, 6, 6]
    assert (vectors["a"] + vectors["c"]).apply()["bn.running_mean"].tolist() == [100, 100, 100]


def test_a_modules_float_buffers_are_not_task_vectors() -> None:
    """BatchNorm under any name: a live module knows what its buffers are."""
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(3)]
    for number, module in enumerate(modules):
        module[1].running_mean.fill_(number)
    vectors = TaskVectors.open(base=modules[0], models={"a": modules[1], "b": modules[2]}, check=False)
    assert set(vectors.averaged_names) == {"1.running_mean", "1.running_var"}
    merged = TaskArithmetic(scale=0.3)(vectors)
    assert merged["1.running_mean"].tolist() == [1.5] * 3
    modules[0].load_state_dict(merged, strict=True)


def test_tied_weights_stay_tied_even_where_the_files_name_them_differently(base: State) -> None:
    tied = {**base, "head.weight": base["embed.weight"]}
    models = models_over(base)
    renamed = {("head.weight" if key == "embed.weight" else key): value for key, value in models["b"].items()}
    vectors = TaskVectors.open(base=tied, models={"a": models["a"], "b": renamed})
    merged = SimpleAverage()(vectors)
    assert merged["head.weight"].data_ptr() == merged["embed.weight"].data_ptr()
    expected = (models["a"]["embed.weight"] + models["b"]["embed.weight"]) / 2
    torch.testing.assert_close(merged["head.weight"], expected)
    assert vectors["a"].apply()["head.weight"].data_ptr() != base["embed.weight"].data_ptr()


def test_models_are_aligned_by_name_not_by_position(base: State) -> None:
    models = models_over(base)
    shuffled = {key: models["a"][key] for key in reversed(models["a"])}
    merged = TaskArithmetic(scale=1)(TaskVectors.open(base=base, models={"a": shuffled}))
    assert all(torch.equal(merged[name], models["a"][name]) for name in SHAPES)
    assert list(merged) == list(base)


def test_ignored_tensors_come_from_the_base_and_may_differ(base: State) -> None:
    models = models_over(base)
    models["a"]["t"] = torch.zeros(5, 5)
    models["b"]["extra.head.weight"] = torch.zeros(3)
    del models["c"]["layer.bias"]
    vectors = TaskVectors.open(base=base, models=models, ignore=[r"^t$", r"head", r"bias$"])
    assert set(vectors.tensor_names) == {"embed.weight", "layer.weight"}
    merged = TaskArithmetic(scale=1)(vectors)
    assert set(merged) == set(SHAPES)
    assert torch.equal(merged["t"], base["t"]) and torch.equal(merged["layer.bias"], base["layer.bias"])
    # Patterns are found anywhere in a name.
    assert TaskVectors.open(base=base, models=models_over(base), ignore=["weight"]).tensor_names == ("layer.bias", "t")


def test_a_pattern_is_not_a_list_of_letters(base: State) -> None:
    with pytest.raises(UserError, match=r"ignore must be a list of patterns, got 'bias'\. Expected \['bias'\]"):
        TaskVectors.open(base=base, models=models_over(base), ignore="bias")


def test_unknown_batch_norm_is_refused(base: State) -> None:
    with pytest.raises(UserError, match="batch_norm must be 'average' or 'base', got 'mean'"):
        TaskVectors.open(base=base, models=models_over(base), batch_norm="mean")  # type: ignore[arg-type]


def test_without_a_base_models_average_in_the_first_models_dtype(base: State) -> None:
    models = models_over(base)
    vectors = TaskVectors.open(models={"b": models["b"], "a": {k: v.bfloat16() for k, v in models["a"].items()}})
    merged = WeightedAverage(weights={"a": 1, "b": 0})(vectors)
    assert all(value.dtype == torch.bfloat16 for value in merged.values()), "a is first by name"
    with pytest.raises(UserError, match="need a base"):
        vectors["a"].delta("t")


# --- findings and errors ----------------------------------------------------------------------------------------------


def levels(vectors: TaskVectors, level: str) -> list[str]:
    return [finding.message for finding in vectors.findings if finding.level == level]


def test_findings_say_whether_models_share_the_base(base: State) -> None:
    near = TaskVectors.open(base=base, models=models_over(base, "a"))
    assert not levels(near, "WARN") and "plausibly shares the base" in levels(near, "INFO")[0]
    far = TaskVectors.open(base=base, models={"stranger": draw(99, 2.0)})
    assert "Model 'stranger' hardly shares its weights with the base" in levels(far, "WARN")[0]
    equal = TaskVectors.open(base=base, models={"copy": dict(base)})
    assert "equals the base in every sampled tensor" in levels(equal, "WARN")[0]
    coarse = TaskVectors.open(base=base, models={"a": {k: v.bfloat16() for k, v in models_over(base)["a"].items()}})
    assert any("stored in bfloat16, the base in float32" in message for message in levels(coarse, "WARN"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.pop("layer.bias"), r"Model 'a' .* lacks the tensor 'layer\.bias' of the base \(1 missing\)"),
        (lambda m: m.update({"layer.gain": torch.ones(4)}), r"holds the tensor 'layer\.gain', which the base lacks"),
        (lambda m: m.update({"layer.bias": torch.ones(5)}), r"'layer\.bias' has shape \[5\] in model 'a'.* and \[4\]"),
        (lambda m: m.update({"layer.bias": torch.ones(4, dtype=torch.int64)}), r"Expected both floating point"),
    ],
    ids=["missing", "extra", "shape", "integer"],
)
def test_models_that_do_not_fit_are_refused_before_anything_is_merged(base: State, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    models = models_over(base, "a")
    spoil(models["a"])
    with pytest.raises(UserError, match=message):
        TaskVectors.open(base=base, models=models)


def test_no_models() -> None:
    with pytest.raises(UserError, match="No models to merge"):
        TaskVectors.open(base={"w": torch.zeros(2)}, models={})


@pytest.mark.parametrize("where", ["base", "model"])
@pytest.mark.parametrize(("value", "called"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_values_that_are_not_finite_are_named(base: State, where: str, value: float, called: str) -> None:
    models = models_over(base, "a")
    (base if where == "base" else models["a"])["layer.bias"][2] = value
    vectors = TaskVectors.open(base=base, models=models, check=False)
    with pytest.raises(UserError, match=rf"Tensor 'layer\.bias' of 'state dict' holds {called}"):
        TaskArithmetic()(vectors)
    TaskArithmetic()(TaskVectors.open(base=base, models=models, ignore=["bias"], check=False))


def test_large_finite_values_are_no_infinity() -> None:
    """Their sum overflows; each of them is a number."""
    base = {"w": torch.full((10,), 3e38)}
    vectors = TaskVectors.open(base=base, models={"a": {"w": torch.full((10,), 2.9e38)}}, check=False)
    assert torch.equal(SimpleAverage()(vectors)["w"], torch.full((10,), 2.9e38))
