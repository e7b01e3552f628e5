"""A module, data and trainer that know nothing of merging are adapted by one callback, and are themselves after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import users_code
from torch import Tensor, nn
from users_code import VIEWS, Classifier, HoldsTransformer, Streams, digits, measure
from users_runs import adapt, in_processes, marks, merged_by_hand, supervise, task_vectors

from lightning_merge.callbacks import AdaMerging
from lightning_merge.correspondence import parameter_names

Checkpoints = dict[str, Path]


def check_is_the_users_own(result: dict[str, Any], checkpoints: Checkpoints) -> None:
    """The module holds θ₀ + Σ λτ under its own keys, loads into a plain one, and nothing else is left behind."""
    expected = merged_by_hand(checkpoints, result["table"])
    torch.testing.assert_close(result["state_dict"], expected, rtol=1e-5, atol=1e-6)
    assert result["changed"] == {} and result["strategy's own"] == []
    plain = Classifier()
    plain.load_state_dict(result["state_dict"], strict=True)


# --- one process ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def alone(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return adapt(tmp_path_factory.mktemp("alone"), checkpoints)


def test_the_users_module_is_merged_strict_and_unpatched(alone: dict[str, Any], checkpoints: Checkpoints) -> None:
    check_is_the_users_own(alone, checkpoints)
    moved = [abs(value - 0.3) for row in alone["table"].values() for value in row.values()]
    assert len(moved) == 3 * len(alone["state_dict"]) and min(moved) > 1e-4
    assert len(alone["trace"]) == 12


def test_what_each_checkpoint_holds_is_the_users_module(alone: dict[str, Any], checkpoints: Checkpoints) -> None:
    for path in sorted(Path(alone["trainer"].default_root_dir).glob("checkpoints/*.ckpt")):
        module = Classifier.load_from_checkpoint(path, strict=True)
        saved = torch.load(path, weights_only=True)
        assert set(saved["state_dict"]) == set(Classifier().state_dict())
        epoch = saved["epoch"]
        values = dict(zip(_cells(alone["callback"]), alone["trace"][4 * epoch + 3].tolist(), strict=True))
        table = {view: {name: values[name, view] for name in saved["state_dict"]} for view in VIEWS}
        torch.testing.assert_close(dict(module.state_dict()), merged_by_hand(checkpoints, table), rtol=1e-5, atol=1e-6)


def _cells(callback: AdaMerging) -> list[tuple[str, str]]:
    scalars = callback.scalars
    return [(name, model) for name in scalars.tensor_names for model in scalars.models]


def test_the_users_supervised_training_works_again(alone: dict[str, Any], tmp_path: Path) -> None:
    twin = Classifier()
    twin.load_state_dict(alone["state_dict"])
    twin.place.requires_grad_(False)
    twin.blocks[0].dropout.eval()
    losses = []
    for module in (twin, alone["module"]):
        torch.manual_seed(0)  # of dropout
        losses.append(supervise(tmp_path, module))
    assert losses[0] == losses[1]
    assert sum(losses[0][-5:]) < sum(losses[0][:5])


def test_entropy_falls_and_accuracy_rises(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """From coefficients that are too small; the labels are looked at by this test alone."""
    merge = Classifier()
    merge.load_state_dict(merged_by_hand(checkpoints, {v: dict.fromkeys(merge.state_dict(), 0.1) for v in VIEWS}))
    run = adapt(tmp_path, checkpoints, trainer={"limit_train_batches": 1.0}, initial=0.1)
    for split in ("stream", "test"):  # transductive, and on rows of the same kind
        before, after = measure(merge, split), measure(run["module"], split)
        assert sum(after[view][1] - before[view][1] for view in VIEWS) < -0.05
        assert sum(after[view][0] - before[view][0] for view in VIEWS) > 0.03
        assert all(after[view][0] > before[view][0] - 0.01 for view in VIEWS)


def test_labels_of_the_stream_are_not_looked_at(
    alone: dict[str, Any], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    unlabeled = adapt(tmp_path, checkpoints, epochs=1, streams={"labels": False})
    assert torch.equal(unlabeled["trace"], alone["trace"][:4])


def test_loaders_may_be_given_to_fit_without_a_data_module(checkpoints: Checkpoints, tmp_path: Path) -> None:
    loaders = {view: torch.utils.data.DataLoader(digits(view, "stream"), batch_size=40) for view in VIEWS}
    module, adamerging = Classifier(), AdaMerging(task_vectors(checkpoints), learning_rate=1e-2)
    before = marks(module)
    users_code.trainer(tmp_path, max_steps=4, callbacks=[adamerging]).fit(module, loaders)
    assert marks(module) == before
    torch.testing.assert_close(
        dict(module.state_dict()), merged_by_hand(checkpoints, adamerging.table()), rtol=1e-5, atol=1e-6
    )


def test_a_module_that_optimizes_by_hand_is_adapted_all_the_same(
    alone: dict[str, Any], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    class ByHand(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    module, adamerging = ByHand(), AdaMerging(task_vectors(checkpoints), learning_rate=1e-2)
    users_code.trainer(tmp_path, max_epochs=1, limit_train_batches=4, callbacks=[adamerging]).fit(
        module, datamodule=Streams()
    )
    assert torch.equal(adamerging.scalars().detach(), alone["trace"][3]) and not module.automatic_optimization


def test_a_run_stopped_at_an_epochs_end_goes_on_as_if_it_had_not(
    alone: dict[str, Any], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    adapt(tmp_path, checkpoints, epochs=1)
    resumed = adapt(tmp_path / "resumed", checkpoints, resume=str(tmp_path / "checkpoints" / "epoch=0.ckpt"))
    assert len(resumed["trace"]) == 8
    torch.testing.assert_close(resumed["trace"], alone["trace"][4:], rtol=1e-5, atol=0)
    check_is_the_users_own(resumed, checkpoints)


def test_a_checkpoint_holds_nothing_of_the_task_vectors(alone: dict[str, Any], checkpoints: Checkpoints) -> None:
    saved = Path(alone["trainer"].default_root_dir) / "checkpoints" / "epoch=2.ckpt"
    weights = sum(value.numel() * 4 for value in Classifier().state_dict().values())
    # The weights once, the coefficients, and their two moments; the container's own kilobytes.
    assert saved.stat().st_size < 1.5 * weights + 100_000


# --- two processes --------------------------------------------------------------------------------------------------


def jobs(on: str, checkpoints: Checkpoints, kind: str = "Classifier") -> list[dict[str, Any]]:
    """Straight; stopped after an epoch; and resumed."""
    common = {"on": on, "kind": kind, "checkpoints": checkpoints}
    saved = f"stopped_{on}/checkpoints/epoch=0.ckpt"
    return [
        {"name": f"straight_{on}", "again": on != "fsdp2_distributed", **common},
        {"name": f"stopped_{on}", "epochs": 1, **common},
        {"name": f"resumed_{on}", "resume": saved, **common},
    ]


@pytest.fixture(scope="session")
def ddp(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    return folder, in_processes(folder, jobs("ddp", checkpoints))


@pytest.fixture(scope="session")
def fsdp2(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("fsdp2")
    both = [*jobs("fsdp2", checkpoints, "Sharded"), *jobs("fsdp2_distributed", checkpoints, "Sharded")]
    return folder, in_processes(folder, both)


def check_processes(results: list[Any], alone: dict[str, Any], checkpoints: Checkpoints) -> None:
    first, second = results
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours["trace"], theirs["trace"])
    for straight, _, resumed in (first[start : start + 3] for start in range(0, len(first), 3)):
        torch.testing.assert_close(straight["trace"], alone["trace"], rtol=1e-5, atol=0)
        torch.testing.assert_close(resumed["trace"], straight["trace"][4:], rtol=1e-5, atol=0)
        check_is_the_users_own(straight, checkpoints)
        check_is_the_users_own(resumed, checkpoints)


@pytest.mark.slow
def test_two_processes_of_ddp_learn_the_same(
    ddp: tuple[Path, list[Any]], alone: dict[str, Any], checkpoints: Checkpoints
) -> None:
    folder, results = ddp
    check_processes(results, alone, checkpoints)
    check_trains_again(results)
    Classifier.load_from_checkpoint(folder / "stopped_ddp" / "checkpoints" / "epoch=0.ckpt", strict=True)


@pytest.mark.slow
def test_two_processes_of_fsdp2_learn_the_same(
    fsdp2: tuple[Path, list[Any]], alone: dict[str, Any], checkpoints: Checkpoints
) -> None:
    folder, results = fsdp2
    check_processes(results, alone, checkpoints)
    check_trains_again(results)
    whole = torch.load(folder / "stopped_fsdp2" / "checkpoints" / "epoch=0.ckpt", weights_only=True)
    Classifier().load_state_dict(whole["state_dict"], strict=True)
    assert (folder / "stopped_fsdp2_distributed" / "checkpoints" / "epoch=0.ckpt").is_dir()


@pytest.mark.slow
def test_a_method_that_is_not_forward_gathers_shards_too(
    alone: dict[str, Any], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    job = {"name": "method", "on": "fsdp2", "kind": "Sharded", "checkpoints": checkpoints, "logits": "answer"}
    (first,), (second,) = in_processes(tmp_path, [job])
    torch.testing.assert_close(first["trace"], alone["trace"], rtol=1e-5, atol=0)
    assert torch.equal(first["trace"], second["trace"])
    check_is_the_users_own(first, checkpoints)


def check_trains_again(results: list[Any]) -> None:
    """Both processes trained the module on labels, together: their weights are still alike, and moved."""
    probes = [process[0]["trained"] for process in results]
    if probes[1]:  # the first process gathers what is sharded
        torch.testing.assert_close(probes[0], probes[1], rtol=0, atol=0)
    moved = probes[0]["embed.weight"] - results[0][0]["state_dict"]["embed.weight"]
    assert moved.abs().max() > 1e-3
    assert torch.equal(probes[0]["place"], results[0][0]["state_dict"]["place"])  # frozen by the user


# --- a model of transformers in an attribute ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """Folders of transformers, as the user saved the encoder, and the heads that were trained with it."""
    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    start, heads, found = HoldsTransformer(), {}, {}
    users_code.train(start, VIEWS, folder / "base.ckpt", epochs=1, rows=100)
    for name in ("base", *VIEWS):
        module = HoldsTransformer.load_from_checkpoint(folder / "base.ckpt")
        if name in VIEWS:
            module.view = name
            users_code.train(module, [name], folder / f"{name}.ckpt", epochs=1)
            heads |= {key: value for key, value in module.state_dict().items() if key.startswith(f"heads.{name}.")}
        module.vit.save_pretrained(folder / name)
        found[name] = folder / name
    return found, heads


def adapt_transformer(folder: Path, folders: tuple[dict[str, Path], dict[str, Tensor]], **settings: Any) -> Any:
    module = HoldsTransformer()
    module.load_state_dict(folders[1], strict=False)
    adamerging = AdaMerging(task_vectors(folders[0]), ignore=[r"^heads\."], learning_rate=1e-2, **settings)
    before = marks(module)
    used = users_code.trainer(folder, max_epochs=1, limit_train_batches=4, callbacks=[adamerging])
    used.fit(module, datamodule=Streams())
    assert marks(module) == before
    return module, adamerging


def test_the_users_method_chooses_the_head_by_the_key(
    folders: tuple[dict[str, Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    module, adamerging = adapt_transformer(tmp_path, folders, logits="logits")
    for name, value in folders[1].items():
        assert torch.equal(module.state_dict()[name], value)  # heads are the user's, never merged
    from transformers import ViTModel

    models = {name: ViTModel.from_pretrained(path, add_pooling_layer=False) for name, path in folders[0].items()}
    states = {name: dict(model.named_parameters()) for name, model in models.items()}
    table = adamerging.table()
    inner = dict(module.vit.named_parameters())
    places = parameter_names(module, {name: adamerging.task_vectors.shape(name) for name in next(iter(table.values()))})
    for name, place in places.items():
        own = place.removeprefix("vit.")
        base = states["base"][own].detach()
        expected = base + sum(table[view][name] * (states[view][own].detach() - base) for view in VIEWS)
        torch.testing.assert_close(inner[own].detach(), expected, rtol=1e-5, atol=1e-6)
    assert len(places) == len(inner)


def test_heads_given_apart_are_as_good_as_the_users_method(
    folders: tuple[dict[str, Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    _, chosen = adapt_transformer(tmp_path, folders, logits="logits")
    heads = {}
    for view in VIEWS:
        heads[view] = nn.Linear(32, 10)
        heads[view].load_state_dict({part: folders[1][f"heads.{view}.{part}"] for part in ("weight", "bias")})
    before = {view: [value.clone() for value in head.parameters()] for view, head in heads.items()}
    _, given = adapt_transformer(tmp_path, folders, logits="features", heads=heads)
    torch.testing.assert_close(given.scalars(), chosen.scalars(), rtol=1e-5, atol=0)
    for view, head in heads.items():
        assert all(map(torch.equal, before[view], head.parameters())) and all(
            p.requires_grad for p in head.parameters()
        )
