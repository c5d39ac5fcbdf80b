"""GRPO and RLOO: what they make of a rollout, and whole runs beside a plain loop."""

import pytest
import torch
from small import PROMPTS, small_policy
from strategies import assert_close
from tolerances import FP64

from rlhf_min import grpo, online, rloo
from rlhf_min.config import GRPOConfig, RLOOConfig
from rlhf_min.data import collate
from rlhf_min.errors import BadInput
from rlhf_min.rollout import Rollout


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def judged(scores, *, logprobs=None, ended=None):
    """A rollout of two groups of two responses, of 2, 1, 3 and 1 tokens, with these scores."""
    responses = [torch.ones(n, dtype=torch.int64) for n in (2, 1, 3, 1)]
    sequences = collate([torch.ones(2, dtype=torch.int64)] * 4, responses, pad_id=0)
    zeros = torch.zeros(sequences.mask.shape, dtype=torch.float64)
    logprobs = zeros if logprobs is None else logprobs
    return Rollout(
        prompts=[""] * 4,
        responses=[""] * 4,
        sequences=sequences,
        scores=f64(*scores),
        ended=torch.tensor([True] * 4 if ended is None else ended),
        logprobs=logprobs,
        ref_logprobs=zeros,
        kl=logprobs - zeros,
        entropy=zeros,
        values=zeros,
    )


CONFIG = {
    "batch_size": 4,
    "minibatch_size": 2,
    "group_size": 2,
    "kl_coef": 0.5,
    "max_new_tokens": 3,
}
# KL by k1: 1 + 2, 4, 0, -2 nats per response.
LOGPROBS = torch.tensor(
    [[1, 2, 9], [4, 9, 9], [0, 0, 0], [-2, 9, 9]], dtype=torch.float64
)  # fmt: skip


def test_judge_by_hand():
    rollout = judged([4, 1, 0, 5], logprobs=LOGPROBS)
    # GRPO with its KL in the loss: means 2.5 and 2.5; deviations 3 / sqrt 2 and 5 / sqrt 2.
    buffer = grpo.judge(rollout, GRPOConfig(**CONFIG, advantage_scale="none"))
    assert_close(buffer.advantages[:, 0], f64(1.5, -1.5, -2.5, 2.5), FP64)
    assert buffer.advantages[0].tolist() == [1.5, 1.5, 0]
    assert buffer.advantages[1].tolist() == [-1.5, 0, 0]
    buffer = grpo.judge(rollout, GRPOConfig(**CONFIG))
    scaled = 1.5 / (3 / 2**0.5 + 1e-4), 2.5 / (5 / 2**0.5 + 1e-4)
    assert_close(buffer.advantages[:, 0], f64(scaled[0], -scaled[0], -scaled[1], scaled[1]), FP64)
    # In the reward it takes 1.5, 2, 0 and -1 off: 2.5, -1, 0, 6.
    for judge in (
        lambda: grpo.judge(rollout, GRPOConfig(**CONFIG, advantage_scale="none", kl_in="reward")),
        lambda: rloo.judge(rollout, RLOOConfig(**CONFIG)),
    ):
        buffer = judge()
        assert_close(buffer.returns[:, 0], f64(2.5, -1, 0, 6), FP64)
        assert_close(buffer.rewards[0], f64(-0.5, 3, 0), FP64)
        assert_close(buffer.returns[0], f64(2.5, 3, 0), FP64)
    assert_close(buffer.advantages[:, 0], f64(3.5, -3.5, -6, 6), FP64)
    assert buffer.advantages[1].tolist() == [-3.5, 0, 0]


@pytest.mark.parametrize("algorithm", [grpo, rloo])
def test_scores_are_clipped_and_then_charged_for_a_missing_eos(algorithm):
    config = {grpo: GRPOConfig, rloo: RLOOConfig}[algorithm]
    rollout = judged([9, 1, 0, -9], ended=[True, False, True, True])
    buffer = algorithm.judge(rollout, config(**CONFIG, score_clip=3, eos_penalty=0.25))
    assert_close(buffer.returns[:, 0], f64(3, 0.75, 0, -3), FP64)


def test_equal_groups_are_counted():
    rollout = judged([1, 1, 1, 2], logprobs=LOGPROBS)
    alike = grpo.judge(rollout, GRPOConfig(**CONFIG))
    assert online.equal_groups(alike, 2) == 0.5
    charged = rloo.judge(rollout, RLOOConfig(**CONFIG))  # 1 - 1.5, 1 - 2: equal no more
    assert online.equal_groups(charged, 2) == 0


@pytest.mark.parametrize(("algorithm", "config"), [(grpo, GRPOConfig), (rloo, RLOOConfig)])
def test_a_policy_with_a_critic_is_refused(algorithm, config):
    with pytest.raises(BadInput, match="takes the place of a critic"):
        algorithm.new_state(small_policy(critic="shared"), PROMPTS, config(**CONFIG))
