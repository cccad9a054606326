"""torch's compute-only table: read as it was dumped, placed, and lowered."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.schedule import COMPUTE, UP, Schedule, ScheduleError
from dualpipe.schedule.generate import dualpipev
from dualpipe.schedule.text import ScheduleSyntaxError, dumps, loads
from dualpipe.schedule.torch_table import dumps_csv, load_csv, loads_csv
from proofs.prove import prove
from tests.schedule import torch_tables
from tests.schedule.hostile import is_schedule_or_points_into, outcome

PLACEMENTS = {
    "dualpipev": (0, 1, 2, 3, 3, 2, 1, 0),
    "zbv": (0, 1, 2, 3, 3, 2, 1, 0),
    "interleaved1f1b": (0, 1, 2, 3, 0, 1, 2, 3),
}


@pytest.mark.parametrize("name", torch_tables.CLASSES)
def test_golden_tables_are_what_torch_makes(name):
    made = torch_tables.table(name, torch_tables.RANKS, torch_tables.MICROBATCHES)
    assert torch_tables.path(name).read_bytes() == made.encode()


@pytest.mark.parametrize("name", torch_tables.CLASSES)
def test_placement_follows_from_who_runs_a_stage(name):
    schedule = load_csv(torch_tables.path(name))
    assert schedule.routes == {UP: PLACEMENTS[name]}
    assert schedule.microbatches == {UP: 8}


def test_dualpipev_of_torch_is_ours():
    theirs = load_csv(torch_tables.path("dualpipev"))
    assert theirs.only(COMPUTE).programs == dualpipev(4, 8).only(COMPUTE).programs


def test_every_kind_of_cell_is_read():
    text = "0F0,,0F1,(0F2;0B0)OVERLAP_F_B, ( 0F3 ; 0I1 )OVERLAP_F_B ,0W1,0B2\r\n"
    assert dumps(loads_csv(text)) == "lane > 0\nrank 0: 0F0> 0F1> 0F2>+0B0>+0W0> 0F3>+0B1> 0W1> 0B2>+0W2>\n"


BAD = {
    "empty": ("", 1, 1, "no action"),
    "no action of a rank": ("0F0\n,,\n1F0", 2, 1, "no action"),
    "blank line between": ("0F0\n\n1F0\n", 2, 1, "no action"),
    "a word": ("0F0,hello", 1, 5, "'hello'"),
    "a message without a microbatch": ("0F0,0SEND_F", 1, 5, "'0SEND_F'"),
    "an unshard of a microbatch": ("0F0,0UNSHARD0", 1, 5, "'0UNSHARD0'"),
    "a message within an overlap": ("(0F1;0SEND_B0)OVERLAP_F_B", 1, 6, "'0SEND_B0'"),
    "messages alone": ("0SEND_F0\n1RECV_F0", 1, 1, "no compute anywhere"),
    "a message of a stage on none": ("0F0,1SEND_F0", 1, 5, "stage 1, which no row runs"),
    "no microbatch": ("0F0,0B", 1, 5, "'0B'"),
    "a sign": ("0F-1", 1, 1, "'0F-1'"),
    "too many digits": ("0F1234567890", 1, 1, "'0F1234567890'"),
    "a quote": ('0F0,"0F1"', 1, 5, "'\"0F1\"'"),
    "overlap of two forwards": ("0F0, (0F1;0F2)OVERLAP_F_B", 1, 11, "'0F2'"),
    "overlap that begins with a backward": ("(0B1;0F2)OVERLAP_F_B", 1, 2, "'0B1'"),
    "overlap of nothing": ("(;)OVERLAP_F_B", 1, 2, "nothing"),
    "overlap cut short": ("(0F1;0B0)", 1, 1, "'(0F1;0B0)'"),
    "a stage on two ranks": ("0F0,1F0\n1F1", 2, 1, "stage 1, which rank 0 runs too"),
    "a stage on none": ("0F0\n2F0", 2, 1, "no stage 1 anywhere"),
    "a stage far away": ("0F0,999999999F0", 1, 1, "no stage 1 anywhere"),
    "a compute twice": ("0F0,0F1,,0F0", 1, 10, "rank 0 runs 0F0> twice"),
    "what cannot be run": ("0F0,0B0\n1B0,1F0", 1, 5, "rank 0 stops in slot 1: 0B0> needs 1B0>"),
}


@pytest.mark.parametrize("what", BAD)
def test_an_error_says_where_it_is_and_what_is_there(what):
    text, line, column, says = BAD[what]
    with pytest.raises(ScheduleSyntaxError) as error:
        loads_csv(text, "my.csv")
    assert str(error.value).startswith(f"my.csv:{line}:{column}: found ")
    assert says in str(error.value)
    assert "; expected " in str(error.value)


def test_messages_and_collectives_are_read_as_they_are_each_in_a_slot_of_its_own():
    text = "0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD,0RESHARD\r\n1RECV_F0,1F0,1I0,1SEND_B0,1W0\r\n"
    schedule = loads_csv(text)
    assert dumps(schedule) == (
        "lane > 0 1\nrank 0: 0US> 0F0> 0SF0> 0RB0> 0B0>+0W0> 0RG> 0RS>\nrank 1: 1RF0> 1F0> 1B0> 1SB0> 1W0>\n"
    )
    assert dumps_csv(schedule) == text
    assert dumps_csv(schedule, compute_only=True) == "0F0,0B0\r\n1F0,1I0,1W0\r\n"


@pytest.mark.parametrize("name", torch_tables.WITH_RUNTIME)
def test_every_table_of_torch_with_messages_is_printed_back_and_torch_reads_it(name, tmp_path):
    text = torch_tables.with_messages(name, 4, 8)
    schedule = loads_csv(text)
    assert dumps_csv(schedule) == text
    assert torch_tables.through_torch(dumps_csv(schedule), name, 4, 8, tmp_path) == text
    computes = dumps_csv(schedule, compute_only=True)
    assert torch_tables.through_torch(computes, name, 4, 8, tmp_path, "compute_only") == text
    waived = ["accumulation"] if name == "loopedbfs" else []  # it runs its backwards from the last microbatch on
    assert prove(schedule, smt=False, waive=waived).verdict == "proved"


@pytest.mark.parametrize(("name", "check"), [("dualpipev", "deadlock"), ("zbv", "messages"), ("loopedbfs", "deadlock")])
def test_tables_whose_receives_torch_defers_are_refuted(name, check):
    """With ``defer_pp_recv`` torch 2.13 posts receives in another order than the sends of other stages."""
    schedule = loads_csv(torch_tables.with_messages(name, 2, 4, defer_pp_recv=True))
    assert prove(schedule, smt=False).checks[check].verdict.word == "refuted"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lane > 0\nlane < 0\nrank 0: 0F0>", "the one lane >: there is lane > and lane <"),
        ("lane > 0 1\nrank 0: 0F0> 0SF0>@0\nrank 1: 1F0>", "goes to the neighbour: there is 0SF0>@0"),
        ("lane > 0\nrank 0: 0F0> 0AA0>", "no all-to-all or all-reduce: there is 0AA0>"),
        ("lane > 0\nrank 0: 0F0>\nfailure 0: ended", "cannot describe a program that failed: rank 0 ended"),
    ],
)
def test_what_torchs_tables_cannot_say_is_an_error(text, says):
    with pytest.raises(ScheduleError, match=re.escape(says)):
        dumps_csv(loads(text))


def test_a_batch_of_messages_becomes_a_cell_each_and_other_pairs_of_computes_too():
    text = "lane > 0 1\nrank 0: 0F0>+0F1> 0SF0>+0SF1> 0B0>+0B1>+0W1>\nrank 1:"
    assert dumps_csv(loads(text)) == "0F0,0F1,0SEND_F0,0SEND_F1,0I0,0B1\r\n\r\n"


def test_a_file_that_is_not_text_is_pointed_at(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(b"0F0,0F1\n\xfe")
    with pytest.raises(ScheduleSyntaxError, match=r"bad\.csv:2:1: found byte 0xfe"):
        load_csv(path)


CELLS = st.sampled_from(
    [
        "0SEND_F0",
        "1RECV_F0",
        "0UNSHARD",
        "0F0",
        "0F1",
        "1F0",
        "0B0",
        "0I0",
        "0W0",
        "1B0",
        "",
        "(0F1;1B0)OVERLAP_F_B",
        "(;",
        "9F9",
        "0F٣",
    ]
)
TABLES = st.lists(st.lists(CELLS, max_size=5).map(",".join), max_size=4).map("\n".join)


@given(st.text() | st.text(st.sampled_from("0123FIWB,;()\n\r OVERLAP_F_B\x00"), max_size=60) | TABLES)
def test_any_text_is_a_schedule_or_an_error_with_its_place(text):
    assert is_schedule_or_points_into(text, outcome(loads_csv, text))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_schedule_or_an_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(data)
    assert isinstance(outcome(load_csv, path), Schedule | ScheduleSyntaxError)
