"""Everything between a loss and the next weights: AdamW, schedule, clipping, precision."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from .data import Cursor
from .errors import Fault, NonFinite, first_nonfinite

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "linear", "cosine"]
OnNonFinite = Literal["stop", "skip"]

SKIPS = 20  # in a row; with more, neither fp16's scale nor one bad batch can be the reason


class Optimizer:
    """An optimizer with its learning-rate schedule, gradient clipping and precision.

    It takes no step with a number that is not finite. `skipped` counts what was skipped instead.

    Args:
        optimizer: steps the parameters.
        scheduler: steps after each optimizer step, or None.
        max_grad_norm: the gradient's largest total L2 norm, or None for no clipping.
        precision: of the forward passes, by autocast; weights and losses keep their own.
        on_nonfinite: "stop" raises `NonFinite`; "skip" does so only after `SKIPS` in a row.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        *,
        max_grad_norm: float | None = None,
        precision: Precision = "fp32",
        on_nonfinite: OnNonFinite = "stop",
    ) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.max_grad_norm, self.precision = max_grad_norm, precision
        self.on_nonfinite = on_nonfinite
        self.steps = self.skipped = self.skipped_in_a_row = 0
        self.fault: Fault | None = None
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
        self.scaler.scale(loss).backward()

    def check(
        self, metrics: Mapping[str, float], rows: Iterable[tuple[int, Mapping[str, Tensor]]]
    ) -> None:
        """Have the next step refused if one of these numbers is not finite.

        Args:
            metrics: what is reported of the step.
            rows: the number of each row, and what the metrics are made of for this row alone;
                computed only in need, to say which rows are at fault.
        """
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            device = self.parameters[0].device
            with torch.no_grad(), self.autocast(), dropout_rng(0, self.steps, device):
                self.fault = first_nonfinite(rows) or (bad[0], [])

    def refused(self, batch: Any, *, expected: bool = False) -> bool:
        """Whether something is not finite. If so, it is counted as skipped, or the run stops.

        Args:
            batch: where it happened, handed to whoever catches `NonFinite`.
            expected: it may happen now and then, even if the run is to stop.
        """
        fault, self.fault = self.fault, None
        if fault is None:
            return False
        self.skipped_in_a_row += 1
        may_skip = expected or self.on_nonfinite == "skip"
        if self.skipped_in_a_row > (SKIPS if may_skip else 0):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFinite(self.steps, *fault, batch)
        self.skipped += 1
        return True

    def step(self, batch: Any = None) -> float:
        """Clip, check, step, and clear the gradient. A step that is skipped leaves the weights;
        the schedule goes on.

        Args:
            batch: what the gradient came from, handed to whoever catches `NonFinite`.

        Returns:
            The gradient's total norm before clipping.

        Raises:
            NonFinite: if the gradient or what was checked before is not finite, and the run is to
                stop; the weights are untouched then.
        """
        for p in self.parameters:
            if p.grad is not None and p.grad.is_sparse:  # of an embedding used without its head
                p.grad = p.grad.to_dense()
        self.scaler.unscale_(self.optimizer)
        total_norm = _total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = float(total_norm)
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, total_norm)
        overflow = self.fault is None and not math.isfinite(norm)
        if overflow:
            self.fault = self._gradient_at_fault(), []
        # Under fp16 an overflow is expected now and then: the scaler scales less after it.
        if self.refused(batch, expected=overflow and self.precision == "fp16"):
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.step()  # without gradients it changes nothing; the schedule waits for it
        else:
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1
        return norm

    def _gradient_at_fault(self) -> str:
        for group in self.optimizer.param_groups:
            for name, p in zip(group.get("param_names", ()), group["params"], strict=False):
                if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
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
        said = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        scheduler, groups = self.scheduler, self.optimizer.param_groups
        if isinstance(scheduler, LambdaLR):  # what `adamw` makes: a rate is base * lambda(step)
            base_lrs, lambdas = scheduler.base_lrs, scheduler.lr_lambdas
            scheduler.load_state_dict(state["scheduler"] | {"base_lrs": base_lrs})
            for values, base, share in zip(said, base_lrs, lambdas, strict=True):
                values["lr"] = base * share(scheduler.last_epoch)
        elif scheduler is not None:  # any other keeps its rates in its state
            scheduler.load_state_dict(state["scheduler"])
            for values, group in zip(said, groups, strict=True):
                values["lr"] = group["lr"]
        for group, values in zip(groups, said, strict=True):
            group.update(values)
        if state["scaler"]:  # empty, unless it was saved under fp16
            self.scaler.load_state_dict(state["scaler"])


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    # Row by row first: one float32 sum over the 38 million squares of an embedding is a thousandth
    # too small on a CPU, and takes twice as long, since it uses one thread.
    rows = [torch.linalg.vector_norm(g, dim=-1) if g.ndim > 1 else g for g in gradients]
    return nn.utils.get_total_norm(rows)


def adamw(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    schedule: Schedule,
    warmup_share: float,
    total_steps: int,
    max_grad_norm: float | None,
    precision: Precision,
    on_nonfinite: OnNonFinite = "stop",
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW over the trainable parameters; matrices decay, biases and normalisations do not.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; the schedules of ``transformers``: a
    linear rise over the warm-up, then constant, linear to 0, or a half cosine to 0. The warm-up is
    the nearest number of steps, of two equally near the even one; the ``Trainer`` rounds up.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [x for x in named if x[1].ndim >= 2], "weight_decay": weight_decay},
        {"params": [x for x in named if x[1].ndim < 2], "weight_decay": 0.0},
    ]
    fused = named[0][1].device.type in ("cpu", "cuda")
    groups = [group for group in groups if group["params"]]  # an empty one would have no names
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, eps=eps, fused=fused)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=round(warmup_share * total_steps),
        num_training_steps=total_steps,
    )
    return Optimizer(
        optimizer,
        scheduler,
        max_grad_norm=max_grad_norm,
        precision=precision,
        on_nonfinite=on_nonfinite,
    )


@contextlib.contextmanager
def dropout_rng(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Dropout knows only torch's global generator. Inside, that one depends on seed and step
    alone, so that a run can be repeated and resumed; afterwards it is as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(1_000_003 * (step + 1) + seed)
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
