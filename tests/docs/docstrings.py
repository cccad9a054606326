"""Docstrings as Markdown: paragraphs, sections of both usual styles, lists, literal blocks.

    Parameters          Args:
    ----------              name: What it is.
    name:
        What it is.

Both become a list under a bold word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from textwrap import dedent

_UNDERLINE = re.compile(r"-{3,}")
_GOOGLE = {"Args:": "Parameters", "Returns:": "Returns", "Raises:": "Raises"}


def markdown(doc: str) -> str:
    """The whole of a docstring, as ``inspect.getdoc`` gives it."""
    return "\n\n".join(_blocks(doc.splitlines()))


def in_a_list(doc: str) -> str:
    """The same as the text of an item of a list: what follows its first paragraph is indented."""
    return markdown(doc).replace("\n", "\n  ").replace("\n  \n", "\n\n")


def _blocks(lines: list[str]) -> Iterator[str]:
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip():
            at += 1
        elif at + 1 < len(lines) and _UNDERLINE.fullmatch(lines[at + 1]):
            items, at = _numpy_items(lines, at + 2)
            yield f"**{line}**\n\n" + "\n".join(items)
        elif line in _GOOGLE:
            body, at = _indented(lines, at + 1)
            yield f"**{_GOOGLE[line]}**\n\n" + "\n".join(_google_items(body))
        elif line.startswith("- "):
            items, at = _list(lines, at)
            yield "\n".join(items)
        else:
            paragraph, at = _paragraph(lines, at)
            text = _prose(paragraph)
            if text.endswith("::"):
                literal, at = _indented(lines, at)
                if text != "::":
                    yield text[:-1].removesuffix(" :")
                yield "\n".join(["```text", *literal, "```"])
            else:
                yield text


def _prose(lines: list[str]) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(" ".join(lines).split()))


def _paragraph(lines: list[str], at: int) -> tuple[list[str], int]:
    start = at
    while at < len(lines) and lines[at].strip():
        at += 1
    return lines[start:at], at


def _indented(lines: list[str], at: int) -> tuple[list[str], int]:
    """The indented lines from ``at`` on, without their common indentation and empty lines around them."""
    start = at
    while at < len(lines) and (not lines[at].strip() or lines[at].startswith(" ")):
        at += 1
    return dedent("\n".join(lines[start:at])).strip("\n").splitlines(), at


def _numpy_items(lines: list[str], at: int) -> tuple[list[str], int]:
    """Lines with an indented text under them; any other line ends the section."""
    items = []
    while at + 1 < len(lines) and lines[at].strip() and lines[at + 1].startswith(" "):
        text, after = _indented(lines, at + 1)
        items.append(_item(lines[at], text))
        at = after
    return items, at


def _google_items(lines: list[str]) -> Iterator[str]:
    while lines:
        first, lines = lines[0], lines[1:]
        rest, at = _indented(lines, 0)
        if at and not lines[0].strip():
            rest = ["", *rest]  # a paragraph of its own, or a list
        name, colon, text = first.partition(": ")
        yield _item(name, [text, *rest]) if colon else _prose([first, *rest])
        lines = lines[at:]


def _item(names: str, text: list[str]) -> str:
    shown = ", ".join(f"`{name.strip()}`" for name in names.rstrip(":").split(","))
    return f"- {shown}: " + "\n\n".join(_blocks(text)).replace("\n", "\n  ").replace("\n  \n", "\n\n")


def _list(lines: list[str], at: int) -> tuple[list[str], int]:
    items = []
    while at < len(lines) and lines[at].startswith("- "):
        rest, after = _continued(lines, at + 1)
        items.append("- " + _prose([lines[at][2:], *rest]))
        at = after
    return items, at


def _continued(lines: list[str], at: int) -> tuple[list[str], int]:
    start = at
    while at < len(lines) and lines[at].startswith("  "):
        at += 1
    return lines[start:at], at
