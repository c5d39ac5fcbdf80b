import math
import random
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small import (
    BIG,
    DEMONSTRATIONS,
    END,
    PREFERENCES,
    PROMPTS,
    RED,
    TWO,
    UNPAIRED,
    WORDS,
    ids,
    largest_difference,
    small_policy,
    small_reward_model,
    weights,
    without_time,
)
from test_cli import example, our_line, pairs, write_rows
from tolerances import EXACT
from torch import nn

from rlhf_min import dpo, grpo, kto, ppo, reward, rloo, sft
from rlhf_min import policy as policy_file
from rlhf_min.config import GRPOConfig, RLOOConfig
from rlhf_min.data import PreferenceExample, PromptExample, SFTExample
from rlhf_min.encoding.cuts import CutReport
from rlhf_min.errors import BadInput
from rlhf_min.harness import preflight
from rlhf_min.harness.preflight import Check, available_bytes, kept_bytes
from rlhf_min.harness.run import folder
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.harness.stages import dpo as dpo_stage
from rlhf_min.harness.stages import grpo as grpo_stage
from rlhf_min.harness.stages import kto as kto_stage
from rlhf_min.harness.stages import ppo as ppo_stage
from rlhf_min.harness.stages import reward as reward_stage
from rlhf_min.harness.stages import rloo as rloo_stage
from rlhf_min.harness.stages import rollouts
from rlhf_min.harness.stages import sft as sft_stage
from rlhf_min.reward_model import RewardModel
from rlhf_min.speed import forward
from rlhf_min.speed.cache import cache_bytes
from rlhf_min.speed.packing import padded

ENDED_PAIRS = [x for x in PREFERENCES if x.rejected_ids[-1] == END]
TEXT_PAIRS = [
    {"prompt": f"{a} {b}", "chosen": f"{a} ball", "rejected": f"two {b} two"}
    for a, b in pairwise(WORDS)
]
PRECISIONS = ["float64", "fp32", "bf16", "fp16"]


def dtype_of(precision):
    return torch.float64 if precision == "float64" else torch.float32


def autocast_of(precision):
    return "fp32" if precision == "float64" else precision


class Stage:
    """Models, configuration and state of a stage, ready for its preflight and its training."""

    ref_policy = reward_model = None

    def __init__(self, name, *, precision="float64", examples=None, dropout=0.0, **options):
        self.dtype, self.dropout = dtype_of(precision), dropout
        getattr(self, name)(examples, precision=autocast_of(precision), **options)

    def check(self):
        models = [self.model, self.ref_policy, self.reward_model]
        modules = [model for model in models if isinstance(model, nn.Module)]
        preflight.run("the stage", self.checks(), self.state.optimizer, *modules)

    def sft(self, examples, **options):
        self.model = small_policy(dtype=self.dtype, dropout=self.dropout)
        config = sft.SFTConfig(batch_size=4, epochs=1, **options)
        self.state = sft.new_state(self.model, examples or DEMONSTRATIONS, config)
        self.checks = lambda: sft_stage.checks(self.model, config, self.state)
        self.train = lambda: sft.train(self.model, config, self.state)

    def dpo(self, examples, **options):
        self.model = small_policy(dtype=self.dtype, dropout=self.dropout)
        self.ref_policy = self.model.reference()
        config = dpo.DPOConfig(batch_size=4, epochs=1, **options)
        examples = examples or ENDED_PAIRS
        self.state = dpo.new_state(self.model, self.ref_policy, examples, config)
        self.checks = lambda: dpo_stage.checks(self.model, self.ref_policy, config, self.state)
        self.train = lambda: dpo.train(self.model, self.ref_policy, config, self.state)

    def kto(self, examples, **options):
        self.model = small_policy(dtype=self.dtype, dropout=self.dropout)
        self.ref_policy = self.model.reference()
        config = kto.KTOConfig(batch_size=4, epochs=1, **options)
        self.state = kto.new_state(self.model, self.ref_policy, examples or UNPAIRED, config)
        self.checks = lambda: kto_stage.checks(self.model, self.ref_policy, config, self.state)
        self.train = lambda: kto.train(self.model, self.ref_policy, config, self.state)

    def reward(self, examples, **options):
        self.model = small_reward_model(dtype=self.dtype, dropout=self.dropout)
        config = reward.RewardConfig(batch_size=4, epochs=1, **options)
        examples = examples or reward.prepare_pairs(self.model, TEXT_PAIRS)[0]
        self.state = reward.new_state(self.model, examples, config)
        self.checks = lambda: reward_stage.checks(self.model, config, self.state)
        self.train = lambda: reward.train(self.model, config, self.state)

    def ppo(self, examples, **options):
        options.setdefault("critic", "shared")
        self.rollouts(ppo, ppo.PPOConfig, ppo_stage, examples, **options)

    def grpo(self, examples, **options):
        self.rollouts(grpo, GRPOConfig, grpo_stage, examples, group_size=2, **options)

    def rloo(self, examples, **options):
        self.rollouts(rloo, RLOOConfig, rloo_stage, examples, group_size=2, **options)

    def rollouts(self, algorithm, make, stage, examples, **options):
        critic = options.get("critic", "none")
        self.model = small_policy(critic=critic, dtype=self.dtype, dropout=self.dropout)
        self.ref_policy = self.model.reference()
        self.reward_model = small_reward_model(dtype=self.dtype)
        sizes = {"steps": 2, "batch_size": 4, "minibatch_size": 2, "max_new_tokens": 4}
        config = make(**sizes, eval_every=9, **options)
        self.state = algorithm.new_state(self.model, examples or PROMPTS, config)
        self.checks = lambda: stage.checks(
            self.model, self.ref_policy, self.reward_model, config, self.state
        )
        self.train = lambda: algorithm.train(
            self.model, self.ref_policy, self.reward_model.score, config, self.state
        )


def refused(stage):
    """What the preflight says, on its one line."""
    with pytest.raises(BadInput) as caught:
        stage.check()
    message = str(caught.value)
    assert "\n" not in message
    assert "--skip_preflight" in message
    return message


LINES = {
    "sft": [
        "rows without a prompt or response token",
        "EOS supervised",
        "memory of cpu",
        "head against the model's own logits",
        "a row alone against it in a batch",
    ],
    "reward": [
        "memory of cpu",
        "scores that are not finite",
        "pairs with the same score on both sides",
        "a score alone against it in a batch",
        "classifier without gradient",
    ],
    "dpo": [
        "rows without a prompt or response token",
        "pairs with chosen equal to rejected",
        "EOS supervised",
        "memory of cpu",
        "two passes in train mode",
        "head against the model's own logits",
        "a row alone against it in a batch",
        "first loss of sigmoid",
    ],
    "kto": [
        "rows without a prompt or response token",
        "EOS supervised",
        "rows of the most frequent prompt",
        "memory of cpu",
        "two passes in train mode",
        "head against the model's own logits",
        "a row alone against it in a batch",
        "first loss of kto",
    ],
    "ppo": [
        "rows without a prompt or response token",
        "EOS outside the vocabulary",
        "memory of cpu",
        "sampled responses that end at once",
        "two passes in train mode",
        "head against the model's own logits",
        "a row alone against it in a batch",
        "KL to the reference, per token",
        "ratio against 1, in train mode",
        "constant reward",
    ],
}
LINES |= {"grpo": LINES["ppo"], "rloo": LINES["ppo"]}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LINES)
def test_a_sound_run_passes_every_check(capsys, monkeypatch, name, precision):
    monkeypatch.setattr(preflight, "product_seconds", lambda *_: 1.0)
    Stage(name, precision=precision).check()
    first, *lines = capsys.readouterr().out.splitlines()
    expected = list(LINES[name])
    if precision in ("bf16", "fp16"):
        expected.insert(expected.index("memory of cpu"), f"{precision} beside fp32")
    n = len(expected)
    assert re.fullmatch(rf"preflight of .*: {n} of {n} checks passed in \d+\.\d s", first)
    assert [line[11:52].strip() for line in lines] == expected
    assert all(line.startswith("  ok  ") for line in lines)
    assert all(any(digit in line[52:] for digit in "0123456789") for line in lines)


@pytest.mark.parametrize("cached", [True, False])
def test_the_first_loss_of_dpo_is_ln_2_with_label_smoothing(capsys, cached):
    Stage("dpo", cache_reference=cached, label_smoothing=0.2).check()
    assert "0.693147, within 1e-09 of 0.693147" in capsys.readouterr().out


FAMILY = {
    "ipo": ({"beta": 2.0}, "0.062500"),  # 1/(4 beta^2)
    "hinge": ({}, "1.000000"),
    "robust": ({"label_smoothing": 0.1}, "0.693147"),
    "apo_zero": ({}, "1.000000"),
    "apo_down": ({}, "1.000000"),
    "simpo": ({"simpo_gamma": 0.0}, "0.693147"),
    "orpo": ({"beta": 1.0}, "0.693147"),
    "cpo": ({}, "0.693147"),
}


@pytest.mark.parametrize("loss", FAMILY)
def test_the_first_loss_of_the_family_is_known(loss):
    options, known = FAMILY[loss]
    check = list(Stage("dpo", loss=loss, **options).checks())[-1]
    assert check.name == f"first loss of {loss}"
    assert check.words == f"{known}, within 1e-09 of {known}"


def test_the_first_loss_of_a_steep_one_may_differ_more():
    """IPO's slope is 1/beta: a thousandth of a nat is a tenth of its loss of 2500."""
    check = list(Stage("dpo", loss="ipo", beta=0.01, precision="fp32").checks())[-1]
    assert check.limit == pytest.approx(0.1, abs=1e-5)
    assert check.passed


def test_the_first_loss_leaves_out_what_sft_adds():
    check = list(Stage("dpo", sft_coef=1.0, length_normalised=True).checks())[-1]
    assert check.words == "0.693147, within 1e-09 of 0.693147"


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("cached", [True, False])
def test_the_first_loss_of_kto_is_half_the_mean_weight(loss, cached):
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.6}
    *_, check = Stage("kto", loss=loss, cache_reference=cached, **weights).checks()
    assert check.name == f"first loss of {loss}"
    assert check.words in (
        "0.750000, within 1e-09 of 0.750000",  # of a desirable row
        "0.300000, within 1e-09 of 0.300000",
    )


@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo"])
def test_two_probabilities_of_one_response(monkeypatch, loss):
    stage, logprobs = Stage("dpo", loss=loss), dpo.response_logprobs

    def shifted(policy, examples):
        chosen, rejected = logprobs(policy, examples)
        return chosen + 1, rejected

    monkeypatch.setattr(dpo, "response_logprobs", shifted)
    assert "one response has two probabilities in one batch" in refused(stage)


def test_the_ratio_is_1_at_any_temperature():
    stage = Stage("ppo", temperature=0.7)
    rows = [(x.prompt_ids, x.response_ids) for x in DEMONSTRATIONS[:3]]
    config = ppo.PPOConfig(temperature=0.7)
    rollout = rollouts.scored(stage.model, stage.ref_policy, rows, config)
    assert rollouts.ratio_is_one(stage.model, rollout, config, 1e-9).passed


def test_a_separate_critic_passes(capsys):
    Stage("ppo", critic="separate").check()
    assert "10 of 10" in capsys.readouterr().out


# Each line fails for its own fault


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo", "dpo", "kto"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_dropout_left_on(name, precision):
    stage = Stage(name, precision=precision, dropout=0.1)
    for module in stage.model.modules():  # as if new_state had not switched it off
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    assert "two passes in train mode" in refused(stage)


def test_dropout_in_a_separate_critic_alone():
    stage = Stage("ppo", critic="separate")
    nn.init.normal_(stage.model.value_head.weight)
    stage.model.critic_trunk.drop.p = 0.1
    assert "dropout, or other noise, is on" in refused(stage)


def perturb(policy):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_reference_of_other_weights_in_ppo(precision, temperature):
    stage = Stage("ppo", precision=precision, temperature=temperature)
    perturb(stage.ref_policy)
    found = refused(stage)
    assert "KL to the reference" in found
    assert "policy and reference differ before training" in found


@pytest.mark.parametrize("cached", [True, False])
def test_a_reference_of_other_weights_in_dpo(cached):
    stage = Stage("dpo", cache_reference=cached, beta=1.0)
    perturb(stage.model if cached else stage.ref_policy)
    found = refused(stage)
    assert "first loss of sigmoid" in found
    assert "policy and reference differ before training" in found


@pytest.mark.parametrize("cached", [True, False])
def test_a_reference_of_other_weights_in_kto(cached):
    stage = Stage("kto", cache_reference=cached, beta=1.0)
    perturb(stage.model if cached else stage.ref_policy)
    found = refused(stage)
    assert "first loss of kto" in found
    assert "policy and reference differ before training" in found


def test_a_wrong_cache_of_long_rows_in_kto(monkeypatch):
    monkeypatch.setattr(kto_stage, "ROW_TOKENS", 1)  # every row is a long one
    stage = Stage("kto", beta=1.0)
    cursor = stage.state.cursor
    cursor.examples = [replace(x, ref_logprob=x.ref_logprob + 5) for x in cursor.examples]
    assert "first loss of kto" in refused(stage)


def test_a_prompt_that_most_rows_have_is_warned_of_in_kto(capsys):
    few = [replace(x, prompt_ids=UNPAIRED[0].prompt_ids) for x in UNPAIRED[:5]] + UNPAIRED[5:]
    Stage("kto", examples=few).check()
    told = capsys.readouterr().out
    assert "warning  rows of the most frequent prompt          62.5% of 8, at most 50%" in told
    assert "KTO's KL takes responses to other prompts, and there are few; give rows with" in told
    assert all(
        "most frequent" not in check.name
        for check in Stage("kto", examples=few, loss="apo_zero_unpaired").checks()
    )


def test_a_wrong_cache_of_long_pairs_in_dpo(monkeypatch):
    monkeypatch.setattr(dpo_stage, "PAIR_TOKENS", 1)  # every pair is a long one
    stage = Stage("dpo", cache_reference=True, beta=1.0)
    cursor = stage.state.cursor
    cursor.examples = [
        replace(x, ref_logprobs=(x.ref_logprobs[0] + 5, x.ref_logprobs[1] - 5))
        for x in cursor.examples
    ]
    assert "first loss of sigmoid" in refused(stage)


def test_values_that_are_not_numbers():
    stage = Stage("ppo")
    nn.init.constant_(stage.model.value_head.bias, float("nan"))
    assert "two passes in train mode" in refused(stage)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "ppo"])
def test_positions_counted_from_padding_on_the_left(monkeypatch, name):
    def padded_positions(_lm, batch):
        layout = padded(batch)
        padding = (1 - batch.attention_mask).sum(1, keepdim=True)
        positions = torch.arange(batch.ids.shape[1]) + padding
        layout.inputs["position_ids"] = positions.clamp(max=15)
        return layout

    stage = Stage(name)
    monkeypatch.setattr(forward, "layout_of", padded_positions)
    assert "a row alone against it in a batch" in refused(stage)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "ppo"])
def test_a_head_of_another_scale(monkeypatch, name):
    stage = Stage(name)
    right = policy_file.Policy.head.fget
    wrong = property(lambda policy: right(policy) | {"scale": 1.1})
    monkeypatch.setattr(policy_file.Policy, "head", wrong)
    assert "head against the model's own logits" in refused(stage)


def test_a_model_that_knows_the_mode():
    """A layer that computes something else in train mode, the same each time."""
    stage = Stage("ppo")
    stage.model.lm.transformer.ln_f.register_forward_hook(
        lambda module, _, output: output * (1.1 if module.training else 1.0)
    )
    found = refused(stage)
    assert "ratio against 1, in train mode" in found
    assert "something else in train mode than in eval mode" in found


def without_end(x):
    return x[:-1] if x[-1] == END and len(x) > 1 else ids(RED)


def test_eos_that_no_row_has():
    rows = [replace(x, response_ids=without_end(x.response_ids)) for x in DEMONSTRATIONS]
    found = refused(Stage("sft", examples=rows))
    assert "EOS supervised: in 0.0% of 8 rows; no row teaches where a response ends" in found
    assert "<end>" in found
    pairs = [
        replace(x, chosen_ids=ids(BIG, RED), rejected_ids=without_end(x.rejected_ids))
        for x in PREFERENCES
    ]
    assert "in 0.0% of 16 rows" in refused(Stage("dpo", examples=pairs))


def test_eos_that_some_rows_lack_is_a_warning(capsys):
    rows = [SFTExample(ids(RED), ids(BIG, TWO)), *DEMONSTRATIONS[:3]]
    Stage("sft", examples=rows).check()
    found = capsys.readouterr().out
    assert "4 of 5 checks passed" in found
    assert re.search(r"warning  EOS supervised +in 75\.0% of 4 rows", found)
    assert "not every row teaches where a response ends; end each response" in found


def test_eos_is_looked_for_on_both_sides_of_many_pairs():
    ended, cut = (ids(RED), ids(TWO, END)), (ids(RED), ids(TWO, BIG))
    rows = [ended, cut] * preflight.LOOKED_AT  # of every second one, all have ended
    check = preflight.eos_supervised(rows, small_policy())
    assert check.value == pytest.approx(0.5, abs=0.01)
    assert check.warning


def test_eos_that_the_mask_leaves_out(monkeypatch):
    """As masks do that are made from token ids where EOS serves as padding."""

    def by_ids(*args, **kwargs):
        batch = right(*args, **kwargs)
        return replace(batch, mask=batch.mask & (batch.responses != END))

    right = preflight.collate
    stage = Stage("sft")
    monkeypatch.setattr(preflight, "collate", by_ids)
    assert "EOS supervised: in 0.0%" in refused(stage)


def test_rows_without_a_token():
    def stage(name, examples, **options):  # new examples in a state that was made for others
        stage = Stage(name, **options)
        stage.state.cursor.examples = examples
        return stage

    rows = [*DEMONSTRATIONS[:2], SFTExample(ids(RED), torch.zeros(0, dtype=torch.long))]
    found = refused(stage("sft", rows))
    assert "rows without a prompt or response token: 1" in found
    assert "row 2 " in found
    pair = PreferenceExample(ids(RED), ids(END), torch.zeros(0, dtype=torch.long))
    assert "row 1 " in refused(stage("dpo", [ENDED_PAIRS[0], pair], cache_reference=False))
    prompts = [*PROMPTS, PromptExample("", torch.zeros(0, dtype=torch.long))]
    assert "row 8 " in refused(stage("ppo", prompts))


def test_pairs_that_are_equal():
    equal = PreferenceExample(ids(RED), ids(BIG, END), ids(BIG, END))
    found = refused(Stage("dpo", examples=[*ENDED_PAIRS, equal]))
    assert "pairs with chosen equal to rejected: 1" in found
    assert f"pair {len(ENDED_PAIRS)} " in found


def test_eos_outside_the_vocabulary():
    stage = Stage("ppo")
    stage.model.tokenizer.add_special_tokens({"eos_token": "<never>"})
    assert "EOS is id 10 of 10" in refused(stage)


def test_a_policy_that_ends_at_once():
    stage = Stage("ppo")
    stage.model.lm.transformer.ln_f.register_forward_hook(
        lambda _module, _args, output: stage.model.lm.lm_head.weight[END].expand_as(output) * 50
    )
    assert "sampled responses that end at once: 3 of 3" in refused(stage)


def test_a_constant_reward_is_a_warning(capsys):
    stage = Stage("ppo")
    stage.reward_model = lambda _prompts, responses: [0.25] * len(responses)
    stage.check()
    found = capsys.readouterr().out
    assert "9 of 10 checks passed" in found
    assert "warning  constant reward" in found
    assert "3 different responses all score 0.25; if that stays so" in found


@pytest.mark.parametrize(
    ("scores", "says"),
    [([math.nan] * 3, "gave nan for the prompt"), ([1.0], "returned 1 scores for 3 responses")],
)
def test_a_reward_that_gives_no_numbers(capsys, scores, says):
    stage = Stage("ppo")
    stage.reward_model = lambda _prompts, _responses: scores
    with pytest.raises(BadInput, match=says):
        stage.check()
    assert "9 of 9 checks passed" in capsys.readouterr().out


def test_a_reward_that_names_a_column():
    seen = []

    def by_column(_prompts, responses, level):
        seen.append(level)
        return [float(len(r)) for r in responses]

    stage = Stage("ppo", examples=[replace(x, columns={"level": 3}) for x in PROMPTS])
    stage.reward_model = by_column
    stage.check()
    assert seen == [[3, 3, 3]]


def test_scores_that_do_not_depend_on_the_response():
    stage = Stage("reward")
    stage.model.model.classifier.register_forward_hook(lambda _m, _a, x: x * 0 + 0.5)
    found = refused(stage)
    assert "pairs with the same score on both sides: 3 of 3, largest margin 0" in found


def test_scores_that_are_not_finite():
    stage = Stage("reward")
    nn.init.constant_(stage.model.model.classifier.weight, math.inf)
    assert "scores that are not finite: 6" in refused(stage)


def test_a_score_that_depends_on_padding():
    stage = Stage("reward")

    def without_attention_mask(_module, args, kwargs):
        kwargs.pop("attention_mask")
        return args, kwargs

    stage.model.model.bert.register_forward_pre_hook(without_attention_mask, with_kwargs=True)
    assert "a score alone against it in a batch" in refused(stage)


@pytest.mark.parametrize("fault", ["frozen", "cut off"])
def test_a_classifier_that_cannot_learn(fault):
    stage = Stage("reward")
    classifier = stage.model.model.classifier
    if fault == "frozen":
        classifier.requires_grad_(False)
    else:
        classifier.register_forward_hook(lambda _m, _a, x: 2 * x.detach() - 0 * x - x.detach())
    assert "classifier without gradient: gradient of length 0" in refused(stage)


# Memory


@pytest.mark.parametrize("name", LINES)
def test_too_little_memory(monkeypatch, name):
    stage = Stage(name)
    monkeypatch.setattr(preflight, "available_bytes", lambda _device: 1000.0)
    found = refused(stage)
    assert re.search(r"memory of cpu: needs about \d+\.\d\d of \d+\.\d\d GB: weights", found)
    assert "most goes to" in found


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"max_new_tokens": 5000}, "lower --batch_size or --max_new_tokens"),
        ({"max_new_tokens": 1, "max_tokens": 10**6}, "lower --max_tokens"),
    ],
)
def test_the_cure_names_the_options_of_the_largest_part(monkeypatch, options, cure):
    policy, prompt = small_policy(critic="shared"), ids(*[RED] * 4)
    config = ppo.PPOConfig(batch_size=2**20, minibatch_size=2**19, **options)
    short = replace(config, max_new_tokens=1)  # the model has 16 positions
    state = ppo.new_state(policy, [PromptExample("red", prompt)], short)
    state.cursor.examples *= 2
    monkeypatch.setattr(preflight, "available_bytes", lambda _device: 1000.0)
    checks = ppo_stage.checks(policy, policy.reference(), len, config, state)
    with pytest.raises(BadInput) as caught:
        preflight.run("PPO", checks, state.optimizer, policy)
    assert cure in str(caught.value)


def test_memory_is_the_sum_of_its_parts(monkeypatch):
    monkeypatch.setattr(preflight, "GB", 1)  # the line then counts bytes
    monkeypatch.setattr(preflight, "available_bytes", lambda _device: 10_000_000.0)
    stage = Stage("dpo", max_tokens=100)
    trained = sum(p.numel() * 8 for p in stage.model.parameters())
    (check,) = preflight.memory(
        stage.model, [stage.ref_policy], stage.state.optimizer, {"activations": 5000.0}, 0
    )
    total, room = 5 * trained + 5000, 10_000_000 + 2 * trained
    assert check.value == total / room
    assert check.words == (
        f"needs about {total}.00 of {room}.00 GB: weights {2 * trained}.00, Adam {2 * trained}.00, "
        f"gradients {trained}.00, activations 5000.00"
    )
    (check,) = preflight.memory(  # a cache that is larger than all that comes after it
        stage.model, [], stage.state.optimizer, {"activations": 5000.0}, 10**6
    )
    assert check.value == (3 * trained + 10**6) / (10_000_000 + trained)


def test_what_autograd_keeps_is_counted_by_hand():
    layer = nn.Linear(3, 5, dtype=torch.float64)
    # Of each token the layer keeps its input, and the square the layer's output.
    found = kept_bytes(layer, lambda n: layer(torch.ones(n * 7, 3).double()).square(), 7)
    assert found == (0, (3 + 5) * 8)


def test_a_cast_of_the_weights_does_not_grow_with_the_tokens():
    layer = nn.Linear(300, 500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fixed, per_token = kept_bytes(
            layer, lambda n: layer(torch.ones(n * 7, 300, requires_grad=True)), 7
        )
    assert fixed == 300 * 500 * 2
    assert per_token == 300 * 2  # the input in half precision


def test_the_cache_has_the_size_of_a_real_one():
    policy = small_policy()
    cache = policy.lm(torch.tensor([[RED, BIG, TWO]]), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(policy.lm) * 3 == held


def test_each_device_has_its_own_line(monkeypatch):
    stage = Stage("dpo")
    stage.ref_policy.to("meta")
    rooms = {"cpu": 10_000.0, "meta": 20_000.0}
    monkeypatch.setattr(preflight, "available_bytes", lambda device: rooms[device.type])
    found = list(preflight.memory(stage.model, [stage.ref_policy], stage.state.optimizer, {}, 0))
    here, there = (
        sum(p.numel() * 8 for p in model.parameters()) for model in (stage.model, stage.ref_policy)
    )
    assert [check.name for check in found] == ["memory of cpu", "memory of meta"]
    assert found[0].value == 4 * here / (10_000 + here)  # with gradients and Adam's two
    assert found[1].value == there / (20_000 + there)


def test_what_torch_holds_and_does_not_use_is_free_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 20)
    assert available_bytes(torch.device("cuda:1")) == 130


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_available_memory_is_some_of_what_there_is():
    total = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text("utf-8"))[1])
    assert 2**20 < available_bytes(torch.device("cpu")) < total * 1024


# What a run is without it


@pytest.mark.parametrize("name", LINES)
def test_the_run_has_the_bits_of_one_without_preflight(name):
    found = []
    for checked in (True, False):
        stage = Stage(name, dropout=0.2 if name in ("sft", "reward") else 0.0)
        torch.manual_seed(5)
        if checked:
            before = weights(stage.model)
            stage.check()
            assert largest_difference(stage.model, before) == EXACT
        drawn = torch.rand(3).tolist()  # of the global generator
        metrics = [without_time(m) for m in stage.train()]
        found.append((drawn, metrics, stage.state.state_dict(), weights(stage.model)))
    (drawn, metrics, state, trained), (*others, others_trained) = found
    assert [drawn, metrics] == others[:2]
    assert len(metrics) == 2
    assert all(torch.equal(trained[k], others_trained[k]) for k in trained)
    state.pop("optimizer"), others[2].pop("optimizer")
    assert str(state) == str(others[2])


@pytest.mark.parametrize("name", LINES)
def test_modes_gradients_counts_and_generators_stay(name):
    stage = Stage(name)
    everything = [stage.model, *(vars(stage).get(k) for k in ("ref_policy", "reward_model"))]
    modules = [m for model in everything if model is not None for m in model.modules()]
    for number, module in enumerate(modules):
        module.training = number % 2 == 0
    before = str(stage.state.state_dict())
    stage.check()
    assert [m.training for m in modules] == [i % 2 == 0 for i in range(len(modules))]
    assert all(p.grad is None for m in modules for p in m.parameters())
    assert str(stage.state.state_dict()) == before
    for model in everything:
        if isinstance(model, RewardModel):
            assert model.cuts == CutReport()
            assert model.cuts.prompt_lengths == model.cuts.response_lengths == []


def test_what_a_reward_function_draws_is_put_back():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with preflight.untouched():
        first = draw()
    assert draw() == first
    assert draw() != first


def test_few_short_rows_are_enough(monkeypatch):
    """Long rows are cut and many rows left out, so that large models take seconds. Of long pairs,
    which a cached reference knows as a whole only, a single one is taken."""
    seen = []
    forward = policy_file.Policy.forward

    def noting(self, batch, **kwargs):
        seen.append(batch.ids.shape)
        return forward(self, batch, **kwargs)

    monkeypatch.setattr(policy_file.Policy, "forward", noting)
    for name, limit in (("PROMPT_TOKENS", 4), ("RESPONSE_TOKENS", 3)):
        monkeypatch.setattr(preflight, name, limit)
    monkeypatch.setattr(dpo_stage, "PAIR_TOKENS", 8)
    long = ids(*[RED, BIG, TWO] * 2, END)
    stages = [
        Stage("sft", examples=[SFTExample(long, long)] * 50),
        Stage("dpo", examples=[PreferenceExample(long, long, long[1:])] * 50),
        Stage("ppo", examples=[PromptExample("red", torch.cat([long, long[:5]]))] * 50),
    ]
    seen.clear()  # caching DPO's reference took whole rows
    for stage in stages:
        stage.check()
    assert len(seen) > 10
    assert max(rows for rows, _ in seen) <= 4
    whole = [shape for shape in seen if shape[1] > 4 + 4]
    assert whole == [(2, 2 * len(long))]  # chosen and rejected of one pair


# How it is told


@pytest.mark.parametrize(
    ("value", "passed"), [(0.5, True), (0.51, False), (math.nan, False), (math.inf, False)]
)
def test_a_check_passes_up_to_its_limit(value, passed):
    check = Check("length", value, 0.5, "it is long", "cut it")
    assert check.passed == passed
    assert str(check).split()[0] == ("ok" if passed else "FAILED")


def test_half_precision_that_is_slower_is_a_warning(capsys, monkeypatch):
    seconds = {torch.float32: 0.25, torch.bfloat16: 1.5}
    monkeypatch.setattr(preflight, "product_seconds", lambda dtype, _: seconds[dtype])
    Stage("sft", precision="bf16").check()
    lines = capsys.readouterr().out.splitlines()
    (at,) = (i for i, line in enumerate(lines) if "bf16 beside fp32" in line)
    assert lines[at].startswith("  warning ")
    assert lines[at].endswith("a matrix product takes 6.0 times as long")
    assert lines[at + 1].strip() == (
        "this processor has no instructions for it; --precision fp32 is faster here"
    )
    seconds[torch.bfloat16] = 0.1
    Stage("sft", precision="bf16").check()
    assert "warning" not in capsys.readouterr().out


def test_a_failed_check_ends_the_run_before_the_next(capsys):
    optimizer = Stage("sft").state.optimizer
    reached = []

    def checks():
        yield Check("length", 1, 2, "", "")
        yield Check("width", 3, 2, "it is wide", "cut it")
        reached.append("height")

    with pytest.raises(BadInput) as caught:
        preflight.run("trees", checks(), optimizer)
    assert str(caught.value) == (
        "preflight of trees: width: 3, at most 2; it is wide; cut it "
        "(--skip_preflight starts all the same)"
    )
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("preflight of trees: 1 of 2 checks passed in 0.0 s")
    assert [line.split()[:2] for line in lines] == [["ok", "length"], ["FAILED", "width"]]
    assert reached == []


SAMPLING = ["train_ppo", "train_grpo", "train_rloo"]


@pytest.mark.parametrize(
    "name", ["train_sft", "train_reward_model", *SAMPLING, "train_dpo", "train_kto"]
)
def test_the_commands_stop_with_nothing_written_or_skip_it(monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder, "_held", {})  # no run is this process's own afterwards
    save_policy(small_policy(dtype=torch.float32), tmp_path / "sft")
    save_reward_model(small_reward_model(dtype=torch.float32), tmp_path / "reward_model")
    write_rows(tmp_path / "pairs.jsonl", pairs(12))
    options = "--data pairs.jsonl --model sft --max_length 16 --max_response_tokens 8 "
    options += "--batch_size 4 "
    if name == "train_reward_model" or name in SAMPLING:
        options += "--reward_model reward_model "
    if name in ("train_grpo", "train_rloo"):
        options += "--group_size 2 "
    sampled = "--steps 1 --minibatch_size 4 --max_new_tokens 4"
    options += sampled if name in SAMPLING else "--epochs 1"
    monkeypatch.setattr(sys, "argv", [name, *options.split()])
    monkeypatch.setattr(preflight, "available_bytes", lambda _device: 1.0)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        example(name).main()
    found = capsys.readouterr()
    assert stopped.value.code == 2
    assert our_line(found.err).startswith("preflight of ")
    assert "FAILED   memory of cpu" in found.out
    assert sorted(tmp_path.iterdir()) == before

    sys.argv.append("--skip_preflight")
    example(name).main()
    assert "preflight" not in capsys.readouterr().out
    assert (tmp_path / "runs").is_dir()
