"""Models small enough to merge in no time, and the files they come in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.weights import save_safetensors

WORDS = ("good", "bad", "film", "food", "very", "not", "a", "the", "is", "red", "blue", "green")


def weights(seed: int = 0) -> dict[str, Tensor]:
    """A state dict with a tensor of several chunks, a small one, a 0-d one and an integer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding.weight": torch.randn(700, 400, generator=generator),
        "layer.weight": torch.randn(8, 16, generator=generator),
        "layer.bias": torch.randn(8, generator=generator),
        "temperature": torch.randn((), generator=generator),
        "position_ids": torch.arange(4),
    }


def nudged(state_dict: Mapping[str, Tensor], seed: int, size: float = 0.1) -> dict[str, Tensor]:
    """What fine-tuning might have made of a model: every float entry moved a little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value + size * torch.randn(value.shape, generator=generator)).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in state_dict.items()
    }


def save_three(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Write a base and two fine-tunings as safetensors files."""
    folder.mkdir(parents=True, exist_ok=True)
    base = weights()
    save_safetensors(base, folder / "base.safetensors")
    models = {}
    for seed, name in enumerate(("cars", "sun"), start=1):
        models[name] = folder / f"{name}.safetensors"
        save_safetensors(nudged(base, seed), models[name])
    return folder / "base.safetensors", models


def tiny_bert(seed: int = 0, **options: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**({"vocab_size": 5 + len(WORDS), "max_position_embeddings": 64, **sizes} | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertModel(config).eval()


def tiny_gpt2(seed: int = 0) -> nn.Module:
    """A language model whose output layer is its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=24, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def save_bert(folder: Path, seed: int = 0, shard: str = "1GB") -> Path:
    """Write a tiny BERT with a tokenizer, in shards of at most ``shard``."""
    from transformers import BertTokenizerFast

    tiny_bert(seed).save_pretrained(folder, max_shard_size=shard)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def save_finetuned(folder: Path, base: Path, seed: int, shard: str = "1GB") -> Path:
    """Write a nudged copy of a model's folder."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(base)
    model.load_state_dict(nudged(model.state_dict(), seed, 0.01))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


class Runs:
    """An object whose unpickling touches a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def as_option(models: Mapping[str, Path]) -> str:
    """Models as the command line takes them."""
    return "{" + ", ".join(f"{name}: {path}" for name, path in models.items()) + "}"


def run_python(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a process of its own, on one thread."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
