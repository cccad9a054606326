"""The commands and code of README.md and docs/ run, and their links work."""

import pytest

from tests.docs.links import broken
from tests.docs.snippets import ROOT, Document, documents

PAGES = documents()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_the_page_work(path, tmp_path):
    Document(path, tmp_path).run(long=False)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    assert broken(path) == []


@pytest.mark.long
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_long_commands_of_the_page_work(path, tmp_path):
    document = Document(path, tmp_path)
    if document.long:
        document.run(long=True)


def test_snippets_that_do_not_run_have_a_reason_and_are_listed(tmp_path, capsys):
    listed = [(block, reason) for path in PAGES for block, reason in Document(path, tmp_path).not_run()]
    with capsys.disabled():
        print(f"\n{len(listed)} snippets of the documentation are not run:")
        for block, reason in listed:
            print(f"  {block.source}:{block.line}: {reason}")
    for block, reason in listed:
        assert len(reason.split()) >= 3, f"{block.source}:{block.line}: {reason!r} is no reason"
