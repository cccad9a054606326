"""``python -m ci.mutants``: mutate the sources at random, one place at a time, and run the tests of each mutant.

Exit code 0: every mutant was caught.  1: some survived.  2: bad input.  70: a fault of this program itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ci.command import at_least_one, command_line, run_as_command
from ci.errors import GateError
from ci.mutants.mutation import Mutant, sample, sources
from ci.mutants.trial import Court, Trial, copy_tree
from ci.process import end_all

OUTCOMES = ("caught", "survived", "timed out")


def table(trials: Sequence[Trial]) -> Iterator[str]:
    """One row a file: sampled, caught, survived, timed out; then the sum."""
    by_file: dict[str, Counter[str]] = {}
    for trial in trials:
        by_file.setdefault(trial.mutant.path, Counter())[trial.outcome] += 1
    width = max(map(len, [*by_file, "all"]))
    yield "  ".join([f"{'file':<{width}}", "sampled", *OUTCOMES])
    for path, counts in [*sorted(by_file.items()), ("all", Counter(trial.outcome for trial in trials))]:
        cells = [f"{counts[outcome]:>{len(outcome)}}" for outcome in OUTCOMES]
        yield "  ".join([f"{path:<{width}}", f"{counts.total():>7}", *cells])


def report(trials: Sequence[Trial], seed: int) -> dict[str, object]:
    """What ``--output`` writes."""
    counts = Counter(trial.outcome for trial in trials)
    return {"seed": seed, **{outcome: counts[outcome] for outcome in OUTCOMES}, "trials": [t.as_json() for t in trials]}


def run_all(mutants: Sequence[Mutant], court: Court) -> list[Trial]:
    """Try the mutants one after the other, and print each survivor when it is known."""
    trials = []
    for number, mutant in enumerate(mutants, start=1):
        trial = court.try_one(mutant)
        trials.append(trial)
        where = f"{mutant.path}:{mutant.line}"
        print(f"{number}/{len(mutants)} {trial.outcome} {where} ({trial.seconds:.0f} s)", file=sys.stderr, flush=True)
        if trial.outcome == "survived":
            print(f"survived: {where}  {mutant.operator}\n{trial.diff}\n", flush=True)
    return trials


def main(arguments: Sequence[str]) -> int:
    parser = command_line("ci.mutants", __doc__)
    parser.add_argument("--count", type=at_least_one, default=150, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=1, help="the same seed draws the same mutants")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every mutant and its outcome as JSON")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="run these tests, not the table's")
    parser.add_argument("files", nargs="*", metavar="FILE", help="sources or folders to mutate, in place of all")
    options = parser.parse_args(arguments)
    if options.output is not None and not options.output.absolute().parent.is_dir():
        got = f"there is no folder {options.output.parent}"
        raise GateError("--output is a file that can be written", got, "make the folder, or name another file")
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        tracked = copy_tree(Path.cwd(), folder)
        texts = {path: (folder / path).read_text() for path in sources(folder, tracked, options.files)}
        try:
            trials = run_all(sample(texts, options.count, options.seed), Court(folder, tuple(options.tests)))
        except BaseException:  # Ctrl-C or a signal: no test may go on
            end_all()
            raise
    print("\n".join(table(trials)))
    if options.output is not None:
        options.output.write_text(json.dumps(report(trials, options.seed), indent=2) + "\n")
    return 1 if any(trial.outcome == "survived" for trial in trials) else 0


if __name__ == "__main__":
    run_as_command(main)
