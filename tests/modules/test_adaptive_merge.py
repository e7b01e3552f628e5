"""AdaptiveMerge over a run, and over models that are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import make_trainer

import lightning_merge
from lightning_merge.data import Digits, TaskStreams
from lightning_merge.errors import UserError
from lightning_merge.methods import LwPTV, SimpleAverage, TaskArithmetic, Ties
from lightning_merge.modules import (
    AdaptiveMerge,
    ClassEmbeddingHead,
    Encoder,
    build_vit,
    orthonormal_embeddings,
    save_head,
)
from lightning_merge.objectives import Distillation, Entropy, FeatureDistance, Supervised
from lightning_merge.task_vectors import TaskVectors

TASKS = ["rotated", "upright"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two models that are the base with noise, in the layout that lightning-merge run leaves."""
    folder = tmp_path_factory.mktemp("adaptive") / "run"
    encoder = build_vit(image_size=16, hidden_size=16, layers=2, heads=2, patch_size=8, seed=1)
    encoder.save_pretrained(folder / "base")
    for place, task in enumerate(TASKS):
        tuned = Encoder.from_pretrained(folder / "base")
        generator = torch.Generator().manual_seed(place)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.015 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(folder / "finetuned" / task)
        head = ClassEmbeddingHead(orthonormal_embeddings(10, 16, place), 16.0)
        names = [str(digit) for digit in range(10)]
        save_head(head, folder / "heads" / f"{task}.safetensors", labels=names, task=task)
    data = {"class_path": "Digits", "init_args": {"tasks": TASKS, "max_test": 40}}
    (folder / "run.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


def streams(**settings: Any) -> TaskStreams:
    return TaskStreams(Digits(tasks=TASKS, max_test=40, max_dev=20), **{"batch_size": 8, **settings})


def fit(module: AdaptiveMerge, folder: Path, data: Any = None, **options: Any) -> L.Trainer:
    settings = {"max_epochs": 2, "limit_train_batches": 3, "num_sanity_val_steps": 0, **options}
    checkpoint = settings.pop("ckpt_path", None)
    trainer: L.Trainer = make_trainer(folder, **settings)
    trainer.fit(module, datamodule=data or streams(), ckpt_path=checkpoint)
    return trainer


def test_what_is_exported_answers_as_the_live_module_does(run: Path, tmp_path: Path) -> None:
    """The file engine writes from the files what was merged in memory."""
    module = AdaptiveMerge(str(run), learning_rate=1e-2, guard=False, output=str(tmp_path / "out"))
    fit(module, tmp_path)
    images = streams().get("upright").splits["test"].inputs[:20]
    loaded = lightning_merge.load(tmp_path / "out")
    for task in TASKS:
        live = module(torch.as_tensor(images), task).softmax(-1)
        torch.testing.assert_close(loaded(images, task=task).probabilities, live, rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert record["steps"] == 6 and record["trained_parameters"] == 2 * len(module.task_vectors.tensor_names)
    assert record["selection"] == "unlabeled test" and record["split"] == "test"
    assert (tmp_path / "out" / "adaptation" / "trace.png").is_file() and not (tmp_path / "out.trace").exists()


def test_a_start_is_one_more_direction_from_the_merge_that_it_is(run: Path, tmp_path: Path) -> None:
    """Its coefficient is learned beside the tasks', and the file says what the live module is."""
    vectors = TaskVectors.open(run / "base", {task: run / "finetuned" / task for task in TASKS})
    lightning_merge.merge(Ties(), vectors, tmp_path / "ties")
    module = AdaptiveMerge(
        str(run), start=str(tmp_path / "ties"), objectives=[Distillation()], learning_rate=1e-2, guard=False,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    assert module.tasks == tuple(TASKS)
    fit(module, tmp_path)
    table = module.adaptation.table()
    assert set(table) == {"ties", *TASKS}
    assert all(0.9 < value < 1.1 for value in table["ties"].values()) and len(set(table["ties"].values())) > 1
    assert all(abs(value) < 0.1 for task in TASKS for value in table[task].values())
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in module.encoder.backbone.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stream", "settings", "expected"),
    [
        ({"split": "ood_thick"}, {}, ("ood_thick", "unlabeled ood_thick")),
        ({"split": "dev", "labels": True}, {"objectives": [Supervised()]}, ("dev", "validation labels")),
        ({"split": "train", "labels": True}, {"objectives": [Supervised()]}, ("train", "training labels")),
        ({"split": "dev", "labels": True}, {}, ("dev", "unlabeled dev")),
        (None, {}, (None, "unlabeled stream")),
    ],
)
def test_the_record_says_which_rows_and_labels_took_part(
    stream: Any, settings: dict[str, Any], expected: tuple[str | None, str], run: Path, tmp_path: Path
) -> None:
    module = AdaptiveMerge(str(run), guard=False, **settings)
    data = streams(**(stream or {}))
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0, limit_val_batches=0)
    if stream is None:  # loaders of the user's own
        trainer.fit(module, {task: data.stream(task) for task in TASKS})
    else:
        trainer.fit(module, datamodule=data)
    record = module.record()
    assert (record["split"], record["selection"]) == expected


def test_a_start_that_is_called_like_a_task_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="called like a task"):
        AdaptiveMerge(str(run), start=str(run / "finetuned" / "upright"))


def test_a_start_together_with_transforms_is_refused(run: Path) -> None:
    with pytest.raises(
        UserError, match=r"transforms \(LwPTV\) would also change the start.*either start or transforms"
    ):
        AdaptiveMerge(str(run), start=str(run / "merged" / "ties"), transforms=[LwPTV()])


def test_only_coefficients_are_learned(run: Path, tmp_path: Path) -> None:
    """The exported weights are base + Σ λ τ of the coefficients that stand beside them, and heads are as they were."""
    module = AdaptiveMerge(str(run), by="task", learning_rate=1e-2, guard=False, output=str(tmp_path / "out"))
    fit(module, tmp_path)
    learned = load_file(tmp_path / "out" / "coefficients.safetensors")["coefficients"]
    assert learned.shape == (2, 1) and not torch.allclose(learned, torch.tensor(0.3))
    vectors = TaskVectors.open(run / "base", {task: run / "finetuned" / task for task in TASKS})
    expected = TaskArithmetic(scale=dict(zip(TASKS, learned[:, 0].tolist(), strict=True)))(vectors)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=1e-6)
    for task in TASKS:
        files = (folder / "heads" / f"{task}.safetensors" for folder in (run, tmp_path / "out"))
        assert next(files).read_bytes() == next(files).read_bytes()


def test_transforms_stand_before_the_sum(run: Path, tmp_path: Path) -> None:
    module = AdaptiveMerge(
        str(run), transforms=[LwPTV(eta=0.5)], learning_rate=1e-12, guard=False, output=str(tmp_path / "out")
    )
    fit(module, tmp_path, max_epochs=1)
    expected = TaskArithmetic(scale=0.3)(module.task_vectors, [LwPTV(eta=0.5)])
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=1e-6)


def test_a_collapse_is_not_exported(run: Path, tmp_path: Path) -> None:
    guard = {"every_n_steps": 1, "patience": 1, "watch_batches": 1}
    fit(AdaptiveMerge(str(run), learning_rate=5.0, guard=guard, output=str(tmp_path / "out")), tmp_path)
    record = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert record["rolled_back"] and record["best_step"] == 0 and record["stopped_step"] < 6
    learned = load_file(tmp_path / "out" / "coefficients.safetensors")["coefficients"]
    assert torch.equal(learned, torch.full_like(learned, 0.3))


def test_a_warm_start_goes_on_from_the_file(run: Path, tmp_path: Path) -> None:
    fit(AdaptiveMerge(str(run), learning_rate=1e-2, guard=False, output=str(tmp_path / "first")), tmp_path)
    start = str(tmp_path / "first" / "coefficients.safetensors")
    fit(AdaptiveMerge(str(run), initial=start, learning_rate=1e-12, output=str(tmp_path / "second")), tmp_path)
    first, second = (load_file(tmp_path / name / "coefficients.safetensors") for name in ("first", "second"))
    torch.testing.assert_close(second["coefficients"], first["coefficients"], rtol=0, atol=1e-9)


def test_stopped_after_an_epoch_it_goes_on_as_it_would_have(run: Path, tmp_path: Path) -> None:
    straight = AdaptiveMerge(str(run), learning_rate=1e-2, guard=False, output=str(tmp_path / "straight"))
    fit(straight, tmp_path, max_epochs=3)
    first = AdaptiveMerge(str(run), learning_rate=1e-2, guard=False)
    fit(first, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    second = AdaptiveMerge(str(run), learning_rate=1e-2, guard=False, output=str(tmp_path / "resumed"))
    fit(second, tmp_path, max_epochs=3, ckpt_path=tmp_path / "one.ckpt")
    files = [
        load_file(tmp_path / name / "coefficients.safetensors")["coefficients"] for name in ("straight", "resumed")
    ]
    torch.testing.assert_close(files[0], files[1], rtol=1e-5, atol=1e-7)


def test_a_checkpoint_loads_strictly_into_the_plain_module(run: Path, tmp_path: Path) -> None:
    fitted = AdaptiveMerge(str(run), learning_rate=1e-2)
    fit(fitted, tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    plain = AdaptiveMerge(str(run))
    saved = torch.load(tmp_path / "last.ckpt", map_location="cpu", weights_only=True)
    plain.load_state_dict(saved["state_dict"], strict=True)
    images = torch.as_tensor(streams().get("upright").splits["test"].inputs[:4])
    torch.testing.assert_close(plain(images, "upright"), fitted(images, "upright"))


def test_scores_are_those_of_each_task_by_its_own_head(run: Path, tmp_path: Path) -> None:
    module = AdaptiveMerge(str(run), learning_rate=1e-2, guard=False)
    trainer = fit(module, tmp_path)
    [*_, metrics] = trainer.test(module, datamodule=streams(), verbose=False)
    told = {name: float(value) for name, value in trainer.callback_metrics.items()}
    own = {}
    for task in TASKS:
        test = streams().get(task).splits["test"]
        answers = module(torch.as_tensor(test.inputs), task).argmax(-1).numpy()
        own[task] = float((answers == test.labels).mean())
        assert told[f"test_accuracy/{task}"] == pytest.approx(own[task], abs=1e-6)
    assert told["test_accuracy"] == pytest.approx(sum(own.values()) / 2, abs=1e-6)
    assert metrics


def test_validation_labels_are_looked_at_and_teach_nothing(run: Path, tmp_path: Path) -> None:
    found = []
    for limit in (0, 1.0):
        module = AdaptiveMerge(str(run), learning_rate=1e-2, guard=False, output=str(tmp_path / f"out{limit}"))
        trainer = fit(module, tmp_path, limit_val_batches=limit)
        assert ("val_accuracy" in trainer.callback_metrics) == bool(limit)
        found.append(load_file(tmp_path / f"out{limit}" / "coefficients.safetensors")["coefficients"])
    assert torch.equal(*found)


def test_objectives_may_ask_for_the_individual_models(run: Path, tmp_path: Path) -> None:
    """At an individual model's own coefficients nothing is left to be distilled."""
    objectives = [Entropy(weight=0.0), FeatureDistance(), Distillation()]
    module = AdaptiveMerge(str(run), tasks=["upright"], initial=1.0, objectives=objectives, individuals="cached",
                           learning_rate=1e-9)  # fmt: skip
    fit(module, tmp_path, TaskStreams(Digits(tasks=["upright"], max_test=40), batch_size=8))
    assert module.adaptation.last["feature_distance"]["upright"] == pytest.approx(0.0, abs=1e-5)


def test_models_may_be_given_without_a_run(run: Path, tmp_path: Path) -> None:
    models = {task: str(run / "finetuned" / task) for task in TASKS}
    heads = {task: str(run / "heads" / f"{task}.safetensors") for task in TASKS}
    given = AdaptiveMerge(base=str(run / "base"), models=models, heads=heads, output=str(tmp_path / "given"))
    fit(given, tmp_path, max_epochs=1)
    fit(AdaptiveMerge(str(run), output=str(tmp_path / "run")), tmp_path, max_epochs=1)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("given", "run")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "needs 'run'"),
        ({"run": "RUN", "base": "x"}, "got both"),
        ({"run": "nowhere"}, "is no run"),
        ({"run": "RUN", "tasks": ["uprigth"]}, "Did you mean 'upright'"),
        ({"run": "RUN", "transforms": [Ties()]}, "Ties is a merge method"),
        ({"run": "RUN", "transforms": [SimpleAverage()]}, "SimpleAverage is a merge method"),
        ({"base": "b", "models": {"a": "x"}, "heads": {"b": "y"}}, "The model 'a' has no head"),
        ({"base": "b", "models": {"a": "x"}, "heads": {"a": "z", "b": "y"}}, "The head 'b' has no model"),
    ],
)
def test_what_is_not_there_is_refused(settings: dict[str, Any], told: str, run: Path) -> None:
    settings = {name: str(run) if value == "RUN" else value for name, value in settings.items()}
    with pytest.raises(UserError, match=told):
        AdaptiveMerge(**settings)


def test_an_unfinished_run_is_refused_with_the_remedy(run: Path, tmp_path: Path) -> None:
    import shutil

    half = Path(shutil.copytree(run, tmp_path / "half"))
    (half / "finetuned" / "upright" / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"not finished: it lacks 'finetuned/upright/model.safetensors'. Finish it with"
    ):
        AdaptiveMerge(str(half))


def test_another_stream_or_a_place_that_is_taken_is_refused_before_anything_is_learned(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="inverted"):
        fit(AdaptiveMerge(str(run)), tmp_path, TaskStreams(Digits(tasks=["upright", "inverted"])))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already holds something else"):
        fit(AdaptiveMerge(str(run), output=str(tmp_path / "mine")), tmp_path)
    with pytest.raises(UserError, match="is or holds a model being merged"):
        fit(AdaptiveMerge(str(run), output=str(run / "finetuned" / "upright")), tmp_path)
