"""Which parameter of a live module is which tensor of the files: names, prefixes, wrappers, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_models import KINDS, bert, vit
from torch import Tensor, nn

from lightning_merge.correspondence import parameter_names
from lightning_merge.errors import UserError
from lightning_merge.weights import open_weights


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in open_weights(path).tensors.items()}


def pairs_alike(module: nn.Module, path: Path, prefix: str | None = None) -> dict[str, str]:
    """Find the names, and check each pair by its values: all tensors are random and so differ."""
    source = open_weights(path)
    names = parameter_names(module, shapes(path), prefix)
    live = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    assert names.keys() == source.tensors.keys()
    for name, target in names.items():
        assert torch.equal(live[target], source.read(name)), (name, target)
    return names


@pytest.fixture(params=sorted(KINDS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    module = KINDS[request.param][0]()
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(place))
    return module


class Users(nn.Module):
    """What a user builds around a pretrained model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.model(x).logits)


def test_files_of_transformers(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.config)
    pairs_alike(model, tmp_path)
    assert model.config.to_dict() == config.to_dict()  # asking for names leaves no trace


def test_model_in_an_attribute_of_the_users_module(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    names = pairs_alike(Users(model), tmp_path)
    assert all(name.startswith("model.") for name in names.values())
    assert pairs_alike(Users(model), tmp_path, "model.") == names


def test_files_of_the_base_model_in_a_module_with_a_head(tmp_path: Path) -> None:
    """AutoModel and AutoModelFor... name the same tensors with and without a prefix."""
    whole = bert()
    whole.bert.save_pretrained(tmp_path / "inner")
    names = pairs_alike(Users(whole), tmp_path / "inner")
    assert all(name.startswith("model.bert.") for name in names.values())


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_modules(tmp_path: Path, inside: bool) -> None:
    model = vit()
    model.save_pretrained(tmp_path)
    compiled = torch.compile(model, backend="eager")
    pairs_alike(Users(compiled) if inside else torch.compile(Users(model), backend="eager"), tmp_path)
    pairs_alike(compiled, tmp_path)


def test_checkpoint_of_the_module_itself() -> None:
    module = Users(vit())
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert parameter_names(module, own) == {name: name for name in own}


def test_buffers_are_found() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    names = parameter_names(nn.ModuleDict({"net": module}), {"0.weight": (3, 3), "1.running_mean": (3,)})
    assert names == {"0.weight": "net.0.weight", "1.running_mean": "net.1.running_mean"}


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'vit\.embeddings.* no counterpart in Users .*\(38 of 40 have none"):
        parameter_names(Users(bert()), shapes(tmp_path))  # both classify: two names are shared
    with pytest.raises(UserError, match=r"None of the 40 .*such as 'vit\..*parameters are called like 'weight'"):
        parameter_names(nn.Linear(2, 2), shapes(tmp_path))


def test_missing_and_misshapen_tensors_are_refused_by_name(tmp_path: Path) -> None:
    module = vit()
    module.save_pretrained(tmp_path)
    known = shapes(tmp_path)
    with pytest.raises(UserError, match=r"'classifier\.wight' .* no counterpart .* Did you mean 'classifier\.weight'"):
        parameter_names(module, {**known, "classifier.wight": (4, 16)})
    with pytest.raises(UserError, match=r"'classifier\.weight' has shape \(5, 16\) .* and \(4, 16\)"):
        parameter_names(module, {**known, "classifier.weight": (5, 16)})
    with pytest.raises(UserError, match=r"'.*' of the task vectors has no counterpart in Users under 'net\.'"):
        parameter_names(Users(module), known, "net.")


@pytest.mark.parametrize("of_transformers", [False, True])
def test_two_places_that_fit_are_refused(tmp_path: Path, of_transformers: bool) -> None:
    model = vit() if of_transformers else nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    module = nn.ModuleDict({"student": model, "teacher": copy.deepcopy(model)})
    if of_transformers:
        model.save_pretrained(tmp_path)
        known = shapes(tmp_path)
    else:
        known = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"fit in 2 places.*'student\.', 'teacher\.'.* Expected prefix"):
        parameter_names(module, known)
    names = parameter_names(module, known, "teacher.")
    assert all(name.startswith("teacher.") for name in names.values())


def test_one_model_under_two_names_is_one_place(tmp_path: Path) -> None:
    """A second attribute of the same module is no second place to merge into."""
    model = vit()
    model.save_pretrained(tmp_path)
    users = Users(model)
    users.again = model
    parameters = dict(users.named_parameters(remove_duplicate=False))
    names = parameter_names(users, shapes(tmp_path))
    assert {id(parameters[name]) for name in names.values()} == {id(p) for p in model.parameters()}
