"""The form of every complaint about input."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = ["RuleError", "StageError", "UndecidedError"]

_ALIKE = 0.7
"""From which likeness on a name is suggested: one letter of four may differ, but not two."""


class RuleError(ValueError):
    """Bad input: the rule that was broken, what came, and what to do about it."""

    def __init__(self, rule: str, got: str, fix: str) -> None:
        self.rule, self.got, self.fix = rule, got, fix
        super().__init__(f"{rule}: {got}; {fix}")


class StageError(RuleError):
    """A stage, a criterion or data of the user's that cannot be trained on as it is."""


class UndecidedError(RuntimeError):
    """A question that could not be answered, which is neither a yes nor a no."""


def nearest(word: str, names: Iterable[str], otherwise: str) -> str:
    """The remedy ``did you mean NAME?`` for the name most like ``word`` (case apart), or ``otherwise``."""
    by_folded = {name.casefold(): name for name in sorted(names, reverse=True)}
    best = max(by_folded, key=lambda name: _likeness(word.casefold(), name), default=None)
    if best is None or _likeness(word.casefold(), best) < _ALIKE:
        return otherwise
    return f"did you mean {by_folded[best]}?"


def _likeness(word: str, name: str) -> float:
    """From 0 to 1; of two files with the same suffix only the rest counts."""
    stem, dot, suffix = word.rpartition(".")
    other, _, others_suffix = name.rpartition(".")
    if dot and suffix == others_suffix:
        word, name = stem, other
    return SequenceMatcher(None, word, name).ratio()
