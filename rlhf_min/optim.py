"""Everything between a loss and the next weights: AdamW, schedule, clipping, precision."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from .data import Cursor
from .errors import NonFinite

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "linear", "cosine"]


FP16_SKIPS = 20  # steps in a row that may overflow before it is no longer the scale's fault


class Optimizer:
    """An optimizer with its learning-rate schedule, gradient clipping and precision.

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
        self.steps = self.skips = 0
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

    def step(self, batch: Any = None) -> float:
        """Clip, check, step, and clear the gradient.

        Args:
            batch: what the gradient came from, handed to whoever catches `NonFinite`.

        Returns:
            The gradient's total norm before clipping.

        Raises:
            NonFinite: if the gradient is not finite; the weights are untouched then.
        """
        for p in self.parameters:
            if p.grad is not None and p.grad.is_sparse:  # of an embedding used without its head
                p.grad = p.grad.to_dense()
        self.scaler.unscale_(self.optimizer)
        total_norm = nn.utils.get_total_norm(p.grad for p in self.parameters if p.grad is not None)
        norm = float(total_norm)
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, total_norm)
        # Under fp16 an overflow is expected now and then: the scaler skips it and scales less.
        self.skips = 0 if norm < float("inf") else self.skips + 1
        if self.skips > (FP16_SKIPS if self.precision == "fp16" else 0):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFinite(self.steps, "gradient", [], batch)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1
        return norm

    def state_dict(self) -> dict[str, Any]:
        """All that outlives a step."""
        return {
            "steps": self.steps,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])


def adamw(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    schedule: Schedule,
    warmup_steps: int,
    total_steps: int,
    max_grad_norm: float | None,
    precision: Precision,
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW over the trainable parameters; matrices decay, biases and normalisations do not.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; the schedules of ``transformers``: a
    linear rise over `warmup_steps`, then constant, linear to 0, or a half cosine to 0.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, eps=eps, fused=fused)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    return Optimizer(optimizer, scheduler, max_grad_norm=max_grad_norm, precision=precision)


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
