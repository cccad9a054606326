"""SARIF 2.1.0: each finding with its file and line, for tools that annotate a change."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any
from urllib.parse import quote

from ci.evaluation import Evaluation
from ci.location import Location
from ci.result import CheckResult, Finding, Verdict

_OWN = "ci/gate.py"
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
RULES = {
    "golden": "The golden schedule files are what the generator gives.",
    "changelog": "A schedule that changes is named in a new entry of the changelog.",
    "counts": "The recorded counts and makespans of the theorems are right, and explained if they change.",
    "schedule": "Every named schedule can be generated and read.",
    "complete": "Every stage runs F, B and W exactly once for each microbatch of each lane.",
    "order": "Every op runs after what it needs on its own rank.",
    "messages": "On every ordered pair of ranks the k-th send is what the k-th receive expects.",
    "deadlock": "Every rank reaches its end, whatever the compute times are.",
    "memory": "Live activations per rank stay within the bound.",
    "accumulation": "At each stage and lane B and W run in microbatch order.",
    "buffers": "No rank touches the memory of a message in flight, or memory that a graph still needs.",
    "theorem": "Every theorem about a named schedule holds at every size.",
    "bitwise": "Every loss, gradient and weight is bitwise equal to that of plain PyTorch.",
    "run": "Every rank of a trial ends without an error.",
    "vital signs": "The oracle itself trains.",
    "test": "The tests that reach the change pass.",
    "unknown": "Every check gives an answer within its time limit.",
}


def sarif(evaluation: Evaluation) -> str:
    """The log as text."""
    cause = evaluation.cause
    results = [_result(result, finding, cause) for result, finding in evaluation.findings]
    results += [_unanswered(result, cause) for result in evaluation.results if result.verdict is Verdict.UNKNOWN]
    driver = {
        "name": "schedule gate",
        "rules": [{"id": _id(rule), "shortDescription": {"text": text}} for rule, text in RULES.items()],
    }
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": evaluation.exit_code in (0, 1), "exitCode": int(evaluation.exit_code)}],
        "results": results,
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _result(result: CheckResult, finding: Finding, cause: Location) -> dict[str, Any]:
    return {
        "ruleId": _id(finding.rule),
        "ruleIndex": list(RULES).index(finding.rule),
        "level": "error",
        "message": {"text": finding.message},
        "partialFingerprints": {"finding/v1": _fingerprint(finding)},
        "properties": {"check": result.check, "schedule": finding.schedule},
        "locations": _locations(Location(finding.path, finding.line) if finding.path else cause),
    }


def _locations(location: Location) -> list[dict[str, Any]]:
    """One location, without which a result is rejected; the gate's own source if there is none."""
    region = {"startLine": max(1, location.line)}
    path = os.fsencode(location.path or _OWN)
    physical = {"artifactLocation": {"uri": quote(path), "uriBaseId": "%SRCROOT%"}, "region": region}
    return [{"physicalLocation": physical}]


def _unanswered(result: CheckResult, cause: Location) -> dict[str, Any]:
    return {
        "ruleId": "unknown",
        "ruleIndex": list(RULES).index("unknown"),
        "level": "warning",
        "message": {"text": f"{result.check}: {result.summary}"},
        "locations": _locations(cause),
    }


def _id(rule: str) -> str:
    return rule.replace(" ", "-")


def _fingerprint(finding: Finding) -> str:
    """Identifies a finding across runs; without its line, which moves."""
    parts = (finding.rule, finding.path, finding.schedule, finding.first_line)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
