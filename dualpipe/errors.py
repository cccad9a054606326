"""The form of every error about input: the rule, what was given, and how to fix it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = ["RuleError", "StageError", "UndecidedError"]

_SIMILAR = 0.7
"""The least similarity at which a name is suggested: one letter of four may differ, but not two."""


class RuleError(ValueError):
    """Bad input: the rule that was broken, what was given, and how to fix it."""

    def __init__(self, rule: str, got: str, fix: str) -> None:
        self.rule, self.got, self.fix = rule, got, fix
        super().__init__(f"{rule}: {got}; {fix}")


class StageError(RuleError):
    """The user's stage, criterion or data cannot be used for training as given."""


class UndecidedError(RuntimeError):
    """A question that could not be decided: the answer is neither yes nor no."""


def nearest(word: str, names: Iterable[str], otherwise: str) -> str:
    """The fix ``did you mean NAME?`` with the name most like ``word`` (ignoring case), or ``otherwise`` if none is."""
    by_folded = {name.casefold(): name for name in sorted(names, reverse=True)}
    best = max(by_folded, key=lambda name: _similarity(word.casefold(), name), default=None)
    if best is None or _similarity(word.casefold(), best) < _SIMILAR:
        return otherwise
    return f"did you mean {by_folded[best]}?"


def _similarity(word: str, name: str) -> float:
    """From 0 to 1; a file suffix that both have does not count."""
    stem, dot, suffix = word.rpartition(".")
    other, _, others_suffix = name.rpartition(".")
    if dot and suffix == others_suffix:
        word, name = stem, other
    return SequenceMatcher(None, word, name).ratio()
