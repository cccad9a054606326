"""The report of a schedule: the result of each check, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, assert_never

from dualpipe.schedule import Failure
from proofs.findings import Finding
from proofs.memory import PeakBytes
from proofs.prefix import Prefix
from proofs.story import live_lines, tell
from proofs.verdict import ExitCode, Proved, Refuted, Skipped, Unknown, Verdict, overall, worst


@dataclass(frozen=True)
class Result:
    """One check's verdict, the seconds that each method took, and, if it fails, the smallest prefix that fails.

    ``remarks`` are on the messages of the finding: where the recorded program posted them, and which names are guesses.
    For ``deadlock``, ``models`` has the result under each model of communication.  ``after`` is the failure of the
    recorded program that a refutation may follow from.  ``waived`` is empty, or what may be the case because the check
    fails and does not count for the verdict of the whole.
    """

    verdict: Verdict
    seconds: Mapping[str, float]
    prefix: Prefix | None = None
    remarks: tuple[str, ...] = ()
    models: Mapping[str, Result] = field(default_factory=dict)
    after: Failure | None = None
    waived: str = ""

    @property
    def finding(self) -> Finding | None:
        """What the check found, if it is refuted and more than the solver's core is known."""
        return self.verdict.finding if isinstance(self.verdict, Refuted) else None

    def story(self, finding: Finding) -> str:
        """The finding as text, with the remarks."""
        return "\n".join([tell(finding), *self.remarks])

    def as_json(self) -> dict[str, Any]:
        seconds = {method: round(spent, 4) for method, spent in self.seconds.items()}
        shown: dict[str, Any] = {
            "verdict": self.verdict.word,
            "seconds": round(sum(seconds.values()), 4),
            "methods": seconds,
        }
        match self.verdict:
            case Refuted(finding, core):
                if finding is not None:
                    shown |= {"story": self.story(finding), "finding": finding.as_json()}
                if core:
                    shown["core"] = list(core)
            case Unknown(reason) | Skipped(reason):
                shown["reason"] = reason
            case Proved():
                pass
            case _:
                assert_never(self.verdict)
        if self.after is not None:
            shown["may_follow_from"] = str(self.after)
        if self.waived:
            shown["waived"] = self.waived
        if self.prefix is not None:
            shown["prefix"] = list(self.prefix)
        if self.models:
            shown["models"] = {name: result.as_json() for name, result in self.models.items()}
        return shown


@dataclass(frozen=True)
class Report:
    """The results of all checks of a schedule.

    ``label`` names it; ``peaks_in_bytes`` is empty without sizes.  With ``failures``, those of a recorded program, the
    schedule is refuted whatever the checks find, since the program did not run through.  ``doubts`` say which names of
    messages may be wrong, so that stories that rest on them mislead.
    """

    label: str
    ranks: int
    checks: Mapping[str, Result]
    peak_activations: tuple[int, ...]
    peaks_in_bytes: tuple[PeakBytes, ...] = ()
    failures: tuple[Failure, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        code = overall(result.verdict for result in self.checks.values() if not result.waived)
        return worst([code, ExitCode.REFUTED]) if self.failures else code

    @property
    def verdict(self) -> str:
        """``proved``, ``refuted`` or ``unknown``; of the checks that are not waived."""
        return self.exit_code.name.lower()

    @property
    def waived(self) -> tuple[str, ...]:
        """The checks that fail and are waived."""
        return tuple(name for name, result in self.checks.items() if result.waived)

    def as_json(self) -> dict[str, Any]:
        """The object that ``dualpipe prove --json`` prints."""
        shown: dict[str, Any] = {
            "schedule": self.label,
            "ranks": self.ranks,
            "verdict": self.verdict,
        }
        if self.failures:
            shown["failures"] = [failure._asdict() for failure in self.failures]
        if self.doubts:
            shown["doubts"] = list(self.doubts)
        shown["checks"] = {name: result.as_json() for name, result in self.checks.items()}
        shown["peak_activations"] = list(self.peak_activations)
        if self.waived:
            shown["waived"] = list(self.waived)
        if self.peaks_in_bytes:
            shown["peak_bytes"] = [peak.as_json() for peak in self.peaks_in_bytes]
        return shown

    def text(self) -> str:
        """The report for a terminal: failures, doubts, a line for each check with its story below, then the peaks."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        names = " and ".join(self.waived)
        but = f" but for {names} (waived)" if self.exit_code is ExitCode.PROVED else f", with {names} waived"
        lines = [
            *map(str, self.failures),
            f"{self.label or 'schedule'} on {ranks}: {self.verdict}{but if names else ''}",
            *(f"  {line}" for doubt in self.doubts for line in doubt.split("\n")),
        ]
        for name, result in self.checks.items():
            spent = ", ".join(f"{method} {seconds:.2f} s" for method, seconds in result.seconds.items())
            lines.append(f"  {name:<13} {result.verdict.word:<8}  {spent}")
            lines += [f"      {line}" for line in describe(result)]
        lines.append(f"  peak activations by rank: {' '.join(map(str, self.peak_activations))}")
        for peak in self.peaks_in_bytes:
            when = "" if peak.slot is None else f" in slot {peak.slot}"
            lines.append(f"  rank {peak.rank} holds at most {peak.total} bytes{when}")
            lines += [f"    {line}" for line in live_lines(tuple(held.what for held in peak.held))]
        return "\n".join(lines) + "\n"


def describe(result: Result) -> list[str]:
    """The lines below a check in the report: the story and remarks, or the reason, and what a waiver leaves open."""
    return [*_found(result), *([f"waived: {result.waived}"] if result.waived else [])]


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _found(result: Result) -> list[str]:
    match result.verdict:
        case Unknown(reason) | Skipped(reason):
            return [reason]
        case Proved():
            return [f"with {_listed(result.models)} messages"] if result.models else []
        case Refuted(finding, _):
            if finding is None:
                return []
            lines = result.story(finding).split("\n")
            if result.prefix is not None:
                counts = ", ".join(f"{count} of rank {rank}" for rank, count in enumerate(result.prefix) if count)
                lines.append(f"the first slots are enough to see it: {counts}")
            passed = [name for name, other in result.models.items() if isinstance(other.verdict, Proved)]
            if passed:
                lines.append(f"proved with {_listed(passed)} messages")
            if result.after is not None:
                what = "hang" if result.after.is_hang else "failure"
                lines.append(f"this may be a consequence of the {what}: rank {result.after.rank} ended early")
            return lines
        case _:
            assert_never(result.verdict)
