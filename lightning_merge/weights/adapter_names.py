"""Which tensor of a base does an adapter's key mean? The keys of PEFT, and the rule by which names are matched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from lightning_merge.errors import UserError, nearest
from lightning_merge.weights.source import WeightSource

# What PEFT puts before the names of the model it wraps.
WRAPPER = "base_model.model."
PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "ia3_l",
)
# Output layers that are often one tensor with the embedding.
OUTPUT_LAYERS = ("lm_head", "embed_out", "decoder")

Rename = Callable[[str], str]

# transformers 5 calls parts of some vision encoders otherwise than the files do, old ones and those it writes itself.
_NAMES_IN_FILES = (
    (r"(^|\.)layers\.(\d+)\.(?=attention\.|mlp\.|layernorm_)", r"\1encoder.layer.\2."),
    (r"attention\.q_proj\b", "attention.attention.query"),
    (r"attention\.k_proj\b", "attention.attention.key"),
    (r"attention\.v_proj\b", "attention.attention.value"),
    (r"attention\.o_proj\b", "attention.output.dense"),
    (r"mlp\.fc1\b", "intermediate.dense"),
    (r"mlp\.fc2\b", "output.dense"),
)
_NAMES_IN_MODELS = (
    (r"(^|\.)encoder\.layer\.(\d+)\.", r"\1layers.\2."),
    (r"attention\.attention\.(query|key|value)\b", lambda found: f"attention.{found[1][0]}_proj"),
    (r"attention\.output\.dense\b", "attention.o_proj"),
    (r"intermediate\.dense\b", "mlp.fc1"),
    (r"output\.dense\b", "mlp.fc2"),
)


class Key(NamedTuple):
    """What a key of an adapter's file means."""

    module: str  # as the adapter calls it
    part: str  # one of PARTS, or the name of a parameter that is held whole
    inner: bool  # inside a module that PEFT wraps as one, such as the output projection of nn.MultiheadAttention


def parse_key(key: str) -> Key | None:
    """Take a key apart; ``None`` for the untouched copies that PEFT keeps beside modules it saves."""
    name = key.removeprefix(WRAPPER)
    if ".original_module." in name:
        return None
    if name.endswith(".lora_magnitude_vector.weight"):
        name = name.removesuffix(".weight")
    part = next((part for part in PARTS if name.endswith(f".{part}")), "")
    if part:
        module, leaf = name.removesuffix(f".{part}"), part
    else:
        module, _, leaf = name.rpartition(".")
    inner = bool(part) and ".base_layer." in module
    module = f"{module}.".replace(".base_layer.", ".").replace(".modules_to_save.", ".").rstrip(".")
    return Key(module, leaf, inner)


def weight_of(module: str, known: Callable[[str], bool], rename: Rename) -> str | None:
    """Return the base's name of the matrix that an adapted module multiplies by."""
    # nn.MultiheadAttention holds the projections of its input as a bare parameter.
    names = [rename(f"{module}.{leaf}") for leaf in ("weight", "in_proj_weight")]
    return next((name for name in names if known(name)), None)


def rename_in_files(name: str) -> str:
    """Return the name that files give to a part of a vision encoder which transformers 5 calls ``name``."""
    for pattern, replacement in _NAMES_IN_FILES:
        name = re.sub(pattern, replacement, name)
    return name


def rename_in_models(name: str, architecture: str | None) -> str:
    """Return what the installed transformers calls a part that files call ``name``; others keep their name."""
    try:
        renames = architecture == "vit" and int(version("transformers").split(".")[0]) >= 5
    except PackageNotFoundError:
        renames = False
    if renames:
        for pattern, replacement in _NAMES_IN_MODELS:
            name = re.sub(pattern, replacement, name)
    return name


def match_names(
    modules: Sequence[str], base: WeightSource, label: str, rename: Mapping[str, str] | None = None
) -> Rename:
    """Find the rule that turns an adapter's names into those of its base.

    The names are taken as they are where every adapted module is then found; else with the names that transformers'
    files use. Else the adapter was made over another class of the same model: one prefix is dropped from its names
    (``bert.``, over a base without a task head), or one put before them.

    Args:
        modules: The adapted modules, as the adapter names them.
        base: The base.
        label: How messages call the adapter.
        rename: Patterns and their replacements, applied to the adapter's names in place of the rule.

    Raises:
        UserError: No rule finds them all, or several do.
    """

    def missing(rule: Rename) -> list[str]:
        return [name for name in modules if weight_of(name, _known(base), rule) is None]

    if rename is not None:
        own = _by_patterns(rename)
        if missing(own):
            raise _not_found(missing(own)[0], own, base, label)
        return own
    plain: tuple[Rename, ...] = (str, rename_in_files)
    for rule in plain:
        if not missing(rule):
            return rule
    found: dict[tuple[str | None, ...], tuple[str, Rename]] = {}
    fewest, closest = len(missing(str)), plain[0]
    for naming in plain:
        for said, rule in _other_prefixes(modules[0], naming, base):
            lacking = len(missing(rule))
            if lacking < fewest:
                fewest, closest = lacking, rule
            if not lacking:
                found.setdefault(tuple(weight_of(name, _known(base), rule) for name in modules), (said, rule))
    if len(found) > 1:
        raise UserError(
            f"The names of the adapter '{label}' fit '{base.label}' in {len(found)} ways: "
            f"{' or '.join(said for said, _ in found.values())}. Expected one: state it by rename, "
            "such as {'^': 'text_model.'}."
        )
    if not found:
        raise _not_found(missing(closest)[0], closest, base, label)
    return next(iter(found.values()))[1]


def _other_prefixes(module: str, naming: Rename, base: WeightSource) -> Iterable[tuple[str, Rename]]:
    """Yield each rule that drops leading parts of the adapter's names, or puts some of the base's before them."""

    def dropping(prefix: str) -> Rename:
        return lambda name: naming(name.removeprefix(prefix))

    def adding(prefix: str) -> Rename:
        return lambda name: prefix + naming(name)

    parts = module.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        yield f"without '{prefix}'", dropping(prefix)
    end = "." + naming(f"{module}.weight")
    for prefix in dict.fromkeys(name.removesuffix(end[1:]) for name in base.tensors if name.endswith(end)):
        yield f"with '{prefix}' before them", adding(prefix)


def _known(base: WeightSource) -> Callable[[str], bool]:
    return lambda name: base.stored_name(name) is not None


def _by_patterns(patterns: Mapping[str, str]) -> Rename:
    def rule(name: str) -> str:
        for pattern, replacement in patterns.items():
            try:
                name = re.sub(pattern, replacement, name)
            except re.error as error:
                raise UserError(
                    f"rename: '{pattern}' to '{replacement}' is no substitution ({error}). "
                    r"Expected patterns such as {'^model\.': ''}."
                ) from error
        return name

    return rule


def _not_found(module: str, rule: Rename, base: WeightSource, label: str) -> UserError:
    expected = rule(f"{module}.weight")
    if (base.config or {}).get("tie_word_embeddings") and module.rsplit(".", 1)[-1] in OUTPUT_LAYERS:
        return UserError(
            f"The adapter '{label}' updates '{module}', which in '{base.label}' is one tensor with the embedding: "
            "no model with tied weights is that sum. Expected a base that stores it apart (tie_word_embeddings: false)."
        )
    return UserError(
        f"The adapter '{label}' updates '{module}', and '{base.label}' holds no tensor '{expected}'. "
        f"Expected the adapter's own base.{nearest(expected, base.tensors)}"
    )
