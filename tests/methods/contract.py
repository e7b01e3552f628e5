"""What every merge method owes its users, tested once for all: each row goes through ``MethodContract``.

A row is a method with settings and an independent reference: plain numpy in fp64, written from the paper's formula,
over whole models in memory. The tensors lie on a coarse grid of binary fractions, so that differences and small sums
are exact in fp32 as in fp64: ranks, ties and signs are then the same for both, and the merge's own rounding is left.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_merge import TaskVectors, merge
from lightning_merge.errors import UserError
from lightning_merge.methods import MergeMethod, SimpleAverage, TaskArithmetic, Ties, Transform, WiseFT
from lightning_merge.methods.base import Partial
from lightning_merge.methods.streaming import Chain, add_partial, resolve
from lightning_merge.tensor_view import GRID

State = dict[str, Tensor]
Arrays = dict[str, np.ndarray]  # tensor name -> fp64 values
Score = Callable[[State], float]

# More than two grid blocks, 0-d, 1-d, 2-d, one column, 3-d, a convolution, and no entries at all.
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (3, 2 * GRID // 3 + 200),
    "block.0.weight": (7, 5),
    "block.0.bias": (5,),
    "block.1.weight": (4, 3, 2),
    "block.1.bias": (3,),
    "block.2.weight": (40, 3),
    "column.weight": (6, 1),
    "conv.weight": (4, 3, 2, 2),
    "norm.weight": (6,),
    "temperature": (),
    "nothing.weight": (0, 4),
}
TIED = ("head.weight", "embed.weight")
STATISTICS = "norm.running_mean"
COUNTER = "norm.num_batches_tracked"
SEED = 7


@dataclass(frozen=True)
class Row:
    """One method with settings.

    Args:
        method: The class.
        reference: From base and models (fp64 arrays) to the merged arrays, as the paper's formula has it.
        settings: Constructor arguments.
        label: Tells rows of one method apart.
        score: For methods that select by validation.
        random: Whether renaming a model may change the result.
        copies: Settings with which copies of one model merge into that model; ``None`` where none exist.
        copies_exact: Whether that holds bit for bit (or to rounding).
        alone: Settings with which a single model is returned bit for bit.
        to_base: Settings with which the base is returned bit for bit.
        neutral: For transforms: settings that change nothing, bit for bit, before any merge.
        count: How many models the method is given, of three.
        tolerance: By how many times the rounding of one operation the result may differ from the reference: more
            than 1 only where an iteration or decomposition stands between them.
        base_changes: Whether a method that does without a base gives another result with one.
        three_only: Whether the reference is written for ``count`` models and for no other number.
    """

    method: type[MergeMethod]
    reference: Callable[[Arrays, dict[str, Arrays]], Arrays]
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    score: Score | None = None
    random: bool = False
    copies: Mapping[str, Any] | None = None
    copies_exact: bool = True
    alone: Mapping[str, Any] | None = None
    to_base: Mapping[str, Any] | None = None
    neutral: Mapping[str, Any] | None = None
    count: int = 3
    tolerance: float = 1.0
    base_changes: bool = False
    three_only: bool = False

    def __str__(self) -> str:
        return self.method.__name__ + (f"-{self.label}" if self.label else "")

    def step(self) -> MergeMethod:
        return self.method(**self.settings)


def missing_rows(rows: Sequence[Row], methods: Mapping[str, type]) -> list[str]:
    """Name the methods of this package that have no row."""
    ours = {name for name, kind in methods.items() if kind.__module__.startswith("lightning_merge.")}
    return sorted(ours - {row.method.__name__ for row in rows})


# --- models on a grid ---------------------------------------------------------------------------------------------


def grid_models(dtype: torch.dtype = torch.float32, seed: int = 0, count: int = 3) -> tuple[State, dict[str, State]]:
    """Make a base and its fine-tuned models; every difference and every sum of three is exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    fine = dtype != torch.bfloat16
    unit, widest, change = (2.0**-20, 1 << 20, 1 << 12) if fine else (2.0**-6, 100, 12)

    def draw(shape: tuple[int, ...], bound: int) -> Tensor:
        return torch.randint(-bound, bound + 1, shape, generator=generator).double() * unit

    def complete(state: State, tracked: int) -> State:
        state[STATISTICS] = draw((6,), widest).to(dtype)
        state[COUNTER] = torch.tensor(tracked)
        state[TIED[0]] = state[TIED[1]]
        return state

    exact = {name: draw(shape, widest) for name, shape in SHAPES.items()}
    base = complete({name: values.to(dtype) for name, values in exact.items()}, 11)
    models: dict[str, State] = {}
    for number in range(count):
        state = {}
        for position, (name, values) in enumerate(exact.items()):
            # Layers differ in how far they move, and in which task moves them most.
            reach = max(1, change >> ((position + number) % 3))
            state[name] = (values + draw(SHAPES[name], reach)).to(dtype)
        models["cab"[number]] = complete(state, 20 + number)
    return base, models


def rough_models(count: int = 1) -> tuple[State, dict[str, State]]:
    """Make models whose differences round badly (τ far larger than θ₀), with negative zeros in base and models."""
    generator = torch.Generator().manual_seed(3)
    base = {name: 1e-3 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base["embed.weight"][0, ::7] = -0.0
    models = {}
    for number in range(count):
        state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        state["embed.weight"][:, ::5] = base["embed.weight"][:, ::5]
        state["embed.weight"][1, ::3] = -0.0
        models["cab"[number]] = state
    return base, models


def opened(base: State | None, models: dict[str, State], **options: Any) -> TaskVectors:
    return TaskVectors.open(base=base, models=models, check=False, **options)


def arrays(state: State) -> Arrays:
    """The merged tensors of a state dict in fp64."""
    return {name: state[name].double().numpy() for name in SHAPES}


def bytes_of(state: State) -> dict[str, bytes]:
    return {name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in state.items()}


def assert_same_bytes(found: State, expected: State) -> None:
    assert list(found) == list(expected) or set(found) == set(expected)
    for name, value in bytes_of(found).items():
        assert value == bytes_of({name: expected[name]})[name], f"'{name}' differs"


def in_chunks(monkeypatch: pytest.MonkeyPatch, blocks: int) -> list[tuple[int, int]]:
    """Have tensors handled in chunks of some grid blocks; the list fills with the ranges that are used."""
    used: list[tuple[int, int]] = []

    def chunks(self: TaskVectors, name: str) -> Iterator[tuple[int, int]]:
        numel = self.info(name).numel
        for start in range(0, numel, blocks * GRID):
            used.append((start, min(start + blocks * GRID, numel)))
            yield used[-1]

    monkeypatch.setattr(TaskVectors, "chunks", chunks)
    return used


def run(step: MergeMethod, vectors: TaskVectors, **options: Any) -> State:
    """Merge; a transform goes before the plain sum of task vectors."""
    if isinstance(step, Transform):
        return TaskArithmetic(scale=1.0)(vectors, transforms=[step], **options)
    return step(vectors, **options)


# --- the contract -------------------------------------------------------------------------------------------------


class MethodContract:
    """Inherit, and parametrize ``row``."""

    @pytest.fixture
    def models(self, row: Row) -> Iterator[tuple[State, dict[str, State]]]:
        """A base and its models; at the end they must be as they were."""
        base, models = grid_models(count=row.count)
        before = [bytes_of(state) for state in (base, *models.values())]
        yield base, models
        assert [bytes_of(state) for state in (base, *models.values())] == before, "the caller's models were changed"

    # numbers

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
    def test_equals_the_formula(self, row: Row, dtype: torch.dtype) -> None:
        """One rounding at the end: half a unit in the last place of the output, and fp32's own error inside."""
        base, models = grid_models(dtype, count=row.count)
        merged = row.step()(opened(base, models), seed=SEED, score=row.score)
        expected = row.reference(arrays(base), {name: arrays(models[name]) for name in sorted(models)})
        # fp32 rounds products and quotients of τ, then the sum with θ₀; values are below 2.
        relative, absolute = {
            torch.float32: (1e-7, 4e-7),
            torch.float64: (1e-15, 2e-15),
            torch.bfloat16: (2.0**-8, 1e-6),
        }[dtype]
        relative, absolute = relative * row.tolerance, absolute * row.tolerance
        for name in SHAPES:
            assert merged[name].dtype == dtype
            assert merged[name].shape == SHAPES[name]
            np.testing.assert_allclose(
                merged[name].double().numpy(), expected[name], rtol=relative, atol=absolute, err_msg=name
            )

    def test_one_model_follows_the_formula_too(self, row: Row) -> None:
        if (
            row.three_only
            or row.method.min_models > 1
            or any(isinstance(value, Mapping) for value in row.settings.values())
        ):
            pytest.skip("takes several models, or names them")
        try:
            row.step().check_models(["a"])
        except UserError as refused:
            pytest.skip(f"with these settings: {refused}")
        base, models = grid_models(count=1)
        alone = {"a": models["c"]}
        merged = row.step()(opened(base, alone), seed=SEED, score=row.score)
        expected = row.reference(arrays(base), {"a": arrays(alone["a"])})
        for name in SHAPES:
            np.testing.assert_allclose(
                merged[name].double().numpy(),
                expected[name],
                rtol=1e-7 * row.tolerance,
                atol=4e-7 * row.tolerance,
                err_msg=name,
            )

    def test_unchanged_models_leave_the_base(self, row: Row) -> None:
        """With every task vector 0 nothing divides by 0, and the merge is the base to its last bit or rounding."""
        if row.base_changes or not row.method.needs_base:
            pytest.skip("not a method of task vectors")
        base, _ = grid_models(count=row.count)
        copies = {name: dict(base) for name in "abc"[: row.count]}
        merged = row.step()(opened(base, copies), seed=SEED, score=row.score)
        for name in SHAPES:
            torch.testing.assert_close(merged[name], base[name], rtol=0, atol=0)

    def test_error_in_bf16_is_that_of_one_rounding(self, row: Row) -> None:
        """Models as they are in the wild: the mean error is the floor, that of rounding the exact result once."""
        if row.settings.get("compat") == "mergekit":
            pytest.skip("rounds differences to the stored dtype, as mergekit does")
        if row.score is not None:
            pytest.skip("chooses by models that are rounded already")
        generator = torch.Generator().manual_seed(11)
        base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        models = {
            name: {key: value + 1e-3 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
            for name in "cab"[: row.count]
        }
        base = {name: value.bfloat16() for name, value in base.items()}
        models = {name: {key: value.bfloat16() for key, value in state.items()} for name, state in models.items()}
        merged = row.step()(opened(base, models), seed=SEED, score=row.score)
        exact = row.reference(arrays(base), {name: arrays(models[name]) for name in sorted(models)})
        error = floor = 0.0
        for name in SHAPES:
            reference = torch.as_tensor(exact[name])
            error += (merged[name].double() - reference).abs().sum().item()
            floor += (reference.bfloat16().double() - reference).abs().sum().item()
        assert error <= 1.02 * floor + 1e-12, f"{error / floor:.3f} of the floor"

    def test_other_output_dtype_is_one_rounding_of_the_same_result(
        self, row: Row, models: tuple[State, dict[str, State]]
    ) -> None:
        vectors = opened(*models)
        full = row.step()(vectors, seed=SEED, score=row.score)
        for dtype in (torch.bfloat16, torch.float64):
            cast = row.step()(vectors, seed=SEED, score=row.score, dtype=dtype)
            assert cast[COUNTER].dtype == torch.int64
            assert all(torch.equal(cast[name], full[name].to(dtype)) for name in [*SHAPES, STATISTICS, TIED[0]])
            assert all(cast[name].dtype == dtype for name in [*SHAPES, STATISTICS, TIED[0]])

    # what never changes a byte

    def test_order_of_the_models_changes_nothing(self, row: Row, models: tuple[State, dict[str, State]]) -> None:
        if row.count == 1:
            pytest.skip("takes one model")
        base, tuned = models
        listed = row.step()(opened(base, tuned), seed=SEED, score=row.score)
        backwards = {name: tuned[name] for name in reversed(tuned)}
        assert list(backwards) != list(tuned)
        assert_same_bytes(row.step()(opened(base, backwards), seed=SEED, score=row.score), listed)

    def test_names_of_the_models_change_rounding_only(self, row: Row, models: tuple[State, dict[str, State]]) -> None:
        if row.random:
            pytest.skip("draws depend on the names of the models")
        if any(isinstance(value, Mapping) for value in row.settings.values()):
            pytest.skip("settings go by the names of the models")
        base, tuned = models
        merged = row.step()(opened(base, tuned), seed=SEED, score=row.score)
        renamed = {new: tuned[old] for new, old in zip("zyx", sorted(tuned), strict=False)}
        other = row.step()(opened(base, renamed), seed=SEED, score=row.score)
        for name in SHAPES:
            bound = 1e-6 * row.tolerance
            torch.testing.assert_close(other[name], merged[name], rtol=bound, atol=bound)

    @pytest.mark.parametrize("blocks", [1, 2])
    def test_chunks_change_nothing(
        self, row: Row, models: tuple[State, dict[str, State]], monkeypatch: pytest.MonkeyPatch, blocks: int
    ) -> None:
        vectors = opened(*models)
        whole = in_chunks(monkeypatch, 8)
        merged = row.step()(vectors, seed=SEED, score=row.score)
        by_tensor = row.step().layout == "tensor"  # then there are no chunks
        assert by_tensor or max(stop for _, stop in whole) == vectors.info("embed.weight").numel
        pieces = in_chunks(monkeypatch, blocks)
        assert_same_bytes(row.step()(vectors, seed=SEED, score=row.score), merged)
        assert by_tensor or (((0, blocks * GRID) in pieces) and ((0, blocks * GRID) not in whole))

    def test_threads_change_nothing(
        self, row: Row, models: tuple[State, dict[str, State]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        in_chunks(monkeypatch, 1)
        steps, chosen = resolve(row.step(), opened(*models), (), SEED, row.score)

        def pieces(workers: int) -> list[tuple[str, int, bytes]]:
            found = Chain(steps, chosen, SEED, threads=workers).run()
            return [(name, start, values.numpy().tobytes()) for name, start, values in found]

        one = pieces(1)
        assert len(one) >= len(SHAPES)
        assert pieces(3) == one

    def test_two_workers_that_share_the_tensors_change_nothing(
        self, row: Row, models: tuple[State, dict[str, State]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the processes of a merge do, in two threads: each measures and merges half of the tensors."""
        in_chunks(monkeypatch, 1)
        steps, chosen = resolve(row.step(), opened(*models), (), SEED, row.score)
        halves = [sorted(chosen.tensor_names)[0::2], sorted(chosen.tensor_names)[1::2]]
        barrier = threading.Barrier(2, timeout=60)
        measured: list[Partial] = [{}, {}]

        def share(number: int) -> list[tuple[str, int, bytes]]:
            def exchange(partial: Partial) -> Partial:
                measured[number] = partial
                barrier.wait()
                total: Partial = {}
                for one in measured:
                    add_partial(total, copy.deepcopy(one))
                barrier.wait()
                return total

            found = Chain(steps, chosen, SEED, threads=1).run(halves[number], halves[number], exchange)
            return [(name, start, values.numpy().tobytes()) for name, start, values in found]

        alone = Chain(steps, chosen, SEED, threads=1).run()
        expected = [(name, start, values.numpy().tobytes()) for name, start, values in alone]
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(2) as pool:
            both = [part for shares in pool.map(share, range(2)) for part in shares]
        torch.set_num_threads(threads)
        assert sorted(both) == sorted(expected)

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_on_a_device_it_is_the_same(self, row: Row, models: tuple[State, dict[str, State]], device: str) -> None:
        """On "cpu" the way through a device is taken, to the same bytes; a GPU agrees to rounding."""
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("there is no GPU here")
        if not row.method.device_ready:
            pytest.skip("computes on the host")
        steps, chosen = resolve(row.step(), opened(*models), (), SEED, row.score)
        host = Chain(steps, chosen, SEED, threads=1).run()
        there = Chain(steps, chosen, SEED, threads=1, device=device).run()
        for (name, start, expected), (at, begin, found) in zip(host, there, strict=True):
            assert (name, start) == (at, begin) and found.device.type == "cpu"
            if device == "cpu":
                assert found.numpy().tobytes() == expected.numpy().tobytes()
            else:
                bound = 1e-6 * row.tolerance
                torch.testing.assert_close(found, expected, rtol=bound, atol=bound)

    def test_interrupted_and_resumed_it_is_the_same_file(
        self, row: Row, models: tuple[State, dict[str, State]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_merge.merging.SECONDS_BETWEEN_REPORTS", -1)
        vectors = opened(*models)
        options: dict[str, Any] = {"seed": SEED, "score": row.score, "threads": 1}
        merge(row.step(), vectors, tmp_path / "straight.safetensors", **options)

        def stop(done: int, total: int) -> None:
            if done > 60:  # the small tensors come first
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge(row.step(), vectors, tmp_path / "resumed.safetensors", on_progress=stop, **options)
        report = merge(row.step(), vectors, tmp_path / "resumed.safetensors", **options)
        assert 0 < report.resumed_tensors < len(vectors.template.tensors)
        written = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("straight", "resumed")]
        assert written[0] == written[1]

    # identities

    def test_copies_of_one_model_merge_into_it(self, row: Row) -> None:
        if row.copies is None:
            pytest.skip("no such setting")
        base, (tuned, *_) = (lambda pair: (pair[0], list(pair[1].values())))(grid_models(seed=5))
        copies = dict.fromkeys("abc"[: row.count], tuned)
        merged = row.method(**row.copies)(opened(base, copies), seed=SEED, score=row.score)
        bounds = {"rtol": 2e-7 * row.tolerance, "atol": 1e-7 * (row.tolerance - 1)}
        tolerance = {"rtol": 0.0, "atol": 0.0} if row.copies_exact else bounds
        for name in SHAPES:
            torch.testing.assert_close(merged[name], tuned[name], **tolerance)

    def test_one_model_alone_is_returned_bit_for_bit(self, row: Row) -> None:
        if row.alone is None:
            pytest.skip("no such setting")
        base, models = rough_models()
        (tuned,) = models.values()
        rounded = base["embed.weight"] + (tuned["embed.weight"] - base["embed.weight"])
        assert (rounded != tuned["embed.weight"]).any(), "the example must round"
        assert_same_bytes(run(row.method(**row.alone), opened(base, models), score=row.score), tuned)

    def test_the_base_is_returned_bit_for_bit(self, row: Row) -> None:
        if row.to_base is None:
            pytest.skip("no such setting")
        base, models = rough_models(row.count)
        assert_same_bytes(run(row.method(**row.to_base), opened(base, models), score=row.score), base)

    def test_neutral_settings_leave_the_merge_bit_for_bit(self, row: Row) -> None:
        if row.neutral is None:
            pytest.skip("no such setting")
        vectors = opened(*rough_models(row.count))
        neutral = [row.method(**row.neutral)]
        for method in (SimpleAverage(), WiseFT(alpha=0.4), TaskArithmetic(), Ties(scale=0.7), Ties(scope="tensor")):
            assert_same_bytes(method(vectors, transforms=neutral, seed=SEED), method(vectors, seed=SEED))

    # what is not merged

    def test_buffers_and_tied_weights(self, row: Row, models: tuple[State, dict[str, State]]) -> None:
        base, tuned = models
        merged = row.step()(opened(base, tuned, batch_norm="base"), seed=SEED, score=row.score)
        assert set(merged) == set(base)
        assert torch.equal(merged[COUNTER], base[COUNTER]) and merged[COUNTER].dtype == torch.int64
        assert torch.equal(merged[STATISTICS], base[STATISTICS])
        owned, copy = (merged[name] for name in TIED)
        assert owned.data_ptr() == copy.data_ptr(), "tied weights came apart"
        owners = {value.data_ptr() for state in (base, *tuned.values()) for value in state.values() if value.numel()}
        assert not owners & {value.data_ptr() for value in merged.values() if value.numel()}, (
            "shares memory with a model"
        )

    def test_ignored_tensors_stay_as_the_base_has_them(self, row: Row, models: tuple[State, dict[str, State]]) -> None:
        base, tuned = models
        if row.score is not None:
            tuned = {
                name: {**state, "block.0.weight": state["block.0.weight"].clone()} for name, state in tuned.items()
            }
        merged = row.step()(opened(base, tuned, ignore=[r"^block\.2\."]), seed=SEED, score=row.score)
        assert torch.equal(merged["block.2.weight"], base["block.2.weight"])

    # surface

    def test_is_frozen(self, row: Row) -> None:
        step = row.step()
        assert step == row.step() and repr(step).startswith(row.method.__name__ + "(")
        with pytest.raises(dataclasses.FrozenInstanceError):
            step.density = 0.5  # type: ignore[attr-defined]

    def test_declares_its_paper_and_explains_itself(self, row: Row) -> None:
        paper = row.method.paper
        assert (
            re.search(r"\(.*20\d\d\).*arXiv \d{4}\.\d{5}", paper)
            or paper.startswith("no paper; ")
            or (
                re.search(r"\(.*[12]\d\d\d\), .*\d", paper)  # older than arXiv: authors, year, journal or proceedings
            )
        )
        text = inspect.getdoc(row.method) or ""
        assert text.split("\n")[0].endswith(".")
        assert "Reference:" in text and "Cost:" in text
        for spec in dataclasses.fields(row.method):
            assert "Args:" in text and f"\n    {spec.name}: " in text, f"{spec.name} is not explained"
        if any(issubclass(kind, Transform) for kind in row.method.__mro__) and row.method is not Transform:
            assert row.neutral is not None, "a transform has settings that change nothing: name them in its row"

    def test_refuses_settings_out_of_range(self, row: Row) -> None:
        for spec in dataclasses.fields(row.method):
            allowed = spec.metadata.get("allowed")
            if not allowed:
                continue
            low, high = (float(bound) for bound in re.findall(r"-?[\d.]+", allowed))
            outside: list[Any] = [low - 1, high + 1, float("nan"), float("inf"), "0.5", None, True]
            outside += [low] if allowed.startswith("(") else []
            outside += [high] if allowed.endswith(")") else []
            for value in outside:
                with pytest.raises(
                    UserError, match=re.escape(f"{row.method.__name__}: {spec.name} must be in {allowed}")
                ):
                    row.method(**{**row.settings, spec.name: value})

    def test_refuses_choices_that_do_not_exist(self, row: Row) -> None:
        hints = get_type_hints(row.method)
        for spec in dataclasses.fields(row.method):
            if get_origin(hints[spec.name]) is Literal:
                choices = ", ".join(get_args(hints[spec.name]))
                with pytest.raises(
                    UserError, match=re.escape(f"{spec.name} must be one of {choices}, got 'everywhere'")
                ):
                    row.method(**{**row.settings, spec.name: "everywhere"})

    def test_needs_a_base_or_does_without(self, row: Row, models: tuple[State, dict[str, State]]) -> None:
        vectors = opened(None, models[1])
        if row.method.needs_base:
            with pytest.raises(UserError, match=f"{row.method.__name__} needs a base model"):
                row.step()(vectors, score=row.score)
        elif row.base_changes:
            assert set(SHAPES) <= set(row.step()(vectors, score=row.score))
        else:
            merged = row.step()(vectors, score=row.score)
            assert_same_bytes(
                {name: merged[name] for name in SHAPES},
                {name: value for name, value in row.step()(opened(*models), score=row.score).items() if name in SHAPES},
            )
