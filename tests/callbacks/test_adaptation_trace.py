"""What an adaptation leaves behind: logged coefficients with few names, and pictures of the state that is kept."""

from __future__ import annotations

import csv
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from adapted_digits import DOMAINS, Classifier, make_models, open_task_vectors, stream, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_merge.callbacks import AdaMerging, AdaptationTrace, CollapseGuard
from lightning_merge.errors import UserError
from lightning_merge.objectives import Outputs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("digits"))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def adapt(models: dict[str, Path], *callbacks: L.Callback, learning_rate: float = 1e-3, **settings: Any) -> AdaMerging:
    module = Classifier()
    module.load_state_dict(load_file(models["base"]))
    merging = AdaMerging(open_task_vectors(models), learning_rate=learning_rate)
    ckpt_path = settings.pop("ckpt_path", None)
    settings = {"max_epochs": 1, "limit_train_batches": 20, **settings}
    trainer(callbacks=[*callbacks, merging], **settings).fit(module, stream(), ckpt_path=ckpt_path)
    return merging


def test_a_trace_is_logged_and_drawn_beside_the_log(models: dict[str, Path], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    merging = adapt(models, AdaptationTrace(every_n_steps=5), CollapseGuard(every_n_steps=5), logger=logger)
    folder = Path(logger.log_dir)
    assert {p.name for p in folder.glob("*.png")} == {"trace.png", "coefficients.png"}
    table = merging.table()
    logged = [row for row in read(folder / "metrics.csv") if row["coefficients/inverted/net.0.weight"]]
    assert [int(row["step"]) for row in logged] == [0, 5, 10, 15, 20]
    assert float(logged[0]["coefficients/inverted/net.0.weight"]) == pytest.approx(0.3)
    for model, groups in table.items():
        for group, value in groups.items():
            assert float(logged[-1][f"coefficients/{model}/{group}"]) == pytest.approx(value, abs=1e-6)
    assert float(logged[-1]["coefficients/drift"]) == pytest.approx(merging.drift(), abs=1e-6)
    assert [row for row in read(folder / "metrics.csv") if row["guard/overlap"] and row["guard/entropy/rotated"]]

    written = {(row["model"], row["group"]): row for row in read(folder / "coefficients.csv")}
    assert {row["start"] for row in written.values()} == {"0.30000001192092896"}
    assert all(float(written[m, g]["value"]) == v for m, groups in table.items() for g, v in groups.items())
    seen = {(row["quantity"], row["task"]) for row in read(folder / "trace.csv")}
    for quantity in ("minimised: entropy", "overlap", "agreement", "agreement_with_start", "diversity", "entropy"):
        assert {task for name, task in seen if name == quantity} == {"", *DOMAINS}
    assert ("drift", "") in seen


def test_what_is_drawn_is_the_state_that_the_guard_has_put_back(models: dict[str, Path], tmp_path: Path) -> None:
    """Wherever the trace stands among the callbacks."""
    trace = AdaptationTrace(tmp_path, every_n_steps=5)
    guard = CollapseGuard(every_n_steps=5, patience=50)
    merging = adapt(models, trace, guard, learning_rate=0.1, limit_train_batches=13)
    assert guard.rolled_back and guard.best_step == 0
    rows = read(tmp_path / "coefficients.csv")
    assert all(float(row["value"]) == float(row["start"]) for row in rows) and merging.drift() == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "trace.csv", "trace.png", "coefficients.csv", "coefficients.png"
    }  # fmt: skip


@pytest.mark.parametrize("first", ["trace", "guard"])
def test_the_stopped_step_shows_the_drift_that_was_stopped(first: str, models: dict[str, Path], tmp_path: Path) -> None:
    """The other panels show what the guard has seen there, and not what it has put back."""
    trace, guard = AdaptationTrace(every_n_steps=1, folder=tmp_path), CollapseGuard(every_n_steps=5, patience=1)
    logger = CSVLogger(tmp_path / "log")
    order = (trace, guard) if first == "trace" else (guard, trace)
    merging = adapt(models, *order, learning_rate=0.3, limit_train_batches=20, logger=logger)
    assert guard.stopped_step is not None and guard.best_step == 0 and merging.drift() == 0
    drift = {
        int(row["step"]): float(row["value"]) for row in read(tmp_path / "trace.csv") if row["quantity"] == "drift"
    }
    assert list(drift) == list(range(guard.stopped_step + 1))
    assert drift[guard.stopped_step] == pytest.approx(guard.history[-1]["drift"]) and drift[guard.stopped_step] > 0.1
    logged = [row["coefficients/drift"] for row in read(Path(logger.log_dir) / "metrics.csv")]
    assert [value for value in logged if value][1:] and 0.0 not in [float(value) for value in logged if value][1:]


def test_asked_to_draw_what_is_learned_online_it_says_once_that_it_does_not(models: dict[str, Path]) -> None:
    trace, merging = AdaptationTrace(), AdaMerging(open_task_vectors(models), online="before")
    used, module = trainer(callbacks=[trace, merging]), Classifier()
    with pytest.warns(UserWarning, match="AdaptationTrace records a fit only"):
        trace.setup(used, module, "test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace.setup(used, module, "predict")
        AdaptationTrace().setup(trainer(callbacks=[AdaMerging(open_task_vectors(models))]), module, "test")


def test_nothing_is_written_without_a_folder_or_a_logger(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapt(models, AdaptationTrace())
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_trace_goes_on(models: dict[str, Path], tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True)
    adapt(models, AdaptationTrace(tmp_path / "a", 5), saving, enable_checkpointing=True, limit_train_batches=10)
    again = AdaptationTrace(tmp_path / "b", 5)
    adapt(models, again, max_epochs=2, limit_train_batches=10, ckpt_path=saving.last_model_path)
    drift = [row for row in read(tmp_path / "b" / "trace.csv") if row["quantity"] == "drift"]
    assert [int(row["step"]) for row in drift] == [0, 5, 10, 15, 20]
    assert float(drift[0]["value"]) == 0 < float(drift[1]["value"])
    assert {row["start"] for row in read(tmp_path / "b" / "coefficients.csv")} == {"0.30000001192092896"}


class Learner(L.LightningModule):
    """A module that learns many coefficients itself, and can be asked as an adaptation."""

    tasks = ("a",)

    def __init__(self, layers: int, parts: int, models: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(models, layers * parts))
        self.names = [f"layer.{i}.part{j}" for i in range(layers) for j in range(parts)]

    def training_step(self, batch: Any, _: int) -> Tensor:
        return (self.raw - torch.arange(self.raw.numel()).reshape(self.raw.shape)).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)  # there in one step

    def answer(self, task: str, batch: Any) -> Outputs:
        return Outputs(task, batch[0])

    def individual(self, task: str) -> Any:
        return nullcontext()

    def learned(self) -> dict[str, Tensor]:
        return {"raw": self.raw.detach().cpu().clone()}

    def restore(self, learned: dict[str, Tensor]) -> None:
        self.raw.data.copy_(learned["raw"])

    def drift(self) -> float:
        return float(self.raw.detach().square().mean().sqrt())

    def table(self) -> dict[str, dict[str, float]]:
        return {f"m{i}": dict(zip(self.names, row.tolist(), strict=True)) for i, row in enumerate(self.raw.detach())}


@pytest.mark.parametrize(
    ("layers", "parts", "models", "names"),
    [(10, 10, 2, 200), (10, 11, 2, 20), (150, 2, 2, 2)],
)
def test_loggers_get_few_names(tmp_path: Path, layers: int, parts: int, models: int, names: int) -> None:
    module, logger = Learner(layers, parts, models), CSVLogger(tmp_path)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 3)), 4)
    trainer(max_epochs=1, logger=logger, callbacks=[AdaptationTrace(every_n_steps=1)]).fit(module, loader)
    last = read(Path(logger.log_dir) / "metrics.csv")[-1]
    logged = {name: float(value) for name, value in last.items() if name.startswith("coefficients/m") and value}
    assert len(logged) == names
    # Means of equally large groups have the mean of all.
    expected = (layers * parts * models - 1) / 2
    assert sum(logged.values()) / names == pytest.approx(expected, rel=1e-4)
    assert len(read(Path(logger.log_dir) / "coefficients.csv")) == layers * parts * models


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="every_n_steps must be a whole number of at least 1, got 0"):
        AdaptationTrace(every_n_steps=0)
