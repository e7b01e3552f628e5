"""What a live merge holds, writes, keeps and gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merged_models import (
    MODELS,
    Case,
    autograd_gradient,
    contracted_gradient,
    entropy_of_logits,
    error,
    make_case,
    network,
    nudge,
    plain_case,
    rows,
    same,
    state,
    stored,
    with_scalars,
)
from torch import Tensor, nn

from lightning_merge import TaskVectors, merge
from lightning_merge.coefficients import Coefficients
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.methods import Breadcrumbs, Dare, LwPTV, TaskArithmetic
from lightning_merge.rank_masks import RankMasks
from lightning_merge.weights import save_safetensors


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return plain_case(tmp_path, network(), [rows(1), rows(2)], entropy_of_logits)


@pytest.fixture
def vit(tmp_path: Path) -> Case:
    return make_case("vit", tmp_path)


# --- what is written ----------------------------------------------------------------------------------------------


def test_zero_is_the_base_and_one_hot_is_that_model(case: Case) -> None:
    merged = case.merged(initial=0.0)
    base, weights = stored(case.base), state(case.module)
    for name in merged.task_vectors.tensor_names:
        assert torch.equal(weights[name], base[name]), name
    for place, model in enumerate(MODELS):
        merged.materialise(torch.eye(3)[place].repeat(len(merged.task_vectors.tensor_names)))
        weights, finetuned = state(case.module), stored(case.models[model])
        for name in merged.task_vectors.tensor_names:
            torch.testing.assert_close(weights[name], finetuned[name], rtol=1e-6, atol=1e-7)


def test_the_file_engine_writes_the_same_merge(vit: Case, tmp_path: Path) -> None:
    merged = vit.merged()
    method = TaskArithmetic(scale=merged.scalars.schedule())  # type: ignore[attr-defined]
    merge(method, merged.task_vectors, tmp_path / "written")
    written = type(vit.module).from_pretrained(tmp_path / "written").state_dict()
    live = vit.module.state_dict()
    assert live.keys() == written.keys()
    for name, value in written.items():
        torch.testing.assert_close(live[name], value, rtol=1e-6, atol=1e-7)


def test_order_of_listing_the_models_changes_nothing(case: Case) -> None:
    case.merged(initial={"cars": 0.1, "mnist": 0.5, "sun": 0.9})
    weights = state(case.module)
    case.models = dict(reversed(case.models.items()))
    case.merged(initial={"sun": 0.9, "cars": 0.1, "mnist": 0.5})
    assert same(state(case.module), weights)


def test_coefficients_in_another_order_are_refused(case: Case) -> None:
    task_vectors = case.task_vectors()
    scalars = Coefficients(tuple(reversed(task_vectors.names)), task_vectors.tensor_names)
    with pytest.raises(UserError, match="sun, mnist, cars"):
        MergedWeights(case.module, task_vectors, scalars)


def test_coefficients_of_other_tensors_are_refused(case: Case) -> None:
    task_vectors = case.task_vectors()
    with pytest.raises(UserError, match=r"none for the tensor 'first\.bias'"):
        MergedWeights(case.module, task_vectors, Coefficients(task_vectors.names, ["out.weight"]))


@pytest.mark.parametrize("transforms", [[LwPTV(eta=0.5)], [Breadcrumbs()], [LwPTV(eta=0.4), Dare(drop_rate=0.5)]])
def test_transformed_task_vectors(case: Case, transforms: list[Any]) -> None:
    merged = case.merged(transforms=transforms, seed=3)
    method = TaskArithmetic(scale=merged.scalars.schedule())  # type: ignore[attr-defined]
    expected = method(case.task_vectors(), transforms=transforms, seed=3)
    for name, parameter in merged.parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-6)
    untransformed = TaskArithmetic(scale=merged.scalars.schedule())(case.task_vectors())  # type: ignore[attr-defined]
    assert not torch.allclose(expected["out.weight"], untransformed["out.weight"])


def test_a_layer_pruned_for_all_models_is_the_base_and_takes_no_gradient(case: Case) -> None:
    merged = case.merged(transforms=[LwPTV(eta=1.0)])
    assert set(merged.unchanged) == set(merged.parameters)
    assert merged.nbytes == {"task_vectors": 0, "base": 0}
    merged.attach()
    assert not any(parameter.requires_grad for parameter in merged.parameters.values())
    with merged.individual("sun"):  # the model is what it is, whatever was pruned
        assert torch.equal(case.module.out.weight, stored(case.models["sun"])["out.weight"])
    assert torch.equal(case.module.out.weight, stored(case.base)["out.weight"])


def test_parameters_keep_their_dtype(case: Case) -> None:
    case.module.bfloat16()
    case.merged()
    fp32 = network()
    case.merged(fp32)
    for mine, exact in zip(case.module.parameters(), fp32.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, exact.bfloat16())  # rounded once


def test_statistics_of_batch_norm_are_averaged_and_counters_left(case: Case) -> None:
    moved = [nudge(network(), seed) for seed in range(3)]
    for seed, (module, path) in enumerate(zip(moved, case.models.values(), strict=True)):
        module.norm.running_mean.fill_(seed)
        save_safetensors(state(module), path)
    case.merged()
    assert torch.equal(case.module.norm.running_mean, torch.ones(12))
    merged = MergedWeights(case.module, *with_scalars(case.task_vectors(batch_norm="base")))
    assert torch.equal(case.module.norm.running_mean, stored(case.base)["norm.running_mean"])
    with merged.individual("sun"):
        assert torch.equal(case.module.norm.running_mean, torch.full((12,), 2.0))
    assert torch.equal(case.module.norm.running_mean, stored(case.base)["norm.running_mean"])


# --- where it is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("storage", ["device", "host", "files"])
def test_storage_changes_no_number(vit: Case, storage: Any, keep_base: bool) -> None:
    reference = vit.merged()
    weights, gradient = state(vit.module), contracted_gradient(vit, reference)
    merged = vit.merged(storage=storage, keep_base=keep_base)
    assert same(state(vit.module), weights)
    torch.testing.assert_close(contracted_gradient(vit, merged), gradient, rtol=1e-12, atol=0)
    entries = sum(parameter.numel() for parameter in merged.parameters.values())
    assert merged.nbytes == {
        "task_vectors": 0 if storage == "files" else 4 * 3 * entries,
        "base": 4 * entries if keep_base else 0,
    }


@pytest.mark.parametrize("storage", ["device", "host"])
def test_bf16_halves_the_bytes_and_hardly_changes_the_gradient(vit: Case, storage: Any) -> None:
    exact = vit.merged()
    expected = autograd_gradient(vit, exact, exact.scalars())
    merged = vit.merged(storage=storage, dtype="bfloat16")
    assert 2 * merged.nbytes["task_vectors"] == exact.nbytes["task_vectors"]
    assert 1e-6 < error(contracted_gradient(vit, merged), expected) < 0.01


def test_bytes_are_linear_in_the_number_of_models(case: Case) -> None:
    found = []
    for count in (1, 2, 3):
        names = list(case.models)[:count]
        task_vectors = TaskVectors.open(case.base, {name: case.models[name] for name in names})
        merged = MergedWeights(network(), *with_scalars(task_vectors))
        found.append((merged.nbytes["task_vectors"], merged.nbytes["base"]))
    entries = sum(parameter.numel() for parameter in case.module.parameters())  # what is tied counts once
    assert found == [(4 * entries * count, 4 * entries) for count in (1, 2, 3)]


def test_a_base_stored_in_half_the_bytes_is_kept_so(case: Case) -> None:
    half = {n: v.bfloat16() if v.is_floating_point() else v for n, v in stored(case.base).items()}
    save_safetensors(half, case.base)
    for path in case.models.values():
        save_safetensors({n: v.bfloat16() if v.is_floating_point() else v for n, v in stored(path).items()}, path)
    merged = case.merged(initial=0.0)
    assert 2 * merged.nbytes["base"] == 4 * sum(parameter.numel() for parameter in case.module.parameters())
    assert torch.equal(case.module.out.weight, half["out.weight"].float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "disk"}, "Unknown storage 'disk'"),
        ({"dtype": "float16"}, "Unknown dtype of task vectors 'float16'"),
        ({"storage": "files", "transforms": [LwPTV()]}, "'device' or 'host'"),
    ],
)
def test_settings_that_cannot_be(case: Case, options: dict[str, Any], message: str) -> None:
    before = state(case.module)
    with pytest.raises(UserError, match=message):
        case.merged(**options)
    assert same(state(case.module), before)


def test_a_base_is_needed(case: Case) -> None:
    task_vectors = TaskVectors.open(None, case.models)
    with pytest.raises(UserError, match="move from a base"):
        MergedWeights(case.module, *with_scalars(task_vectors))


# --- tied, frozen, unused, unchanged ------------------------------------------------------------------------------


def test_tied_weights_stay_tied_and_are_merged_once(tmp_path: Path) -> None:
    case = make_case("gpt2", tmp_path)
    merged = case.merged()
    assert case.module.lm_head.weight is case.module.transformer.wte.weight
    assert len(merged.parameters) == len(list(case.module.parameters()))
    merged.attach()
    assert case.module.lm_head.weight is case.module.transformer.wte.weight


def test_tied_weights_stored_twice_share_their_coefficient(case: Case) -> None:
    """Files that hold both names must be written tied again: the second name has no gradient of its own."""
    scalars = case.merged().scalars
    names = {"first.weight", "second.weight"}
    assert names <= set(scalars.tensor_names)
    rules = scalars.schedule()  # type: ignore[attr-defined]
    method = TaskArithmetic(scale=rules)
    written = method(case.task_vectors())
    assert torch.equal(written["first.weight"], written["second.weight"])
    torch.testing.assert_close(case.module.second.weight.detach(), written["second.weight"], rtol=1e-6, atol=1e-7)


def test_tied_weights_that_differ_in_a_model_are_refused(case: Case) -> None:
    values, before = stored(case.models["sun"]), state(case.module)
    values["second.weight"] = values["second.weight"] + 1
    save_safetensors(values, case.models["sun"])
    with pytest.raises(UserError, match=r"'first\.weight' and 'second\.weight' are one tied .* differ in 'sun'"):
        case.merged()
    assert same(state(case.module), before)


def test_flags_and_gradients_are_given_back(case: Case) -> None:
    case.module.out.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in case.module.named_parameters()}
    merged = case.merged()
    contracted = contracted_gradient(case, merged)
    assert {name: parameter.requires_grad for name, parameter in case.module.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in case.module.parameters())
    # A frozen parameter is merged and learned from all the same.
    assert contracted[merged.scalars.span("out.weight")].count_nonzero() == 3
    # Without hooks the module trains as before.
    entropy_of_logits(case.module, case.batches[0]).backward()
    assert case.module.first.weight.grad is not None


def test_what_is_not_in_the_task_vectors_is_left_alone(case: Case) -> None:
    head = case.module.out.weight.detach().clone()
    task_vectors = case.task_vectors(ignore=[r"^out\."])
    scalars = Coefficients(task_vectors.names, task_vectors.tensor_names)
    merged = MergedWeights(case.module, task_vectors, scalars)
    merged.attach()
    entropy_of_logits(case.module, case.batches[0]).backward()
    assert case.module.out.weight.grad is not None  # the user's own to train
    with merged.individual("cars"):
        assert torch.equal(case.module.out.weight, head)
    assert torch.equal(case.module.out.weight, head)


def test_coefficients_of_unused_parameters_stay_at_their_start(tmp_path: Path) -> None:
    case = make_case("clip", tmp_path)
    merged = case.merged()
    scalars = merged.scalars
    start = scalars.raw.detach().clone()  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam([scalars.raw], lr=1e-2)  # type: ignore[attr-defined]
    merged.attach()
    for batch in case.batches:
        optimizer.zero_grad()
        case.module.vision_model(batch["pixel_values"]).pooler_output.square().mean().backward()
        merged.backward()
        optimizer.step()
        merged.materialise()
    moved = (scalars.raw.detach() != start).any(dim=0)  # type: ignore[attr-defined]
    used = torch.tensor([name.startswith("vision_model") for name in scalars.tensor_names])
    assert not moved[~used].any()
    # Keys' biases shift all scores of a query alike, which the softmax forgets: their gradients are rounding.
    assert moved[used].float().mean() > 0.9


def test_tensors_that_no_model_changed_hold_nothing(case: Case) -> None:
    base = stored(case.base)
    for path in case.models.values():
        save_safetensors({**stored(path), "out.weight": base["out.weight"]}, path)
    merged = case.merged()
    entries = sum(parameter.numel() for parameter in case.module.parameters()) - 48
    assert merged.unchanged == ["out.weight"]
    assert merged.nbytes == {"task_vectors": 12 * entries, "base": 4 * entries}
    merged.attach()
    assert not case.module.out.weight.requires_grad
    entropy_of_logits(case.module, case.batches[0]).backward()
    assert not merged.gradient()[merged.scalars.span("out.weight")].any()
    merged.detach()
    assert case.module.out.weight.requires_grad


def test_float_buffers_are_the_base_s_unless_a_model_changed_them(tmp_path: Path) -> None:
    module = network()
    module.register_buffer("scale", torch.ones(12))
    case = plain_case(tmp_path, module, [rows(1)], entropy_of_logits)
    module.scale.fill_(5.0)
    case.merged()
    assert torch.equal(module.scale, torch.ones(12))
    save_safetensors({**stored(case.models["sun"]), "scale": torch.zeros(12)}, case.models["sun"])
    with pytest.raises(UserError, match=r"'scale' is a buffer .* 'sun' .* ignore=\['scale'\]"):
        case.merged()


def test_sparse_gradients(tmp_path: Path) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 5, sparse=True), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Any:
            return type("Answer", (), {"logits": self.out(self.words(x).mean(1))})

    torch.manual_seed(0)
    batch = {"x": torch.tensor([[0, 3, 3], [1, 8, 0]])}
    case = plain_case(tmp_path, Bag(), [batch, batch], entropy_of_logits)
    merged = case.merged()
    found = contracted_gradient(case, merged)
    case.module.words.sparse = False  # the reference's substituted weights are no leaves
    assert error(found, autograd_gradient(case, merged, merged.scalars())) < 1e-5


def test_what_is_refused_late_has_not_touched_the_module(tmp_path: Path) -> None:
    """One of the last tensors holds NaN; those before it, and buffers, have been read by then."""
    module = network()
    module.register_buffer("scale", torch.ones(12))
    case = plain_case(tmp_path, module, [rows(1)], entropy_of_logits)
    broken = stored(case.models["sun"])
    save_safetensors({**broken, "out.weight": torch.full_like(broken["out.weight"], float("nan"))}, case.models["sun"])
    task_vectors = TaskVectors.open(case.base, case.models, check=False)
    for tensor in module.state_dict().values():
        tensor.add_(1)
    before = state(module)
    with pytest.raises(UserError, match=r"'out\.weight'.*NaN"):
        MergedWeights(module, task_vectors, RankMasks.of(task_vectors))
    assert same(state(module), before)
