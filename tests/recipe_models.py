"""Small checkpoints of several architectures, with tokenizers, and mergekit recipes over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.weights import save_safetensors

# Words that all tokenizers know, and what some know beside them.
WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(29))]
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _made(kind: str, config: str, seed: int, **options: Any) -> nn.Module:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    with torch.no_grad():  # norms of 1 and biases of 0 would hide what a merge does to them
        generator = torch.Generator().manual_seed(seed)
        for value in model.parameters():
            value += 0.05 * torch.randn(value.shape, generator=generator)
    return model.eval()


def llama(seed: int = 0, vocabulary: int = len(WORDS), **options: Any) -> nn.Module:
    """A language model whose head is a tensor of its own."""
    sizes = {**LLAMA, "vocab_size": vocabulary, "tie_word_embeddings": False, **options}
    return _made("LlamaForCausalLM", "LlamaConfig", seed, **sizes)


def gpt2(seed: int = 0) -> nn.Module:
    """A language model whose head is its embedding."""
    options = {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": len(WORDS), "n_positions": 24}
    return _made("GPT2LMHeadModel", "GPT2Config", seed, **options, bos_token_id=1, eos_token_id=2)


def bert(seed: int = 0) -> nn.Module:
    """A classifier of text."""
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return _made("BertForSequenceClassification", "BertConfig", seed, **options, vocab_size=len(WORDS))


def vit(seed: int = 0) -> nn.Module:
    """A classifier of images."""
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return _made("ViTForImageClassification", "ViTConfig", seed, **options, image_size=8, patch_size=4)


def tokenizer(words: Sequence[str] = WORDS, special: Sequence[str] = (), template: str | None = None) -> Any:
    """A tokenizer that knows whole words, numbered as they are listed, and further special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if special:
        made.add_special_tokens({"additional_special_tokens": list(special)})
    if template is not None:
        made.chat_template = template
    return made


def save(model: nn.Module, folder: Path, tokens: Any = None, dtype: torch.dtype | None = None) -> Path:
    """Write a model's folder as transformers does."""
    (model.to(dtype) if dtype else model).save_pretrained(folder)
    if tokens is not None:
        tokens.save_pretrained(folder)
    return folder


def finetuned(model: nn.Module, seed: int, size: float = 0.02) -> nn.Module:
    """Move every weight of a model a little, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += size * torch.randn(value.shape, generator=generator)
    return model


def save_family(root: Path, kind: str, count: int = 3, dtype: torch.dtype | None = None) -> None:
    """Write ``kind/base`` and its fine-tunings ``kind/a``, ``kind/b``, ... below a folder."""
    make = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit}[kind]
    tokens = tokenizer() if kind in ("llama", "gpt2") else None
    save(make(), root / kind / "base", tokens, dtype)
    for seed, name in enumerate("abcdefg"[:count], 1):
        save(finetuned(make(), seed), root / kind / name, tokens, dtype)


def save_adapter(folder: Path, base: Path, rank: int = 2, seed: int = 0) -> Path:
    """Write a PEFT LoRA adapter over a Llama's folder, without needing peft."""
    generator = torch.Generator().manual_seed(seed)
    config = json.loads((base / "config.json").read_text())
    width, count = config["hidden_size"], config["num_hidden_layers"]
    values: dict[str, Tensor] = {}
    for layer in range(count):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        values[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(rank, width, generator=generator)
        values[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(width, rank, generator=generator)
    folder.mkdir(parents=True)
    save_safetensors(values, folder / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def save_vocabularies(root: Path) -> None:
    """Write Llamas whose tokenizers differ: ``base``; ``a`` with more words; ``b`` with fewer, others and mixed up."""
    from random import Random

    mixed = [*WORDS[:3], *Random(0).sample(WORDS[3:28], 22), "x2", "y1"]
    more = [*WORDS, "x1", "x2"]
    template = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"
    save(llama(), root / "base", tokenizer())
    save(finetuned(llama(vocabulary=len(more) + 1), 1), root / "a", tokenizer(more, ["<|im_end|>"], template))
    save(finetuned(llama(vocabulary=len(mixed) + 2), 2), root / "b", tokenizer(mixed, ["<|im_start|>"]))
