"""Everything between a loss and the next weights: AdamW, schedule, clipping, precision."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from . import distributed
from .config import Precision, TrainingConfig
from .data import Cursor, in_groups
from .errors import NonFinite
from .speed.sharding import full, part_of

Example = TypeVar("Example")

MAX_OVERFLOWS = 20  # of fp16 in a row; with more, its scale cannot be the reason


class Optimizer:
    """An optimizer with its learning-rate schedule, gradient clipping and precision.

    It takes no step with a number that is not finite. Under fp16 a gradient overflows now and then:
    such a step is left out, and counted in `skipped`.

    Args:
        optimizer: steps the parameters.
        scheduler: steps after each optimizer step, or None.
        max_grad_norm: the gradient's largest total L2 norm, or None for no clipping.
        precision: of the forward passes, by autocast; weights and losses keep their own.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        *,
        max_grad_norm: float | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.max_grad_norm, self.precision = max_grad_norm, precision
        self.steps = self.skipped = self.skipped_in_a_row = 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device_type = self.parameters[0].device.type
        # Half precision loses small gradients: fp16 scales the loss up and the gradient down.
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "fp16")

    @property
    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        return self.optimizer.param_groups[0]["lr"]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Forward passes inside run in the chosen precision, also those of models on the CPU
        beside the one that is trained."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        with contextlib.ExitStack() as stack:
            for device_type in {"cpu", self.device_type}:
                stack.enter_context(
                    torch.autocast(device_type, dtype=dtype, enabled=self.precision != "fp32")
                )
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch's share of the loss."""
        if distributed.is_idle():
            loss = loss * 0
        self.scaler.scale(loss).backward()

    def step(self, batch: Any = None, metrics: Mapping[str, float] | None = None) -> float:
        """Clip, step, and clear the gradient.

        Args:
            batch: what the gradient came from, handed to whoever catches `NonFinite`.
            metrics: what was computed with the gradient, the loss above all.

        Returns:
            The gradient's total norm before clipping.

        Raises:
            NonFinite: if the gradient or one of the metrics is not finite; the weights are
                untouched then.
        """
        for p in self.parameters:
            if p.grad is not None and p.grad.is_sparse:  # of an embedding used without its head
                p.grad = p.grad.to_dense()
        distributed.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        total_norm = _total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = float(total_norm)
        overflow = self._require_finite(norm, metrics or {}, batch)
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, total_norm)
        if overflow:  # nothing is stepped without gradients; the scale and the schedule go on
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1
        return norm

    def _require_finite(self, norm: float, metrics: Mapping[str, float], batch: Any) -> bool:
        """Raise `NonFinite`, or say whether this is an overflow that fp16 expects."""
        fault = next((name for name, x in metrics.items() if not math.isfinite(x)), None)
        if fault is None and math.isfinite(norm):
            self.skipped_in_a_row = 0
            return False
        expected = fault is None and self.precision == "fp16"
        if expected and self.skipped_in_a_row < MAX_OVERFLOWS:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            return True
        fault = fault or self._gradient_at_fault()
        self.scaler.update()  # or the next step could not unscale
        self.optimizer.zero_grad(set_to_none=True)
        raise NonFinite(self.steps, fault, batch)

    def _gradient_at_fault(self) -> str:
        for group in self.optimizer.param_groups:
            for name, p in zip(group.get("param_names", ()), group["params"], strict=False):
                if p.grad is not None and not bool(torch.isfinite(full(p.grad)).all()):
                    return f"gradient of {name}"
        return "gradient"

    def state_dict(self) -> dict[str, Any]:
        """All that outlives a step."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, for what was learned and counted. Rates, decay and the rest
        that a config says stay as they are here, since a run may be continued with others."""
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        configured = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for p, moments in self.optimizer.state.items():
            for name, x in moments.items():
                if isinstance(x, Tensor) and x.shape == p.shape:  # the count of steps has none
                    moments[name] = part_of(x, p)
        scheduler, groups = self.scheduler, self.optimizer.param_groups
        if isinstance(scheduler, LambdaLR):  # what `adamw` makes: a rate is base * lambda(step)
            base_lrs, lambdas = scheduler.base_lrs, scheduler.lr_lambdas
            scheduler.load_state_dict(state["scheduler"] | {"base_lrs": base_lrs})
            for values, base, share in zip(configured, base_lrs, lambdas, strict=True):
                values["lr"] = base * share(scheduler.last_epoch)
        elif scheduler is not None:  # any other keeps its rates in its state
            scheduler.load_state_dict(state["scheduler"])
            for values, group in zip(configured, groups, strict=True):
                values["lr"] = group["lr"]
        for group, values in zip(groups, configured, strict=True):
            group.update(values)
        if state["scaler"]:  # empty, unless it was saved under fp16
            self.scaler.load_state_dict(state["scaler"])


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    # Row by row first: one float32 sum over the 38 million squares of an embedding is a thousandth
    # too small on a CPU, and takes twice as long, since it uses one thread.
    rows = [torch.linalg.vector_norm(g, dim=-1) if g.ndim > 1 else g for g in gradients]
    return full(nn.utils.get_total_norm(rows))


def adamw(
    module: nn.Module, config: TrainingConfig, total_steps: int, *, eps: float = 1e-8
) -> Optimizer:
    """AdamW over the trainable parameters; matrices decay, biases and normalisations do not.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; the schedules of ``transformers``: a
    linear rise over the warm-up, then constant, linear to 0, or a half cosine to 0. The warm-up is
    the nearest number of steps, of two equally near the even one; the ``Trainer`` rounds up.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [x for x in named if x[1].ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [x for x in named if x[1].ndim < 2], "weight_decay": 0.0},
    ]
    fused = named[0][1].device.type in ("cpu", "cuda")
    groups = [group for group in groups if group["params"]]  # an empty one would have no names
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, eps=eps, fused=fused)
    scheduler = get_scheduler(
        "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        optimizer,
        num_warmup_steps=round(config.warmup_share * total_steps),
        num_training_steps=total_steps,
    )
    return Optimizer(
        optimizer, scheduler, max_grad_norm=config.max_grad_norm, precision=config.precision
    )


class BatchLoss(Protocol):
    """What each loss returns: these two, and further means beside them."""

    @property
    def loss(self) -> Tensor:
        """A mean, with gradient."""
        ...

    @property
    def count(self) -> Tensor:
        """Over how many tokens or pairs."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


def accumulate(
    batch_loss: Callable[[list[Example]], BatchLoss],
    examples: Sequence[Example],
    *,
    total: int,
    length: Callable[[Example], int],
    max_tokens: int,
    optimizer: Optimizer | None = None,
    dropout: Callable[[int], AbstractContextManager[None]] | None = None,
) -> dict[str, float]:
    """Loss and metrics of a batch, in micro-batches that leave its means and its gradient as they
    would be without micro-batches.

    Args:
        batch_loss: of a micro-batch, with means over it or with a number for each example, or None
            where nothing is known. Of what is called ``..._max`` the largest is kept.
        total: what the losses' counts sum up to: response tokens, or pairs.
        length: of an example, in tokens.
        max_tokens: padded tokens in one forward pass; a matter of memory only.
        optimizer: gets the gradient of the loss and is then ready to step; None to evaluate.
        dropout: `dropout_rng` of this step, if there is dropout; is given the micro-batch's number.
    """

    def learn(numbered: tuple[int, list[Example]]) -> dict[str, float]:
        number, part = numbered
        with contextlib.nullcontext() if dropout is None else dropout(number):
            with contextlib.nullcontext() if optimizer is None else optimizer.autocast():
                found = batch_loss(part)
            if optimizer is not None:
                optimizer.backward(found.loss * found.count / total)
        return _shares(found, total)

    # What dropout drops depends on the micro-batch, so it is the same however many share them.
    among = distributed.size() if dropout is None else 1
    parts = in_groups(examples, length, max_tokens=max_tokens, among=among)
    means: dict[str, float] = {}
    for shares in distributed.deal(learn, list(enumerate(parts))):
        for name, share in shares.items():
            before = means.get(name)
            if name.endswith("_max"):
                means[name] = share if before is None else max(before, share)
            else:
                means[name] = (before or 0.0) + share
    return means


def _shares(found: BatchLoss, total: int) -> dict[str, float]:
    """What a micro-batch adds to the means over `total`; of what is called ``..._max`` the
    largest."""
    shares, count = {}, int(found.count)
    for name, value in found._asdict().items():
        if name != "count" and value is not None:
            # In double, or a share of 0.65 would be 0.6499999980; on the CPU, since Apple's
            # GPUs have none.
            numbers = value.detach().cpu().double()
            if name.endswith("_max"):
                shares[name] = float(numbers.max())
            else:
                shares[name] = float(numbers.sum() if numbers.dim() else numbers * count) / total
    return shares


@contextlib.contextmanager
def dropout_rng(seed: int, step: int, device: torch.device, micro_batch: int = 0) -> Iterator[None]:
    """Dropout knows only torch's global generator. Inside, that one depends on seed, step and
    micro-batch alone, so that a run can be repeated, resumed, and shared by processes; afterwards
    it is as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # Of what is given, the CPU's generator keeps 32 bits.
        torch.manual_seed(1_000_003 * (step + 1) + seed + 2_860_486_313 * micro_batch)
        yield


@dataclass
class State:
    """What outlives a step of SFT, reward training and DPO: counter, optimizer, data cursor."""

    optimizer: Optimizer
    cursor: Cursor
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values only; the optimizer's tensors are the live ones, not copies."""
        return {
            "step": self.step,
            "epoch": self.cursor.epoch,
            "position": self.cursor.position,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`: training goes on with the bits of the uninterrupted run."""
        self.step = state["step"]
        self.cursor.epoch, self.cursor.position = state["epoch"], state["position"]
        self.optimizer.load_state_dict(state["optimizer"])
