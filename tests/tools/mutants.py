"""Tests of the tests: break the studied source one line at a time and see each break caught.

    python tests/tools/mutants.py

Each mutant below is what a reader would fear: a wrong sign, a missing mask, a shift by one. It is
applied to a module's text in memory, in a process of its own, where the one named test must fail.
Prints a table; exits with 1 if a mutant survives, or if an equation or a mask has no mutant.
"""

import ast
import gc
import importlib
import importlib.util
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import NamedTuple

import find_helpers  # noqa: F401
import pytest
import torch
from test_house import (
    EQUATION_FLOORS,
    FLOORS,
    NUMBER,
    PACKAGE,
    ROOT,
    TAG,
    comments,
    definitions,
    tree,
)

TESTS = ROOT / "tests"
EQUATIONS = [name for floor in FLOORS[:EQUATION_FLOORS] for name in floor] + ["ppo"]
MASKS = [*EQUATIONS, "data", "policy", "reward_model", "sampling", "rollout", "sft", "dpo"]
WORKERS, SECONDS = 2, 120  # at once; the most that one of them may take


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


class Mutant(NamedTuple):
    """What is feared, the function it happens in, what stands there once, what stands there
    instead, and the test that must not pass then."""

    fear: str
    where: str  # "kl.AdaptiveKL" is in rlhf_min/kl.py, "harness/stages/ppo.too_far" in the harness
    old: str
    new: str
    test: str  # of tests/

    @property
    def path(self) -> Path:
        return PACKAGE / f"{self.where.partition('.')[0]}.py"

    def source(self) -> str:
        """The module's text with the mutation.

        Raises:
            ValueError: if the old text does not stand exactly once in the code of the function.
        """
        lines = text(self.path).splitlines(keepends=True)
        first, last = code_lines(self.path, self.where.partition(".")[2])
        before, code, after = (
            "".join(part) for part in (lines[: first - 1], lines[first - 1 : last], lines[last:])
        )
        if code.count(self.old) != 1:
            raise ValueError(f"{self.old!r} stands there {code.count(self.old)} times, not once")
        if self.new == self.old:
            raise ValueError(f"{self.old!r} stays as it is")
        return before + code.replace(self.old, self.new) + after

    @property
    def line(self) -> int:
        """The number of the first line that is changed."""
        pairs = zip(text(self.path).splitlines(), self.source().splitlines(), strict=False)
        return next(i for i, (was, now) in enumerate(pairs, start=1) if was != now)


# fmt: off
MUTANTS = [
    # masking
    Mutant("padding begins one late", "masking.response_mask",
           "< lengths[:, None]", "<= lengths[:, None]",
           "unit/test_masking.py::test_response_mask_closed"),
    Mutant("the last token is left out", "masking.response_mask",
           "< lengths[:, None]", "< lengths[:, None] - 1",
           "unit/test_masking.py::test_response_mask_closed"),
    Mutant("a mean of no token is NaN", "masking.masked_mean",
           "at_least=1", "at_least=0",
           "unit/test_masking.py::test_masking_errors_too_few"),
    Mutant("mean over rows instead of tokens", "masking.masked_mean",
           "torch.where(mask, x, 0).sum() / n",
           "(torch.where(mask, x, 0).sum(1) / mask.sum(1)).mean()",
           "unit/test_masking.py::test_masked_mean_closed"),
    Mutant("sum instead of mean", "masking.masked_mean",
           ".sum() / n", ".sum()",
           "unit/test_masking.py::test_masked_mean_closed"),
    Mutant("padding in the sum", "masking.masked_mean",
           "torch.where(mask, x, 0).sum()", "x.sum()",
           "unit/test_masking.py::test_masked_mean_closed"),
    Mutant("0 times NaN is NaN", "masking.masked_mean",
           "torch.where(mask, x, 0)", "(x * mask)",
           "unit/test_masking.py::test_masked_mean_closed_nan_in_the_padding"),
    Mutant("variance of one value", "masking.masked_var",
           "at_least=2", "at_least=1",
           "unit/test_masking.py::test_masking_errors_too_few"),
    Mutant("padding has a deviation", "masking.masked_var",
           "torch.where(mask, x - masked_mean(x, mask), 0)", "x - masked_mean(x, mask)",
           "unit/test_masking.py::test_masked_var_closed"),
    Mutant("biased variance", "masking.masked_var",
           "/ (n - 1)", "/ n",
           "unit/test_masking.py::test_masked_var_closed"),
    Mutant("padding is whitened too", "masking.masked_whiten",
           "torch.where(mask, x - masked_mean(x, mask), 0)", "x - masked_mean(x, mask)",
           "unit/test_masking.py::test_masked_whiten_and_scale_closed"),
    Mutant("epsilon outside the root", "masking.masked_whiten",
           "* torch.rsqrt(masked_var(x, mask) + 1e-8)", "/ (masked_var(x, mask).sqrt() + 1e-8)",
           "unit/test_masking.py::test_masked_whiten_closed_epsilon_is_inside_the_root"),
    Mutant("divided by the variance", "masking.masked_whiten",
           "torch.rsqrt(", "torch.reciprocal(",
           "unit/test_masking.py::test_masked_whiten_and_scale_closed"),
    Mutant("scaling moves the mean", "masking.masked_scale",
           "masked_whiten(x, mask) + masked_mean(x, mask)", "masked_whiten(x, mask)",
           "unit/test_masking.py::test_masked_whiten_and_scale_closed"),
    Mutant("the mean lands in the padding", "masking.masked_scale",
           "torch.where(mask, masked_whiten(x, mask) + masked_mean(x, mask), 0)",
           "masked_whiten(x, mask) + masked_mean(x, mask)",
           "unit/test_masking.py::test_masked_whiten_and_scale_closed"),
    Mutant("padding is counted", "masking._count",
           "mask.sum()", "torch.tensor(mask.numel())",
           "unit/test_masking.py::test_masked_mean_closed"),

    # logprobs
    Mutant("not normalised", "logprobs.token_logprobs",
           "chosen - logits.logsumexp(-1)", "chosen",
           "unit/test_logprobs.py::test_token_logprobs_closed"),
    Mutant("log of the sum overflows", "logprobs.token_logprobs",
           "logits.logsumexp(-1)", "logits.exp().sum(-1).log()",
           "unit/test_logprobs.py::test_token_logprobs_property_extreme"),
    Mutant("half precision stays", "logprobs.token_logprobs",
           "logits = at_least_float32(logits)", "pass",
           "unit/test_logprobs.py::test_token_logprobs_dtype"),
    Mutant("sign of the mean logit", "logprobs.entropy",
           "- mean_logit", "+ mean_logit",
           "unit/test_logprobs.py::test_entropy_closed"),
    Mutant("0 times minus infinity", "logprobs.entropy",
           "torch.where(probabilities > 0, logits, 0)", "logits",
           "unit/test_logprobs.py::test_entropy_closed"),
    Mutant("the head's bias forgotten", "logprobs.lm_head_logits",
           "logits if bias is None else logits + bias", "logits",
           "unit/test_logprobs.py::test_lm_head_logits_closed"),
    Mutant("the model's scale forgotten", "logprobs.lm_head_logits",
           "else scale * logits", "else logits",
           "unit/test_logprobs.py::test_lm_head_logits_closed"),
    Mutant("the cap only squashes", "logprobs.lm_head_logits",
           "softcap * torch.tanh(", "torch.tanh(",
           "unit/test_logprobs.py::test_lm_head_logits_closed"),
    Mutant("temperature forgotten", "logprobs.lm_head_logits",
           "else logits / temperature", "else logits",
           "unit/test_logprobs.py::test_lm_head_logits_closed"),
    Mutant("temperature the wrong way", "logprobs.lm_head_logits",
           "else logits / temperature", "else logits * temperature",
           "unit/test_logprobs.py::test_lm_head_logits_closed"),
    Mutant("temperature not handed on", "logprobs.lm_head_logprobs",
           "temperature=temperature", "temperature=1.0",
           "unit/test_logprobs.py::test_lm_head_logprobs_closed"),
    Mutant("the entropy carries gradient", "logprobs._LogprobsAndEntropy",
           "ctx.mark_non_differentiable(entropy)", "pass",
           "unit/test_logprobs.py::test_lm_head_logprobs_gradient_stops"),
    Mutant("the total is left out", "logprobs._LogprobsAndEntropy",
           "logits.gather(-1, tokens[:, None]) - log_total", "logits.gather(-1, tokens[:, None])",
           "unit/test_logprobs.py::test_lm_head_logprobs_definition"),
    Mutant("minus infinity times 0", "logprobs._LogprobsAndEntropy",
           "logits.clamp(min=torch.finfo(logits.dtype).min)", "logits.clone()",
           "unit/test_logprobs.py::test_the_entropy_of_a_logit_of_minus_infinity"),
    Mutant("the gradient's sign", "logprobs._LogprobsAndEntropy",
           "probabilities * -grad", "probabilities * grad",
           "unit/test_policy.py::test_gradients_are_those_of_the_plain_computation[gpt2-1024]"),
    Mutant("the gradient of the token itself", "logprobs._LogprobsAndEntropy",
           "gradient.scatter_add_(-1, tokens[:, None], grad[:, None])", "gradient",
           "unit/test_policy.py::test_gradients_are_those_of_the_plain_computation[gpt2-1024]"),
    Mutant("the logits of all chunks are kept", "logprobs.lm_head_logprobs",
           "if len(chunks) == 1 or not torch.is_grad_enabled():", "if True:",
           "unit/test_logprobs.py::test_lm_head_logprobs_property_memory"),

    # kl
    Mutant("sign of the log ratio", "kl.kl_estimate",
           "at_least_float32(logprobs) - ref_logprobs", "at_least_float32(ref_logprobs) - logprobs",
           "unit/test_kl.py::test_kl_estimate_closed"),
    Mutant("sign of k1", "kl.kl_estimate",
           "return d  # (1)", "return -d  # (1)",
           "unit/test_kl.py::test_kl_estimate_closed[k1-expected0]"),
    Mutant("abs without the bars", "kl.kl_estimate",
           "d.abs()", "d",
           "unit/test_kl.py::test_kl_estimate_closed[abs-expected1]"),
    Mutant("k2 without its half", "kl.kl_estimate",
           "d.square() / 2", "d.square()",
           "unit/test_kl.py::test_kl_estimate_closed[k2-expected2]"),
    Mutant("sign in k3", "kl.kl_estimate",
           "torch.expm1(-d) + d", "torch.expm1(d) - d",
           "unit/test_kl.py::test_kl_estimate_closed[k3-expected3]"),
    Mutant("k3 rounds to 0 near 0", "kl.kl_estimate",
           "torch.expm1(-d) + d", "torch.exp(-d) - 1 + d",
           "unit/test_kl.py::test_kl_estimate_property_small"),
    Mutant("weighed by the reference", "kl.exact_kl",
           "p = logp.exp()", "p = logr.exp()",
           "unit/test_kl.py::test_exact_kl_closed"),
    Mutant("KL(reference || policy)", "kl.exact_kl",
           "p * torch.where(p > 0, logp - logr, 0)", "logr.exp() * (logr - logp)",
           "unit/test_kl.py::test_exact_kl_closed"),
    Mutant("the error is not limited", "kl.AdaptiveKL",
           "min(max(mean_kl / self.target - 1, -0.2), 0.2)", "mean_kl / self.target - 1",
           "unit/test_kl.py::test_adaptive_kl_closed"),
    Mutant("steers away from the target", "kl.AdaptiveKL",
           "mean_kl / self.target - 1", "1 - mean_kl / self.target",
           "unit/test_kl.py::test_adaptive_kl_closed"),
    Mutant("the responses are not counted", "kl.AdaptiveKL",
           "error * n / self.horizon", "error / self.horizon",
           "unit/test_kl.py::test_adaptive_kl_closed"),
    Mutant("the KL is rewarded", "kl.shape_rewards",
           "-kl_coef * at_least_float32(kl)", "kl_coef * kl",
           "unit/test_kl.py::test_shape_rewards_closed"),
    Mutant("padding pays for its KL", "kl.shape_rewards",
           "torch.where(mask, -kl_coef * at_least_float32(kl), 0)", "-kl_coef * kl",
           "unit/test_kl.py::test_shape_rewards_closed"),
    Mutant("a KL of another shape is spread", "kl.shape_rewards",
           "kl.shape != mask.shape or ", "",
           "unit/test_edges.py::test_shape_rewards_errors_shapes"),
    Mutant("the message leaves out the mask", "kl.shape_rewards",
           "(scores, kl, mask)", "(scores, kl)",
           "unit/test_edges.py::test_shape_rewards_errors_shapes"),
    Mutant("the score lands in left padding", "kl.shape_rewards",
           "require_right_padded(mask)", "pass",
           "unit/test_edges.py::test_shape_rewards_errors_padding_on_the_left"),
    Mutant("half precision stays in the losses", "losses.ppo_policy_loss",
           "at_least_float32(new_logprobs)", "new_logprobs",
           "unit/test_edges.py::test_half_precision_is_only_how_the_inputs_are_stored"),
    Mutant("no pair is a pair", "losses._same_pairs",
           "len(first) == 0", "False",
           "unit/test_edges.py::test_pairs_are_one_number_each_and_at_least_one"),
    Mutant("a token without probability", "kl.exact_kl",
           "torch.where(p > 0, logp - logr, 0)", "(logp - logr)",
           "unit/test_edges.py::test_exact_kl_of_impossible_tokens"),
    Mutant("the score lands behind EOS", "kl.shape_rewards",
           "mask.sum(1) - 1", "mask.sum(1)",
           "unit/test_kl.py::test_shape_rewards_closed"),
    Mutant("the score lands in the last column", "kl.shape_rewards",
           "mask.sum(1) - 1", "mask.sum(1) * 0 + mask.shape[1] - 1",
           "unit/test_kl.py::test_shape_rewards_closed"),
    Mutant("each token gets the score", "kl.shape_rewards",
           "rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))",
           "torch.where(mask, rewards + scores[:, None], 0)",
           "unit/test_kl.py::test_shape_rewards_closed"),

    # advantages
    Mutant("the message leaves out the mask", "advantages.gae",
           "(rewards, values, mask)", "(rewards, values)",
           "unit/test_advantages.py::test_gae_errors_shapes"),
    Mutant("left padding is never noticed", "masking.require_right_padded",
           "if bool((mask[:, 1:] & ~mask[:, :-1]).any())", "if False",
           "unit/test_advantages.py::test_gae_errors_padding_on_the_left"),
    Mutant("left padding goes unnoticed", "advantages.gae",
           "require_right_padded(mask)", "pass",
           "unit/test_advantages.py::test_gae_errors_padding_on_the_left"),
    Mutant("rewards of the padding", "advantages.gae",
           "torch.where(mask, at_least_float32(rewards.detach()), 0)", "rewards.detach()",
           "unit/test_advantages.py::test_gae_closed"),
    Mutant("bootstraps from the padding", "advantages.gae",
           "torch.where(mask, at_least_float32(values.detach()), 0)", "values.detach()",
           "unit/test_advantages.py::test_gae_closed_value_after_the_end"),
    Mutant("rewards not detached", "advantages.gae",
           "rewards.detach()", "rewards",
           "unit/test_advantages.py::test_gae_gradient_stops"),
    Mutant("values not detached", "advantages.gae",
           "values.detach()", "values",
           "unit/test_advantages.py::test_gae_gradient_stops"),
    Mutant("gamma missing in delta", "advantages.gae",
           "gamma * next_value", "next_value",
           "unit/test_advantages.py::test_gae_closed"),
    Mutant("lambda for gamma in delta", "advantages.gae",
           "gamma * next_value", "lam * next_value",
           "unit/test_advantages.py::test_gae_closed"),
    Mutant("the value is not taken off", "advantages.gae",
           "gamma * next_value - values[:, t]", "gamma * next_value",
           "unit/test_advantages.py::test_gae_closed"),
    Mutant("gamma missing in the sum", "advantages.gae",
           "gamma * lam * next_advantage", "lam * next_advantage",
           "unit/test_advantages.py::test_gae_closed"),
    Mutant("lambda missing in the sum", "advantages.gae",
           "gamma * lam * next_advantage", "gamma * next_advantage",
           "unit/test_advantages.py::test_gae_closed"),
    Mutant("returns without the values", "advantages.gae",
           "advantages + values", "advantages",
           "unit/test_advantages.py::test_gae_closed"),

    # losses
    Mutant("sign of the likelihood", "losses.sft_loss",
           "-masked_mean(logprobs, mask)", "masked_mean(logprobs, mask)",
           "unit/test_losses.py::test_sft_loss_closed"),
    Mutant("padding is imitated", "losses.sft_loss",
           "masked_mean(logprobs, mask)", "logprobs.mean()",
           "unit/test_losses.py::test_sft_loss_closed"),
    Mutant("rows are counted, not tokens", "losses.sft_loss",
           "mask.sum()", "mask.any(1).sum()",
           "unit/test_losses.py::test_sft_loss_closed"),
    Mutant("chosen and rejected exchanged", "losses.pairwise_reward_loss",
           "chosen_scores - rejected_scores", "rejected_scores - chosen_scores",
           "unit/test_losses.py::test_pairwise_reward_loss_closed_margin"),
    Mutant("sign of the margin", "losses.pairwise_reward_loss",
           "difference - margin", "difference + margin",
           "unit/test_losses.py::test_pairwise_reward_loss_closed_margin"),
    Mutant("sign of the centring", "losses.pairwise_reward_loss",
           "loss + center_coef", "loss - center_coef",
           "unit/test_losses.py::test_pairwise_reward_loss_closed_centre"),
    Mutant("centres the difference", "losses.pairwise_reward_loss",
           "chosen_scores + rejected_scores", "chosen_scores - rejected_scores",
           "unit/test_losses.py::test_pairwise_reward_loss_closed_centre"),
    Mutant("a tie counts as right", "losses.pairwise_reward_loss",
           "difference > 0", "difference >= 0",
           "unit/test_losses.py::test_pairwise_reward_loss_closed"),
    Mutant("the logged margin carries gradient", "losses.pairwise_reward_loss",
           "difference = difference.detach()", "pass",
           "unit/test_losses.py::test_pairwise_reward_loss_gradient"),
    Mutant("a shape that broadcasts", "losses.ppo_policy_loss",
           "logprobs, advantages, mask)", "logprobs, mask)",
           "unit/test_losses.py::test_ppo_errors_shapes[policy_loss-2]"),
    Mutant("new and old exchanged in the ratio", "losses.ppo_policy_loss",
           "at_least_float32(new_logprobs) - logprobs.detach()", "logprobs.detach() - new_logprobs",
           "unit/test_losses.py::test_ppo_policy_loss_closed"),
    Mutant("log-probabilities of the padding", "losses.ppo_policy_loss",
           "torch.where(mask, at_least_float32(new_logprobs) - logprobs.detach(), 0)",
           "new_logprobs - logprobs.detach()",
           "unit/test_losses.py::test_ppo_gradient_nan_in_the_padding"),
    Mutant("old log-probabilities not detached", "losses.ppo_policy_loss",
           "logprobs.detach()", "logprobs",
           "unit/test_losses.py::test_ppo_policy_loss_gradient"),
    Mutant("advantages of the padding alone", "losses.ppo_policy_loss",
           "torch.where(mask, at_least_float32(advantages.detach()), 0)",
           "torch.where(mask, 0, advantages.detach())",
           "unit/test_losses.py::test_ppo_policy_loss_closed"),
    Mutant("advantages not detached", "losses.ppo_policy_loss",
           "advantages.detach()", "advantages",
           "unit/test_losses.py::test_ppo_policy_loss_gradient"),
    Mutant("the ratio to first order", "losses.ppo_policy_loss",
           "log_ratio.exp()", "1 + log_ratio",
           "unit/test_losses.py::test_ppo_policy_loss_closed_cases"),
    Mutant("sign of the advantage", "losses.ppo_policy_loss",
           "unclipped = -advantages", "unclipped = advantages",
           "unit/test_losses.py::test_ppo_policy_loss_closed"),
    Mutant("the clip is not symmetric", "losses.ppo_policy_loss",
           "1 - clip, 1 + clip", "1 / (1 + clip), 1 + clip",
           "unit/test_losses.py::test_ppo_policy_loss_closed_cases"),
    Mutant("the smaller loss, not the larger", "losses.ppo_policy_loss",
           "torch.maximum(", "torch.minimum(",
           "unit/test_losses.py::test_ppo_policy_loss_closed_cases"),
    Mutant("the clipped loss alone", "losses.ppo_policy_loss",
           "torch.maximum(unclipped, clipped)", "clipped",
           "unit/test_losses.py::test_ppo_policy_loss_closed_cases"),
    Mutant("mean over padding too", "losses.ppo_policy_loss",
           "masked_mean(torch.maximum(unclipped, clipped), mask)",
           "torch.maximum(unclipped, clipped).mean()",
           "unit/test_losses.py::test_ppo_policy_loss_closed"),
    Mutant("the logged numbers carry gradient", "losses.ppo_policy_loss",
           "with torch.no_grad():", "if True:",
           "unit/test_losses.py::test_ppo_policy_loss_gradient"),
    Mutant("k3 the wrong way", "losses.ppo_policy_loss",
           "kl_estimate(-log_ratio", "kl_estimate(log_ratio",
           "unit/test_losses.py::test_ppo_policy_loss_closed_statistics"),
    Mutant("padding is counted", "losses.ppo_policy_loss",
           "mask.sum()", "torch.tensor(mask.numel())",
           "unit/test_losses.py::test_ppo_policy_loss_closed"),
    Mutant("padding in the clip fraction", "losses.ppo_policy_loss",
           "masked_mean((clipped > unclipped).to(loss.dtype), mask)",
           "(clipped > unclipped).to(loss.dtype).mean()",
           "unit/test_losses.py::test_ppo_policy_loss_closed"),
    Mutant("sign of the update's k1", "losses.ppo_policy_loss",
           "masked_mean(-log_ratio, mask)", "masked_mean(log_ratio, mask)",
           "unit/test_losses.py::test_ppo_policy_loss_definition_kl"),
    Mutant("padding in the update's k3", "losses.ppo_policy_loss",
           "masked_mean(k3, mask)", "k3.mean()",
           "unit/test_losses.py::test_ppo_policy_loss_closed_statistics"),
    Mutant("padding in the ratio", "losses.ppo_policy_loss",
           "masked_mean(ratio, mask)", "ratio.mean()",
           "unit/test_losses.py::test_ppo_policy_loss_closed_statistics"),
    Mutant("padding in the largest ratio", "losses.ppo_policy_loss",
           "ratio[mask].max()", "ratio.max()",
           "unit/test_losses.py::test_ppo_policy_loss_closed_largest_ratio"),
    Mutant("a shape that broadcasts", "losses.ppo_value_loss",
           "values, returns, mask)", "values, mask)",
           "unit/test_losses.py::test_ppo_errors_shapes[value_loss-2]"),
    Mutant("new values of the padding", "losses.ppo_value_loss",
           "torch.where(mask, at_least_float32(new_values), 0)", "new_values",
           "unit/test_losses.py::test_ppo_gradient_nan_in_the_padding"),
    Mutant("old values of the padding alone", "losses.ppo_value_loss",
           "torch.where(mask, at_least_float32(values.detach()), 0)",
           "torch.where(mask, 0, values.detach())",
           "unit/test_losses.py::test_ppo_value_loss_closed"),
    Mutant("returns of the padding alone", "losses.ppo_value_loss",
           "torch.where(mask, at_least_float32(returns.detach()), 0)",
           "torch.where(mask, 0, returns.detach())",
           "unit/test_losses.py::test_ppo_value_loss_closed"),
    Mutant("returns not detached", "losses.ppo_value_loss",
           "returns.detach()", "returns",
           "unit/test_losses.py::test_ppo_value_loss_gradient"),
    Mutant("clipped around the returns", "losses.ppo_value_loss",
           "clamp(values - clip, values + clip)", "clamp(returns - clip, returns + clip)",
           "unit/test_losses.py::test_ppo_value_loss_closed"),
    Mutant("clipped around 0", "losses.ppo_value_loss",
           "clamp(values - clip, values + clip)", "clamp(-clip, clip)",
           "unit/test_losses.py::test_ppo_value_loss_closed"),
    Mutant("the smaller error, not the larger", "losses.ppo_value_loss",
           "torch.maximum(", "torch.minimum(",
           "unit/test_losses.py::test_ppo_value_loss_closed_cases"),
    Mutant("without its half", "losses.ppo_value_loss",
           "mask) / 2", "mask)",
           "unit/test_losses.py::test_ppo_value_loss_closed"),
    Mutant("mean over padding too", "losses.ppo_value_loss",
           "masked_mean(torch.maximum(error, near_error), mask)",
           "torch.maximum(error, near_error).mean()",
           "unit/test_losses.py::test_ppo_value_loss_closed"),
    Mutant("padding in the clip fraction", "losses.ppo_value_loss",
           "masked_mean((near_error > error).to(loss.dtype), mask)",
           "(near_error > error).to(loss.dtype).mean()",
           "unit/test_losses.py::test_ppo_value_loss_closed"),
    Mutant("padding is counted", "losses.ppo_value_loss",
           "mask.sum()", "torch.tensor(mask.numel())",
           "unit/test_losses.py::test_ppo_value_loss_closed"),
    Mutant("chosen against the rejected one's reference", "losses.dpo_loss",
           "at_least_float32(chosen_logprobs) - ref_chosen_logprobs",
           "at_least_float32(chosen_logprobs) - ref_rejected_logprobs",
           "unit/test_losses.py::test_dpo_loss_closed"),
    Mutant("no reference", "losses.dpo_loss",
           "at_least_float32(rejected_logprobs) - ref_rejected_logprobs", "rejected_logprobs",
           "unit/test_losses.py::test_dpo_loss_closed"),
    Mutant("beta on one side only", "losses.dpo_loss",
           "rejected_rewards = beta * (", "rejected_rewards = (",
           "unit/test_losses.py::test_dpo_loss_closed"),
    Mutant("chosen and rejected exchanged", "losses.dpo_loss",
           "h = chosen_rewards - rejected_rewards", "h = rejected_rewards - chosen_rewards",
           "unit/test_losses.py::test_dpo_loss_closed"),
    Mutant("sign of the label smoothing", "losses.dpo_loss",
           "- label_smoothing * logsigmoid(-h)", "+ label_smoothing * logsigmoid(-h)",
           "unit/test_losses.py::test_dpo_loss_closed"),
    Mutant("smoothing without the other label", "losses.dpo_loss",
           "logsigmoid(-h)", "logsigmoid(h)",
           "unit/test_losses.py::test_dpo_loss_closed"),
    Mutant("the logged rewards carry gradient", "losses.dpo_loss",
           "chosen_rewards.detach()", "chosen_rewards",
           "unit/test_losses.py::test_dpo_loss_gradient"),

    # data
    Mutant("cut to the shortest row", "data.Sequences.select",
           "self.attention_mask[index].sum(1).max()", "self.attention_mask[index].sum(1).min()",
           "unit/test_data.py::test_select_is_collate_of_those_rows"),
    Mutant("responses keep their old width", "data.Sequences.select",
           "self.mask[index].sum(1).max()", "self.mask.sum(1).max()",
           "unit/test_data.py::test_select_is_collate_of_those_rows"),
    Mutant("another row's attention mask", "data.Sequences.select",
           "self.attention_mask[index, :length]", "self.attention_mask[: len(index), :length]",
           "unit/test_data.py::test_select_is_collate_of_those_rows"),
    Mutant("another row's mask", "data.Sequences.select",
           "self.mask[index, :width]", "self.mask[: len(index), :width]",
           "unit/test_data.py::test_select_is_collate_of_those_rows"),
    Mutant("padding is attended to", "data.collate",
           "response_mask(lengths, int(lengths.max())).long()",
           "torch.ones_like(_pad(joined, pad_id))",
           "unit/test_data.py::test_collate_as_drawn"),
    Mutant("padding is told by its id", "data.collate",
           "response_mask(lengths, int(lengths.max())).long()",
           "(_pad(joined, pad_id) != pad_id).long()",
           "unit/test_data.py::test_collate_masks_do_not_look_at_ids"),
    Mutant("EOS out of the mask", "data.collate",
           "response_mask(response_lengths, ", "response_mask(response_lengths - 1, ",
           "unit/test_data.py::test_collate_as_drawn"),
    Mutant("a long prompt loses its end", "encoding/codec.Codec.encode_prompt",
           "ids[:bos] + ids[bos + max(0, len(ids) - self.max_prompt_tokens) :]",
           "ids[: self.max_prompt_tokens]",
           "unit/test_codec.py::test_a_long_prompt_loses_its_beginning"),
    Mutant("a response without EOS", "encoding/codec.Codec.encode_response",
           "ids[: room - ended] + ids[-1:] * ended", "ids[:room]",
           "unit/test_codec.py::test_a_long_response_loses_its_end_and_keeps_eos"),
    Mutant("texts as they are lose their special tokens", "encoding/codec.Codec._read_prompt",
           "self._reader.read(text, room=room, special=True)", "self._reader.read(text, room=room)",
           "unit/test_codec.py::test_as_is_are_exactly_the_ids_of_the_tokenizer"),
    Mutant("texts as they are get an EOS", "encoding/codec.Codec._read_response",
           "if not as_is:", "if True:",
           "unit/test_codec.py::test_as_is_are_exactly_the_ids_of_the_tokenizer"),
    Mutant("a text is read in part that is not cut for certain", "encoding/reading.TextReader.read",
           "> 2 * room", "> 0",
           "unit/test_codec.py::test_a_long_text_of_few_tokens_is_read_whole"),
    Mutant("of a long prompt the beginning is read", "encoding/reading.TextReader.read",
           "text[:most] if from_start else text[-most:]", "text[:most]",
           "unit/test_codec.py::test_a_text_of_megabytes_is_read_only_as_far_as_it_may_fit[as_is]"),
    Mutant("a chat template without the content", "encoding/chat.require_content",
           'in _letters(rendered)', "in _letters(rendered) + _letters(_USER['content'])",
           "unit/test_codec.py::test_a_chat_template_that_leaves_the_content_out[none]"),
    Mutant("a message that is left out is not seen", "encoding/chat.contains",
           "return all(", "return any(",
           "harness/test_encoding_report.py::test_messages_that_the_chat_template_leaves_out_or_changes_are_counted"),
    Mutant("a group holds one row too many", "data.micro_batches",
           "(len(groups[-1]) + 1) * width", "len(groups[-1]) * width",
           "unit/test_data.py::test_micro_batches_of_equal_rows_keep_their_order"),
    Mutant("the same order in each epoch", "data.Cursor._order",
           "self.seed + self.epoch", "self.seed",
           "unit/test_data.py::test_take_goes_through_each_epoch_once"),

    # models
    Mutant("a critic with the policy's weights", "speed/fast.separate_trunk",
           "copy.deepcopy(model.base_model)", "model.base_model",
           "unit/test_policy.py::test_a_separate_critic_starts_as_a_copy_with_weights_of_its_own"),
    Mutant("a new value head is not zero", "policy.Policy.__init__",
           "nn.init.zeros_(self.value_head.weight)", "pass",
           "unit/test_policy.py::test_a_new_value_head_is_zero[shared]"),
    Mutant("tokens in another order than states", "speed/forward.logprobs_and_states",
           "batch.responses[batch.mask]", "batch.responses.T[batch.mask.T]",
           "unit/test_policy.py::test_logprobs_and_entropy_are_those_of_the_model_itself[1.0-gpt2]"),
    Mutant("temperature forgotten", "speed/forward.logprobs_and_states",
           "temperature=temperature", "temperature=1.0",
           "unit/test_policy.py::test_logprobs_and_entropy_are_those_of_the_model_itself[0.7-gpt2]"),
    Mutant("the critic reads the policy's trunk", "speed/forward.logprobs_and_states",
           "hidden_states(critic_trunk, layout)", "hidden_states(lm.base_model, layout)",
           "unit/test_policy.py::test_values_are_the_head_on_the_hidden_state_before_each_token"
           "[separate-gpt2]"),
    Mutant("values in the wrong cells", "policy.Policy.forward",
           "scatter_tokens(self.value_head(hidden)[:, 0], batch.mask)",
           "scatter_tokens(self.value_head(hidden)[:, 0], batch.mask.T).T",
           "unit/test_policy.py::test_values_are_the_head_on_the_hidden_state_before_each_token"
           "[shared-gpt2]"),
    Mutant("entropies in the wrong cells", "policy.Policy.forward",
           "scatter_tokens(entropies, batch.mask)", "scatter_tokens(entropies, batch.mask.T).T",
           "unit/test_policy.py::test_logprobs_and_entropy_are_those_of_the_model_itself[1.0-gpt2]"),
    Mutant("log-probabilities in the wrong cells", "policy.Policy.forward",
           "scatter_tokens(logprobs, batch.mask)", "scatter_tokens(logprobs, batch.mask.T).T",
           "unit/test_policy.py::test_logprobs_and_entropy_are_those_of_the_model_itself[1.0-gpt2]"),
    Mutant("temperature forgotten", "policy.Policy._logits",
           "temperature=temperature", "temperature=1.0",
           "unit/test_policy.py::test_token_logits[gpt2]"),
    Mutant("a plain policy forgets the temperature", "policy.Policy._plain",
           "temperature=temperature", "temperature=1.0",
           "unit/test_plain.py::test_outputs_and_gradients_are_the_same[none-gpt2]"),
    Mutant("plain: tokens in another order than states", "policy.Policy._plain",
           "batch.responses[batch.mask]", "batch.responses.T[batch.mask.T]",
           "unit/test_plain.py::test_outputs_and_gradients_are_the_same[none-gpt2]"),
    Mutant("plain: padding is attended to", "policy.Policy._plain",
           "batch.attention_mask}", "1 - batch.attention_mask}",
           "unit/test_plain.py::test_outputs_and_gradients_are_the_same[none-gpt2]"),
    Mutant("plain: the critic reads the policy's trunk", "policy.Policy._plain",
           "self.critic_trunk(**inputs", "self.lm.base_model(**inputs",
           "unit/test_plain.py::test_outputs_and_gradients_are_the_same[separate-gpt2]"),
    Mutant("plain: the entropy has a gradient", "policy.Policy._plain",
           "entropy(logits.detach())", "entropy(logits)",
           "unit/test_plain.py::test_outputs_and_gradients_are_the_same[none-gpt2]"),
    Mutant("plain is not plain", "policy.Policy.__init__",
           "if not plain:", "if True:",
           "unit/test_plain.py::test_nothing_of_a_plain_model_is_sped_up"),
    Mutant("a plain sampler attends to the padding", "sampling._sample",
           "attention_mask=attention_mask", "attention_mask=torch.ones_like(attention_mask)",
           "unit/test_plain.py::test_the_same_uniform_numbers_draw_the_same_tokens[gpt2]"),
    Mutant("a plain sampler counts the padding", "sampling._sample",
           "position_ids=positions", "position_ids=None",
           "unit/test_plain.py::test_the_same_uniform_numbers_draw_the_same_tokens[gpt2]"),
    Mutant("the reference is the policy", "policy.Policy.reference",
           "copy.deepcopy(self.lm)", "self.lm",
           "unit/test_policy.py::test_the_reference_is_frozen_and_stays_what_it_was"),
    Mutant("the reference has dropout", "policy.Policy.reference",
           "disable_dropout(reference)", "pass",
           "unit/test_policy.py::test_the_reference_is_frozen_and_stays_what_it_was"),
    Mutant("the reference learns", "policy.Policy.reference",
           "reference.requires_grad_(False)", "pass",
           "unit/test_policy.py::test_the_reference_is_frozen_and_stays_what_it_was"),
    Mutant("any head is taken for a linear one", "loading/checks.require_known_head",
           "torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.std()))", "True",
           "unit/test_loading.py::test_a_language_model_with_an_unknown_head_is_refused"),
    Mutant("only the first row's ids are looked at", "policy.Policy._on_device",
           "batch.ids[batch.attention_mask.bool()]", "batch.ids[:1]",
           "unit/test_room.py::test_a_row_that_the_model_has_no_room_for"
           "[beyond the vocabulary-forward]"),
    Mutant("padding needs room", "policy.Policy._on_device",
           "batch.attention_mask.sum(1)", "(batch.attention_mask | 1).sum(1)",
           "unit/test_room.py::test_a_padded_neighbour_is_not_named[forward]"),
    Mutant("rewards see outer white space", "policy.Policy.decode",
           ".strip()", "",
           "unit/test_rollout.py::test_rewards_see_no_outer_white_space"),
    Mutant("the logits of all tokens at once", "speed/forward.logprobs_and_states",
           "chunk_tokens=CHUNK_TOKENS", "chunk_tokens=10**9",
           "unit/test_rollout.py::test_a_pass_holds_the_logits_of_few_tokens"),
    Mutant("any model is packed", "speed/forward.layout_of",
           "if not can_pack(lm):", "if False:",
           "unit/test_packing.py::test_a_model_with_a_sliding_window_is_not_packed[mistral]"),
    Mutant("attention to the padding alone", "speed/packing.padded",
           "batch.attention_mask}", "1 - batch.attention_mask}",
           "unit/test_packing.py::test_packing_changes_no_value_and_no_gradient[20-gpt2]"),
    Mutant("padding has hidden states", "data.Sequences.predicting",
           "self.mask.nonzero(as_tuple=True)", "(self.mask | True).nonzero(as_tuple=True)",
           "unit/test_packing.py::test_padded_by_hand"),
    Mutant("shifted by P, not P - 1", "data.Sequences.predicting",
           "self.prompt_lengths[rows] - 1 + t", "self.prompt_lengths[rows] + t",
           "unit/test_packing.py::test_padded_by_hand"),
    Mutant("padding is part of the response", "speed/packing.packed",
           "(batch.mask.sum(1) - 1).tolist()", "((batch.mask | True).sum(1) - 1).tolist()",
           "unit/test_packing.py::test_packed_by_hand"),
    Mutant("a second response is predicted by the first one's end", "speed/packing.packed",
           "[start + P - 1, *range(stop, stop + n)]", "[*range(stop - 1, stop + n)]",
           "unit/test_packing.py::test_packed_by_hand"),
    Mutant("a response begins at position 0", "speed/packing.packed",
           "torch.arange(P, P + n)", "torch.arange(n)",
           "unit/test_packing.py::test_packed_by_hand"),
    Mutant("a response sees its sibling", "speed/packing.packed",
           "((theirs == mine) | (theirs == 0))", "(theirs == theirs)",
           "unit/test_packing.py::test_packed_by_hand"),
    Mutant("a response does not see its prompt", "speed/packing.packed",
           "((theirs == mine) | (theirs == 0))", "(theirs == mine)",
           "unit/test_packing.py::test_packed_by_hand"),
    Mutant("a row sees its neighbour", "speed/packing.packed",
           "(family[:, :, None] == family[:, None, :])", "(family[:, :, None] > -2)",
           "unit/test_packing.py::test_packed_by_hand"),
    Mutant("a token sees what comes after it", "speed/packing.packed",
           "sees.tril()", "sees",
           "unit/test_packing.py::test_packed_by_hand"),
    Mutant("prompts that differ in their last token are one", "speed/packing.packed",
           "tuple(ids[row, :P].tolist())", "tuple(ids[row, : P - 1].tolist())",
           "unit/test_packing.py::test_prompts_that_differ_in_one_token_are_two"),
    Mutant("a prompt's row without end", "speed/packing._siblings",
           "if not rows or size > max(width, 2 * longest):", "if not rows:",
           "unit/test_packing.py::test_many_responses_to_one_prompt_are_no_row_without_end"),
    Mutant("a wide row holds two responses at most", "speed/packing._siblings",
           "max(width, 2 * longest)", "2 * longest",
           "unit/test_packing.py::test_a_wide_row_holds_all_responses_to_a_prompt"),
    Mutant("a bin runs over", "speed/packing.first_fit",
           "sum(sizes[j] for j in members) + sizes[i] <= width",
           "sum(sizes[j] for j in members) <= width",
           "unit/test_packing.py::test_first_fit_fills_its_bins"),
    Mutant("GPT-2 gets another activation", "speed/fast.fuse_gelu",
           'approximate="tanh"', 'approximate="none"',
           "unit/test_fast.py::test_the_fused_activation_is_gpt2s_own"),
    Mutant("windows are packed", "speed/fast.can_pack",
           'kinds == {"full_attention"}', "True",
           "unit/test_packing.py::test_a_model_with_a_sliding_window_is_not_packed"
           "[qwen2 with windows]"),
    Mutant("frequencies that follow the longest row are packed", "speed/fast.can_pack",
           'rope.get("rope_type") not in ("dynamic", "longrope")', "True",
           "unit/test_packing.py::test_a_model_whose_frequencies_follow_the_longest_row_is_not_packed"
           "[dynamic]"),
    Mutant("frequencies that follow the original length are packed", "speed/fast.can_pack",
           '("dynamic", "longrope")', '("dynamic",)',
           "unit/test_packing.py::test_a_model_whose_frequencies_follow_the_longest_row_is_not_packed"
           "[longrope]"),
    Mutant("untied weights get a sparse gradient", "speed/fast.make_tied_gradient_sparse",
           'getattr(head, "weight", None) is embedding.weight', "True",
           "unit/test_fast.py::test_only_a_tied_weight_has_a_sparse_part"),
    Mutant("the critic's gradient stays sparse", "speed/fast.separate_trunk",
           "module.sparse = False", "pass",
           "unit/test_fast.py::test_a_separate_critic_has_a_dense_gradient_of_its_own"),
    Mutant("scores in another order than texts", "reward_model.RewardModel.forward_pairs",
           "[order.argsort().to(self.device)]", "",
           "unit/test_reward_model.py::test_forward_keeps_the_order_of_the_texts"),
    Mutant("tokens go into the padding", "policy.scatter_tokens",
           "masked_scatter(mask, x)", "masked_scatter(~mask, x)",
           "unit/test_policy.py::test_scatter_tokens_by_hand"),
    Mutant("a look leaves dropout on", "policy.evaluating",
           "model.eval()", "pass",
           "unit/test_reward_model.py::test_score_is_forward_in_eval_mode_whatever_the_mode"),
    Mutant("a look records a gradient", "policy.evaluating",
           "with torch.no_grad():", "if True:",
           "unit/test_policy.py::test_evaluating_restores_each_mode_even_after_an_error"),
    Mutant("after a look the mode is lost", "policy.evaluating",
           "module.training = True", "pass",
           "unit/test_policy.py::test_evaluating_restores_each_mode_even_after_an_error"),
    Mutant("dropout modules stay on", "policy.disable_dropout",
           "module.p = 0.0", "pass",
           "unit/test_policy.py::test_without_dropout_train_mode_is_eval_mode[gpt2]"),
    Mutant("dropout numbers stay", "policy.disable_dropout",
           "setattr(module, name, 0.0)", "pass",
           "unit/test_policy.py::test_without_dropout_train_mode_is_eval_mode[opt]"),
    Mutant("scores in the order of the groups", "reward_model.RewardModel.score",
           "scores[rows] = ", "scores[sorted(rows)] = ",
           "unit/test_reward_model.py::test_scores_depend_neither_on_batching_nor_on_order[bert]"),
    Mutant("scores with dropout", "reward_model.RewardModel.score",
           "evaluating(self)", "evaluating()",
           "unit/test_reward_model.py::test_score_is_forward_in_eval_mode_whatever_the_mode"),
    Mutant("the old bias is not scaled", "reward_model.RewardModel.rescale",
           ".mul_(gain).add_(bias)", ".add_(bias)",
           "unit/test_reward_model.py::test_rescale"),
    Mutant("the pad token of the config stays", "loading/checks.scoring_tokenizer",
           "model.config.get_text_config().pad_token_id = tokenizer.pad_token_id", "pass",
           "unit/test_reward_model.py::test_the_pad_token_of_a_decoder_is_the_tokenizers"),
    Mutant("the user's tokenizer is changed", "loading/checks.scoring_tokenizer",
           "copy.deepcopy(tokenizer)", "tokenizer",
           "unit/test_reward_model.py::test_the_tokenizer_that_was_given_stays_as_it_is"),
    Mutant("new tokens need no positions", "loading/checks._misfit",
           "length + new_tokens <= positions", "length <= positions",
           "unit/test_room.py::test_a_row_that_the_model_has_no_room_for[too long-sampled]"),
    Mutant("frequencies that follow the longest row", "loading/checks.positions_of",
           '"longrope"', '"never"',
           "unit/test_room.py::test_positions[longrope]"),
    Mutant("RoBERTa has all its positions", "loading/checks.positions_of",
           "table.num_embeddings - table.padding_idx - 1", "table.num_embeddings",
           "unit/test_reward_model.py::test_a_roberta_counts_its_positions_from_behind_its_pad_id[4]"),
    Mutant("RoBERTa's pad id is taken for 1", "loading/checks.positions_of",
           "table.num_embeddings - table.padding_idx - 1", "table.num_embeddings - 2",
           "unit/test_reward_model.py::test_a_roberta_counts_its_positions_from_behind_its_pad_id[4]"),
    Mutant("padding that changes a score is taken", "loading/checks.choose_padding_side",
           "rtol=near, atol=near", "rtol=near, atol=9",
           "unit/test_reward_model.py::test_a_classifier_that_heeds_no_mask_is_refused"),
    Mutant("scores in half precision", "reward_model.RewardModel.__init__",
           "self._last_layer.register_forward_hook(_linear_in_float32)", "pass",
           "unit/test_reward_model.py::test_scores_near_2_stay_different_in_bfloat16"),
    Mutant("the last layer under autocast all the same", "reward_model._linear_in_float32",
           "enabled=False", "enabled=True",
           "unit/test_reward_model.py::test_under_autocast_the_last_layer_is_in_float32[bert]"),
    Mutant("without its bias", "reward_model._linear_in_float32",
           "None if bias is None else at_least_float32(bias)", "None",
           "unit/test_reward_model.py::test_under_autocast_the_last_layer_is_in_float32[bert]"),

    # pairs
    Mutant("a text may write special tokens", "encoding/pairs.PairCodec._read",
           "split_special_tokens=True", "split_special_tokens=False",
           "unit/test_pairs.py::test_what_a_text_spells_is_no_special_token[bytewise]"),
    Mutant("special tokens that a text spells stay", "encoding/pairs.PairCodec._read",
           "unknown_id if i in self.spelled else i", "i",
           "unit/test_pairs.py::test_what_a_text_spells_is_no_special_token[unigram]"),
    Mutant("a response that just fits is cut", "encoding/pairs._Tokens.fitting",
           "min(room, len(self.ids))", "min(room - 1, len(self.ids))",
           "unit/test_pairs.py::test_a_response_that_just_fits_is_whole"),
    Mutant("a character is cut in two", "encoding/pairs._Tokens.fitting",
           "spans[kept][0] < spans[kept - 1][1]", "False",
           "unit/test_reward_model.py::test_a_character_of_several_tokens_is_cut_as_counted[8]"),
    Mutant("the prompt loses its end", "encoding/pairs.PairCodec.encode",
           "prompt.ids[max(0, len(prompt.ids) - self.room + kept) :]",
           "prompt.ids[: self.room - kept]",
           "unit/test_reward_model.py::test_cuts_end_of_response_then_beginning_of_prompt"),
    Mutant("no room stays for the prompt", "encoding/pairs.PairCodec.encode",
           "self.room * 3 // 4", "self.room",
           "unit/test_reward_model.py::test_cuts_end_of_response_then_beginning_of_prompt"),
    Mutant("no EOS where nothing separates", "encoding/pairs.PairCodec._read",
           "ids.append(eos_id)", "pass",
           "unit/test_pairs.py::test_elsewhere_a_new_line_and_an_eos_are_added[words]"),
    Mutant("a text of any length is tokenised", "encoding/pairs.PairCodec._read",
           "[text[-letters:] if from_end else text[:letters] for text in some]", "list(some)",
           "unit/test_pairs.py::test_a_text_that_is_far_too_long_is_not_tokenised_whole[True]"),
    Mutant("padding is attended to", "encoding/pairs.PairCodec.pad",
           "[torch.ones_like(pair.ids) for pair in pairs], 0",
           "[torch.ones_like(pair.ids) for pair in pairs], 1",
           "unit/test_pairs.py::test_padding_is_masked_on_either_side[right]"),
    Mutant("prompt and response of one type", "encoding/pairs.PairCodec._types",
           "[self.text_types[1]]", "[self.text_types[0]]",
           "unit/test_reward_model.py::test_a_pair_is_cls_prompt_sep_response_sep"),

    # sampling
    Mutant("all rows share their random numbers", "sampling.sample",
           "torch.rand(len(prompt_ids), max_new_tokens, generator=rng, dtype=torch.float64)",
           "torch.rand(1, max_new_tokens, generator=rng, dtype=torch.float64)"
           ".repeat(len(prompt_ids), 1)",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("random numbers reused by later rows", "sampling.sample",
           "uniforms[rows]", "uniforms",
           "unit/test_sampling.py::test_how_many_rows_are_sampled_at_once_changes_nothing"),
    Mutant("samples with dropout", "sampling.sample",
           "evaluating(policy)", "evaluating()",
           "unit/test_sampling.py::test_dropout_is_off_while_sampling_and_the_mode_comes_back[True]"),
    Mutant("the prompts' padding is attended to", "sampling._sample",
           "attention_mask.to(device)", "torch.ones_like(attention_mask).to(device)",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("positions count the left padding", "sampling._sample",
           "(attention_mask.cumsum(1) - 1)", "(torch.ones_like(attention_mask).cumsum(1) - 1)",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("each pass attends to the padding", "sampling._sample",
           "hidden_states(ids, attention_mask,",
           "hidden_states(ids, torch.ones_like(attention_mask),",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("temperature forgotten", "sampling._sample",
           "temperature=temperature", "temperature=1.0",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[0.6-gpt2]"),
    Mutant("one random number for all tokens", "sampling._sample",
           "uniforms[live, t]", "uniforms[live, 0]",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("rows inherit others' random numbers", "sampling._sample",
           "uniforms[live, t]", "uniforms[: len(live), t]",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("rows go on that have ended", "sampling._sample",
           "tokens != eos_id", "tokens == eos_id",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("the cache keeps other rows", "speed/cache.KeyValueCache.select",
           "cache.batch_select_indices(rows)",
           "cache.batch_select_indices(rows.new_tensor(range(len(rows))))",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("other rows' attention masks", "sampling._sample",
           "attention_mask[going]", "attention_mask[: len(going)]",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("new tokens are not attended to", "sampling._sample",
           "torch.ones_like(tokens[:, None])", "torch.zeros_like(tokens[:, None])",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("prompts padded on the right", "sampling._left_padded",
           "ids[b, width - len(row) :] = row", "ids[b, : len(row)] = row",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("the mask on the wrong side", "sampling._left_padded",
           "attention_mask[b, width - len(row) :] = 1", "attention_mask[b, : len(row)] = 1",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("the mask inverted", "sampling._left_padded",
           "return ids, attention_mask", "return ids, 1 - attention_mask",
           "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]"),
    Mutant("an edge takes the token before it", "sampling._inverse_cdf",
           "right=True", "right=False",
           "unit/test_sampling.py::test_a_uniform_number_on_an_edge_takes_the_next_token"),

    Mutant("the cdf is not scaled by its end", "sampling._inverse_cdf",
           "uniforms[:, None] * cdf[:, -1:]", "uniforms[:, None]",
           "unit/test_sampling.py::test_the_largest_uniform_number_draws_no_impossible_token"),
    Mutant("a softmax in the model's own precision", "sampling._inverse_cdf",
           "logits.to(uniforms.dtype).softmax(-1)", "logits.softmax(-1).to(uniforms.dtype)",
           "unit/test_sampling.py::test_half_precision_of_the_logits_moves_no_edge[dtype0]"),

    Mutant("a uniform number is rounded up to 1", "sampling.below_one",
           "clamp(max=1 - torch.finfo(dtype).eps / 2)", "clamp(max=1)",
           "unit/test_sampling.py::test_no_uniform_number_is_rounded_up_to_1"),
    Mutant("a cache for heads that share theirs", "speed/cache.cache_bytes",
           'getattr(config, "num_key_value_heads", None) or heads', "heads",
           "unit/test_sampling.py::test_a_tokens_keys_and_values_are_as_large_as_the_model_makes_them"
           "[llama]"),
    Mutant("heads are as wide as the model over their number", "speed/cache.cache_bytes",
           'getattr(config, "head_dim", None) or config.hidden_size // heads',
           "config.hidden_size // heads",
           "unit/test_sampling.py::test_a_tokens_keys_and_values_are_as_large_as_the_model_makes_them"
           "[wide_heads]"),
    Mutant("no room for the responses", "sampling.sample",
           "default=0) + max_new_tokens", "default=0)",
           "unit/test_sampling.py::test_rows_at_once_have_room_for_prompt_and_response"),
    Mutant("states of a layer are taken for keys and values", "speed/cache._kept_by",
           "all(type(x) in known for x in cache.layers)", "True",
           "unit/test_sampling.py::test_a_model_without_keys_and_values_is_refused[lfm2]"),
    Mutant("the newer name of the cache is not known", "speed/cache._kept_by",
           "CACHE_NAMES & output.keys()", '{"past_key_values"} & output.keys()',
           "unit/test_sampling.py::test_the_cache_is_found_by_its_old_and_its_new_name[cache]"),
    Mutant("the older name of the cache is not known", "speed/cache._kept_by",
           "CACHE_NAMES & output.keys()", '{"cache"} & output.keys()',
           "unit/test_sampling.py::test_the_cache_is_found_by_its_old_and_its_new_name"
           "[past_key_values]"),

    # rollout
    Mutant("the rollout's mask ignores lengths", "rollout.Rollout.mask",
           "self.sequences.mask", "self.sequences.mask | True",
           "unit/test_rollout.py::test_padding_is_zero_in_everything[k1]"),
    Mutant("lengths without EOS", "rollout.Rollout.lengths",
           "self.mask.sum(1)", "self.mask.sum(1) - 1",
           "unit/test_rollout.py::test_padding_is_zero_in_everything[k1]"),
    Mutant('temperature missing in sampling', 'rollout.collect',
           'temperature=config.temperature,\n        rng', 'temperature=1.0,\n        rng',
           'unit/test_rollout.py::test_collect_remembers_what_it_sampled'),
    Mutant('temperature missing in scoring', 'rollout.collect',
           'temperature=config.temperature,\n        kl', 'temperature=1.0,\n        kl',
           'unit/test_rollout.py::test_collect_remembers_what_it_sampled'),
    Mutant("scored with dropout", "rollout.score_rollout",
           "evaluating(policy, ref_policy)", "evaluating()",
           "unit/test_rollout.py::test_scoring_is_without_dropout_and_the_modes_come_back"),
    Mutant("temperature missing in the policy's pass", "rollout.score_rollout",
           "found = policy(part, temperature=temperature, ", "found = policy(part, ",
           "unit/test_rollout.py::test_scoring_passes_are_the_plain_ones[gpt2]"),
    Mutant("temperature missing in the reference's pass", "rollout.score_rollout",
           "ref_policy(part, temperature=temperature, ", "ref_policy(part, ",
           "unit/test_rollout.py::test_scoring_passes_are_the_plain_ones[gpt2]"),
    Mutant("the policy for the reference", "rollout.score_rollout",
           "ref_policy(part, ", "policy(part, ",
           "unit/test_rollout.py::test_scoring_passes_are_the_plain_ones[gpt2]"),
    Mutant("rows in the order of the groups", "rollout.score_rollout",
           "logprobs[rows, :width] = found.logprobs",
           "logprobs[sorted(rows), :width] = found.logprobs",
           "unit/test_rollout.py::test_scoring_passes_are_the_plain_ones[gpt2]"),
    Mutant("temperature missing in the exact KL", "policy.Policy.forward",
           "self._logits(batch, temperature)", "self._logits(batch, 1.0)",
           "unit/test_rollout.py::test_full_kl_is_the_sum_over_the_vocabulary"),
    Mutant("exact KL in the wrong cells", "rollout.score_rollout",
           "scatter_tokens(per_token, part.mask)", "scatter_tokens(per_token, part.mask.T).T",
           "unit/test_rollout.py::test_full_kl_is_the_sum_over_the_vocabulary"),
    Mutant("sign of the KL", "rollout.score_rollout",
           "kl_estimate(logprobs, ref_logprobs", "kl_estimate(ref_logprobs, logprobs",
           "unit/test_rollout.py::test_scoring_passes_are_the_plain_ones[gpt2]"),
    Mutant("EOS anywhere ends a response", "rollout.score_rollout",
           "bool(ids[-1] == eos_id)", "bool((ids == eos_id).any())",
           "unit/test_rollout.py::test_ended_says_which_rows_end_in_eos"),
    Mutant("ended inverted", "rollout.score_rollout",
           "ids[-1] == eos_id", "ids[-1] != eos_id",
           "unit/test_rollout.py::test_ended_says_which_rows_end_in_eos"),
    Mutant("a score of NaN is let through", "loading/reward_function.call_reward",
           "not abs(score) <= LARGEST_SCORE", "abs(score) > LARGEST_SCORE",
           "unit/test_rollout.py::test_a_refused_score_stops_collect"),
    Mutant("a reward may change the data", "loading/reward_function.call_reward",
           "_copies(data.get(key, prompts))", "list(data.get(key, prompts))",
           "unit/test_rollout.py::test_a_reward_works_on_copies"),
    Mutant("the keys of a dict are scores", "loading/reward_function.as_scores",
           "(Mapping, AbstractSet, *_TEXTS)", "(AbstractSet, *_TEXTS)",
           "unit/test_rollout.py::test_what_is_no_score_is_refused_in_one_line"),

    Mutant("one token that is not EOS has ended", "rollout.score_rollout",
           "bool(ids[-1] == eos_id) for", "bool(len(ids) == 1 or ids[-1] == eos_id) for",
           "unit/test_rollout.py::test_a_response_of_one_token_has_ended_only_if_that_is_eos"),

    Mutant("a reference with dropout", "rollout.score_rollout",
           "evaluating(policy, ref_policy)", "evaluating(policy)",
           "unit/test_rollout.py::test_scoring_is_without_dropout_and_the_modes_come_back"),

    # sft
    Mutant("prompts are imitated", "sft.batch_loss",
           "[x.prompt_ids for x in examples], [x.response_ids for x in examples]",
           "[x.prompt_ids[:1] for x in examples], "
           "[x.prompt_ids.new_tensor([*x.prompt_ids[1:], *x.response_ids]) for x in examples]",
           "unit/test_sft.py::test_prompt_tokens_get_no_loss"),
    Mutant("padding is imitated", "sft.batch_loss",
           "batch.mask)", "batch.mask | True)",
           "unit/test_sft.py::test_prompt_tokens_get_no_loss"),
    Mutant("trains without dropout", "sft.train",
           "policy.train()", "pass",
           "unit/test_sft.py::test_dropout_acts_in_training_whatever_the_mode_was_and_not_in_a_look"),
    Mutant('a micro-batch weighs as a batch', 'optim.accumulate',
           'found.loss * found.count / total', 'found.loss',
           'unit/test_sft.py::test_micro_batches_leave_the_gradient_as_it_is'),
    Mutant('micro-batches weigh alike', 'optim.accumulate',
           'mean * int(found.count) / total', 'mean',
           'unit/test_sft.py::test_evaluate_by_hand'),
    Mutant("looks with dropout", "sft.evaluate",
           "evaluating(policy)", "evaluating()",
           "unit/test_sft.py::test_evaluate_by_hand"),

    Mutant("the same dropout in each step", "sft.train",
           "dropout_rng(config.seed, state.step,", "dropout_rng(config.seed, 0,",
           "unit/test_sft.py::test_dropout_differs_from_step_to_step_and_from_seed_to_seed"),

    Mutant("each seed has the same dropout", "sft.train",
           "dropout_rng(config.seed, state.step,", "dropout_rng(0, state.step,",
           "unit/test_sft.py::test_dropout_differs_from_step_to_step_and_from_seed_to_seed"),
    Mutant("each look in float32", "sft.train",
           "with state.optimizer.autocast():\n                metrics",
           "if True:\n                metrics",
           "unit/test_precision.py::test_a_look_has_the_precision_of_the_run[sft]"),
    Mutant('the epochs before are not counted', 'data.Cursor.epochs',
           'self.epoch + ', '',
           'unit/test_sft.py::test_epochs_and_tokens_are_counted_on'),
    Mutant('passes of any size', 'sft.means',
           'max_tokens=config.max_tokens', 'max_tokens=1024',
           'unit/test_sft.py::test_a_pass_holds_no_more_than_max_tokens'),
    Mutant('any schedule is a linear one', 'optim.adamw',
           'else config.schedule', 'else "linear"',
           'unit/test_optim.py::test_what_a_config_says_reaches_the_optimizer[sft_state-cosine]'),
    Mutant('gradients are clipped at 1 whatever is said', 'optim.adamw',
           'max_grad_norm=config.max_grad_norm', 'max_grad_norm=1.0',
           'unit/test_optim.py::test_what_a_config_says_reaches_the_optimizer[sft_state-linear]'),

    # reward
    Mutant("chosen and rejected exchanged", "reward.batch_loss",
           "chosen, rejected = reward_model", "rejected, chosen = reward_model",
           "unit/test_reward.py::test_loss_and_metrics_by_hand"),
    Mutant("the margin is not handed on", "reward.batch_loss",
           "margin=margin", "margin=None",
           "unit/test_reward.py::test_loss_and_metrics_by_hand"),
    Mutant("pairs that nothing tells apart are kept", "reward.prepare_pairs",
           "not torch.equal(chosen.ids, rejected.ids)", "True",
           "unit/test_reward.py::test_pairs_that_are_the_same_tokens_are_left_out_and_counted"),
    Mutant('a micro-batch of pairs weighs as a batch', 'optim.accumulate',
           'found.loss * found.count / total', 'found.loss',
           'unit/test_reward.py::test_micro_batches_leave_the_gradient_as_it_is'),
    Mutant('scores may be infinite where the loss is 0', 'reward.train',
           'step(batch, metrics)', 'step(batch)',
           'unit/test_nonfinite.py::test_scores_that_are_infinite_stop_though_their_loss_is_0'),
    Mutant("looks with dropout", "reward.evaluate",
           "evaluating(reward_model)", "evaluating()",
           "unit/test_reward.py::test_evaluate_is_over_all_pairs_and_without_dropout"),
    Mutant("multiplied by the deviation", "reward.normalise",
           "gain=1 / std", "gain=std",
           "unit/test_reward.py::test_normalised_scores_survive_saving"),
    Mutant("the mean is not scaled", "reward.normalise",
           "-mean / std", "-mean",
           "unit/test_reward.py::test_normalised_scores_survive_saving"),
    Mutant('pairs of a small micro-batch weigh more', 'optim.accumulate',
           'mean * int(found.count) / total', 'mean',
           'unit/test_reward.py::test_evaluate_is_over_all_pairs_and_without_dropout'),

    Mutant("the same dropout in each step", "reward.train",
           "dropout_rng(config.seed, state.step,", "dropout_rng(config.seed, 0,",
           "unit/test_reward.py::test_dropout_differs_from_step_to_step_and_from_seed_to_seed"),

    Mutant("trains without dropout", "reward.train",
           "reward_model.train()", "pass",
           "unit/test_reward.py::test_when_held_out_pairs_are_looked_at_and_in_which_mode"),
    Mutant("no look at the end", "reward.train",
           " or state.step == total_steps", "",
           "unit/test_reward.py::test_when_held_out_pairs_are_looked_at_and_in_which_mode"),
    Mutant("the reward model's look in float32", "reward.train",
           "with state.optimizer.autocast():\n                metrics",
           "if True:\n                metrics",
           "unit/test_precision.py::test_a_look_has_the_precision_of_the_run[reward]"),
    Mutant("rounding is a difference of scores", "reward.normalise",
           "if not std > 1e-6:", "if not std > 0:",
           "unit/test_reward.py::test_scores_that_are_equal_but_for_rounding_cannot_be_normalised"),

    # dpo
    Mutant("dropout stays on", "dpo.new_state",
           "disable_dropout(policy)", "pass",
           "unit/test_dpo.py::test_dropout_is_off[True]"),
    Mutant("the cache holds the policy", "dpo.new_state",
           "cache_reference(ref_policy,", "cache_reference(policy,",
           "unit/test_dpo.py::test_training_is_the_plain_loop[True]"),
    Mutant("mean over tokens instead of sum", "dpo.response_logprobs",
           ".logprobs.sum(1)", ".logprobs.mean(1)",
           "unit/test_dpo.py::test_cache_holds_the_logprobs_of_each_pair_in_its_place"),
    Mutant("chosen and rejected exchanged", "dpo.response_logprobs",
           "chosen, rejected = policy", "rejected, chosen = policy",
           "unit/test_dpo.py::test_cache_holds_the_logprobs_of_each_pair_in_its_place"),
    Mutant("the policy for the reference", "dpo.batch_loss",
           "_reference(ref_policy,", "_reference(policy,",
           "unit/test_dpo.py::test_training_is_the_plain_loop[False]"),
    Mutant("label smoothing not handed on", "dpo.batch_loss",
           "label_smoothing=config.label_smoothing", "label_smoothing=0.0",
           "unit/test_dpo.py::test_training_is_the_plain_loop[True]"),
    Mutant("DPO's micro-batch weighs as a batch", 'optim.accumulate',
           'found.loss * found.count / total', 'found.loss',
           'unit/test_dpo.py::test_micro_batches_leave_the_gradient_as_it_is'),
    Mutant("the cache in the order of the groups", "dpo.cache_reference",
           "[cached[i] for i in range(len(examples))]", "list(cached.values())",
           "unit/test_dpo.py::test_cache_holds_the_logprobs_of_each_pair_in_its_place"),
    Mutant("a reference with dropout", "dpo._reference",
           "evaluating(ref_policy)", "evaluating()",
           "unit/test_dpo.py::test_a_reference_left_in_train_mode_has_no_dropout[False]"),
    Mutant("DPO's micro-batches weigh alike", 'optim.accumulate',
           'mean * int(found.count) / total', 'mean',
           'unit/test_dpo.py::test_micro_batches_leave_the_gradient_as_it_is'),

    Mutant("a partly cached reference is a whole one", "dpo._reference",
           "len(cached) == len(examples)", "cached",
           "unit/test_dpo.py::test_a_reference_that_is_cached_in_part_is_asked_for_all"),

    Mutant("a cached reference in float32", "dpo.new_state",
           "with optimizer.autocast():", "if True:",
           "unit/test_precision.py::test_bfloat16_is_near_float32_and_leaves_weights_and_losses_in_it"
           "[dpo_steps]"),
    Mutant("a cached reference of held-out pairs in float32", "dpo.train",
           "if config.cache_reference and heldout:\n        with state.optimizer.autocast():",
           "if config.cache_reference and heldout:\n        if True:",
           "unit/test_precision.py::test_a_cached_reference_of_held_out_pairs_has_the_precision_of_the"
           "_run"),
    Mutant("held-out pairs are not cached", "dpo.train",
           "if config.cache_reference and heldout:", "if False:",
           "unit/test_dpo.py::test_a_pass_holds_no_more_than_max_tokens[True]"),
    Mutant('held-out means over a batch', 'dpo.means',
           'total=len(examples)', 'total=config.batch_size',
           'unit/test_dpo.py::test_evaluate_by_hand'),

    # ppo
    Mutant("sign of the step to the batch's mean", "ppo.RunningMoments",
           "batch_mean - self.mean", "self.mean - batch_mean",
           "unit/test_ppo.py::test_running_moments_by_hand"),
    Mutant("batches weigh alike", "ppo.RunningMoments",
           "delta * n / total  # (2)", "delta / 2  # (2)",
           "unit/test_ppo.py::test_running_moments_by_hand"),
    Mutant("the batches' means do not vary", "ppo.RunningMoments",
           "batch_squares + delta**2 * self.count * n / total", "batch_squares",
           "unit/test_ppo.py::test_running_moments_by_hand"),
    Mutant("biased variance", "ppo.RunningMoments",
           "max(self.count - 1, 1)", "self.count",
           "unit/test_ppo.py::test_running_moments_by_hand"),
    Mutant("epsilon outside the root", "ppo.RunningMoments",
           "(variance + 1e-8) ** 0.5", "(variance**0.5 + 1e-8)",
           "unit/test_ppo.py::test_running_moments_are_those_of_all_scores"),
    Mutant("sampling starts again after a resume", "ppo.State.restore",
           'self.sampling_rng.set_state(state["sampling_rng"])', "pass",
           "unit/test_ppo.py::test_resume"),
    Mutant("dropout stays on", "ppo.new_state",
           "disable_dropout(policy)", "pass",
           "unit/test_ppo.py::test_dropout_is_off"),
    Mutant("the schedule counts rollouts", "ppo.new_state",
           "config.steps * config.epochs * config.minibatches", "config.steps",
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant("one random stream for two purposes", "ppo.new_state",
           "config.seed + 2 * 10**6", "config.seed + 10**6",
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant("scores are cut on one side", "ppo.judge",
           "clamp(-config.score_clip, config.score_clip)", "clamp(max=config.score_clip)",
           "unit/test_ppo.py::test_score_clip_and_eos_penalty[options1-last1]"),
    Mutant("a missing EOS is rewarded", "ppo.judge",
           "scores - config.eos_penalty", "scores + config.eos_penalty",
           "unit/test_ppo.py::test_score_clip_and_eos_penalty[options2-last2]"),
    Mutant("ended inverted", "ppo.judge",
           "torch.where(rollout.ended,", "torch.where(~rollout.ended,",
           "unit/test_ppo.py::test_score_clip_and_eos_penalty[options2-last2]"),
    Mutant("rewards in the padding", "ppo.judge",
           "rollout.kl, rollout.mask", "rollout.kl, rollout.mask | True",
           "unit/test_ppo.py::test_judge_by_hand"),
    Mutant("scaled rewards lose their mean", "ppo.judge",
           "masked_scale(rewards, rollout.mask)", "masked_whiten(rewards, rollout.mask)",
           "unit/test_ppo.py::test_judge_whitens_rewards_and_keeps_their_mean"),
    Mutant("advantages in the padding", "ppo.judge",
           "rollout.values, rollout.mask", "rollout.values, rollout.mask | True",
           "unit/test_ppo.py::test_judge_by_hand"),
    Mutant("gamma and lambda exchanged", "ppo.judge",
           "gamma=config.gamma, lam=config.lam", "gamma=config.lam, lam=config.gamma",
           "unit/test_ppo.py::test_judge_by_hand"),
    Mutant("whitened over padding too", "ppo.judge",
           "(advantages, rollout.mask)", "(advantages, rollout.mask | True)",
           "unit/test_ppo.py::test_judge_whitens_advantages_but_not_returns"),
    Mutant("returns of whitened advantages", "ppo.judge",
           "advantages, returns)\n", "advantages, advantages + rollout.values.nan_to_num())\n",
           "unit/test_ppo.py::test_judge_whitens_advantages_but_not_returns"),
    Mutant("the whole rollout's tokens are counted", "ppo.minibatch_step",
           "int(rollout.mask[rows].sum())", "int(rollout.mask.sum())",
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant("a pass larger than max_tokens", "ppo.minibatch_step",
           "rollout.sequences.attention_mask[rows]", "rollout.mask[rows]",
           "unit/test_ppo.py::test_micro_batches_leave_the_gradient_as_it_is[shared]"),
    Mutant("temperature missing in the update", "ppo.minibatch_step",
           "temperature=config.temperature", "temperature=1.0",
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant('new log-probabilities for the old', 'ppo.minibatch_step',
           'rollout.logprobs[cells]', 'new.logprobs.detach()',
           'unit/test_ppo.py::test_training_is_the_plain_loop[shared]'),
    Mutant('whitened for each minibatch', 'ppo.minibatch_step',
           'buffer.advantages[cells]', 'masked_whiten(buffer.advantages[cells], mask)',
           'unit/test_ppo.py::test_training_is_the_plain_loop[shared]'),
    Mutant("the policy loss ignores its mask", "ppo.minibatch_step",
           "mask,\n            clip=config.clip", "mask | True,\n            clip=config.clip",
           "unit/test_ppo.py::test_micro_batches_leave_the_gradient_as_it_is[shared]"),
    Mutant("the policy's clip for the values", "ppo.minibatch_step",
           "clip=config.value_clip", "clip=config.clip",
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant('returns for the old values', 'ppo.minibatch_step',
           'rollout.values[cells]', 'buffer.returns[cells]',
           'unit/test_ppo.py::test_training_is_the_plain_loop[shared]'),
    Mutant("a micro-batch weighs as a minibatch", "ppo.minibatch_step",
           "policy_loss.loss * share + ", "policy_loss.loss + ",
           "unit/test_ppo.py::test_micro_batches_leave_the_gradient_as_it_is[shared]"),
    Mutant("its values weigh as a minibatch's", 'ppo.minibatch_step',
           'value_loss.loss * share)', 'value_loss.loss)',
           'unit/test_ppo.py::test_micro_batches_leave_the_gradient_as_it_is[shared]'),
    Mutant("value_coef forgotten", "ppo.minibatch_step",
           "config.value_coef * value_loss.loss", "value_loss.loss",
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant("entropy of the padding", "ppo.minibatch_step",
           "masked_mean(new.entropy, mask)", "new.entropy.mean()",
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant("minibatches in the rollout's order", "ppo.ppo_epoch",
           "buffer.minibatches(order,", "buffer.minibatches(order.sort().values,",
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant("the same minibatches in each epoch", "ppo.ppo_update",
           "generator=rng)", "generator=torch.Generator().manual_seed(rng.initial_seed()))",
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant("stop_kl is never heeded", "ppo.ppo_update",
           'epochs[-1]["update_k1"] > config.stop_kl', "False",
           "unit/test_ppo.py::test_stop_kl_is_measured_in_the_last_epoch"),
    Mutant("stop_kl looks at the first epoch", "ppo.ppo_update",
           'epochs[-1]["update_k1"]', 'epochs[0]["update_k1"]',
           "unit/test_ppo.py::test_stop_kl_is_measured_in_the_last_epoch"),
    Mutant("scores normalised by the moments before", "ppo.train",
           "moments.update(rollout.scores)",
           "state.moments = RunningMoments(**vars(moments)); state.moments.update(rollout.scores)",
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant("the coefficient moves before its use", "ppo.train",
           "buffer = judge(",
           "state.kl_control.update(_per_response(rollout.kl, rollout.mask), config.batch_size); "
           "buffer = judge(",
           "unit/test_ppo.py::test_the_coefficient_in_use_is_the_one_from_before[adaptive]"),
    Mutant("max_kl is ignored", "ppo.train",
           'metrics["k1"] > config.max_kl', "False",
           "unit/test_ppo.py::test_max_kl_ends_the_run[0.001-1]"),
    Mutant("the report's mask inverted", "ppo.report",
           "buffer.rollout.mask", "~buffer.rollout.mask",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("padding in the returns' variance", "ppo.report",
           "masked_var(buffer.returns, mask)", "buffer.returns.var()",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("padding in the errors' variance", "ppo.report",
           "masked_var(buffer.returns - rollout.values, mask)",
           "(buffer.returns - rollout.values).var()",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("padding in the KL", "ppo.report",
           "_per_response(rollout.kl, mask)", "_per_response(rollout.kl, mask | True)",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("padding in k1", "ppo.report",
           "rollout.ref_logprobs, mask)", "rollout.ref_logprobs, mask | True)",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("padding in k3", "ppo.report",
           "_per_response(k3, mask)", "_per_response(k3, mask | True)",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("padding in the reward", "ppo.report",
           "_per_response(buffer.rewards, mask)", "_per_response(buffer.rewards, mask | True)",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("padding in the entropy", "ppo.report",
           "masked_mean(rollout.entropy, mask)", "rollout.entropy.mean()",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("padding in the value", "ppo.report",
           "masked_mean(rollout.values, mask)", "rollout.values.mean()",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("padding in the return", "ppo.report",
           "masked_mean(buffer.returns, mask)", "buffer.returns.mean()",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("the mask inverted", "ppo.evaluate",
           "rollout.ref_logprobs, rollout.mask)", "rollout.ref_logprobs, ~rollout.mask)",
           "unit/test_ppo.py::test_eval_prompts_are_looked_at_with_the_same_random_numbers"),
    Mutant("other random numbers in each look", "ppo.evaluate",
           "torch.Generator().manual_seed(config.seed + 3 * 10**6)", "torch.Generator()",
           "unit/test_ppo.py::test_eval_prompts_are_looked_at_with_the_same_random_numbers"),
    Mutant("per token, not per response", "ppo._per_response",
           ".sum(1).mean()", ".mean()",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("0 times NaN is NaN", "ppo._per_response",
           "torch.where(mask, x, 0)", "(x * mask)",
           "unit/test_ppo.py::test_report_never_looks_at_padding"),
    Mutant("the prompts' tokens are not counted", 'ppo.report',
           'rollout.sequences.attention_mask.sum()', 'rollout.mask.sum()',
           'unit/test_ppo.py::test_tokens_are_those_of_prompts_and_responses'),


    Mutant("the rate of the next step is reported", "ppo.train",
           '"learning_rate": learning_rate', '"learning_rate": state.optimizer.learning_rate',
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant("the smallest ratio_max of the minibatches", "ppo._mean_stats",
           'max(s["ratio_max"] for s in stats)', 'min(s["ratio_max"] for s in stats)',
           "unit/test_ppo.py::test_training_is_the_plain_loop[shared]"),
    Mutant("max_kl looks at the estimate in the rewards", "ppo.train",
           'metrics["k1"] > config.max_kl', 'metrics["kl"] > config.max_kl',
           "unit/test_ppo.py::test_max_kl_looks_at_k1_whatever_the_rewards_hold[k2]"),

    Mutant("the coefficient follows k1 alone", "ppo.train",
           'state.kl_control.update(metrics["kl"]', 'state.kl_control.update(metrics["k1"]',
           "unit/test_ppo.py::test_the_coefficient_follows_the_estimate_in_the_rewards[k2]"),
    Mutant("stop_kl looks at k3", "ppo.ppo_update",
           'epochs[-1]["update_k1"]', 'epochs[-1]["update_k3"]',
           "unit/test_ppo.py::test_stop_kl_is_a_limit_of_k1"),
    Mutant("a look reports the estimate in the rewards", "ppo.evaluate",
           "_per_response(rollout.logprobs - rollout.ref_logprobs, rollout.mask)",
           "_per_response(rollout.kl, rollout.mask)",
           "unit/test_ppo.py::test_eval_prompts_are_looked_at_with_the_same_random_numbers"),
    Mutant("single words are counted as pairs", "ppo.evaluate",
           "distinct_n(rollout.responses, 2)", "distinct_n(rollout.responses, 1)",
           "unit/test_ppo.py::test_eval_prompts_are_looked_at_with_the_same_random_numbers"),
    Mutant('a rollout in float32', 'ppo.train',
           'with state.optimizer.autocast():\n            rollout', 'if True:\n            rollout',
           'unit/test_precision.py::test_a_rollout_has_the_precision_of_the_run'),
    Mutant("PPO's evaluation in float32", 'ppo.train',
           'with state.optimizer.autocast():\n                metrics',
           'if True:\n                metrics',
           'unit/test_precision.py::test_a_look_has_the_precision_of_the_run[ppo]'),
    Mutant("a fixed coefficient is the saved one", "ppo.State.restore",
           "if isinstance(self.kl_control, AdaptiveKL):", "if True:",
           "unit/test_ppo.py::test_a_fixed_coefficient_is_the_configs_after_a_resume_too"),
    Mutant('rows at fault are looked for at temperature 1', 'harness/stages/ppo.alone',
           'temperature=config.temperature', 'temperature=1.0',
           "unit/test_ppo.py"
           "::test_the_rows_at_fault_are_looked_for_where_they_were_learned_from"),
    Mutant('an adaptive coefficient may turn negative', 'config.PPOConfig.__post_init__',
           'self.kl_horizon > 0.2 * self.batch_size', 'True',
           'unit/test_ppo.py::test_what_cannot_be_trained_with_is_refused'),
    Mutant('a single score is whitened', 'config.PPOConfig',
           'at_least=2', 'at_least=1',
           'unit/test_ppo.py::test_what_cannot_be_trained_with_is_refused'),
    Mutant("moments in the scores' own precision", "ppo.RunningMoments",
           "scores.cpu().double()", "scores.cpu()",
           "unit/test_ppo.py::test_running_moments_of_float32_scores_are_sums_in_float64"),
    Mutant('scoring passes of any size', 'rollout.collect',
           'max_tokens=config.max_tokens', 'max_tokens=1024',
           'unit/test_ppo.py::test_a_rollout_and_its_update_pass_no_more_than_max_tokens'),

    # optim
    Mutant("a sparse gradient stays sparse", "optim.Optimizer.step",
           "p.grad = p.grad.to_dense()", "p.grad = None",
           "unit/test_optim.py::test_a_sparse_gradient_is_stepped_like_a_dense_one"),
    Mutant("fp16 loses small gradients", "optim.Optimizer.backward",
           "self.scaler.scale(loss).backward()", "loss.backward()",
           "unit/test_optim.py::test_fp16_scales_the_loss_and_skips_an_overflow"),
    Mutant("clipped before it is unscaled", "optim.Optimizer.step",
           "self.scaler.unscale_(self.optimizer)", "pass",
           "unit/test_optim.py::test_fp16_scales_the_loss_and_skips_an_overflow"),
    Mutant("never clipped", "optim.Optimizer.step",
           "norm > self.max_grad_norm", "False",
           "unit/test_optim.py::test_a_long_gradient_is_scaled_down_as_a_whole"),
    Mutant('a gradient of NaN is stepped', 'optim.Optimizer._require_finite',
           'fault is None and math.isfinite(norm)', 'fault is None',
           'unit/test_optim.py::test_a_gradient_that_is_not_finite_raises_before_the_step[nan]'),
    Mutant("the schedule is ahead of the optimizer", "optim.Optimizer.step",
           "self.optimizer.step()", "pass",
           "unit/test_optim.py::test_a_first_step_that_is_skipped_moves_the_schedule_alone"),
    Mutant('skips where it is to stop', 'optim.Optimizer._require_finite',
           'and self.precision == "fp16"', '',
           'unit/test_nonfinite.py::test_a_gradient_names_its_parameter[sft_run]'),
    Mutant('skips for ever', 'optim.Optimizer._require_finite',
           'expected and self.skipped_in_a_row < MAX_OVERFLOWS', 'expected',
           'unit/test_nonfinite.py::test_under_fp16_so_many_overflows_in_a_row_are_no_accident'),
    Mutant('a good step is no end of a row', 'optim.Optimizer._require_finite',
           'self.skipped_in_a_row = 0', 'pass',
           'unit/test_nonfinite.py::test_a_good_step_between_starts_the_count_again'),
    Mutant('under fp16 a loss may be infinite', 'optim.Optimizer._require_finite',
           'fault is None and self.precision', 'self.precision',
           'unit/test_nonfinite.py::test_under_fp16_only_the_gradient_may_overflow'),
    Mutant("a resume forgets what was skipped", "optim.Optimizer.load_state_dict",
           'state["steps"], state["skipped"]', 'state["steps"], 0',
           "unit/test_optim.py::test_a_resume_keeps_the_scale_of_fp16_and_how_often_was_skipped"),
    Mutant("the gradient is not cleared", "optim.Optimizer.step",
           "self.scaler.update()\n        self.optimizer.zero_grad(set_to_none=True)",
           "self.scaler.update()\n        pass",
           "unit/test_optim.py::test_gradients_of_micro_batches_add_up_and_are_cleared_by_the_step"),
    Mutant("the schedule is never stepped", "optim.Optimizer.step",
           "self.scheduler.step()", "pass",
           "unit/test_optim.py::test_schedule[linear-rates1]"),
    Mutant("biases decay", "optim.adamw",
           '"weight_decay": 0.0', '"weight_decay": config.weight_decay',
           "unit/test_optim.py::test_adamw_is_its_formula_and_only_matrices_decay[1e-08]"),
    Mutant("adam_eps not handed on", "optim.adamw",
           "eps=eps", "eps=1e-8",
           "unit/test_optim.py::test_adamw_is_its_formula_and_only_matrices_decay[0.01]"),
    Mutant("frozen weights are given to the optimizer", "optim.adamw",
           " if p.requires_grad]", "]",
           "unit/test_optim.py::test_adamw_is_its_formula_and_only_matrices_decay[0.01]"),
    Mutant('warm-up rounded down', 'optim.adamw',
           'round(config.warmup_share * total_steps)', 'int(config.warmup_share * total_steps)',
           'unit/test_optim.py::test_the_warm_up_is_the_nearest_number_of_steps'),
    Mutant('warm-up rounded up', 'optim.adamw',
           'round(config.warmup_share * total_steps)',
           '-int(-config.warmup_share * total_steps // 1)',
           'unit/test_optim.py::test_the_warm_up_is_the_nearest_number_of_steps'),
    Mutant("the same dropout in each step", "optim.dropout_rng",
           "1_000_003 * (step + 1) + seed", "seed",
           "unit/test_optim.py::test_dropout_differs_from_step_to_step_and_from_seed_to_seed"),
    Mutant("dropout uses up global randomness", "optim.dropout_rng",
           'with torch.random.fork_rng([device] if device.type == "cuda" else []):', "if True:",
           "unit/test_sft.py::test_dropout_acts_and_leaves_the_global_generator_alone"),
    Mutant("a resume starts with fp16's first scale", "optim.Optimizer.load_state_dict",
           'if state["scaler"]:', "if False:",
           "unit/test_optim.py::test_a_resume_keeps_the_scale_of_fp16_and_how_often_was_skipped"),
    Mutant("a resume may skip as often again", "optim.Optimizer.state_dict",
           '"skipped_in_a_row": self.skipped_in_a_row', '"skipped_in_a_row": 0',
           "unit/test_optim.py::test_a_resume_keeps_the_scale_of_fp16_and_how_often_was_skipped"),
    Mutant("Adam's moments are lost in a resume", "optim.State.restore",
           'self.optimizer.load_state_dict(state["optimizer"])', "pass",
           "unit/test_dpo.py::test_resume"),

    # what decides in the harness
    Mutant("NaN is within any limit", "harness/preflight.Check.passed",
           "self.value <= self.limit", "not self.value > self.limit",
           "harness/test_preflight.py::test_a_check_passes_up_to_its_limit"),
    Mutant("only chosen responses are looked at", "harness/preflight.eos_supervised",
           "// LOOKED_AT) | 1]", "// LOOKED_AT)]",
           "harness/test_preflight.py::test_eos_is_looked_for_on_both_sides_of_many_pairs"),
    Mutant("preflight forgets the temperature", "harness/stages/ppo.ratio_is_one",
           "temperature=config.temperature", "temperature=1.0",
           "harness/test_preflight.py::test_the_ratio_is_1_at_any_temperature"),
    Mutant("preflight draws from the run's random numbers", "harness/preflight.untouched",
           "np.random.set_state(drawn[1])", "pass",
           "harness/test_preflight.py::test_what_a_reward_function_draws_is_put_back"),
    Mutant("DPO is said to begin with another loss", "dpo.first_loss",
           "math.log(2)", "1.0",
           "unit/test_dpo.py::test_a_cached_start_is_a_tie_but_for_rounding"),
    Mutant("the largest loss is the best", "harness/run/saving.StageSaver._sign",
           '== "lower"', '== "higher"',
           "harness/test_resume.py::test_the_best_model_is_kept"),
    Mutant("the smallest KLs are shown", "harness/stages/ppo.too_far",
           "k1.argsort(descending=True)", "k1.argsort()",
           "harness/test_stages.py::test_a_kl_that_is_too_large_shows_its_samples"),
    Mutant("tokens are clipped on one side", "harness/report/tokens.token_rows",
           "min(max(ratio, 1 - config.clip), 1 + config.clip)", "min(ratio, 1 + config.clip)",
           "harness/test_tokens.py::test_clipped_tokens_are_those_of_the_policy_loss"),
    Mutant("tokens at another temperature", "harness/report/tokens.token_rows",
           "temperature=config.temperature", "temperature=1.0",
           "harness/test_tokens.py::test_logprobs_are_those_of_the_row_alone"),
    Mutant("rewards are not weighed", "harness/rewards.WeightedSum.__call__",
           "weight * self._scores[name]", "self._scores[name]",
           "harness/test_rewards.py::test_a_weighted_sum_of_functions_and_a_model"),
    Mutant("the parts of another batch's texts", "harness/rewards.WeightedSum._part",
           "if self._texts != (prompts, responses):", "if self._texts is None:",
           "harness/test_rewards.py::test_the_parts_are_watched_without_scoring_again"),
    Mutant("a reward may move the working folder", "harness/rewards._process_unchanged",
           "put_back(value)", "pass",
           "harness/test_rewards.py::test_what_belongs_to_the_process_is_put_back_and_told_once"),
    Mutant("a held-out share is rounded down", "harness/rows/load.split_rows",
           "round(heldout_share * len(rows))", "int(heldout_share * len(rows))",
           "harness/test_datafile.py::test_split_sizes_of_single_rows"),
    Mutant("a single place outside is an excursion", "harness/report/curves.excursion",
           "end - place >= IN_A_ROW", "end - place >= 1",
           "harness/test_html.py::test_excursions"),
    Mutant("an adaptive KL is held to a fixed range", "harness/stages/ppo.kl_range",
           '2 * config["kl_target"] if', "15 if",
           "harness/test_html.py::test_an_adaptive_kl_may_go_to_twice_its_target"),
    Mutant("a ratio at the limit is a spike", "harness/stages/ppo.findings",
           "ratio > RATIO_LIMIT", "ratio >= RATIO_LIMIT",
           "harness/test_findings.py::test_ratio_spikes_are_counted_with_their_steps_and_the_largest"),
    Mutant("a score that may have fallen by chance fell", "harness/stages/ppo.improvement",
           'change["mean"] < -SURE * change["error"]', 'change["mean"] < 0',
           "harness/test_findings.py::test_a_score_that_did_not_rise"),
    Mutant("any rise of the score is enough", "harness/stages/ppo.improvement",
           'change["mean"] > SURE * change["error"]', 'change["mean"] > 0',
           "harness/test_findings.py::test_a_score_that_did_not_rise"),
    Mutant("a held-out loss may rise", "harness/stages/sft.findings",
           "losses[-1] > RISE * lowest", "losses[-1] > RISE * losses[0]",
           "harness/test_findings.py::test_a_held_out_loss_that_turns_up_is_told_once"),
    Mutant("any gap is learning by heart", "harness/stages/dpo.findings",
           "not overlap and by_heart(trained[\"mean\"], held_out)", "not overlap",
           "harness/test_findings.py::test_dpo_that_knows_its_own_pairs_only"),
    Mutant("a guess is judged by the mean", "harness/stages/dpo.findings",
           'held_out["ci95"][0] <= 0.5', 'held_out["mean"] < 0.5',
           "harness/test_findings.py::test_dpo_that_knows_its_own_pairs_only"),
    Mutant('a row at fault is named twice', 'harness/run/faults.first_nonfinite',
           'sorted(numbers)', 'sorted(numbers) * 2',
           'unit/test_nonfinite.py::test_a_rollout_that_is_not_finite_is_named'),
    Mutant('padding is learned from', 'ppo.minibatch_step',
           'mask = sequences.mask', 'mask = torch.ones_like(sequences.mask)',
           'unit/test_ppo.py::test_training_is_the_plain_loop[shared]'),
    Mutant('the values of padding are learned', 'ppo.minibatch_step',
           'mask,\n            clip=config.value_clip',
           'torch.ones_like(mask),\n            clip=config.value_clip',
           'unit/test_ppo.py::test_training_is_the_plain_loop[shared]'),
]
# fmt: on


# The list against the source


def definition(path: Path, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The function or class of this dotted name, such as "Policy.forward"."""
    node: ast.AST = tree(path)
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        if node is None:
            raise ValueError(f"{path.name} has no {name}")
    return node


def code_lines(path: Path, name: str) -> tuple[int, int]:
    """The first and the last line of a function or class, without signature and docstring."""
    node = definition(path, name)
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[0].lineno, node.end_lineno


def equations() -> Iterator[tuple[Path, int, str]]:
    """Each equation number of a tagged function or class: the line of code that carries it."""
    for path in (PACKAGE / f"{module}.py" for module in EQUATIONS):
        for node in definitions(path):
            if TAG.search(ast.get_docstring(node) or ""):
                for line, comment in comments(path).items():
                    if node.lineno <= line <= node.end_lineno:
                        for number in NUMBER.findall(comment):
                            yield path, line, f"equation ({number}) of {node.name}"


def masks() -> Iterator[tuple[Path, int, str]]:
    """Each line of code that reads a mask, other than its shape."""
    for path in (PACKAGE / f"{module}.py" for module in MASKS):
        nodes = list(ast.walk(tree(path)))
        parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
        for node in nodes:
            name = getattr(node, "id", getattr(node, "attr", ""))
            is_read = isinstance(getattr(node, "ctx", None), ast.Load)
            of_shape = getattr(parents.get(node), "attr", "") == "shape"
            if re.search(r"(^|_)mask$", name) and is_read and not of_shape:
                yield path, node.end_lineno, f"{name} is read"


def names_of_tests(file: str) -> set[str]:
    path = TESTS / file
    nodes = tree(path).body if path.is_file() else []
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def misfits(mutants: Sequence[Mutant]) -> list[str]:
    """Which mutants cannot be made, stand twice, or name a test that is not there."""
    found, labels = [], set()
    for mutant in mutants:
        label = f"{mutant.where}: {mutant.fear}"
        try:
            ast.parse(mutant.source())
        except (ValueError, SyntaxError) as error:
            found.append(f"{label}: {error}")
        if label in labels:
            found.append(f"{label}: stands twice")
        labels.add(label)
        file, _, name = mutant.test.partition("::")
        if name.partition("[")[0] not in names_of_tests(file):
            found.append(f"{label}: no test {mutant.test}")
    return found


def gaps(mutants: Sequence[Mutant]) -> list[str]:
    """Which equations and which readings of a mask no mutant changes."""
    changed = {(mutant.path, mutant.line) for mutant in mutants}
    return [
        f"{path.relative_to(ROOT)}:{line}: {what}, and no mutant changes it"
        for path, line, what in sorted({*equations(), *masks()})
        if (path, line) not in changed
    ]


# Running


class Verdict:
    """A pytest plugin: what the failed tests raised."""

    def __init__(self) -> None:
        self.raised: list[type[BaseException]] = []

    def pytest_exception_interact(self, call: pytest.CallInfo) -> None:
        self.raised.append(call.excinfo.type)


class Finder:
    """Finds one module of the package with other text than its file has."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = f"rlhf_min.{mutant.where.partition('.')[0].replace('/', '.')}"
        self.path, self.text = str(mutant.path), mutant.source()

    def find_spec(self, name: str, _path: object, _target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        loader = SourceFileLoader(name, self.path)
        loader.get_code = lambda _name: compile(self.text, self.path, "exec")
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


Job = tuple[Sequence[str], Mutant | None]
CAUGHT, SURVIVED, BROKEN = 0, 1, 2


def run_tests(tests: Sequence[str], mutant: Mutant | None) -> int:
    """In a process of its own: do the tests fail? Only by their assertions, or the mutant is
    broken: a name that does not exist proves nothing."""
    if mutant is not None:
        sys.meta_path.insert(0, Finder(mutant))
    verdict = Verdict()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=native"]
    code = pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[verdict])
    if code == pytest.ExitCode.OK:
        return SURVIVED
    by_assertion = [issubclass(e, (AssertionError, pytest.fail.Exception)) for e in verdict.raised]
    failed = code == pytest.ExitCode.TESTS_FAILED
    return CAUGHT if failed and all(by_assertion) else BROKEN


class Outcome(NamedTuple):
    status: int
    seconds: float
    output: str


def start(job: Job, log: Path) -> int:
    """Run these tests in a process of its own, which writes to the log; returns its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = BROKEN
        try:
            signal.alarm(SECONDS)
            output = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = run_tests(*job)
            sys.stdout.flush()
        finally:
            os._exit(status)
    return pid


def outcomes(jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Of each job, in their order, `WORKERS` of them at once."""
    running: dict[int, tuple[int, float]] = {}
    done: dict[int, Outcome] = {}
    waiting = deque(range(len(jobs)))
    with tempfile.TemporaryDirectory() as folder:
        for wanted in range(len(jobs)):
            while wanted not in done:
                while waiting and len(running) < WORKERS:
                    job = waiting.popleft()
                    running[start(jobs[job], Path(folder, str(job)))] = job, time.perf_counter()
                pid, status = os.wait()
                job, began = running.pop(pid)
                seconds = time.perf_counter() - began
                output = Path(folder, str(job)).read_text(encoding="utf-8", errors="replace")
                done[job] = Outcome(os.waitstatus_to_exitcode(status), seconds, output)
            yield done.pop(wanted)


def preload(paths: Sequence[Path]) -> None:
    """Import once, before the processes part, what these files import of other libraries."""
    files = [*TESTS.glob("*.py"), *(ROOT / "examples").glob("*.py")]
    ours = {"rlhf_min", "benchmark", *(path.stem for path in files)}
    for path in paths:
        for node in tree(path).body:
            match node:
                case ast.Import(names=[ast.alias(name=name)]):
                    pass
                case ast.ImportFrom(module=str(name), level=0):
                    pass
                case _:
                    continue
            if name.partition(".")[0] not in ours:
                exec(compile(ast.Module([node], []), str(path), "exec"), {})


COLUMNS = (("mutant", 30), ("file and line", 15), ("what was changed", 60), ("test", 52), ("s", 4))


def row(*cells: str) -> str:
    """A row of the table; what does not fit into a cell goes on below."""
    wrapped = [
        textwrap.wrap(cell, width, subsequent_indent="  ") or [""]
        for cell, (_, width) in zip(cells, COLUMNS, strict=True)
    ]
    height = max(map(len, wrapped))
    return "\n".join(
        " | ".join(
            (lines[i] if i < len(lines) else "").ljust(width)
            for lines, (_, width) in zip(wrapped, COLUMNS, strict=True)
        ).rstrip()
        for i in range(height)
    )


def main() -> int:
    os.chdir(ROOT)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True
    began = time.perf_counter()
    if wrong := misfits(MUTANTS) or gaps(MUTANTS):
        print("\n".join(wrong))
        return 1
    tests = sorted({mutant.test for mutant in MUTANTS})
    preload([*PACKAGE.rglob("*.py"), *TESTS.glob("*.py")])
    torch.set_num_threads(1)
    gc.freeze()  # or each process would copy what the garbage collector touches

    (plain,) = outcomes([(tests, None)])
    if plain.status != SURVIVED:
        print(plain.output)
        print("the named tests must pass while nothing is changed, or the table means nothing")
        return 1

    print(row(*(name for name, _ in COLUMNS)))
    print("-|-".join("-" * width for _, width in COLUMNS))
    survivors = []
    jobs: list[Job] = [([mutant.test], mutant) for mutant in MUTANTS]
    for mutant, outcome in zip(MUTANTS, outcomes(jobs), strict=True):
        caught = outcome.status == CAUGHT
        if not caught:
            survivors.append((mutant, outcome))
        change = f"{' '.join(mutant.old.split())} -> {' '.join(mutant.new.split())}"
        place = f"{mutant.path.name}:{mutant.line}"
        test = mutant.test if caught else f"NOT CAUGHT: {mutant.test}"
        print(row(mutant.fear, place, change, test, f"{outcome.seconds:.1f}"), flush=True)
    for mutant, outcome in survivors:
        what = {SURVIVED: "survived", -signal.SIGALRM: f"took over {SECONDS} s"}.get(
            outcome.status, "broke the test instead of failing it"
        )
        print(f"\n{mutant.path.name}:{mutant.line}: {mutant.fear!r} {what}: {mutant.test}")
        if outcome.status == BROKEN:
            print(textwrap.indent(outcome.output[-2000:], "    "))
    seconds = time.perf_counter() - began
    print(f"\n{len(MUTANTS)} mutants, {len(MUTANTS) - len(survivors)} caught, {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
