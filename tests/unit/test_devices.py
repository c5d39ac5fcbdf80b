"""Policy, reference and reward model on different devices, pretended on the CPU: no operation may
mix them, and the numbers stay what they are on one device."""

import pytest
import torch
from devices import PretendedDevices
from small import (
    DEMONSTRATIONS,
    PREFERENCES,
    PROMPTS,
    UNPAIRED,
    WORDS,
    Metrics,
    small_policy,
    small_reward_model,
    without_time,
)
from tolerances import EXACT
from torch.utils._pytree import tree_leaves

from rlhf_min import dpo, grpo, kto, ppo, reward, rloo, sft
from rlhf_min.config import GRPOConfig, RLOOConfig
from rlhf_min.errors import BadInput
from rlhf_min.evaluation import evaluate_policies
from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.models import start_policy, start_reward_model
from rlhf_min.rollout import score_rollout
from rlhf_min.sampling import _inverse_cdf, below_one, sample, widest_float

PLACES = pytest.mark.parametrize(
    ("policy_on", "others_on"),
    [("cpu:1", "cpu:2"), ("cpu:1", "cpu"), ("cpu", "cpu:2"), ("mps:0", "mps:0"), ("mps:0", "cpu")],
)
PAIRS = [
    {"prompt": "red ball", "chosen": "one big", "rejected": "two"},
    {"prompt": "big", "chosen": "small ball", "rejected": "green one two"},
    {"prompt": "blue ball two", "chosen": "one", "rejected": "two red"},
]


def models(policy_on, others_on, *, critic="none"):
    policy = small_policy(critic=critic, dtype=torch.float32)
    ref_policy = small_policy(seed=3, dtype=torch.float32).reference()
    reward_model = small_reward_model(dtype=torch.float32)
    return policy.to(policy_on), ref_policy.to(others_on), reward_model.to(others_on)


def run_sampling(*places):
    policy, _, _ = models(*places)
    prompt_ids = [prompt.ids for prompt in PROMPTS]
    rng = torch.Generator().manual_seed(0)
    rows = sample(policy, prompt_ids, max_new_tokens=6, temperature=0.8, rng=rng)
    return [row.tolist() for row in rows]


def run_rollout(*places, kl):
    policy, ref_policy, reward_model = models(*places, critic="shared")
    texts = [prompt.text for prompt in PROMPTS]
    rollout = score_rollout(
        policy,
        ref_policy,
        [x.prompt_ids for x in DEMONSTRATIONS],
        [x.response_ids for x in DEMONSTRATIONS],
        reward_model.score(texts, texts),
        temperature=0.8,
        kl=kl,
        max_tokens=20,
    )
    found = (rollout.scores, rollout.ended, rollout.logprobs, rollout.ref_logprobs)
    found += (rollout.kl, rollout.entropy, rollout.values, rollout.mask)
    assert {x.device for x in found} == {policy.device}
    return [x.tolist() for x in found]


def run_ppo(*places):
    policy, ref_policy, reward_model = models(*places, critic="separate")
    config = ppo.PPOConfig(
        steps=2,
        batch_size=4,
        minibatch_size=2,
        max_new_tokens=5,
        eval_every=1,
        normalise_scores=True,
        whiten_rewards=True,
        score_clip=2.0,
        eos_penalty=1.0,
        learning_rate=1e-3,
    )
    state = ppo.new_state(policy, PROMPTS, config)
    monitors = {"reward": reward_model.score}
    steps = ppo.train(
        policy,
        ref_policy,
        reward_model.score,
        config,
        state,
        monitors=monitors,
        eval_prompts=PROMPTS[:3],
    )
    return told(steps)


def run_groups(*places, algorithm):
    policy, ref_policy, reward_model = models(*places)
    config = {
        "grpo": GRPOConfig(**GROUPS),
        "dapo": GRPOConfig(**GROUPS, loss_mean="token", advantage_scale="batch", mask_cut=True),
        "gspo": GRPOConfig(**GROUPS, ratio_level="sequence", kl_in="reward", kl="full"),
        "rloo": RLOOConfig(**GROUPS),
    }[algorithm]
    module = rloo if algorithm == "rloo" else grpo
    state = module.new_state(policy, PROMPTS, config)
    score, fixed = reward_model.score, PROMPTS[:3]
    return told(module.train(policy, ref_policy, score, config, state, eval_prompts=fixed))


GROUPS = {
    **{"steps": 2, "batch_size": 4, "group_size": 2, "minibatch_size": 2, "max_new_tokens": 5},
    **{"eval_every": 1, "score_clip": 2.0, "eos_penalty": 1.0, "learning_rate": 1e-3},
}


def run_dpo(*places, cache):
    policy, ref_policy, _ = models(*places)
    config = dpo.DPOConfig(batch_size=4, cache_reference=cache, eval_every=1, learning_rate=1e-3)
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    return told(dpo.train(policy, ref_policy, config, state, heldout=PREFERENCES[:3]))


def run_kto(*places, cache):
    policy, ref_policy, _ = models(*places)
    config = kto.KTOConfig(batch_size=4, cache_reference=cache, eval_every=1, learning_rate=1e-3)
    state = kto.new_state(policy, ref_policy, UNPAIRED, config)
    return told(kto.train(policy, ref_policy, config, state, heldout=UNPAIRED[:3]))


def run_sft(*places):
    policy, _, _ = models(*places)
    config = sft.SFTConfig(epochs=1, batch_size=4, eval_every=1, learning_rate=1e-3)
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    return told(sft.train(policy, config, state, heldout=DEMONSTRATIONS[:3]))


def run_reward(*places):
    _, _, reward_model = models(*places)
    config = reward.RewardConfig(epochs=2, batch_size=2, eval_every=1, learning_rate=1e-3)
    examples, _ = reward.prepare_pairs(reward_model, PAIRS)
    state = reward.new_state(reward_model, examples, config)
    metrics = told(reward.train(reward_model, config, state, heldout=examples))
    moments = reward.normalise(reward_model, WORDS, WORDS[::-1])
    chosen, rejected = reward.pair_scores(reward_model, PAIRS)
    return metrics, moments, chosen.tolist(), rejected.tolist()


def run_evaluation(*places):
    policy, ref_policy, reward_model = models(*places)
    trained = small_policy(seed=5, dtype=torch.float32).to(places[0])
    evaluations = evaluate_policies(
        {"start": policy, "trained": trained},
        ref_policy,
        reward_model.score,
        PROMPTS,
        [[prompt.text] for prompt in PROMPTS],
        baseline="start",
        monitors={"again": reward_model.score},
        max_new_tokens=5,
        max_tokens=100,
        seed=0,
    )
    return {name: (x.responses, x.scores, str(x.estimates)) for name, x in evaluations.items()}


def told(steps) -> list[Metrics]:
    metrics = [without_time(m) for m in steps]
    assert len(metrics) >= 2
    return metrics


@PLACES
@pytest.mark.parametrize(
    ("run", "options"),
    [
        (run_sampling, {}),
        (run_rollout, {"kl": "k1"}),
        (run_rollout, {"kl": "full"}),
        (run_ppo, {}),
        (run_groups, {"algorithm": "grpo"}),
        (run_groups, {"algorithm": "dapo"}),
        (run_groups, {"algorithm": "gspo"}),
        (run_groups, {"algorithm": "rloo"}),
        (run_dpo, {"cache": True}),
        (run_dpo, {"cache": False}),
        (run_kto, {"cache": True}),
        (run_kto, {"cache": False}),
        (run_sft, {}),
        (run_reward, {}),
        (run_evaluation, {}),
    ],
    ids=lambda x: getattr(x, "__name__", None) or "-".join(map(str, x.values())),
)
def test_devices_are_never_mixed_and_change_no_number(run, options, policy_on, others_on):
    with PretendedDevices():
        found = run(policy_on, others_on, **options)
    # Apple's GPUs have no fused AdamW, which rounds in another order.
    tolerance = 1e-4 if "mps" in policy_on else EXACT
    expected = run("cpu", "cpu", **options)
    for now, then in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert now == then or now == pytest.approx(then, rel=tolerance, abs=tolerance)


def test_the_dtype_of_a_draw_is_the_widest_that_the_device_has():
    assert widest_float(torch.device("mps:0")) == torch.float32
    assert {widest_float(torch.device(name)) for name in ("cpu", "cuda:1")} == {torch.float64}


def test_a_uniform_number_that_rounds_to_1_still_draws_a_possible_token():
    largest = torch.full((1, 1), 1 - 2.0**-53, dtype=torch.float64)
    assert largest.float() == 1
    for place, dtype in (("mps:0", torch.float32), ("cpu", torch.float64)):
        with PretendedDevices():
            uniforms = below_one(largest, torch.device(place))
        assert uniforms.dtype == dtype
        logits = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=dtype)
        assert _inverse_cdf(logits, uniforms[:, 0]).tolist() == [1]


MIXING = {
    "add": lambda here, there: here + there,
    "with the host": lambda here, _there: here * torch.ones(2),
    "cat": lambda here, there: torch.cat([here, there]),
    "index": lambda here, _there: here[torch.tensor([0])],
    "assign": lambda here, there: here.index_put_((torch.tensor([0]),), there[:1]),
    "layer": lambda here, _there: torch.nn.Linear(2, 2).to("cuda:1")(here),
    "numpy": lambda here, _there: here.numpy(),
    "float64": lambda _here, _there: torch.ones(2, device="mps").double(),
}


@pytest.mark.parametrize("case", list(MIXING))
def test_pretended_devices_refuse_to_mix(case):
    with PretendedDevices():
        here, there = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        with pytest.raises(AssertionError, match=r"mixes| on "):
            MIXING[case](here, there)


def test_pretended_devices_let_move():
    with PretendedDevices():
        x = torch.ones(2, device="cuda:0")
        assert [str(y.device) for y in (x, x + x, x[:1], x.clone(), torch.zeros_like(x))] == [
            "cuda:0"
        ] * 5
        assert str(x.to("cuda:1").device) == "cuda:1"
        assert str(x.cpu().device) == "cpu"
        assert str(x.device) == "cuda:0"
        layer = torch.nn.Linear(2, 2).to("cuda:1")
        layer(x.to("cuda:1")).sum().backward()
        assert {str(p.grad.device) for p in layer.parameters()} == {"cuda:1"}
    assert str(x.device) == "cpu"


# The command line


def options(**given):
    return RunOptions(max_length=16, max_response_tokens=8, **given)


@pytest.mark.parametrize(
    ("given", "policy_on", "others_on"),
    [
        ({}, "cpu", "cpu"),
        ({"device": "cuda:1"}, "cuda:1", "cuda:1"),
        ({"policy_device": "cuda:1"}, "cpu", "cpu"),
        ({"device": "cpu", "reward_device": "cuda:1"}, "cpu", "cuda:1"),
        ({"device": "mps", "policy_device": "cpu"}, "cpu", "mps"),
        ({"policy_device": "cuda:0", "reward_device": "cuda:1"}, "cuda:0", "cuda:1"),
    ],
)
def test_policy_and_reward_model_go_where_they_are_told(given, policy_on, others_on, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(given))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * bool(given))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in given.values())
    if given == {"policy_device": "cuda:1"}:
        policy_on, others_on = "cuda:1", "cuda"  # auto is cuda where there is one
    with PretendedDevices():
        chosen = options(**given)
        policy = start_policy(chosen, WORDS, critic="shared", seed=0)
        reward_model = start_reward_model(chosen, WORDS, seed=0)
        assert {str(p.device) for p in policy.parameters()} == {policy_on}
        assert {str(p.device) for p in reward_model.parameters()} == {others_on}
        assert str(policy.reference(reward_model.device).device) == others_on
        assert str(policy.reference().device) == policy_on


@pytest.mark.parametrize("option", ["device", "policy_device", "reward_device"])
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1", "mps", "warp", "cpu:3", ""])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(option, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    chosen = options(**{option: name})
    with pytest.raises(BadInput) as raised:
        [chosen.torch_device(role) for role in ("policy_device", "reward_device")]
    assert str(raised.value) == f"--{option} {name} cannot be used here; there are: cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    chosen = options(**{option: "warp"})
    with pytest.raises(BadInput, match=r"there are: cpu, cuda:0, cuda:1, mps$"):
        [chosen.torch_device(role) for role in ("policy_device", "reward_device")]
