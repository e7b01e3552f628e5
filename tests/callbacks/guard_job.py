"""Run by a test: a guarded run in two processes, straight, and stopped at an epoch's end and resumed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from adapted_digits import DOMAINS, Classifier, open_task_vectors, stream, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lightning_merge.callbacks import AdaMerging, CollapseGuard

# Every batch of a distributed sampler that is not shuffled comes at the same place in each epoch.
STEPS = 8


def run(models: dict[str, Path], folder: Path, name: str, epochs: int, ckpt_path: str | None = None) -> str:
    module = Classifier()
    module.load_state_dict(load_file(models["base"]))
    merging = AdaMerging(open_task_vectors(models), learning_rate=0.01)
    guard, saving = CollapseGuard(every_n_steps=3), ModelCheckpoint(folder / name, save_last=True)
    fitting = trainer(
        max_epochs=epochs, callbacks=[merging, guard, saving], devices=2, strategy="ddp_fork",
        enable_checkpointing=True, limit_train_batches=STEPS,
    )  # fmt: skip
    guard.on_fit_end = lambda trainer, module: torch.save(  # type: ignore[method-assign]
        {
            "history": [[record["step"], record["entropy"], record["overlap"]] for record in guard.history],
            "overlaps": [record["overlap"] for record in guard.history],
            "steps": [guard.best_step, guard.stopped_step],
            "watched": sum(map(len, guard._watched.start.values())),
            "learned": merging.learned(),
        },
        folder / f"{name}_{trainer.global_rank}.pt",
    )
    fitting.fit(module, stream(shuffle=False), ckpt_path=ckpt_path)
    return str(folder / name / "last.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    models = {name: Path(sys.argv[1]) / f"{name}.safetensors" for name in ("base", *DOMAINS)}
    run(models, Path(sys.argv[2]), "straight", 4)
    run(models, Path(sys.argv[2]), "resumed", 4, run(models, Path(sys.argv[2]), "stopped", 1))
