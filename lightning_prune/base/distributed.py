"""The only file that knows process groups and DTensors; everyone else sees tensors.

A parameter is either replicated (one process, DDP) or sharded by rows (FSDP2: a DTensor with one Shard(0)). What is
not one of these is refused by name.
"""

import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "agree",
    "all_reduce_sum",
    "broadcast_number",
    "check_same_everywhere",
    "check_supported",
    "gather",
    "gather_counts",
    "has_copies",
    "is_active",
    "is_first_rank",
    "is_sharded",
    "local",
    "log",
    "maxima",
    "ranges",
    "rank",
    "rebuild",
    "reshard",
    "row_range",
    "shard",
    "sum_everywhere",
    "whole_state_dict",
]


def is_active() -> bool:
    """Return whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Return whether this process is the one that writes and logs."""
    return not is_active() or dist.get_rank() == 0


def rank() -> int:
    """Return the number of this process, 0 where it is alone."""
    return dist.get_rank() if is_active() else 0


def log(logger: logging.Logger, level: int, message: str, *values: object) -> None:
    """Log on the first rank only."""
    if is_first_rank():
        logger.log(level, message, *values)


def check_supported(model: nn.Module) -> None:
    """Refuse wrappers that hide the parameters, and placements other than rows.

    Raises:
        ValueError: if a part of the model is wrapped by FSDP1, whose flat parameters have no rows, or split by columns.
    """
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                f"module {name or '<root>'!r} is wrapped by FSDP1, whose flat parameters cannot hold masks; "
                "use FSDP2 (torch.distributed.fsdp.fully_shard; in accelerate: fsdp_version: 2)"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            _shard_dim(parameter, name)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put back the sharded parameters where a forward pass without a backward pass left gathered ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _shard_dim(parameter: DTensor, name: str = "a parameter") -> int | None:
    """Return the mesh dimension that splits the rows, None if replicated everywhere."""
    found = None
    for dim, placement in enumerate(parameter.placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard or placement.dim != 0 or found is not None:
            raise ValueError(
                f"{name} is placed as {parameter.placements}; only rows sharded once (Shard(0), FSDP2) and "
                "replicated dimensions are supported; prune before applying tensor parallelism"
            )
        found = dim
    return found


def is_sharded(parameter: Tensor) -> bool:
    """Return whether this process holds only some rows of the parameter."""
    return isinstance(parameter, DTensor) and _shard_dim(parameter) is not None


def local(tensor: Tensor) -> Tensor:
    """Return this process's part as a plain tensor that shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_range(parameter: Tensor) -> tuple[int, int]:
    """Return (first, number) of the rows along dimension 0 that this process holds."""
    num_rows = parameter.shape[0]
    if not isinstance(parameter, DTensor) or (dim := _shard_dim(parameter)) is None:
        return 0, num_rows
    size = -(-num_rows // parameter.device_mesh.size(dim))  # torch.chunk: equal parts, the last ones shorter
    first = min(parameter.device_mesh.get_local_rank(dim) * size, num_rows)
    return first, min(size, num_rows - first)


def gather(part: Tensor, parameter: Tensor) -> Tensor:
    """Put together the parts that the processes hold of a tensor shaped and sharded like `parameter`.

    Collective: every rank calls it.
    """
    if not isinstance(parameter, DTensor):
        return part
    as_bytes = part.to(torch.uint8) if part.dtype == torch.bool else part
    whole = DTensor.from_local(
        as_bytes,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()
    return whole.to(part.dtype)


def shard(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return the rows of `whole` that this process holds of `parameter`."""
    first, number = row_range(parameter)
    return whole if number == whole.shape[0] else whole[first : first + number].clone()


def _group(parameter: Tensor) -> dist.ProcessGroup | None:
    if isinstance(parameter, DTensor) and (dim := _shard_dim(parameter)) is not None:
        return parameter.device_mesh.get_group(dim)
    return None


def has_copies(parameter: Tensor) -> bool:
    """Return whether other processes hold the same rows."""
    group = _group(parameter)
    return is_active() and (1 if group is None else dist.get_world_size(group)) < dist.get_world_size()


def all_reduce_sum(values: Tensor, parameter: Tensor) -> Tensor:
    """Sum over the processes that share the rows of `parameter`; unchanged when it is not sharded."""
    group = _group(parameter)
    if group is None:
        return values
    values = values.clone()
    dist.all_reduce(values, group=group)
    return values


def maxima(values: Tensor, parameter: Tensor) -> Tensor:
    """Return the largest values over the processes that share the rows of `parameter`."""
    group = _group(parameter)
    if group is None:
        return values
    values = values.clone()
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def gather_counts(count: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum over the processes before this one, sum over all) for the rows of `parameter`."""
    group = _group(parameter)
    if group is None:
        return torch.zeros_like(count), count
    parts = [torch.empty_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, count, group=group)
    stacked = torch.stack(parts)
    return stacked[: dist.get_rank(group)].sum(0), stacked.sum(0)


def sum_everywhere(values: Tensor) -> Tensor:
    """Sum over all processes."""
    if not is_active():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def ranges(values: Tensor) -> list[tuple[int, int]]:
    """Return the lowest and the highest of every whole number over all processes."""
    values = values.long()
    both = torch.stack([values, -values])
    if is_active():
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
    highest, lowest = both.tolist()
    return [(-low, high) for low, high in zip(lowest, highest, strict=True)]


def broadcast_number(value: float, device: torch.device) -> float:
    """Return the first rank's value on every rank, so that all decide alike."""
    if not is_active():
        return value
    box = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(box, src=0)
    return float(box.item())


def agree(claim: bool, device: torch.device) -> bool:
    """Return whether a claim holds on every rank."""
    return not int(sum_everywhere(torch.tensor(int(not claim), device=device)))


def check_same_everywhere(hashes: Tensor, names: list[str]) -> None:
    """Check that all processes hold the same masks.

    Args:
        hashes: int64, one content hash per name.
        names: what was hashed, for the message.

    Raises:
        RuntimeError: naming the first mask that differs between ranks.
    """
    if not is_active() or not names:
        return
    low, high = hashes.clone(), hashes.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    differing = [name for name, same in zip(names, (low == high).tolist(), strict=True) if not same]
    if differing:
        raise RuntimeError(
            f"ranks hold different masks for {differing[0]!r} ({len(differing)} in all); their weights or "
            "statistics have drifted apart: check that every rank starts from the same weights and seed"
        )


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors, whole whatever the sharding; collective when it is sharded."""
    state = model.state_dict()
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a module, whatever its sharding; the other way of `whole_state_dict`.

    Raises:
        ValueError: if the names or shapes are others.
    """
    own = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if shapes != wanted:
        differing = sorted(dict.fromkeys([*(shapes.items() ^ wanted.items())]))[0]
        raise ValueError(f"the saved tensors are not those of this module: {differing[0]} has shape {differing[1]}")
    for name, tensor in own.items():
        whole = state[name].to(tensor.device)
        local(tensor.detach()).copy_(shard(whole, tensor) if is_sharded(tensor) else whole)


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in the order of their ranks; they may hold different numbers of them."""
    if not is_active():
        return rows
    nums = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    nums[dist.get_rank()] = len(rows)
    dist.all_reduce(nums)
    padded = rows.new_zeros(int(nums.max()), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:num] for part, num in zip(parts, nums.tolist(), strict=True)])


def rebuild(wrapper: nn.Module) -> None:
    """Let a DistributedDataParallel wrapper reduce the gradients of the parameters its module has now; collective.

    Without this, training goes on without an error after a parameter was replaced, and the ranks drift apart.

    Raises:
        ValueError: if the wrapper is another one.
    """
    if not isinstance(wrapper, DistributedDataParallel):
        raise ValueError(
            f"{type(wrapper).__name__} cannot follow a model whose tensors change; train with DistributedDataParallel "
            "or in one process, or cut between trainings"
        )
    # The same object is set up again, so that every reference to it stays good. Parameters are broadcast by it.
    DistributedDataParallel.__init__(
        wrapper,
        wrapper.module,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        dim=wrapper.dim,
        forward_sync_buffers=wrapper.forward_sync_buffers,
        process_group=wrapper.process_group,
        bucket_cap_mb=wrapper.bucket_bytes_cap // 2**20 or None,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
    )
