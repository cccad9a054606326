"""JUnit XML: one suite with a case for each check; findings are failures, an unknown check is an error."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from ci.evaluation import Evaluation
from ci.result import CheckResult, Verdict

_TAGS = {
    Verdict.UNKNOWN: "error",
    Verdict.SKIPPED: "skipped",
    Verdict.REFUSED: "failure",
}
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not allow."""


def junit(evaluation: Evaluation) -> str:
    """The report.  Each finding is a case of its own, so that a list of failed cases shows them all."""
    cases = [case for result in evaluation.results for case in _cases(result)]
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    attributes = {"name": "schedule gate", **{key: str(count) for key, count in counts.items()}}
    suite = ET.Element("testsuite", {**attributes, "time": f"{evaluation.seconds:.3f}"})
    suite.extend(cases)
    suites = ET.Element("testsuites", attributes)
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _cases(result: CheckResult) -> list[ET.Element]:
    seconds = f"{result.seconds:.3f}"
    if not result.findings:
        case = ET.Element("testcase", {"classname": "gate", "name": result.check, "time": seconds})
        tag = _TAGS.get(result.verdict)
        if tag is not None:
            ET.SubElement(case, tag, {"message": _clean(result.summary)})
        return [case]
    cases = []
    for number, finding in enumerate(result.findings):
        name = " ".join(filter(None, [result.check, finding.rule, finding.schedule]))
        case = ET.Element(
            "testcase",
            {
                "classname": f"gate.{result.check}",
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
