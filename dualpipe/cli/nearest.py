"""What somebody meant who typed a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, names: Iterable[str], otherwise: str) -> str:
    """The remedy ``did you mean NAME?`` for the name most like ``word`` (case apart), or ``otherwise``."""
    by_folded = {name.casefold(): name for name in sorted(names, reverse=True)}
    found = get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return f"did you mean {by_folded[found[0]]}?" if found else otherwise
