"""PEFT adapters seen as the full models they stand for: W₀ + ΔW over a base, matrix by matrix, exactly.

LoRA (Hu et al., 2021, arXiv 2106.09685), rank-stabilised (Kalajdzievski, 2023, arXiv 2312.03732) or weight-decomposed
(DoRA: Liu et al., 2024, arXiv 2402.09353), and (IA)³ (Liu et al., 2022, arXiv 2205.05638). Nothing of peft is needed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.weights.adapter_config import CONFIG_FILE, AdapterConfig, read_adapter_config
from lightning_merge.weights.adapter_layout import AdaptedModule, Layout, lay_out
from lightning_merge.weights.opening import open_weights, read_checkpoint, resolve_path
from lightning_merge.weights.source import (
    MemorySource,
    SafetensorsSource,
    WeightSource,
)
from lightning_merge.weights.tensor_info import TensorInfo

WEIGHTS_FILE = "adapter_model.safetensors"
OLD_WEIGHTS_FILE = "adapter_model.bin"
# Of computed matrices, as many as this are kept for the next piece; the latest one always.
CACHE_BYTES = 128 << 20
# Products of factors are made for this many entries at once, in fp64.
_BLOCK = 1 << 20


class AdapterSource(WeightSource):
    """An adapter over its base, read as the full model that PEFT's ``merge_and_unload`` would make, before rounding.

    Attributes:
        base: The base.
        adapter: The adapter's own file.
        adapter_config: Its config.
        adapter_folder: Its folder; ``folder`` is the base's, with config and tokenizer.
        layout: What it updates, by the base's names.
    """

    def __init__(
        self,
        label: str,
        base: WeightSource,
        adapter: WeightSource,
        config: AdapterConfig,
        layout: Layout,
    ) -> None:
        self.label, self.base, self.adapter, self.adapter_config = label, base, adapter, config
        self.adapter_folder = config.path.parent
        self.layout, self.modules, self.biases, self.replaced = layout, layout.modules, layout.biases, layout.replaced
        self.folder, self.buffers, self.aliases = base.folder, base.buffers, dict(base.aliases)
        self.files = (*adapter.files, config.path, *base.files)
        self.computed, self.card_folder, self.notes = True, self.adapter_folder, layout.notes
        self.inner = (adapter,)  # the base counts what is read of it itself
        self.tensors = dict(base.tensors)
        for name, key in self.replaced.items():
            self.tensors[name] = adapter.tensors[adapter.stored_name(key) or key]
        for name in (*self.modules, *self.biases):
            double = base.tensors[name].dtype == torch.float64
            self.tensors[name] = TensorInfo(self.tensors[name].shape, torch.float64 if double else torch.float32)
        self._reset()

    def _reset(self) -> None:
        self._computed: OrderedDict[str, Future[Tensor]] = OrderedDict()
        self._guard = threading.Lock()

    @property
    def config(self) -> dict[str, Any] | None:
        """The ``config.json`` of the base."""
        return self.base.config

    def over(self, base: WeightSource) -> AdapterSource:
        """Return the same adapter over another source of the same weights, or of some of them."""
        return AdapterSource(self.label, base, self.adapter, self.adapter_config, self.layout.among(base.tensors))

    def read(self, name: str) -> Tensor:
        """Return the tensor called ``name``: computed where it is updated, else as the base or the adapter has it.

        Threads that ask for one tensor at a time share one computation.
        """
        name = self.aliases.get(name, name)
        if name not in self.modules and name not in self.biases:
            return self._whole(name)
        with self._guard:
            future, mine = self._computed.get(name), False
            if future is None:
                future, mine = Future(), True
                self._computed[name] = future
                self._forget()
            self._computed.move_to_end(name)
        if mine:
            try:
                future.set_result(self._compute(name))
            except BaseException as error:
                with self._guard:
                    self._computed.pop(name, None)
                future.set_exception(error)
        return future.result()

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return the entries ``start:stop`` of the flattened tensor; of what is not computed no more than those."""
        name = self.aliases.get(name, name)
        if name in self.modules or name in self.biases:
            return self.read(name).reshape(-1)[start:stop]
        if name in self.replaced:
            return self.adapter.read_flat(self.replaced[name], start, stop)
        return self.base.read_flat(name, start, stop)

    def _forget(self) -> None:
        """Let go of the matrices that were asked for longest ago, beyond what may be kept."""
        while len(self._computed) > 1 and sum(self.tensors[name].nbytes for name in self._computed) > CACHE_BYTES:
            self._computed.popitem(last=False)

    def delta(self, name: str) -> Tensor:
        """Return ΔW of an updated tensor in fp64, in the base's orientation, not rounded."""
        if name in self.modules and name not in self.replaced:
            module = self.modules[name]
            if module.kind != "ia3" and not module.is_dora:
                left, right = self._sides(module)
                return (left @ right).reshape(self.tensors[name].shape)
        return self._updated(name, torch.float64) - self.base.read(name).double()

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return ``(out, r)`` and ``(r, in)`` in fp64 whose product is ΔW as the module sees it, the scaling included.

        Raises:
            UserError: The tensor's update is no product of two factors (DoRA, (IA)³).
        """
        module = self.modules[name]
        if module.kind == "ia3" or module.is_dora:
            raise UserError(
                f"The adapter '{self.label}' updates '{module.name}' by {'DoRA' if module.is_dora else '(IA)³'}, "
                "which is no product of two factors. Expected a LoRA."
            )
        return self._product(module)

    def _product(self, module: AdaptedModule) -> tuple[Tensor, Tensor]:
        """The two factors as the module sees them; DoRA scales the rows after adding their product."""
        embedding = module.kind == "embedding"
        keys = ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_B.weight", "lora_A.weight")
        up, down = (self.adapter.read(module.keys[key]).to("cpu", torch.float64) for key in keys)
        return up.flatten(1) * module.scaling, down.flatten(1)

    def _sides(self, module: AdaptedModule) -> tuple[Tensor, Tensor]:
        """The two factors in the orientation in which the base stores the matrix."""
        up, down = self._product(module)
        return (down.T, up.T) if module.transposed or module.kind == "embedding" else (up, down)

    def _whole(self, name: str) -> Tensor:
        """The tensor before the update: as the adapter holds it, or as the base does."""
        return self.adapter.read(self.replaced[name]) if name in self.replaced else self.base.read(name)

    def _compute(self, name: str) -> Tensor:
        return self._updated(name, self.tensors[name].dtype)

    def _updated(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return an updated tensor, computed in fp64 and rounded once."""
        before = self._whole(name).detach().to("cpu")
        if name in self.biases:
            return self._updated_bias(name, before.double()).to(dtype)
        if name not in self.modules:
            return before.to(dtype)
        module = self.modules[name]
        if module.kind == "ia3":
            scale = self.adapter.read(module.keys["ia3_l"]).to("cpu", torch.float64).flatten()
            # One factor for each output is one for each row of an (out, in) matrix.
            rows = module.feedforward == module.transposed
            shape = [-1 if axis == (0 if rows else 1) else 1 for axis in range(before.dim())]
            return (before.double() * scale.reshape(shape)).to(dtype)
        left, right = self._sides(module)
        matrix = before.reshape(before.shape[0], -1)
        if module.is_dora:
            magnitude = self.adapter.read(module.keys["lora_magnitude_vector"]).to("cpu", torch.float64).flatten()
            values = matrix.double().addmm_(left, right)
            # One norm for each output: a column of an (in, out) matrix, or of an embedding, which is looked up in rows.
            by_column = module.transposed or module.kind == "embedding"
            norm = values.norm(dim=0 if by_column else 1, keepdim=True)
            scale = torch.where(norm == 0, 0.0, magnitude.reshape(norm.shape) / norm)
            return (values * scale).to(dtype).reshape(before.shape)
        after = torch.empty(matrix.shape, dtype=dtype)
        step = max(1, _BLOCK // max(1, matrix.shape[1]))
        for start in range(0, len(matrix), step):
            rows_before = matrix[start : start + step].double()
            change = left[start : start + step] @ right
            # Where nothing is added the base's own entry stays: adding +0 would turn a −0 into +0.
            after[start : start + step] = torch.where(change == 0, rows_before, rows_before + change)
        return after.reshape(before.shape)

    def _updated_bias(self, name: str, before: Tensor) -> Tensor:
        module = self.biases[name]
        if module.kind == "ia3":
            return before * self.adapter.read(module.keys["ia3_l"]).to("cpu", torch.float64).flatten()
        return before + module.scaling * self.adapter.read(module.keys["lora_B.bias"]).to("cpu", torch.float64)

    def __getstate__(self) -> dict[str, Any]:
        # Neither locks nor computed matrices travel to another process.
        return {key: value for key, value in self.__dict__.items() if key not in {"_computed", "_guard"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def open_adapter(
    ref: str | Path, base: Any, label: str | None = None, rename: Mapping[str, str] | None = None
) -> AdapterSource:
    """Open a PEFT adapter as the full model W₀ + ΔW over its base, without reading the values of either.

    Updated tensors are computed when they are read, in fp64, and rounded once into fp32 (fp64 where the base is stored
    in fp64), so that a small update is not lost in the rounding of a bf16 base. All others are the base's own.

    Args:
        ref: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or ``owner/name@revision``.
        base: The model it was trained over: a :class:`WeightSource`, or anything
            :func:`~lightning_merge.weights.open_weights` opens.
        label: How messages call the adapter; its reference by default.
        rename: Regular expressions and their replacements that turn the adapter's names into the base's, where the
            rule of :func:`~lightning_merge.weights.adapter_names.match_names` does not find them.

    Raises:
        UserError: The folder holds no adapter, one of a kind that is no update of the weights, one whose keys its
            config does not explain, or one that does not fit the base.

    Cost: headers. A read of an updated m x n matrix takes 2 m n r operations and m n entries of memory (DoRA: 3 in
    fp64); up to 128 MiB of matrices, and always the last, are kept for the next piece.
    Reference: Hu et al., 2021, arXiv 2106.09685; Liu et al., 2024 (DoRA), arXiv 2402.09353, equation 5.

    Example:
        >>> import json, tempfile
        >>> from lightning_merge.weights import save_safetensors
        >>> folder = Path(tempfile.mkdtemp())
        >>> factors = {"lora_A": torch.tensor([[1.0, 2.0]]), "lora_B": torch.tensor([[1.0], [3.0]])}
        >>> factors = {f"base_model.model.layer.{part}.weight": value for part, value in factors.items()}
        >>> save_safetensors(factors, folder / "adapter_model.safetensors")
        >>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 0.5, "target_modules": ["layer"]}
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps(config))
        >>> open_adapter(folder, {"layer.weight": torch.ones(2, 2)}).read("layer.weight")
        tensor([[1.5000, 2.0000],
                [2.5000, 4.0000]])
    """
    path = resolve_path(ref)
    folder = path if path.is_dir() else path.parent
    called = label or str(ref)
    config = read_adapter_config(folder, called)
    adapter = _open_file(folder, called)
    opened = open_weights(base)
    return AdapterSource(called, opened, adapter, config, lay_out(called, opened, adapter, config, rename))


def is_adapter(ref: Any) -> bool:
    """Tell whether a reference is a local folder that holds a PEFT adapter and no full model."""
    if not isinstance(ref, (str, Path)) or not str(ref).strip():
        return False
    folder = Path(ref).expanduser()
    return (folder / CONFIG_FILE).is_file() and not (folder / "model.safetensors").is_file()


def _open_file(folder: Path, label: str) -> WeightSource:
    if (folder / WEIGHTS_FILE).is_file():
        return SafetensorsSource(label, [folder / WEIGHTS_FILE])
    if (folder / OLD_WEIGHTS_FILE).is_file():
        path = folder / OLD_WEIGHTS_FILE
        return MemorySource(label, read_checkpoint(path), files=(path,))
    raise UserError(f"The adapter '{label}' lacks its weights. Expected {WEIGHTS_FILE} beside {CONFIG_FILE}.")
