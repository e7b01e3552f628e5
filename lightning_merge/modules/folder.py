"""Hugging Face model folders: where the weights are, what their hash is, and how fine-tuned weights are written back.

A fine-tuned folder has the same tensor names and dtypes as its base, whatever names the module itself uses:
transformers renames tensors when it loads, and merging compares files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_merge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BASE_SHA256 = "base_sha256"
COMPANION_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "preprocessor_config.json",
    "processor_config.json",
)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports inside the block, and restore what was set before."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def resolve_folder(base: str | os.PathLike[str]) -> Path:
    """Return the local folder of a model reference, from the Hub where no folder has that name.

    Args:
        base: a folder with ``config.json`` and safetensors weights, or ``owner/name[@revision]`` on the
            Hugging Face Hub, which is downloaded.

    Raises:
        UserError: nothing of that name exists, or the folder has no ``config.json``.
    """
    folder = Path(base)
    if not folder.is_dir():
        name = os.fspath(base)
        # a path with a typing error must not be looked up on the network: its first part is a folder here
        is_repository = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.is_dir()
        if not is_repository:
            raise UserError(
                f"Base model folder '{name}' does not exist. "
                f"Accepted: a folder with config.json and {WEIGHTS}, or a Hub name 'owner/name'."
            )
        from huggingface_hub import snapshot_download

        repository, _, revision = name.partition("@")
        try:
            patterns = [*COMPANION_FILES, "*.safetensors", INDEX]
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
        except Exception as error:  # the client raises a dozen unrelated types for "not there" and "no network"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"Base model '{name}' is neither a local folder nor a model the Hub would give: {reason}"
            ) from error
    if not (folder / "config.json").is_file():
        raise UserError(
            f"Model folder '{folder}' has no config.json. Accepted: a folder written by transformers' save_pretrained."
        )
    return folder


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that hold a folder's weights, sorted by name.

    Raises:
        UserError: the folder has neither ``model.safetensors`` nor an index of shards, or a shard is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise UserError(f"Model folder '{folder}' lacks the shard '{shard}' that its {INDEX} lists.")
        return [folder / shard for shard in shards]
    raise UserError(f"Model folder '{folder}' has no safetensors weights. Accepted: {WEIGHTS}, or shards with {INDEX}.")


def base_sha256(folder: str | os.PathLike[str]) -> str:
    """Return the sha256 of a folder's weights file; for shards, that of their lines ``<sha256>  <name>``, by name."""
    files = weight_files(Path(folder))
    digests = [_file_sha256(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if len(files) == 1:
        return digests[0]
    listing = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def _file_sha256(path: str, size: int, modified: int) -> str:
    """Hash one file; size and time of change are part of the cache key only."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def copy_companions(base: Path, folder: Path) -> None:
    """Copy config, tokenizer and processor files of ``base`` into ``folder``, byte for byte."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMPANION_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def save_atomically(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it, so that a file of the final name is complete."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(dict(tensors), str(partial), metadata=dict(metadata))
    os.replace(partial, path)


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
        for file in weight_files(base):
            source = stack.enter_context(safe_open(str(file), framework="pt"))
            for name in source.keys():  # noqa: SIM118 - not a mapping
                candidates = (name, name.removeprefix(prefix), prefix + name)
                match = next((candidate for candidate in candidates if candidate in names), None)
                original = source.get_tensor(name)
                if match is None:
                    tensors[name] = original
                    continue
                used.add(match)
                tensors[name] = saved.get_tensor(match).to(original.dtype)
        # a pooler that the base never had is not trained, and would be an extra key in every merge
        lost = sorted(name for name in names - used if not name.removeprefix(prefix).startswith("pooler."))
        if lost:
            raise UserError(
                f"Fine-tuned tensor '{lost[0]}' has no counterpart in the base '{base}'. "
                "Save the base again with this version of transformers "
                "(AutoModel.from_pretrained(...).save_pretrained(...))."
            )
        save_atomically(tensors, path, {"format": "pt", **metadata})


def _existing_parent(path: Path) -> Path:
    """Create and return the folder a file will be in, so that temporary files are on the same disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a model folder, under the names its files use."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors.update(load_file(str(file)))
    return tensors
