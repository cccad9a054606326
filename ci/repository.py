"""The repository under judgement: its base revision, what changed since, and files as they were."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from ci.errors import GateError

_EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git's name for a tree without files
_MAIN = ("main", "origin/main", "master", "origin/master")
_HUNK = re.compile(r"^@@ -\S+ \+(\d+)(?:,(\d+))?", re.MULTILINE)


@dataclass(frozen=True)
class Changed:
    """A file that differs from the base; ``None`` where it did not or does not exist."""

    path: str
    before: bytes | None
    after: bytes | None

    @property
    def what(self) -> str:
        return "added" if self.before is None else "deleted" if self.after is None else "changed"


@dataclass(frozen=True)
class Repository:
    """A git work tree.  Uncommitted and untracked files count as changes; ignored ones do not exist."""

    root: Path

    def resolve(self, revision: str | None) -> str:
        """The hash of the base: where this branch left the revision asked for, or main; on main, the commit before.

        Raises ``GateError`` for a revision that does not exist, and for a clone that was cut off before the base.
        """
        if revision is not None:
            found = self._hash(revision)
            if found is None:
                raise GateError("--base is a revision of this repository", f"got {revision}", "fetch it or correct it")
            return self._left(revision) or found
        head = self._hash("HEAD")
        for name in _MAIN:
            if head is not None and self._hash(name) is not None:
                left = self._left(name)
                if left and left != head:
                    return left
                break
        before = self._hash("HEAD~1")
        if before is None and self._git("rev-parse", "--is-shallow-repository").strip() == b"true":
            raise GateError(
                "the gate needs the history back to the base",
                "this clone is shallow and ends at HEAD",
                "git fetch --unshallow, or fetch-depth: 0 of actions/checkout",
            )
        return before or _EMPTY_TREE

    def changes(self, base: str) -> tuple[Changed, ...]:
        """Every file that differs between the base and the work tree, by path."""
        tracked = self._git("diff", "--name-only", "--no-renames", "-z", base, "--").decode().split("\0")
        untracked = self._git("ls-files", "--others", "--exclude-standard", "-z").decode().split("\0")
        paths = sorted({path for path in (*tracked, *untracked) if path})
        found = [Changed(path, self.at(base, path), self.now(path)) for path in paths]
        return tuple(change for change in found if change.before != change.after)

    def files(self) -> tuple[str, ...]:
        """The files of the work tree that git does not ignore, by path."""
        listed = self._git("ls-files", "--cached", "--others", "--exclude-standard", "-z").decode().split("\0")
        return tuple(sorted({path for path in listed if path and (self.root / path).is_file()}))

    def at(self, revision: str, path: str) -> bytes | None:
        """A file as it was, or ``None``."""
        process = subprocess.run(["git", "show", f"{revision}:{path}"], cwd=self.root, capture_output=True, timeout=60)
        return process.stdout if process.returncode == 0 else None

    def listed(self, revision: str, folder: str) -> list[str]:
        """The paths of a folder's files as they were."""
        listed = self._git("ls-tree", "-r", "--name-only", "-z", revision, "--", f"{folder}/", may_fail=True)
        return [path for path in listed.decode().split("\0") if path]

    def now(self, path: str) -> bytes | None:
        """A file as it is in the work tree, or ``None``."""
        file = self.root / path
        return file.read_bytes() if file.is_file() else None

    def changed_lines(self, base: str, path: str) -> tuple[int, ...]:
        """The lines of the file, as it is now, that differ from the base; line 1 of a new one."""
        hunks = self._git("diff", "--unified=0", "--no-color", base, "--", path, may_fail=True).decode(errors="replace")
        found = [
            line
            for start, count in _HUNK.findall(hunks)
            for line in range(max(1, int(start)), max(1, int(start)) + max(1, int(count or 1)))
        ]
        return tuple(found) or (1,)

    def export(self, revision: str, folder: Path) -> None:
        """Write the files of a revision into a folder."""
        data = self._git("archive", "--format=tar", revision)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(folder, filter="data")

    def _left(self, revision: str) -> str:
        """Where HEAD left another revision's history; empty where they have none in common."""
        return self._git("merge-base", revision, "HEAD", may_fail=True).decode().strip()

    def _hash(self, revision: str) -> str | None:
        text = self._git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", may_fail=True)
        return text.decode().strip() or None

    def _git(self, *arguments: str, may_fail: bool = False) -> bytes:
        process = subprocess.run(["git", *arguments], cwd=self.root, capture_output=True, timeout=120)
        if process.returncode and not may_fail:
            said = process.stderr.decode(errors="replace").strip().splitlines()
            raise GateError(
                "the gate looks at a git work tree",
                f"git {arguments[0]} in {self.root} says: {said[0] if said else 'nothing'}",
                "run it from the repository's root",
            )
        return process.stdout
