"""What an adapter updates in its base: its keys and its config against the base's headers."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from lightning_merge.errors import UserError
from lightning_merge.weights.adapter_config import CONFIG_FILE, AdapterConfig
from lightning_merge.weights.adapter_names import OUTPUT_LAYERS, Key, Rename, match_names, parse_key, weight_of
from lightning_merge.weights.source import WeightSource

# transformers' Conv1D stores (in, out); of square matrices no shape tells.
_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}
OF_KNOWN_LAYOUT = f"whose config.json has the model_type {' or '.join(_CONV1D)}"
_BARE_PARTS = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "ia3_l")


@dataclass(frozen=True)
class AdaptedModule:
    """One module that an adapter updates.

    Attributes:
        name: As the adapter names it.
        weight: The base's tensor.
        kind: What PEFT makes of it.
        keys: The adapter's keys by what they hold, such as ``"lora_A.weight"``.
        scaling: By what the product of its factors is multiplied.
        transposed: Whether the base stores the matrix as (in, out).
        feedforward: For (IA)³, whether its vector multiplies the input.
    """

    name: str
    weight: str
    kind: Literal["linear", "embedding", "conv", "ia3"]
    keys: Mapping[str, str]
    scaling: float = 1.0
    transposed: bool = False
    feedforward: bool = False

    @property
    def is_dora(self) -> bool:
        """Whether magnitudes of their own scale the rows."""
        return "lora_magnitude_vector" in self.keys


@dataclass(frozen=True)
class Layout:
    """Everything an adapter changes in its base, by the base's names of tensors.

    Attributes:
        modules: The adapted modules, by their matrix.
        biases: Modules that also change their bias, by that.
        replaced: Keys of tensors the adapter holds whole; among them may be heads that the base lacks.
        notes: What a user should know of it.
    """

    modules: Mapping[str, AdaptedModule] = field(default_factory=dict)
    biases: Mapping[str, AdaptedModule] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def updated(self) -> tuple[str, ...]:
        """Names of the tensors that differ from the base's, sorted."""
        return tuple(sorted({*self.modules, *self.biases, *self.replaced}))

    def among(self, names: Container[str]) -> Layout:
        """Return what of it concerns the named tensors."""
        return Layout(
            {name: module for name, module in self.modules.items() if name in names},
            {name: module for name, module in self.biases.items() if name in names},
            {name: key for name, key in self.replaced.items() if name in names},
            self.notes,
        )


def is_conv1d(base: WeightSource, module: str) -> bool | None:
    """Tell whether a module stores its matrix as (in, out); ``None`` where the base's architecture does not say."""
    known = _CONV1D.get(str((base.config or {}).get("model_type")))
    return module.rsplit(".", 1)[-1] in known if known else None


def lay_out(
    label: str,
    base: WeightSource,
    adapter: WeightSource,
    config: AdapterConfig,
    rename: Mapping[str, str] | None = None,
) -> Layout:
    """Match every key of an adapter with a tensor of its base, from headers alone.

    Args:
        label: How messages call the adapter.
        base: The base.
        adapter: The adapter's file.
        config: Its config.
        rename: See :func:`~lightning_merge.weights.adapter_names.match_names`.

    Raises:
        UserError: A key that the config does not explain, that is incomplete, or that does not fit the base.
    """
    return _Builder(label, base, adapter, config, rename).build()


class _Builder:
    """Turns an adapter's keys into updates of the base's tensors."""

    def __init__(
        self,
        label: str,
        base: WeightSource,
        adapter: WeightSource,
        config: AdapterConfig,
        rename: Mapping[str, str] | None,
    ) -> None:
        self.label, self.base, self.adapter, self.config = label, base, adapter, config
        self.parts: dict[str, dict[str, str]] = {}
        self.plain: dict[str, str] = {}
        self.inner: set[str] = set()
        # By whether a matrix is stored as (in, out), a module whose shape shows that it is or is not.
        self.shown: dict[bool, str] = {}
        for key in (*adapter.tensors, *adapter.aliases):
            self._sort_in(key, parse_key(key))
        if not self.parts and not self.plain:
            raise UserError(f"The adapter '{label}' holds no tensors. Expected the factors of its modules.")
        self.notes: list[str] = []
        self._drop_tied_output()
        names = sorted(self.parts)
        self.rename: Rename = match_names(names, base, label, rename) if names else str

    def _sort_in(self, key: str, parsed: Key | None) -> None:
        if parsed is None:
            return
        if parsed.part in {"lora_A.weight", "lora_B.weight"} or "." in parsed.part or parsed.part in _BARE_PARTS:
            self.parts.setdefault(parsed.module, {})[parsed.part] = key
            if parsed.inner:
                self.inner.add(parsed.module)
            return
        name = f"{parsed.module}.{parsed.part}" if parsed.module else parsed.part
        # The copies that PEFT sometimes writes with their wrapper's name say the same as the plain key.
        if name not in self.plain or ".modules_to_save." in self.plain[name]:
            self.plain[name] = key

    def _drop_tied_output(self) -> None:
        """With ensure_weight_tying the output layer's adapter is the embedding's, transposed: it counts once."""
        if not self.config.content.get("ensure_weight_tying"):
            return
        embeddings = [parts for parts in self.parts.values() if {"lora_embedding_A", "lora_embedding_B"} <= set(parts)]
        for name, parts in list(self.parts.items()):
            if name.rsplit(".", 1)[-1] in OUTPUT_LAYERS and {"lora_A.weight", "lora_B.weight"} <= set(parts):
                pairs = [("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A")]
                if any(all(self._are_transposed(parts[a], other[b]) for a, b in pairs) for other in embeddings):
                    del self.parts[name]

    def _are_transposed(self, key: str, other: str) -> bool:
        return torch.equal(self.adapter.read(key), self.adapter.read(other).T)

    def build(self) -> Layout:
        modules: dict[str, AdaptedModule] = {}
        biases: dict[str, AdaptedModule] = {}
        # What the shapes tell comes first: square matrices are judged by it.
        made = {name: self._module(name) for name in sorted(self.parts, key=lambda name: (self._is_square(name), name))}
        for name in sorted(self.parts):
            module = made[name]
            if module.weight in modules:
                raise UserError(
                    f"The adapter '{self.label}' updates the tensor '{module.weight}' twice, as "
                    f"'{modules[module.weight].name}' and as '{name}', which are tied in '{self.base.label}'. "
                    "Expected one update of a tied tensor."
                )
            modules[module.weight] = module
            if "lora_B.bias" in module.keys or (module.kind == "ia3" and not module.feedforward):
                self._add_bias(module, biases)
        replaced = self._replaced()
        self._note_tied(modules)
        return Layout(modules, biases, replaced, tuple(self.notes))

    def _weight(self, name: str) -> str:
        """The base's tensor that a module stands for."""
        stored = weight_of(name, lambda known: self.base.stored_name(known) is not None, self.rename)
        return self.base.stored_name(stored or "") or ""

    def _is_square(self, name: str) -> bool:
        shape = self.base.tensors[self._weight(name)].shape
        return len(shape) == 2 and shape[0] == shape[1]

    def _module(self, name: str) -> AdaptedModule:
        config, keys = self.config, self.parts[name]
        if name not in self.inner and not config.targets(name):
            raise UserError(
                f"The adapter '{self.label}' holds '{next(iter(keys.values()))}', but its config does not target "
                f"'{name}' (target_modules: {config.content.get('target_modules')!r}). PEFT would leave it out in "
                f"silence; expected a {CONFIG_FILE} that belongs to the weights."
            )
        weight = self._weight(name)
        shape = self.base.tensors[weight].shape
        if "ia3_l" in keys:
            return self._ia3(name, weight, keys, shape)
        embedding = "lora_embedding_A" in keys or "lora_embedding_B" in keys
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        for part in ends:
            if part not in keys:
                raise UserError(
                    f"The adapter '{self.label}' lacks '{name}.{part}'. Expected both factors of an update."
                )
        down, up = (self._shape(keys[part]) for part in ends)
        rank = config.rank(name)
        if down[0] != rank or up[1] != rank:
            raise UserError(
                f"The factors of '{name}' in the adapter '{self.label}' have the shapes {list(down)} and {list(up)}, "
                f"and its config says rank {rank}. Expected a {CONFIG_FILE} that belongs to the weights."
            )
        kind: Literal["embedding", "conv", "linear"] = (
            "embedding" if embedding else "conv" if len(shape) > 2 else "linear"
        )
        fits = {False: shape == (up[0], *down[1:]), True: len(shape) == 2 and shape == (*down[1:], up[0])}
        if embedding:
            fits = {False: shape == (down[1], up[0]), True: False}
        if not any(fits.values()):
            raise UserError(
                f"The factors of '{name}' in the adapter '{self.label}' have the shapes {list(up)} and {list(down)}, "
                f"which do not make one of {list(shape)}, the shape of '{weight}' in '{self.base.label}' (grouped "
                "convolutions are not supported). Expected the adapter's own base."
            )
        if config.use_dora != ("lora_magnitude_vector" in keys):
            said, held = ("a DoRA", "lacks") if config.use_dora else ("no DoRA", "holds")
            raise UserError(
                f"The adapter '{self.label}' is {said} by its config and {held} '{name}.lora_magnitude_vector'. "
                f"Expected a {CONFIG_FILE} that belongs to the weights."
            )
        transposed = self._is_transposed(name) if all(fits.values()) else fits[True]
        if kind == "linear" and not all(fits.values()):
            self.shown.setdefault(transposed, name)
        return AdaptedModule(name, weight, kind, keys, config.scaling(name), transposed)

    def _ia3(self, name: str, weight: str, keys: Mapping[str, str], shape: tuple[int, ...]) -> AdaptedModule:
        feedforward = self.config.is_feedforward(name)
        held = self._shape(keys["ia3_l"])
        count = max(held, default=0)
        if len(shape) > 2:
            transposed = False
        elif self._is_square(name):
            transposed = self._is_transposed(name)
        else:
            transposed = (shape[0] == count) == feedforward
            self.shown.setdefault(transposed, name)
        axis = int(feedforward != transposed)
        linear_fits = len(shape) != 2 or held == ((1, count) if feedforward else (count, 1))
        if len(shape) < 2 or shape[axis] != count or not linear_fits:
            raise UserError(
                f"The vector of '{name}' in the adapter '{self.label}' has the shape {list(held)}, which does not fit "
                f"'{weight}' of shape {list(shape)} in '{self.base.label}' as one on the module's "
                f"{'input (feedforward_modules)' if feedforward else 'output'}. Expected the adapter's own base."
            )
        return AdaptedModule(name, weight, "ia3", keys, transposed=transposed, feedforward=feedforward)

    def _is_transposed(self, name: str) -> bool:
        """Tell whether a square matrix is stored as (in, out): by the architecture, else as the config says.

        PEFT decides module by module, and its config keeps what held for the last one.

        Raises:
            UserError: The architecture is not known, and the shape of another module contradicts the config.
        """
        known, said = is_conv1d(self.base, name), self.config.fan_in_fan_out
        if known is not None:
            return known
        if other := self.shown.get(not said):
            raise UserError(
                f"How '{self.base.label}' stores the square matrix of '{name}' is ambiguous: the config of the adapter "
                f"'{self.label}' says fan_in_fan_out: {str(said).lower()}, and the shape of '{other}' shows the "
                f"contrary. Expected a base {OF_KNOWN_LAYOUT}, or the full model that PEFT's merge_and_unload makes."
            )
        return said

    def _shape(self, key: str) -> tuple[int, ...]:
        return self.adapter.tensors[self.adapter.stored_name(key) or key].shape

    def _add_bias(self, module: AdaptedModule, biases: dict[str, AdaptedModule]) -> None:
        end = "in_proj_bias" if module.weight.endswith("in_proj_weight") else "bias"
        name = self.base.stored_name(module.weight.rpartition(".")[0] + "." + end)
        if name is not None:
            biases[name] = module
        elif module.kind != "ia3":
            raise UserError(
                f"The adapter '{self.label}' holds '{module.keys['lora_B.bias']}', and '{self.base.label}' has no bias "
                f"in '{module.name}'. Expected the adapter's own base."
            )

    def _replaced(self) -> dict[str, str]:
        """Match the tensors that the adapter holds whole; a module to save may be a head that the base lacks."""
        replaced = {}
        for name, key in self.plain.items():
            expected = self.rename(name)
            stored = self.base.stored_name(expected) or self.base.stored_name(name)
            module = name.rpartition(".")[0]
            if stored is None and not self.config.saves(module):
                raise UserError(
                    f"The adapter '{self.label}' holds the tensor '{key}', and '{self.base.label}' holds no "
                    f"'{expected}'. Expected the adapter's own base, or a tensor of one of its modules_to_save "
                    f"({', '.join(self.config.modules_to_save) or 'none'})."
                )
            replaced[stored or expected] = key
        return replaced

    def _note_tied(self, modules: Mapping[str, AdaptedModule]) -> None:
        tied = (self.base.config or {}).get("tie_word_embeddings") or bool(self.base.aliases)
        embeddings = [module.name for module in modules.values() if module.kind == "embedding"]
        if tied and embeddings and not self.config.content.get("ensure_weight_tying"):
            self.notes.append(
                f"The adapter '{self.label}' updates the embedding '{embeddings[0]}' of a base with tied weights: the "
                "output layer tied to it changes with it, as in PEFT's merge_and_unload."
            )
