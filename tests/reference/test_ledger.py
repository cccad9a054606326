"""The measured peak of live activations is what the schedule says: live from F until W is over."""

import gc

import pytest
import torch
from torch import nn

from dualpipe.schedule import UP, B, F, W
from dualpipe.schedule.generate import PLANS, dualpipe, dualpipev, generate, one_f_one_b, zb1p
from dualpipe.schedule.text import loads
from reference.data import Batch
from reference.ledger import Account, Holder, Key, Ledger
from tests.reference.trials import SGD, SMALL, Trial, decoder, with_program


def measure(schedule, **options):
    ledger = Ledger(schedule.ranks)
    decoder(schedule, steps=1, **options).run(schedule, ledger=ledger)
    assert not any(account.live for account in ledger.accounts)
    return ledger


def peaks(schedule):
    return [peak.microbatches for peak in measure(schedule).peaks]


def said(schedule):
    """The peaks by the schedule's own words: in a slot, what F allocates counts before what W releases."""
    found = []
    for program in schedule.programs:
        live, peak = set(), 0
        for slot in program:
            live |= {(op.lane, op.stage, op.mb) for op in slot if op.kind is F}
            peak = max(peak, len(live))
            live -= {(op.lane, op.stage, op.mb) for op in slot if op.kind is W}
        found.append(peak)
    return found


@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_dualpipe_holds_one_microbatch_more_than_it_has_ranks(ranks):
    assert peaks(dualpipe(ranks, 2 * ranks + 2)) == [ranks + 1] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_dualpipev_holds_one_more_than_twice_its_ranks(ranks):
    assert peaks(dualpipev(ranks, 2 * ranks + 2)) == [2 * ranks + 1] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_1f1b_holds_as_many_as_there_are_ranks_from_here_on(ranks):
    assert peaks(one_f_one_b(ranks, 2 * ranks)) == [ranks - rank for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_zb1p_holds_as_many_as_there_are_ranks_everywhere(ranks):
    assert peaks(zb1p(ranks, 2 * ranks)) == [ranks] * ranks


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_measured_is_what_the_schedule_says(name, ranks):
    schedule = generate(name, ranks, 2 * ranks + 4)
    assert peaks(schedule) == said(schedule)


def test_putting_off_every_w_to_the_end_keeps_every_microbatch_alive():
    schedule = one_f_one_b(2, 6)
    late = schedule
    for rank, program in enumerate(schedule.programs):
        early = [tuple(op for op in slot if op.kind is not W) for slot in program]
        late = with_program(late, rank, [*early, *((op,) for slot in program for op in slot if op.kind is W)])
    assert peaks(schedule) == [2, 1]
    assert peaks(late) == said(late) == [6, 6]


def test_bytes_between_ops_are_the_sum_of_the_footprints_then():
    for name in PLANS:
        schedule = generate(name, 4, 10)
        ledger = measure(schedule)
        for program, peak in zip(schedule.programs, ledger.peaks, strict=True):
            held, most = {}, 0
            for op in (op for slot in program for op in slot if op.kind in (F, B, W)):
                footprint, key = ledger.footprints[op.lane, op.stage], Key.of(op)
                held[key] = {F: footprint.waiting_for_b, B: footprint.waiting_for_w, W: 0}[op.kind]
                most = max(most, sum(held.values()))
            assert peak.settled_bytes == most
            assert peak.bytes >= most


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_waits_for_w_is_the_inputs_and_output_gradients_of_linear_layers(dtype, size):
    #                           qkv     out     up      down
    #   inputs                  h       h       h       4h     (the mixed heads, GELU's output, two norms' outputs)
    #   output gradients        3h      h       4h      h
    footprints = measure(one_f_one_b(3, 3), dtype=dtype).footprints
    token = SMALL.hidden * size
    block = SMALL.batch * SMALL.sequence * (7 + 9) * token
    head = SMALL.batch * SMALL.sequence * (token + SMALL.vocab * size)
    assert [footprints[UP, stage].waiting_for_w for stage in range(3)] == [block, block, block + head]
    assert all(footprint.waiting_for_b > footprint.waiting_for_w for footprint in footprints.values())


def test_what_waits_for_b_by_hand():
    # tanh keeps its output, the norm its input, a mean and a deviation for each row, the linear layer its input
    schedule = loads("lane > 0\nrank 0: 0F0> 0B0> 0W0>")
    stage = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.Tanh())
    batch = Batch(torch.ones(3, 4), torch.zeros(3, 8))
    ledger = Ledger(1)
    Trial([stage], [[[batch]]], lambda y, target: y.sum(), SGD).run(schedule, ledger=ledger)
    norm, linear, tanh = 3 * 4 + 2 * 3, 3 * 4, 3 * 8
    assert ledger.footprints[UP, 0] == (4 * (norm + linear + tanh), 4 * (3 * 4 + 3 * 8))


def test_a_storage_counts_once_however_many_tensors_share_it():
    account, key = Account(), Key(UP, 0, 0)
    whole = torch.zeros(10)
    holders = [Holder(account, key, whole), Holder(account, key, whole[2:4]), Holder(account, key, torch.zeros(5))]
    assert (account.peak.microbatches, account.peak.bytes) == (1, 60)
    other = Holder(account, Key(UP, 0, 1), whole)
    assert (account.peak.microbatches, account.peak.bytes) == (2, 60)
    del holders, other
    gc.collect()
    assert not account.live
    assert account.peak.bytes == 60


def test_a_w_that_never_comes_stays_live_until_the_step_is_over():
    schedule = loads("lane > 0\nrank 0: 0F0> 0B0> 0F1> 0B1>+0W1> 0F2> 0B2>+0W2>")
    ledger, seen = Ledger(1), []
    trial = decoder(schedule, steps=1)
    trial.run(schedule, ledger=ledger, observe=lambda op, module: seen.append({k.mb for k in ledger.accounts[0].live}))
    assert seen == [{0}, {0}, {0, 1}, {0, 1}, {0}, {0, 2}, {0, 2}, {0}]
    assert not ledger.accounts[0].live
