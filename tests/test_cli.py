from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_files import Runs, as_option, listing, nudged, run_python, save_bert, save_three, tiny_gpt2, weights
from safetensors.torch import load_file

import lightning_merge
from lightning_merge import TaskVectors, merge
from lightning_merge.cli import main
from lightning_merge.methods import Dare, SimpleAverage, TaskArithmetic, Ties, available_methods
from lightning_merge.weights import save_safetensors

Capture = pytest.CaptureFixture[str]


class Place:
    """A folder with a base and two models, and the options that name them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.base, self.models = save_three(folder / "in")

    @property
    def sources(self) -> list[str]:
        return ["--base", str(self.base), "--models", as_option(self.models)]

    def merge(self, *options: str, output: Path | None = None, method: str = "Ties") -> int:
        return main(["merge", "--method", method, *self.sources, "--output", str(output or self.out), *options])

    @property
    def merged(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "model.safetensors")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- verbs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_verbs(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in ("run", "fit", "merge", "evaluate", "methods"))


def test_the_version_is_printed(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-merge {lightning_merge.__version__}\n"


@pytest.mark.parametrize("verb", ["run", "merge", "evaluate", "methods"])
def test_every_verb_has_help(verb: str, capsys: Capture) -> None:
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: lightning-merge {verb}")


def test_an_unknown_verb_is_refused_with_the_nearest(capsys: Capture) -> None:
    assert main(["mergee"]) == 2
    assert "Unknown verb 'mergee'. Known: adapters, evaluate, extract, fit, merge" in (err := capsys.readouterr().err)
    assert err.endswith("Did you mean 'merge'?\n")


def test_methods_are_listed_explained_and_tabled(capsys: Capture) -> None:
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert main(["methods", "--markdown"]) == 0
    markdown = capsys.readouterr().out.splitlines()
    assert len(markdown) == 2 + len(available_methods())
    for name, kind in available_methods().items():
        assert f"\n{name} " in f"\n{table}" and sum(f"| `{name}` |" in line for line in markdown) == 1
        assert kind.paper in table
        assert main(["methods", name]) == 0
        page = capsys.readouterr().out
        assert page.startswith(name) and "Facts:" in page and kind.paper in page
    assert all(line.count(" | ") == 6 for line in markdown[2:])
    assert main(["methods", "Ties"]) == 0
    assert re.search(r"density \(.*\) = 0.2   \(0, 1\]", capsys.readouterr().out)
    assert main(["methods", "Tied"]) == 2
    assert "Unknown method 'Tied'" in (err := capsys.readouterr().err) and "Did you mean 'Ties'?" in err


# --- merging ----------------------------------------------------------------------------------------------------


def test_a_merge_says_what_it_did_and_equals_python(place: Place, tmp_path: Path, capsys: Capture) -> None:
    assert place.merge("--method.density", "0.2", "--method.scale", "0.3") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Merged in ") and "peak memory" in captured.out and captured.err == ""
    assert captured.out.endswith(f"{place.out}\n") and captured.out.count("\n") == 1
    merge(Ties(density=0.2, scale=0.3), TaskVectors.open(place.base, place.models), tmp_path / "python")
    written, expected = listing(place.out), listing(tmp_path / "python")
    assert written.keys() == expected.keys()
    assert all(written[name] == expected[name] for name in ("model.safetensors", "merge.yaml"))
    assert place.merge("--method.scale=0.3") == 0  # density 0.2 is the default: the very same recipe
    assert "already holds this very merge. Nothing to do." in capsys.readouterr().out


def test_transforms_are_added_one_by_one(place: Place) -> None:
    assert (
        place.merge("--transforms+=Dare", "--transforms.drop_rate", "0.5", "--seed", "3", method="TaskArithmetic") == 0
    )
    vectors = TaskVectors.open(place.base, place.models)
    expected = TaskArithmetic()(vectors, transforms=[Dare(drop_rate=0.5)], seed=3)
    assert all(torch.equal(place.merged[name], value) for name, value in expected.items())
    options = ["--transforms+=LwPTV", "--transforms.eta=0.5", "--transforms+=Dare", "--transforms.drop_rate=0.1"]
    assert place.merge(*options, "--overwrite") == 0
    recipe = (place.out / "merge.yaml").read_text()
    assert recipe.index("LwPTV") < recipe.index("eta: 0.5") < recipe.index("Dare") < recipe.index("drop_rate: 0.1")


def test_settings_for_each_model_are_given_by_name(place: Place) -> None:
    assert place.merge("--method.scale", "{cars: 0.5, sun: -0.25}", method="TaskArithmetic") == 0
    expected = TaskArithmetic(scale={"cars": 0.5, "sun": -0.25})(TaskVectors.open(place.base, place.models))
    assert all(torch.equal(place.merged[name], value) for name, value in expected.items())


def test_a_config_is_read_and_options_after_it_win(place: Place, tmp_path: Path) -> None:
    assert place.merge("--method.density", "0.5") == 0
    first = place.merged
    config = ["merge", "--config", str(place.out / "merge.yaml"), "--output"]
    assert main([*config, str(tmp_path / "again")]) == 0
    assert all(torch.equal(load_file(tmp_path / "again/model.safetensors")[name], first[name]) for name in first)
    assert main([*config, str(tmp_path / "other"), "--method.density=0.1"]) == 0
    assert "density: 0.1" in (tmp_path / "other" / "merge.yaml").read_text()


def test_names_that_yaml_takes_for_something_else_stay_text(place: Place, tmp_path: Path) -> None:
    names = ["on", "1", "no", "1.5", "null"]
    place.models = {name: tmp_path / "in" / f"{number}.safetensors" for number, name in enumerate(names)}
    for seed, path in enumerate(place.models.values()):
        save_safetensors(nudged(weights(), seed + 1), path)
    scale = "{on: 0.1, 1: 0.2, no: 0.3, 1.5: 0.4, null: 0.5}"
    assert place.merge("--method.scale", scale, method="TaskArithmetic") == 0
    scales = dict(zip(names, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True))
    expected = TaskArithmetic(scale=scales)(TaskVectors.open(place.base, place.models))
    assert all(torch.equal(place.merged[name], value) for name, value in expected.items())
    again = ["merge", "--config", str(place.out / "merge.yaml"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (place.out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("given", [["--ignore", r"^layer\."], ["--ignore", r'["^layer\\.weight", "bias$"]']])
def test_ignored_tensors_stay_those_of_the_base(place: Place, given: list[str]) -> None:
    assert place.merge(*given, method="SimpleAverage") == 0
    base = load_file(place.base)
    assert torch.equal(place.merged["layer.weight"], base["layer.weight"])
    assert torch.equal(place.merged["layer.bias"], base["layer.bias"])
    assert not torch.equal(place.merged["temperature"], base["temperature"])


def test_dtype_overwrite_and_a_base_of_none(place: Place) -> None:
    assert place.merge("--dtype", "bfloat16", method="SimpleAverage") == 0
    assert place.merged["layer.weight"].dtype == torch.bfloat16
    options = ["--models", as_option(place.models), "--output", str(place.out), "--overwrite"]
    assert main(["merge", "--method", "SimpleAverage", *options]) == 0
    expected = SimpleAverage()(TaskVectors.open(None, place.models))
    assert all(torch.equal(place.merged[name], value) for name, value in expected.items())


def test_a_dry_run_shows_findings_and_writes_nothing(place: Place, tmp_path: Path, capsys: Capture) -> None:
    before = listing(tmp_path)
    assert place.merge("--dry_run") == 0
    captured = capsys.readouterr()
    assert "INFO: Model 'cars' plausibly shares the base" in captured.err
    assert "Would write 1.1 MB to" in captured.out and "Nothing was written." in captured.out
    assert listing(tmp_path) == before


def test_warnings_are_shown_before_a_merge(place: Place, capsys: Capture) -> None:
    shutil.copyfile(place.base, place.models["sun"])
    assert place.merge() == 0
    assert capsys.readouterr().err.startswith("WARN: Model 'sun' equals the base in every sampled tensor")


def test_an_interruption_exits_130(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_merge.merging.merge", interrupt)
    assert place.merge() == 130
    assert "Stopped." in capsys.readouterr().err


# --- bad input --------------------------------------------------------------------------------------------------

Arrange = Callable[[Place], "list[str] | None"]


def changed(model: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Arrange:
    """Change the tensors of one model before the merge."""

    def arrange(place: Place) -> None:
        path = place.models[model]
        state_dict = load_file(path)
        change(state_dict)
        save_safetensors(state_dict, path)

    return arrange


def replaced(name: str, content: Callable[[Place], bytes]) -> Arrange:
    """Put other bytes in the place of one model, under another name."""

    def arrange(place: Place) -> None:
        place.models["sun"] = place.folder / "in" / name
        place.models["sun"].write_bytes(content(place))

    return arrange


def options(*given: str) -> Arrange:
    return lambda place: list(given)


def with_code(place: Place) -> bytes:
    torch.save({"state_dict": load_file(place.base), "x": Runs(place.folder / "ran")}, place.folder / "in" / "tmp")
    return (place.folder / "in" / "tmp").read_bytes()


def another_architecture(place: Place) -> None:
    place.base = save_bert(place.folder / "in" / "bert")
    tiny_gpt2().save_pretrained(place.folder / "in" / "gpt2")
    place.models = {"sun": place.folder / "in" / "gpt2"}


def holds_something_else(place: Place) -> None:
    place.out.mkdir()
    (place.out / "thesis.tex").write_text("mine")


def holds_another_merge(place: Place) -> None:
    place.merge("--method.density=0.7")


def no_models(place: Place) -> None:
    place.models = {}


def nan(state_dict: dict[str, torch.Tensor]) -> None:
    state_dict["layer.bias"][2] = float("nan")


BAD: dict[str, tuple[Arrange, list[str]]] = {
    "unknown method": (options("--method", "Tise"), ["Unknown method 'Tise'", "Breadcrumbs, ", "mean 'Ties'?"]),
    "unknown transform": (options("--transforms+=Dere"), ["Unknown method 'Dere'", "Did you mean 'Dare'?"]),
    "no transform": (options("--transforms+=Ties"), ["Ties is a merge method", "Accepted transforms: Bread"]),
    "unknown setting": (
        options("--method.densty", "0.2"),
        ["Unknown setting of Ties 'densty'", "density, operation, ", "Did you mean 'density'?"],
    ),
    "unknown setting of a transform": (
        options("--transforms+=Dare", "--transforms.droprate=0.1"), ["setting of Dare 'droprate'", "mean 'drop_rate'?"],
    ),
    "unknown option": (options("--dryrun"), ["Unknown option '--dryrun'", "Did you mean '--dry_run'?"]),
    "density 20": (options("--method.density", "20"), ["Ties: density must be in (0, 1], got 20. Did you mean 0.2?"]),
    "density 0": (options("--method.density", "0"), ["Ties: density must be in (0, 1], got 0."]),
    "density nan": (options("--method.density", ".nan"), ["Ties: density must be in (0, 1], got nan."]),
    "density of text": (options("--method.density", "much"), ["Ties: density must be a number", ", got 'much'."]),
    "unknown choice": (
        options("--method.operation", "average"), ["Ties: operation must be one of 'mean', 'sum', got 'average'."],
    ),
    "scale of an unknown model": (
        options("--method", "TaskArithmetic", "--method.scale", "{car: 1, sun: 1}"),
        ["TaskArithmetic: scale names the model 'car'", "Known: cars, sun", "Did you mean 'cars'?"],
    ),
    "another architecture": (another_architecture, ["Model 'sun'", "the architecture 'gpt2' and the base 'bert'"]),
    "missing key": (
        changed("sun", lambda tensors: tensors.pop("layer.bias")),
        ["Model 'sun'", "lacks the tensor 'layer.bias' of the base (1 missing)"],
    ),
    "extra key": (
        changed("sun", lambda tensors: tensors.update(head=torch.zeros(2))),
        ["Model 'sun'", "holds the tensor 'head', which the base lacks (1 extra)", "--ignore REGEX"],
    ),
    "shape": (
        changed("sun", lambda tensors: tensors.update({"layer.bias": torch.zeros(9)})),
        ["Tensor 'layer.bias' has shape [9] in model 'sun'", "[8] in the base", "Expected equal shapes"],
    ),
    "NaN": (changed("sun", nan), ["Tensor 'layer.bias' of", "sun.safetensors' holds NaN", "Expected finite weights"]),
    "no models": (no_models, ["No models to merge. Expected at least one"]),
    "models without names": (options("--models", "[a, b]"), ["--models must be a mapping such as '{cars: A, sun: B}'"]),
    "no safetensors": (
        replaced("sun2.safetensors", lambda place: b"Dear Sir or Madam, " * 50),
        ["sun2.safetensors' is not a safetensors file", "Expected a .safetensors file"],
    ),
    "pickle called safetensors": (
        replaced("sun2.safetensors", lambda place: pickle.dumps(Runs(place.folder / "ran"))),
        ["not a safetensors file"],
    ),
    "unknown suffix": (replaced("sun.txt", lambda place: b"hello"), ["has the unknown suffix '.txt'", "Accepted: "]),
    "pickle with code": (
        replaced("sun.ckpt", with_code),
        ["sun.ckpt' holds an object of", "system, and rebuilding it could run code, so it is not", "Expected plain"],
    ),
    "bare pickle with code": (
        replaced("sun.pt", lambda place: pickle.dumps(Runs(place.folder / "ran"))),
        ["could run code, so it is not loaded"],
    ),
    "truncated": (
        replaced("sun2.safetensors", lambda place: place.base.read_bytes()[:-3]),
        ["sun2.safetensors' is truncated: its header announces", "copy or download it again"],
    ),
    "truncated header": (
        replaced("sun2.safetensors", lambda place: place.base.read_bytes()[:60]),
        ["is truncated or not a safetensors file"],
    ),
    "empty": (replaced("sun2.safetensors", lambda place: b""), ["sun2.safetensors' is not a safetensors file"]),
    "absent": (options("--models", "{sun: no.safetensors}"), ["Nothing is at 'no.safetensors'", "Accepted: "]),
    "output holds something else": (
        holds_something_else, ["out' already holds something else. Expected a new or empty place"],
    ),
    "output holds another merge": (holds_another_merge, ["out' already holds another merge", "or --overwrite"]),
    "no method": (lambda place: ["--method"], ["--method"]),
    "no base": (options("--base", "null"), ["Ties needs a base model", "Expected --base REF"]),
    "needs a score": (options("--method", "GreedySoup"), ["GreedySoup selects by validation and needs a score"]),
    "dtype": (options("--dtype", "float23"), ["Unknown dtype 'float23'. Known: bfloat16", "Did you mean 'float32'?"]),
    "batch_norm": (options("--batch_norm", "mean"), ["Unknown batch_norm 'mean'. Known: average, base."]),
    "seed": (options("--seed", "x"), ["--seed must be an integer, got 'x'."]),
    "pattern": (options("--ignore", "layer("), ["The pattern 'layer(' to ignore is no regular expression"]),
    "config absent": (options("--config", "nowhere.yaml"), ["--config", "nowhere.yaml"]),
    "config of another kind": (lambda place: ["--config", str(place.base)], ["--config"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_2_with_one_message_and_nothing_written(place: Place, case: str, capsys: Capture) -> None:
    arrange, said = BAD[case]
    extra = arrange(place) or []
    before = listing(place.folder)
    capsys.readouterr()
    assert place.merge(*extra) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("lightning-merge merge: error: ")
    message = captured.err.removeprefix("lightning-merge merge: error: ")
    assert message.count("\n") == 1 and message.endswith("\n") and "Traceback" not in message
    assert all(part in message for part in said), message
    assert "jsonargparse" not in message and "Parser key" not in message and "<class" not in message
    assert listing(place.folder) == before
    assert not (place.folder / "ran").exists()


def test_what_is_missing_is_named(place: Place, capsys: Capture) -> None:
    assert main(["merge", *place.sources, "--output", str(place.out)]) == 2
    assert "Missing: --method (or --recipe). See --help." in capsys.readouterr().err
    assert main(["merge", "--method", "Ties", *place.sources]) == 2
    assert "No output. Expected --output FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "method: Ties\nmodls: {a: b}\n",
            ["Unknown option 'modls.a'. Known: base, batch_norm, config", "Did you mean 'models'?"],
        ),
        (
            "method: {class_path: Ties, init_args: {densty: 1}}\n",
            ["setting of Ties 'densty'", "Did you mean 'density'?"],
        ),
        ("method: {class_path: Ties, init_args: {density: 20}}\n", ["Ties: density must be in (0, 1], got 20."]),
        ("method: [1\n", ["config"]),
    ],
)
def test_a_bad_config_is_refused_like_bad_options(
    place: Place, tmp_path: Path, capsys: Capture, text: str, said: list[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["merge", "--config", str(tmp_path / "bad.yaml"), *place.sources, "--output", str(place.out)]) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in said) and err.count("\n") == 1, err
    assert not place.out.exists()


# --- start-up ---------------------------------------------------------------------------------------------------


def test_help_methods_and_a_merge_import_neither_lightning_nor_transformers(place: Place) -> None:
    code = """
import sys
from lightning_merge.cli import main
def imported():
    heavy = ("lightning", "pytorch_lightning", "lightning_fabric", "transformers", "peft", "torchmetrics", "sklearn",
             "scipy", "matplotlib", "datasets", "huggingface_hub")
    return [name for name in heavy if name in sys.modules]
assert main(["--help"]) == 0
assert not imported() and "torch" not in sys.modules, imported()
assert main(["methods"]) == 0
assert not imported(), imported()
assert main(["merge", *sys.argv[1:]]) == 0
assert not imported(), imported()
"""
    done = run_python(code, "--method", "Ties", *place.sources, "--output", place.out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "Merged in" in done.stdout


def test_the_console_script_returns_the_exit_code() -> None:
    code = "import sys; from lightning_merge.cli import entry; sys.argv = ['lightning-merge', 'mergee']; entry()"
    done = run_python(code)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("lightning-merge mergee: error: Unknown verb 'mergee'.")
