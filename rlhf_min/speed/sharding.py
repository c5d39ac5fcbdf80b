"""Models that are split among the processes, so that large ones fit (FSDP2 of PyTorch).

Each process keeps a part of every weight, of its gradient, and of what AdamW knows of it. A pass
gathers the weights of one block of layers at a time, and lets them go; the gradients are summed in
the backward pass, each process keeping its part of the sum. All processes make every pass at once.
"""

import contextlib
import copy
import ctypes
import sys
from collections.abc import Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from .. import distributed
from ..errors import require

Model = TypeVar("Model", bound=nn.Module)

M_MMAP_THRESHOLD = -3  # of mallopt: from so many bytes on, a block is the system's own

# Of each model that is split: the same modules whole, with weights that are not there.
_outlines: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def shard(model: Model) -> Model:
    """Split a policy or a reward model, in place, if ``--shard`` says so; and return it.

    To be called before an optimizer is made of its parameters. It cannot be copied any more but by
    `gathered`, and computes only when it is called itself: of a reward model its classifier.

    Raises:
        BadInput: if the model has no list of layers that could be gathered one by one.
    """
    if not distributed.is_sharded() or model in _outlines:
        return model
    outline = _outline(model)
    for name in ("lm", "model"):  # what is inside can be gathered for itself
        if hasattr(model, name):
            _outlines[getattr(model, name)] = getattr(outline, name)
    _outlines[model] = outline
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False  # gradients are summed whole
    # A policy calls parts of its model, so it is gathered itself; a reward model calls its own.
    root = getattr(model, "model", model)
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.size(),))
    units: list[Any] = [*_layers(model), root]  # the rest of the weights is the root's
    _give_back_memory()
    for unit in units:
        # The root lets go after forward too: else it would keep them where no backward follows.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)  # losses divide by the counts of all processes
    return model


def _give_back_memory() -> None:
    """On a CPU: what a pass has gathered goes back to the system, layer by layer. The C library of
    Linux would soon keep blocks of up to 32 MB for itself, in a heap that only grows."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def is_split(model: nn.Module) -> bool:
    """Whether `shard` has split it, or what it is a part of."""
    return model in _outlines


def gathered(model: Model, *, here: bool = True) -> Model:
    """A copy that is whole: of a policy that was split without its critic.

    Args:
        here: whether this process needs it. All take part in any case, and where it is not needed
            its weights are empty.
    """
    outline, parts = _outlines[model], dict(model.named_parameters())
    weights: dict[int, Any] = {}
    for name, p in outline.named_parameters():
        whole = full(parts[name].detach())
        if here:
            weights[id(p)] = nn.Parameter(whole, requires_grad=p.requires_grad)
    new = copy.deepcopy(outline, _shared(model) | weights)
    for name, module in new.named_modules():
        module.training = model.get_submodule(name).training
    return new  # type: ignore[return-value]


def put_together(reward_model: Any) -> None:
    """Make a reward model whole that was split, in place: the inverse of `shard`."""
    if reward_model in _outlines:
        reward_model.model = gathered(reward_model.model)
        del _outlines[reward_model]


@contextlib.contextmanager
def whole(model: Model, *, here: bool = True) -> Iterator[Model]:
    """Inside, a model as `gathered` makes it; what is not split is given as it is.

    For all that one process does for itself, such as sampling, where each ends somewhere else.
    """
    if not is_split(model):
        yield model
        return
    copied = gathered(model, here=here)
    try:
        yield copied
    finally:  # now, and not when the last one forgets it
        for p in copied.parameters():
            p.data = p.data.new_empty(0)


def missing_passes(model: nn.Module, own: int) -> int:
    """How many passes more another process will make through a model that is split, while it waits
    in them for all. Each calls this at the same time, before its first pass."""
    if not is_split(model):
        return 0
    most = torch.tensor(own)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most) - own


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, which all processes put together; one that is not split as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def kept_here(tensor: Tensor) -> Tensor:
    """What this process keeps of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `full`: of a whole tensor what this process keeps of it, as `like` is split.
    Each process has the whole one, so nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    part = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()  # or it would hold the whole one


def _outline(model: nn.Module) -> Any:
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    buffers = {id(b): b for b in model.buffers()}
    outline: Any = copy.deepcopy(model, _shared(model) | buffers | empty)
    if hasattr(outline, "critic_trunk"):
        outline.critic, outline.critic_trunk, outline.value_head = "none", None, None
    return outline


def _shared(model: nn.Module) -> dict[int, Any]:
    """What all copies have in common, as `copy.deepcopy` takes it."""
    tokenizer = getattr(model, "tokenizer", None)
    return {} if tokenizer is None else {id(tokenizer): tokenizer}


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers of all trunks in a model."""
    found: list[nn.Module] = []
    trunks: list[Any] = [x.base_model for x in model.modules() if isinstance(x, PreTrainedModel)]
    for trunk in dict.fromkeys(trunks):
        n = trunk.config.get_text_config().num_hidden_layers
        lists = [x for x in trunk.modules() if isinstance(x, nn.ModuleList) and len(x) == n]
        require(
            bool(lists),
            f"--shard: {type(trunk).__name__} has no list of {n} layers to gather one by one; go "
            "without",
        )
        found += lists[0]  # the outermost
    return found
