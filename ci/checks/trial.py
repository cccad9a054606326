"""The checks ``trial``: schedules are trained with, and every tensor compared bitwise with an oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ci.checks.check import Check, Reading, count_schedules, json_lines, no_answer
from ci.location import Locator
from ci.process import Completed, python
from ci.result import Finding, Verdict

LIMIT_S = 240.0


def check(files: Sequence[Path], why: str, locator: Locator, blocking: bool = False, first: bool = False) -> Check:
    """Fake ranks and real processes against the oracle, on schedule files; ``first`` stops at one that differs."""
    name, options = ("trial, blocking", ["--blocking"]) if blocking else ("trial", [])
    names = [file.stem for file in files]
    return _check(name, [*options, *map(str, files)], names, "plain PyTorch", why, locator, first)


def check_megatron(names: Sequence[str], why: str, locator: Locator, first: bool = False) -> Check:
    """The drop-in against Megatron's own 1F1B, on cases of ``ci.child.verify``."""
    return _check("trial, Megatron", ["--megatron", *names], names, "Megatron's 1F1B", why, locator, first)


def _check(
    name: str, arguments: Sequence[str], names: Sequence[str], oracle: str, why: str, locator: Locator, first: bool
) -> Check:
    def read(done: Completed) -> Reading:
        reports = json_lines(done)
        findings = [finding for report in reports for finding in _differences(report, locator)]
        tried = [report["name"] for report in reports]
        if tried != list(names) and not (first and findings and tried == list(names)[: len(tried)]):
            return no_answer(done)
        unknown = [report for report in reports if report["verdict"] == "unknown"]
        if findings:
            summary = f"{count_schedules(findings)} of {len(tried)} differ from {oracle}"
            return Verdict.REFUSED, summary, tuple(findings)
        if unknown:
            return Verdict.UNKNOWN, f"{unknown[0]['name']}: {unknown[0]['error']}", ()
        tensors = sum(report["tensors"] for report in reports)
        return Verdict.PASSED, f"{len(tried)} tried, {tensors} tensors bitwise equal to {oracle}", ()

    command = python("-m", "ci.child.verify", *["--first"] * first, *arguments)
    return Check(name, why, command, LIMIT_S, read)


def _differences(report: Mapping[str, Any], locator: Locator) -> list[Finding]:
    """The findings of one report: failed sanity checks of the oracle, then each run's failure or first difference."""
    name, path, line = report["name"], locator.cause.path, locator.cause.line
    if report["verdict"] == "bad input":
        return [Finding("schedule", f"{name}: {report['error']}", path, line, name)]
    if report["verdict"] in ("equal", "unknown"):
        return []
    findings = [Finding("vital signs", f"{name}: {complaint}", path, line, name) for complaint in report["complaints"]]
    for how, result in report["parties"].items():
        if result["failures"]:
            failures = "\n".join(result["failures"])
            findings.append(Finding("run", f"{name}, {how}: {failures}", path, line, name))
        elif result["differences"]:
            differences = f"{result['differences']} differences, first {result['first_difference']}"
            findings.append(Finding("bitwise", f"{name}, {how}: {differences}", path, line, name))
    return findings or [Finding("bitwise", f"{name}: {report['verdict']}", path, line, name)]
