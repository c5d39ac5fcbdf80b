"""Several processes at one run: how its work is dealt out, and how all of them get the results.

Every process runs the same program on the same data and draws the same random numbers. Only what is
heavy is dealt out, micro-batch by micro-batch; its results are gathered, so that all else is whole
and equal everywhere, as with one process. Losses divide by the counts of the whole minibatch, so
gradients are summed, once for each optimizer step. With one process nothing here does anything.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Part = TypeVar("Part")
Result = TypeVar("Result")

LARGE = 2**18  # numbers of a gradient that is summed on its own; fewer wait for others
# Whoever waits is ended with the process that fails, see the harness. A reward may take hours.
PATIENCE = timedelta(days=30)


@dataclass
class _World:
    rank: int = 0
    size: int = 1
    sharded: bool = False
    alone: bool = False  # at a part of its own: what is called there is not dealt out again
    idle: bool = False  # in a round that only keeps the others company


_world = _World()


def start() -> None:
    """Join the processes that ``torchrun`` has started, as its environment variables say; nothing
    where there is one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    _world.rank, _world.size = dist.get_rank(), dist.get_world_size()


def end() -> None:
    """Leave the others, at the end of all work; they need not be there any more."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _world.rank, _world.size, _world.sharded = 0, 1, False


def rank() -> int:
    """The number of this process, from 0."""
    return _world.rank


def size() -> int:
    """How many processes share what is done now."""
    return 1 if _world.alone else _world.size


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this is the process that speaks and writes: the first."""
    return _world.rank == 0


def shard_models() -> None:
    """From now on what is trained is split among the processes, if there are several."""
    _world.sharded = _world.size > 1


def is_sharded() -> bool:
    """Whether what is trained is split among the processes."""
    return _world.sharded


def deal(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """What `work` makes of each part, in their order, on every process.

    Each process does every `size`-th part. What one of them raises is raised everywhere; of several
    errors that of the first part, as with one process.

    Args:
        work: returns what can be pickled.
        parts: the same on every process.

    Returns:
        The results; if there are several processes, their tensors are on the CPU.
    """
    if size() == 1:
        return [work(part) for part in parts]
    mine: list[Result] = []
    error = None
    try:
        with _on_its_own():
            for part in parts[_world.rank :: _world.size]:
                mine.append(_on_cpu(work(part)))
            if _world.sharded and len(mine) < -(-len(parts) // _world.size):
                _keep_company(work, parts[0])
    except Exception as raised:  # of any kind: the others wait for this process
        if _world.sharded:  # in a forward pass of theirs
            raise
        error = raised
    gathered: list[Any] = [None] * _world.size
    dist.all_gather_object(gathered, (mine, _sendable(error)))
    for i in range(len(parts)):
        source = i % _world.size
        done, met = gathered[source]
        if i // _world.size == len(done):
            raise error if source == _world.rank and error is not None else met
    return [gathered[i % _world.size][0][i // _world.size] for i in range(len(parts))]


@contextlib.contextmanager
def _on_its_own() -> Iterator[None]:
    _world.alone = True
    try:
        yield
    finally:
        _world.alone = False


def _sendable(error: Exception | None) -> Exception | None:
    """The error as another process can make it anew: itself, or its kind and message."""
    try:
        copy.copy(error)
    except Exception:  # of any kind: it wants other arguments than its message
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _keep_company(work: Callable[[Part], Result], part: Part) -> None:
    """Sharded weights are gathered by all processes at once, so all make as many passes."""
    _world.idle = True
    try:
        work(part)
    finally:
        _world.idle = False


def _on_cpu(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.detach().cpu()
    return tuple(map(_on_cpu, result)) if isinstance(result, tuple) else result


def is_idle() -> bool:
    """Whether what is computed now belongs to another process, so that its gradient is not ours."""
    return _world.idle


def on_main(work: Callable[[], Result]) -> Result:
    """What `work` returns, or raises, on the first process, which alone does it."""
    found: list[Any] = [None, None]
    error = None
    if size() == 1:
        return work()
    if is_main():
        try:
            with _on_its_own():
                found[0] = work()
        except Exception as raised:  # of any kind: the others wait for this process
            error, found[1] = raised, _sendable(raised)
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise error or found[1]
    return found[0]


def agree(flag: bool) -> bool:
    """Whether any process says so."""
    return bool(largest(int(flag)))


def largest(number: int) -> int:
    """The largest number that any process gives."""
    if size() == 1:
        return number
    given = torch.tensor(number)
    dist.all_reduce(given, dist.ReduceOp.MAX)
    return int(given)


def barrier() -> None:
    """Until all are here."""
    agree(False)


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Sum the gradients of all processes, in place.

    A process that had no part has no gradient; a parameter without one anywhere keeps none.
    """
    if size() == 1 or _world.sharded:  # which sums them in the backward pass
        return
    known = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(known, dist.ReduceOp.MAX)
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in (p for p, there in zip(parameters, known.tolist(), strict=True) if there):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if p.numel() >= LARGE:
            p.grad = p.grad.contiguous()
            dist.all_reduce(p.grad)
        else:
            small.setdefault((p.grad.dtype, p.grad.device), []).append(p.grad)
    for grads in small.values():
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))
