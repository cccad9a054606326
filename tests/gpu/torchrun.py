"""The comparison that every process started by torchrun takes part in."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from dualpipe.schedule.generate import generate
from reference.case import DTYPES, Case
from reference.comparison import differences, failed_sanity_checks
from reference.model import ModelConfig
from reference.production import run_rank
from reference.trace import merge
from reference.verify import initial_weights, run_oracle

TIMEOUT = 120.0


def compare_ranks(name: str, dtype: str, backend: str) -> list[str]:
    """Run a schedule on all ranks; every rank returns what differs from the oracle, which rank 0 computes."""
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT))
    device = "cpu"
    if backend == "nccl":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    ranks = dist.get_world_size()
    schedule = generate(name, ranks, 2 * ranks + 2)
    case = Case(schedule, ModelConfig(dtype=DTYPES[dtype]), device=device, timeout=TIMEOUT)
    mine = run_rank(case)
    everyone = [None] * ranks
    dist.all_gather_object(everyone, mine)
    complaints = [[""]]
    if dist.get_rank() == 0:
        truth = run_oracle(case)
        found = differences(schedule, truth, merge(everyone))
        complaints = [[*failed_sanity_checks(truth, initial_weights(case)), *map(str, found)]]
    dist.broadcast_object_list(complaints, src=0)
    return complaints[0]
