"""Tiny models and adapters of PEFT over them, as files; and what PEFT itself makes of the two."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_merge.weights import WeightSource, open_weights


def tiny(kind: str, seed: int = 0) -> nn.Module:
    """A model of one of the four families, made from its config."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "llama":
            config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=1, **sizes)
            return transformers.LlamaForCausalLM(config).eval()
        if kind == "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
            ends = {"bos_token_id": 0, "eos_token_id": 0}
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, **sizes, **ends)).eval()
        if kind == "bert":
            return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes)).eval()
        if kind == "vit":
            config = transformers.ViTConfig(image_size=8, patch_size=4, **sizes)
            return transformers.ViTForImageClassification(config).eval()
    raise ValueError(kind)


def save_base(folder: Path, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny model as transformers does."""
    tiny(kind, seed).to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str) -> nn.Module:
    """Load a tiny model from its folder."""
    return type(tiny(kind)).from_pretrained(folder)


def adapt(model: nn.Module, config: Any, seed: int = 1) -> nn.Module:
    """Wrap a model by PEFT, with random numbers in everything the adapter may train."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    randomise(adapted, seed)
    return adapted


def randomise(adapted: nn.Module, seed: int) -> None:
    """Draw everything that would be trained; magnitudes and (IA)³ vectors stay around what they were."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            around = parameter.data if "magnitude" in name or "ia3_l" in name else 0
            parameter.data = around + 0.3 * noise


def save_adapter(folder: Path, base: Path, kind: str, config: Any, seed: int = 1) -> Path:
    """Write a random adapter over a base, as PEFT does."""
    adapted = adapt(load(base, kind), config, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return folder


def merged_by_peft(folder: Path, base: Path, kind: str, adapter: Path) -> WeightSource:
    """What PEFT makes of a base and an adapter: loaded, merged in fp64 and saved, so that names are those of files."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(load(base, kind).double(), adapter).double()
        merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    return open_weights(folder)


def loaded_by_peft(folder: Path, base: Path, kind: str, adapter: Path) -> dict[str, Tensor]:
    """The same as a dictionary."""
    source = merged_by_peft(folder, base, kind, adapter)
    return {name: source.read(name) for name in source.tensors}


def lora(**options: Any) -> Any:
    """A config of PEFT, of rank 3 where nothing else is said."""
    import peft

    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **options})


def edit_config(adapter: Path, **entries: Any) -> None:
    """Change entries of an adapter's config."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def edit_weights(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change an adapter's tensors."""
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def deltas_by_peft(tmp_path: Path, base: Path, kind: str, adapter: Path) -> dict[str, Tensor]:
    """ΔW of every tensor as PEFT applies the adapter, in fp64."""
    held = open_weights(base)
    merged = loaded_by_peft(tmp_path / f"by_peft_{adapter.name}", base, kind, adapter)
    return {name: value - held.read(name).double() for name, value in merged.items()}


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Compare tensor by tensor, relative to the size of each."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        size = value.norm().item() or 1.0
        assert (found[name] - value).norm().item() <= tolerance * size, name


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def finetune(folder: Path, base: Path, kind: str, only: str = "") -> Path:
    """A full model that differs from its base in every floating tensor, or those whose name holds a text."""
    model = load(base, kind)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder
