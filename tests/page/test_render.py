"""The page as text: self-contained, small, escaped, readable without its script."""

import re
from base64 import b64encode
from hashlib import sha256

import pytest

from dualpipe.page import Comparison, Counterexample, Mark, Page, Table, render
from dualpipe.page.model import VERDICTS
from dualpipe.schedule import Schedule
from dualpipe.schedule.generate import dualpipe
from tests.page import reading
from tests.proofs.faults import two_sends_of_a_batch_swapped

HOSTILE = "<script>alert(1)</script>"


def page(*sections, **given):
    return render(Page("a title", "proved", sections, **given))


def test_a_comparison_of_eight_ranks_and_twenty_microbatches_stays_small():
    schedule = dualpipe(8, 20)
    assert len(page(Comparison("dualpipe", schedule, schedule)).encode()) < 100_000


def test_nothing_is_fetched():
    read = reading.tree(page(Comparison("dualpipe", after=dualpipe(2, 4))))
    for tag, attributes in read.tags:
        assert not {"src", "srcset", "background", "data"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith("#")
    text = page(Comparison("dualpipe", after=dualpipe(2, 4)))
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|import\(", text)


def test_the_policy_allows_the_script_and_the_style_of_the_page_and_nothing_else():
    text = page()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["default-src"] == "'none'"
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        (body,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        assert allowed[directive] == f"'sha256-{b64encode(sha256(body.encode()).digest()).decode()}'"


def everything_hostile():
    schedule = dualpipe(2, 4)
    named = Schedule(schedule.routes, schedule.programs, HOSTILE)
    mark = Mark(0, 0, "", f"{HOSTILE}<!--", peer_rank=1)
    section = Comparison(
        HOSTILE,
        named,
        named,
        f"{HOSTILE}\"'",
        f"{HOSTILE}&",
        (Counterexample(HOSTILE, HOSTILE, (mark,)),),
        (Table(HOSTILE, (HOSTILE,), ((HOSTILE,),)),),
    )
    return render(Page(HOSTILE, HOSTILE, (section, section), HOSTILE))


def test_every_text_is_escaped():
    text = everything_hostile()
    assert HOSTILE not in text
    assert "<!--" not in text
    read = reading.tree(text)
    assert [attributes for tag, attributes in read.tags if tag == "script"] == [
        {"type": "application/json", "class": "data"},
        {"type": "application/json", "class": "data"},
        {},
    ]
    shown = {tag for tag, told in read.text if told == HOSTILE}
    assert {"title", "h1", "h2", "h3", "p", "a", "caption", "th", "td", "span"} <= shown
    assert reading.data(text)[0]["counterexamples"][0]["marks"][0]["sentence"] == f"{HOSTILE}<!--"


def test_stories_and_tables_need_no_script():
    mark = Mark(0, 0, "", "rank 0 waits")
    section = Comparison(
        "x",
        after=dualpipe(2, 4),
        counterexamples=(Counterexample("deadlock", "rank 0 waits\nso does rank 1", (mark,)),),
    )
    told = [text for tag, text in reading.tree(page(section)).text if tag == "p"]
    assert "rank 0 waits\nso does rank 1" in told


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_verdict_in_a_cell_is_a_badge(verdict):
    kind = verdict.replace(" ", "-")
    assert f'<td><span class="badge {kind}">{verdict}</span></td>' in page(Table("t", ("v",), ((verdict,),)))


def test_changed_slots_are_shown_rank_by_rank_and_highlighted():
    text = page(Comparison("x", dualpipe(4, 8), two_sends_of_a_batch_swapped()))
    assert "Changed slots: 2 lines, 1 rank<" in text
    assert "<td>13</td><td><code>3SB1&lt;+0SF3&gt;+3RF2&lt;+0RB0&gt;</code></td>" in text
    (section,) = reading.data(text)
    assert [drawing["changed"] for drawing in section["drawings"]] == [[[13], [], [], []]] * 2
    assert [drawing["title"] for drawing in section["drawings"]] == ["before", "after"]


def test_equal_schedules_say_so():
    assert "the same, slot by slot" in page(Comparison("x", dualpipe(2, 4), dualpipe(2, 4)))


@pytest.mark.parametrize("given", [{}, {"before": dualpipe(2, 4)}, {"after": dualpipe(2, 4)}], ids=str)
def test_a_side_may_be_missing(given):
    text = page(Comparison("x", **given))
    reading.tree(text)
    assert [drawing["title"] for drawing in reading.data(text)[0]["drawings"]] == [""] * len(given)


def test_the_numbers_of_both_sides_and_their_change():
    told = [
        text for tag, text in reading.tree(page(Comparison("x", dualpipe(4, 8), dualpipe(4, 10)))).text if tag == "td"
    ]
    start = told.index("makespan")
    assert told[start : start + 4] == ["makespan", "26", "32", "+6"]
    start = told.index("peak activations by rank")
    assert told[start : start + 4] == ["peak activations by rank", "5 5 5 5", "5 5 5 5", "same"]


def test_several_schedules_have_a_list_of_contents():
    text = page(Table("t", (), ()), Comparison("one"), Comparison("other"))
    for name, anchor in (("one", "s1"), ("other", "s2")):
        assert f'<a href="#{anchor}">{name}</a>' in text
        assert f'id="{anchor}"' in text
