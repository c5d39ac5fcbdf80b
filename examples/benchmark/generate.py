"""Sampling by ``generate`` of transformers, on tokens that are given."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from benchmark.commands import Commands
from benchmark.models import PAD_ID
from benchmark.workloads import Rollouts, Task

WEIGHTS_IN_BF16 = "bf16 weights"  # a precision of its own, beside autocast


class Impose(LogitsProcessor):
    """Leaves of each step's distribution only the given token; sampling goes on as always."""

    def __init__(self, given: Rollouts) -> None:
        self.cells, self.step = given.cells, 0

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of one step. Shape ``(B, V)``."""
        forced = torch.full_like(scores, -torch.inf)
        forced.scatter_(1, self.cells[:, self.step, None], 0.0)
        self.step += 1
        return forced


def imposing(given: Rollouts) -> LogitsProcessorList:
    """For one call of ``generate``."""
    return LogitsProcessorList([Impose(given)])


def left_padded(rows: list[list[int]]) -> Tensor:
    """Shape ``(B, P)``."""
    width = max(map(len, rows))
    return torch.tensor([[PAD_ID] * (width - len(row)) + row for row in rows])


def sampling(task: Task, commands: Commands) -> None:
    """Plain sampling, without top-k and top-p, until all rows have ended."""
    commands.imported()
    given = Rollouts.draw(task.size)
    lm = AutoModelForCausalLM.from_pretrained(task.path("lm")).eval()
    precision: Any = nullcontext()
    if task.precision == WEIGHTS_IN_BF16:
        lm = lm.to(torch.bfloat16)
    elif task.precision == "bf16":
        precision = torch.autocast("cpu", torch.bfloat16)
    prompts = left_padded(given.prompts)
    commands.ready(frozen=[lm])
    while True:
        commands.wait()
        with precision:
            found = lm.generate(
                input_ids=prompts,
                attention_mask=(prompts != PAD_ID).long(),
                do_sample=True,
                top_k=0,
                max_new_tokens=task.size.max_new_tokens,
                logits_processor=imposing(given),
            )
        responses = [ids[ids != PAD_ID] for ids in found[:, prompts.shape[1] :]]
        given.check(responses)
        commands.done(tokens=sum(map(len, given.prompts)) + sum(map(len, responses)))
