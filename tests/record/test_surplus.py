"""A receive that is posted once too often, in events written by hand: what the story says of it."""

from proofs.models import parse_models
from proofs.prove import prove
from tests.record.logs import Rank, recorded


def test_the_story_names_a_receive_too_many_and_where_it_was_posted():
    """Rank 0 posts two receives for its second gradient: the third gradient takes the place of the second."""
    one, two = Rank(0), Rank(1)
    for _ in range(3):
        one.send(1, "F", one.forward())
        two.forward(two.receive(0))
    for forward in range(3):
        two.backward(forward)
        two.send(0, "B", forward)
    one.backward(0, one.receive(1))
    _, gradient = one.post(("receive", 1, "", None), ("receive", 1, "", None))
    one.backward(1, gradient)
    one.receive(1)
    checks = prove(recorded(one, two, end=False).schedule).as_json()["checks"]
    for check in ("messages", "deadlock"):
        story = checks[check]["story"]
        assert "rank 0 receives 0RB1> more than once, and nothing uses one of those in slot 8: this is" in story
        assert "0RB1>@1 in slot 8, message 1 of it, of rank 0 was posted at rank0.py:" in story
        assert "that it is 0RB1>@1 is a guess by order, since no observed forward or backward uses what is" in story
    assert checks["buffers"]["verdict"] == "proved"


def test_the_story_names_a_receive_too_many_because_of_which_nothing_uses_a_later_one():
    """Rank 1 posts a receive of lane > too many: what that lane receives next is used by nothing."""
    one, two = Rank(0), Rank(1)
    one.send(1, "F", one.forward(module=0))
    two.forward(two.receive(0), module=0)
    for _ in range(3):
        two.send(0, "F", two.forward(module=1))
    surplus = two.receive(0)
    gradient = two.receive(0)
    two.backward(1, gradient)
    two.receive(0)  # used by nothing
    two.backward(2, two.receive(0))
    two.receive(0)
    for number in range(3):
        forward = one.forward(one.receive(1), module=1)
        one.backward(forward)
        one.send(1, "B", forward)
        if number == 0:
            one.send(1, "F", one.forward(module=0))
    two.forward(surplus, module=0)
    report = prove(recorded(one, two, end=False).schedule, parse_models("eager:3"), smt=False)
    checks = report.as_json()["checks"]
    assert "but the next message from rank 0 is the gradient" in checks["messages"]["story"]
    assert "1RF1>@0 in slot 8 of rank 1 was posted at " in checks["messages"]["story"]
    story = checks["deadlock"]["story"]
    assert "rank 1 posts one receive from rank 0 too many, probably 1RF1>@0 in slot 8: without it, its later" in story
    assert "and now nothing uses what it receives in slot 11 (0RB1<@0)" in story
    (doubt,) = report.doubts
    assert doubt.startswith("rank 1 posts one receive from rank 0 too many, probably 1RF1>@0 in slot 8, at rank1.py:")
    assert "the names of the messages that follow on this channel may be shifted by one" in doubt
