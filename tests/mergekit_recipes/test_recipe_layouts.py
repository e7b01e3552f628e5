"""Layers, and what comes before and after them, told from names."""

from __future__ import annotations

import re

import pytest
import recipe_models as made
import torch

from lightning_merge.mergekit.architectures import (
    is_vocabulary,
    layer_count_key,
    layout_of,
    recomputed,
    vocabulary_key,
    with_config_entry,
)
from lightning_merge.weights import TensorInfo


@pytest.mark.parametrize(
    ("kind", "prefix", "count", "embedding", "heads"),
    [
        ("llama", "model.layers", 4, "model.embed_tokens.weight", ("lm_head.weight",)),
        ("gpt2", "transformer.h", 3, "transformer.wte.weight", ("lm_head.weight",)),
        ("bert", "bert.encoder.layer", 3, "bert.embeddings.word_embeddings.weight", ()),
        ("vit", "vit.", 3, None, ()),  # vit.layers or vit.encoder.layer, with the version of transformers
    ],
)
def test_models_of_transformers(kind: str, prefix: str, count: int, embedding: str | None, heads: tuple[str]) -> None:
    model = getattr(made, kind)()
    layout = layout_of(model.state_dict())
    (module,) = layout.modules
    assert module.name == "default" and module.stack is not None
    assert module.stack.prefix.startswith(prefix) and module.stack.count == count
    assert (layout.embedding, layout.heads) == (embedding, heads)
    assert module.before and all(re.search(r"embed|\.w[tp]e\.", name) for name in module.before)
    assert module.after and all(re.search(r"norm|ln_f|head|classifier|pooler", name) for name in module.after)
    layered = {module.stack.name(i, rest) for i, names in module.stack.inside.items() for rest in names}
    assert layered | set(module.before) | set(module.after) == set(model.state_dict())


def test_other_names() -> None:
    names = ["gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.bias", "embed_out.weight", "blocks.0.w", "head.0.w"]
    (module,) = layout_of(names).modules
    assert module.before == ("gpt_neox.embed_in.weight",)
    assert module.after == ("embed_out.weight", "gpt_neox.final_layer_norm.bias", "head.0.w")


def test_numbers_that_leave_one_out_are_no_layers() -> None:
    (module,) = layout_of(["layers.0.w", "layers.2.w"]).modules
    assert module.stack is None


def test_several_modules() -> None:
    names = [
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.w",
        "language_model.model.layers.1.w",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.encoder.layers.0.w",
        "vision_tower.vision_model.post_layernorm.weight",
    ]
    modules = {module.name: module for module in layout_of(names).modules}
    assert set(modules) == {"text_decoder", "vision_tower", "multi_modal_projector"}
    assert modules["text_decoder"].before == ("language_model.model.embed_tokens.weight",)
    assert "language_model.lm_head.weight" in modules["text_decoder"].after
    assert modules["vision_tower"].aliases >= {"vision_model", "vision_tower.vision_model.encoder.layers"}
    config = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 1}}
    assert layer_count_key(config, modules["text_decoder"]) == "text_config.num_hidden_layers"
    assert layer_count_key(config, modules["vision_tower"]) == "vision_config.num_hidden_layers"


def test_an_encoder_and_a_decoder() -> None:
    names = ["shared.weight", "lm_head.weight"]
    names += [f"{part}.block.{i}.layer.0.w" for part, count in (("encoder", 2), ("decoder", 3)) for i in range(count)]
    names += ["encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"]
    modules = {module.name: module for module in layout_of(names).modules}
    assert set(modules) == {"encoder", "decoder", "shared"}
    assert modules["decoder"].after == ("decoder.final_layer_norm.weight",)
    assert (modules["shared"].before, modules["shared"].after) == (("shared.weight",), ("lm_head.weight",))
    assert layer_count_key({"num_layers": 2, "num_decoder_layers": 3}, modules["decoder"]) == "num_decoder_layers"


def test_what_counts_words() -> None:
    assert is_vocabulary("model.embed_tokens.weight", [((32, 8), 32), ((34, 8), 34)])
    assert is_vocabulary("cls.predictions.bias", [((32,), 32)])
    assert not is_vocabulary("model.embed_tokens.weight", [((32, 8), 32), ((34, 8), 36)])
    assert not is_vocabulary("transformer.wpe.weight", [((32, 8), 32)])
    assert not is_vocabulary("bert.embeddings.position_embeddings.weight", [((32, 8), 32)])
    assert not is_vocabulary("bert.embeddings.LayerNorm.weight", [((32,), 32)])
    assert not is_vocabulary("bert.pooler.dense.weight", [((32, 32), 32)])


def test_buffers_that_are_computed_again() -> None:
    assert recomputed("model.layers.0.self_attn.rotary_emb.inv_freq", TensorInfo((4,), torch.float32))
    assert recomputed("h.0.attn.bias", TensorInfo((1, 1, 8, 8), torch.bool))
    assert not recomputed("blocks.0.attn.bias", TensorInfo((8,), torch.float32))
    assert not recomputed("h.0.attn.c_attn.bias", TensorInfo((8,), torch.float32))


def test_config_entries() -> None:
    config = {"text_config": {"vocab_size": 7, "x": 1}, "y": 2}
    assert vocabulary_key(config) == "text_config.vocab_size"
    assert with_config_entry(config, "text_config.vocab_size", 9) == {"text_config": {"vocab_size": 9, "x": 1}, "y": 2}
    assert config["text_config"] == {"vocab_size": 7, "x": 1}
