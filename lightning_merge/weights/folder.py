"""What stands beside the weights in a Hugging Face folder, and replacing a folder whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lightning_merge.weights.hashing import sha256_of_file
from lightning_merge.weights.quantized import without_quantization

# Configs, vocabularies, chat templates and sentence-piece models; never weights, code or pickles.
COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
OURS = {"merge.json", "merge.yaml"}
LARGEST_COMPANION = 64 << 20


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


def companions(folder: Path) -> list[Path]:
    """Everything of a model's folder that is neither weights nor ours nor too large to be a config or vocabulary."""
    # Sentence encoders keep their pooling in a folder of its own.
    found = sorted([*folder.glob("*"), *folder.glob("*_Pooling/config.json")])
    return [
        path
        for path in found
        if path.is_file()
        and path.suffix in COMPANION_SUFFIXES
        and path.name not in OURS
        and not path.name.endswith(".index.json")  # shards of weights that do not come along
        and path.stat().st_size <= LARGEST_COMPANION
    ]


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None, restored: bool = False) -> list[str]:
    """Copy config, tokenizer and processor files of a model's folder; the weights stay where they are.

    Args:
        source: A Hugging Face folder.
        target: A folder; made if absent.
        dtype: Where given, the dtype that ``config.json`` then states.
        restored: The weights are plain numbers now: drop what ``config.json`` says of their quantisation.

    Returns:
        The names of the files copied.
    """
    copied = []
    target.mkdir(parents=True, exist_ok=True)
    for path in companions(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
        copied.append(str(path.relative_to(source)))
    config = target / "config.json"
    if (dtype is not None or restored) and config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        if restored:
            content = without_quantization(content)
        if dtype is not None:
            name = str(dtype).removeprefix("torch.")
            content.update({key: name for key in ("dtype", "torch_dtype") if key in content})
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return copied


def companions_sha256(folder: Path) -> str:
    """Return one sha256 over the config, tokenizer and processor files of a model's folder."""
    digest = hashlib.sha256()
    for path in companions(folder):
        digest.update(f"{path.relative_to(folder)}:{sha256_of_file(path)};".encode())
    return digest.hexdigest()


def copy_model(files: Sequence[Path], source: Path, target: Path) -> list[str]:
    """Copy a model's folder, weights included; the copy appears whole or not at all.

    Returns:
        The names of the files copied.
    """
    work = target.with_name(target.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    copied = copy_companions(source, work)
    for file in [*files, *source.glob("*.safetensors.index.json")]:
        shutil.copyfile(file, work / file.name)
        copied.append(file.name)
    if (source / "README.md").is_file():  # it states the licence
        shutil.copyfile(source / "README.md", work / "README.md")
    replace_folder(work, target)
    return copied


def replace_folder(finished: Path, target: Path) -> None:
    """Give a finished folder its name; what stood there goes only once the new one is in place."""
    # A name that nobody else has: what stands beside is not ours to remove.
    old = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(finished, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
