"""JUnit XML: one suite, a case a check, its findings as failures; unknown is an error and skipped is skipped."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from ci.judgement import Judgement
from ci.outcome import Outcome, Verdict

_TAGS = {
    Verdict.UNKNOWN: "error",
    Verdict.SKIPPED: "skipped",
    Verdict.REFUSED: "failure",
}
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold."""


def junit(judgement: Judgement) -> str:
    """The report; a finding is a case of its own, so that each can be seen in a list of failed ones."""
    cases = [case for outcome in judgement.outcomes for case in _cases(outcome)]
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    attributes = {"name": "schedule gate", **{key: str(count) for key, count in counts.items()}}
    suite = ET.Element("testsuite", {**attributes, "time": f"{judgement.seconds:.3f}"})
    suite.extend(cases)
    suites = ET.Element("testsuites", attributes)
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _cases(outcome: Outcome) -> list[ET.Element]:
    seconds = f"{outcome.seconds:.3f}"
    if not outcome.findings:
        case = ET.Element("testcase", {"classname": "gate", "name": outcome.check, "time": seconds})
        tag = _TAGS.get(outcome.verdict)
        if tag is not None:
            ET.SubElement(case, tag, {"message": _clean(outcome.told)})
        return [case]
    cases = []
    for number, finding in enumerate(outcome.findings):
        name = " ".join(filter(None, [outcome.check, finding.rule, finding.schedule]))
        case = ET.Element(
            "testcase",
            {
                "classname": f"gate.{outcome.check}",
                "name": f"{name} [{number}]",
                "file": finding.path,
                "line": str(finding.line),
                "time": seconds if number == 0 else "0",
            },
        )
        failure = ET.SubElement(case, "failure", {"message": _clean(finding.first_line), "type": finding.rule})
        failure.text = _clean(finding.message)
        cases.append(case)
    return cases


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
