"""The files that a command writes: checked before its work, and written atomically.

An existing file is replaced only if it is an earlier output of the same option, which its content shows.  So a typing
error destroys no schedule, source or other file, whatever its name.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from dualpipe.errors import RuleError
from dualpipe.files import write_whole


class Form(NamedTuple):
    """A format of output: its name, and a function that recognises the content of a file that dualpipe wrote."""

    what: str
    is_ours: Callable[[bytes], bool]


_RECORDED = b"# dualpipe record: may be replaced while unchanged, sha256 "


def signed(text: str) -> str:
    """The text of a recording below a signature, by which a later ``dualpipe record`` sees that it was not edited."""
    return f"{_RECORDED.decode()}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def _is_recording(content: bytes) -> bool:
    head, _, rest = content.partition(b"\n")
    return head == _RECORDED + hashlib.sha256(rest).hexdigest().encode()


SVG = Form("an SVG picture by dualpipe", lambda content: content.startswith(b"<?xml") and b"dualpipe" in content)
PNG = Form("a PNG picture by dualpipe", lambda content: content.startswith(b"\x89PNG") and b"dualpipe" in content)
HTML = Form(
    "a page by dualpipe",
    lambda content: content.startswith(
        b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        b"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src '"
    ),
)
TRACE = Form("a trace by dualpipe", lambda content: content.startswith(b'{"traceEvents": [\n'))
SMTLIB = Form(
    "SMT-LIB obligations by dualpipe",
    lambda content: content.startswith(b"(set-logic QF_IDL)\n\n; complete: sat"),
)
RECORDING = Form("an unedited recording", _is_recording)


@dataclass(frozen=True)
class Target:
    """A file that an option tells the command to write."""

    option: str
    path: Path
    form: Form

    def check(self) -> None:
        """Raise ``RuleError`` if the file cannot be written, or exists and must not be replaced."""
        folder = Path(os.path.realpath(self.path)).parent
        if os.path.isdir(self.path):
            self._fail("is a folder (an empty name means the current one)" if self.path == Path() else "is a folder")
        if self.path.parent.is_file():
            self._fail(f"cannot be created: {self.path.parent} is a file, not a folder")
        if not folder.is_dir():
            through_link = self.path.parent.is_dir()  # the path itself is a link into a folder that does not exist
            missing = folder if through_link else self.path.parent
            raise RuleError(
                f"{self.option} is a file that can be written", f"there is no folder {missing}", "create the folder"
            )
        try:
            self.path.stat()
        except FileNotFoundError:
            if not os.access(folder, os.W_OK):
                self._fail(f"cannot be created: {folder} is read-only")
            return
        except OSError as error:
            self._fail(f"cannot be created: {error.strerror}")
        regular = stat.S_ISREG(self.path.stat().st_mode)
        if not os.access(self.path, os.W_OK) or (regular and not _device(self.path) and not os.access(folder, os.W_OK)):
            self._fail("cannot be written")
        if regular and not _device(self.path):
            content = self.path.read_bytes()
            if content and not self.form.is_ours(content):
                raise RuleError(
                    f"{self.option} makes a new file, or replaces {self.form.what}",
                    f"{self.path} is something else",
                    "name another file, or remove this one first",
                )

    def _fail(self, got: str) -> NoReturn:
        raise RuleError(f"{self.option} is a file that can be written", f"{self.path} {got}", "name another file")

    def write(self, data: str | bytes) -> None:
        """Check the file again, since it may have changed during the command's work, and write it."""
        self.check()
        sys.stdout.flush()  # keeps the order if the file is standard output
        try:
            write_whole(self.path, data.encode(errors="backslashreplace") if isinstance(data, str) else data)
        except BrokenPipeError:
            raise
        except OSError as error:
            self._fail(f"could not be written: {error.strerror or error}")


def target(option: str, path: Path | None, form: Form) -> list[Target]:
    """The target of an option as a list, empty if the option was not given."""
    return [] if path is None else [Target(option, path, form)]


def check_targets(targets: Iterable[Target], inputs: Iterable[str] = ()) -> None:
    """Check each target of a command, and that no two options and no input name the same file.

    Raises
    ------
    RuleError
        If an output cannot be written, or is the same file as another output or as one of ``inputs``, by whatever
        paths and links.  ``inputs`` are names of schedules; those that are no files are ignored.
    """
    seen: list[tuple[str, Path]] = [("is a schedule that the command reads", Path(name)) for name in inputs]
    for each in targets:
        for use, other in seen:
            if _same(each.path, other):
                raise RuleError(
                    "every output needs its own file", f"{each.option} {each.path} {use}", "name another file"
                )
        each.check()
        seen.append((f"is the file of {each.option} as well", each.path))


def _same(one: Path, other: Path) -> bool:
    if os.path.exists(one) and os.path.exists(other):
        return stat.S_ISREG(one.stat().st_mode) and one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _device(path: Path) -> bool:
    return str(path).startswith(("/dev/", "/proc/"))
