"""Hugging Face model folders: where the weights are, what their hash is, and how fine-tuned weights are written back.

A fine-tuned folder has the same tensor names and dtypes as its base, whatever names the module itself uses:
transformers renames tensors when it loads, and merging compares files.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.weights import open_weights, resolve_path, save_safetensors, sha256_of_source
from lightning_merge.weights.card import stated_license
from lightning_merge.weights.folder import quiet_transformers, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
BASE_SHA256 = "base_sha256"
_CARD_OF_OURS = "with lightning_merge, from a base under the licence above."


def resolve_folder(base: str | os.PathLike[str]) -> Path:
    """Return the local folder of a model reference: see :func:`lightning_merge.weights.resolve_path`.

    Raises:
        UserError: nothing of that name exists, or the folder has no ``config.json``.
    """
    folder = resolve_path(os.fspath(base))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"Model folder '{folder}' has no config.json. Accepted: a folder written by transformers' save_pretrained."
        )
    return folder


def base_sha256(folder: str | os.PathLike[str]) -> str:
    """Return the sha256 of a folder's weights: of its file, or over its shards in order of name."""
    return sha256_of_source(open_weights(Path(folder)))


def write_weights(backbone: PreTrainedModel, base: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a backbone's weights with exactly the tensor names and dtypes of the base's files.

    Args:
        backbone: the module that holds the weights; any device, any floating dtype.
        base: the folder it was loaded from. Tensors of the base that the backbone does not have (another tower, a
            language-model head, constant buffers) are copied from it unchanged.
        path: the file to write.
        metadata: strings for the header; ``format: pt`` is added.

    Raises:
        UserError: the backbone has a trained tensor with no counterpart in the base's files.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        # save_pretrained alone knows how transformers renamed the tensors when it read the base
        staging = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".export-", dir=_existing_parent(path))))
        with quiet_transformers():
            backbone.save_pretrained(staging, max_shard_size="1000GB")
        saved = stack.enter_context(safe_open(str(staging / WEIGHTS), framework="pt"))
        names = set(saved.keys())
        prefix = backbone.base_model_prefix + "."
        tensors: dict[str, Tensor] = {}
        used: set[str] = set()
        source = open_weights(base)
        for name, info in source.tensors.items():
            candidates = (name, name.removeprefix(prefix), prefix + name)
            match = next((candidate for candidate in candidates if candidate in names), None)
            if match is None:
                tensors[name] = source.read(name)
                continue
            used.add(match)
            tensors[name] = saved.get_tensor(match).to(info.dtype)
        # a pooler that the base never had is not trained, and would be an extra key in every merge
        lost = sorted(name for name in names - used if not name.removeprefix(prefix).startswith("pooler."))
        if lost:
            raise UserError(
                f"Fine-tuned tensor '{lost[0]}' has no counterpart in the base '{base}'. "
                "Save the base again with this version of transformers "
                "(AutoModel.from_pretrained(...).save_pretrained(...))."
            )
        save_safetensors(tensors, path, metadata)


def remove_weights(folder: Path) -> None:
    """Remove the weights of an earlier export, so that the folder counts as incomplete until there are new ones."""
    for path in [folder / WEIGHTS, *folder.glob(f"{WEIGHTS}.index.json"), *folder.glob("model-*-of-*.safetensors")]:
        path.unlink(missing_ok=True)


def write_card(base: Path, folder: Path, task: str) -> None:
    """Let a fine-tuned folder state its base's licence, so that the card of a merge can; someone's own card stays.

    Args:
        base: the folder of the pretrained model; where its card states no licence, none is written.
        folder: the fine-tuned model's.
        task: what it learned.
    """
    card = folder / "README.md"
    if card.is_file() and _CARD_OF_OURS not in card.read_text(encoding="utf-8", errors="replace"):
        return
    license = stated_license(base)
    if license is None:
        card.unlink(missing_ok=True)
        return
    write_text(card, f"---\nlicense: {license}\n---\n\n# {task}\n\nFine-tuned on {task} {_CARD_OF_OURS}\n")


def _existing_parent(path: Path) -> Path:
    """Create and return the folder a file will be in, so that temporary files are on the same disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent
