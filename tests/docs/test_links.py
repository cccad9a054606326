"""Every link of README.md, CHANGELOG.md and docs/ leads to a file and a heading that exist, and every page is reached."""

import re
from pathlib import Path

import pytest

from tests.docs.snippets import ROOT, documents

PAGES = [*documents(), ROOT / "CHANGELOG.md"]
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```", re.M | re.S)


def links(path: Path) -> list[str]:
    return _LINK.findall(_CODE.sub("", path.read_text()))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _CODE.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    bad = []
    for link in links(path):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or not file.is_relative_to(ROOT if path.is_relative_to(ROOT) else path.parent):
            bad.append(link)
        elif anchor and anchor not in anchors(file):
            bad.append(link)
    return bad


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    assert broken(path) == []


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
            waiting += [target for target in targets if target.suffix == ".md" and target.is_file()]
    assert set(documents()) - reached == set()


def test_broken_links_are_noticed(tmp_path):
    (tmp_path / "other.md").write_text("# A heading, with `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[a](other.md) [b](other.md#a-heading-with-code) [c](#page) [d](https://example.org/x)\n"
        "[e](missing.md) [f](other.md#nowhere) [g](#nothing) [`h`](../outside.md)\n```text\n[i](in-code.md)\n```\n"
    )
    assert broken(page) == ["missing.md", "other.md#nowhere", "#nothing", "../outside.md"]
