"""Merges of a run that learn on a stream of its tasks, on digits with a model of fifteen thousand weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import lightning_merge
from lightning_merge.cli import main
from lightning_merge.data import Digits, Task
from lightning_merge.evaluation import Results
from lightning_merge.scoring import given_facts

TASKS = ["upright", "rotated"]
ADAPT: list[dict[str, Any]] = [
    {"name": "ada", "learning_rate": 1e-2, "max_epochs": 2, "batches": 4},
    {"name": "still", "initial": "chosen", "learning_rate": 1e-12, "max_epochs": 1, "batches": 1, "guard": False},
    {"name": "after", "initial": "ada", "learning_rate": 1e-12, "max_epochs": 1, "batches": 1, "guard": False},
    {"name": "few", "split": "dev", "objectives": ["Supervised"], "by": "task", "max_rows": 20, "max_epochs": 1,
     "batches": 2, "grid": {"learning_rate": [1e-3, 1e-1]}},
    {"name": "surgery", "what": "Surgery", "over": "average", "rank": 4, "max_epochs": 2, "batches": 4},
    {"name": "distilled", "what": "Distilled", "over": "chosen", "learning_rate": 1e-3, "module": {"cross": 1.0},
     "max_epochs": 2, "batches": 4, "guard": False},
]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "data": {
        "class_path": "Digits",
        "init_args": {
            "tasks": TASKS, "eval_batch_size": 200, "pretrain_rows": 60, "max_train": 120, "max_dev": 40,
            "max_test": 60,
        },
    },
    "pretrain": {
        "vit": {"image_size": 16, "hidden_size": 32, "layers": 1, "heads": 2, "patch_size": 4},
        "module": {"learning_rate": 3e-3, "head_scale": 16.0},
        "max_epochs": 6,
    },
    "finetune": {"module": {"learning_rate": 2e-3, "head_scale": 16.0}, "max_epochs": 2},
    "merges": [
        {"name": "average", "method": "SimpleAverage"},
        {"name": "chosen", "method": "TaskArithmetic", "transforms": ["Dare"],
         "grid": {"method.scale": [0.2, 0.4], "transforms.0.drop_rate": [0.3]}},
    ],
    "adapt": ADAPT,
    "evaluate": {"corruptions": ["blur-3"]},
}  # fmt: skip


class ShuffledTestLabels(Digits):
    """Digits whose test labels say nothing."""

    def load(self, name: str) -> Task:
        task = super().load(name)
        test = task.splits["test"]
        rolled = type(test)(test.inputs, np.roll(test.labels, 1))
        return Task(task.name, task.kind, task.labels, task.label_texts, {**task.splits, "test": rolled})


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return path


def run(settings: Path, output: Path, *more: str) -> int:
    return main(["run", "--config", str(settings), "--output", str(output), *more])


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def changed(spec: str, **settings: Any) -> list[dict[str, Any]]:
    return [{**given, **settings} if given["name"] == spec else given for given in ADAPT]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run; tests look at it, or work on a copy."""
    folder = tmp_path_factory.mktemp("adapting")
    assert run(write(folder), folder / "run") == 0
    return folder / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_the_table_says_what_each_was_learned_from(finished: Path) -> None:
    results = Results.load(finished)
    selection = {name: results.facts(name).selection for name in results.models}
    assert selection["ada"] == selection["surgery"] == "unlabeled test"
    assert selection["still"] == "validation labels + unlabeled test"  # the scale it starts from was chosen on those
    assert selection["distilled"] == "validation labels + unlabeled test"
    assert selection["few"] == "validation labels"
    assert {split for name in ("ada", "surgery") for split in ("id", "ood", "corrupted")
            if any(score.model == name and score.split == split for score in results.scores)} == {
        "id", "ood", "corrupted"}  # fmt: skip
    assert [name for name in results.models if results.facts(name).needs_task] == ["surgery"]
    assert "by task" in (finished / "results.md").read_text()


def test_what_received_gradients_and_what_is_kept_is_counted(finished: Path) -> None:
    results = Results.load(finished)
    base, tensors = results.facts("pretrained").stored_parameters, len(load_file(finished / "base/model.safetensors"))
    assert results.facts("ada").trained_parameters == tensors * len(TASKS)
    assert results.facts("few").trained_parameters == len(TASKS)
    assert 0 < results.facts("distilled").trained_parameters <= base == results.facts("distilled").stored_parameters
    assert results.facts("ada").stored_parameters == base
    rank, dim = 4, 32
    assert results.facts("surgery").trained_parameters == 2 * rank * dim * len(TASKS)
    assert results.facts("surgery").stored_parameters == base + 2 * rank * dim * len(TASKS)
    assert results.facts("surgery").active_parameters == base + 2 * rank * dim


def test_the_folder_answers_as_the_table_says(finished: Path) -> None:
    results = Results.load(finished)
    data = Digits(tasks=TASKS, max_test=60)
    for name in ("ada", "surgery", "distilled"):
        model = lightning_merge.load(finished / "merged" / name)
        for task in TASKS:
            test = data.get(task).splits["test"]
            answers = model(np.asarray(test.inputs), task=task).probabilities.argmax(-1).numpy()
            assert float((answers == test.labels).mean()) == results.accuracy(name, task)


def test_adapting_moves_the_coefficients(finished: Path) -> None:
    coefficients = load_file(finished / "merged" / "ada" / "coefficients.safetensors")["coefficients"]
    assert 1e-2 < (coefficients - 0.3).abs().max() < 0.1  # a step of Adam is about its learning rate; there are 8
    record = json.loads((finished / "merged" / "ada" / "adaptation.json").read_text())
    assert record["steps"] == 8 and record["drift"] > 0


def test_a_start_at_a_merge_is_that_merge(finished: Path) -> None:
    """Its chosen scale, on task vectors that are transformed as its own, with the same draws."""
    chosen = load_file(finished / "merged" / "chosen" / "model.safetensors")
    still = load_file(finished / "merged" / "still" / "model.safetensors")
    average = load_file(finished / "merged" / "average" / "model.safetensors")
    for name, weights in chosen.items():
        torch.testing.assert_close(still[name], weights, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(average[name], chosen[name], atol=1e-5) for name in chosen)


def test_distilling_moves_all_weights_of_the_merge_a_little(finished: Path) -> None:
    chosen, distilled = (load_file(finished / "merged" / n / "model.safetensors") for n in ("chosen", "distilled"))
    record = json.loads((finished / "merged" / "distilled" / "adaptation.json").read_text())
    moved = {name for name in chosen if not torch.equal(chosen[name], distilled[name])}
    assert record["steps"] == 8 and record["merge"] == "chosen" and len(moved) > 0.9 * len(chosen)
    assert sum(chosen[name].numel() for name in moved) <= record["trained_parameters"]
    assert max(float((chosen[name] - distilled[name]).abs().max()) for name in moved) < 8 * 1e-3  # AdamW's steps
    assert set(record["losses"]) == {"distillation", "cross"}


def test_a_start_at_an_adaptation_is_that_adaptation(finished: Path) -> None:
    first = load_file(finished / "merged" / "ada" / "model.safetensors")
    after = load_file(finished / "merged" / "after" / "model.safetensors")
    for name, weights in first.items():
        torch.testing.assert_close(after[name], weights, rtol=1e-5, atol=1e-6)


def test_a_grid_is_decided_on_validation_rows(finished: Path) -> None:
    facts = Results.load(finished).facts("few")
    assert set(facts.selected) == {"learning_rate"} and facts.selected["learning_rate"] in (1e-3, 1e-1)
    assert not list((finished / "merged").glob(".*"))  # candidates are gone


def test_pictures_of_what_was_learned_are_in_the_report(finished: Path) -> None:
    for kind in ("trace", "coefficients"):
        assert (finished / "plots" / f"ada.{kind}.png").is_file() and (finished / "plots" / f"ada.{kind}.csv").is_file()
    report = (finished / "report.html").read_text()
    assert "While it learned: ada" in report and "Learned coefficients: ada" in report


def test_evaluate_scores_what_was_learned(finished: Path, tmp_path: Path) -> None:
    models = f"{{a: {finished / 'merged/ada'}, s: {finished / 'merged/surgery'}}}"
    assert main(["evaluate", "--run", str(finished), "--models", models, "--output", str(tmp_path / "t")]) == 0
    results = Results.load(tmp_path / "t")
    for mine, own in (("a", "ada"), ("s", "surgery")):
        assert [results.accuracy(mine, task) for task in TASKS] == [results.accuracy(own, task) for task in TASKS]


@pytest.mark.parametrize("name", ["average", "chosen", "ada", "still", "few", "surgery", "distilled"])
def test_evaluate_says_what_a_folder_was_learned_from_wherever_it_lies(
    name: str, finished: Path, tmp_path: Path
) -> None:
    run = Results.load(finished).facts(name)
    inside = finished / "merged" / name
    facts = given_facts("a", inside, run.stored_parameters)
    assert facts.selection == run.selection
    assert (facts.trained_parameters, facts.stored_parameters) == (run.trained_parameters, run.stored_parameters)
    assert (facts.active_parameters, facts.needs_task) == (run.active_parameters, run.needs_task)
    if name not in ("average", "chosen"):
        assert run.method.split("(")[0] in facts.method
        # Elsewhere only its own record speaks; a start at numbers of a chosen merge is known to its run alone.
        moved = given_facts("a", Path(shutil.copytree(inside, tmp_path / "elsewhere")), run.stored_parameters)
        assert moved.selection == ("unlabeled test" if name == "still" else run.selection)


def test_a_folder_that_says_nothing_is_not_told_to_be_without_data(finished: Path, tmp_path: Path) -> None:
    ada = Path(shutil.copytree(finished / "merged" / "ada", tmp_path / "ada"))
    record = json.loads((ada / "adaptation.json").read_text())
    (ada / "adaptation.json").write_text(json.dumps({key: record[key] for key in record if key != "selection"}))
    assert given_facts("a", ada, 1).selection == "not recorded"
    plain = Path(shutil.copytree(finished / "base", tmp_path / "plain"))
    assert given_facts("a", plain, 1).selection == "not recorded"
    merged = Path(shutil.copytree(finished / "merged" / "average", tmp_path / "merged"))
    assert given_facts("a", merged, 1).selection == "none"
    text = (merged / "merge.json").read_text().replace("SimpleAverage", "GreedySoup")  # asks validation rows
    (merged / "merge.json").write_text(text)
    assert given_facts("a", merged, 1).selection == "not recorded"


def test_evaluate_without_the_rows_that_were_scored_says_how_to_write_them(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / ".stages" / "scored_rows").unlink()
    assert main(["evaluate", "--run", str(copied), "--models", f"{{a: {copied / 'merged/ada'}}}"]) == 2
    shown = capsys.readouterr().err
    assert "scored_rows" in shown and f"--output {copied}" in shown and "Traceback" not in shown
    assert main(["evaluate", "--run", str(copied)]) == 0  # the table alone compares nothing


# --- done once ----------------------------------------------------------------------------------------------------


def test_one_changed_adaptation_is_redone_with_what_starts_from_it(copied: Path) -> None:
    before = times(copied / ".stages")
    assert run(write(copied.parent, adapt=changed("ada", max_epochs=1)), copied) == 0
    after = times(copied / ".stages")
    assert {name for name in after if after[name] != before.get(name)} == {
        "adapt-ada.json", "evaluate-ada.json", "adapt-after.json", "evaluate-after.json",
    }  # fmt: skip
    middle = times(copied)
    assert run(write(copied.parent, adapt=changed("ada", max_epochs=1)), copied) == 0
    assert {name for name, time in times(copied).items() if time != middle[name]} <= {
        name for name in middle if name.startswith(("plots", "report", "results", "run.yaml")) or "README" in name
    }


def test_test_labels_teach_nothing(finished: Path, copied: Path) -> None:
    data = {"class_path": f"{__name__}.ShuffledTestLabels", "init_args": SETTINGS["data"]["init_args"]}
    assert run(write(copied.parent, data=data), copied) == 0
    assert Results.load(copied).mean("individual") != Results.load(finished).mean("individual")
    for name in ("ada", "surgery", "few", "distilled"):
        own, other = (load_file(folder / "merged" / name / "model.safetensors") for folder in (finished, copied))
        assert all(torch.equal(own[tensor], other[tensor]) for tensor in own)
    file = "merged/surgery/surgery.safetensors"
    own, other = load_file(finished / file), load_file(copied / file)
    assert all(torch.equal(own[tensor], other[tensor]) for tensor in own)


# --- what fails, and what is refused ------------------------------------------------------------------------------


def test_a_failing_adaptation_leaves_the_others(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {"name": "broken", "module": {"storage": "files"}, "transforms": ["Dare"]}  # read again, as they are not
    after = {"name": "next", "what": "Surgery", "over": "broken"}
    assert run(write(copied.parent, adapt=[broken, after, *ADAPT]), copied) == 1
    results = Results.load(copied)
    assert "files" in (results.facts("broken").error or "")
    assert "It starts from 'broken', which failed" in (results.facts("next").error or "")
    assert results.mean("ada") is not None
    assert "The merge 'broken' failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"name": "average"}, "The adaptation's name 'average' is taken by a merge"),
        ({"name": "a", "lerning_rate": 1}, "the entry 'a' in adapt 'lerning_rate'"),
        ({"name": "a", "lerning_rate": 1}, "Did you mean 'learning_rate'?"),
        ({"lerning_rate": 1}, "the entry number 1 in adapt"),
        ({"name": "a", "what": "Surgary", "over": "average"}, "Did you mean 'Surgery'?"),
        ({"name": "a", "what": "Surgery"}, "Expected over: one of average, chosen"),
        ({"name": "a", "what": "Surgery", "over": "avrage"}, "Did you mean 'average'?"),
        ({"name": "a", "what": "Surgery", "over": "average", "version": 3}, "Unknown version of surgery '3'"),
        ({"name": "a", "what": "Surgery", "over": "average", "objectives": ["Entropy"]}, "Surgery has no objectives"),
        ({"name": "a", "over": "average"}, "over is for Surgery"),
        ({"name": "a", "what": "Distilled"}, "Distilled trains a merge. Expected over: one of average, chosen"),
        ({"name": "a", "what": "Distilled", "over": "avrage"}, "Did you mean 'average'?"),
        ({"name": "a", "what": "Distilled", "over": "average", "module": {"cros": 1.0}}, "Did you mean 'cross'?"),
        ({"name": "a", "initial": "averag"}, "Did you mean 'average'?"),
        ({"name": "a", "initial": "soup"}, "Unknown merge to start from 'soup'"),
        ({"name": "a", "initial": {"uprigt": 0.3}}, "Did you mean 'upright'?"),
        ({"name": "a", "split": "tset"}, "Did you mean 'test'?"),
        ({"name": "a", "split": "ood_nowhere"}, "Unknown split of task 'upright' 'ood_nowhere'"),
        ({"name": "a", "objectives": ["Supervised"]}, "labels of 'test' rows would teach what they are to score"),
        ({"name": "a", "objectives": ["Entrpy"]}, "Did you mean 'Entropy'?"),
        ({"name": "a", "transforms": ["SimpleAverage"]}, "not a transform"),
        ({"name": "a", "learning_rate": 0}, "learning_rate must be above 0"),
        ({"name": "a", "batch_size": 0}, "batch_size must be at least 1"),
        ({"name": "a", "batches": 0}, "batches must be at least 1"),
        ({"name": "a", "max_epochs": 0}, "adapt.a.max_epochs must be at least 1"),
        ({"name": "a", "precision": "bf16-mixd"}, "Did you mean 'bf16-mixed'?"),
        ({"name": "a", "trainer": {"limit_train_batches": 3}}, "Set adapt.a.batches"),
        ({"name": "a", "trainer": {"strategy": "fsdp"}}, "strategy 'fsdp'"),
        ({"name": "a", "trainer": {"acumulate_grad_batches": 2}}, "Did you mean 'accumulate_grad_batches'?"),
        ({"name": "a", "module": {"priour": 1.0}}, "Did you mean 'prior'?"),
        ({"name": "a", "module": {"by": "task"}}, "Set adapt.a.by."),
        ({"name": "a", "guard": {"patienc": 2}}, "Did you mean 'patience'?"),
        ({"name": "a", "guard": {"patience": 0}}, "patience must be a whole number of at least 1"),
        ({"name": "a", "grid": {"learning_rat": [1.0]}}, "Did you mean 'learning_rate'?"),
        ({"name": "a", "grid": {"learning_rate": []}}, "no values"),
        ({"name": "a", "grid": {"transforms.0.density": [0.1]}}, "transforms.0.density"),
        ({"name": "a", "corruption": "typos-3"}, "for text inputs, but task 'upright' has image inputs"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_written(
    spec: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(write(tmp_path, adapt=[spec]), tmp_path / "run") == 2
    shown = capsys.readouterr().err
    assert shown.count("lightning-merge run: error: ") == 1 and "\n" not in shown.strip()
    assert told in shown
    assert not (tmp_path / "run").exists()


def test_a_merge_that_is_no_sum_becomes_one_more_direction(copied: Path, tmp_path: Path) -> None:
    """With a coefficient of 1 where those of the tasks are 0, the adaptation starts at that merge; so does its next."""
    options = {"learning_rate": 1e-12, "max_epochs": 1, "batches": 1, "guard": False}
    adapt = [{"name": "first", "initial": "ties", **options}, {"name": "second", "initial": "first", **options}]
    assert run(write(tmp_path, merges=[{"name": "ties", "method": "Ties"}], adapt=adapt), copied) == 0
    ties, first, second = (
        load_file(copied / "merged" / name / "model.safetensors") for name in ("ties", "first", "second")
    )
    for name, weights in ties.items():
        torch.testing.assert_close(first[name], weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(second[name], weights, rtol=1e-5, atol=1e-6)
    rows = _coefficients_of(copied / "merged" / "first")
    assert set(rows) == {"ties", *TASKS}
    torch.testing.assert_close(rows["ties"], torch.ones_like(rows["ties"]))
    assert rows["upright"].abs().max() < 1e-6


def _coefficients_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "coefficients.safetensors", "pt") as opened:
        models = json.loads(opened.metadata()["models"])
        return dict(zip(models, opened.get_tensor("coefficients"), strict=True))


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
def test_two_processes_learn_one_merge(strategy: str, finished: Path, copied: Path) -> None:
    trainer = {"devices": 2, "accelerator": "cpu", "strategy": strategy}
    adapt = [{"name": "two", "learning_rate": 1e-2, "max_epochs": 1, "batches": 2, "batch_size": 8, "trainer": trainer}]
    settings = write(copied.parent, adapt=adapt)
    script = copied.parent / "command.py"  # ddp starts the very command again, so it must be a file
    script.write_text("from lightning_merge.cli import entry\n\nif __name__ == '__main__':\n    entry()\n")
    command = [sys.executable, str(script), "run", "--config", str(settings), "--output", str(copied)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("adapt-two: ") == 1 and done.stdout.count("Accuracy by task") == 1
    record = json.loads((copied / "merged" / "two" / "adaptation.json").read_text())
    assert record["steps"] == 2 and record["drift"] > 0
    assert Results.load(copied).mean("two") is not None
