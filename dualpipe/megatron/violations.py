"""A rule about the settings of Megatron, and the error that names every rule that they break."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dualpipe.errors import RuleError
from dualpipe.megatron.checks import Check, Settings


class Rule(NamedTuple):
    """A line of the table; ``got`` describes the setting that breaks the rule, or returns ``None``.

    ``v`` is the reason under DualPipeV if it is another one; ``None`` if the rule does not hold there.
    """

    name: str
    because: str
    got: Check
    fix: str
    v: str | None = ""


class Violation(NamedTuple):
    """A broken rule with its reason, the setting that breaks it, and how to fix it."""

    rule: str
    got: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.got}; {self.fix}"


class SettingsError(RuleError):
    """Settings that DualPipe cannot train with; ``violations`` has every rule that they break.

    ``flag`` is the option that selects the schedule.
    """

    def __init__(self, violations: Iterable[Violation], flag: str = "--use-dualpipe") -> None:
        self.violations = tuple(violations)
        if len(self.violations) == 1:
            super().__init__(*self.violations[0])
            return
        lines = "".join(f"\n  - {violation}" for violation in self.violations)
        super().__init__(
            f"{flag} is incompatible with {len(self.violations)} settings",
            "they are listed below",
            f"change each of them or leave out the flag{lines}",
        )


def broken(rules: Iterable[Rule], settings: Settings, v: bool = False) -> tuple[Violation, ...]:
    """Those of the rules that the settings break; ``v``: under DualPipeV."""
    found = ((rule, rule.got(settings)) for rule in rules if not (v and rule.v is None))
    return tuple(
        Violation(f"{rule.name} ({(rule.v if v else '') or rule.because})", got, rule.fix) for rule, got in found if got
    )
