"""From a reference to opened weights: a path, a folder of a package, the Hub, a module, a state dict."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.errors import UserError
from lightning_merge.weights.distributed import is_distributed, open_distributed
from lightning_merge.weights.quantized import refuse_quantized_file, restored
from lightning_merge.weights.source import INDEX_FILE, SINGLE_FILE, MemorySource, SafetensorsSource, WeightSource

ACCEPTED = (
    "Accepted: a Hugging Face folder (config.json beside model.safetensors or its shards), a .safetensors file, "
    "a Lightning .ckpt or another file of torch.save that loads with weights_only=True, "
    "'package:NAME/FOLDER' for a folder inside an installed package, 'owner/name@revision' on the Hub, "
    "an nn.Module, a state dict."
)


def open_weights(ref: Any, prefix: str = "") -> WeightSource:
    """Open anything that holds weights without reading the values.

    Args:
        ref: A Hugging Face folder (sharded or not), a ``.safetensors`` file, a Lightning ``.ckpt`` (or another file
            of ``torch.save``), ``package:NAME/FOLDER``, ``owner/name@revision`` on the Hub, an ``nn.Module``, a state
            dict, or a :class:`WeightSource`, which is returned as it is.
        prefix: For checkpoints: keep the tensors whose name begins with it, and drop it (``model.``).

    Raises:
        UserError: Nothing is there, the file is damaged, or loading it would run code.

    Cost: the headers are read, nothing else.
    """
    if isinstance(ref, WeightSource):
        return ref
    if isinstance(ref, nn.Module):
        state_dict = ref.state_dict(keep_vars=True)
        parameters = {id(parameter) for parameter in ref.parameters()}
        buffers = frozenset(name for name, value in state_dict.items() if id(value) not in parameters)
        return restored(MemorySource(type(ref).__name__, state_dict, buffers=buffers))
    if isinstance(ref, Mapping):
        return restored(MemorySource("state dict", ref))
    if not isinstance(ref, (str, Path)):
        raise UserError(f"An object of type {type(ref).__name__} holds no weights that can be opened. {ACCEPTED}")
    path = resolve_path(ref)
    if path.is_dir():
        if is_distributed(path):
            return restored(open_distributed(path, str(ref), prefix))
        return restored(_open_folder(path, str(ref)))
    refuse_quantized_file(path)
    if path.suffix == ".safetensors":
        folder = path.parent if (path.parent / "config.json").is_file() else None
        return restored(SafetensorsSource(str(ref), [path], folder=folder))
    if path.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        return open_checkpoint(path, str(ref), prefix)
    raise UserError(f"'{ref}' has the unknown suffix '{path.suffix}'. {ACCEPTED}")


def resolve_path(ref: str | Path) -> Path:
    """Return the local path a reference names: itself, a folder of an installed package, or a snapshot of the Hub.

    Raises:
        UserError: Nothing is there.
    """
    text = str(ref)
    if not text.strip():
        raise UserError(f"'{text}' names no model. {ACCEPTED}")
    if text.startswith("package:"):
        package, _, inner = text.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None  # does not import it
        if spec is None or spec.origin is None:
            if not package.isidentifier():
                raise UserError(f"'{text}' names no top-level package. Expected package:NAME/FOLDER.")
            hint = f"pip install {package.replace('_', '-')}"
            raise UserError(f"'{text}' names the package '{package}', which is not installed. Try: {hint}")
        path = Path(spec.origin).parent / inner
        if not path.exists():
            raise UserError(f"The package '{package}' holds no '{inner}'. Expected a folder or file inside it.")
        return path
    path = Path(text).expanduser()
    if path.exists():
        return path
    # A path with a typing error must not be looked up on the network: its first part would be a folder here.
    if re.fullmatch(r"[\w][\w.-]*/[\w.-]+(@[\w./-]+)?", text) and not path.parent.is_dir():
        return _snapshot(text)
    raise UserError(f"Nothing is at '{ref}'. {ACCEPTED}")


def _snapshot(ref: str) -> Path:
    """Fetch ``owner/name[@revision]`` from the Hub (weights, config, tokenizer and card; never code or pickles)."""
    from huggingface_hub import snapshot_download

    repository, _, revision = ref.partition("@")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md"]  # the card states the licence
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises many kinds: offline, unknown repository, gated, ...
        raise UserError(f"'{ref}' could not be fetched from the Hub: {error}. {ACCEPTED}") from error


def _open_folder(path: Path, label: str) -> WeightSource:
    """Open a Hugging Face folder: a single file, or shards with their index."""
    refuse_quantized_file(path)
    if (path / INDEX_FILE).is_file():
        try:
            weight_map = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"'{path / INDEX_FILE}' is no index of shards ({error}). Expected a 'weight_map'."
            ) from error
        for name, shard in weight_map.items():
            if not (path / shard).is_file():
                raise UserError(
                    f"'{label}' lacks the shard '{shard}', in which its index places the tensor '{name}'. "
                    "Expected every shard; copy or download it again."
                )
        source = SafetensorsSource(label, [path / name for name in shards], folder=path)
        missing = sorted(set(weight_map) - set(source.tensors))
        if missing:
            raise UserError(
                f"'{label}' lacks the tensor '{missing[0]}' ({len(missing)} missing), which its index places in "
                f"'{weight_map[missing[0]]}'. Expected complete shards."
            )
        return source
    if (path / SINGLE_FILE).is_file():
        return SafetensorsSource(label, [path / SINGLE_FILE], folder=path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"'{label}' is a PEFT adapter, not a full model. Expected it among the --models, with its model as --base."
        )
    safetensors = sorted(path.glob("*.safetensors"))
    if len(safetensors) == 1:
        return SafetensorsSource(label, safetensors, folder=path)
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    raise UserError(f"The folder '{label}' holds no model.safetensors (it holds {held}). {ACCEPTED}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a file of ``torch.save`` memory-mapped and without running any code it may hold.

    Raises:
        UserError: The file is damaged, or it holds objects that only running code could rebuild.
    """
    import warnings
    import zipfile

    if not path.stat().st_size:
        raise UserError(f"'{path}' is empty. Expected a checkpoint with a state_dict.")
    zipped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a damaged file seems to be
            # Checkpoints of old versions of PyTorch are no zip archives and cannot be memory-mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of any kind: the bytes may say anything
        with path.open("rb") as stream:
            begin = stream.read(1)
        named = re.search(r"GLOBAL\s+(\S+)", str(error))
        if named or ("nsupported" in str(error) and (zipped or begin == b"\x80")):
            what = f"an object of {named.group(1).rstrip('.,')}" if named else "an object"
            raise UserError(
                f"'{path}' holds {what}, and rebuilding it could run code, so it is not loaded. "
                "Expected plain tensors: save with save_weights_only=True, or as safetensors."
            ) from error
        known = zipped or begin in {b"\x80", b"P"}
        reason = re.split(r"\.\s|\n", str(error))[0] if known else "it was not written by torch.save"
        raise UserError(f"'{path}' cannot be read as a checkpoint ({reason}). {ACCEPTED}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}. Expected a checkpoint or a state dict.")
    return content


def open_checkpoint(path: Path, label: str, prefix: str) -> WeightSource:
    """Open the state dict of a checkpoint; ``prefix`` selects and is dropped."""
    content = read_checkpoint(path)
    state_dict = content.get("state_dict", content)
    state_dict = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    if prefix:
        chosen = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if not chosen:
            first = next(iter(state_dict), "none")
            raise UserError(f"No tensor of '{label}' begins with the prefix '{prefix}'. Its first is '{first}'.")
        state_dict = chosen
    if not state_dict:
        raise UserError(f"'{label}' holds no tensors. Expected a checkpoint with a state_dict.")
    return restored(MemorySource(label, state_dict, files=(path,), prefix=prefix))
