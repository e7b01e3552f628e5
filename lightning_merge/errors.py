"""What a user is told when something is wrong: one sentence of cause, one of what is accepted, the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The caller's input cannot be used; the message names the culprit and what is accepted (exit code 2)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known spelling closest to ``name``, or an empty string."""
    candidates = sorted(known)
    folded = {candidate.lower(): candidate for candidate in candidates}
    match = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    return f" Did you mean '{folded[match[0]]}'?" if match else ""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for an unknown ``what`` called ``name``: lists what is known and the nearest spelling."""
    candidates = sorted(known)
    listed = ", ".join(candidates) if candidates else "none"
    return UserError(f"Unknown {what} '{name}'. Known: {listed}.{nearest(name, candidates)}")


class ResumableError(UserError):
    """Something outside has stopped the work; what is finished is kept, and the same command goes on from there."""
