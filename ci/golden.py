"""``python -m ci.golden [--no-theorems]``: writes the files of tests/golden.

They hold each named schedule as text at a few sizes, its digests at more sizes, and the counts of the theorems.  The
gate refuses a golden file that differs from the output of the tree's own generator.

Exit code 0: written.  2: a schedule cannot be expanded, or the theorems cannot be counted.  70: an internal error.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ci import GateError
from ci.command import BAD_INPUT, command_line, run_as_command
from ci.process import python, run

FOLDER = "tests/golden"
DIGESTS = f"{FOLDER}/digests.txt"
COUNTS = f"{FOLDER}/theorems.txt"
EXPAND_LIMIT_S, THEOREMS_LIMIT_S = 60.0, 400.0


class Count(NamedTuple):
    """The obligations of a theorem, how many of them arise at some size, and the bound that is proved.

    Only the makespans and ``lower bound`` have such a bound, in ranks P and microbatches M.
    """

    obligations: int
    arising: int
    bound: str = ""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Count:
        """The count of a result of ``dualpipe prove --all-sizes --json``."""
        return cls(result["obligations"], result["non_vacuous"], result.get("bound") or "")


Counts = Mapping[str, Count]
"""By theorem, such as ``dualpipe: messages``."""


@dataclass(frozen=True)
class Expansion:
    """The output of a tree's generator, by name of the schedule.

    ``shown`` and ``digested`` are texts of schedules, ``rows`` the rows that they were expanded from, ``failed`` the
    errors of those that could not be expanded.  ``ci/child/expand.py`` describes them.
    """

    shown: Mapping[str, str]
    digested: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def texts(self) -> dict[str, str]:
        return {**self.shown, **self.digested}

    def files(self, kept: Mapping[str, str]) -> dict[str, str]:
        """The texts of the golden files by path, without the counts of the theorems.

        ``kept`` are the present files; a schedule that failed keeps its own.
        """
        digests = {name: value for name, value in read_digests(kept.get(DIGESTS, "")).items() if name in self.failed}
        digests |= {name: digest(text) for name, text in self.digested.items()}
        files = {path: kept[path] for path in map(path_of, self.failed) if path in kept}
        files |= {path_of(name): text for name, text in self.shown.items()}
        return files | {DIGESTS: "".join(f"{name} {value}\n" for name, value in sorted(digests.items()))}


def path_of(name: str) -> str:
    """The golden file of a shown schedule."""
    return f"{FOLDER}/{name}.txt"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def expansion(root: Path, tree: Path | None = None) -> Expansion:
    """Expand the schedules of ``tree`` (``root`` if ``None``) in a separate process.

    Raises ``GateError`` if the tree's generator fails or exceeds its time limit.
    """
    tree = root if tree is None else tree
    script = Path(__file__).with_name("child") / "expand.py"
    done = run(python("-P", str(script), str(tree)), tree, EXPAND_LIMIT_S, tree)
    try:
        answer = json.loads(done.out) if done.code == 0 else None
    except json.JSONDecodeError:
        answer = None
    if answer is None:
        why = f"no answer within {EXPAND_LIMIT_S:g} s" if done.code is None else done.last_line
        raise GateError("the generator must expand every named schedule", why, "see dualpipe/schedule/generate.py")
    return Expansion(**answer)


def is_golden_schedule(path: str) -> bool:
    """Whether a path is a golden file that ``make golden`` writes from the generator."""
    return path.startswith(f"{FOLDER}/") and path.endswith(".txt") and path != COUNTS


def read_digests(text: str) -> dict[str, str]:
    """The digests by name of the schedule.  Raises ``GateError`` for a malformed line."""
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name, space, value = line.partition(" ")
        if not space or len(value) != 64:
            raise GateError(
                "a line of the digests must be NAME SHA256", f"{DIGESTS}:{number} is {line!r}", "make golden"
            )
        found[name] = value
    return found


def read_counts(text: str) -> dict[str, Count]:
    """The recorded counts.  Raises ``GateError`` for a malformed line."""
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name, _, rest = line.partition("  ")
        figures, _, bound = rest.partition("  ")
        words = figures.split()
        if not name or len(words) != 2 or not all(word.isdigit() for word in words):
            raise GateError(
                "a line of the counts must be FAMILY: THEOREM  OBLIGATIONS ARISING, then the bound of a makespan",
                f"{COUNTS}:{number} is {line!r}",
                "make golden",
            )
        found[name] = Count(int(words[0]), int(words[1]), bound)
    return found


def show_counts(counts: Counts) -> str:
    lines = (f"{name}  {count.obligations} {count.arising}  {count.bound}" for name, count in counts.items())
    return "".join(f"{line.rstrip()}\n" for line in lines)


def count_theorems(root: Path, kept: Counts) -> tuple[dict[str, Count], dict[str, str]]:
    """Run the theorems and count their obligations; those not proved keep their ``kept`` count, and have a reason.

    Raises ``GateError`` if they cannot be counted.
    """
    done = run(python("-m", "dualpipe.cli", "prove", "--all-sizes", "--json"), root, THEOREMS_LIMIT_S)
    try:
        results = [json.loads(line) for line in done.out.splitlines()]
    except json.JSONDecodeError:
        results = []
    if done.code is None or not results:
        raise GateError("the theorems can be counted", done.last_line, "see dualpipe prove --all-sizes")
    unproved = {result["name"]: result["reason"] for result in results if result["verdict"] != "proved"}
    counts = {result["name"]: Count.of(result) for result in results if result["name"] not in unproved}
    counts |= {name: kept[name] for name in unproved if name in kept}
    return {result["name"]: counts[result["name"]] for result in results if result["name"] in counts}, unproved


def kept_files(root: Path) -> dict[str, str]:
    """The present golden files of schedules, by path."""
    files = {f"{FOLDER}/{file.name}": file for file in sorted((root / FOLDER).glob("*.txt"))}
    return {path: file.read_text(errors="replace") for path, file in files.items() if is_golden_schedule(path)}


def write(root: Path, files: Mapping[str, str]) -> list[str]:
    """Write the golden files, and remove those that are not in ``files``, except the counts.

    Returns the paths that changed.
    """
    changed = []
    for path in sorted({*files, *(f"{FOLDER}/{file.name}" for file in (root / FOLDER).glob("*.txt"))}):
        file = root / path
        before = file.read_text() if file.exists() else None
        after = files.get(path, before if path == COUNTS else None)
        if after == before:
            continue
        changed.append(path)
        if after is None:
            file.unlink()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(after)
    return changed


def main(arguments: Sequence[str]) -> int:
    parser = command_line("ci.golden", __doc__)
    parser.add_argument("--no-theorems", action="store_true", help="leave the counts of the theorems as they are")
    options = parser.parse_args(arguments)
    root = Path.cwd()
    now, unproved = expansion(root), dict[str, str]()
    files = now.files(kept_files(root))
    if not options.no_theorems:
        kept = read_counts((root / COUNTS).read_text()) if (root / COUNTS).exists() else {}
        counts, unproved = count_theorems(root, kept)
        files[COUNTS] = show_counts(counts)
    changed = write(root, files)
    print("\n".join(f"wrote {path}" for path in changed) or "the golden files were up to date")
    for name, why in now.failed.items():
        print(f"golden: {name} cannot be expanded, and its file stays as it is: {why}", file=sys.stderr)
    for name, why in unproved.items():
        print(f"golden: {name} is not proved, and its count stays as it is: {why}", file=sys.stderr)
    return BAD_INPUT if now.failed else 0


if __name__ == "__main__":
    run_as_command(main)
