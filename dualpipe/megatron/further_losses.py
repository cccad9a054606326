"""The losses of layers that predict further tokens, which Megatron keeps apart from the results of the loss function.

Megatron adds them to a tracker on the rank that computed them, and its training loop logs that of the last rank.  With
two lanes half of them arise on the first rank, and in a V all of them.  So after each step they are moved to the last
rank's tracker.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from dualpipe.megatron.losses import collect_losses
from dualpipe.runtime.transport import Transport
from dualpipe.schedule import Lane


def collect_further_losses(ends: Sequence[tuple[Lane, int]], transport: Transport, device: torch.device) -> None:
    """Move the tracked losses, float32 ``[layers]``, from the rank at the end of each lane to the last rank."""
    tracker = MTPLossLoggingHelper.tracker
    mine = tracker.pop("values", None)
    own = {lane: [mine] for lane, rank in ends if rank == transport.rank and mine is not None}
    found: list[Tensor] = collect_losses(own, ends, transport, device)
    if found:
        tracker["values"] = torch.stack(found).sum(dim=0)
        tracker["reduce_group"] = None
        tracker["avg_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
