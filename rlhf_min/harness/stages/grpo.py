"""GRPO as the commands run it."""

from functools import partial

from rlhf_min import grpo
from rlhf_min.config import GRPOConfig
from rlhf_min.harness.stages import rollouts

STAGE = "grpo"
TITLE, ROWS = "GRPO", "prompts"
CONFIG = GRPOConfig
MEASURED = rollouts.MEASURED
MONITORS = True
WRITES = rollouts.WRITES

trained_before = rollouts.trained_before
checks = rollouts.checks
run = partial(rollouts.run, grpo, STAGE, TITLE)

CURVES = rollouts.curves(STAGE, *rollouts.group_curves(STAGE))
headline = partial(rollouts.headline, STAGE, TITLE)
findings = partial(rollouts.findings, STAGE)
