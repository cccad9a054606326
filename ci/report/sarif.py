"""SARIF 2.1.0: each finding with the file and line that it points to, for tools that annotate a change."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any
from urllib.parse import quote

from ci.judgement import Judgement
from ci.outcome import Finding, Outcome, Verdict
from ci.place import Place

_OWN = "ci/gate.py"
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
RULES = {
    "golden": "The golden schedule files are what the generator gives.",
    "changelog": "A schedule that changes is named in a new entry of the changelog.",
    "counts": "The recorded counts and bounds of the theorems are right, and none changes without an explanation.",
    "schedule": "Every named schedule can be generated and read.",
    "complete": "Every stage runs F, B and W exactly once for each microbatch of each lane.",
    "order": "Every op comes after what it needs on its own rank.",
    "messages": "On every ordered pair of ranks the k-th send is the k-th receive's payload.",
    "deadlock": "Every rank reaches its end, whatever the compute times are.",
    "memory": "Live activations per rank stay within the bound.",
    "accumulation": "At each stage and lane B and W run in microbatch order.",
    "theorem": "What is claimed of a named schedule holds at every size.",
    "bitwise": "Every loss, gradient and weight is bitwise that of plain PyTorch.",
    "run": "Every rank of a trial comes to its end.",
    "vital signs": "The oracle itself learns.",
    "test": "The tests that reach the change pass.",
    "unknown": "Every check gives an answer within its time.",
}


def sarif(judgement: Judgement) -> str:
    """The log as text."""
    cause = judgement.places.cause
    results = [_result(outcome, finding, cause) for outcome, finding in judgement.findings]
    results += [_unanswered(outcome, cause) for outcome in judgement.outcomes if outcome.verdict is Verdict.UNKNOWN]
    driver = {
        "name": "schedule gate",
        "rules": [{"id": _id(rule), "shortDescription": {"text": text}} for rule, text in RULES.items()],
    }
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": judgement.exit_code in (0, 1), "exitCode": int(judgement.exit_code)}],
        "results": results,
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _result(outcome: Outcome, finding: Finding, cause: Place) -> dict[str, Any]:
    return {
        "ruleId": _id(finding.rule),
        "ruleIndex": list(RULES).index(finding.rule),
        "level": "error",
        "message": {"text": finding.message},
        "partialFingerprints": {"finding/v1": _fingerprint(finding)},
        "properties": {"check": outcome.check, "schedule": finding.schedule},
        "locations": _locations(Place(finding.path, finding.line) if finding.path else cause),
    }


def _locations(place: Place) -> list[dict[str, Any]]:
    """One location, which a result must have to be taken; the gate's own source where nothing is nearer."""
    region = {"startLine": max(1, place.line)}
    path = os.fsencode(place.path or _OWN)
    location = {"artifactLocation": {"uri": quote(path), "uriBaseId": "%SRCROOT%"}, "region": region}
    return [{"physicalLocation": location}]


def _unanswered(outcome: Outcome, cause: Place) -> dict[str, Any]:
    return {
        "ruleId": "unknown",
        "ruleIndex": list(RULES).index("unknown"),
        "level": "warning",
        "message": {"text": f"{outcome.check}: {outcome.told}"},
        "locations": _locations(cause),
    }


def _id(rule: str) -> str:
    return rule.replace(" ", "-")


def _fingerprint(finding: Finding) -> str:
    """The same for the same finding in another run: without its line, which moves."""
    parts = (finding.rule, finding.path, finding.schedule, finding.first_line)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
