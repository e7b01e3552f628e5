"""Merges that go by inner products: examples to check by hand, what they must keep, and bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.methods import (
    Karcher,
    MergeMethod,
    ModelStock,
    MultiSlerp,
    NuSlerp,
    SimpleAverage,
    Slerp,
    WeightedAverage,
)
from lightning_merge.methods.gram import block_products, column_products, combine, row_products
from lightning_merge.tensor_view import GRID

THIRD_TURN = [[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]]  # 120 degrees apart


def merged(method: MergeMethod, models: object, base: object = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Merge models, given as lists of numbers or tensors, as one tensor ``w``; names are ``a``, ``b``, ..."""
    states = {"abcdefgh"[i]: {"w": torch.as_tensor(m, dtype=dtype)} for i, m in enumerate(models)}  # type: ignore
    start = None if base is None else {"w": torch.as_tensor(base, dtype=dtype)}
    return method(TaskVectors.open(base=start, models=states, check=False))["w"]


def close(found: Tensor, expected: object, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=atol)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- inner products -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_a_block_do_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    vectors = list(draw(3, 5 * GRID + 3_333, dtype=dtype))
    whole = block_products(vectors)
    for blocks in (1, 2, 3):
        starts = range(0, len(vectors[0]), blocks * GRID)
        pieces = [block_products([v[start : start + blocks * GRID] for v in vectors]) for start in starts]
        assert [list(itertools.chain.from_iterable(pair)) for pair in zip(*pieces, strict=True)] == whole
    shifted = [torch.cat([torch.zeros(3, dtype=dtype), v])[3:] for v in vectors]  # elsewhere in memory
    assert block_products(shifted) == whole


def test_products_see_how_nearly_parallel_vectors_are() -> None:
    """1 − cos is 5e-7 here: sums of fp32 products in fp32 would not have it to one part in fifty."""
    a, noise = draw(2, 6 * GRID + 50, dtype=torch.float32)
    b = a + 1e-3 * noise
    aa, ab, bb = (math.fsum(pair) for pair in block_products([a, b]))
    exact = 1 - float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))
    assert 1 - ab / math.sqrt(aa * bb) == pytest.approx(exact, rel=0.02)


def test_products_of_long_vectors_are_better_than_fp32() -> None:
    vector = draw(6 * GRID, dtype=torch.float32).abs()
    (found,) = block_products([vector])
    exact = vector.double().square().reshape(6, GRID).sum(dim=1).tolist()
    # The rounding of one fp32 number is 6e-8; that of 64 runs averages out.
    assert max(abs(x / y - 1) for x, y in zip(found, exact, strict=True)) < 1.5e-8
    assert len({np.float32(x) for x in found} - set(found)) == 6  # no sum was rounded to fp32


def test_small_tensors_have_products_in_fp64() -> None:
    a, b = draw(2, 1000, dtype=torch.float32)
    assert block_products([a, b])[1] == [pytest.approx(float(a.double() @ b.double()), rel=1e-14)]


@pytest.mark.parametrize("scale", [1e-24, 1e-20, 1e-17, 1e19, 1e25])
def test_products_of_tiny_and_huge_entries_hold_in_fp32(scale: float) -> None:
    """Squares of such entries are 0, subnormal or infinite in fp32; other runs and other vectors are of size 1."""
    plain, mixed = draw(2, GRID + 3000, dtype=torch.float32)
    vectors = [plain, mixed.clone(), plain * scale, torch.zeros_like(plain)]
    vectors[1][2048:9000] *= scale
    exact = torch.stack(vectors).double()
    found = [math.fsum(blocks) for blocks in block_products(vectors)]
    by_row = row_products([vector.reshape(4, -1) for vector in vectors]).sum(axis=2)
    pairs = list(itertools.combinations_with_replacement(range(4), 2))
    for (i, j), product in zip(pairs, found, strict=True):
        atol = 1e-6 * float(exact[i].norm() * exact[j].norm())
        assert product == pytest.approx(float(exact[i] @ exact[j]), rel=0, abs=atol)
        assert by_row[i, j] == pytest.approx(float(exact[i] @ exact[j]), rel=0, abs=atol)


def test_products_of_tiny_entries_are_those_of_their_run() -> None:
    vectors = [v * torch.where(torch.arange(2 * GRID) % 5000 < 2500, 1e-24, 1.0) for v in draw(2, 2 * GRID).float()]
    whole = block_products(vectors)
    for start in (0, GRID):
        here = block_products([vector[start : start + GRID] for vector in vectors])
        assert here == [[blocks[start // GRID]] for blocks in whole]


def test_tiny_and_huge_models_merge_as_their_multiples_do() -> None:
    a, b = draw(2, 4096, dtype=torch.float32)
    plain = merged(Karcher(), [a, b], dtype=torch.float32)
    for scale in (2.0**-80, 2.0**80):
        close(merged(Karcher(), [a * scale, b * scale], dtype=torch.float32) / scale, plain, 1e-6)


@pytest.mark.parametrize("width", [1, 7, 1024, 2500])
def test_products_by_row_and_column(width: int) -> None:
    matrices = list(draw(2, 9, width, dtype=torch.float32))
    exact = np.einsum("srn,trn->str", *[torch.stack(matrices).double().numpy()] * 2)
    by_row = row_products(matrices)
    np.testing.assert_allclose(by_row, exact, rtol=0, atol=1e-7 * exact.max() if width > 1000 else 1e-14)
    transposed = [matrix.T.contiguous() for matrix in matrices]
    np.testing.assert_allclose(column_products(transposed), exact, rtol=0, atol=1e-10)
    for rows in (1, 2, 4):
        assert np.array_equal(row_products([m[3 : 3 + rows] for m in matrices]), by_row[:, :, 3 : 3 + rows])


def test_combine_starts_with_the_first_term() -> None:
    vectors = [torch.tensor([-0.0, 1.0]), torch.tensor([5.0, 7.0])]
    assert str(combine(vectors, [1.0, 0.0])) == str(vectors[0])  # −0 stays −0
    assert combine(vectors, [0.0, 0.0]).tolist() == [0, 0]


# --- slerp ----------------------------------------------------------------------------------------------------------


def test_slerp_by_hand() -> None:
    """A right angle: coefficients are sines and cosines, and they go with the vectors' own norms."""
    close(merged(Slerp(t=0.5), [[0.0, 2.0]], [1.0, 0.0]), [math.sqrt(0.5), math.sqrt(2)])
    close(merged(Slerp(t=1 / 3), [[0.0, 2.0]], [1.0, 0.0]), [math.cos(math.pi / 6), 1.0])


def test_slerp_stays_on_the_sphere_and_turns_evenly() -> None:
    a, b = (v / v.norm() for v in draw(2, 50))
    points = [merged(Slerp(t=t), [b], a) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert torch.equal(points[0], a) and torch.equal(points[-1], b)
    steps = [float(torch.arccos(p @ q)) for p, q in itertools.pairwise(points)]
    assert steps == pytest.approx([float(torch.arccos(a @ b)) / 4] * 4)


def test_slerp_of_parallel_opposite_and_zero_vectors_is_the_line() -> None:
    for model in ([3.0, 6.0], [-1.0, -2.0], [-2.0, -4.0], [0.0, 0.0]):
        close(merged(Slerp(t=0.25), [model], [1.0, 2.0]), [0.75 + 0.25 * model[0], 1.5 + 0.25 * model[1]])
    close(merged(Slerp(t=0.25), [[4.0, 8.0]], [0.0, 0.0]), [1.0, 2.0])
    assert torch.isfinite(merged(Slerp(t=0.25), [[-1.0, -2.0 - 1e-7]], [1.0, 2.0])).all()


def test_slerp_keeps_entries_on_the_line() -> None:
    base = draw(3 * GRID, dtype=torch.float32)
    assert torch.equal(merged(Slerp(t=0.3), [base.clone()], base, torch.float32), base)


def test_entries_that_agree_stay_where_slerp_is_the_line() -> None:
    base = draw(GRID, dtype=torch.float32)
    model = base.clone()
    model[::100] *= 1.1
    found = merged(Slerp(t=0.3, compat="mergekit"), [model], base, torch.float32)
    assert torch.equal(found == base, model == base)


@pytest.mark.parametrize(
    "method",
    [
        NuSlerp(weights={"a": 1, "b": 2}),
        NuSlerp(weights={"a": 1, "b": 2}, along="row"),
        NuSlerp(weights={"a": 1, "b": 2}, along="column"),
        MultiSlerp(),
        Karcher(weights={"a": 1, "b": 2}),
        ModelStock(),
    ],
)
@pytest.mark.parametrize("with_base", [True, False])
def test_equal_models_merge_into_that_model(method: MergeMethod, with_base: bool) -> None:
    """Also where θ₀ + (θ − θ₀) or a sum of shares would round."""
    base, model = draw(2, 5, 300, dtype=torch.float32)
    if with_base and getattr(method, "along", "tensor") == "tensor":
        assert torch.equal(merged(method, [model, model], 1e-3 * base, torch.float32), model)
    elif not with_base and not method.needs_base:
        assert torch.equal(merged(method, [model, model], None, torch.float32), model)


def test_all_the_weight_on_one_model_takes_it_bit_for_bit() -> None:
    base, a, b = draw(3, 400, dtype=torch.float32)
    for kind in (NuSlerp, MultiSlerp, Karcher):
        assert torch.equal(merged(kind(weights={"a": 0, "b": 0.7}), [a, b], 1e-3 * base, torch.float32), b)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_of_the_models_does_not_matter(scale: float) -> None:
    base, a, b = draw(3, 40)
    methods = [Slerp(t=0.3), NuSlerp(weights={"a": 1, "b": 2}), MultiSlerp(), Karcher(), ModelStock(clamp=False)]
    for method in methods:
        models = [a] if isinstance(method, Slerp) else [a, b]
        small = merged(method, [scale * m for m in models], scale * base)
        torch.testing.assert_close(small / scale, merged(method, models, base), rtol=1e-9, atol=1e-12)


def test_slerp_thresholds_are_mergekits_only_in_its_form() -> None:
    base, model = [1.0, 0.0], [math.cos(0.03), math.sin(0.03)]  # cos 0.99955
    close(merged(Slerp(t=0.5), [model], base), [math.cos(0.015), math.sin(0.015)])
    close(merged(Slerp(t=0.5, compat="mergekit"), [model], base), [(1 + model[0]) / 2, model[1] / 2])
    tiny = merged(Slerp(t=0.5, compat="mergekit"), [[0.0, 1e-9]], [1e-9, 0.0])
    close(tiny / 1e-9, [math.sqrt(0.5), math.sqrt(0.5)])
    # Lengths up to 1e-8 count as 1, so that all angles among them are right angles.
    close(merged(Slerp(t=0.5, compat="mergekit"), [[3e-9]], [1e-9]) / 1e-9, [4 * math.sqrt(0.5)])
    close(merged(Slerp(t=0.5), [[3e-9]], [1e-9]) / 1e-9, [2.0])


# --- NuSLERP --------------------------------------------------------------------------------------------------------


def test_nuslerp_weighs_the_second_model() -> None:
    found = merged(NuSlerp(weights={"a": 2, "b": 1}), [[1.0, 0.0], [0.0, 1.0]])
    close(found, [math.cos(math.pi / 6), math.sin(math.pi / 6)])


def test_nuslerp_turns_task_vectors_where_there_is_a_base() -> None:
    base = [5.0, -7.0]
    close(merged(NuSlerp(), [[6.0, -7.0], [5.0, -6.0]], base), [5 + math.sqrt(0.5), -7 + math.sqrt(0.5)])


ROOT = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("along", "expected"),
    [
        # Rows (1, 0) and (0, 1) are at a right angle, (0, 2) and (0, 1) parallel.
        ("row", [[ROOT, ROOT], [0.0, 1.5]]),
        # Columns (1, 0) and (0, 0) have no arc; (0, 2) and (1, 1) are 45 degrees apart.
        ("column", [[0.5, math.sin(math.pi / 8) * math.sqrt(2)], [0.0, math.sin(math.pi / 8) * 3 * math.sqrt(2)]]),
    ],
)
def test_nuslerp_by_row_and_by_column(along: str, expected: list) -> None:
    a, b = [[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 1.0]]
    close(merged(NuSlerp(along=along), [a, b]), expected)  # type: ignore[arg-type]


def test_a_row_of_a_convolution_is_a_whole_filter_and_in_mergekits_form_its_last_axis() -> None:
    a, b = draw(2, 4, 3, 2, 2)
    filters = [merged(NuSlerp(), [a[i], b[i]]) for i in range(4)]
    close(merged(NuSlerp(along="row"), [a, b]), torch.stack(filters))
    strips = [merged(NuSlerp(), [x, y]) for x, y in zip(a.reshape(-1, 2), b.reshape(-1, 2), strict=True)]
    close(merged(NuSlerp(along="row", compat="mergekit"), [a, b]), torch.stack(strips).reshape(4, 3, 2, 2), 1e-10)


@pytest.mark.parametrize("method", [NuSlerp(along="row"), NuSlerp(along="column"), ModelStock(per_row=True)])
def test_a_tensor_of_one_axis_is_one_vector_however_long(method: MergeMethod) -> None:
    base, a, b = draw(3, 5 * GRID + 77, dtype=torch.float32)
    whole = ModelStock() if isinstance(method, ModelStock) else NuSlerp()
    assert torch.equal(merged(method, [a, b], base, torch.float32), merged(whole, [a, b], base, torch.float32))
    close(merged(method, [3.0, 5.0], 1.0), merged(whole, [3.0, 5.0], 1.0))  # no axis at all


@pytest.mark.parametrize(
    "method", [NuSlerp(along="row"), NuSlerp(along="column"), ModelStock(per_row=True, clamp=False)]
)
def test_rows_that_nobody_changed_stay_bit_for_bit(method: MergeMethod) -> None:
    base, a, b = draw(3, 6, 6, dtype=torch.float32)
    base[2, 3] = -0.0
    kept = (slice(None), 3) if getattr(method, "along", "") == "column" else (2, slice(None))
    a[kept], b[kept] = base[kept], base[kept]
    found = merged(method, [a, b], base, torch.float32)
    assert found[kept].numpy().tobytes() == base[kept].numpy().tobytes()
    assert (found != base).sum() == 30


def test_nuslerp_constants_are_mergekits_only_in_its_form() -> None:
    theirs = NuSlerp(compat="mergekit")
    # Lengths below 1e-7 count as 1e-7: parallel vectors seem to stand at a right angle.
    close(merged(theirs, [[3e-9], [1e-9]]) / 1e-9, [4 * ROOT], 1e-3)
    close(merged(theirs, [[3e-6], [1e-6]]) / 1e-6, [2.0])
    close(merged(NuSlerp(), [[3e-9], [1e-9]]) / 1e-9, [2.0])
    # Nearly parallel or opposite vectors have an arc all the same.
    for angle in (0.03, math.pi - 0.03):
        models = [[1.0, 0.0], [math.cos(angle), math.sin(angle)]]
        close(merged(theirs, models), [math.cos(angle / 2), math.sin(angle / 2)])


# --- multi-slerp ----------------------------------------------------------------------------------------------------


def test_multislerp_by_hand() -> None:
    """Directions (1, 0) and (0, 1) weighed 3 to 1, length 3/4 · 2 + 1/4 · 6."""
    found = merged(MultiSlerp(weights={"a": 3, "b": 1}), [[2.0, 0.0], [0.0, 6.0]])
    close(found, [3 * 3 / math.sqrt(10), 3 * 1 / math.sqrt(10)])
    doubled = merged(MultiSlerp(weights={"a": 6, "b": 2}, normalize=False), [[2.0, 0.0], [0.0, 6.0]])
    close(doubled, 8 * found)


def test_directions_that_cancel_give_the_weighted_sum() -> None:
    a = draw(20)
    others = {MultiSlerp(): [a, -3 * a], Karcher(): [a, -3 * a], NuSlerp(): [a, -3 * a], Slerp(): [-3 * a]}
    for method, models in others.items():
        close(merged(method, models, a if isinstance(method, Slerp) else None), -a)
    for spherical in (MultiSlerp(), Karcher()):
        close(merged(spherical, THIRD_TURN), [0.0, 0.0], 1e-6)


@pytest.mark.parametrize("method", [MultiSlerp(), MultiSlerp(normalize=False), NuSlerp(), NuSlerp(along="row")])
def test_models_that_equal_the_base_give_the_base(method: MergeMethod) -> None:
    base = draw(3, 50_000, dtype=torch.float32)
    models = [base] * (2 if isinstance(method, NuSlerp) else 3)
    assert torch.equal(merged(method, models, base, torch.float32), base)


# --- Karcher mean ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
def test_karcher_mean_of_two_is_slerp(share: float) -> None:
    a, b = draw(2, 30)
    a, b = a / a.norm(), b / b.norm()
    found = merged(Karcher(weights={"a": 1 - share, "b": share}, tolerance=1e-12, max_iterations=50), [a, b])
    close(found, merged(Slerp(t=share), [b], a), 1e-9)


def test_karcher_mean_of_three_axes() -> None:
    close(merged(Karcher(), torch.eye(3).tolist()), [math.sqrt(1 / 3)] * 3)


def test_karcher_mean_has_no_smaller_neighbour() -> None:
    vectors = draw(4, 6, seed=3)
    vectors[0] += 2
    vectors[1:] += 1
    weights = {"a": 1.0, "b": 3.0, "c": 0.5, "d": 2.0}

    def spread(point: Tensor) -> float:
        cosine = (vectors @ point) / (vectors.norm(dim=1) * point.norm())
        return float(torch.tensor(list(weights.values()), dtype=torch.float64) @ torch.arccos(cosine).square())

    mean = merged(Karcher(weights=weights, tolerance=1e-12, max_iterations=200), vectors)
    start = merged(MultiSlerp(weights=weights), vectors)
    least = spread(mean)
    assert least < spread(start) - 1e-5  # the search goes beyond where it begins
    for seed in range(30):
        assert spread(mean + 1e-3 * draw(6, seed=seed)) > least
    total = sum(weights.values())
    lengths = vectors.norm(dim=1).tolist()
    assert float(mean.norm()) == pytest.approx(
        sum(w * n for w, n in zip(weights.values(), lengths, strict=True)) / total
    )


def test_karcher_ends_after_so_many_steps_or_small_ones() -> None:
    vectors = draw(3, 6, seed=1) + 0.7
    far = merged(Karcher(tolerance=1e-12, max_iterations=100), vectors)
    errors = [float((merged(Karcher(tolerance=0, max_iterations=n), vectors) - far).norm()) for n in (1, 2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 8 * errors[3]
    loose = merged(Karcher(tolerance=1.0, max_iterations=100), vectors)
    close(loose, merged(MultiSlerp(), vectors))


def test_a_zero_model_drops_out_here_and_shortens_the_mean_in_mergekits_form() -> None:
    vector = [3.0, 4.0]
    close(merged(Karcher(), [vector, [0.0, 0.0]]), vector)
    close(merged(Karcher(compat="mergekit"), [vector, [0.0, 0.0]]), [1.5, 2.0])
    close(merged(Karcher(), [[0.0, 0.0], [0.0, 0.0]]), [0.0, 0.0])
    close(merged(Karcher(compat="mergekit"), [[3e-6, 0.0], [0.0, 4.0]]), [0.0, (4 + 3e-6) / 2])


def test_opposite_models_average_here_and_give_the_first_direction_in_mergekits_form() -> None:
    close(merged(Karcher(), [[1.0, 0.0], [-3.0, 0.0]]), [-1.0, 0.0])
    close(merged(Karcher(weights={"a": 3, "b": 1}), [[1.0, 0.0], [-5.0, 0.0]]), [-0.5, 0.0])
    close(merged(Karcher(compat="mergekit"), [[1.0, 0.0], [-3.0, 0.0]]), [2.0, 0.0])


# --- model stock ----------------------------------------------------------------------------------------------------


def apart(degrees: float) -> list[list[float]]:
    angle = math.radians(degrees)
    return [[1.0, 0.0], [math.cos(angle), math.sin(angle)]]


@pytest.mark.parametrize(("degrees", "ratio"), [(0.001, 1.0), (60, 2 / 3), (90, 0.0), (120, -2.0), (180, 0.0)])
def test_model_stock_by_hand(degrees: float, ratio: float) -> None:
    models = torch.tensor(apart(degrees), dtype=torch.float64)
    base = torch.tensor([0.5, -0.25], dtype=torch.float64)
    close(merged(ModelStock(clamp=False), models + base, base), base + ratio * models.mean(0), 1e-8)
    close(merged(ModelStock(), models + base, base), base + max(ratio, 0) * models.mean(0), 1e-8)


def test_model_stock_averages_the_cosines_of_all_pairs() -> None:
    """Cosines 1/2, 0, 0: mean 1/6, t = (3/6) / (1 + 2/6) = 3/8."""
    models = torch.tensor([[1.0, 0.0, 0.0], [0.5, math.sqrt(0.75), 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    close(merged(ModelStock(), models, [0.0] * 3), 3 / 8 * models.mean(0))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_finds_the_point_nearest_to_the_centre(count: int) -> None:
    """The paper's picture: models lie around a centre in directions at right angles to each other and to the base."""
    basis = torch.linalg.qr(draw(12, 12))[0]
    centre = draw(12, seed=5)
    base = centre + 3 * basis[0]
    models = [centre + 0.8 * basis[1 + i] for i in range(count)]
    span = torch.stack([model - base for model in models], dim=1)
    nearest = base + span @ torch.linalg.lstsq(span, (centre - base)[:, None]).solution[:, 0]
    close(merged(ModelStock(), models, base), nearest, 1e-10)


@pytest.mark.parametrize("count", [2, 4])
def test_equal_models_are_the_stock_however_little_they_moved(count: int) -> None:
    """With mergekit's floor on the product of two norms, such models stay near the base."""
    base = draw(64, dtype=torch.float32)
    model = base + 1e-5 * draw(64, seed=1, dtype=torch.float32)
    assert torch.equal(merged(ModelStock(), [model] * count, base, torch.float32), model)
    theirs = merged(ModelStock(compat="mergekit"), [model] * count, base, torch.float32)
    assert (theirs - base).norm() < 0.1 * (model - base).norm()


def test_model_stock_by_row() -> None:
    base, a, b = draw(3, 4, 3, 2)
    rows = torch.stack([merged(ModelStock(), [a[i], b[i]], base[i]) for i in range(4)])
    close(merged(ModelStock(per_row=True), [a, b], base), rows)
    strips = zip(*(x.reshape(-1, 2) for x in (a, b, base)), strict=True)
    theirs = torch.stack([merged(ModelStock(compat="mergekit"), [x, y], z) for x, y, z in strips])
    close(merged(ModelStock(per_row=True, compat="mergekit"), [a, b], base), theirs.reshape(4, 3, 2))
    assert (rows - merged(ModelStock(), [a, b], base)).abs().max() > 1e-2


def test_model_stock_never_clamps_in_mergekits_form() -> None:
    models, base = apart(120), [0.0, 0.0]
    close(merged(ModelStock(compat="mergekit"), models, base), -torch.tensor(models).double().sum(0), 1e-6)


# --- averages -------------------------------------------------------------------------------------------------------


def test_weights_that_only_rounding_keeps_from_0_divide_in_mergekits_form() -> None:
    weights = {"a": 1.0, "b": -1.0, "c": 1e-10}
    models = draw(3, 5)
    with pytest.raises(UserError, match="weights sum to 0"):
        merged(WeightedAverage(weights=weights), models)
    with pytest.raises(UserError, match="weights sum to 0"):
        merged(WeightedAverage(weights={"a": 1.0, "b": -1.0, "c": 0.0}, compat="mergekit"), models)
    assert torch.isfinite(merged(WeightedAverage(weights=weights, compat="mergekit"), models)).all()
    assert merged(SimpleAverage(), models).tolist() == merged(WeightedAverage(), models).tolist()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "count", "message"),
    [
        (lambda: Slerp(), 2, "Slerp takes exactly 1 model, got 2"),
        (lambda: NuSlerp(), 3, "NuSlerp takes exactly 2 models, got 3"),
        (lambda: NuSlerp(), 1, "NuSlerp takes exactly 2 models, got 1"),
        (lambda: NuSlerp(weights={"a": 1, "b": -1}), 2, "NuSlerp: the weights sum to 0"),
        (lambda: MultiSlerp(weights={"a": 0.1, "b": 0.2, "c": -0.3}), 3, "MultiSlerp: the weights sum to 0"),
        (lambda: Karcher(weights=0), 2, "Karcher: the weights are all 0"),
        (lambda: Karcher(weights={"a": 1, "d": 1}), 2, "Karcher: weights names the model 'd', which is not there"),
        (lambda: ModelStock(), 1, "ModelStock takes at least 2 models, got 1"),
    ],
)
def test_refused(make: Callable[[], MergeMethod], count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        merged(make(), draw(count, 3), [0.0] * 3)


def test_weights_that_cancel_mean_the_middle_in_mergekits_form() -> None:
    found = merged(NuSlerp(weights={"a": 1, "b": -1}, compat="mergekit"), [[1.0, 0.0], [0.0, 1.0]])
    close(found, [ROOT, ROOT])
