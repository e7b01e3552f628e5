"""Where representations are in a model: its residual blocks, its final representation, the mean token of each row."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lightning_merge.errors import UserError, unknown


def token_mean(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean token of each row, ``(B, ..., d)`` to ``(B, d)``, over those that are not padding.

    The paper has images, whose tokens all count. A mean over padding would depend on what a text is batched with.

    Args:
        hidden: Token features; rows of one vector stay as they are.
        mask: ``(B, N)``, 0 at padding; used where its shape is that of the tokens.
    """
    if hidden.ndim <= 2:
        return hidden
    if mask is not None and mask.shape == hidden.shape[:-1]:
        weight = mask.to(hidden.dtype).unsqueeze(-1)  # (B, N, 1)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    return hidden.flatten(1, -2).mean(1)


def find_blocks(module: nn.Module, blocks: str | Sequence[str] | None = None) -> list[str]:
    """Name the residual blocks of a model, in their order.

    By default those of the longest outermost ``ModuleList`` or ``Sequential`` whose members are of one class and have
    parts of their own.

    Args:
        module: Any model.
        blocks: The path of such a list (``encoder.layer``), or patterns of the blocks' own paths (``stages.*.*``).

    Raises:
        UserError: Nothing fits, or several lists are equally long.
    """
    lists = {name: part for name, part in module.named_modules() if _is_list_of_blocks(part)}
    known = ", ".join(f"'{name}' ({len(part)})" for name, part in lists.items()) or "none"
    if blocks is not None:
        patterns = [blocks] if isinstance(blocks, str) else list(blocks)
        names = [name for name, _ in module.named_modules() if name]
        found: list[str] = []
        for pattern in patterns:
            whole = module.get_submodule(pattern) if pattern in names else None
            if isinstance(whole, (nn.ModuleList, nn.Sequential)):
                found += [f"{pattern}.{place}" for place, _ in whole.named_children()]
            else:
                fitting = [name for name in names if fnmatchcase(name, pattern)]
                if not fitting:
                    raise UserError(
                        f"No block of {type(module).__name__} is called '{pattern}'. Lists of blocks: {known}."
                    )
                found += fitting
        return list(dict.fromkeys(found))
    rows = {name: len(part) for name, part in lists.items() if len(part) > 1} or {n: len(p) for n, p in lists.items()}
    outermost = {n: size for n, size in rows.items() if not any(n != o and n.startswith(o + ".") for o in rows)}
    longest = [name for name, size in outermost.items() if size == max(outermost.values())]
    if len(longest) != 1:
        found_what = f"several equally long lists of blocks: {', '.join(longest)}" if longest else "no list of blocks"
        raise UserError(
            f"{type(module).__name__} has {found_what}. Expected blocks=... with the path of one; there are: {known}."
        )
    return [f"{longest[0]}.{place}" if longest[0] else place for place, _ in lists[longest[0]].named_children()]


def _is_list_of_blocks(part: nn.Module) -> bool:
    """Whether a module is a row of like parts, each made of parts: layers alone are no residual blocks."""
    if not isinstance(part, (nn.ModuleList, nn.Sequential)) or not len(part):
        return False
    members = list(part)
    return all(type(member) is type(members[0]) for member in members) and next(members[0].children(), None) is not None


def feature_root(module: nn.Module, features: str) -> tuple[nn.Module, str | None]:
    """Return the part that gives the representation, or the module and the name of its method that does.

    Raises:
        UserError: The module has neither.
    """
    if not features:
        return module, None
    try:
        return module.get_submodule(features), None
    except AttributeError:
        pass
    if callable(getattr(module, features, None)):
        return module, features
    parts = [name for name, _ in module.named_children()]
    raise unknown(f"part or method of {type(module).__name__} (features=...)", features, parts)


def correctable_blocks(module: nn.Module, features: str, blocks: str | Sequence[str] | None = None) -> list[str]:
    """Name the blocks that V2 corrects: those of the part that gives the representation, or else of the module.

    Args:
        module: The module.
        features: See :func:`feature_root`.
        blocks: See :func:`find_blocks`.
    """
    root, _ = feature_root(module, features)
    try:
        return find_blocks(root, blocks)
    except UserError:
        if root is module:
            raise
    return find_blocks(module, blocks)
