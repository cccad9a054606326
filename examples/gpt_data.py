"""The data of ``pretrain_gpt.py``: the bytes of a text, cut into microbatches for each rank."""

from __future__ import annotations

import argparse
import pydoc_data.topics
from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor

VOCABULARY = 256  # a token is a byte


class Batch(NamedTuple):
    """A microbatch: int64 ``tokens`` and ``labels``, each ``[micro batch, sequence]``."""

    tokens: Tensor
    labels: Tensor


class Text:
    """A text cut into samples of ``length`` + 1 bytes, in a new random order in each epoch."""

    def __init__(self, data: bytes, length: int, seed: int) -> None:
        self.data, self.length, self.seed = torch.frombuffer(bytearray(data), dtype=torch.uint8), length, seed
        self.samples = (len(data) - 1) // length

    def sample(self, number: int) -> Tensor:
        epoch, index = divmod(number, self.samples)
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.seed + epoch))
        start = int(order[index]) * self.length
        return self.data[start : start + self.length + 1].long()

    def microbatches(self, args: argparse.Namespace, consumed: int, device: torch.device) -> Iterator[Batch]:
        """This rank's microbatches of a step, after ``consumed`` samples, as in Megatron's own sampler.

        Microbatch m of data-parallel rank i of d starts at sample ``consumed`` + (m d + i) x micro batch size.
        DualPipe gives microbatch 2k to lane > and 2k+1 to lane <.  So with d ranks, microbatch k of lane > is that of
        replica i, and microbatch k of lane < that of replica d+i, among the 2d replicas of a run with 1F1B.
        """
        size, ranks = args.micro_batch_size, args.data_parallel_size
        rank = parallel_state.get_data_parallel_rank()
        for number in range(args.num_microbatches):
            first = consumed + (number * ranks + rank) * size
            rows = torch.stack([self.sample(index) for index in range(first, first + size)]).to(device)
            yield Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def read_text(args: argparse.Namespace) -> tuple[Text, Text]:
    """The text for training, and its last tenth for validation."""
    if args.data is None:
        data = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode()
    else:
        data = args.data.read_bytes()
    split = len(data) * 9 // 10
    return Text(data[:split], args.seq_length, args.seed), Text(data[split:], args.seq_length, args.seed)
