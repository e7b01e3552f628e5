"""The individual models of a merge, one at a time in the merged model's own module: for whatever compares with them.

Unlike :class:`lightning_merge.merged_weights.MergedWeights` this writes no merge: the module may hold any weights, and
they stay where they are in memory while another model's stand in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_merge.correspondence import parameter_names
from lightning_merge.errors import UserError, unknown
from lightning_merge.shards import is_sharded
from lightning_merge.task_vectors import TaskVectors


class IndividualWeights:
    """Lets a live module be one of several models of its architecture for a while.

    Args:
        module: The live module, whole on one device: parameters that are shards are refused.
        models: Task vectors, whose models are read from their files each time, or modules by name, whose weights are
            used as they are.
        prefix: See :func:`lightning_merge.correspondence.parameter_names`.

    Raises:
        UserError: A tensor has no counterpart in the module, or the module is sharded.

    Cost: one further model in memory while one is asked; the merged weights are neither copied nor written.
    """

    def __init__(
        self, module: nn.Module, models: TaskVectors | Mapping[str, nn.Module], prefix: str | None = None
    ) -> None:
        self.module, self.models, self.prefix = module, models, prefix
        if any(is_sharded(parameter) for parameter in module.parameters()):
            raise UserError(
                f"{type(module).__name__} is sharded, and individual models cannot take its place then. Expected a "
                "module that each process holds whole: strategy='auto' or 'ddp'."
            )
        self._names: dict[str, dict[str, str]] = {}
        for model in models:
            self._names[model] = self._correspondence(model)

    @contextmanager
    def individual(self, model: str) -> Iterator[None]:
        """Inside, the module answers as one of the models; afterwards as before, to the byte."""
        if model not in self.models:
            raise unknown("model", model, self.models)
        named = {
            **dict(self.module.named_parameters(remove_duplicate=False)),
            **dict(self.module.named_buffers(remove_duplicate=False)),
        }
        held: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.inference_mode(False), torch.no_grad():
                for name, target in self._names[model].items():
                    place = named[target]
                    values = self._values(model, name).reshape(place.shape).to(place.device, place.dtype)
                    held.append((place, place.data))
                    place.data = values
            torch.clear_autocast_cache()
            yield
        finally:
            # The first that was held of a tied tensor is the merged one.
            for place, values in reversed(held):
                place.data = values
            torch.clear_autocast_cache()

    def _correspondence(self, model: str) -> dict[str, str]:
        if isinstance(self.models, TaskVectors):
            vectors = self.models
            averaged = vectors.averaged_names if model in vectors.models else ()
            shapes = {name: vectors.shape(name) for name in (*vectors.tensor_names, *averaged)}
        else:
            shapes = {n: tuple(t.shape) for n, t in self._state(model).items() if t.is_floating_point()}
        return parameter_names(self.module, shapes, self.prefix)

    def _values(self, model: str, name: str) -> Tensor:
        if not isinstance(self.models, TaskVectors):
            return self._state(model)[name].detach()
        if name in self.models.averaged_names:
            return self.models.models[model].read(name)
        return self.models.read_finetuned(model, name, 0, self.models.info(name).numel)

    def _state(self, model: str) -> dict[str, Tensor]:
        assert not isinstance(self.models, TaskVectors)
        return dict(self.models[model].state_dict(keep_vars=True))
