"""λ-gradients of live merges equal autograd through ``functional_call``, however the backward pass is run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from merged_models import KINDS, Case, autograd_gradient, contracted_gradient, error, make_case

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(params=sorted(KINDS))
def case(request: pytest.FixtureRequest, folders: Path) -> Case:
    return make_case(request.param, folders / request.param)


def test_gradient_is_that_of_autograd(case: Case) -> None:
    merged = case.merged()
    expected = autograd_gradient(case, merged, merged.scalars(), batches=case.batches[:1])
    assert expected.count_nonzero() > expected.numel() / 2
    assert error(contracted_gradient(case, merged, batches=case.batches[:1]), expected) < TOLERANCE


@pytest.mark.parametrize("keep", [False, True], ids=["contracted_each_time", "contracted_once"])
def test_gradients_of_several_batches_add_up(case: Case, keep: bool) -> None:
    merged = case.merged()
    merged.keep_gradients = keep
    expected = autograd_gradient(case, merged, merged.scalars())
    assert error(contracted_gradient(case, merged), expected) < TOLERANCE


def test_last_of_several_backward_passes_contracts_them_all(case: Case) -> None:
    merged = case.merged()
    expected = autograd_gradient(case, merged, merged.scalars())
    merged.attach()
    for place, batch in enumerate(case.batches):
        merged.keep_gradients = place == 0
        case.loss(case.module, batch).backward()
    # A parameter that the last pass used holds no gradient any more; the hook has contracted it.
    assert all(parameter.grad is None for parameter in merged.parameters.values())
    assert error(merged.gradient(), expected) < TOLERANCE


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "checkpointed_reentrant"])
def test_gradient_checkpointing(case: Case, reentrant: bool) -> None:
    """The reference runs without checkpointing: substituted weights are gone when activations are computed again."""
    merged = case.merged()
    expected = autograd_gradient(case, merged, merged.scalars())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name is deprecated in transformers 5
        case.module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    case.module.train()  # without dropout the same numbers; checkpointing is off in eval
    calls: list[int] = []
    norm = next(m for n, m in case.module.named_modules() if re.search(r"\.0\.(.*norm|ln_1)", n, re.IGNORECASE))
    norm.register_forward_hook(lambda *_: calls.append(1))
    assert error(contracted_gradient(case, merged), expected) < TOLERANCE
    assert len(calls) == 2 * len(case.batches)  # computed again in the backward pass


def test_bf16_autocast(case: Case) -> None:
    """Looser: W reaches the products as bf16, with 8 bits, in both; ours rounds ∂L/∂W once more than autograd does.

    Autocast hands ∂L/∂W of each use on in bf16, relative error 2⁻⁹ an entry, and the inner product averages it.
    """

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    merged = case.merged()
    exact = autograd_gradient(case, merged, merged.scalars())
    reference = autograd_gradient(case, merged, merged.scalars(), autocast)
    found = contracted_gradient(case, merged, context=autocast)
    assert error(found, reference) < 2e-2
    # No further from the truth than autograd is in bf16.
    assert error(found, exact) < 1.5 * error(reference, exact) + 1e-3


@pytest.mark.slow
def test_compiled(case: Case) -> None:
    merged = case.merged()
    expected = autograd_gradient(case, merged, merged.scalars())
    torch._dynamo.reset()
    compiled = torch.compile(case.module, backend="aot_eager")
    assert error(contracted_gradient(case, merged, compiled), expected) < TOLERANCE
    # New weights reach the compiled code.
    with torch.no_grad():
        merged.scalars.raw.add_(0.2)  # type: ignore[attr-defined]
    merged.materialise()
    expected = autograd_gradient(case, merged, merged.scalars())
    assert error(contracted_gradient(case, merged, compiled), expected) < TOLERANCE
