"""Each check on a schedule small enough to read, with each fault that it finds."""

import pytest

from dualpipe.schedule import UP, F, Kind, Op
from dualpipe.schedule.text import loads
from proofs import findings
from proofs.models import parse_models
from proofs.prove import CHECKS, prove
from proofs.story import tell
from proofs.verdict import Proved, Refuted, Skipped

# rank 0   F0 F1 . . B0 W0 B1 W1
# rank 1      F0 B0 F1 B1
TWO = """
lane > 0 1
rank 0: 0F0> 0SF0> 0F1> 0SF1>+0RB0> 0B0> 0W0> 0RB1> 0B1>+0W1>
rank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>+1RF1> 1F1> 1B1>+1W1> 1SB1>
"""

# name of the fault, what becomes what in the text, how the story goes
FAULTS = [
    (findings.Empty, "empty", TWO, "lane > 0 1\nrank 0: 0SF0>\nrank 1: 1RF0>\n", "no rank computes anything"),
    (findings.Missing, "missing", "0B1>+0W1>", "0B1>", "rank 0 never computes the weight gradient of microbatch 1"),
    (findings.Repeated, "repeated", "0W0>", "0W0> 0W0>", "in slot 5 (0W0>) and again in slot 6 (0W0>)"),
    (findings.Stray, "stray", "1F1>", "0F1>", "rank 1 runs the forward of microbatch 1 at stage 0 of lane > in slot 4"),
    (findings.TooEarly, "too early", "0B0> 0W0>", "0W0> 0B0>", "which it runs only in slot 5 (0B0>)"),
    (findings.TooEarly, "too early", "1RF0>", "", "which it never receives (1RF0>)"),
    (findings.TooEarly, "too early", "1B1>+1W1>", "1W1>+1B1>", "which it runs later in the same slot (1B1>)"),
    (findings.NoPeer, "no peer", "1RF0>", "1RF0>@7", "there is no rank 7, only 0 to 1"),
    (findings.NoPeer, "no peer", "1RF0>", "0RF0>", "lane > has no stage before stage 0, so no rank is at"),
    (findings.NoPeer, "no peer", "1RF0>", "1RF0>@1", "it names its own rank as the other end; rank 0 is its neighbour"),
    (
        findings.NoPeer,
        "no peer",
        "1RF0>",
        "0RF0>@0",
        "lane > has no stage before stage 0 that rank 0 could hold",
    ),
    (findings.Mismatch, "mismatch", "0SF0> 0F1> 0SF1>", "0F1> 0SF1> 0SF0>", "but the next message from rank 0 is the"),
    (findings.LeftOver, "left over", "1SB1>", "", "as message 2 from rank 1, which sends only 1"),
    (findings.LeftOver, "left over", "0RB1>", "", "as message 2 to rank 0, which receives only 1"),
    (findings.Unmatched, "never met", "0RB1>", "", "rank 1 waits forever in slot 6 (1SB1>) to send the gradient"),
    (findings.Unmatched, "never met", "1SB1>", "", "is message 2 from rank 1 to rank 0, and rank 1 sends only 1"),
    (
        findings.OutOfOrder,
        "out of order",
        "0W0> 0RB1> 0B1>+0W1>",
        "0RB1> 0B1>+0W1> 0W0>",
        "weight gradient of microbatch 1",
    ),
]


def found(text: str, check: str) -> findings.Finding:
    verdict = prove(loads(text)).checks[check].verdict
    assert isinstance(verdict, Refuted)
    return verdict.finding


@pytest.mark.parametrize(("fault", "name", "right", "wrong", "story"), FAULTS)
def test_a_fault_is_found_and_described(fault, name, right, wrong, story):
    assert right in TWO
    finding = found(TWO.replace(right, wrong), fault.check)
    assert isinstance(finding, fault)
    assert finding.as_json()["fault"] == name
    assert story in tell(finding)


def test_the_schedule_without_a_fault_passes_every_check_and_has_no_bound_to_keep():
    verdicts = {name: type(result.verdict) for name, result in prove(loads(TWO)).checks.items()}
    assert verdicts == dict.fromkeys(CHECKS, Proved) | {"memory": Skipped}


def test_a_message_sent_and_received_twice_is_distinguished_from_a_mismatch():
    twice = TWO.replace("0SF0> ", "0SF0> 0SF0> ").replace("1RF0> ", "1RF0> 1RF0> ")
    finding = found(twice, "messages")
    assert isinstance(finding, findings.SentTwice)
    assert "nothing consumes it" in tell(finding)


V = """
lane > 0 1 1 0
rank 0: 0F0> 0SF0> 3RF0> 3F0> 3B0>+3W0> 3SB0> 0RB0> 0B0>+0W0>
rank 1: 1RF0> 1F0> 2F0> 2SF0> 2RB0> 2B0>+2W0> 1B0>+1W0> 1SB0>
"""


@pytest.mark.parametrize(
    ("right", "wrong", "story"),
    [
        ("1F0> 2F0>", "1F0> 1SF0> 2F0>", "the stage after stage 1 of lane > is on rank 1 as well, and stages on one"),
        ("1F0> 2F0>", "1F0> 1SF0>@0 2F0>", "the stage after stage 1 of lane > is on rank 1 as well, and stages on"),
        ("3F0>", "3F0> 0RB0>@9", "there is no rank 9, only 0 to 1; rank 1 is its neighbour there"),
        ("3F0>", "3F0> 1RB0>", "(stage 2 to stage 1) from rank 1 in slot 4 (1RB0>), but rank 1 holds stage 1"),
        ("1F0> 2F0>", "1F0> 0SF0> 2F0>", "rank 1 sends an activation at stage 0 in slot 2 (0SF0>), but rank 0 holds"),
        ("3F0>", "3F0> 3SF0>", "lane > has no stage after stage 3, so no rank is at the other end"),
    ],
)
def test_the_story_of_a_message_between_no_two_ranks_gives_the_reason(right, wrong, story):
    assert prove(loads(V)).verdict == "proved"
    assert story in tell(found(V.replace(right, wrong, 1), "messages"))


@pytest.mark.parametrize(
    ("model", "story"),
    [
        ("blocking", "rank 0 waits forever in slot 1 (0SF0>) to send the activation"),
        (
            "eager",
            "rank 0 sends the activation of microbatch 0 of lane > (stage 0 to stage 1) in slot 1 (0SF0>) into a",
        ),
        ("stream", "the message stream of rank 0 waits forever in slot 1 (0SF0>) to send the activation"),
    ],
)
def test_the_model_decides_who_waits_for_a_missing_partner(model, story):
    schedule = loads("lane > 0 1\nrank 0: 0F0> 0SF0>\nrank 1:\n")
    verdict = prove(schedule, parse_models(model), smt=False).checks["deadlock"].verdict
    assert tell(verdict.finding).startswith(story)
    assert "rank 1 receives nothing from it" in tell(verdict.finding)


@pytest.mark.parametrize("peer", [0, 9])
def test_an_eager_send_that_no_other_rank_can_receive_lets_its_rank_go_on(peer):
    """The check goes on to what follows it: here the first receive without a partner."""
    text = f"lane > 0 1\nrank 0: 0F0> 0SF0>@{peer}\nrank 1: 1F0>\n"
    verdict = prove(loads(text), parse_models("eager"), smt=False).checks["deadlock"].verdict
    story = f"rank 0 sends the activation of microbatch 0 at stage 0 of lane > in slot 1 (0SF0>@{peer}) into a buffer"
    assert tell(verdict.finding).startswith(f"{story} that is never emptied: ")
    assert prove(loads(text), parse_models("blocking"), smt=False).verdict == "refuted"
    behind = loads(text.replace("\nrank 1", " 0RB0>\nrank 1"))
    verdict = prove(behind, parse_models("eager"), smt=False).checks["deadlock"].verdict
    assert tell(verdict.finding).startswith("rank 0 waits forever in slot 2 (0RB0>) to receive")


def test_stories_write_one_in_the_singular_and_zero_as_nothing():
    alone = loads("lane > 0 0\nrank 0: 0F0> 1F0>\n")
    report = prove(alone, max_activations=0, smt=False)
    assert report.text().startswith("schedule on 1 rank: refuted")
    assert "rank 0 holds 1 live activation in slot 0" in report.text()
    assert "the lane's only microbatch is 0" in report.text()
    assert "which receives nothing from it: it is never received" in tell(
        found(TWO.replace("1RF0>", "").replace("+1RF1>", ""), "messages")
    )
    assert "stage -1" not in tell(found("lane > 0 1\nrank 0: 0F0>\nrank 1: 0RF0>@0\n", "deadlock"))
    two = prove(alone, max_activations=1, smt=False).checks["memory"].verdict.finding
    assert tell(two).startswith("rank 0 holds 2 live activations in slot 1")


def test_a_message_to_a_rank_that_is_not_the_neighbour():
    # 0 1 2 in a line; rank 0 expects its gradient from rank 2
    three = """
    lane > 0 1 2
    rank 0: 0F0> 0SF0> 0RB0>@2 0B0>+0W0>
    rank 1: 1RF0> 1F0> 1SF0> 1RB0> 1B0>+1W0> 1SB0>
    rank 2: 2RF0> 2F0> 2B0>+2W0> 2SB0>
    """
    finding = found(three, "messages")
    assert isinstance(finding, findings.NotNeighbour)
    assert tell(finding).endswith("from rank 2 in slot 2 (0RB0>@2), but rank 1 is its neighbour there")


def test_naming_the_neighbour_as_peer_changes_nothing():
    assert isinstance(prove(loads(TWO.replace("1RF0>", "1RF0>@0"))).checks["messages"].verdict, Proved)


def test_two_receives_swapped_with_two_sends_swapped_match_again():
    both = TWO.replace("0SF0> 0F1> 0SF1>+0RB0>", "0F1> 0SF1> 0SF0>+0RB0>").replace(
        "1RF0> 1F0> 1B0>+1W0> 1SB0>+1RF1>", "1RF1> 1RF0> 1F0> 1B0>+1W0> 1SB0>"
    )
    assert isinstance(prove(loads(both)).checks["messages"].verdict, Proved)


def test_the_first_missing_microbatch_is_named():
    gap = TWO.replace("0>", "3>")
    assert found(gap, "complete") == findings.Missing(Op(F, UP, 0, 0), 0, 3)


def test_a_huge_microbatch_number_costs_nothing():
    finding = found(TWO.replace("0F1>", "0F999999999>"), "complete")
    assert isinstance(finding, findings.Missing)
    assert (finding.op.mb, finding.largest) == (1, 999_999_999)


def test_a_ring_of_neighbours_on_one_rank_needs_no_messages():
    # the turn of a V: stages 1 and 2 are both on rank 1
    v = """
    lane > 0 1 1 0
    rank 0: 0F0> 0SF0> 3RF0> 3F0> 3B0>+3W0> 3SB0> 0RB0> 0B0>+0W0>
    rank 1: 1RF0> 1F0> 2F0> 2SF0> 2RB0> 2B0>+2W0> 1B0>+1W0> 1SB0>
    """
    assert prove(loads(v)).verdict == "proved"
    finding = found(v.replace("1F0> 2F0>", "2F0> 1F0>"), "order")
    assert finding.need.kind is Kind.F


@pytest.mark.parametrize("text", ["lane > 0\nrank 0:\n", "lane > 0 0\nlane < 0 1\nrank 0:\nrank 1:\n"])
def test_programs_without_slots_are_refuted_and_not_vacuously_proved(text):
    report = prove(loads(text))
    assert report.verdict == "refuted"
    assert isinstance(report.checks["complete"].verdict.finding, findings.Empty)
    assert all(isinstance(report.checks[check].verdict, Proved) for check in ("order", "messages", "deadlock"))
