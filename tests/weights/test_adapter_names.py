"""The names in an adapter against those of its base, and the adapters that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.weights import open_weights
from lightning_merge.weights.adapters import is_adapter, open_adapter

peft = pytest.importorskip("peft")
from adapter_files import adapt, edit_config, edit_weights, load, lora, save_adapter, save_base  # noqa: E402


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(folder / kind, kind) for kind in ("llama", "gpt2", "bert")}


def tie_output_layer(adapter: Path) -> None:
    """Give GPT-2's output layer the update of its embedding, as training with ensure_weight_tying does."""
    head, embedding = "base_model.model.lm_head.lora_", "base_model.model.transformer.wte.lora_embedding_"
    edit_weights(
        adapter,
        lambda held: {
            **held,
            f"{head}A.weight": held[f"{embedding}B"].T.contiguous(),
            f"{head}B.weight": held[f"{embedding}A"].T.contiguous(),
        },
    )


# --- names --------------------------------------------------------------------------------------------------------


def test_a_base_with_or_without_the_prefix_of_the_task_model(bases: dict[str, Path], tmp_path: Path) -> None:
    """Trained over a classifier and opened over its encoder, or the other way round."""
    config = lora(target_modules=["query", "dense"], modules_to_save=["classifier"])
    over_task = save_adapter(tmp_path / "task", bases["bert"], "bert", config)
    encoder = load(bases["bert"], "bert").bert
    encoder.save_pretrained(tmp_path / "encoder")
    wide, narrow = open_adapter(over_task, bases["bert"]), open_adapter(over_task, tmp_path / "encoder")
    name = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(wide.read(f"bert.{name}"), narrow.read(name))
    # the head is the adapter's own: the base has none, as a full model with a head would say
    assert set(narrow.tensors) - set(open_weights(tmp_path / "encoder").tensors) == {
        "classifier.weight",
        "classifier.bias",
    }
    with pytest.raises(UserError, match=r"'classifier\.(bias|weight)', which the base lacks.*--ignore"):
        TaskVectors.open(tmp_path / "encoder", {"a": narrow})
    TaskVectors.open(tmp_path / "encoder", {"a": narrow}, ignore=["classifier"])

    adapted = peft.get_peft_model(encoder, lora(target_modules=["query"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "bare")
    expected = open_adapter(tmp_path / "bare", tmp_path / "encoder")
    found = open_adapter(tmp_path / "bare", bases["bert"])
    assert set(found.modules) == {f"bert.{key}" for key in expected.modules}
    assert torch.equal(found.read(f"bert.{name}"), expected.read(name))


def test_two_ways_to_match_are_refused_and_a_stated_one_taken(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", bases["bert"], "bert", lora(target_modules=["query"]))
    weights = load(bases["bert"], "bert").bert.state_dict()
    towers = {f"{tower}.{name}": value.clone() for tower in ("text", "image") for name, value in weights.items()}
    bare = tmp_path / "bare"
    adapted = peft.get_peft_model(load(bases["bert"], "bert").bert, lora(target_modules=["query"]))
    adapted.save_pretrained(bare)
    with pytest.raises(UserError, match=r"2 ways: with 'text\.' before them or with 'image\.'.*rename"):
        open_adapter(bare, towers)
    found = open_adapter(bare, towers, rename={"^": "image."})
    assert {name.split(".")[0] for name in found.modules} == {"image"}
    with pytest.raises(UserError, match=r"holds no tensor 'sound\.encoder"):
        open_adapter(bare, towers, rename={"^": "sound."})
    with pytest.raises(UserError, match="is no substitution"):
        open_adapter(bare, towers, rename={"(": ""})
    renamed = open_adapter(adapter, towers, rename={r"^bert\.": "text."})
    assert {name.split(".")[0] for name in renamed.modules} == {"text"}


def test_keys_that_fit_nothing_are_named(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules=["q_proj"]))
    bad = {"layers.0.self_attn": "layers.0.self_atn"}
    edit_weights(adapter, lambda held: {k.replace(*next(iter(bad.items()))): v for k, v in held.items()})
    with pytest.raises(
        UserError,
        match=r"updates 'model\.layers\.0\.self_atn\.q_proj', and .* holds no tensor .*Did you mean "
        r"'model\.layers\.0\.self_attn\.q_proj\.weight'",
    ):
        open_adapter(adapter, bases["llama"])


# --- adapters that are refused ------------------------------------------------------------------------------------


def adapter_of(tmp_path: Path, bases: dict[str, Path], **options: Any) -> Path:
    return save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules=["q_proj"], **options))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "ADALORA"}, "of the type ADALORA"),
        ({"peft_type": "PREFIX_TUNING"}, "of the type PREFIX_TUNING"),
        ({"peft_type": "VERA"}, "of the type VERA"),
        ({"peft_type": "LOHA"}, "of the type LOHA"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changed the base's own weights.*path_initial_model"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"r": 0}, "has r: 0"),
        ({"lora_alpha": None}, "has lora_alpha: None"),
        ({"r": 4}, r"have the shapes \[3, 16\] and \[16, 3\], and its config says rank 4"),
        ({"target_modules": ["v_proj"]}, "does not target .*q_proj.*PEFT would leave it out in silence"),
        ({"layers_to_transform": [0]}, r"does not target 'model\.layers\.1"),
        ({"exclude_modules": ["q_proj"]}, "does not target"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    entries: dict[str, Any], message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = adapter_of(tmp_path, bases)
    edit_config(adapter, **entries)
    with pytest.raises(UserError, match=message):
        open_adapter(adapter, bases["llama"])


def test_a_converted_pissa_adapter_is_a_lora_and_an_unconverted_one_is_none(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = peft.get_peft_model(
        load(bases["llama"], "llama"), lora(target_modules=["q_proj"], init_lora_weights="pissa")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    with pytest.raises(UserError, match="'pissa'"):
        open_adapter(tmp_path / "raw", bases["llama"])
    found = open_adapter(tmp_path / "converted", bases["llama"])
    merged = model.merge_and_unload().state_dict()
    for name in found.modules:
        torch.testing.assert_close(found.read(name), merged[name], rtol=1e-5, atol=1e-6)


def test_weights_that_do_not_fit_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, bases)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    whole = load_file(adapter / "adapter_model.safetensors")
    path = adapter / "adapter_model.safetensors"
    for change, message in [
        ({key: None}, r"lacks 'model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight'"),
        ({key: torch.zeros(3, 17)}, r"\[16, 3\] and \[3, 17\], which do not make one of \[16, 16\]"),
        ({"base_model.model.lm_head.lora_C": torch.zeros(1)}, "holds no 'lm_head.lora_C'"),
        ({"base_model.model.score.weight": torch.zeros(1)}, r"modules_to_save \(none\)"),
        (dict.fromkeys(whole), "holds no tensors"),
    ]:
        save_file({k: v for k, v in {**whole, **change}.items() if v is not None}, path)
        with pytest.raises(UserError, match=message):
            open_adapter(adapter, bases["llama"])
    with pytest.raises(UserError, match="no PEFT adapter"):
        open_adapter(bases["llama"], bases["llama"])
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="no config of a PEFT adapter"):
        open_adapter(adapter, bases["llama"])


def test_a_folder_is_told_from_an_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, bases)
    assert is_adapter(adapter) and is_adapter(str(adapter))
    assert not is_adapter(bases["llama"]) and not is_adapter(tmp_path) and not is_adapter({}) and not is_adapter("")


# --- tied weights -------------------------------------------------------------------------------------------------


def test_an_update_of_a_tied_embedding_carries_a_note_and_an_output_layer_of_its_own_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    embedding = save_adapter(tmp_path / "e", bases["gpt2"], "gpt2", lora(target_modules=["wte"]))
    assert "output layer" in open_adapter(embedding, bases["gpt2"]).layout.notes[0]
    head = save_adapter(tmp_path / "h", bases["gpt2"], "gpt2", lora(target_modules=["lm_head"]))
    with pytest.raises(UserError, match=r"updates 'lm_head', which .* is one tensor with the embedding"):
        open_adapter(head, bases["gpt2"])
    both = save_adapter(tmp_path / "b", bases["gpt2"], "gpt2", lora(target_modules=["wte", "lm_head"]))
    with pytest.raises(UserError, match="twice"):
        open_adapter(both, load(bases["gpt2"], "gpt2"))


def test_the_output_layer_of_an_adapter_with_tied_weights_counts_once(bases: dict[str, Path], tmp_path: Path) -> None:
    config = lora(target_modules=["wte", "lm_head"], ensure_weight_tying=True)
    adapter = save_adapter(tmp_path / "a", bases["gpt2"], "gpt2", config)
    with pytest.raises(UserError, match="one tensor with the embedding"):  # this one's two halves have come apart
        open_adapter(adapter, bases["gpt2"])
    tie_output_layer(adapter)
    source = open_adapter(adapter, bases["gpt2"])
    assert list(source.modules) == ["transformer.wte.weight"] and source.layout.notes == ()


# --- square matrices over a base of no known architecture ---------------------------------------------------------


def blocks(order: str) -> torch.nn.Module:
    """A model of which PEFT adapts, in this order, square (s) or wide (w) modules, Linear or (capitals) Conv1D."""
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Module()
    for place, kind in enumerate(order):
        width = 16 if kind in "sS" else 24
        module = Conv1D(width, 16) if kind.isupper() else torch.nn.Linear(16, width)
        module.weight.data = torch.randn(module.weight.shape, generator=generator)
        model.add_module(f"part{place}", module)
    return model


ADAPTERS: dict[str, Any] = {
    "lora": lambda parts: lora(target_modules=parts),
    "dora": lambda parts: lora(target_modules=parts, use_dora=True),
    "ia3": lambda parts: peft.IA3Config(target_modules=parts, feedforward_modules=parts[:1]),
}


def saved_over(model: torch.nn.Module, kind: str, folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Write a random adapter of all parts; return the base's tensors and PEFT's own merge."""
    base = {name: value.clone() for name, value in model.state_dict().items()}
    parts = [name for name, _ in model.named_children()]
    adapted = adapt(model, ADAPTERS[kind](parts))
    adapted.save_pretrained(folder)
    return base, adapted.double().merge_and_unload().state_dict()


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("order", ["ws", "sw", "s", "WS", "SW", "S"])
def test_square_matrices_among_modules_of_one_class_are_what_peft_makes_of_them(
    order: str, kind: str, tmp_path: Path
) -> None:
    base, theirs = saved_over(blocks(order), kind, tmp_path / "a")
    source = open_adapter(tmp_path / "a", base)
    for name in base:
        torch.testing.assert_close(source.read(name), theirs[name].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("order", ["Ws", "wS", "wsW", "Wsw", "wSW"])
def test_square_matrices_where_the_shapes_contradict_the_config_are_refused(
    order: str, kind: str, tmp_path: Path
) -> None:
    """PEFT decides module by module; the config keeps what held for the last one alone."""
    base, _ = saved_over(blocks(order), kind, tmp_path / "a")
    square = f"part{order.lower().index('s')}"
    with pytest.raises(UserError, match=rf"'{square}' is ambiguous: .*fan_in_fan_out.*'part\d'.*model_type gpt2"):
        open_adapter(tmp_path / "a", base)
