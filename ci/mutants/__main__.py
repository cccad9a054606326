"""``python -m ci.mutants``: changes the sources at random, one place at a time, and runs the tests of each mutant.

Exit code 0: every mutant was caught.  1: some survived.  2: bad input.  70: an internal error.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ci import GateError
from ci.command import at_least_one, command_line, run_as_command
from ci.mutants.mutation import Mutant, sample, sources
from ci.mutants.runner import MutantResult, Runner, copy_tree
from ci.process import end_all

OUTCOMES = ("caught", "survived", "timed out")


def table(results: Sequence[MutantResult]) -> Iterator[str]:
    """One row for each file: sampled, caught, survived, timed out; then the sum."""
    by_file: dict[str, Counter[str]] = {}
    for result in results:
        by_file.setdefault(result.mutant.path, Counter())[result.outcome] += 1
    width = max(map(len, [*by_file, "all"]))
    yield "  ".join([f"{'file':<{width}}", "sampled", *OUTCOMES])
    for path, counts in [*sorted(by_file.items()), ("all", Counter(result.outcome for result in results))]:
        cells = [f"{counts[outcome]:>{len(outcome)}}" for outcome in OUTCOMES]
        yield "  ".join([f"{path:<{width}}", f"{counts.total():>7}", *cells])


def report(results: Sequence[MutantResult], seed: int) -> dict[str, object]:
    """The content of ``--output``."""
    counts = Counter(result.outcome for result in results)
    return {
        "seed": seed,
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "trials": [t.as_json() for t in results],
    }


def run_all(mutants: Sequence[Mutant], runner: Runner) -> list[MutantResult]:
    """Run the mutants one after the other, and print each survivor at once."""
    results = []
    for number, mutant in enumerate(mutants, start=1):
        result = runner.run(mutant)
        results.append(result)
        where = f"{mutant.path}:{mutant.line}"
        print(f"{number}/{len(mutants)} {result.outcome} {where} ({result.seconds:.0f} s)", file=sys.stderr, flush=True)
        if result.outcome == "survived":
            print(f"survived: {where}  {mutant.operator}\n{result.diff}\n", flush=True)
    return results


def main(arguments: Sequence[str]) -> int:
    parser = command_line("ci.mutants", __doc__)
    parser.add_argument("--count", type=at_least_one, default=150, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=1, help="the same seed draws the same mutants")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every mutant and its outcome as JSON")
    parser.add_argument(
        "--tests", nargs="+", default=[], metavar="PATH", help="run these tests, not those of the table"
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="sources or folders to mutate, in place of all")
    options = parser.parse_args(arguments)
    if options.output is not None and not options.output.absolute().parent.is_dir():
        got = f"there is no folder {options.output.parent}"
        raise GateError("--output is a file that can be written", got, "create the folder, or name another file")
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        tracked = copy_tree(Path.cwd(), folder)
        texts = {path: (folder / path).read_text() for path in sources(folder, tracked, options.files)}
        try:
            results = run_all(sample(texts, options.count, options.seed), Runner(folder, tuple(options.tests)))
        except BaseException:  # Ctrl-C or a signal: end the running tests
            end_all()
            raise
    print("\n".join(table(results)))
    if options.output is not None:
        options.output.write_text(json.dumps(report(results, options.seed), indent=2) + "\n")
    return 1 if any(result.outcome == "survived" for result in results) else 0


if __name__ == "__main__":
    run_as_command(main)
