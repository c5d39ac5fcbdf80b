"""What the stages tell and write beside what their preflight checks."""

import pytest
from small import PROMPTS, small_policy
from tolerances import FP64

from rlhf_min import ppo
from rlhf_min.harness.stages.ppo import too_far
from rlhf_min.harness.stages.run_stage import copy_policy


def lengths(_prompts, responses):
    return [float(len(response)) for response in responses]


def ppo_run(**options):
    policy = small_policy(critic="shared")
    config = ppo.PPOConfig(steps=4, batch_size=6, minibatch_size=3, max_new_tokens=4, **options)
    state = ppo.new_state(policy, PROMPTS, config)
    buffers = []
    steps = ppo.train(
        policy, small_policy(seed=1), lengths, config, state, on_rollout=buffers.append
    )
    return state, steps, buffers


def test_a_kl_that_is_too_large_shows_its_samples():
    state, steps, buffers = ppo_run(max_kl=0.01, kl="k3")
    (metrics,) = list(steps)
    text, samples = too_far(state, buffers[-1], 0.01)
    rollout = buffers[-1].rollout
    kls = []
    for row, n in enumerate(rollout.lengths.tolist()):
        pairs = zip(rollout.logprobs[row, :n], rollout.ref_logprobs[row, :n], strict=True)
        kls.append(sum(float(ours - theirs) for ours, theirs in pairs))
    largest = sorted(range(6), key=lambda row: -kls[row])[:3]
    assert [x["kl"] for x in samples] == pytest.approx([kls[row] for row in largest], abs=FP64)
    assert [x["prompt"] for x in samples] == [rollout.prompts[row] for row in largest]
    assert [x["response"] for x in samples] == [rollout.responses[row] for row in largest]
    assert [x["score"] for x in samples] == [float(rollout.scores[row]) for row in largest]
    lines = text.splitlines()
    assert lines[0].startswith(
        f"ended after step 1: the KL to the reference is {metrics['k1']:.3f} nats per response, "
        "above --max_kl 0.01"
    )
    assert len(lines) == 4
    assert repr(samples[0]["response"]) in lines[1]


def test_a_run_that_did_not_go_too_far_has_nothing_to_show():
    state, steps, buffers = ppo_run()
    next(steps)
    assert too_far(state, buffers[-1], None) is None


def test_a_copy_to_train_is_as_plain_as_its_original():
    assert not copy_policy(small_policy(), critic="none").plain
    plain = small_policy()
    plain.plain = True
    assert copy_policy(plain, critic="shared").plain
