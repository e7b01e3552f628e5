"""One adapter out of several, and out of a full model, is what PEFT then loads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import listing
from safetensors.torch import load_file

from lightning_merge.adapter_verbs import adapters as adapters_verb
from lightning_merge.adapter_verbs import extract as extract_verb
from lightning_merge.adapters import merge_adapters
from lightning_merge.errors import UserError
from lightning_merge.methods import Dare, SimpleAverage, TaskArithmetic, Ties, WeightedAverage
from lightning_merge.weights import open_weights, save_safetensors
from lightning_merge.weights.adapters import open_adapter

peft = pytest.importorskip("peft")
from adapter_files import (  # noqa: E402
    check_close,
    deltas_by_peft,
    finetune,
    load,
    loaded_by_peft,
    lora,
    relative,
    save_adapter,
    save_base,
    truncated,
)

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "wpe"],
    "bert": ["query", "output.dense"],
    "vit": ["q_proj", "fc2", "projection"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(folder / kind, kind) for kind in TARGETS}


@pytest.fixture(scope="module")
def three(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """For each family three adapters of other ranks, alphas, scalings and, in part, other modules."""
    folder = tmp_path_factory.mktemp("adapters")
    made: dict[str, dict[str, Path]] = {}
    for kind, targets in TARGETS.items():
        configs = {
            "a": lora(target_modules=targets),
            "b": lora(target_modules=targets, r=2, lora_alpha=7, use_rslora=True),
            "c": lora(target_modules=targets[:1], r=4, rank_pattern={f"1.*{targets[0]}": 1}, lora_alpha=2),
        }
        made[kind] = {
            name: save_adapter(folder / kind / name, bases[kind], kind, config, seed)
            for seed, (name, config) in enumerate(configs.items(), start=1)
        }
    return made


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (None, (1 / 3, 1 / 3, 1 / 3)),
        (WeightedAverage(weights={"a": 3, "b": 1, "c": -2}), (1.5, 0.5, -1.0)),
        (TaskArithmetic(scale={"a": 0.5, "b": -0.25, "c": 1.0}), (0.5, -0.25, 1.0)),
        (TaskArithmetic(scale={"a": 0.0, "b": 0.0, "c": 2.0}), (0.0, 0.0, 2.0)),
    ],
)
def test_a_linear_merge_is_the_sum_of_the_updates(
    kind: str,
    method: Any,
    weights: tuple[float, ...],
    bases: dict[str, Path],
    three: dict[str, dict[str, Path]],
    tmp_path: Path,
) -> None:
    report = merge_adapters(bases[kind], three[kind], tmp_path / "merged", method)
    parts = [deltas_by_peft(tmp_path, bases[kind], kind, adapter) for adapter in three[kind].values()]
    expected = {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in parts[0]}
    check_close(deltas_by_peft(tmp_path, bases[kind], kind, tmp_path / "merged"), expected)
    assert report.errors == {} and report.error == 0


@pytest.mark.parametrize("rank", [1, 4, 100])
def test_a_rank_takes_the_nearest_matrices_and_says_how_near(
    rank: int, bases: dict[str, Path], three: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """The same whether a linear method takes the way of the factors or, after a transform that does nothing, of ΔW."""
    adapters, base = three["llama"], bases["llama"]
    parts = [deltas_by_peft(tmp_path, base, "llama", adapter) for adapter in adapters.values()]
    by_factors = merge_adapters(base, adapters, tmp_path / "factors", rank=rank)
    streamed = merge_adapters(base, adapters, tmp_path / "streamed", transforms=[Dare(drop_rate=0)], rank=rank)
    size = lost = 0.0
    for name in parts[0]:
        mean = sum(part[name] for part in parts) / 3
        if not mean.any():
            continue
        best = truncated(mean, rank)
        module = name.removesuffix(".weight")
        size, lost = size + mean.norm().item() ** 2, lost + (mean - best).norm().item() ** 2
        for report in (by_factors, streamed):
            assert report.errors[module] == pytest.approx(relative(best, mean), abs=1e-7)
            assert report.ranks[module] <= rank
    for report in (by_factors, streamed):
        assert report.error == pytest.approx((lost / size) ** 0.5, abs=1e-7)
        found = deltas_by_peft(tmp_path, base, "llama", report.output)
        expected = {
            name: truncated(sum(part[name] for part in parts) / 3, rank) if parts[0][name].any() else parts[0][name]
            for name in parts[0]
        }
        check_close(found, expected)


def test_updates_far_below_the_weights_are_merged_as_exactly(bases: dict[str, Path], tmp_path: Path) -> None:
    """W₀ + ΔW in fp32 would keep three digits of such a ΔW; what is merged is ΔW."""
    adapters = {}
    for seed, name in enumerate(("a", "b")):
        adapters[name] = save_adapter(
            tmp_path / name, bases["llama"], "llama", lora(target_modules=["q_proj"], lora_alpha=0.0001), seed
        )
    merge_adapters(bases["llama"], adapters, tmp_path / "exact")
    merge_adapters(bases["llama"], adapters, tmp_path / "streamed", transforms=[Dare(drop_rate=0)], rank=16)
    base = open_weights(bases["llama"])
    exact, streamed = (open_adapter(tmp_path / name, base) for name in ("exact", "streamed"))
    for name in exact.modules:
        assert exact.delta(name).norm() < 1e-3 * base.read(name).norm()
        assert relative(streamed.delta(name), exact.delta(name)) < 1e-6


@pytest.mark.parametrize("kind", TARGETS)
def test_any_method_merges_what_adapters_make_of_each_matrix(
    kind: str, bases: dict[str, Path], three: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """At full rank the adapter is the method's merge of the full models; DoRA may take part."""
    dora = save_adapter(tmp_path / "d", bases[kind], kind, lora(target_modules=TARGETS[kind], use_dora=True), 4)
    adapters = {**three[kind], "d": dora}
    method, transforms = Ties(density=0.5, scale=0.7), [Dare(drop_rate=0.3)]
    report = merge_adapters(bases[kind], adapters, tmp_path / "merged", method, transforms, rank=64, seed=5)
    assert report.error < 1e-7
    base = open_weights(bases[kind])
    held = {name: base.read(name).double() for name in base.tensors}
    from lightning_merge import TaskVectors

    models = {
        name: loaded_by_peft(tmp_path / f"full_{name}", bases[kind], kind, path) for name, path in adapters.items()
    }
    only = {name for name in held if any(not torch.equal(model[name], held[name]) for model in models.values())}
    space = TaskVectors.open(
        {name: held[name] for name in only},
        {model: {name: values[name] for name in only} for model, values in models.items()},
        check=False,
    )
    expected = method(space, transforms, seed=5)
    found = deltas_by_peft(tmp_path, bases[kind], kind, tmp_path / "merged")
    for name in only:
        assert relative(found[name], expected[name] - held[name]) < 1e-6, name


def test_dare_depends_on_the_seed_alone(
    bases: dict[str, Path], three: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    def run(name: str, seed: int) -> bytes:
        torch.manual_seed(hash(name) % 1000)  # no global generator has a say
        shuffled = dict(reversed(three["llama"].items())) if name == "again" else three["llama"]
        merge_adapters(
            bases["llama"], shuffled, tmp_path / name, TaskArithmetic(), [Dare(drop_rate=0.5)], rank=8, seed=seed
        )
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    first = run("first", 1)
    assert run("again", 1) == first
    assert run("other", 2) != first


def test_opened_adapters_merge_file_to_file_as_in_memory(
    bases: dict[str, Path], three: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """The engine's threads ask for pieces of matrices; config and dtype are the base's."""
    from lightning_merge import TaskVectors, merge

    base = open_weights(bases["llama"])
    opened = {name: open_adapter(path, base) for name, path in three["llama"].items()}
    method, transforms = TaskArithmetic(scale=0.5), [Dare(drop_rate=0.5)]
    merge(method, TaskVectors.open(base, opened), tmp_path / "out", transforms=transforms, seed=2)
    expected = method(TaskVectors.open(base, opened), transforms, seed=2)
    written = open_weights(tmp_path / "out")
    assert set(written.tensors) == set(expected)
    assert all(torch.equal(written.read(name), expected[name]) for name in expected)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["sources"]["a"]["reference"] == str(three["llama"]["a"])
    assert load(tmp_path / "out", "llama").config.model_type == "llama"


def test_dora_is_refused_by_name_with_the_remedy(
    bases: dict[str, Path], three: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    dora = save_adapter(tmp_path / "d", bases["bert"], "bert", lora(target_modules=["query"], use_dora=True))
    with pytest.raises(UserError, match=r"'d' is a DoRA.*query.*--rank 16.*merge --base"):
        merge_adapters(bases["bert"], {**three["bert"], "d": dora}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "transforms", "message"),
    [
        (Ties(), [], r"What Ties.*no low rank.*--rank 16"),
        (SimpleAverage(), [Dare()], r"Dare.*no low rank"),
        (TaskArithmetic(scale={"a": 1.0, "b": 1.0}), [], "no value for the model 'c'"),
        (TaskArithmetic(scale={"a": 1.0, "b": 1.0, "c": 1, "cc": 1.0}), [], "'cc', which is not there.*Did you mean"),
        (WeightedAverage(weights={"a": 1.0, "b": 1.0}), [], "no value for the model 'c'"),
        (WeightedAverage(weights=1.0, normalize=False), [], "multiplies the base by 3 here"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(
    method: Any,
    transforms: list[Any],
    message: str,
    bases: dict[str, Path],
    three: dict[str, dict[str, Path]],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=message):
        merge_adapters(bases["bert"], three["bert"], tmp_path / "deep" / "out", method, transforms)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_stays_unless_it_is_to_be_replaced(
    bases: dict[str, Path], three: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    base, adapters = bases["bert"], three["bert"]
    merge_adapters(base, adapters, tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"already holds an adapter.*--overwrite"):
        merge_adapters(base, adapters, tmp_path / "out", TaskArithmetic())
    assert listing(tmp_path) == before
    merge_adapters(base, adapters, tmp_path / "out", TaskArithmetic(), overwrite=True)
    assert listing(tmp_path) != before and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="is or holds a source"):
        merge_adapters(base, adapters, adapters["a"], overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        merge_adapters(base, adapters, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_ia3_adapters_merge_by_their_changes(bases: dict[str, Path], tmp_path: Path) -> None:
    """Adding two vectors would scale the weights by their sum; l − 1 is what was learned."""
    config = {"feedforward_modules": ["output.dense"], "modules_to_save": ["classifier"]}
    targets = [["key", "output.dense"], ["key", "value", "output.dense"]]
    adapters = {
        str(seed): save_adapter(
            tmp_path / str(seed), bases["bert"], "bert", peft.IA3Config(target_modules=target, **config), seed
        )
        for seed, target in enumerate(targets)
    }
    merge_adapters(bases["bert"], adapters, tmp_path / "out", TaskArithmetic(scale={"0": 2.0, "1": -1.0}))
    parts = [deltas_by_peft(tmp_path, bases["bert"], "bert", adapter) for adapter in adapters.values()]
    expected = {name: 2 * parts[0][name] - parts[1][name] for name in parts[0]}
    check_close(deltas_by_peft(tmp_path, bases["bert"], "bert", tmp_path / "out"), expected)
    negated = {"0": adapters["0"]}
    merge_adapters(bases["bert"], negated, tmp_path / "negated", TaskArithmetic(scale=-1.0))
    plus, minus = (load_file(path / "adapter_model.safetensors") for path in (adapters["0"], tmp_path / "negated"))
    key = next(key for key in plus if key.endswith("ia3_l"))
    torch.testing.assert_close(minus[key], 2 - plus[key])


def test_biases_and_whole_modules_merge_too(bases: dict[str, Path], tmp_path: Path) -> None:
    configs = {
        "a": lora(target_modules=["query"], bias="all"),
        "b": lora(target_modules=["query", "key"], bias="lora_only", modules_to_save=["classifier"]),
        "c": lora(target_modules=["query", "value"], lora_bias=True),
    }
    adapters = {
        name: save_adapter(tmp_path / name, bases["bert"], "bert", config, seed)
        for seed, (name, config) in enumerate(configs.items())
    }
    parts = [deltas_by_peft(tmp_path, bases["bert"], "bert", adapter) for adapter in adapters.values()]
    mean = {name: sum(part[name] for part in parts) / 3 for name in parts[0]}
    merge_adapters(bases["bert"], adapters, tmp_path / "exact")
    check_close(deltas_by_peft(tmp_path, bases["bert"], "bert", tmp_path / "exact"), mean, 2e-6)
    merge_adapters(bases["bert"], adapters, tmp_path / "streamed", transforms=[Dare(drop_rate=0)], rank=64)
    check_close(deltas_by_peft(tmp_path, bases["bert"], "bert", tmp_path / "streamed"), mean, 2e-6)


def test_a_head_that_the_base_lacks_must_be_left_out(bases: dict[str, Path], tmp_path: Path) -> None:
    bare = load(bases["bert"], "bert").bert
    bare.save_pretrained(tmp_path / "bare")
    config = lora(target_modules=["query"], modules_to_save=["classifier"])
    adapters = {str(s): save_adapter(tmp_path / str(s), bases["bert"], "bert", config, s) for s in range(2)}
    with pytest.raises(UserError, match=r"'0' holds 'classifier\..*base lacks it.*--ignore"):
        merge_adapters(tmp_path / "bare", adapters, tmp_path / "out")
    merge_adapters(tmp_path / "bare", adapters, tmp_path / "out", ignore=["classifier"])
    held = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert held["modules_to_save"] is None
    assert not [key for key in load_file(tmp_path / "out" / "adapter_model.safetensors") if "classifier" in key]


@pytest.mark.parametrize("kind", TARGETS)
def test_peft_finds_every_key_and_misses_none(
    kind: str, bases: dict[str, Path], three: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    merge_adapters(bases[kind], three[kind], tmp_path / "merged")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(load(bases[kind], kind), tmp_path / "merged")
    assert not [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]


def test_the_verbs(
    bases: dict[str, Path], three: dict[str, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = "{" + ", ".join(f"{name}: {path}" for name, path in three["llama"].items()) + "}"
    given = ["--base", str(bases["llama"]), "--adapters", models, "--output"]
    assert adapters_verb([*given, str(tmp_path / "exact"), "--method", "TaskArithmetic", "--method.scale", "0.5"]) == 0
    assert "Merged 3 adapters, exactly" in capsys.readouterr().out
    ties = ["--method", "Ties", "--method.density", "0.5", "--rank", "2"]
    assert adapters_verb([*given, str(tmp_path / "ties"), *ties]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in printed and "relative error" in printed
    with pytest.raises(UserError, match="--base REF"):
        adapters_verb(["--adapters", models, "--output", str(tmp_path / "x")])
    tuned = finetune(tmp_path / "tuned", bases["llama"], "llama")
    asked = ["--base", str(bases["llama"]), "--model", str(tuned), "--output", str(tmp_path / "adapter")]
    assert extract_verb([*asked, "--rank", "2", "--target", "[q_proj, v_proj]"]) == 0
    out, err = capsys.readouterr()
    assert "4 matrices, relative error" in out and "'model.norm.weight'" in err
    record = json.loads((tmp_path / "adapter" / "merge.json").read_text())
    assert record["rank"] == 2 and len(record["relative_errors"]) == 4
    save_safetensors({"w": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="lacks the tensor"):
        extract_verb([*asked[:2], "--model", str(tmp_path / "other.safetensors"), *asked[4:], "--overwrite"])


def test_a_scale_that_varies_over_depth_is_exact_too(
    bases: dict[str, Path], three: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    method = TaskArithmetic(
        scale={"a": [0.2, 1.0], "b": 0.5, "c": [{"tensors": "q_proj", "value": -1.0}, {"value": 0}]}
    )
    merge_adapters(bases["llama"], three["llama"], tmp_path / "out", method)
    parts = [deltas_by_peft(tmp_path, bases["llama"], "llama", adapter) for adapter in three["llama"].values()]
    found = deltas_by_peft(tmp_path, bases["llama"], "llama", tmp_path / "out")
    for layer, depth in ((0, 0.2), (1, 1.0)):
        for end, third in (("self_attn.q_proj", -1.0), ("mlp.down_proj", 0.0)):
            name = f"model.layers.{layer}.{end}.weight"
            expected = depth * parts[0][name] + 0.5 * parts[1][name] + third * parts[2][name]
            assert relative(found[name], expected) < 1e-6
