"""Representation Surgery (Yang et al., 2024, arXiv 2402.02705) and SurgeryV2 (arXiv 2410.14389): the correctors.

A merged model's representation of a task is biased against that of the task's own model. A low-rank corrector for each
task subtracts the bias: on the final representation (V1), or after every residual block and on it (V2).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_merge.errors import UserError, unknown
from lightning_merge.objectives import Outputs
from lightning_merge.weights import save_safetensors

# The site of the final representation; every other site is the path of a block.
FINAL = "features"
FILE = "surgery.safetensors"


class Corrector(nn.Module):
    """One low-rank correction: ``ẑ = z - Up(relu(Down z))``, along the last axis.

    Down, of shape ``(rank, d)``, starts uniform in ±1/√d (Kaiming with a = √5) and Up, ``(d, rank)``, at 0, so that a
    new corrector is the identity. There is no bias. Until the width is known both are empty.

    Args:
        dim: d; by default that of the first features seen.
        rank: The rank, at least 1.
        seed: Of Down's start; the caller's random state is neither read nor moved.

    Raises:
        UserError: A rank below 1, or features of another width.

    Example:
        >>> corrector = Corrector(3, rank=2)
        >>> corrector.down.data = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> corrector.up.data = torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.0, 0.0]])
        >>> corrector(torch.tensor([1.0, 2.0, -1.0])).tolist()
        [1.0, 1.0, -1.0]
    """

    def __init__(self, dim: int | None = None, rank: int = 16, seed: int = 0) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UserError(f"Corrector: rank must be an integer from 1, got {rank}.")
        self.rank, self.seed = rank, seed
        self.down = nn.Parameter(torch.empty(0))
        self.up = nn.Parameter(torch.empty(0))
        if dim is not None:
            self.begin(dim, torch.device("cpu"))

    @property
    def dim(self) -> int:
        """The width d; 0 while it is unknown."""
        return self.down.shape[-1]

    def start(self, dim: int) -> Tensor:
        """Return Down as it starts, ``(rank, dim)``."""
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.rand(self.rank, dim, generator=generator) * 2 - 1) / dim**0.5

    def begin(self, dim: int, device: torch.device) -> None:
        """Take the width; the parameters stay the objects that an optimizer holds."""
        with torch.inference_mode(False), torch.no_grad():
            self.down.data = self.start(dim).to(device)
            self.up.data = torch.zeros(dim, self.rank, device=device)

    def bias(self, features: Tensor) -> Tensor:
        """Return what is subtracted, ``(..., d)``."""
        if not self.dim:
            self.begin(features.shape[-1], features.device)
        if self.down.device != features.device:
            with torch.inference_mode(False):
                self.to(features.device)  # hooks are no submodules: nothing else takes them where the module goes
        if features.shape[-1] != self.dim:
            raise UserError(f"A corrector of width {self.dim} got features of shape {tuple(features.shape)}.")
        hidden = functional.relu(functional.linear(features.to(self.down.dtype), self.down))
        return functional.linear(hidden, self.up).to(features.dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Return the corrected features, of the shape and dtype they have."""
        return features - self.bias(features)


class Correctors(nn.Module):
    """One :class:`Corrector` for each task and site; no two share a number.

    Args:
        tasks: The tasks.
        blocks: The paths of the blocks after which V2 corrects; none for V1, which corrects the final representation.
        rank: The rank of each, at least 1 (the paper: 16; it reports that higher is better).
        seed: Of the first values, different for each task and site.
        features: What the final representation is called in the module, kept for the file's readers.

    Raises:
        UserError: A rank below 1, no task, or a task named twice.

    Cost: 2 · rank · d numbers for each task and site; a forward pass uses one task's.
    """

    def __init__(
        self, tasks: Iterable[str], blocks: Sequence[str] = (), rank: int = 16, seed: int = 0, features: str = ""
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"Correctors: expected one task or more, each named once, got {list(self.tasks)}.")
        self.sites = (*blocks, FINAL)
        self.rank, self.seed, self.features = rank, seed, features
        self._correctors = nn.ModuleList(
            Corrector(None, rank, _seed(seed, task, site)) for task in self.tasks for site in self.sites
        )

    @property
    def version(self) -> int:
        """1 where only the final representation is corrected, 2 where blocks are too."""
        return 2 if len(self.sites) > 1 else 1

    @property
    def trained_tasks(self) -> tuple[str, ...]:
        """The tasks whose correctors have seen features."""
        return tuple(task for task in self.tasks if self.of(task, FINAL).dim)

    def of(self, task: str, site: str = FINAL) -> Corrector:
        """Return the corrector of a task at a site.

        Raises:
            UserError: No corrector for the task.
        """
        if task not in self.tasks:
            raise unknown("task of a corrector", task, self.tasks)
        place = self.tasks.index(task) * len(self.sites) + self.sites.index(site)
        corrector = self._correctors[place]
        assert isinstance(corrector, Corrector)
        return corrector

    def size(self, task: str | None = None) -> int:
        """Return how many numbers are stored, or how many of them act for one task."""
        tasks = self.tasks if task is None else (task,)
        return sum(parameter.numel() for name in tasks for parameter in self.parameters_of(name))

    def parameters_of(self, task: str) -> list[nn.Parameter]:
        """Return the parameters that serve one task, site by site."""
        return [parameter for site in self.sites for parameter in self.of(task, site).parameters()]

    def forward(self, features: Tensor, task: str, site: str = FINAL) -> Tensor:
        """Return the features corrected for a task at a site."""
        return self.of(task, site)(features)

    # --- what is learned ------------------------------------------------------------------------------------------

    def learned(self) -> dict[str, Tensor]:
        """Return a copy of all parameters on the host, by ``task/site/down`` and ``task/site/up``."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self._named()}

    @torch.no_grad()
    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`learned` gave.

        One that was kept before its width was known is as it starts where the width is known now.

        Raises:
            UserError: Another set of tasks and sites, or another rank.
        """
        own = dict(self._named())
        if set(own) != set(learned):
            odd = sorted(set(own) ^ set(learned))[0]
            raise UserError(f"Correctors do not fit: '{odd}' is not in both. Expected the same tasks and sites.")
        for name, parameter in own.items():
            values = learned[name]
            if values.numel() and values.shape[0 if name.endswith("/down") else -1] != self.rank:
                raise UserError(f"Correctors do not fit: '{name}' has shape {tuple(values.shape)}, rank {self.rank}.")
            if parameter.shape == values.shape:
                parameter.copy_(values)
            elif values.numel():
                parameter.data = values.to(parameter.device, parameter.dtype, copy=True)
        for task in self.tasks:
            for site in self.sites:
                corrector = self.of(task, site)
                if corrector.dim and not learned[f"{task}/{site}/down"].numel():
                    corrector.begin(corrector.dim, corrector.down.device)

    def drift(self) -> float:
        """Return the root mean square of how far all parameters are from where they started."""
        squares, count = 0.0, 0
        for corrector in self._correctors:
            assert isinstance(corrector, Corrector)
            if corrector.dim:
                moved = corrector.down.detach().cpu().double() - corrector.start(corrector.dim)
                squares += float(moved.square().sum() + corrector.up.detach().double().square().sum())
                count += moved.numel() + corrector.up.numel()
        return (squares / count) ** 0.5 if count else 0.0

    def table(self) -> dict[str, dict[str, float]]:
        """Return by task and site the root mean square of Up, which is 0 where nothing is corrected."""
        return {task: self._row(task) for task in self.tasks}

    def _row(self, task: str) -> dict[str, float]:
        ups = {site: self.of(task, site).up.detach().double() for site in self.sites}
        return {site: float(up.square().mean()) ** 0.5 if up.numel() else 0.0 for site, up in ups.items()}

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{task}/{site}/{name}", parameter)
            for task in self.tasks
            for site in self.sites
            for name, parameter in self.of(task, site).named_parameters()
        ]

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trained tasks' correctors as one small safetensors file; a folder gets ``surgery.safetensors``.

        Raises:
            UserError: No corrector has seen features yet.
        """
        tasks = self.trained_tasks
        if not tasks:
            raise UserError("There is nothing to save: no corrector has seen features yet. Expected a fit first.")
        metadata = {
            "kind": "surgery",
            "version": str(self.version),
            "rank": str(self.rank),
            "tasks": json.dumps(tasks),
            "sites": json.dumps(self.sites),
            "widths": json.dumps([self.of(tasks[0], site).dim for site in self.sites]),
            "features": self.features,
        }
        kept = {name: values for name, values in self.learned().items() if values.numel()}
        save_safetensors(kept, _file(path), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Correctors:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: The file is missing or unreadable, or its parts contradict each other.
        """
        from safetensors import safe_open

        file = _file(path)
        if not file.is_file():
            raise UserError(f"Correctors '{file}' do not exist. Expected a file that a surgery has saved.")
        try:
            with safe_open(str(file), framework="pt") as source:
                facts = source.metadata() or {}
                tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118 - not a mapping
            tasks, sites, widths = (json.loads(facts[name]) for name in ("tasks", "sites", "widths"))
            correctors = cls(tasks, sites[:-1], int(facts["rank"]), features=facts.get("features", ""))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"Correctors '{file}' cannot be read: {error}. Expected a surgery's file.") from error
        for name, values in tensors.items():
            width = dict(zip(sites, widths, strict=True)).get(name.split("/")[-2], -1)
            shape = (correctors.rank, width) if name.endswith("/down") else (width, correctors.rank)
            if tuple(values.shape) != shape or not bool(values.isfinite().all()):
                raise UserError(f"Correctors '{file}': '{name}' must be finite and of shape {shape}.")
        correctors.restore(tensors)
        return correctors.requires_grad_(False).eval()


def surgery_loss(found: Outputs, individual: Outputs) -> Tensor:
    """Return the distance of corrected representations to those of the task's individual model.

    The mean absolute difference of final representations (V1, equation 4); for V2 that of the mean token after each
    block is added, block by block. All targets are what the individual model computes from the raw inputs by itself,
    not from the merged model's activations, and take no gradient; V2's terms are minimised together, so that a
    corrector also serves the blocks after it.

    Args:
        found: The corrected model's answer: ``features`` and, by the path of a block, ``extra``.
        individual: The individual model's.
    """
    assert found.features is not None and individual.features is not None
    total = functional.l1_loss(found.features.float(), individual.features.detach().float())
    for block, tokens in found.extra.items():
        total = total + functional.l1_loss(tokens.float(), individual.extra[block].detach().float())
    return total


def _seed(seed: int, task: str, site: str) -> int:
    digest = hashlib.blake2b(json.dumps(["corrector", seed, task, site]).encode(), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


def _file(path: str | os.PathLike[str]) -> Path:
    given = Path(path)
    return given / FILE if given.is_dir() or not given.suffix else given
