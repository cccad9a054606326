"""Conclusions from events written by hand: the names of unmatched ends, and the length of a lane cut short."""

import pytest

from dualpipe.record import RecordError
from tests.record.logs import Rank, lines, recorded


def pair(microbatches: int = 2) -> tuple[Rank, Rank]:
    """Two ranks that train one microbatch after the other."""
    one, two = Rank(0), Rank(1)
    for _ in range(microbatches):
        f = one.forward()
        one.send(1, "F", f)
        g = two.forward(two.receive(0))
        two.backward(g)
        two.send(0, "B", g)
        one.backward(f, one.receive(1))
    return one, two


def unmatched(recording) -> list[str]:
    """For every note on an unmatched end: the rank, and the op that it is named."""
    notes = [note for note in recording.notes if "the next op that its rank expects" in note]
    return [f"{note.split(':')[0]} {note.partition('is named ')[2].split()[0].rstrip(',')}" for note in notes]


def test_two_ranks_without_a_fault():
    recording = recorded(*pair())
    assert lines(recording) == [
        "0F0> 0SF0> 0RB0> 0B0>+0W0> 0F1> 0SF1> 0RB1> 0B1>+0W1>",
        "1RF0> 1F0> 1B0>+1W0> 1SB0> 1RF1> 1F1> 1B1>+1W1> 1SB1>",
    ]
    assert (recording.notes, recording.caveats, recording.ended) == ((), (), (True, True))


@pytest.mark.parametrize(
    ("rank", "kind", "named"),
    [
        (0, "send", "0SF2>@1"),
        (0, "receive", "0RB2>@1"),
        (1, "send", "1SB2>@0"),
        (1, "receive", "1RF2>@0"),
    ],
)
def test_an_extra_end_is_named_as_one_more_of_its_kind(rank, kind, named):
    ranks = pair()
    getattr(ranks[rank], kind)(1 - rank)
    recording = recorded(*ranks)
    assert unmatched(recording) == [f"rank {rank} {named}"]
    assert ("matched by no receive" if kind == "send" else "matched by no send") in recording.notes[0]
    assert f"at rank{rank}.py:" in recording.notes[0]
    assert lines(recording)[rank].endswith(named.partition("@")[0])


def test_two_extra_ends_are_named_one_after_the_other():
    one, two = pair()
    one.receive(1, wait=False)
    one.receive(1, wait=False)
    assert unmatched(recorded(one, two)) == ["rank 0 0RB2>@1", "rank 0 0RB3>@1"]


def middle() -> tuple[Rank, Rank, Rank]:
    """Three ranks after one microbatch's forward."""
    ranks = Rank(0, 3), Rank(1, 3), Rank(2, 3)
    f = ranks[0].forward()
    ranks[0].send(1, "F", f)
    f = ranks[1].forward(ranks[1].receive(0))
    ranks[1].send(2, "F", f)
    ranks[2].forward(ranks[2].receive(1))
    return ranks


@pytest.mark.parametrize(
    ("kind", "peer", "named"),
    [("send", 0, "1SB0>@0"), ("receive", 0, "1RF1>@0"), ("send", 2, "1SF1>@2"), ("receive", 2, "1RB0>@2")],
)
def test_on_a_middle_rank_the_peer_identifies_the_boundary(kind, peer, named):
    ranks = middle()
    getattr(ranks[1], kind)(peer)
    assert unmatched(recorded(*ranks, end=False)) == [f"rank 1 {named}"]


def test_an_end_between_ranks_without_a_common_boundary_is_an_error():
    for kind, words in (("send", "send to"), ("receive", "receive from")):
        ranks = middle()
        getattr(ranks[0], kind)(2)
        with pytest.raises(RecordError, match=rf"rank 0: the {words} rank 2 at rank0.py:\d+ has none"):
            recorded(*ranks)


def both_ways(kind: str) -> list[str]:
    """DualPipe's two lanes on two ranks: each holds the first stage of one and the last stage of the other."""
    ranks = Rank(0), Rank(1)
    for one, two in (ranks, ranks[::-1]):
        f = one.forward(module=0)
        one.send(1 - ranks.index(one), "F", f)
        two.forward(two.receive(ranks.index(one)), module=1)
    getattr(ranks[0], kind)(1)
    return unmatched(recorded(*ranks, end=False))


def test_with_two_lanes_the_gradient_of_a_finished_forward_is_expected_before_an_activation():
    assert both_ways("receive") == ["rank 0 0RB0>@1"]
    assert both_ways("send") == ["rank 0 1SB0<@1"]


def test_a_lane_continues_on_a_rank_that_never_received_its_activation():
    one, two = Rank(0, 3), Rank(1, 3)
    f = one.forward()
    one.send(1, "F", f)
    two.send(2, "F", two.forward(two.receive(0)))
    recording = recorded(one, two, Rank(2, 3), end=False)
    assert recording.schedule.routes == {">": (0, 1, 2)}
    assert recording.notes[0].startswith("rank 2 ran no forward of lane >; that it holds stage 2 is concluded")
    assert recording.caveats[0] == "ranks 0 1 2 did not finish"


@pytest.mark.parametrize(("waiting", "peer"), [(1, 2), (2, 1)])
def test_a_lane_continues_on_a_rank_that_waits_for_it_or_that_it_waits_for(waiting, peer):
    ranks = Rank(0, 3), Rank(1, 3), Rank(2, 3)
    f = ranks[0].forward()
    ranks[0].send(1, "F", f)
    ranks[1].forward(ranks[1].receive(0))
    ranks[waiting].receive(peer)
    assert recorded(*ranks, end=False).schedule.routes == {">": (0, 1, 2)}


def test_the_rest_of_a_lane_cut_short_is_taken_from_the_other_lane():
    ranks = [Rank(n, 4) for n in range(4)]
    down = ranks[3].forward(module=0)
    ranks[3].send(2, "F", down)
    down = ranks[2].forward(ranks[2].receive(3), module=0)
    ranks[2].send(1, "F", down)
    ranks[1].forward(ranks[1].receive(2), module=0)
    up = ranks[0].forward(module=1)
    ranks[0].send(1, "F", up)
    ranks[1].forward(ranks[1].receive(0), module=1)
    recording = recorded(*ranks, end=False)
    assert recording.schedule.routes == {">": (0, 1, 2, 3), "<": (3, 2, 1, 0)}
    assert "lane > was cut short at stage 1; the rest is taken from the other lane" in recording.notes
    assert "lane < was cut short at stage 2; the rest is taken from the other lane" in recording.notes


def test_a_send_of_unknown_origin_is_named_by_its_use_and_noted():
    one, two = Rank(0), Rank(1)
    for known in (True, False):
        f = one.forward()
        one.send(1, "F", f)
        g = two.forward(two.receive(0))
        two.backward(g)
        two.send(0, "B", g if known else None)
        one.backward(f, one.receive(1))
    recording = recorded(one, two)
    assert lines(recording)[1].endswith("1B1>+1W1> 1SB1>")
    assert recording.caveats == ("1 send has a tensor that no observed forward or backward made",)
    assert recording.notes[0].startswith("rank 1: no observed forward or backward made what it sends at rank1.py:")
    assert recording.notes[0].endswith("it is named by what uses it (1 times)")


def test_several_tensors_of_one_boundary_are_one_message_if_nothing_is_between_them():
    def sent(*between: str, together: bool = False) -> list[str]:
        one, two = Rank(0), Rank(1)
        f = one.forward()
        first, second = ("send", 1, "F", f), ("send", 1, "F", f)
        if together:
            one.post(first, second)
        else:
            one.post(first)
            for _ in between:
                one.send(1, "F", one.forward())
            one.post(second)
        received = two.post(*[("receive", 0, "", None)] * (2 + len(between)))
        two.forward(received[0], received[-1])
        for message in received[1:-1]:
            two.forward(message)
        return lines(recorded(one, two))

    assert sent(together=True) == ["0F0> 0SF0>", "1RF0> 1F0>"]
    assert sent() == ["0F0> 0SF0>", "1RF0> 1F0>"]
    assert sent("another") == ["0F0> 0SF0> 0F1> 0SF1> 0SF0>", "1RF0>+1RF1>+1RF0> 1F0> 1F1>"]


def test_a_forward_of_an_evaluation_that_the_next_rank_trains_on_is_noted():
    """Rank 0 evaluates one microbatch, and rank 1 none."""
    first, second = Rank(0), Rank(1)
    for grad in (False, True):
        forward = first.forward(grad=grad)
        first.send(1, "F", forward)
        taken = second.forward(second.receive(0))
        second.backward(taken)
        second.send(0, "B", taken)
        if grad:
            first.backward(forward, first.receive(1))
    (note,) = [note for note in recorded(first, second, end=False).notes if "evaluate" in note]
    assert note == (
        "0F0> at rank0.py:1 ran without gradients, and 1F0> at rank1.py:3 trains on what it sends: do both ranks "
        "evaluate equally many microbatches?"
    )


def test_a_loss_for_the_log_is_counted_as_control_data():
    one, two = pair()
    two.send(0, "F", 1)
    one.receive(1)
    recording = recorded(one, two)
    assert recording.caveats == ("2 message ends are left out as control data",)
    assert recording.notes[0].startswith("rank 1: an end of the pipeline sends at rank1.py:")
    assert "2 message ends carry no activation or gradient of a stage (control data)" in recording.notes[1]


def test_a_step_is_written_with_its_own_messages():
    one, two = pair(1)
    for rank in (one, two):
        rank.step()
    f = one.forward()
    one.send(1, "F", f)
    two.forward(two.receive(0))
    recording = recorded(one, two, step=2)
    assert (lines(recording), recording.steps) == (["0F0> 0SF0>", "1RF0> 1F0>"], 2)
    assert recording.notes[0] == "step 2 of 2"


def test_a_computation_with_a_message_in_flight_is_counted():
    one, two = Rank(0), Rank(1)
    f = one.forward()
    one.send(1, "F", f, wait=False)
    one.forward()
    two.forward(two.receive(0))
    assert "1 computation began with messages still in flight" in " ".join(recorded(one, two).notes)


def crossing(down: int) -> tuple[Rank, Rank]:
    """Two lanes on two ranks: lane > ran two forwards and one backward, lane < ran ``down`` forwards."""
    one, two = Rank(0), Rank(1)
    for _ in range(2):
        f = one.forward(module=0)
        one.send(1, "F", f)
        two.forward(two.receive(0), module=1)
    two.backward(0)
    two.send(0, "B", 0)
    one.backward(0, one.receive(1))
    for _ in range(down):
        f = two.forward(module=0)
        two.send(0, "F", f)
        one.forward(one.receive(1), module=1)
    return one, two


def test_the_gradient_of_a_finished_forward_is_expected_before_an_earlier_activation():
    one, two = crossing(down=1)
    two.forward(module=0)
    one.receive(1)
    assert unmatched(recorded(one, two, end=False)) == ["rank 0 0RB1>@1"]


def test_an_op_that_a_lane_still_lacks_is_expected_before_an_extra_one():
    one, two = crossing(down=2)
    two.backward(1)
    two.send(0, "B", 1)
    one.backward(1, one.receive(1))
    for _ in range(2):
        two.forward(module=0)
    one.receive(1)
    assert unmatched(recorded(one, two, end=False)) == ["rank 0 1RF2<@1"]


def guessed(one: Rank, two: Rank) -> dict[str, list[str]]:
    """The messages of rank 0 whose names are guesses, and what each could be."""
    recording = recorded(one, two, end=False)
    guesses = recording.schedule.observed.guesses
    return {str(message.op): [str(op) for op in others] for message, others in guesses.items()}


def test_a_guessed_name_is_in_the_file_with_what_else_it_could_be():
    one, two = crossing(down=1)
    two.forward(module=0)
    one.receive(1)
    assert guessed(one, two) == {"0RB1>@1": ["1RF1<@1"]}
    assert recorded(one, two, end=False).notes[-1].endswith("; this is a guess, and it could be 1RF1<@1")


def test_the_line_that_posts_activations_names_an_unmatched_receive():
    one, two = crossing(down=1)
    two.forward(module=0)
    one.receive(1)
    received = [e for e in one.events if e["event"] == "post" and e["messages"][0]["kind"] == "receive"]
    for event, line in zip(received, (70, 90, 90), strict=True):
        event["at"] = f"p2p.py:1 (called at schedule.py:{line})"
    assert guessed(one, two) == {"1RF1<@1": []}
    received[-1]["at"] = "p2p.py:1 (called at schedule.py:70)"
    assert guessed(one, two) == {"0RB1>@1": []}


def test_what_the_rank_computes_next_names_an_unmatched_receive():
    one, two = crossing(down=1)
    two.forward(module=0)
    one.receive(1)
    one.forward(module=1)
    assert guessed(one, two) == {"1RF1<@1": ["0RB1>@1"]}


def test_the_shape_names_an_unmatched_receive():
    one, two = Rank(0), Rank(1)
    for _ in range(2):
        f = one.forward(module=0)
        one.send(1, "F", f)
        two.forward(two.receive(0), module=1)
        f = two.forward(module=0)
        two.send(0, "F", f)
        one.forward(one.receive(1, form="float32[8]"), module=1)
    two.backward(0)
    two.send(0, "B", 0)
    one.backward(0, one.receive(1))
    two.forward(module=0)
    one.receive(1, form="float32[8]")
    assert guessed(one, two) == {"1RF2<@1": []}
