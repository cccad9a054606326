"""The links of a Markdown page, and the broken ones."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.snippets import ROOT

_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```", re.M | re.S)


def links(path: Path) -> list[str]:
    return _LINK.findall(_CODE.sub("", path.read_text()))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _CODE.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path: Path) -> list[str]:
    """The broken links of a page."""
    bad = []
    for link in links(path):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        outside = path.is_relative_to(ROOT) and not file.is_relative_to(ROOT)
        if outside or not file.exists() or (anchor and anchor not in anchors(file)):
            bad.append(link)
    return bad
