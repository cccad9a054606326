"""``python -m ci.gate [--base REVISION]``: checks a change, and refuses it unless every check passes.

Exit code 0: passed.  1: refused.  2: bad input.  3: unknown, a check gave no answer.  70: an internal error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from ci import GateError
from ci.command import at_least_one, command_line, run_as_command
from ci.evaluation import evaluate
from ci.plan import Options
from ci.report.publish import prepare, publish, publish_bad_input
from ci.report.terminal import bad_input, terminal
from ci.result import ExitCode


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_line("ci.gate", __doc__)
    parser.add_argument("--base", metavar="REVISION", help="compare with where this branch left it; default: main")
    parser.add_argument("--root", type=Path, default=Path(), help="the repository's root; default: the current folder")
    parser.add_argument("--jobs", type=at_least_one, default=2, help="how many checks to run at a time")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--first", action="store_true", help="stop at the first fault (bookkeeping does not count)")
    extent.add_argument("--all", action="store_true", help="run the tests even if a schedule is refuted")
    extent.add_argument(
        "--tested", action="store_true", help="make test and make test-long have passed on this tree: run no tests"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write every report there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page with the timelines there")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> ExitCode:
    options = parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names can be any bytes
    started = time.monotonic()

    def progress(line: str) -> None:
        print(f"gate {time.monotonic() - started:6.1f} s  {line}", file=sys.stderr, flush=True)

    try:
        prepare(options.output, options.html)
        root = _resolved(options.root)
        how = Options(options.jobs, options.first, options.all, options.tested)
        evaluation = evaluate(root, options.base, how, progress)
    except (GateError, OSError) as error:
        print(f"gate: {error}", file=sys.stderr)
        publish_bad_input(error, options.output)
        if options.json:
            print(json.dumps(bad_input(error)))
        return ExitCode.BAD_INPUT
    problems = publish(evaluation, root, options.output, options.html)
    print(terminal(evaluation, options.json), end="")
    for problem in problems:
        print(f"gate: a report could not be written: {problem}", file=sys.stderr)
    return ExitCode.UNKNOWN if problems and evaluation.exit_code is ExitCode.PASSED else evaluation.exit_code


def _resolved(root: Path) -> Path:
    try:
        return root.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError for a cycle of links
        raise GateError("--root must be a folder", str(error), "name another") from error


if __name__ == "__main__":
    run_as_command(main)
