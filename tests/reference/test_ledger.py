"""The measured peak of live activations is that of the schedule: live from the start of F to the end of W."""

import gc

import pytest
import torch
from torch import nn

from dualpipe.schedule import UP, B, F, Task, W
from dualpipe.schedule.generate import PLANS, dualpipe, dualpipev, generate, one_f_one_b, zb1p
from dualpipe.schedule.text import loads
from reference.data import Batch
from reference.ledger import Account, Holder, Ledger
from tests.reference.trials import SGD, SMALL, Trial, decoder, with_program


def measure(schedule, **options):
    ledger = Ledger(schedule.ranks)
    decoder(schedule, steps=1, **options).run(schedule, ledger=ledger)
    assert not any(account.live for account in ledger.accounts)
    return ledger


def peaks(schedule):
    return [peak.microbatches for peak in measure(schedule).peaks]


def expected(schedule):
    """The peaks that follow from the schedule.  In a slot, F allocates before W releases."""
    found = []
    for program in schedule.programs:
        live, peak = set(), 0
        for slot in program:
            live |= {op.task for op in slot if op.kind is F}
            peak = max(peak, len(live))
            live -= {op.task for op in slot if op.kind is W}
        found.append(peak)
    return found


@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_dualpipe_holds_one_microbatch_more_than_it_has_ranks(ranks):
    assert peaks(dualpipe(ranks, 2 * ranks + 2)) == [ranks + 1] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_dualpipev_holds_one_more_than_twice_its_ranks(ranks):
    assert peaks(dualpipev(ranks, 2 * ranks + 2)) == [2 * ranks + 1] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_1f1b_holds_as_many_as_the_ranks_from_its_own_to_the_last(ranks):
    assert peaks(one_f_one_b(ranks, 2 * ranks)) == [ranks - rank for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_zb1p_holds_as_many_as_there_are_ranks_on_every_rank(ranks):
    assert peaks(zb1p(ranks, 2 * ranks)) == [ranks] * ranks


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_measured_peaks_follow_from_the_schedule(name, ranks):
    schedule = generate(name, ranks, 2 * ranks + 4)
    assert peaks(schedule) == expected(schedule)


def test_deferring_every_w_to_the_end_keeps_every_microbatch_live():
    schedule = one_f_one_b(2, 6)
    late = schedule
    for rank, program in enumerate(schedule.programs):
        early = [tuple(op for op in slot if op.kind is not W) for slot in program]
        late = with_program(late, rank, [*early, *((op,) for slot in program for op in slot if op.kind is W)])
    assert peaks(schedule) == [2, 1]
    assert peaks(late) == expected(late) == [6, 6]


def test_bytes_between_ops_are_the_sum_of_the_footprints():
    for name in PLANS:
        schedule = generate(name, 4, 10)
        ledger = measure(schedule)
        for program, peak in zip(schedule.programs, ledger.peaks, strict=True):
            held, most = {}, 0
            for op in (op for slot in program for op in slot if op.kind in (F, B, W)):
                footprint = ledger.footprints[op.chunk]
                held[op.task] = {F: footprint.waiting_for_b, B: footprint.waiting_for_w, W: 0}[op.kind]
                most = max(most, sum(held.values()))
            assert peak.settled_bytes == most
            assert peak.bytes >= most


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_pending_w_holds_the_inputs_and_output_gradients_of_linear_layers(dtype, size):
    #                           qkv     out     up      down
    #   inputs                  h       h       h       4h     (the mixed heads, GELU's output, two norms' outputs)
    #   output gradients        3h      h       4h      h
    footprints = measure(one_f_one_b(3, 3), dtype=dtype).footprints
    token = SMALL.hidden * size
    block = SMALL.batch * SMALL.sequence * (7 + 9) * token
    head = SMALL.batch * SMALL.sequence * (token + SMALL.vocab * size)
    assert [footprints[UP, stage].waiting_for_w for stage in range(3)] == [block, block, block + head]
    assert all(footprint.waiting_for_b > footprint.waiting_for_w for footprint in footprints.values())


def test_a_pending_b_holds_what_autograd_saves():
    # tanh keeps its output, the norm its input, a mean and a deviation for each row, the linear layer its input
    schedule = loads("lane > 0\nrank 0: 0F0> 0B0> 0W0>")
    stage = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.Tanh())
    batch = Batch(torch.ones(3, 4), torch.zeros(3, 8))
    ledger = Ledger(1)
    Trial([stage], [[[batch]]], lambda y, target: y.sum(), SGD).run(schedule, ledger=ledger)
    norm, linear, tanh = 3 * 4 + 2 * 3, 3 * 4, 3 * 8
    assert ledger.footprints[UP, 0] == (4 * (norm + linear + tanh), 4 * (3 * 4 + 3 * 8))


def test_a_storage_shared_by_several_tensors_counts_once():
    account, task = Account(), Task(UP, 0, 0)
    whole = torch.zeros(10)
    holders = [Holder(account, task, whole), Holder(account, task, whole[2:4]), Holder(account, task, torch.zeros(5))]
    assert (account.peak.microbatches, account.peak.bytes) == (1, 60)
    other = Holder(account, Task(UP, 0, 1), whole)
    assert (account.peak.microbatches, account.peak.bytes) == (2, 60)
    del holders, other
    gc.collect()
    assert not account.live
    assert account.peak.bytes == 60


def test_a_microbatch_whose_w_never_runs_is_live_until_the_end_of_the_step():
    schedule = loads("lane > 0\nrank 0: 0F0> 0B0> 0F1> 0B1>+0W1> 0F2> 0B2>+0W2>")
    ledger, seen = Ledger(1), []
    trial = decoder(schedule, steps=1)
    trial.run(schedule, ledger=ledger, observe=lambda op, module: seen.append({k.mb for k in ledger.accounts[0].live}))
    assert seen == [{0}, {0}, {0, 1}, {0, 1}, {0}, {0, 2}, {0, 2}, {0}]
    assert not ledger.accounts[0].live
