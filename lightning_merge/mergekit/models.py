"""The models of a recipe, opened lazily: folders, adapters over a model, results of earlier documents."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.mergekit.architectures import Layout, config_entry, layout_of, recomputed, vocabulary_key
from lightning_merge.mergekit.values import Reference
from lightning_merge.weights import TensorInfo, WeightSource, open_weights
from lightning_merge.weights.folder import companions as companions_of
from lightning_merge.weights.views import LazyTensor, StoredTensor

# What stands beside the weights: text and bytes to write, or files to copy.
Companions = Mapping[str, "str | bytes | Path"]


class PlannedWeights(WeightSource):
    """The weights that an earlier document will make: names and shapes at once, values after :meth:`written`."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], companions: Companions) -> None:
        self.label, self.tensors, self.aliases = name, dict(tensors), {}
        self.companions = companions
        self._weights: WeightSource | None = None

    def written(self, path: str | Path) -> None:
        """Say where the weights were written.

        Raises:
            UserError: Something else stands there.
        """
        weights = open_weights(path)
        for name, info in self.tensors.items():
            if weights.stored_name(name) is None or weights.tensors[weights.stored_name(name) or name] != info:
                raise UserError(f"'{path}' does not hold the merge '{self.label}': its tensor '{name}' differs.")
        self._weights = weights
        self.files, self.folder = weights.files, weights.folder

    def _open(self) -> WeightSource:
        if self._weights is None:
            raise UserError(f"The merge '{self.label}' has to be made before its weights are read.")
        return self._weights

    def read(self, name: str) -> Tensor:
        """Return the tensor called ``name``."""
        return self._open().read(name)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return the entries ``start:stop`` of the flattened tensor."""
        return self._open().read_flat(name, start, stop)


@dataclass(frozen=True)
class Model:
    """One model of a recipe.

    Attributes:
        reference: How the recipe names it.
        source: Its weights.
        companions: The files beside them, by name.
        in_place: Whether the companions are those of the weights' own folder.
    """

    reference: Reference
    source: WeightSource
    companions: Companions
    in_place: bool = True
    _temporary: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def layout(self) -> Layout:
        """How it is built."""
        return layout_of(self.tensors)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Names and shapes, without buffers that are computed again when the model is loaded."""
        infos = self.source.tensors
        return {name: info for name, info in infos.items() if not recomputed(name, info)}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its ``config.json``; empty where it has none."""
        content = _json(self.companions.get("config.json"), f"config.json of '{self.reference}'")
        return content if isinstance(content, dict) else {}

    @cached_property
    def vocabulary_size(self) -> int | None:
        """Number of rows of its embedding, or what its config says; ``None`` for a model without words."""
        if self.layout.embedding is not None:
            return self.tensors[self.layout.embedding].shape[0]
        key = vocabulary_key(self.config)
        return int(config_entry(self.config, key)) if key else None

    def tensor(self, name: str) -> LazyTensor | None:
        """Return a tensor, whichever of its tied names it is stored under, or ``None``."""
        stored = self.source.stored_name(name)
        if stored is not None:
            # An adapter computes in fp32, whatever its base is stored in.
            under: WeightSource | None = getattr(self.source, "base", None)
            held = under.tensors.get(stored) if under is not None else None
            return StoredTensor(self.source, stored, held.dtype if held else None)
        embedding = self.layout.embedding
        # A head that is not stored is tied to the embedding of the words.
        if embedding is not None and not self.layout.heads and layout_of([name]).heads:
            return StoredTensor(self.source, embedding)
        return None

    def folder(self) -> Path:
        """Return a folder that holds the companions, for readers that want one."""
        if self.in_place and self.source.folder is not None:
            return self.source.folder
        if not self._temporary:
            self._temporary.append(tempfile.TemporaryDirectory(prefix="lightning_merge."))
            for name, content in self.companions.items():
                path = Path(self._temporary[0].name) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(as_bytes(content))
        return Path(self._temporary[0].name)


class Models:
    """Opens each model of a recipe once; names of earlier documents come before paths."""

    def __init__(self, planned: Mapping[str, PlannedWeights] | None = None) -> None:
        self._planned = dict(planned or {})
        self._opened: dict[Reference, Model] = {}

    def open(self, reference: Reference) -> Model:
        """Open a model.

        Raises:
            UserError: Nothing is there, or it holds no weights.
        """
        if reference not in self._opened:
            self._opened[reference] = self._open(reference)
        return self._opened[reference]

    def _open(self, reference: Reference) -> Model:
        if reference.adapter is not None:
            from lightning_merge.weights.adapters import open_adapter

            under = self.open(Reference(reference.path, reference.revision))
            return Model(reference, open_adapter(reference.adapter, under.source), under.companions)
        if reference.path in self._planned:
            planned = self._planned[reference.path]
            return Model(reference, planned, planned.companions)
        source = open_weights(reference.model)
        companions = {}
        if source.folder is not None:
            companions = {str(path.relative_to(source.folder)): path for path in companions_of(source.folder)}
        return Model(reference, source, companions)


def as_bytes(content: str | bytes | Path) -> bytes:
    """Return what a companion holds."""
    if isinstance(content, Path):
        return content.read_bytes()
    return content.encode() if isinstance(content, str) else content


def _json(content: str | bytes | Path | None, what: str) -> Any:
    if content is None:
        return None
    try:
        return json.loads(as_bytes(content))
    except ValueError as error:
        raise UserError(f"{what} is no JSON ({error}). Expected the file of a Hugging Face model.") from error


def read_json(companions: Companions, name: str) -> Any:
    """Return the content of a JSON companion, or ``None`` where there is none."""
    return _json(companions.get(name), name)
