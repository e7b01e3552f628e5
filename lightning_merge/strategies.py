"""What each of Lightning's strategies and precisions asks of learned merges: everything we know of them stands here.

- One device: nothing.
- DDP: the merged weights are kept out of its reducer by leaving the module unwrapped; what is learned are a few numbers
  whose gradient :class:`lightning_merge.merged_weights.MergedWeights` reduces itself.
- ModelParallelStrategy (FSDP2): optimizer states are saved by the names of parameters, so what is learned has to be in
  the module; a checkpoint in one file is saved without it, and loaded without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn

from lightning_merge.errors import UserError
from lightning_merge.shards import distributed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_merge.callbacks.overrides import Overrides

# The name under which what is learned stands in a module of the user's, where a strategy asks for that.
HOME = "learned_merge"
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true")
_WORKING = "strategy='auto', 'ddp', or ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)"


def check_trainer(trainer: Trainer) -> None:
    """Refuse accelerators, strategies and precisions that learned merges cannot work with.

    Raises:
        UserError: Names the accelerator, strategy or precision and what works.
    """
    from lightning.pytorch import strategies
    from lightning.pytorch.accelerators import MPSAccelerator

    if isinstance(getattr(trainer, "accelerator", None), MPSAccelerator):
        raise UserError(
            "Learned merges do not work on the accelerator 'mps', which has no fp64 to add gradients up in "
            "(accelerator='auto' chooses it on a Mac). Expected accelerator='cpu', or 'gpu' with CUDA."
        )
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, strategies.FSDPStrategy):
        raise UserError(
            f"Learned merges do not work under {name}: FSDP1 flattens parameters, so a tensor cannot be told from its "
            f"neighbours. Expected FSDP2: {_WORKING}."
        )
    if isinstance(strategy, strategies.DeepSpeedStrategy):
        raise UserError(
            f"Learned merges do not work under {name}, which owns weights and gradients. Expected {_WORKING}."
        )
    if isinstance(strategy, strategies.ModelParallelStrategy):
        mesh = strategy.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            raise UserError(
                f"Learned merges do not work under tensor parallelism (tensor_parallel_size="
                f"{mesh['tensor_parallel'].size()}, data_parallel_size={mesh['data_parallel'].size()}; by default all "
                f"devices are tensor-parallel). Expected {_WORKING}."
            )
    elif isinstance(strategy, (strategies.XLAStrategy, strategies.SingleDeviceXLAStrategy)) or not isinstance(
        strategy, (strategies.SingleDeviceStrategy, strategies.DDPStrategy)
    ):
        raise UserError(f"Learned merges do not know the strategy {name}. Expected {_WORKING}.")
    precision = str(getattr(trainer.precision_plugin, "precision", "32-true"))
    if precision in ("16-mixed", "16-true"):
        raise UserError(
            f"Learned merges do not work with precision '{precision}': gradients are scaled when they are contracted. "
            "Expected precision 'bf16-mixed' or '32-true'."
        )
    if precision not in PRECISIONS:
        raise UserError(
            f"Learned merges do not know precision '{precision}'. Expected one of: {', '.join(PRECISIONS)}."
        )


def is_sharding(trainer: Trainer) -> bool:
    """Whether the strategy spreads parameters over processes."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    return isinstance(trainer.strategy, ModelParallelStrategy)


def prepare(
    trainer: Trainer,
    module: LightningModule,
    overrides: Overrides,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Change what the strategy would do to the module, before it sets it up.

    Args:
        trainer: The user's.
        module: The user's.
        overrides: Where it is noted how to put everything back.
        check: Given a checkpoint without its weights, refuses one of something else, before anything is loaded.
    """
    from lightning.pytorch.strategies import DDPStrategy

    strategy: Any = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        overrides.set(strategy, "configure_ddp", lambda: broadcast_from_first(module))
    if is_sharding(trainer):
        load = strategy.load_checkpoint

        def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            return _load_without_learned(load, module, checkpoint_path, weights_only, check)

        overrides.set(strategy, "load_checkpoint", load_checkpoint)
        weights = strategy.lightning_module_state_dict

        def lightning_module_state_dict() -> dict[str, Any]:
            # A distributed checkpoint keeps what is learned: its optimizer states are loaded by name.
            held = weights()
            if strategy._save_distributed_checkpoint:
                return held
            return {name: value for name, value in held.items() if not name.startswith(HOME + ".")}

        overrides.set(strategy, "lightning_module_state_dict", lightning_module_state_dict)


def house(trainer: Trainer, module: LightningModule, learned: nn.Module, overrides: Overrides) -> None:
    """Put what is learned where the strategy needs it, on the device where it is trained."""
    learned.to(module.device)
    if is_sharding(trainer) and HOME not in module._modules:
        overrides.submodule(module, HOME, learned)


def gathering(module: nn.Module, name: str) -> Any:
    """Return a method of a module that, under FSDP2, gathers the shards of the module itself as its forward does."""
    if not hasattr(module, "_get_fsdp_state") or name in vars(module):
        return getattr(module, name)
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(module, name)
    return vars(module).pop(name)


def broadcast_from_first(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first, as DistributedDataParallel does when it wraps."""
    for tensor in [*module.parameters(), *module.buffers()]:
        torch.distributed.broadcast(tensor.detach(), src=0)


def processes() -> int:
    """How many data-parallel processes there are."""
    return torch.distributed.get_world_size() if distributed() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum over data-parallel processes; the same numbers everywhere."""
    if distributed():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """Average over data-parallel processes; the same numbers everywhere."""
    return sum_over_processes(values) / processes()


def _safely(weights_only: bool | None) -> bool:
    """What is not said otherwise is loaded without running code, whatever the version of torch."""
    return True if weights_only is None else weights_only


def _load_without_learned(
    load: Any,
    module: LightningModule,
    path: Any,
    weights_only: bool | None,
    check: Callable[[Mapping[str, Any]], None] | None,
) -> dict[str, Any]:
    """Load a checkpoint; in one file it has no learned scalars, which the callback puts back afterwards."""
    strict, before = module.strict_loading, module._strict_loading
    if Path(path).is_dir():
        if check is not None:
            check(torch.load(Path(path) / "meta.pt", map_location="cpu", weights_only=_safely(weights_only)))
        return load(path, weights_only=weights_only)
    checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=_safely(weights_only))
    if check is not None:
        check(checkpoint)
    if strict:
        held = checkpoint["state_dict"]
        expected = [name for name in module.state_dict() if not name.startswith(HOME + ".")]
        missing = [name for name in expected if name not in held]
        if missing:
            raise UserError(
                f"The checkpoint '{path}' lacks {len(missing)} tensors of {type(module).__name__}, such as "
                f"'{missing[0]}'. Expected a checkpoint of the same module."
            )
    module.strict_loading = False
    try:
        return load(path, weights_only=weights_only)
    finally:
        module._strict_loading = before
