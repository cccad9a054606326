"""The named schedules: drawn at a size that can be read, kept in golden files, refused with a remedy."""

import re
from pathlib import Path

import pytest

from dualpipe.errors import RuleError
from dualpipe.schedule import COMPUTE, DOWN, UP, Kind, Schedule, W
from dualpipe.schedule.generate import (
    NAMES,
    SizeError,
    dualpipe,
    dualpipev,
    generate,
    interleaved,
    one_f_one_b,
    with_late_w,
    zb1p,
    zbv,
)
from dualpipe.schedule.text import dumps, load

GOLDEN = Path(__file__).parents[1] / "golden"


def computes(schedule: Schedule, rank: int) -> str:
    """A rank's computes with the lane as the field draws it: a full backward is one letter pair, no messages."""
    slots = schedule.only(COMPUTE).programs[rank]
    return " ".join("+".join(f"{op.kind}{op.mb}{op.lane}" for op in slot) for slot in slots)


@pytest.mark.parametrize("name", NAMES)
def test_order_is_the_golden_one(name):
    path = GOLDEN / f"{name}-P4-M8.txt"
    assert dumps(generate(name, 4, 8)) == path.read_text()
    assert load(path) == generate(name, 4, 8)


def test_outer_rank_of_dualpipe_overlaps_from_its_first_pair_on():
    assert computes(dualpipe(4, 8), 0) == (
        "F0> F1> F2> F0< B0< W0< F1< F3>+B1<+W1< F2<+B0>+W0> B2<+W2< F3<+B1>+W1> B3<+W3< B2> W2> B3> W3>"
    )


def test_middle_rank_runs_its_first_backward_apart():
    assert computes(dualpipe(4, 8), 1) == (
        "F0> F0< F1> F1< F2> B0<+W0< F2<+B0>+W0> F3>+B1<+W1< F3<+B1>+W1> B2<+W2< B2>+W2> B3< B3> W3< W3>"
    )


def test_opposite_ranks_of_dualpipe_are_mirror_images():
    up_and_down = str.maketrans("<>", "><")
    schedule = dualpipe(6, 14)
    for rank in range(3):
        assert computes(schedule, rank) == computes(schedule, 5 - rank).translate(up_and_down)


def test_dualpipev_is_dualpipe_folded():
    """Chunk by chunk, rank r of the V does what rank r of twice as many ranks does; the other lane is its way back."""
    folded, whole = dualpipev(3, 8), dualpipe(6, 16)

    def unfold(rank):
        return [
            [(op.kind, op.mb, UP if op.stage < 3 else DOWN) for op in slot]
            for slot in folded.only(COMPUTE).programs[rank]
        ]

    for rank in range(3):
        assert unfold(rank) == [
            [(op.kind, op.mb, op.lane) for op in slot] for slot in whole.only(COMPUTE).programs[rank]
        ]


def test_one_f_one_b_as_it_is_drawn():
    schedule = one_f_one_b(3, 4)
    assert computes(schedule, 0).replace(">", "") == "F0 F1 F2 B0+W0 F3 B1+W1 B2+W2 B3+W3"
    assert computes(schedule, 1).replace(">", "") == "F0 F1 B0+W0 F2 B1+W1 F3 B2+W2 B3+W3"
    assert computes(schedule, 2).replace(">", "") == "F0 B0+W0 F1 B1+W1 F2 B2+W2 F3 B3+W3"


def test_zb1p_runs_each_w_as_many_microbatches_late_as_its_rank():
    schedule = zb1p(3, 4)
    assert computes(schedule, 0).replace(">", "") == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert computes(schedule, 1).replace(">", "") == "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3"
    assert computes(schedule, 2).replace(">", "") == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"


def staged(schedule: Schedule, rank: int) -> str:
    """A rank's computes, the second of its two stages in small letters, as papers shade it."""
    second = schedule.routes[UP][rank + 1 :].index(rank) + rank + 1
    slots = schedule.only(COMPUTE).programs[rank]
    texts = (("+".join(f"{op.kind}{op.mb}" for op in slot), slot[0].stage == second) for slot in slots)
    return " ".join(text.lower() if late else text for text, late in texts)


def test_interleaved_1f1b_changes_its_chunk_after_as_many_microbatches_as_ranks():
    schedule = interleaved(2, 4)
    assert schedule.routes == {UP: (0, 1, 0, 1)}
    assert staged(schedule, 0) == ("F0 F1 f0 f1 F2 b0+w0 F3 b1+w1 f2 B0+W0 f3 B1+W1 b2+w2 b3+w3 B2+W2 B3+W3")
    assert staged(schedule, 1) == ("F0 F1 f0 b0+w0 f1 b1+w1 F2 B0+W0 F3 B1+W1 f2 b2+w2 f3 b3+w3 B2+W2 B3+W3")


def test_zbv_runs_the_w_that_it_deferred_chunk_by_chunk():
    schedule = zbv(2, 4)
    assert schedule.routes == {UP: (0, 1, 1, 0)}
    assert staged(schedule, 0) == "F0 F1 F2 f0 b0 w0 f1 b1 w1 F3 B0 W0 f2 b2 w2 B1 W1 f3 b3 w3 B2 W2 B3 W3"
    assert staged(schedule, 1) == ("F0 f0 F1 f1 b0 w0 F2 B0 W0 f2 b1 w1 F3 B1 W1 f3 b2 w2 B2 b3 B3 W2 w3 W3")


@pytest.mark.parametrize("make", [dualpipev, one_f_one_b, zb1p, zbv])
def test_one_rank_sends_nothing(make):
    schedule = make(1, 4)
    assert schedule.only(COMPUTE) == schedule


REFUSED = {
    ("dualpipe", 0, 8): "dualpipe needs an even number of ranks, 2 or more: got 0; use 2",
    ("dualpipe", -3, 8): "dualpipe needs an even number of ranks, 2 or more: got -3; use 2",
    ("dualpipe", 1, 8): "dualpipe needs an even number of ranks, 2 or more: got 1; use 2",
    ("dualpipe", 5, 20): "dualpipe needs an even number of ranks, 2 or more: got 5; use 6",
    ("dualpipe", 4, 6): "dualpipe needs at least two microbatches per rank: got 6 for 4 ranks; use 8 or more, or 1f1b",
    ("dualpipe", 4, 3): "dualpipe needs at least two microbatches per rank: got 3 for 4 ranks; use 8 or more",
    ("dualpipe", 4, 0): "dualpipe needs at least two microbatches per rank: got 0 for 4 ranks; use 8 or more",
    ("dualpipe", 4, 9): "dualpipe needs an even number of microbatches, as many on one lane as on the other: "
    "got 9; use 10",
    ("dualpipev", 0, 8): "dualpipev needs at least one rank: got 0; use 1 or more",
    ("dualpipev", 1, 1): "dualpipev needs at least two microbatches per rank: got 1 for 1 rank; use 2 or more, or 1f1b",
    ("1f1b", -1, 8): "1f1b needs at least one rank: got -1; use 1 or more",
    ("1f1b", 4, 3): "1f1b needs at least as many microbatches as ranks: got 3 for 4 ranks; use 4 or more",
    ("interleaved", 1, 4): "interleaved needs at least two ranks: got 1; use 2 or more, or 1f1b",
    ("interleaved", 4, 6): "interleaved needs a multiple of the ranks as microbatches, at least as many as ranks: "
    "got 6 for 4 ranks; use 8",
    ("interleaved", 4, 0): "interleaved needs a multiple of the ranks as microbatches, at least as many as ranks: "
    "got 0 for 4 ranks; use 4",
    ("zbv", 0, 4): "zbv needs at least one rank: got 0; use 1 or more",
    ("zbv", 2, 0): "zbv needs at least one microbatch: got 0; use 1 or more",
    ("dualpipe", "4", 8): "ranks and microbatches must be whole numbers: got '4'; give an int",
    ("zb1p", True, 8): "ranks and microbatches must be whole numbers: got True; give an int",
    ("zbv", 4, 8.5): "ranks and microbatches must be whole numbers: got 8.5; give an int",
    ("interleaved", 4, None): "ranks and microbatches must be whole numbers: got None; give an int",
    ("zb1p", 4, -8): "zb1p needs at least as many microbatches as ranks: got -8 for 4 ranks; use 4 or more",
}


@pytest.mark.parametrize("size", REFUSED)
def test_a_size_that_cannot_be_is_refused_with_a_remedy(size):
    with pytest.raises(SizeError) as error:
        generate(*size)
    assert str(error.value) == REFUSED[size]


@pytest.mark.parametrize("name", NAMES)
def test_every_size_is_generated_or_refused(name):
    for ranks in range(-1, 6):
        for microbatches in range(-1, 13):
            try:
                schedule = generate(name, ranks, microbatches)
            except SizeError:
                continue
            assert schedule.ranks == ranks
            assert sum(schedule.microbatches.values()) == microbatches


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        generate("dualpipes", 4, 8)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("late", ["tail", "all"])
@pytest.mark.parametrize("size", [(2, 4), (4, 8), (6, 14), (8, 17)], ids=str)
def test_late_w_changes_when_w_runs_and_nothing_else(name, late, size):
    ranks, microbatches = size if name == "dualpipev" else (2 * size[0], 2 * size[1])
    plain, variant = generate(name, ranks, microbatches), generate(f"{name}-late-{late}", ranks, microbatches)
    assert variant.only(frozenset(Kind) - {W}).programs == plain.only(frozenset(Kind) - {W}).programs
    for rank in range(ranks):
        weights = [op for slot in variant.programs[rank] for op in slot if op.kind is W]
        for chunk in {op.chunk for op in weights}:
            order = [op.mb for op in weights if op.chunk == chunk]
            assert order == list(range(variant.microbatches[chunk.lane]))


def test_late_w_runs_after_the_messages_of_its_b():
    """Of the tail from the last pair on; of all from the first pair on, so that no slot has a W besides other ops."""
    assert computes(dualpipe(4, 8, late_w="tail"), 1) == (
        "F0> F0< F1> F1< F2> B0<+W0< F2<+B0>+W0> F3>+B1<+W1< F3<+B1> W1> B2< W2< B2> W2> B3< B3> W3< W3>"
    )
    for schedule in (dualpipe(6, 14, late_w="all"), dualpipev(3, 7, late_w="all")):
        slots = [slot for program in schedule.programs for slot in program]
        assert [slot for slot in slots if W in {op.kind for op in slot} and len(slot) > 1] == []


@pytest.mark.parametrize(
    ("name", "late", "error"),
    [
        ("zb1p", "tail", "late W is an option of dualpipe, dualpipev: got tail with zb1p"),
        ("mine.txt", "all", "late W is an option of dualpipe, dualpipev: got all with mine.txt"),
        ("dualpipe", None, "late_w must be none, tail, all: got None; did you mean none?"),
        ("dualpipe", "tial", "late_w must be none, tail, all: got 'tial'; did you mean tail?"),
    ],
)
def test_late_w_of_other_schedules_is_refused(name, late, error):
    with pytest.raises(RuleError, match=re.escape(error)):
        with_late_w(name, late)
    assert with_late_w(name, "none") == name
