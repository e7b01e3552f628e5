"""DistilledEncoder on a tiny run: what it writes is one static model that answers as the individual ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import loader, make_trainer

from lightning_merge import load
from lightning_merge.errors import UserError
from lightning_merge.modules import ClassEmbeddingHead, DistilledEncoder, orthonormal_embeddings, save_head
from lightning_merge.weights.folder import copy_companions

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 8, 8)).astype(np.uint8)
LABELS = np.arange(24) % 3
QUIET: dict[str, Any] = {"guard": False, "trace_every_n_steps": 4}


class Rows(L.LightningDataModule):
    """The same rows for both tasks."""

    task_names = ("first", "v1.second")

    def train_dataloader(self) -> dict[str, Any]:
        return {task: loader(IMAGES, LABELS) for task in self.task_names}


@pytest.fixture
def parts(vit: Path, tmp_path: Path) -> dict[str, Any]:
    """A base, two models some way from it (with the position embeddings of the base), their mean, and heads."""
    base = load_file(vit / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    models, heads, mean = {}, {}, {name: values.clone() for name, values in base.items()}
    for task in Rows.task_names:
        models[task], heads[task] = str(tmp_path / task), str(tmp_path / "heads" / f"{task}.safetensors")
        delta = {name: 0.05 * torch.randn(values.shape, generator=generator) for name, values in base.items()}
        delta |= {name: torch.zeros_like(values) for name, values in delta.items() if "position" in name}
        copy_companions(vit, tmp_path / task)
        save_file({n: v + delta[n] for n, v in base.items()}, tmp_path / task / "model.safetensors", {"format": "pt"})
        mean = {name: values + delta[name] / 2 for name, values in mean.items()}
        head = ClassEmbeddingHead(orthonormal_embeddings(3, 16, seed=len(task)))
        save_head(head, heads[task], labels=["a", "b", "c"], task=task, pooling="cls")
    copy_companions(vit, tmp_path / "merged")
    save_file(mean, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    return {"merge": str(tmp_path / "merged"), "base": str(vit), "models": models, "heads": heads, **QUIET}


def apart(model: Any, parts: dict[str, Any], heads: Path) -> float:
    """How far a model's probabilities are from those of each task's individual model."""
    found = 0.0
    for task in Rows.task_names:
        goal = load(parts["models"][task], heads=heads)
        found += float((model(IMAGES, task).probabilities - goal(IMAGES, task).probabilities).abs().mean())
    return found


@pytest.mark.parametrize("cross", [0.0, 2.0])
def test_the_folder_it_writes_answers_nearer_to_the_individual_models(
    parts: dict[str, Any], tmp_path: Path, cross: float
) -> None:
    output = tmp_path / "distilled"
    module = DistilledEncoder(**parts, cross=cross, learning_rate=1e-3, output=str(output))
    make_trainer(tmp_path, max_epochs=15).fit(module, datamodule=Rows())
    merged, distilled = load(parts["merge"], heads=tmp_path / "heads"), load(output)
    assert apart(distilled, parts, tmp_path / "heads") < 0.6 * apart(merged, parts, tmp_path / "heads")
    with torch.no_grad():
        for task in Rows.task_names:
            logits = module.cpu()(IMAGES, task)
            torch.testing.assert_close(distilled(IMAGES, task).probabilities, logits.softmax(-1), atol=1e-5, rtol=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", output))
    assert list(before) == list(after) and all(before[name].dtype == after[name].dtype for name in before)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still and all("position" in name or "pooler" in name for name in still)
    record = json.loads((output / "adaptation.json").read_text())
    trained = sum(before[name].numel() for name in before if "position" not in name)
    assert (record["steps"], record["trained_parameters"], record["merge"]) == (45, trained, "merged")
    assert set(record["losses"]) == ({"distillation", "cross"} if cross else {"distillation"}) and record["drift"] > 0
    assert (output / "merge.json").is_file() and (output / "adaptation" / "trace.csv").is_file()


def test_no_step_writes_the_merge_itself_and_it_may_be_replaced(parts: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "still"
    for _ in range(2):  # the second replaces the first
        module = DistilledEncoder(**parts, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), output=str(output))
        make_trainer(tmp_path).fit(module, datamodule=Rows())
        before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", output))
        assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
        assert {path.stem for path in (output / "heads").iterdir()} == set(Rows.task_names)


def test_a_merge_that_was_distilled_is_one_to_start_from(parts: dict[str, Any], tmp_path: Path) -> None:
    first = DistilledEncoder(**parts, output=str(tmp_path / "once"))
    make_trainer(tmp_path).fit(first, datamodule=Rows())
    again = DistilledEncoder(**parts | {"merge": str(tmp_path / "once")})
    expected = dict(first.encoder.backbone.state_dict())
    assert all(torch.equal(values, expected[name]) for name, values in again.encoder.backbone.state_dict().items())


def test_what_cannot_work_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"merge '.*absent' does not exist"):
        DistilledEncoder(**parts | {"merge": str(tmp_path / "absent")})
    with pytest.raises(UserError, match="cross is -1"):
        DistilledEncoder(**parts, cross=-1.0)
    with pytest.raises(UserError, match="learned nothing yet"):
        DistilledEncoder(**parts).export(tmp_path / "new")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(UserError, match="already holds something else"):
        make_trainer(tmp_path).fit(DistilledEncoder(**parts, output=str(tmp_path / "mine")), datamodule=Rows())
    with pytest.raises(UserError, match="is or holds a model being merged"):
        make_trainer(tmp_path).fit(DistilledEncoder(**parts, output=parts["merge"]), datamodule=Rows())
    head = ClassEmbeddingHead(orthonormal_embeddings(3, 16, seed=0))
    save_head(head, parts["heads"]["first"], labels=["a", "b", "c"], task="first", pooling="mean")
    with pytest.raises(UserError, match="features of different poolings"):
        DistilledEncoder(**parts, cross=1.0)
