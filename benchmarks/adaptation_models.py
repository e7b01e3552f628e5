"""Vision transformers with a head for each task, their files, one step of learning, and what it holds in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_merge import TaskVectors
from lightning_merge.coefficients import Coefficients
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.objectives import Entropy, Outputs

CLASSES, BATCH = 10, 16
# Names by their parameters: hidden size, layers, heads, image size, patch size, colours.
SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "tiny": (32, 2, 2, 8, 4, 1),
    "2.7M": (192, 6, 3, 28, 4, 3),
    "21M": (384, 12, 6, 28, 4, 3),
    "B/32": (768, 12, 12, 224, 32, 3),
    "L/14": (1024, 24, 16, 224, 14, 3),
}


class Tasks(nn.Module):
    """One encoder and a frozen head for each of T tasks."""

    def __init__(self, size: str, tasks: int) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

        hidden, layers, heads, image, patch, colours = SIZES[size]
        sizes = {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
            "image_size": image,
            "patch_size": patch,
            "num_channels": colours,
        }
        torch.manual_seed(0)
        if "/" in size:
            self.encoder = CLIPVisionModel(CLIPVisionConfig(**sizes))
        else:
            none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            self.encoder = ViTModel(ViTConfig(**sizes, **none), add_pooling_layer=False)
        self.heads = nn.ModuleList([nn.Linear(hidden, CLASSES).requires_grad_(False) for _ in range(tasks)])
        self.eval()

    def forward(self, pixels: Tensor, task: int) -> Tensor:
        return self.heads[task](self.encoder(pixels).last_hidden_state[:, 0])


def batches(size: str, tasks: int, device: str = "cpu", rows: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """One batch of pixels and labels for each task."""
    _, _, _, image, _, colours = SIZES[size]
    generator = torch.Generator().manual_seed(1)
    pixels = [torch.randn(rows, colours, image, image, generator=generator) for _ in range(tasks)]
    labels = [torch.randint(CLASSES, (rows,), generator=generator) for _ in range(tasks)]
    return [(x.to(device), y.to(device)) for x, y in zip(pixels, labels, strict=True)]


def make_files(size: str, tasks: int, folder: Path) -> tuple[Path, dict[str, Path]]:
    """Write the encoder and T models, base + N(0, 0.01²), once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in Tasks(size, 1).encoder.state_dict().items()}
    paths = {f"task_{place:02}": folder / f"task_{place:02}.safetensors" for place in range(tasks)}
    if not (folder / "base.safetensors").is_file():
        save_file(weights, folder / "base.safetensors")
    for seed, path in enumerate(paths.values()):
        if not path.is_file():
            generator = torch.Generator().manual_seed(seed)
            save_file({n: v + 0.01 * torch.randn(v.shape, generator=generator) for n, v in weights.items()}, path)
    return folder / "base.safetensors", paths


def task_vectors(size: str, tasks: int, folder: Path) -> TaskVectors:
    """Open T models over their base."""
    return TaskVectors.open(*make_files(size, tasks, folder), check=False)


def live_merge(module: nn.Module, vectors: TaskVectors, **options: Any) -> MergedWeights:
    """Merge into the module, a coefficient for each model and tensor."""
    scalars = Coefficients(vectors.names, vectors.tensor_names)
    device = next(module.parameters()).device
    return MergedWeights(module, vectors, scalars.to(device), prefix="encoder.", **options)


# --- what is compared ---------------------------------------------------------------------------------------------


def plain_step(module: Tasks, data: list[tuple[Tensor, Tensor]], autocast: torch.dtype | None = None) -> None:
    """Supervised forward and backward over the batches, gradients accumulated: what any training pays."""
    for task, (pixels, labels) in enumerate(data):
        with torch.autocast(pixels.device.type, autocast, enabled=autocast is not None):
            loss = nn.functional.cross_entropy(module(pixels, task).float(), labels) / len(data)
        loss.backward()


def adaptation_step(
    module: Tasks, merged: MergedWeights, data: list[tuple[Tensor, Tensor]], autocast: torch.dtype | None = None
) -> None:
    """Entropy of the same batches, the gradients contracted in the last backward pass."""
    objective = Entropy()
    for task, (pixels, _) in enumerate(data):
        merged.keep_gradients = task + 1 < len(data)
        with torch.autocast(pixels.device.type, autocast, enabled=autocast is not None):
            logits = module(pixels, task)
        (objective(Outputs(str(task), logits=logits)) / len(data)).backward()


def learn(merged: MergedWeights, optimizer: torch.optim.Optimizer) -> None:
    """One step of the coefficients, and the weights that follow from it."""
    optimizer.zero_grad()
    merged.backward()
    optimizer.step()
    merged.materialise()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are alive at once; workspaces inside an operation are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def _meet(self, tensor: Tensor, made: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made else 0

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._meet(value, made=False)  # it was there before
        found = func(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, Tensor):
                self._meet(value, made=True)
        return found


def transient_bytes(work: Callable[[], object]) -> int:
    """Most bytes that were alive at once of those made in a piece of work."""
    with LiveBytes() as live:
        work()
    return live.peak
