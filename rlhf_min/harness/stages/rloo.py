"""RLOO as the commands run it."""

from functools import partial

from rlhf_min import rloo
from rlhf_min.config import RLOOConfig
from rlhf_min.harness.stages import rollouts

STAGE = "rloo"
TITLE, ROWS = "RLOO", "prompts"
CONFIG = RLOOConfig
MEASURED = rollouts.MEASURED
MONITORS = True
WRITES = rollouts.WRITES

trained_before = rollouts.trained_before
checks = rollouts.checks
run = partial(rollouts.run, rloo, STAGE, TITLE)

CURVES = rollouts.curves(STAGE, *rollouts.group_curves(STAGE))
headline = partial(rollouts.headline, STAGE, TITLE)
findings = partial(rollouts.findings, STAGE)
