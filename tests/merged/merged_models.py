"""Tiny live models of each kind with their files, and gradients by autograd through ``functional_call``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_merge import TaskVectors
from lightning_merge.coefficients import Coefficients
from lightning_merge.merged_weights import MergedWeights

MODELS = ("cars", "mnist", "sun")
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


@dataclass
class Case:
    """A live model, batches for it, what is minimised, and the files of its base and fine-tuned models."""

    module: nn.Module
    batches: list[dict[str, Tensor]]
    loss: Loss
    base: Path
    models: dict[str, Path]

    def task_vectors(self, **options: Any) -> TaskVectors:
        return TaskVectors.open(self.base, self.models, check=False, **options)

    def merged(self, module: nn.Module | None = None, initial: Any = 0.3, **options: Any) -> MergedWeights:
        """The live merge with its own coefficient for each tensor, started somewhere uneven."""
        task_vectors = self.task_vectors()
        scalars = Coefficients(task_vectors.names, task_vectors.tensor_names, initial=initial)
        with torch.no_grad():
            uneven = torch.rand(scalars.raw.shape, generator=torch.Generator().manual_seed(1))
            scalars.raw.copy_(uneven if initial == 0.3 else scalars.raw)
        return MergedWeights(self.module if module is None else module, task_vectors, scalars, **options)


def nudge(module: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """A fine-tuned copy: every parameter moved a little, once where it is tied."""
    moved = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return moved


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=4, **SIZES, **NO_DROPOUT)
    return seeded(lambda: ViTForImageClassification(config))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=4, **SIZES, **NO_DROPOUT)
    return seeded(lambda: BertForSequenceClassification(config))


def masked() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return seeded(lambda: BertForMaskedLM(BertConfig(vocab_size=30, max_position_embeddings=16, **SIZES, **NO_DROPOUT)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False, **none)
    return seeded(lambda: GPT2LMHeadModel(config))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=30, max_position_embeddings=16, num_key_value_heads=1, use_cache=False, **SIZES)
    return seeded(lambda: LlamaForCausalLM(config))


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {**SIZES, "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 8, "patch_size": 4}, projection_dim=8)
    return seeded(lambda: CLIPModel(config))


def entropy_of_logits(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Written again here: what is tested does not lend its own."""
    p = module(**batch).logits.float().softmax(-1)
    return -(p * p.log()).sum(-1).mean()


def contrastive(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return module(**batch).logits_per_image.float().log_softmax(-1).diagonal().neg().mean()


def words(seed: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 30, (4, 6), generator=torch.Generator().manual_seed(seed))}


def images(seed: int, channels: int = 1) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(seed))}


def pairs(seed: int) -> dict[str, Tensor]:
    return {**words(seed), **images(seed, 3)}


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]], Loss]] = {
    "vit": (vit, images, entropy_of_logits),
    "bert": (bert, words, entropy_of_logits),
    "masked_bert": (masked, words, entropy_of_logits),
    "gpt2": (gpt2, words, entropy_of_logits),
    "llama": (llama, words, entropy_of_logits),
    "clip": (clip, pairs, contrastive),
}


def make_case(kind: str, folder: Path) -> Case:
    """Build a model, and write it and three fine-tuned ones as transformers does."""
    build, batch, loss = KINDS[kind]
    module = build()
    module.save_pretrained(folder / "base")
    models = {}
    for seed, name in enumerate(MODELS, start=1):
        models[name] = folder / name
        nudge(module, seed).save_pretrained(models[name])
    return Case(module, [batch(7), batch(8)], loss, folder / "base", models)


# --- the independent reference --------------------------------------------------------------------------------------


def autograd_gradient(
    case: Case,
    merged: MergedWeights,
    values: Tensor,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batches: Sequence[dict[str, Tensor]] | None = None,
) -> Tensor:
    """∂L/∂λ by autograd, the merge a part of the graph: weights are substituted in a fresh copy of the module."""
    fresh = copy.deepcopy(case.module)
    for name, parameter in fresh.named_parameters():
        assert parameter.grad is None, name
    task_vectors, leaf = merged.task_vectors, values.detach().clone().requires_grad_(True)
    weights = {}
    for name in merged.parameters:  # what is tied once
        deltas = torch.stack([task_vectors.delta(model, name) for model in task_vectors.names])
        moved = torch.tensordot(leaf[merged.scalars.span(name)], deltas, dims=1)
        weights[merged.names[name]] = task_vectors.base_tensor(name) + moved

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fresh

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return case.loss(self.inner, batch)

    substituted = {f"inner.{name}": weight for name, weight in weights.items()}
    with context():
        total = sum(
            functional_call(Whole(), substituted, (batch,), tie_weights=True)
            for batch in (case.batches if batches is None else batches)
        )
    return torch.autograd.grad(total, leaf)[0].double()


def contracted_gradient(
    case: Case,
    merged: MergedWeights,
    module: nn.Module | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batches: Sequence[dict[str, Tensor]] | None = None,
) -> Tensor:
    """∂L/∂λ as the live merge finds it, over one backward for each batch."""
    module = case.module if module is None else module
    merged.attach()
    try:
        for batch in case.batches if batches is None else batches:
            with context():
                loss = case.loss(module, batch)
            loss.backward()
        return merged.gradient()
    finally:
        merged.detach()


def error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def plain_case(folder: Path, module: nn.Module, batches: list[dict[str, Tensor]], loss: Loss) -> Case:
    """A case of any module, its state dicts in safetensors files."""
    from lightning_merge.weights import save_safetensors

    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors({n: v.clone() for n, v in module.state_dict().items()}, folder / "base.safetensors")
    models = {}
    for seed, name in enumerate(MODELS, start=1):
        models[name] = folder / f"{name}.safetensors"
        save_safetensors({n: v.clone() for n, v in nudge(module, seed).state_dict().items()}, models[name])
    return Case(module, batches, loss, folder / "base.safetensors", models)


# --- a small module of one's own ---------------------------------------------------------------------------------


class Network(nn.Module):
    """Three layers, of which two share a weight, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.norm, self.out = nn.BatchNorm1d(12), nn.Linear(12, 4)
        self.register_buffer("order", torch.arange(12).flip(0))

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.second(torch.relu(self.first(x[:, self.order]))))
        return type("Answer", (), {"logits": self.out(self.norm(hidden))})


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Network().eval()
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2.0)
    return module


def rows(seed: int) -> dict[str, Tensor]:
    return {"x": torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stored(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def with_scalars(task_vectors: TaskVectors) -> tuple[TaskVectors, Coefficients]:
    return task_vectors, Coefficients(task_vectors.names, task_vectors.tensor_names)
