"""How fast this machine multiplies matrices, at the shapes that the models have.

At 1024 tokens it is about as fast as it gets; PPO's minibatches are smaller, so the speed is also
measured at their shapes, without padding, for the update.
"""

import time

import torch
from torch import Tensor

from benchmark import settings
from benchmark.commands import Commands
from benchmark.flops import Shape
from benchmark.workloads import Task

ROWS = 1024
SECONDS = 0.3  # at least, for each shape
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gauge(task: Task, commands: Commands) -> None:
    """FLOP/s of a trunk's and of a vocabulary head's products, in the task's precisions; in PPO
    also at the shapes of a minibatch."""
    commands.imported()
    bert = task.workload == "reward"
    shape = Shape.of(task.size.bert_config() if bert else task.size.gpt2_config())
    shapes = {"trunk": (ROWS, shape.inner), "head": (ROWS, shape.vocabulary)}
    if task.workload == "ppo":
        lengths = task.expected().lengths
        minibatches = len(lengths) / settings.MINIBATCH
        tokens, predicted = sum(p + r for p, r in lengths), sum(r for _, r in lengths)
        shapes["update trunk"] = (round(tokens / minibatches), shape.inner)
        shapes["update head"] = (round(predicted / minibatches), shape.vocabulary)
    products = {
        (precision, part): (
            torch.randn(rows, shape.hidden, dtype=DTYPES[precision]),
            torch.randn(width, shape.hidden, dtype=DTYPES[precision]),
        )
        for precision in task.precision.split(",")
        for part, (rows, width) in shapes.items()
        if width
    }
    commands.ready()
    while True:
        commands.wait()
        rates: dict[str, dict[str, float]] = {}
        for (precision, part), (x, weight) in products.items():
            rates.setdefault(precision, {})[part] = rate(x, weight)
        commands.found(rates)


@torch.no_grad()
def rate(x: Tensor, weight: Tensor) -> float:
    """FLOP/s of ``y = x @ weight.T`` and of both products of its backward pass.

    All results go to memory that is there already.

    Args:
        x: shape ``(N, H)``.
        weight: shape ``(W, H)``.
    """
    y = x @ weight.T
    x_gradient, weight_gradient = torch.empty_like(x), torch.empty_like(weight)
    flops, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        torch.mm(x, weight.T, out=y)
        torch.mm(y, weight, out=x_gradient)
        torch.mm(y.T, x, out=weight_gradient)
        flops += 3 * 2 * x.numel() * weight.shape[0]
    return flops / (time.perf_counter() - started)
