"""The form of every complaint about input."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["RuleError", "StageError", "UndecidedError"]


class RuleError(ValueError):
    """Bad input: the rule that was broken, what came, and what to do about it."""

    def __init__(self, rule: str, came: str, remedy: str) -> None:
        self.rule, self.came, self.remedy = rule, came, remedy
        super().__init__(f"{rule}: {came}; {remedy}")


class StageError(RuleError):
    """A stage, a criterion or data of the user's that cannot be trained on as it is."""


class UndecidedError(RuntimeError):
    """A question that could not be answered, which is neither a yes nor a no."""


def nearest(word: str, names: Iterable[str], otherwise: str) -> str:
    """The remedy ``did you mean NAME?`` for the name most like ``word`` (case apart), or ``otherwise``."""
    by_folded = {name.casefold(): name for name in sorted(names, reverse=True)}
    found = get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return f"did you mean {by_folded[found[0]]}?" if found else otherwise
