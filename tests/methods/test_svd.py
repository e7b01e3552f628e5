"""What the merges by singular value decomposition promise: worked examples, invariances, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.methods import (
    Dare,
    IsoC,
    IsoCts,
    MergeMethod,
    SimpleAverage,
    Svc,
    TaskArithmetic,
    TsvM,
    Wudi,
)
from lightning_merge.methods.iso_c import flatten_spectrum
from lightning_merge.methods.iso_cts import merge_common_and_specific, subspace_sizes
from lightning_merge.methods.matrices import TaskMatrices, matrix_shape, orthogonalize, svd, weight_rounding
from lightning_merge.methods.svc import calibration_factors
from lightning_merge.methods.tsv_m import merge_singular_vectors
from lightning_merge.methods.wudi import descend, interference, interference_gradient, least_interference
from lightning_merge.tensor_view import TensorView

State = dict[str, Tensor]


def calibrated_sum(matrices: Sequence[Tensor]) -> Tensor:
    merged = svd(sum(matrices[1:], start=matrices[0]))
    factors = calibration_factors(merged, matrices, 0.1)
    return (merged.u * (factors * merged.sigma)) @ merged.vh


KERNELS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "TsvM": merge_singular_vectors,
    "IsoC": flatten_spectrum,
    "IsoCts": lambda matrices: merge_common_and_specific(matrices, 0.5),
    "Wudi": least_interference,
    "Svc": calibrated_sum,
}
METHODS: list[MergeMethod] = [
    TsvM(), IsoC(), IsoCts(), Wudi(), Wudi(solver="adam", iterations=20), Svc(method=TaskArithmetic(scale=1.0)),
]  # fmt: skip
SHAPES = [(6, 6), (9, 5), (5, 9), (4, 30)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


def low_rank(rows: int, columns: int, values: Sequence[float], first: int, seed: int = 0) -> Tensor:
    """A matrix with these singular values along the directions ``first``, ``first + 1``, ... of a fixed basis."""
    u, v = rotation(rows, seed + 100), rotation(columns, seed + 200)
    total = torch.zeros(rows, columns, dtype=torch.float64)
    for index, value in enumerate(values):
        total += value * torch.outer(u[:, first + index], v[:, first + index])
    return total


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def opened(base: State, taus: dict[str, State]) -> TaskVectors:
    models = {model: {name: base[name] + tau[name] for name in base} for model, tau in taus.items()}
    return TaskVectors.open(base=base, models=models, check=False)


def spectrum(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix)


# --- what holds for all of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestKernels:
    @pytest.fixture
    def taus(self, shape: tuple[int, int]) -> list[Tensor]:
        return [draw(*shape, seed=seed) * (seed + 1) for seed in range(3)]

    def test_rotating_outputs_and_inputs_rotates_the_merge(
        self, name: str, shape: tuple[int, int], taus: list[Tensor]
    ) -> None:
        """So no sign or order that a decomposition chooses is left in the result."""
        left, right = rotation(shape[0], 7), rotation(shape[1], 8)
        turned = KERNELS[name]([left @ tau @ right for tau in taus])
        close(turned, left @ KERNELS[name](taus) @ right, 1e-9)

    def test_order_of_the_tasks_changes_rounding_only(
        self, name: str, shape: tuple[int, int], taus: list[Tensor]
    ) -> None:
        close(KERNELS[name]([taus[2], taus[0], taus[1]]), KERNELS[name](taus), 1e-9)

    @pytest.mark.parametrize("factor", [2.0**-100, 2.0**60])
    def test_follows_the_scale_of_the_task_vectors(
        self, name: str, shape: tuple[int, int], taus: list[Tensor], factor: float
    ) -> None:
        close(KERNELS[name]([factor * tau for tau in taus]), factor * KERNELS[name](taus), 1e-9)

    def test_tasks_that_changed_nothing(self, name: str, shape: tuple[int, int], taus: list[Tensor]) -> None:
        zero = torch.zeros(shape, dtype=torch.float64)
        assert not KERNELS[name]([zero, zero]).any()
        assert KERNELS[name]([taus[0], zero, taus[1]]).isfinite().all()

    def test_identical_tasks_with_few_directions(self, name: str, shape: tuple[int, int], taus: list[Tensor]) -> None:
        """Directions that a decomposition is free to choose stay out: the merge has none that no task has."""
        tau = low_rank(*shape, [3.0], first=1)
        merged = KERNELS[name]([tau, tau, tau])
        # Task arithmetic alone would give 3 τ: Iso keeps that, the others count what is shared once.
        close(merged, 3 * tau if name.startswith("Iso") else tau, 1e-9)

    def test_more_tasks_than_directions(self, name: str, shape: tuple[int, int], taus: list[Tensor]) -> None:
        many = [draw(2, shape[1], seed=seed) for seed in range(5)]
        merged = KERNELS[name](many)
        assert merged.shape == (2, shape[1]) and merged.isfinite().all() and merged.abs().max() > 0.1


@pytest.mark.parametrize("step", METHODS, ids=lambda step: type(step).__name__)
class TestMethods:
    def test_convolutions_are_matrices(self, step: MergeMethod) -> None:
        base, taus = draw(5, 3, 2, 2), {model: draw(5, 3, 2, 2, seed=seed) for seed, model in enumerate("ab")}
        flat = opened({"w": base.reshape(5, 12)}, {model: {"w": tau.reshape(5, 12)} for model, tau in taus.items()})
        merged = step(opened({"w": base}, {model: {"w": tau} for model, tau in taus.items()}))["w"]
        assert merged.shape == (5, 3, 2, 2)
        assert torch.equal(merged.reshape(5, 12), step(flat)["w"])

    @pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6), (1, 2, 3), ()], ids=str)
    def test_what_is_no_matrix_gets_the_mean(self, step: MergeMethod, shape: tuple[int, ...]) -> None:
        base, taus = draw(*shape), [draw(*shape, seed=seed) for seed in (1, 2, 3)]
        merged = step(opened({"w": base}, {str(number): {"w": tau} for number, tau in enumerate(taus)}))["w"]
        # Svc leaves what its method made of it: the sum.
        share = 1.0 if isinstance(step, Svc) else 1 / 3
        close(merged, base + share * (taus[0] + taus[1] + taus[2]))

    def test_threads_of_torch_change_nothing(self, step: MergeMethod) -> None:
        """Merging in the caller's thread, where torch may have several, gives what a thread of the engine gives."""
        vectors = opened({"w": draw(400, 300)}, {t: {"w": draw(400, 300, seed=seed)} for seed, t in enumerate("abc")})
        expected = step(vectors)["w"].reshape(-1)
        torch.set_num_threads(2)
        try:
            view = vectors.view("w")
            if isinstance(step, Svc):
                view = view.with_merged(step.method.apply(view, None))
            found = step.apply(view, None)
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(1)
        assert torch.equal(found, expected)

    def test_failing_decompositions_name_the_tensor(self, step: MergeMethod, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object, **options: object) -> None:
            raise torch.linalg.LinAlgError("the algorithm did not converge")

        if isinstance(step, Wudi) and step.solver == "adam":
            pytest.skip("nothing is decomposed")
        monkeypatch.setattr(torch.linalg, "svd", fail)
        monkeypatch.setattr(torch.linalg, "eigh", fail)
        vectors = opened({"layer.w": draw(4, 4)}, {"a": {"layer.w": draw(4, 4)}, "b": {"layer.w": draw(4, 4, seed=2)}})
        with pytest.raises(UserError, match=r"decomposition of tensor 'layer\.w' \(4, 4\) does not converge"):
            step(vectors)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_refused_by_name(self, step: MergeMethod, value: float) -> None:
        tau = draw(4, 4)
        tau[1, 2] = value
        with pytest.raises(UserError, match=r"'layer\.w'.* holds (NaN|infinity)"):
            step(opened({"layer.w": draw(4, 4)}, {"a": {"layer.w": draw(4, 4)}, "b": {"layer.w": tau}}))

    def test_task_vectors_that_overflow_are_refused_by_name(self, step: MergeMethod) -> None:
        vectors = opened({"layer.w": draw(4, 4).float()}, {"a": {"layer.w": draw(4, 4).float()}})
        overflowing = TaskVectors.of(vectors, {"a": vectors["a"], "b": vectors["a"] * 1e39})
        with pytest.raises(UserError, match=r"'layer\.w'.* (NaN|infinity|more than torch\.float32 holds)"):
            step(overflowing)


def test_what_counts_as_a_matrix() -> None:
    assert matrix_shape((2, 3)) == (2, 3) and matrix_shape((5, 3, 2)) == (5, 6)
    assert matrix_shape((8, 4, 3, 3)) == (8, 36) and matrix_shape((8, 4, 3, 3, 3)) == (8, 108)
    for shape in [(), (3,), (3, 1), (1, 3), (1, 3, 3), (0, 4), (4, 0), (3, 1, 1)]:
        assert matrix_shape(shape) is None


def test_svd_leaves_out_what_is_only_rounding() -> None:
    for shape in SHAPES:
        found = svd(low_rank(*shape, [5.0, 2.0, 1e-9], first=0))
        close(found.sigma, torch.tensor([5.0, 2.0, 1e-9], dtype=torch.float64))
        close((found.u * found.sigma) @ found.vh, low_rank(*shape, [5.0, 2.0, 1e-9], first=0))
        # A remainder is judged by the size of what it is a remainder of.
        assert len(svd(1e-14 * draw(*shape)).sigma) == min(shape)
        assert len(svd(1e-14 * draw(*shape), size=100.0).sigma) == 0
    assert svd(torch.zeros(3, 0)).u.shape == (3, 0)


def test_orthogonalize_finds_the_nearest_and_adds_no_directions() -> None:
    factor = draw(7, 4)
    nearest = orthogonalize(factor)
    close(nearest.mT @ nearest, torch.eye(4, dtype=torch.float64))
    for seed in range(20):
        assert (factor - nearest).norm() < (factor - torch.linalg.qr(draw(7, 4, seed=seed)).Q).norm()
    unit = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    close(orthogonalize(torch.cat([unit, unit], 1)), torch.cat([unit, unit], 1) / 2**0.5)


# --- TSV-M ----------------------------------------------------------------------------------------------------------


def test_tsv_m_adds_up_orthogonal_tasks_of_low_rank() -> None:
    for rows, columns in SHAPES[:3]:
        taus = [low_rank(rows, columns, values, first) for first, values in [(0, [3.0, 1.0]), (2, [2.0, 0.5])]]
        close(merge_singular_vectors(taus), taus[0] + taus[1])


def test_tsv_m_keeps_the_share_of_each_task() -> None:
    """Of 6 directions each of 2 tasks keeps its 3 leading ones, and the merge has those singular values."""
    taus = [low_rank(6, 8, [8.0, 7.0, 6.0, 5.0], 0), low_rank(6, 8, [4.0, 3.0, 2.0, 1.0], 0, seed=1)]
    merged = merge_singular_vectors(taus)
    close(spectrum(merged), torch.tensor([8.0, 7.0, 6.0, 4.0, 3.0, 2.0], dtype=torch.float64))
    assert spectrum(merge_singular_vectors([*taus, taus[0]]))[:2].tolist() != [8.0, 7.0]


def test_tsv_m_of_one_model_is_that_model() -> None:
    base = {"w": draw(6, 4), "bias": draw(6)}
    vectors = TaskVectors.open(base=base, models={"a": {"w": draw(6, 4, seed=1), "bias": draw(6, seed=1)}}, check=False)
    merged = TsvM()(vectors)
    assert torch.equal(merged["w"], draw(6, 4, seed=1)) and torch.equal(merged["bias"], draw(6, seed=1))
    close(TsvM(scale=0.5)(vectors)["w"], (draw(6, 4) + draw(6, 4, seed=1)) / 2)


# --- Iso ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iso_c_makes_the_spectrum_flat_and_keeps_the_nuclear_norm(shape: tuple[int, int]) -> None:
    taus = [draw(*shape, seed=seed) for seed in range(3)]
    total, merged = taus[0] + taus[1] + taus[2], flatten_spectrum(taus)
    values = spectrum(merged)
    close(values, torch.full_like(values, float(spectrum(total).mean())))
    # With the same singular vectors, U Vᵀ times the transposed sum is symmetric and positive.
    product = merged @ total.mT
    close(product, product.mT)
    assert torch.linalg.eigvalsh(product)[-min(shape) :].min() > 0


def test_iso_c_adds_no_directions() -> None:
    tau = low_rank(6, 8, [3.0, 2.0, 1.0], 0)
    close(flatten_spectrum([tau]), low_rank(6, 8, [2.0, 2.0, 2.0], 0))


@pytest.mark.parametrize("method", [IsoC(), IsoCts(), IsoCts(common_space_fraction=0.5)], ids=repr)
@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (40, 96)], ids=str)
@pytest.mark.parametrize("heavy", [False, True])
def test_iso_does_not_raise_the_rounding_of_weights(method: MergeMethod, shape: tuple[int, int], heavy: bool) -> None:
    """Two updates of rank 4 have 8 directions, though θ₀ + τ in fp32 gives the differences a full rank."""
    base = draw(*shape, seed=9)
    base[0] *= 30 if heavy else 1  # one long row brings rounding of its own
    base = base.float()
    factors = {name: (draw(shape[0], 4, seed=seed), draw(4, shape[1], seed=seed + 5)) for seed, name in enumerate("ab")}
    taus = {name: 0.02 * left @ right for name, (left, right) in factors.items()}
    models = {name: {"w": (base.double() + tau).float()} for name, tau in taus.items()}
    found = method(TaskVectors.open({"w": base}, models))["w"].double() - base.double()
    values = spectrum(found)
    assert values[7] > 0.9 * values[0] and values[8] < 1e-3 * values[0]
    exact = {name: {"w": base.double() + tau} for name, tau in taus.items()}
    close(found, method(TaskVectors.open({"w": base.double()}, exact))["w"] - base.double(), 1e-3)


@pytest.mark.parametrize("method", [IsoC(), IsoCts()], ids=repr)
def test_iso_keeps_all_directions_of_weights_that_changed_in_all(method: MergeMethod) -> None:
    base = draw(48, 48, seed=9).float()
    models = {name: {"w": base + 1e-3 * draw(48, 48, seed=seed).float()} for seed, name in enumerate("ab")}
    found = method(TaskVectors.open({"w": base}, models))["w"].double() - base.double()
    assert spectrum(found)[-1] > 0.5 * spectrum(found)[0]


def test_weight_rounding_bounds_what_rounding_does() -> None:
    """Between the largest singular value of rounding itself and a few times that, whatever the shape."""
    for rows, columns in [(64, 64), (300, 20), (7, 200), (2, 200)]:
        base, tau = draw(rows, columns, seed=1).float(), 0.1 * draw(rows, columns, seed=2)
        exact = base.double() + tau
        view = TensorView(TaskVectors.open({"w": base}, {"a": {"w": exact.float()}}), "w", 0, base.numel())
        (bound,) = weight_rounding(TaskMatrices(view, (rows, columns)))
        noise = float(spectrum(exact.float().double() - exact)[0])
        assert noise < bound < 5 * noise
    assert weight_rounding([draw(3, 3), draw(3, 3)]) == [0.0, 0.0]


def test_iso_cts_with_one_model_or_no_directions_of_tasks_is_iso_c() -> None:
    taus = [draw(6, 8, seed=seed) for seed in range(3)]
    for fraction in (0.0, 0.5, 1.0):
        close(merge_common_and_specific(taus[:1], fraction), flatten_spectrum(taus[:1]))
    close(merge_common_and_specific(taus, 1.0), flatten_spectrum(taus))
    assert (merge_common_and_specific(taus, 0.5) - flatten_spectrum(taus)).norm() > 0.1


def test_iso_cts_lets_each_task_keep_a_direction_of_its_own() -> None:
    """Tasks a and b share strong directions; what c has alone is too weak for a sum cut at 3, but c keeps it."""
    shared = low_rank(6, 6, [9.0, 8.0, 7.0], 0)
    own = {name: low_rank(6, 6, [weak], first) for name, weak, first in [("a", 3.0, 3), ("b", 2.0, 4), ("c", 1.0, 5)]}
    merged = merge_common_and_specific([shared + own["a"], shared + own["b"], own["c"]], 0.5)
    # Common: 18, 16, 14; of their own: 3, 2, 1; the mean of all is 9.
    close(merged, low_rank(6, 6, [9.0] * 6, 0))
    # With 5 common directions asked for, one is left over for 3 tasks: too little, so there are 6; two are nearer to 3.
    assert subspace_sizes(6, 3, 0.9) == (6, 0) and subspace_sizes(6, 3, 0.8) == (3, 1)
    assert subspace_sizes(5, 3, 0.0) == (2, 1) and subspace_sizes(3, 7, 0.0) == (3, 0)


# --- WUDI -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wudi_interferes_least(shape: tuple[int, int]) -> None:
    taus = [draw(*shape, seed=seed) for seed in range(3)]
    total = taus[0] + taus[1] + taus[2]
    solution = least_interference(taus)
    least = interference(solution, taus)
    assert least <= interference(total, taus)
    # Adam with long steps gets close from above; with the paper's short ones it has only begun.
    walked = interference(descend(taus, 3000, 1e-2), taus)
    begun = interference(descend(taus, 300, 1e-5), taus)
    assert least * (1 - 1e-9) - 1e-12 <= walked <= least * 1.02 + 1e-3 < begun < interference(total, taus)
    for seed in range(10):
        assert interference(solution + 1e-3 * draw(*shape, seed=seed + 50), taus) >= least


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wudi_gradient(shape: tuple[int, int]) -> None:
    """The gradient is that of the objective, by either way of writing it, and vanishes at the closed solution."""
    taus = [draw(*shape, seed=seed) for seed in range(2)]
    gradient = interference_gradient(taus)
    point, direction = draw(*shape, seed=5), draw(*shape, seed=6)
    step = 1e-6
    numeric = interference(point + step * direction, taus) - interference(point - step * direction, taus)
    assert numeric / (2 * step) == pytest.approx(float((gradient(point) * direction).sum()), rel=1e-6)
    assert gradient(least_interference(taus)).abs().max() < 1e-10 * gradient(taus[0] + taus[1]).abs().max()


def test_wudi_changes_the_sum_least() -> None:
    """Directions that no task has are free; the solution has nothing in them, as the sum has."""
    taus = [low_rank(5, 12, [3.0, 2.0], 0), low_rank(5, 12, [2.0, 1.0], 1)]
    solution = least_interference(taus)
    rows = torch.linalg.svd(torch.cat(taus)).Vh
    assert (solution @ rows[3:].mT).abs().max() < 1e-12


def test_wudi_leaves_tasks_alone_whose_inputs_do_not_meet() -> None:
    left, right = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(3, 8, dtype=torch.float64)
    left[:, :4], right[:, 4:] = draw(3, 4), draw(3, 4, seed=1)
    close(least_interference([left, right]), left + right)


def test_wudi_by_hand() -> None:
    a = torch.tensor([[0.5, 0.0], [0.25, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.25, 0.0], [0.0, 0.125]], dtype=torch.float64)
    # A_a = diag(1, 0) and A_b = diag(0.8, 0.2), so A = diag(1.8, 0.2); B = a A_a + b A_b = [[0.7, 0], [0.25, 0.025]].
    close(least_interference([a, b]), torch.tensor([[7 / 18, 0.0], [5 / 36, 0.125]], dtype=torch.float64))
    # All inputs are known as well to both: the plain mean, however much larger one change is.
    eye = torch.eye(2, dtype=torch.float64)
    close(least_interference([3 * eye, eye]), 2 * eye)


def test_wudi_takes_embeddings_for_no_linear_layer() -> None:
    names = ["embed_tokens.weight", "transformer.wte.weight", "shared.weight", "layer.shared_expert.weight", "a.weight"]
    base = {name: draw(5, 4) for name in names}
    taus = {model: {name: draw(5, 4, seed=seed + 1) for name in names} for seed, model in enumerate("ab")}
    merged = Wudi()(opened(base, taus))
    solved = base["a.weight"] + least_interference([taus["a"]["a.weight"], taus["b"]["a.weight"]])
    for name in names:
        mean = base[name] + (taus["a"][name] + taus["b"][name]) / 2
        close(merged[name], solved if name in names[3:] else mean)
    close(Wudi(exclude=[])(opened(base, taus))["embed_tokens.weight"], solved)


def test_wudi_refuses_settings_that_mean_nothing() -> None:
    with pytest.raises(UserError, match=r"iterations must be a whole number, got 2\.5"):
        Wudi(iterations=2.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="exclude must be a list of patterns, got 'embed'"):
        Wudi(exclude="embed")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"pattern '\(' to exclude is no regular expression"):
        Wudi(exclude=["("])


# --- SVC ------------------------------------------------------------------------------------------------------------


def three(*, seed: int = 0) -> tuple[State, dict[str, State]]:
    base = {"w": draw(6, 8, seed=seed), "bias": draw(6, seed=seed)}
    return base, {model: {"w": draw(6, 8, seed=seed + 9), "bias": draw(6)} for seed, model in enumerate("abc")}


def test_svc_of_one_model_undoes_any_scale_above_alpha() -> None:
    """s_r = λ in every direction, so γ = 1 / max(α, λ)."""
    base, taus = three()
    vectors = opened(base, {"a": taus["a"]})
    for scale, result in [(1.0, 1.0), (0.3, 1.0), (0.1, 1.0), (0.05, 0.5), (3.0, 1.0)]:
        merged = Svc(method=TaskArithmetic(scale=scale))(vectors)
        close(merged["w"], base["w"] + result * taus["a"]["w"])
        close(merged["bias"], base["bias"] + scale * taus["a"]["bias"])


def test_svc_counts_copies_once() -> None:
    base, taus = three()
    vectors = opened(base, dict.fromkeys("abc", taus["a"]))
    close(Svc(method=TaskArithmetic(scale=1.0))(vectors)["w"], base["w"] + taus["a"]["w"])
    close(Svc(method=SimpleAverage())(vectors)["w"], base["w"] + taus["a"]["w"])


def test_svc_leaves_a_sum_of_orthogonal_tasks_alone() -> None:
    base = {"w": torch.zeros(6, 6, dtype=torch.float64)}
    taus = [low_rank(6, 6, [4.0, 2.0], 0), low_rank(6, 6, [3.0, 1.0], 2)]
    vectors = opened(base, {"a": {"w": taus[0]}, "b": {"w": taus[1]}})
    close(Svc(method=TaskArithmetic(scale=1.0))(vectors)["w"], taus[0] + taus[1])


def test_svc_by_hand() -> None:
    """Along u_1 task a has 2 and b has 1 of the merged 3: s = 3/2 and 3, so γ = 2 / 4.5; along u_2, 1 of 1 and −1."""
    base = {"w": torch.zeros(2, 2, dtype=torch.float64)}
    taus = {"a": {"w": torch.diag(torch.tensor([2.0, 2.0])).double()},
            "b": {"w": torch.diag(torch.tensor([1.0, -1.0])).double()}}  # fmt: skip
    merged = Svc(method=TaskArithmetic(scale=1.0), alpha=0.2)(opened(base, taus))["w"]
    # s_2 = 1/2 for a, and −1 for b, which counts as α.
    close(merged, torch.diag(torch.tensor([3 * 2 / 4.5, 1 * 2 / 0.7], dtype=torch.float64)))


def test_svc_with_alpha_of_one_only_shrinks() -> None:
    base, taus = three()
    vectors = opened(base, taus)
    plain = TaskArithmetic(scale=1.0)(vectors)["w"] - base["w"]
    shrunk = Svc(method=TaskArithmetic(scale=1.0), alpha=1.0)(vectors)["w"] - base["w"]
    assert (spectrum(shrunk) <= spectrum(plain) + 1e-12).all() and (spectrum(shrunk) < spectrum(plain) - 0.1).any()


def test_svc_measures_what_the_transforms_left() -> None:
    """Halved by DARE's rule or not, a task vector is compared with what was merged of it."""
    base, taus = three()
    vectors = opened(base, {"a": taus["a"]})
    dare = Dare(drop_rate=0.5)
    plain = TaskArithmetic(scale=1.0)(vectors, transforms=[dare], seed=3)
    close(Svc(method=TaskArithmetic(scale=0.2))(vectors, transforms=[dare], seed=3)["w"], plain["w"])
    close(Svc(method=dare)(vectors, seed=3)["w"], plain["w"])
