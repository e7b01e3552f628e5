"""The same primitives by peft (``peft.utils.merge_utils``), which work on task tensors without a base.

Below that, merges of whole adapters beside peft's ``add_weighted_adapter``.

Where we differ on purpose: peft trims per tensor (the paper over the whole model, our default), breaks zero sums
towards + (the authors' code: towards the majority), and draws DARE's masks from the global generator.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_merge import TaskVectors
from lightning_merge.adapters import merge_adapters
from lightning_merge.errors import UserError
from lightning_merge.methods import Breadcrumbs, Dare, MergeMethod, SimpleAverage, TaskArithmetic, Ties
from lightning_merge.methods.dare import drop_and_rescale
from lightning_merge.methods.task_arithmetic import combine
from lightning_merge.methods.ties import disjoint_merge, elect_sign
from lightning_merge.methods.top_k import LargestEntries, magnitude_bits
from lightning_merge.weights.adapters import open_adapter

merge_utils = pytest.importorskip("peft.utils.merge_utils")

SHAPES = [(50, 20), (999,), (4, 5, 6)]


def draw(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> list[Tensor]:
    """Task tensors without two equal magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def opened(taus: list[Tensor]) -> TaskVectors:
    """Over a base of zeros, so that what is merged is the task tensors themselves."""
    models = {str(number): {"w": tau} for number, tau in enumerate(taus)}
    return TaskVectors.open(base={"w": torch.zeros_like(taus[0])}, models=models, check=False)


def merged(method: MergeMethod, taus: list[Tensor]) -> Tensor:
    return method(opened(taus))["w"]


@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic(shape: tuple[int, ...]) -> None:
    taus, weights = draw(shape), [0.3, -0.2, 1.0]
    expected = merge_utils.task_arithmetic(taus, torch.tensor(weights))
    torch.testing.assert_close(combine(torch.stack(taus), weights), expected, rtol=0, atol=1e-6)
    by_name = {str(number): weight for number, weight in enumerate(weights)}
    torch.testing.assert_close(merged(TaskArithmetic(scale=by_name), taus), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.93])
def test_magnitude_pruning(shape: tuple[int, ...], density: float) -> None:
    (tau,) = draw(shape, 1)
    expected = merge_utils.magnitude_based_pruning(tau, density)
    vectors = opened([tau])
    largest = LargestEntries(
        tensors={"w": vectors.info("w")}, ranks=lambda count: [int(density * count)], group=lambda name: ""
    )
    view = vectors.view("w")
    while not largest.complete:
        largest = largest.conclude(
            largest.measure(
                view,
            )
        )
    found = torch.where(largest.mask(view, magnitude_bits(view.deltas)), view.deltas, 0.0).reshape(shape)
    assert torch.equal(found, expected)
    crumbs = TaskArithmetic(scale=1.0)(vectors, transforms=[Breadcrumbs(density=density, gamma=0.0)])["w"]
    assert torch.equal(crumbs, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties(shape: tuple[int, ...], density: float) -> None:
    taus = draw(shape)
    expected = merge_utils.ties(taus, torch.ones(3), density)
    torch.testing.assert_close(merged(Ties(density=density, scope="tensor"), taus), expected, rtol=0, atol=1e-6)


def test_sign_election_and_disjoint_merge() -> None:
    stacked = torch.stack(draw((7, 30)))
    mask = merge_utils.calculate_majority_sign_mask(stacked, method="total")
    sign = elect_sign(stacked)
    assert torch.equal(stacked.sign() == sign, mask)
    expected = merge_utils.disjoint_merge(stacked, mask)
    torch.testing.assert_close(disjoint_merge(stacked, sign, "mean"), expected, rtol=0, atol=1e-6)


def test_zero_sums_take_the_majority_here_and_plus_there() -> None:
    taus = [torch.tensor([0.5, -1.0, -2.0]), torch.tensor([-0.5, 0.0, 0.0])]
    assert merged(Ties(density=1), taus).tolist() == [-0.5, -1.0, -2.0]
    stacked = torch.stack(taus)
    theirs = merge_utils.disjoint_merge(stacked, merge_utils.calculate_majority_sign_mask(stacked))
    assert theirs.tolist() == [0.5, -1.0, -2.0]


def test_dare() -> None:
    """Given the mask that peft drew, dropping and rescaling is the same."""
    (tau,) = draw((60, 40), 1)
    torch.manual_seed(0)
    theirs = merge_utils.random_pruning(tau, density=0.3, rescale=True)
    torch.testing.assert_close(drop_and_rescale(tau, theirs != 0, 0.7), theirs, rtol=1e-6, atol=0)
    torch.manual_seed(0)
    assert torch.equal(drop_and_rescale(tau, theirs != 0, 0.0), merge_utils.random_pruning(tau, 0.3, rescale=False))


# --- whole adapters -----------------------------------------------------------------------------------------------

LAYERS = ("0", "2")


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))


def make_adapters(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Save an adapter with random factors for each config, over the same network."""
    import peft

    made = {}
    for seed, (name, options) in enumerate(configs.items()):
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": list(LAYERS), **options})
        model = peft.get_peft_model(network(), config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                around = parameter.data if "magnitude" in key else 0
                parameter.data = around + torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
        made[name] = folder / name
    return made


def load_adapters(adapters: Mapping[str, Path]) -> Any:
    import peft

    first, *others = adapters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(network(), adapters[first], adapter_name=first)
        for name in others:
            model.load_adapter(adapters[name], adapter_name=name)
    return model


def updates(model: Any, name: str) -> dict[str, Tensor]:
    """ΔW of each layer, as peft has it."""
    layers = model.base_model.model
    return {layer: layers[int(layer)].get_delta_weight(name).detach() for layer in LAYERS}


def theirs(adapters: Mapping[str, Path], weights: Sequence[float], kind: str, **options: Any) -> dict[str, Tensor]:
    model = load_adapters(adapters)
    model.add_weighted_adapter(list(adapters), list(weights), "merged", combination_type=kind, **options)
    return updates(model, "merged")


def ours(adapters: Mapping[str, Path], folder: Path, *arguments: Any, **options: Any) -> dict[str, Tensor]:
    """ΔW of our merged adapter, as peft loads it."""
    merge_adapters(network(), adapters, folder, *arguments, **options)
    return updates(load_adapters({"merged": folder}), "merged")


def mean_update(adapters: Mapping[str, Path]) -> dict[str, Tensor]:
    model = load_adapters(adapters)
    parts = [updates(model, name) for name in adapters]
    return {layer: sum(part[layer] for part in parts) / len(parts) for layer in LAYERS}


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Relative error over all layers."""
    lost = sum((found[layer] - expected[layer]).square().sum() for layer in LAYERS)
    return float(lost / sum(expected[layer].square().sum() for layer in LAYERS)) ** 0.5


def test_linear_adds_factors_there_and_updates_here(tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path, {"a": {}, "b": {}})
    mean = mean_update(adapters)
    assert distance(theirs(adapters, [0.5, 0.5], "linear"), mean) > 0.5
    assert distance(theirs(adapters, [0.5, 0.5], "cat"), mean) < 1e-6
    assert distance(ours(adapters, tmp_path / "ours"), mean) < 1e-6


def test_their_svd_of_the_update_is_ours(tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path, {"a": {}, "b": {}})
    found = ours(adapters, tmp_path / "ours", SimpleAverage(), rank=3)
    assert distance(theirs(adapters, [0.5, 0.5], "svd", svd_rank=3), found) < 1e-5


def test_adapters_of_other_ranks_are_refused_there_and_exact_here(tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path, {"a": {}, "b": {"r": 8}})
    with pytest.raises(ValueError, match="same r value"):
        theirs(adapters, [0.5, 0.5], "linear")
    assert distance(ours(adapters, tmp_path / "ours"), mean_update(adapters)) < 1e-6


def test_rank_stabilised_adapters_grow_there_and_keep_their_size_here(tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path, {"a": {"use_rslora": True}, "b": {"use_rslora": True}})
    mean = mean_update(adapters)
    grown = theirs(adapters, [0.5, 0.5], "cat")
    assert distance(grown, {layer: 8**0.5 * update for layer, update in mean.items()}) < 1e-6  # 2.83 times too large
    assert distance(ours(adapters, tmp_path / "ours"), mean) < 1e-6


def test_magnitudes_of_dora_are_ignored_there_and_refused_or_merged_here(tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path, {"a": {"use_dora": True}, "b": {"use_dora": True}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = theirs(adapters, [0.5, 0.5], "cat")
    for path in adapters.values():
        held = load_file(path / "adapter_model.safetensors")
        save_file({k: v * (3 if "magnitude" in k else 1) for k, v in held.items()}, path / "adapter_model.safetensors")
    assert distance(theirs(adapters, [0.5, 0.5], "cat"), before) == 0  # three times the magnitudes, and no change
    with pytest.raises(UserError, match="'a' is a DoRA"):
        merge_adapters(network(), adapters, tmp_path / "ours")
    base = network().state_dict()
    models = [load_adapters({name: path}).merge_and_unload() for name, path in adapters.items()]
    expected = {
        layer: sum(model[int(layer)].weight.detach() - base[f"{layer}.weight"] for model in models) / 2
        for layer in LAYERS
    }
    assert distance(ours(adapters, tmp_path / "full", SimpleAverage(), rank=99), expected) < 1e-5


def test_a_missing_weight_drops_an_adapter_there_and_is_an_error_here(tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path, {"a": {}, "b": {}})
    only_first = updates(load_adapters(adapters), "a")
    assert distance(theirs(adapters, [1.0], "cat"), only_first) < 1e-6
    with pytest.raises(UserError, match="no value for the model 'b'"):
        merge_adapters(network(), adapters, tmp_path / "ours", TaskArithmetic(scale={"a": 1.0}))


def test_a_name_that_exists_merges_nothing_there_and_is_an_error_here(tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path, {"a": {}, "b": {}})
    model = load_adapters(adapters)
    before = updates(model, "b")
    assert model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "b", combination_type="cat") is None
    assert distance(updates(model, "b"), before) == 0
    merge_adapters(network(), adapters, tmp_path / "ours")
    with pytest.raises(UserError, match="already holds an adapter"):
        merge_adapters(network(), adapters, tmp_path / "ours", TaskArithmetic())


def test_dare_draws_from_the_global_generator_there_and_by_its_seed_here(tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path, {"a": {}, "b": {}})

    def draw_theirs(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return theirs(adapters, [0.5, 0.5], "dare_linear_svd", svd_rank=12, density=0.5)

    def draw_ours(seed: int, name: str) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return ours(adapters, tmp_path / name, TaskArithmetic(scale=0.5), [Dare(drop_rate=0.5)], rank=12, seed=3)

    assert distance(draw_theirs(0), draw_theirs(1)) > 0.1
    assert distance(draw_ours(0, "one"), draw_ours(1, "two")) == 0
    assert distance(draw_ours(0, "three"), mean_update(adapters)) > 0.1


def test_a_tied_embedding_is_updated_twice_there_and_once_here(tmp_path: Path) -> None:
    """With ensure_weight_tying one update is shared; peft merges it into the one weight from both ends."""
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    plain = GPT2LMHeadModel(config).eval()
    plain.save_pretrained(tmp_path / "base")
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["wte", "lm_head"], "ensure_weight_tying": True}
    model = peft.get_peft_model(plain, peft.LoraConfig(**options)).eval()
    embedding, output = model.base_model.model.transformer.wte, model.base_model.model.lm_head
    generator = torch.Generator().manual_seed(0)
    embedding.lora_embedding_A["default"].data.normal_(generator=generator)
    embedding.lora_embedding_B["default"].data.normal_(generator=generator)
    output.lora_A["default"].weight.data = embedding.lora_embedding_B["default"].data.T
    output.lora_B["default"].weight.data = embedding.lora_embedding_A["default"].data.T
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(8)[None]
    live = model(tokens).logits.detach()
    assert (model.merge_and_unload()(tokens).logits - live).abs().max() > 0.1
    source = open_adapter(tmp_path / "adapter", tmp_path / "base")
    full = GPT2LMHeadModel(config).eval()
    full.load_state_dict({name: source.read(name) for name in source.tensors}, strict=False)
    torch.testing.assert_close(full(tokens).logits.detach(), live, rtol=1e-4, atol=1e-5)
