"""A page read back: the data that it carries, decoded as its script does, in Python."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

from dualpipe.schedule import Schedule

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Tree(HTMLParser):
    """Every start tag with its attributes and the text inside elements; an element that is not closed is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))


def tree(page: str) -> Tree:
    read = Tree()
    read.feed(page)
    read.close()
    assert read.open == []
    return read


def data(page: str) -> list[dict[str, Any]]:
    """The JSON of every section."""
    return [
        json.loads(text) for text in re.findall(r'<script type="application/json" class="data">(.*?)</script>', page)
    ]


def slots(drawing: dict[str, Any]) -> list[list[str]]:
    return [program.replace("{", "<").split(" ") if program else [] for program in drawing["programs"]]


def spans(drawing: dict[str, Any]) -> list[list[tuple[float, float]]]:
    """For each rank the start and end of every slot."""
    found = []
    for times in drawing["times"]:
        clock, row = 0.0, []
        for wait, takes in zip(times[::2], times[1::2], strict=True):
            start = clock + wait
            clock = start + takes
            row.append((start, clock))
        found.append(row)
    return found


def needs(drawing: dict[str, Any], schedule: Schedule) -> list[tuple[int, list[int | str]]]:
    """For each op its number and what it needs: numbers, or the text of what is missing."""
    ops = list(schedule)
    told = drawing["needs"].split(";") if ops else []
    assert len(told) == len(ops)
    return [
        (
            number,
            [word.replace("{", "<") if word[0] == "?" else number - int(word) for word in words.split(",") if word],
        )
        for number, words in enumerate(told)
    ]
