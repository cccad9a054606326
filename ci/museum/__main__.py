"""``python -m ci.museum``: plants every fault, runs the gate on each, and prints what refused it.

Exit code 0: every fault was refused by the check that should, and every harmless change let through.  1: not so.
2: bad input.  70: a fault of the museum itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ci.command import at_least_one, command_line, run_as_command
from ci.museum.clone import make_template
from ci.museum.collection import EXHIBITS
from ci.museum.exhibit import Exhibit
from ci.museum.visit import Visit, visit
from ci.process import end_all


def chosen(only: str | None) -> list[Exhibit]:
    """The exhibits whose number is ``only``, or whose title or file has it."""
    if only is None:
        return list(EXHIBITS)
    if only.isdecimal():
        return [exhibit for exhibit in EXHIBITS if exhibit.number == int(only)]
    return [exhibit for exhibit in EXHIBITS if only in exhibit.title or only in exhibit.path]


def row(seen: Visit) -> str:
    """One line of the table."""
    exhibit = seen.exhibit
    mark = "ok   " if seen.right else "WRONG"
    number = f"{exhibit.number or '-':>3}"
    by = seen.refused_by or seen.verdict
    line = f"{mark} {number}  {exhibit.title} ({exhibit.path})\n           {by}, {seen.seconds:.1f} s"
    said = "; but it says: ".join(filter(None, [seen.wrong, seen.first_line]))
    return line + (f": {said[:300]}" if said else "")


def tour(root: Path, exhibits: list[Exhibit], jobs: int, as_json: bool) -> list[Visit]:
    """Try the exhibits, ``jobs`` at a time, and print each in its turn."""
    visits = []
    with tempfile.TemporaryDirectory(prefix="gate-museum-") as name:
        folder = Path(name)
        template = folder / "template"
        template.mkdir()
        make_template(root, template)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                numbered = enumerate(exhibits)
                for seen in pool.map(lambda item: visit(item[1], template, folder / f"clone-{item[0]}"), numbered):
                    visits.append(seen)
                    print(json.dumps(seen.as_json()) if as_json else row(seen), flush=True)
            except BaseException:  # Ctrl-C or a signal: nothing that was started may go on
                pool.shutdown(wait=False, cancel_futures=True)
                end_all()
                raise
    return visits


def main(arguments: Sequence[str]) -> int:
    parser = command_line("ci.museum", __doc__)
    parser.add_argument("--only", metavar="TEXT", help="a fault's number, or text of its title or file")
    parser.add_argument("--jobs", type=at_least_one, default=2, help="exhibits at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    options = parser.parse_args(arguments)
    exhibits = chosen(options.only)
    if not exhibits:
        print(f"museum: no exhibit fits {options.only!r}", file=sys.stderr)
        return 2
    visits = tour(Path.cwd(), exhibits, options.jobs, options.json)
    right = sum(seen.right for seen in visits)
    if not options.json:
        faults = sum(not seen.exhibit.harmless for seen in visits)
        seconds = sum(seen.seconds for seen in visits)
        shown = f"{faults} faults and {len(visits) - faults} harmless changes"
        print(f"{shown}: {right} of {len(visits)} judged as they should be, {seconds:.0f} s of work")
    return 0 if right == len(visits) else 1


if __name__ == "__main__":
    run_as_command(main)
