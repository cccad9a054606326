"""Every page is linked from the README, directly or not, and broken links are found."""

from tests.docs.links import broken, links
from tests.docs.snippets import ROOT, documents


def test_every_link_of_the_changelog_leads_somewhere():
    assert broken(ROOT / "CHANGELOG.md") == []


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
        "[e](missing.md) [f](other.md#nowhere) [g](#nothing) [`h`](outside/missing.md)\n```text\n[i](in-code.md)\n```\n"
    )
    assert broken(page) == ["missing.md", "other.md#nowhere", "#nothing", "outside/missing.md"]
