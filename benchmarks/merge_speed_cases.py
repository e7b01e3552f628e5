"""What ``merge_speed.py`` merges: checkpoints in the layout of Llama, and each method as we and mergekit spell it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# Hidden size, layers, intermediate size, vocabulary; the smallest one only to have everything imported.
SIZES = {
    "tiny": (64, 1, 128, 100),
    "8M": (128, 2, 384, 32_000),
    "134M": (768, 12, 2048, 32_000),
    "374M": (1024, 24, 2816, 32_000),
}
FINETUNED = ("ft1", "ft2", "ft3")
ALL = ("base", *FINETUNED)


@dataclass(frozen=True)
class Case:
    """One merge: how we spell it, and how mergekit does. Over a base, the base is the first input."""

    label: str
    form: str
    method: str  # the class, or how its name begins, in any case of letters
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: float | None = None
    inputs: tuple[str, ...] = ALL
    over_base: bool = True
    theirs: str = ""
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)


BY_TENSOR = {"density": 0.2, "scope": "tensor", "compat": "mergekit"}
MIDDLE, RANKED = {"density": 0.9, "gamma": 0.01}, {"density": 0.4, "epsilon": 0.1}
CASES = (
    Case("linear", "", "WeightedAverage", {}, 1.0, ALL, False, "linear", {}, {"weight": 1.0}),
    Case(
        "task arithmetic", "", "TaskArithmetic", {"scale": 0.3}, 1.0, ALL, True, "task_arithmetic", {}, {"weight": 0.3}
    ),
    Case("slerp", "", "Slerp", {"t": 0.5}, 1.5, ALL[:2], True, "slerp", {"t": 0.5}),
    Case("dare", "", "Dare", {"drop_rate": 0.9}, 3, ALL, True, "dare_linear", {}, {"weight": 0.3, "density": 0.1}),
    Case("model stock", "", "ModelStock", {}, 2.5, ALL, True, "model_stock"),
    Case("karcher", "", "Karcher", {}, 2.5, FINETUNED, False, "karcher"),
    Case("ties", "tensor, bf16", "Ties", BY_TENSOR, 5, ALL, True, "ties", {}, {"weight": 1.0, "density": 0.2}),
    Case("breadcrumbs", "tensor", "Breadcrumbs", MIDDLE, 5, ALL, True, "breadcrumbs", {}, {"weight": 0.3, **MIDDLE}),
    Case("sce", "", "Sce", {"density": 0.2}, 5, ALL, True, "sce", {"select_topk": 0.2}),
    Case("ties of the model", "model, fp32", "Ties", {"density": 0.2}, 8),
    Case("della", "", "Della", RANKED, 10, ALL, True, "della_linear", {}, {"weight": 0.3, **RANKED}),
    Case("nuslerp", "", "NuSlerp", {}, None, FINETUNED[:2], False, "nuslerp", {}, {"weight": 0.5}),
    Case("multislerp", "", "MultiSlerp", {}, None, ALL, True, "multislerp", {}, {"weight": 1.0}),
    Case("ram", "", "Ram", {}, None, ALL, True, "ram"),
    Case("nearswap", "", "NearSwap", {"t": 1e-3}, None, ALL[:2], True, "nearswap", {"t": 1e-3}),
)


def shapes(hidden: int, layers: int, intermediate: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama whose output layer is not tied."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        found |= {f"{layer}mlp.{part}_proj.weight": (intermediate, hidden) for part in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (hidden, intermediate)
        found |= {f"{layer}{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def checkpoints(folder: Path, size: str) -> dict[str, Path]:
    """Return the folders of a base and its fine-tunes; those that are there already are used again."""
    hidden, layers, intermediate, vocabulary = SIZES[size]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden}
    config |= {"intermediate_size": intermediate, "num_hidden_layers": layers, "vocab_size": vocabulary}
    config |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "rms_norm_eps": 1e-6}
    config |= {"torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu"}
    places = {name: folder / size / name for name in ALL}
    base: dict[str, torch.Tensor] = {}
    for seed, (name, place) in enumerate(places.items()):
        if (place / "config.json").is_file():
            continue
        print(f"making {place}", file=sys.stderr)
        generator = torch.Generator().manual_seed(seed)
        base = base or (load_file(places["base"] / "model.safetensors") if name != "base" else {})
        weights = {}
        for key, shape in shapes(*SIZES[size]).items():
            start = base[key].float() if base else torch.full(shape, 0.0 if len(shape) > 1 else 1.0)
            noise = 1e-3 if base else 0.02 if len(shape) > 1 else 0.0
            weights[key] = (start + noise * torch.randn(shape, generator=generator)).bfloat16()
        place.mkdir(parents=True, exist_ok=True)
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")  # last: it says that all is there
        base = base or weights
    return places
