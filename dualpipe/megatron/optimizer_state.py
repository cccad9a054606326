"""Saves the distributed optimizer's state parameter by parameter, around a bug of megatron-core 0.16.1.

The distributed optimizer cuts each bucket of a stage into one shard per replica.  A checkpoint in Megatron's format
``fully_reshardable`` holds whole parameters, so saving gathers the shards.  megatron-core 0.16.1
(``DistributedOptimizer.get_parameter_state_dp_zero``) joins the gathered buckets without the padding between them, but
then reads each parameter at its offset in the buffer, which counts that padding::

    buffer     | bucket 0 | pad | bucket 1      | pad |   where a parameter is read
    gathered   | bucket 0 | bucket 1      |               where it was written

Every parameter after the first padding is then saved with the numbers of other parameters, without an error.  Buckets
are padded to a multiple of the number of replicas and of 128 (65,536 with ``pad_buckets_for_high_nccl_busbw``), so the
bug shows if the number of replicas is not a power of two, or if a bucket does not end at such a multiple.

Here each bucket is cut into its parameters as soon as it is gathered, so the layout of the whole buffer does not
matter, and a Megatron without the bug works too.  A checkpoint written with the bug cannot be repaired: some values
were never written.  Loading compares the optimizer's copy of each weight with the weight
itself, and refuses the checkpoint if they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from dualpipe.errors import RuleError

SHARDING = "fully_reshardable"
"""Megatron's name of the checkpoint format with the optimizer's state parameter by parameter."""
_MOMENTS = ("param", "exp_avg", "exp_avg_sq")


def distributed_parts(optimizer: Any) -> Iterator[Any]:
    """The distributed optimizers in an optimizer, if any."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            yield part


@contextmanager
def whole_parameters(optimizer: Any) -> Iterator[None]:
    """Inside the block, ``save_parameters`` applies to the optimizer, whoever built it."""
    with ExitStack() as undo:
        for part in distributed_parts(optimizer):
            if "sharded_param_state_fully_reshardable" not in vars(part):
                for name in save_parameters(part):
                    undo.callback(delattr, part, name)  # uncovers the class's own
        yield


def save_parameters(part: Any) -> tuple[str, ...]:
    """Make one distributed optimizer gather whole parameters when saving and compare them when loading.

    Returns the names of the methods that are replaced on the instance.
    """
    own: dict[str, Callable[..., Any]] = {
        "get_parameter_state_dp_zero": _empty(part),
        "sharded_param_state_fully_reshardable": _filled(part),
        "load_parameter_state_from_fully_reshardable": _compared(part),
    }
    for name, method in own.items():
        setattr(part, name, method)
    return tuple(own)


def refuse_format(kind: object) -> None:
    """Raise ``RuleError`` for a format in which a chunk of DualPipe cannot be saved."""
    raise RuleError(
        "DualPipe's distributed optimizer must be saved parameter by parameter, gathered on all ranks of a stage",
        f"got {kind}",
        f"set metadata['distrib_optim_sharding_type'] to {SHARDING!r}; "
        "in Megatron-LM, --dist-ckpt-optim-fully-reshardable",
    )


def _empty(part: Any) -> Callable[..., Any]:
    """Allocate the state of each whole buffer; Megatron cuts it into the tensors that are filled or loaded into."""

    def get_parameter_state_dp_zero(
        use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any]:
        if use_gloo_comm or not return_on_all_ranks:
            refuse_format("a state gathered on one rank")
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for index, (ranges, buffer) in enumerate(zip(part.gbuf_ranges, part.buffers, strict=True)):
            size = buffer.numel if empty_data else 1  # when saving, the values are filled in later
            room = {key: torch.zeros(size, dtype=torch.float32).expand(buffer.numel) for key in _MOMENTS}
            state[index] = {dtype: {**room, "numel_unpadded": buffer.numel} for dtype in ranges}
        return state

    return get_parameter_state_dp_zero


def _filled(part: Any) -> Callable[..., Any]:
    stock = part.sharded_param_state_fully_reshardable

    def sharded_param_state_fully_reshardable(
        model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> Any:
        entries = stock(model_sharded_state_dict, is_loading, metadata or {})
        if not is_loading:
            for (parameter, whole), entry in zip(_gathered(part), entries.values(), strict=True):
                for key, value in whole.items():
                    assert entry[key].data.shape == parameter.shape, "Megatron lists parameters in another order"
                    entry[key].data = value.view(parameter.shape)
        return entries

    return sharded_param_state_fully_reshardable


def _gathered(part: Any) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Every parameter in the order of Megatron's buffers, with its whole state: flat float32 tensors on the CPU.

    Collective over the replicas of each buffer; buffers are in order of stage on both ranks of a pair.
    """
    for ranges, buffer in zip(part.gbuf_ranges, part.buffers, strict=True):
        group = buffer.data_parallel_group
        found: dict[Tensor, dict[str, Tensor]] = {}
        (of_buckets,) = ranges.values()
        for bucket, own in zip(buffer.buckets, of_buckets, strict=True):
            shards = _shards(part, own["param_map"], bucket.grad_data.numel() // group.size())
            for key, shard in shards.items():
                pieces = [torch.empty_like(shard) for _ in range(group.size())]
                dist.all_gather(pieces, shard, group=group)
                whole = torch.cat(pieces).cpu()
                for parameter in bucket.params_list:
                    start = buffer.param_index_map[parameter][0] - bucket.offset
                    values = whole[start : start + parameter.numel()].clone()
                    found.setdefault(parameter, {})[key] = values
        yield from ((parameter, found[parameter]) for parameter in buffer.param_index_map)


def _shards(part: Any, owned: dict[Any, Any], elements: int) -> dict[str, Tensor]:
    """This replica's shard of a bucket, for each kind of state; ``owned`` has the range of each parameter in it."""
    device = part.buffers[0].grad_data.device
    shards = {key: torch.zeros(elements, dtype=torch.float32, device=device) for key in _MOMENTS}
    for parameter, ranges in owned.items():
        state = part._get_main_param_and_optimizer_states(parameter)
        for key, shard in shards.items():
            shard[ranges["gbuf_local"].start : ranges["gbuf_local"].end].copy_(state[key].detach())
    return shards


def _compared(part: Any) -> Callable[..., Any]:
    stock = part.load_parameter_state_from_fully_reshardable

    def load_parameter_state_from_fully_reshardable(state_dict: dict[int, Any]) -> None:
        _require_equal_weights(part, state_dict)
        stock(state_dict)

    return load_parameter_state_from_fully_reshardable


def _require_equal_weights(part: Any, state_dict: dict[int, Any]) -> None:
    """Refuse an optimizer whose float32 copy of a weight, rounded to the model's dtype, is not the loaded weight."""
    if part.config.use_precision_aware_optimizer:
        return  # keeps its copies in other dtypes
    parameters = (parameter for buffer in part.buffers for parameter in buffer.param_index_map)
    names = {parameter: name for chunk in part.model_chunks for name, parameter in chunk.named_parameters()}
    pairs = [(parameter, state_dict[index]) for index, parameter in enumerate(parameters)]
    wrong = [parameter for parameter, state in pairs if not _is_copy(state, parameter)]
    if wrong:
        raise RuleError(
            "the optimizer's copy of each weight equals the weight if both are from one checkpoint "
            "(the model is loaded first)",
            f"{len(wrong)} of {len(pairs)} differ, the first of {names.get(wrong[0], 'a parameter without a name')}; "
            "megatron-core 0.16.1 writes such files when it saves fully_reshardable itself and a buffer has "
            "several buckets",
            "load the model without the optimizer, whose moments this file lacks, or load an older checkpoint",
        )


def _is_copy(state: dict[str, Any], parameter: Tensor) -> bool:
    copy = state.get("param", state.get("fp32_param"))
    if copy is None or type(parameter.data) is not Tensor:  # Transformer Engine's 8-bit formats
        return True
    return torch.equal(copy.to(parameter.device, parameter.dtype).view(parameter.shape), parameter.detach())
