"""What a checkpoint says of the task vectors that its coefficients belong to, so that no others are taken for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_merge.errors import UserError, nearest
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights import sha256_of_source


def provenance(
    task_vectors: TaskVectors, transforms: Sequence[Any], scalars: Any, objectives: Sequence[Any] = ()
) -> dict[str, Any]:
    """Describe models, base, transforms, what is learned and what for, as plain data.

    Cost: one read of all models, the first time on a machine; hashes are remembered.
    """
    # A task vector that was computed has no file; two of them are not told apart.
    models = {name: task_vectors.models.get(name) for name in task_vectors.names}
    return {
        "base": None if task_vectors.base is None else sha256_of_source(task_vectors.base),
        "models": {name: None if source is None else sha256_of_source(source) for name, source in models.items()},
        "transforms": [repr(transform) for transform in transforms],
        "objectives": [repr(objective) for objective in objectives],
        "constraint": str(getattr(scalars, "constraint", None)),
        "kind": type(scalars).__name__,
        "shapes": {name: list(values.shape) for name, values in scalars.state_dict().items()},
    }


def refuse_other(own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another adaptation.

    Raises:
        UserError: Names the first thing that differs.
    """
    tail = "Expected the adaptation that the checkpoint is of, or a start without ckpt_path."
    strange = [name for name in found["models"] if name not in own["models"]]
    missing = [name for name in own["models"] if name not in found["models"]]
    if strange or missing:
        name = (strange or missing)[0]
        which = "the checkpoint" if strange else "AdaMerging"
        raise UserError(
            f"The checkpoint is of the models {', '.join(found['models'])}, AdaMerging has "
            f"{', '.join(own['models'])}: '{name}' is in {which} only. {tail}"
            f"{nearest(name, own['models'] if strange else found['models'])}"
        )
    for what, mine, theirs in (
        ("base", own["base"], found["base"]),
        *((f"model '{name}'", own["models"][name], found["models"][name]) for name in own["models"]),
    ):
        if mine != theirs:
            raise UserError(
                f"The {what} has other weights than when the checkpoint was written (sha256 {str(mine)[:12]}, then "
                f"{str(theirs)[:12]}). {tail}"
            )
    if own["transforms"] != found["transforms"]:
        raise UserError(
            f"The checkpoint is of task vectors transformed by {', '.join(found['transforms']) or 'nothing'}, "
            f"AdaMerging transforms them by {', '.join(own['transforms']) or 'nothing'}. {tail}"
        )
    for what in ("constraint", "objectives"):
        if own[what] != found[what]:
            raise UserError(f"The checkpoint was learned with {what} {found[what]}, now it is {own[what]}. {tail}")
    if (own["kind"], own["shapes"]) != (found["kind"], found["shapes"]):
        raise UserError(
            f"The checkpoint holds {found['kind']} of shape {_shapes(found)}, AdaMerging learns {own['kind']} of "
            f"shape {_shapes(own)} (by or scalars differ). {tail}"
        )


def _shapes(described: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in described["shapes"].items())
