"""The timeline in a terminal: the lines as a person sees them, at several widths, with and without colours."""

import io
from collections import Counter, defaultdict
from textwrap import dedent

import pytest
from rich.console import Console

from dualpipe.schedule import DOWN, F
from dualpipe.schedule.generate import generate
from dualpipe.timeline.chart import chart
from dualpipe.timeline.palette import LIGHT
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.summary import parse_costs
from dualpipe.timeline.terminal import lines
from tests.pictures.cases import TIMELINES


def text(name, ranks, microbatches, width, cost=""):
    timeline = simulate(generate(name, ranks, microbatches), parse_costs(cost))
    return "\n".join(line.plain.rstrip() for line in lines(timeline, width)) + "\n"


def drawn(picture):
    return dedent(picture).lstrip("\n")


def test_with_room_an_op_has_its_number_and_a_gap_and_a_slot_is_joined():
    assert text("dualpipe", 2, 4, 80) == drawn("""
        dualpipe, 2 ranks, 4 microbatches: makespan 12, bubble 0.0% of the ranks' time
        time    0     2     4     6     8     10
        rank 0  F0 f0 F1 b0+w0 f1+B0+W0 b1+w1 B1 W1
        rank 1  f0 F0 f1 B0+W0 F1+b0+w0 B1+W1 b1 w1
        F forward  B backward  W weights  lane >  f b w lane <  · bubble  + one slot
    """)


def test_with_less_room_the_gap_goes():
    assert text("zb1p", 3, 4, 40) == drawn("""
        zb1p, 3 ranks, 4 microbatches: makespan 14, bubble 14.3% of the ranks' time
        time    0         5         10
        rank 0  F0F1F2····B0W0F3B1W1B2W2B3W3
        rank 1  ··F0F1··B0F2B1W0F3B2W1B3W2W3
        rank 2  ····F0B0F1B1F2B2W0F3B3W1W2W3
        F forward  B backward  W weights  · bubble
    """)


def test_then_the_rows_go_on_below():
    assert text("dualpipe", 4, 8, 44) == drawn("""
        dualpipe, 4 ranks, 8 microbatches: makespan 26, bubble 7.7% of the ranks' time
        time    0         5         10        15
        rank 0  F0F1F2f0b0w0f1F3b1w1··f2B0W0b2w2··f3
        rank 1  ··F0f0F1f1F2b0w0f2B0W0F3b1w1f3B1W1b2
        rank 2  ··f0F0f1F1f2B0W0F2b0w0f3B1W1F3b1w1B2
        rank 3  f0f1f2F0B0W0F1f3B1W1··F2b0w0B2W2··F3

        time        20        25
        rank 0  B1W1b3w3B2W2B3W3
        rank 1  w2B2W2··b3B3w3W3
        rank 2  W2b2w2··B3b3W3w3
        rank 3  b1w1B3W3b2w2b3w3
        F forward  B backward  W weights  lane >  f b w lane <  · bubble
    """)


def test_where_numbers_would_take_too_many_rows_an_op_is_a_letter_and_it_is_said_how_to_see_more():
    told = text("dualpipe", 4, 40, 50)
    assert told.startswith(
        drawn("""
        dualpipe, 4 ranks, 40 microbatches: makespan 122, bubble 1.6% of the ranks' time
        time    0         10        20        30        40
        rank 0  FFFfbwfFbw·fBWFbwfBWFbwfBWFbwfBWFbwfBWFbwf
        rank 1  ·FfFfFbwfBWFbwfBWFbwfBWFbwfBWFbwfBWFbwfBWF
    """)
    )
    assert told.endswith(
        drawn("""
        F forward  B backward  W weights  lane >  f b w lane <  · bubble
        microbatch numbers need 131 columns, and there are 50
        to see more: --svg FILE or --png FILE, or `dualpipe simulate --trace FILE`
    """)
    )
    assert "numbers need" in text("dualpipe", 4, 40, 130)
    assert "numbers need" not in text("dualpipe", 4, 40, 131)


def test_ops_too_short_for_a_column_are_counted():
    assert "24 of 72 ops are too short to be seen" in text("zb1p", 3, 8, 80, "F=1,B=1,W=0.01")


@pytest.mark.parametrize("width", [1, 30, 80, 200, 1000])
@pytest.mark.parametrize("case", TIMELINES)
def test_the_ranks_lines_fit_and_show_all_of_the_time(case, width):
    timeline = TIMELINES[case]
    label = len(f"rank {timeline.schedule.ranks - 1}  ")
    rows = defaultdict(str)
    for line in lines(timeline, width):
        if line.plain.startswith("rank "):
            assert len(line.plain) <= max(width, label + 20)
            rows[line.plain[:label]] += line.plain[label:]
    assert len(rows) == timeline.schedule.ranks
    assert len({len(row) for row in rows.values()}) == 1
    letters = Counter(letter.upper() for row in rows.values() for letter in row if letter.isalpha())
    seen = sum(width > 0 for width in lengths(timeline))
    if seen == len(lengths(timeline)):
        assert sum(letters.values()) >= seen


def lengths(timeline):
    return [cell.end - cell.start for cell in chart(timeline).cells]


def test_every_column_shows_the_op_that_runs_then():
    timeline = TIMELINES["dualpipe"]
    rows = [line.plain[8:] for line in lines(timeline, 200) if line.plain.startswith("rank ")]
    for row in rows:
        assert len(row) == 3 * timeline.makespan
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            if span.end > span.start:
                op = span.ops[0]
                letter = op.kind.lower() if op.lane is DOWN else str(op.kind)
                assert rows[rank][3 * int(span.start) :].startswith(f"{letter}{op.mb}")


def printed(**settings):
    out = io.StringIO()
    console = Console(file=out, width=80, highlight=False, **settings)
    for line in lines(TIMELINES["zb1p"], 80):
        console.print(line, soft_wrap=True)
    return out.getvalue()


def test_colours_are_for_a_terminal_and_the_text_is_the_same(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = printed()
    coloured = printed(force_terminal=True, color_system="truecolor")
    assert "\x1b" not in plain
    red, green, blue = (int(LIGHT.shades[F].light[i : i + 2], 16) for i in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "48;2;" not in printed(force_terminal=True, color_system="truecolor")
