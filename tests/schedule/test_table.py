"""Affine counts, rows, variants, and their expansion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.schedule import DOWN, UP, B, Chunk, F, show_slot
from dualpipe.schedule.phase_table import Action, Affine, Row, affine, expand, steps, symbol, vary

N, H = symbol("N"), symbol("H")
SIZES = st.fixed_dictionaries({"N": st.integers(0, 50), "H": st.integers(0, 50)})
SMALL = st.integers(-9, 9)


@given(SIZES, SMALL, SMALL, SMALL)
def test_an_expression_is_worth_what_its_operators_say(sizes, a, b, c):
    n, h = sizes["N"], sizes["H"]
    assert (a * N + b * H + c).at(sizes) == a * n + b * h + c
    assert (c - a * (N - H)).at(sizes) == c - a * (n - h)
    assert (-(N + c)).at(sizes) == -n - c


@given(SIZES)
def test_a_division_that_comes_out_even_is_exact(sizes):
    n, h = sizes["N"], sizes["H"]
    assert ((6 * N + 2) // 2 + H).at(sizes) == 3 * n + 1 + h
    assert ((2 * N) // 2 + (3 * H) // 3 - 1).at(sizes) == n + h - 1


def test_a_division_that_leaves_a_rest_is_our_bug():
    with pytest.raises(AssertionError, match=r"\(\+1 N\)/2 is not an integer at \{'N': 3\}"):
        (N // 2).at({"N": 3})


def test_what_cancels_is_gone():
    assert N - N == 0 * N == affine(0)
    assert N + H - N == H


def test_an_expression_prints_as_it_reads():
    assert str(2 * (N - H - 1)) == "+2 N -2 H -2"
    assert str(affine(0)) == "0"
    assert str((N + 1) // 2) == "(+1 N +1)/2"
    assert Affine({"N": 1}) == N


def test_a_body_is_steps_of_actions():
    assert steps("F0+B1 W") == ((Action(F, 0), Action(B, 1)), (Action("W", None),))
    assert [str(action) for step in steps("RF0 F0+B1+W1 W") for action in step] == ["RF0", "F0", "B1", "W1", "W"]


def show(program):
    return " ".join(map(show_slot, program))


def line(table, rank, **sizes):
    """The program of one of three ranks in a line."""
    return show(expand(table, sizes, (Chunk(UP, rank),), {UP: (0, 1, 2)}))


def test_rows_repeat_and_microbatches_count_up():
    assert line((Row("1", N + 1, "F0 B0"),), 0, N=1) == "0F0> 0B0> 0F1> 0B1>"


def test_messages_between_two_computes_are_one_batch_across_rows():
    table = (Row("1", 1, "F0 SF0"), Row("2", 1, "RB0 B0"))
    assert line(table, 1) == "1F0> 1SF0>+1RB0> 1B0>"


def test_messages_that_would_leave_the_lane_do_not_exist():
    table = (Row("1", 1, "RF0 F0 SF0 RB0 B0 SB0"),)
    assert line(table, 0) == "0F0> 0SF0>+0RB0> 0B0>"
    assert line(table, 2) == "2RF0> 2F0> 2B0> 2SB0>"


def test_messages_at_the_turn_of_a_v_do_not_exist():
    table = (Row("1", 1, "RF0 F0 SF0 RF1 F1 SF1"),)
    assert show(expand(table, {}, (Chunk(UP, 1), Chunk(UP, 2)), {UP: (0, 1, 1, 0)})) == "1RF0> 1F0> 2F0> 2SF0>"


def test_a_w_without_chunk_is_the_one_that_has_waited_longest():
    table = (Row("1", 1, "F0 F1 B1 B0+W0 B0 W W"),)
    lanes = {UP: (0, 1), DOWN: (1, 0)}
    assert show(expand(table, {}, (Chunk(UP, 0), Chunk(DOWN, 1)), lanes)) == "0F0> 1F0< 1B0< 0B0>+0W0> 0B1> 1W0< 0W1>"


def test_a_w_of_a_chunk_is_of_the_backward_before_it():
    assert line((Row("1", 1, "F0 F0 B0 B0+W0 W"),), 0) == "0F0> 0F1> 0B0> 0B1>+0W1> 0W0>"


def test_a_count_below_zero_is_our_bug():
    with pytest.raises(AssertionError, match="row '1' repeats -1 times"):
        line((Row("1", N - 2, "F0"),), 0, N=1)


def test_a_variant_says_only_what_differs():
    table = (Row("1", 1, "F0"), Row("2", 1, "B0"), Row("3", 1, "W"))
    varied = vary(table, Row("2", 1, "B0+W0"), Row("3", 0, "W"))
    assert [row.body for row in varied] == ["F0", "B0+W0", "W"]
    assert varied[0] is table[0]
    assert table[1].body == "B0"


def test_a_variant_of_a_row_that_is_not_there_is_our_bug():
    with pytest.raises(AssertionError, match="'9'"):
        vary((Row("1", 1, "F0"),), Row("9", 1, "F0"))
