"""The repository: its base revision, what changed since, and files as they were."""

from __future__ import annotations

import io
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ci import GateError
from ci.extent import Extent, extent
from ci.git import git

_EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git's name for a tree without files
_MAIN = ("main", "origin/main", "master", "origin/master", "origin/HEAD")
_HUNK = re.compile(r"^@@ -\S+ \+(\d+)(?:,(\d+))?", re.MULTILINE)
PLAIN_DIFF = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--src-prefix=a/", "--dst-prefix=b/")
"""Options for a diff that ignores the user's settings."""


class Base(NamedTuple):
    """The revision that a change is compared with, as a hash, and the reason for taking it."""

    revision: str
    why: str

    def __str__(self) -> str:
        return f"{self.revision[:12]}, {self.why}"


@dataclass(frozen=True)
class Changed:
    """A file that differs from the base; ``None`` if it did not exist there, or does not exist now.

    ``mode`` is the change of its mode, as ``100644 -> 100755``; empty if it kept its mode.
    """

    path: str
    before: bytes | None
    after: bytes | None
    mode: str = ""

    @property
    def extent(self) -> Extent:
        """How far the change to a source goes; a change to any other file counts as one to code."""
        if not self.path.endswith(".py") or self.before is None or self.after is None:
            return Extent.CODE
        return extent(self.before, self.after)

    @property
    def what(self) -> str:
        return "added" if self.before is None else "deleted" if self.after is None else "changed"


@dataclass(frozen=True)
class Repository:
    """A git work tree.  Uncommitted and untracked files count as changes; ignored ones do not exist."""

    root: Path

    def resolve(self, given: str | None) -> Base:
        """The base: where this branch left the given revision, or main; on main itself, the commit before.

        Raises ``GateError`` for a revision that does not exist, if there is no main, for a clone that is too shallow to
        have the base, and for a folder that is not the top of a work tree.
        """
        top = os.fsdecode(self._git("rev-parse", "--show-toplevel")).removesuffix("\n")
        if not self.root.samefile(top):
            raise GateError("the gate checks a whole work tree", f"got {self.root} within {top}", f"use --root {top}")
        head = self._hash("HEAD")
        if given is not None:
            return self._given_base(given, head)
        known = [name for name in _MAIN if self._hash(name) is not None]
        for name in known if head is not None else ():
            left = self._left(name)
            self._require_history(left)
            if left not in ("", head):
                return Base(left, f"where HEAD left {name}")
        if not known and head is not None:
            raise GateError(
                "the base is where HEAD left main", f"none of {', '.join(_MAIN)} is here", "fetch it, or give --base"
            )
        before = self._hash("HEAD~1")
        if before is not None:
            return Base(before, "the commit before, as all of HEAD is in main")
        self._require_history("")
        return Base(_EMPTY_TREE, "an empty tree, as there is no commit before")

    def _given_base(self, given: str, head: str | None) -> Base:
        found = self._hash(given)
        if found is None:
            raise GateError("--base must be a revision of this repository", f"got {given}", "fetch it or correct it")
        left = self._left(given)
        self._require_history(left)
        if left in ("", head):  # no history in common, or none that HEAD has of its own
            return Base(found, f"--base {given}")
        return Base(left, f"--base {given}" if left == found else f"where HEAD left --base {given}")

    def _require_history(self, left: str) -> None:
        """Raise ``GateError`` if nothing was found in the history and the clone does not have all of it."""
        if not left and self._git("rev-parse", "--is-shallow-repository").strip() == b"true":
            raise GateError(
                "the gate needs the history back to the base",
                "this clone is shallow and ends before it",
                "git fetch --unshallow, or fetch-depth: 0 of actions/checkout",
            )

    def changes(self, base: str) -> tuple[Changed, ...]:
        """Every file that differs between the base and the work tree, by path."""
        raw = self._git("diff", "--raw", "-z", "--no-abbrev", *PLAIN_DIFF, base, "--")
        words = os.fsdecode(raw).split("\0")
        modes = {path: _mode(head) for head, path in zip(words[0::2], words[1::2], strict=False)}
        untracked = _paths(self._git("ls-files", "--others", "--exclude-standard", "-z"))
        found = [
            Changed(path, self.at(base, path), self.now(path), modes.get(path, ""))
            for path in sorted({*modes, *untracked})
        ]
        return tuple(change for change in found if change.before != change.after or change.mode)

    def files(self) -> tuple[str, ...]:
        """The files of the work tree that git does not ignore, by path."""
        listed = _paths(self._git("ls-files", "--cached", "--others", "--exclude-standard", "-z"))
        return tuple(sorted({path for path in listed if (self.root / path).is_file()}))

    def at(self, revision: str, path: str) -> bytes | None:
        """A file as it was, or ``None``."""
        entry = self._git("ls-tree", "-z", revision, "--", path, may_fail=True)
        if entry.split()[1:2] != [b"blob"]:  # a folder, or another repository
            return None
        return self._git("show", f"{revision}:{path}")

    def listed(self, revision: str, folder: str) -> list[str]:
        """The paths of a folder's files as they were."""
        return _paths(self._git("ls-tree", "-r", "--name-only", "-z", revision, "--", f"{folder}/", may_fail=True))

    def now(self, path: str) -> bytes | None:
        """A file as it is in the work tree, or ``None``."""
        file = self.root / path
        return file.read_bytes() if file.is_file() else None

    def texts(self, base: str, path: str) -> tuple[str, str]:
        """A file as text, at the base and now; empty if it does not exist."""
        before, after = self.at(base, path), self.now(path)
        return (before or b"").decode(errors="replace"), (after or b"").decode(errors="replace")

    def changed_lines(self, base: str, path: str) -> tuple[int, ...]:
        """The lines of the file, as it is now, that differ from the base; line 1 of a new one."""
        hunks = self._git("diff", "--unified=0", *PLAIN_DIFF, base, "--", path, may_fail=True).decode(errors="replace")
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
        """The last commit that HEAD and another revision have in common; empty if there is none."""
        return self._git("merge-base", revision, "HEAD", may_fail=True).decode().strip()

    def _hash(self, revision: str) -> str | None:
        text = self._git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", may_fail=True)
        return text.decode().strip() or None

    def _git(self, *arguments: str, may_fail: bool = False) -> bytes:
        return git(self.root, *arguments, may_fail=may_fail)


def _paths(listed: bytes) -> list[str]:
    """Paths that git lists with ``-z``; bytes that are not text are kept."""
    return [path for path in os.fsdecode(listed).split("\0") if path]


def _mode(head: str) -> str:
    """How a mode changed, from a line of ``git diff --raw``; empty if the file is new, gone or kept its mode."""
    before, after = head.removeprefix(":").split()[:2]
    return f"{before} -> {after}" if before != after and "000000" not in (before, after) else ""
