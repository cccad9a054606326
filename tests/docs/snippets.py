"""Runs the commands and code of a Markdown file.

====================  ==============================================================================================
a fenced block        how it is run
====================  ==============================================================================================
``console``           lines that begin with ``$ `` are commands; the lines after one are its output, if there are any:
                      ``...`` stands for anything, and any run of blanks for one blank
``bash``, ``sh``      every line is a command; ``#`` begins a comment
``python``            run, in one namespace for the whole file
``text``, indented    not run, or with a comment compared with an output; a line that looks like a command or an
                      import is an error
====================  ==============================================================================================

All commands of a file run in one folder, which has only ``tests/golden``, as a clone does.  A comment right before a
block changes how it is run::

    <!-- not run: it needs eight GPUs -->      the reason is listed by the test
    <!-- long: proves every size -->           run with the long tests only
    <!-- file: mine.py -->                     written to that file instead
    <!-- exit code: 1 -->                      of the block's last command; 0 by default
    <!-- output of: dualpipe show -P 2 -->     a text block: the output of the command
    <!-- held by: tests/ci/test_gate.py -->    a text block: that test compares it, and names this page

``make TARGET`` is not run, as CI runs the targets, but the target must exist.  A block in any other language needs one
of these comments.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from markdown_it import MarkdownIt

from dualpipe.cli import main

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 120.0
_COMMENT = re.compile(r"\s*<!-- (not run|long|file|exit code|output of|held by): (.+?) -->\s*")
_LIKE_A_COMMAND = re.compile(
    r"^\s*(\$ |dualpipe (-|[a-z]+ [-./\w])|python3? (-m |\S+\.py)|torchrun |pip install |from \S+ import )", re.M
)
_SHELL = re.compile(r"[|;&<`*]|\$\(|>>")


class SnippetError(AssertionError):
    """A block that does not do what its page says."""

    def __init__(self, block: Block, complaint: str) -> None:
        super().__init__(f"{block.source}:{block.line}: {complaint}")


@dataclass(frozen=True)
class Block:
    """A block of code.  ``line`` counts from 1; ``notes`` are the comments before it, by their first words."""

    source: str
    line: int
    language: str
    text: str
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A line to type, and the output that is shown under it, if any."""

    line: str
    shown: str = ""


def blocks_of(markdown: str, source: str) -> list[Block]:
    """The blocks of code of a document, in order.  Raises ``SnippetError`` for a comment that no block follows."""
    found, notes = [], {}
    for token in MarkdownIt("commonmark").parse(markdown):
        line = token.map[0] + 1 if token.map else 0
        comments = list(_COMMENT.finditer(token.content)) if token.type == "html_block" else []
        if comments:
            notes |= {comment.group(1): comment.group(2) for comment in comments}
        elif token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else "text"
            found.append(Block(source, line, language, token.content, notes))
            notes = {}
        elif notes:
            raise SnippetError(Block(source, line, "", ""), f"a comment on a block, and no block after it: {notes}")
    if notes:
        raise SnippetError(Block(source, 0, "", ""), f"a comment on a block, and no block after it: {notes}")
    return found


def commands_of(block: Block) -> list[Command]:
    """The commands of a console or bash block."""
    if block.language != "console":
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in block.text.replace("\\\n", " ").splitlines())
        return [Command(line) for line in lines if line]
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    if parts[0].strip():
        raise SnippetError(block, f"output before the first command: {parts[0].strip()!r}")
    split = (part.replace("\\\n", " ").partition("\n") for part in parts[1:])
    return [Command(re.sub(r"\s#\s.*", "", line).strip(), shown) for line, _, shown in split]


def unlike(shown: str, printed: str) -> bool:
    """Whether an output differs from the one shown, in which ``...`` stands for anything."""
    pieces = [r"\s+".join(map(re.escape, piece.split())) for piece in shown.strip().split("...")]
    return re.fullmatch(r"[\s\S]*".join(rf"\s*{piece}\s*" for piece in pieces), printed.strip()) is None


class Document:
    """The blocks of one document, run in order in a folder."""

    def __init__(self, path: Path, folder: Path, root: Path = ROOT) -> None:
        self.source = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
        self.blocks = blocks_of(path.read_text(), self.source)
        self.folder, self.root = folder, root
        self.namespace: dict[str, object] = {"__name__": "__main__"}

    @property
    def long(self) -> bool:
        return any("long" in block.notes for block in self.blocks)

    def not_run(self) -> Iterator[tuple[Block, str]]:
        """The blocks and commands that do not run, with the reason."""
        for block in self.blocks:
            if "not run" in block.notes:
                yield block, block.notes["not run"]
            elif block.language in ("console", "bash", "sh") and "file" not in block.notes:
                for command in commands_of(block):
                    if command.line.startswith("make "):
                        yield block, f"`{command.line}`: CI runs the targets"

    def run(self, long: bool) -> int:
        """Run the blocks, with ``long`` the long ones too.  Returns how many ran.  Raises ``SnippetError``."""
        if not (self.folder / "tests").exists():
            (self.folder / "tests").mkdir()
            (self.folder / "tests" / "golden").symlink_to(self.root / "tests" / "golden")
        with contextlib.chdir(self.folder), mock.patch.object(sys, "path", [str(self.folder), *sys.path]):
            before = set(sys.modules)
            try:
                return sum(self.run_block(block) for block in self.blocks if long or "long" not in block.notes)
            finally:
                self._forget(set(sys.modules) - before)

    def run_block(self, block: Block) -> bool:
        """Run one block.  Returns whether there was anything to run."""
        if "not run" in block.notes:
            return False
        if "file" in block.notes:
            self.path(block).write_text(block.text)
            return False
        if "held by" in block.notes:
            self.find_test(block)
            return False
        if "output of" in block.notes:
            self.run_command(block, Command(block.notes["output of"], block.text), int(block.notes.get("exit code", 0)))
            return True
        match block.language:
            case "console" | "bash" | "sh":
                commands = commands_of(block)
                for command in commands:
                    expected = int(block.notes.get("exit code", 0)) if command is commands[-1] else 0
                    self.run_command(block, command, expected)
            case "python":
                self.run_python(block)
            case "text":
                if found := _LIKE_A_COMMAND.search(block.text):
                    raise SnippetError(block, f"{found.group().strip()!r} looks like a command; make the block console")
                return False
            case other:
                raise SnippetError(
                    block, f"a block in {other or 'no language'}: name its language, or why it is not run"
                )
        return True

    def path(self, block: Block) -> Path:
        path = self.folder / block.notes["file"]
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise SnippetError(block, f"{path} is not in the document's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def find_test(self, block: Block) -> None:
        """Raise ``SnippetError`` unless the test that holds a block is there and names this document."""
        test = self.root / block.notes["held by"]
        if block.notes["held by"].startswith("tests/ci/") and not test.parent.exists():
            return  # a scratch clone of the planted faults, without these tests
        if not test.is_file() or Path(self.source).name not in test.read_text():
            raise SnippetError(block, f"{block.notes['held by']} is no test that names {self.source}")

    def run_command(self, block: Block, command: Command, expected: int) -> None:
        words = shlex.split(command.line, comments=True)
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (self.root / "Makefile").read_text(), re.M)
            if missing := [word for word in words[1:] if "=" not in word and word not in targets]:
                raise SnippetError(block, f"there is no target {missing[0]}")
            return
        starts_programs = words[:2] == ["dualpipe", "record"]  # which must find this interpreter first
        first, pipe, rest = command.line.partition(" | ")
        ours = words[0] == "dualpipe" and not starts_programs and not _SHELL.search(first)
        if ours and not _SHELL.search(command.line):
            code, printed = self._in_process(words[1:])
        elif ours and pipe:
            code, printed = self._in_a_shell(rest, self._in_process(shlex.split(first)[1:])[1])
        else:
            code, printed = self._in_a_shell(command.line)
        if code != expected:
            raise SnippetError(block, f"`{command.line}` ended with {code}, not {expected}:\n{printed}")
        if command.shown.strip() and unlike(command.shown, printed):
            raise SnippetError(block, f"`{command.line}` is shown with\n{command.shown}\nand printed\n{printed}")

    def _in_process(self, arguments: list[str]) -> tuple[int, str]:
        """Call the console script in this process, which saves seconds of imports; ``> FILE`` works."""
        target = None
        if ">" in arguments[-2:-1]:
            arguments, target = arguments[:-2], arguments[-1]
        out, both = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["dualpipe", *arguments]),
            mock.patch.dict(os.environ, {"COLUMNS": "120"}),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(both if target is None else out),
            contextlib.redirect_stderr(both),
        ):
            warnings.simplefilter("ignore")  # warnings of other packages do not fail a reader's command
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        if target is not None:
            (self.folder / target).write_text(out.getvalue())
        return code, both.getvalue()

    def _in_a_shell(self, line: str, given: str = "") -> tuple[int, str]:
        """Run any other command in bash, with this interpreter first on the path and the root's packages importable.

        ``given`` is the text on its standard input.
        """
        shims = self.folder / ".bin"
        shims.mkdir(exist_ok=True)
        for name, arguments in {"dualpipe": "-m dualpipe.cli", "python": "", "pytest": "-m pytest"}.items():
            (shims / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
            (shims / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{shims}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.root}:{os.environ.get('PYTHONPATH', '')}",
        }
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=environment,
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        return done.returncode, done.stdout

    def run_python(self, block: Block) -> None:
        code = "\n" * block.line + block.text  # so that errors name the page's own lines
        try:
            exec(compile(code, block.source, "exec"), self.namespace)
        except Exception:
            raise SnippetError(block, f"the snippet raised\n{traceback.format_exc()}") from None

    def _forget(self, modules: set[str]) -> None:
        """Remove the folder's modules from the interpreter, so that the next page imports its own."""
        for name in modules:
            origin = getattr(sys.modules[name], "__file__", None) or ""
            if Path(origin).is_relative_to(self.folder):
                del sys.modules[name]


def documents(root: Path = ROOT) -> list[Path]:
    """README.md, CONTRIBUTING.md and everything in docs/."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
