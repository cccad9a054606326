"""Text as bytes, cut into microbatches: the documentation of the standard library, which every machine has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor

VOCABULARY = 256


class Batch(NamedTuple):
    """One microbatch: ``tokens``, and the same text one byte later as ``targets``; both int64 ``[batch, sequence]``."""

    tokens: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.tokens.to(device), self.targets.to(device))


Steps = Sequence[Sequence[Sequence[Batch]]]
"""Training data: step, then lane, then microbatch."""


@cache
def corpus() -> Tensor:
    """The help topics of ``pydoc``, sorted by name and joined: int64 ``[bytes]``.

    The text is that of the running Python, so it differs slightly between minor versions.
    """
    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(torch.int64)


def batches(count: int, batch_size: int, seq_len: int, seed: int) -> list[Batch]:
    """``count`` microbatches of ``batch_size`` passages of ``seq_len`` bytes, drawn with ``seed``.

    Each tensor is contiguous and has its own storage, because a view at an odd offset may run on another kernel.
    """
    text = corpus()
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Batch:
        starts = torch.randint(len(text) - seq_len, (batch_size,), generator=generator).tolist()
        passages = [text[start : start + seq_len + 1] for start in starts]
        return Batch(torch.stack([p[:-1] for p in passages]), torch.stack([p[1:] for p in passages]))

    return [draw() for _ in range(count)]


def training_data(steps: int, lanes: Sequence[int], batch_size: int, seq_len: int, seed: int) -> Steps:
    """Fresh microbatches for each of ``steps`` steps: ``lanes[l]`` of them for lane ``l``."""
    supply: Iterator[Batch] = iter(batches(steps * sum(lanes), batch_size, seq_len, seed))
    return [[[next(supply) for _ in range(count)] for count in lanes] for _ in range(steps)]
