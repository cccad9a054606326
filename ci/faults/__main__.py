"""``python -m ci.faults``: plants every fault, runs the gate on each, and prints which check refused it.

Exit code 0: the expected check refused each fault, and each harmless change passed.  1: not so.  2: bad input.
70: an error of this program itself, not a verdict.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ci.command import BAD_INPUT, at_least_one, command_line, run_as_command
from ci.faults.clone import make_template
from ci.faults.collection import PLANTED
from ci.faults.fault import SourceFault
from ci.faults.gate_run import GateRun, run_gate
from ci.process import end_all


def chosen(only: str | None) -> list[SourceFault]:
    """The faults whose number is ``only``, or whose title or file contains it."""
    if only is None:
        return list(PLANTED)
    if only.isdecimal():
        return [fault for fault in PLANTED if fault.number == int(only)]
    return [fault for fault in PLANTED if only in fault.title or only in fault.path]


def row(gate_run: GateRun) -> str:
    """The two lines that are printed for a fault."""
    fault = gate_run.fault
    mark = "ok   " if gate_run.right else "WRONG"
    by = gate_run.refused_by or gate_run.verdict
    head = f"{mark} {fault.number or '-':>3}  {fault.title} ({fault.path})\n           {by}, {gate_run.seconds:.1f} s"
    detail = "; the finding: ".join(filter(None, [gate_run.wrong, gate_run.first_line]))
    return head + (f": {detail[:300]}" if detail else "")


def run_all(root: Path, faults: Sequence[SourceFault], jobs: int, as_json: bool) -> list[GateRun]:
    """Run the gate on each fault, ``jobs`` at a time, and print the results in order."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="gate-faults-") as name:
        folder = Path(name)
        template = folder / "template"
        template.mkdir()
        make_template(root, template)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                numbered = enumerate(faults)
                for ended in pool.map(lambda item: run_gate(item[1], template, folder / f"clone-{item[0]}"), numbered):
                    runs.append(ended)
                    print(json.dumps(ended.as_json()) if as_json else row(ended), flush=True)
            except BaseException:  # Ctrl-C or a signal: end everything that was started
                pool.shutdown(wait=False, cancel_futures=True)
                end_all()
                raise
    return runs


def main(arguments: Sequence[str]) -> int:
    parser = command_line("ci.faults", __doc__)
    parser.add_argument("--only", metavar="TEXT", help="a fault's number, or text of its title or file")
    parser.add_argument("--jobs", type=at_least_one, default=2, help="how many faults to try at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options = parser.parse_args(arguments)
    faults = chosen(options.only)
    if not faults:
        print(f"museum: no planted fault matches {options.only!r}", file=sys.stderr)
        return BAD_INPUT
    runs = run_all(Path.cwd(), faults, options.jobs, options.json)
    right = sum(ended.right for ended in runs)
    if not options.json:
        planted = sum(not ended.fault.harmless for ended in runs)
        seconds = sum(ended.seconds for ended in runs)
        counts = f"{planted} faults and {len(runs) - planted} harmless changes"
        print(f"{counts}: {right} of {len(runs)} as expected, {seconds:.0f} s of work")
    return 0 if right == len(runs) else 1


if __name__ == "__main__":
    run_as_command(main)
