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
EQUATIONS = [name for floor in FLOORS[:EQUATION_FLOORS] for name in floor] + [
    "online",
    "ppo",
    "kto",
]
MASKS = [*EQUATIONS, "data", "policy", "reward_model", "sampling", "rollout"]
MASKS += ["sft", "dpo", "kto", "grpo", "rloo"]
WORKERS, SECONDS = 2, 120  # at once; the most that one of them may take


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


class Mutant(NamedTuple):
    """What is feared, the function it happens in, what stands there once, what stands there
    instead, and the test that must not pass then."""

    fear: str
    where: str  # "kl.AdaptiveKL" is in rlhf_min/kl.py, "harness/cli.parse" is in the harness
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


# A place, the test that must not pass, and what is feared: (fear, old, new).
# fmt: off
TABLE = [
    # masking
    ("masking.response_mask", "unit/test_masking.py::test_response_mask_closed",
     ("padding begins one late", "< lengths[:, None]", "<= lengths[:, None]"),
     ("the last token is left out", "< lengths[:, None]", "< lengths[:, None] - 1")),
    ("masking.masked_mean", "unit/test_masking.py::test_masking_errors_too_few",
     ("a mean of no token is NaN", "at_least=1", "at_least=0")),
    ("masking.masked_mean", "unit/test_masking.py::test_masked_mean_closed",
     ("mean over rows instead of tokens",
      "torch.where(mask, x, 0).sum() / n", "(torch.where(mask, x, 0).sum(1) / mask.sum(1)).mean()"),
     ("sum instead of mean", ".sum() / n", ".sum()"),
     ("padding in the sum", "torch.where(mask, x, 0).sum()", "x.sum()")),
    ("masking.masked_mean", "unit/test_masking.py::test_masked_mean_closed_nan_in_the_padding",
     ("0 times NaN is NaN", "torch.where(mask, x, 0)", "(x * mask)")),
    ("masking.masked_var", "unit/test_masking.py::test_masking_errors_too_few",
     ("variance of one value", "at_least=2", "at_least=1")),
    ("masking.masked_var", "unit/test_masking.py::test_masked_var_closed",
     ("padding has a deviation",
      "torch.where(mask, x - masked_mean(x, mask), 0)", "x - masked_mean(x, mask)"),
     ("biased variance", "/ (n - 1)", "/ n")),
    ("masking.masked_whiten", "unit/test_masking.py::test_masked_whiten_and_scale_closed",
     ("padding is whitened too",
      "torch.where(mask, x - masked_mean(x, mask), 0)", "x - masked_mean(x, mask)"),
     ("divided by the variance", "torch.rsqrt(", "torch.reciprocal(")),
    ("masking.masked_whiten",
     "unit/test_masking.py::test_masked_whiten_closed_epsilon_is_inside_the_root",
     ("epsilon outside the root",
      "* torch.rsqrt(masked_var(x, mask) + 1e-8)", "/ (masked_var(x, mask).sqrt() + 1e-8)")),
    ("masking.masked_scale", "unit/test_masking.py::test_masked_whiten_and_scale_closed",
     ("scaling moves the mean",
      "masked_whiten(x, mask) + masked_mean(x, mask)", "masked_whiten(x, mask)"),
     ("the mean lands in the padding",
      "torch.where(mask, masked_whiten(x, mask) + masked_mean(x, mask), 0)",
      "masked_whiten(x, mask) + masked_mean(x, mask)")),
    ("masking._count", "unit/test_masking.py::test_masked_mean_closed",
     ("padding is counted", "mask.sum()", "torch.tensor(mask.numel())")),

    # logprobs
    ("logprobs.token_logprobs", "unit/test_logprobs.py::test_token_logprobs_closed",
     ("not normalised", "chosen - logits.logsumexp(-1)", "chosen")),
    ("logprobs.token_logprobs", "unit/test_logprobs.py::test_token_logprobs_property_extreme",
     ("log of the sum overflows", "logits.logsumexp(-1)", "logits.exp().sum(-1).log()")),
    ("logprobs.token_logprobs", "unit/test_logprobs.py::test_token_logprobs_dtype",
     ("half precision stays", "logits = at_least_float32(logits)", "pass")),
    ("logprobs.entropy", "unit/test_logprobs.py::test_entropy_closed",
     ("sign of the mean logit", "- mean_logit", "+ mean_logit"),
     ("0 times minus infinity", "torch.where(probabilities > 0, logits, 0)", "logits")),
    ("logprobs.label_logprob", "unit/test_logprobs.py::test_label_logprob_closed",
     ("the label's logit itself", "logits[:, label] - logits.logsumexp(-1)", "logits[:, label]"),
     ("another label than was asked for",
      "logits[:, label] - logits.logsumexp(-1)", "logits[:, -1] - logits.logsumexp(-1)"),
     ("the probability that it is not", "logsigmoid(logits[:, label])",
      "logsigmoid(-logits[:, label])")),
    ("logprobs.label_logprob",
     "unit/test_logprobs.py::test_label_logprob_dtype_and_extremes[given_dtype0-dtype0-True]",
     ("probabilities in half precision", "logits = at_least_float32(logits)", "pass")),
    ("logprobs.lm_head_logits", "unit/test_logprobs.py::test_lm_head_logits_closed",
     ("the head's bias forgotten", "logits if bias is None else logits + bias", "logits"),
     ("the model's scale forgotten", "else scale * logits", "else logits"),
     ("the cap only squashes", "softcap * torch.tanh(", "torch.tanh("),
     ("temperature forgotten", "else logits / temperature", "else logits"),
     ("temperature the wrong way", "else logits / temperature", "else logits * temperature")),
    ("logprobs.lm_head_logprobs", "unit/test_logprobs.py::test_lm_head_logprobs_closed",
     ("temperature not handed on", "temperature=temperature", "temperature=1.0")),
    ("logprobs.lm_head_logprobs", "unit/test_logprobs.py::test_lm_head_logprobs_property_memory",
     ("the logits of all chunks are kept",
      "if len(chunks) == 1 or not torch.is_grad_enabled():", "if True:")),
    ("logprobs._LogprobsAndEntropy", "unit/test_logprobs.py::test_lm_head_logprobs_gradient_stops",
     ("the entropy carries gradient", "ctx.mark_non_differentiable(entropy)", "pass")),
    ("logprobs._LogprobsAndEntropy", "unit/test_logprobs.py::test_lm_head_logprobs_definition",
     ("the total is left out",
      "logits.gather(-1, tokens[:, None]) - log_total", "logits.gather(-1, tokens[:, None])")),
    ("logprobs._LogprobsAndEntropy",
     "unit/test_logprobs.py::test_the_entropy_of_a_logit_of_minus_infinity",
     ("minus infinity times 0",
      "logits.clamp(min=torch.finfo(logits.dtype).min)", "logits.clone()")),
    ("logprobs._LogprobsAndEntropy",
     "unit/test_policy.py::test_gradients_are_those_of_the_plain_computation[gpt2-1024]",
     ("the gradient's sign", "probabilities * -grad", "probabilities * grad"),
     ("the gradient of the token itself",
      "gradient.scatter_add_(-1, tokens[:, None], grad[:, None])", "gradient")),

    # distributed
    ("distributed.deal",
     "unit/test_distributed.py::test_parts_go_round_and_results_come_back_in_order",
     ("each process does all parts from its own on",
      "parts[_world.rank :: _world.size]", "parts[_world.rank :]"),
     ("all processes do the parts of the first",
      "parts[_world.rank :: _world.size]", "parts[:: _world.size]"),
     ("results in the order of the processes",
      "gathered[i % _world.size][0][i // _world.size]",
      "sum((done for done, _ in gathered), [])[i]")),
    ("distributed.deal",
     "unit/test_distributed.py::test_sharded_weights_make_as_many_rounds_everywhere",
     ("whoever has no part left is missed by the others", "if _world.sharded and len(mine)",
      "if False and len(mine)"),
     ("one process makes a round too many", "< -(-len(parts) // _world.size)",
      "<= len(parts) // _world.size")),
    ("distributed.deal",
     "unit/test_distributed.py::test_with_sharded_weights_nobody_waits_for_an_error",
     ("an error waits for processes that are in a forward pass",
      "if _world.sharded:  # in a forward pass of theirs", "if False:")),
    ("distributed.deal", "unit/test_distributed.py::test_what_one_raises_is_raised_everywhere",
     ("an error that cannot be made anew stops all others in another one",
      "_sendable(error)", "error")),
    ("distributed.deal",
     "unit/test_distributed.py::test_of_several_errors_that_of_the_first_part_is_raised",
     ("of several errors each process raises its own",
      "source == _world.rank and error is not None", "error is not None")),
    ("distributed._keep_company",
     "unit/test_distributed.py::test_sharded_weights_make_as_many_rounds_everywhere",
     ("what another process has done is done twice", "_world.idle = True", "pass")),
    ("distributed.on_main",
     "unit/test_distributed.py::test_the_first_alone_does_it_and_all_have_it",
     ("all do what one should", "if is_main():", "if True:")),
    ("distributed._on_its_own",
     "unit/test_distributed.py::test_what_a_part_asks_for_it_does_itself",
     ("what is called in a part is dealt out again", "_world.alone = True", "pass")),
    ("distributed.largest", "unit/test_distributed.py::test_all_agree_if_one_says_so",
     ("all must say so", "ReduceOp.MAX", "ReduceOp.MIN")),
    ("distributed.sum_gradients",
     "unit/test_distributed.py::test_a_process_without_a_gradient_adds_nothing",
     ("a gradient that one process lacks is not summed", "ReduceOp.MAX", "ReduceOp.MIN"),
     ("who has no gradient adds ones", "torch.zeros_like(p)", "torch.ones_like(p)")),
    ("distributed.sum_gradients",
     "unit/test_distributed.py::test_sharded_weights_are_summed_elsewhere",
     ("sharded gradients are summed twice", "or _world.sharded:", "or False:")),
    ("distributed.sum_gradients",
     "unit/test_distributed.py::test_large_gradients_are_summed_where_they_are_and_small_ones_in_one_message",
     ("a message for each gradient", ">= LARGE", ">= 0")),
    ("distributed.sum_gradients", "unit/test_distributed.py::test_gradients_are_summed",
     ("the largest gradient instead of the sum",
      "dist.all_reduce(flat)", "dist.all_reduce(flat, dist.ReduceOp.MAX)"),
     ("the mean of the processes", "summed.view_as(grad)", "summed.view_as(grad) / _world.size"),
     ("the sum is forgotten", "grad.copy_(", "grad.clone().copy_(")),
    ("optim.Optimizer.step",
     "distributed/test_same_numbers.py::test_two_forks_have_the_numbers_of_one[parallel-sft]",
     ("each process steps by its own gradient",
      "distributed.sum_gradients(self.parameters)", "pass")),
    ("optim.Optimizer.step",
     "distributed/test_same_numbers.py::test_two_forks_have_the_numbers_of_one[parallel-ppo]",
     ("each process clips its own gradient",
      "distributed.sum_gradients(self.parameters)",
      "nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm); "
      "distributed.sum_gradients(self.parameters)")),
    ("optim.accumulate",
     "distributed/test_same_numbers.py::test_two_forks_have_the_numbers_of_one[parallel-sft]",
     ("dropout goes on from one micro-batch to the next",
      "if dropout is None else dropout(number)",
      "if dropout is None or number else dropout(number)"),
     ("the micro-batches of dropout depend on the processes",
      "if dropout is None else 1", "if True else 1")),
    ("optim.Optimizer.backward",
     "distributed/test_same_numbers.py::test_two_forks_have_the_numbers_of_one[sharded-sft]",
     ("who only keeps company adds its gradient", "if distributed.is_idle():", "if False:")),
    ("speed/sharding.shard",
     "distributed/test_same_numbers.py::test_two_forks_have_the_numbers_of_one[sharded-sft]",
     ("split gradients are means", "set_gradient_divide_factor(1.0)",
      "set_gradient_divide_factor(2.0)")),
    ("optim.dropout_rng",
     "unit/test_optim.py::test_dropout_differs_with_seed_step_and_micro_batch",
     ("each micro-batch drops the same", "2_860_486_313", "2**40")),
    ("errors.NonFinite.__reduce__",
     "unit/test_distributed.py::test_what_goes_with_an_error_arrives_with_it",
     ("an error loses its rows on the way", "self.batch, self.rows", "self.batch")),

    # rejection
    ("rejection.choose_responses",
     "unit/test_rejection.py::test_each_prompt_keeps_the_response_that_is_chosen",
     ("a response to another prompt", "response_ids[n * row + i]", "response_ids[row + n * i]"),
     ("responses that are not in groups", "scores.reshape(-1, n)", "scores.reshape(n, -1).T")),
    ("rejection.best", "unit/test_rejection.py::test_the_best_is_the_first_of_the_highest",
     ("the worst of n", "max(range", "min(range")),
    ("rejection.train", "unit/test_rejection.py::test_a_round_goes_on_from_the_round_before",
     ("every round has the same prompts", "random.Random(of_round.seed)",
      "random.Random(config.seed)")),

    # estimates
    ("estimates.pass_at_k",
     "harness/test_experiments.py::test_pass_at_k_is_right_on_average[4-2]",
     ("responses are drawn with replacement", "comb(size - int(c), k) / comb(size, k)",
      "(1 - int(c) / size) ** k"),
     ("all k correct, not one of them", "1 - comb(size - int(c), k)", "comb(int(c), k)")),

    # kl
    ("kl.kl_estimate", "unit/test_kl.py::test_kl_estimate_closed",
     ("sign of the log ratio",
      "at_least_float32(logprobs) - ref_logprobs", "at_least_float32(ref_logprobs) - logprobs")),
    ("kl.kl_estimate", "unit/test_kl.py::test_kl_estimate_closed[k1-expected0]",
     ("sign of k1", "return d  # (1)", "return -d  # (1)")),
    ("kl.kl_estimate", "unit/test_kl.py::test_kl_estimate_closed[abs-expected1]",
     ("abs without the bars", "d.abs()", "d")),
    ("kl.kl_estimate", "unit/test_kl.py::test_kl_estimate_closed[k2-expected2]",
     ("k2 without its half", "d.square() / 2", "d.square()")),
    ("kl.kl_estimate", "unit/test_kl.py::test_kl_estimate_closed[k3-expected3]",
     ("sign in k3", "torch.expm1(-d) + d", "torch.expm1(d) - d")),
    ("kl.kl_estimate", "unit/test_kl.py::test_kl_estimate_property_small",
     ("k3 rounds to 0 near 0", "torch.expm1(-d) + d", "torch.exp(-d) - 1 + d")),
    ("kl.exact_kl", "unit/test_kl.py::test_exact_kl_closed",
     ("weighed by the reference", "p = logp.exp()", "p = logr.exp()"),
     ("KL(reference || policy)",
      "p * torch.where(p > 0, logp - logr, 0)", "logr.exp() * (logr - logp)")),
    ("kl.exact_kl", "unit/test_kl.py::test_exact_kl_of_impossible_tokens",
     ("a token without probability", "torch.where(p > 0, logp - logr, 0)", "(logp - logr)")),
    ("kl.AdaptiveKL", "unit/test_kl.py::test_adaptive_kl_closed",
     ("the error is not limited",
      "min(max(mean_kl / self.target - 1, -0.2), 0.2)", "mean_kl / self.target - 1"),
     ("steers away from the target", "mean_kl / self.target - 1", "1 - mean_kl / self.target"),
     ("the responses are not counted", "error * n / self.horizon", "error / self.horizon")),
    ("kl.shape_rewards", "unit/test_kl.py::test_shape_rewards_closed",
     ("the KL is rewarded", "-kl_coef * at_least_float32(kl)", "kl_coef * kl"),
     ("padding pays for its KL",
      "torch.where(mask, -kl_coef * at_least_float32(kl), 0)", "-kl_coef * kl"),
     ("the score lands behind EOS", "mask.sum(1) - 1", "mask.sum(1)"),
     ("the score lands in the last column",
      "mask.sum(1) - 1", "mask.sum(1) * 0 + mask.shape[1] - 1"),
     ("each token gets the score",
      "rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))",
      "torch.where(mask, rewards + scores[:, None], 0)")),
    ("kl.shape_rewards", "unit/test_kl.py::test_shape_rewards_errors_shapes",
     ("a KL of another shape is spread", "kl.shape != mask.shape or ", ""),
     ("the message leaves out the mask", "(scores, kl, mask)", "(scores, kl)")),
    ("kl.shape_rewards", "unit/test_kl.py::test_shape_rewards_errors_padding_on_the_left",
     ("the score lands in left padding", "require_right_padded(mask)", "pass")),
    ("losses.require_pairs", "unit/test_losses.py::test_pairwise_reward_loss_errors_pairs",
     ("no pair is a pair", "len(first) == 0", "False")),

    # advantages
    ("advantages.gae", "unit/test_advantages.py::test_gae_errors_shapes",
     ("the message leaves out the mask", "(rewards, values, mask)", "(rewards, values)")),
    ("advantages.gae", "unit/test_advantages.py::test_gae_errors_padding_on_the_left",
     ("left padding goes unnoticed", "require_right_padded(mask)", "pass")),
    ("advantages.gae", "unit/test_advantages.py::test_gae_closed",
     ("rewards of the padding",
      "torch.where(mask, at_least_float32(rewards.detach()), 0)", "rewards.detach()"),
     ("gamma missing in delta", "gamma * next_value", "next_value"),
     ("lambda for gamma in delta", "gamma * next_value", "lam * next_value"),
     ("the value is not taken off", "gamma * next_value - values[:, t]", "gamma * next_value"),
     ("gamma missing in the sum", "gamma * lam * next_advantage", "lam * next_advantage"),
     ("lambda missing in the sum", "gamma * lam * next_advantage", "gamma * next_advantage"),
     ("returns without the values", "advantages + values", "advantages")),
    ("advantages.gae", "unit/test_advantages.py::test_gae_closed_value_after_the_end",
     ("bootstraps from the padding",
      "torch.where(mask, at_least_float32(values.detach()), 0)", "values.detach()")),
    ("advantages.gae", "unit/test_advantages.py::test_gae_gradient_stops",
     ("rewards not detached", "rewards.detach()", "rewards"),
     ("values not detached", "values.detach()", "values")),
    ("advantages.rloo_advantages", "unit/test_advantages.py::test_rloo_advantages_closed",
     ("the baseline knows its response",
      "groups.sum(1, keepdim=True) - groups)", "groups.sum(1, keepdim=True))"),
     ("the others are one more", "/ (group_size - 1)", "/ group_size"),
     ("sign of a group's baseline", "(groups - others)", "(groups + others)")),
    ("advantages.grpo_advantages", "unit/test_advantages.py::test_grpo_advantages_closed",
     ("the mean of all groups", "groups.mean(1, keepdim=True)", "groups.mean()"),
     ("always in deviations",
      "return centred.flatten()", "return (centred / centred.std()).flatten()"),
     ("a deviation with n",
      "groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, correction=0)"),
     ("the groups' deviation for the batch's",
      "at_least_float32(rewards.detach()).std()", "groups.std()"),
     ("no epsilon beside a group's deviation", "keepdim=True) + 1e-4)", "keepdim=True))"),
     ("no epsilon beside the batch's", ".std() + 1e-4)", ".std())")),
    ("advantages._from_the_first",
     "unit/test_advantages.py::test_a_group_of_equal_rewards_says_nothing[dtype0-0.1]",
     ("rounding is taken for a difference", "groups - groups[:, :1]", "groups")),
    ("advantages._from_the_first", "unit/test_advantages.py::test_rloo_advantages_closed",
     ("every G-th response is a group", "view(-1, group_size)", "view(group_size, -1).T")),
    ("advantages._from_the_first",
     "unit/test_advantages.py::test_group_advantages_carry_no_gradient",
     ("rewards carry gradient", "rewards.detach()", "rewards")),
    ("advantages._from_the_first", "unit/test_advantages.py::test_group_advantages_errors",
     ("a group of one has a baseline", "group_size < 2 or", "")),
    ("masking.require_right_padded", "unit/test_advantages.py::test_gae_errors_padding_on_the_left",
     ("left padding is never noticed", "if bool((mask[:, 1:] & ~mask[:, :-1]).any())", "if False")),

    # losses
    ("losses.grpo_loss", "unit/test_group_losses.py::test_grpo_loss_closed",
     ("a mean over rows as they are padded", "sums / lengths.clamp(min=1)", "sums / mask.shape[1]"),
     ("tokens of a mean over responses", "loss = (sums / lengths.clamp(min=1)).mean()",
      "loss = sums.sum() / lengths.sum()"),
     ("a mean over responses for tokens", "sums.sum() / lengths.sum().clamp(min=1)",
      "(sums / lengths).mean()"),
     ("tokens counted as responses", ", lengths.sum()  # (6)", ", lengths.new_tensor(len(mask))"),
     ("the longest response for the constant", "sums.mean() / max_new_tokens",
      "sums.mean() / mask.shape[1]"),
     ("losses of padding", "torch.where(mask, per_token, 0)", "per_token"),
     ("the constant without the responses", "sums.mean() / max_new", "sums.sum() / max_new")),
    ("losses.grpo_loss", "unit/test_group_losses.py::test_grpo_loss_closed",
     ("the ratio upside down", "ratio = log_ratio.exp()", "ratio = (-log_ratio).exp()"),
     ("lengths of the padded rows", "lengths = mask.sum(1)", "lengths = (mask | True).sum(1)"),
     ("the share of padding", "clipped, mask, per_token", "clipped, mask | True, per_token")),
    ("losses.grpo_loss", "unit/test_group_losses.py::test_the_lower_limit",
     ("clipped above only", "clip, clip_high)  # (3)", "float('inf'), clip_high)")),
    ("losses.grpo_loss", "unit/test_group_losses.py::test_shapes_are_checked",
     ("any shape", "_same_shape(new_logprobs, logprobs, ref_logprobs, mask)", "pass"),
     ("advantages of other rows", "_same_shape(mask[:, 0], advantages)", "pass")),
    ("losses.rloo_loss", "unit/test_group_losses.py::test_shapes_are_checked",
     ("any shape in RLOO", "_same_shape(new_logprobs, logprobs, mask)", "pass"),
     ("advantages of other rows in RLOO", "_same_shape(mask[:, 0], advantages)", "pass")),
    ("losses.rloo_loss", "unit/test_group_losses.py::test_rloo_loss_closed",
     ("more responses than there are", "torch.tensor(len(mask),", "torch.tensor(mask.numel(),"),
     ("the first response's ratio for all", "x[:, None].expand_as(mask)",
      "x[:1, None].expand_as(mask)")),
    ("losses.rloo_loss", "unit/test_group_losses.py::test_how_far_it_moved[update_k3]",
     ("a share of padding", "clipped, mask, per_token", "clipped, mask | True, per_token")),
    ("losses.grpo_loss", "unit/test_group_losses.py::test_grpo_loss_closed_ratio_of_a_response",
     ("a product of ratios for their mean", "log_ratio.sum(1) / lengths.clamp(min=1)",
      "log_ratio.sum(1)"),
     ("padding in a response's ratio", "log_ratio.sum(1) / lengths.clamp(min=1)",
      "log_ratio.mean(1)")),
    ("losses.grpo_loss", "unit/test_group_losses.py::test_grpo_loss_closed_kl",
     ("the KL is rewarded", "per_token + kl_coef", "per_token - kl_coef"),
     ("the KL of the reference to the policy", "kl_estimate(new, ref,", "kl_estimate(ref, new,"),
     ("k2 for k3", 'kind="k3")  # (4)', 'kind="k2")')),
    ("losses.grpo_loss", "unit/test_group_losses.py::test_nothing_is_learned_from_padding",
     ("log-ratios of padding",
      "torch.where(mask, at_least_float32(new_logprobs) - logprobs.detach(), 0)",
      "at_least_float32(new_logprobs) - logprobs.detach()"),
     ("the KL of padding", "torch.where(mask, x, 0) for x in", "x for x in")),
    ("losses.grpo_loss", "unit/test_group_losses.py::test_only_the_loss_carries_gradient",
     ("the old policy is trained too", "- logprobs.detach()", "- logprobs"),
     ("the reference is trained too", "ref_logprobs.detach()", "ref_logprobs")),
    ("losses.grpo_loss",
     "unit/test_group_losses.py::test_a_response_that_is_left_out_counts_as_one_of_the_responses",
     ("0 / 0 where nothing is learned from", "lengths.sum().clamp(min=1)", "lengths.sum()"),
     ("0 / 0 in a row that is left out", "sums / lengths.clamp(min=1)", "sums / lengths")),
    ("losses._clipped_surrogate", "unit/test_group_losses.py::test_grpo_loss_closed",
     ("the lower limit for the upper one", "1 + clip_high", "1 + clip"),
     ("the optimistic loss", "torch.maximum", "torch.minimum"),
     ("unclipped counted as clipped", "clipped > unclipped", "clipped < unclipped")),
    ("losses._clipped_surrogate", "unit/test_group_losses.py::test_only_the_loss_carries_gradient",
     ("advantages carry gradient", "advantages.detach()", "advantages")),
    ("losses.rloo_loss", "unit/test_group_losses.py::test_rloo_loss_closed",
     ("a mean ratio for the product", "log_ratio.sum(1)", "log_ratio.mean(1)"),
     ("a sum over responses", "per_response.mean()", "per_response.sum()")),
    ("losses.rloo_loss", "unit/test_group_losses.py::test_nothing_is_learned_from_padding",
     ("padding in a response's probability",
      "torch.where(mask, at_least_float32(new_logprobs) - logprobs.detach(), 0)",
      "at_least_float32(new_logprobs) - logprobs.detach()")),
    ("losses._group_loss", "unit/test_group_losses.py::test_how_far_it_moved[update_k1]",
     ("k1 the other way round", "of_each(-log_ratio)", "of_each(log_ratio)")),
    ("losses._group_loss", "unit/test_group_losses.py::test_how_far_it_moved[update_k3]",
     ("sums over tokens for a mean", "1 if per_token else mask.sum(1).clamp(min=1)", "1"),
     ("k3 the other way round", "kl_estimate(-log_ratio", "kl_estimate(log_ratio")),
    ("losses._group_loss", "unit/test_group_losses.py::test_grpo_loss_closed",
     ("numbers of padding", "torch.where(mask, x, 0)", "x"),
     ("the largest of the padding", "torch.where(mask, ratio, 0)", "torch.where(~mask, ratio, 0)")),
    ("losses.ppo_policy_loss",
     "unit/test_precision.py::test_half_precision_is_only_how_the_inputs_are_stored",
     ("half precision stays in the losses", "at_least_float32(new_logprobs)", "new_logprobs")),
    ("losses.ppo_policy_loss", "unit/test_losses.py::test_ppo_errors_shapes[policy_loss-2]",
     ("a shape that broadcasts", "logprobs, advantages, mask)", "logprobs, mask)")),
    ("losses.ppo_policy_loss", "unit/test_losses.py::test_ppo_policy_loss_closed",
     ("new and old exchanged in the ratio",
      "at_least_float32(new_logprobs) - logprobs.detach()", "logprobs.detach() - new_logprobs"),
     ("advantages of the padding alone",
      "torch.where(mask, at_least_float32(advantages.detach()), 0)",
      "torch.where(mask, 0, advantages.detach())"),
     ("sign of the advantage", "unclipped = -advantages", "unclipped = advantages"),
     ("mean over padding too", "masked_mean(torch.maximum(unclipped, clipped), mask)",
      "torch.maximum(unclipped, clipped).mean()"),
     ("padding is counted", "mask.sum()", "torch.tensor(mask.numel())"),
     ("padding in the clip fraction", "masked_mean((clipped > unclipped).to(loss.dtype), mask)",
      "(clipped > unclipped).to(loss.dtype).mean()")),
    ("losses.ppo_policy_loss", "unit/test_losses.py::test_ppo_gradient_nan_in_the_padding",
     ("log-probabilities of the padding",
      "torch.where(mask, at_least_float32(new_logprobs) - logprobs.detach(), 0)",
      "new_logprobs - logprobs.detach()")),
    ("losses.ppo_policy_loss", "unit/test_losses.py::test_ppo_policy_loss_gradient",
     ("old log-probabilities not detached", "logprobs.detach()", "logprobs"),
     ("advantages not detached", "advantages.detach()", "advantages"),
     ("the logged numbers carry gradient", "with torch.no_grad():", "if True:")),
    ("losses.ppo_policy_loss", "unit/test_losses.py::test_ppo_policy_loss_closed_cases",
     ("the ratio to first order", "log_ratio.exp()", "1 + log_ratio"),
     ("the clip is not symmetric", "1 - clip, 1 + clip", "1 / (1 + clip), 1 + clip"),
     ("the smaller loss, not the larger", "torch.maximum(", "torch.minimum("),
     ("the clipped loss alone", "torch.maximum(unclipped, clipped)", "clipped")),
    ("losses.ppo_policy_loss", "unit/test_losses.py::test_ppo_policy_loss_closed_statistics",
     ("k3 the wrong way", "kl_estimate(-log_ratio", "kl_estimate(log_ratio"),
     ("padding in the update's k3", "masked_mean(k3, mask)", "k3.mean()"),
     ("padding in the ratio", "masked_mean(ratio, mask)", "ratio.mean()")),
    ("losses.ppo_policy_loss", "unit/test_losses.py::test_ppo_policy_loss_definition_kl",
     ("sign of the update's k1", "masked_mean(-log_ratio, mask)", "masked_mean(log_ratio, mask)")),
    ("losses.ppo_policy_loss", "unit/test_losses.py::test_ppo_policy_loss_closed_largest_ratio",
     ("padding in the largest ratio", "ratio[mask].max()", "ratio.max()")),
    ("losses.sft_loss", "unit/test_losses.py::test_sft_loss_closed",
     ("sign of the likelihood", "-masked_mean(logprobs, mask)", "masked_mean(logprobs, mask)"),
     ("padding is imitated", "masked_mean(logprobs, mask)", "logprobs.mean()"),
     ("rows are counted, not tokens", "mask.sum()", "mask.any(1).sum()")),
    ("losses.pairwise_reward_loss", "unit/test_losses.py::test_pairwise_reward_loss_closed_margin",
     ("chosen and rejected exchanged",
      "chosen_scores - rejected_scores", "rejected_scores - chosen_scores"),
     ("sign of the margin", "difference - margin", "difference + margin")),
    ("losses.pairwise_reward_loss", "unit/test_losses.py::test_pairwise_reward_loss_closed_centre",
     ("sign of the centring", "loss + center_coef", "loss - center_coef"),
     ("centres the difference",
      "chosen_scores + rejected_scores", "chosen_scores - rejected_scores")),
    ("losses.pairwise_reward_loss", "unit/test_losses.py::test_pairwise_reward_loss_closed",
     ("a tie counts as right", "difference > 0", "difference >= 0")),
    ("losses.pairwise_reward_loss", "unit/test_losses.py::test_pairwise_reward_loss_gradient",
     ("the logged margin carries gradient", "difference = difference.detach()", "pass")),
    ("losses.ppo_value_loss", "unit/test_losses.py::test_ppo_errors_shapes[value_loss-2]",
     ("a shape that broadcasts", "values, returns, mask)", "values, mask)")),
    ("losses.ppo_value_loss", "unit/test_losses.py::test_ppo_gradient_nan_in_the_padding",
     ("new values of the padding",
      "torch.where(mask, at_least_float32(new_values), 0)", "new_values")),
    ("losses.ppo_value_loss", "unit/test_losses.py::test_ppo_value_loss_closed",
     ("old values of the padding alone", "torch.where(mask, at_least_float32(values.detach()), 0)",
      "torch.where(mask, 0, values.detach())"),
     ("returns of no token", "torch.where(mask, at_least_float32(returns.detach()), 0)",
      "torch.where(mask, 0, returns.detach())"),
     ("clipped around the returns",
      "clamp(values - clip, values + clip)", "clamp(returns - clip, returns + clip)"),
     ("clipped around 0", "clamp(values - clip, values + clip)", "clamp(-clip, clip)"),
     ("without its half", "mask) / 2", "mask)"),
     ("mean over padding too", "masked_mean(torch.maximum(error, near_error), mask)",
      "torch.maximum(error, near_error).mean()"),
     ("padding in the clip fraction", "masked_mean((near_error > error).to(loss.dtype), mask)",
      "(near_error > error).to(loss.dtype).mean()"),
     ("padding is counted", "mask.sum()", "torch.tensor(mask.numel())")),
    ("losses.ppo_value_loss", "unit/test_losses.py::test_ppo_value_loss_gradient",
     ("returns not detached", "returns.detach()", "returns")),
    ("losses.ppo_value_loss", "unit/test_losses.py::test_ppo_value_loss_closed_cases",
     ("the smaller error, not the larger", "torch.maximum(", "torch.minimum(")),

    # preference_losses
    ("preference_losses.implicit_rewards",
     "unit/test_preference_losses.py::test_implicit_rewards_closed",
     ("chosen against the rejected one's reference",
      "at_least_float32(chosen_logprobs) - ref_chosen_logprobs",
      "at_least_float32(chosen_logprobs) - ref_rejected_logprobs"),
     ("no reference",
      "at_least_float32(rejected_logprobs) - ref_rejected_logprobs", "rejected_logprobs"),
     ("beta on one side only", "rejected_rewards = beta * (", "rejected_rewards = (")),
    ("preference_losses.implicit_rewards",
     "unit/test_preference_losses.py::test_pair_losses_errors_beta[nan]",
     ("a beta that is no number", "beta > 0,", "not beta <= 0,")),
    ("preference_losses.sft_term", "unit/test_preference_losses.py::test_sft_term_closed",
     ("the chosen response is unlearned", "-at_least_float32(", "at_least_float32("),
     ("a sum over the tokens", " / chosen_lengths", "")),
    ("preference_losses.dpo_loss", "unit/test_preference_losses.py::test_dpo_loss_closed",
     ("chosen and rejected exchanged",
      "h = chosen_rewards - rejected_rewards", "h = rejected_rewards - chosen_rewards"),
     ("sign of the label smoothing",
      "- label_smoothing * logsigmoid(-h)", "+ label_smoothing * logsigmoid(-h)"),
     ("smoothing without the other label", "logsigmoid(-h)", "logsigmoid(h)")),
    ("preference_losses._over_pairs", "unit/test_preference_losses.py::test_dpo_loss_gradient",
     ("the logged rewards carry gradient", "chosen_rewards.detach()", "chosen_rewards")),
    ("preference_losses.kto_loss", "unit/test_kto.py::test_kto_loss_closed",
     ("no reference model in the reward", "(at_least_float32(logprobs) - ref_logprobs)",
      "at_least_float32(logprobs)"),
     ("desirable is taken for undesirable", "torch.where(labels, desirable, undesirable)",
      "torch.where(labels, undesirable, desirable)"),
     ("no reference point", "rewards - beta * kl.detach()", "rewards"),
     ("a gradient through the reference point", "kl.detach()", "kl"),
     ("one weight for both", "undesirable_weight * sigmoid(margin)",
      "desirable_weight * sigmoid(margin)"),
     ("a log-sigmoid, as in DPO", "desirable_weight * sigmoid(-margin)",
      "-desirable_weight * sigmoid(margin).log()"),
     ("a mean by weights", "loss.mean()",
      "loss.sum() / torch.where(labels, desirable_weight, undesirable_weight).sum()"),
     ("rewards carry gradient", "rewards.detach())", "rewards)")),
    ("preference_losses.kto_loss",
     "unit/test_kto.py::test_kto_loss_scales_log_ratio_and_reference_point_by_beta",
     ("the reference point is not scaled", "beta * kl.detach()", "kl.detach()"),
     ("the reward is not scaled", "rewards = beta * (", "rewards = 1 * (")),
    ("preference_losses.kto_loss",
     "unit/test_kto.py::test_kto_loss_keeps_its_digits_where_a_response_is_very_good",
     ("digits are lost", "desirable = desirable_weight * sigmoid(-margin)",
      "desirable = desirable_weight * (1 - sigmoid(margin))")),
    ("preference_losses.kto_loss", "unit/test_kto.py::test_kto_loss_refuses",
     ("weights below 0", "not desirable_weight >= 0", "False")),
    ("preference_losses.kto_kl", "unit/test_kto.py::test_kto_kl_is_cut_off_after_the_mean",
     ("each row is cut off", "ratios.mean().clamp(min=0)", "ratios.clamp(min=0).mean()"),
     ("a KL below 0", ".clamp(min=0)", "")),
    ("preference_losses.kto_kl",
     "unit/test_kto.py::test_kto_kl_is_the_kl_where_the_policy_wrote_the_responses",
     ("the KL the other way round",
      "at_least_float32(mismatched_logprobs.detach()) - ref_mismatched_logprobs.detach()",
      "ref_mismatched_logprobs.detach() - at_least_float32(mismatched_logprobs.detach())"),
     ("the reference point has a gradient", "(mismatched_logprobs.detach())",
      "(mismatched_logprobs)")),
    ("preference_losses._require_smoothing",
     "unit/test_preference_losses.py::test_pair_losses_errors_label_smoothing[dpo_loss-0.5]",
     ("half of all labels flipped", "< 0.5, f", "<= 0.5, f")),
    ("preference_losses.ipo_loss", "unit/test_preference_losses.py::test_ipo_loss_closed",
     ("the margin of the rewards for that of the log-probabilities",
      "(chosen_rewards - rejected_rewards) / beta", "(chosen_rewards - rejected_rewards)"),
     ("twice the margin", "1 / (2 * beta)", "1 / beta"),
     ("the distance is not squared", ".square()", ".abs()")),
    ("preference_losses.hinge_loss", "unit/test_preference_losses.py::test_hinge_loss_closed",
     ("chosen and rejected exchanged in the hinge",
      "h = chosen_rewards - rejected_rewards", "h = rejected_rewards - chosen_rewards"),
     ("a margin beyond 1 is rewarded", "relu(1 - h)", "1 - h"),
     ("no margin is asked for", "relu(1 - h)", "relu(-h)")),
    ("preference_losses.robust_loss", "unit/test_preference_losses.py::test_robust_loss_closed",
     ("chosen and rejected exchanged in the robust loss",
      "h = chosen_rewards - rejected_rewards", "h = rejected_rewards - chosen_rewards"),
     ("flipped labels are believed, as in label smoothing",
      "(flipped - true)", "(-flipped - true)"),
     ("not divided by what is left of the signal", " / (1 - 2 * label_smoothing)", "")),
    ("preference_losses.apo_zero_loss", "unit/test_preference_losses.py::test_apo_zero_loss_closed",
     ("rewards exchanged",
      "chosen_rewards, rejected_rewards = imp", "rejected_rewards, chosen_rewards = imp"),
     ("the chosen one sinks", "sigmoid(-chosen_rewards)", "sigmoid(chosen_rewards)"),
     ("the rejected one rises", "sigmoid(rejected_rewards)", "sigmoid(-rejected_rewards)")),
    ("preference_losses.apo_down_loss", "unit/test_preference_losses.py::test_apo_down_loss_closed",
     ("rewards exchanged",
      "chosen_rewards, rejected_rewards = imp", "rejected_rewards, chosen_rewards = imp"),
     ("the chosen one rises", "sigmoid(chosen_rewards) +", "sigmoid(-chosen_rewards) +"),
     ("the rejected one overtakes",
      "rejected_rewards - chosen_rewards", "chosen_rewards - rejected_rewards")),
    ("preference_losses.simpo_loss", "unit/test_preference_losses.py::test_simpo_loss_closed",
     ("the margin is a present", "- gamma", "+ gamma"),
     ("the margin is scaled too", "- gamma", "- beta * gamma"),
     ("chosen and rejected exchanged in SimPO", "-logsigmoid(h)", "-logsigmoid(-h)")),
    ("preference_losses.orpo_loss", "unit/test_preference_losses.py::test_orpo_loss_closed",
     ("probabilities for odds", "_log_odds(x) for", "x for"),
     ("lambda within the sigmoid",
      "-beta * logsigmoid(chosen_odds - rejected_odds)",
      "-logsigmoid(beta * (chosen_odds - rejected_odds))")),
    ("preference_losses._log_odds",
     "unit/test_preference_losses.py::test_orpo_loss_of_a_certain_response",
     ("odds without end", ".clamp(max=-torch.finfo(logprobs.dtype).eps)", "")),
    ("preference_losses.cpo_loss", "unit/test_preference_losses.py::test_cpo_loss_closed",
     ("chosen and rejected exchanged in CPO",
      "h = chosen_rewards - rejected_rewards", "h = rejected_rewards - chosen_rewards"),
     ("the loss of certainty in the wrong one", "-logsigmoid(h)", "logsigmoid(h)")),

    # data
    ("data.Sequences.select", "unit/test_data.py::test_select_is_collate_of_those_rows",
     ("cut to the shortest row",
      "self.attention_mask[index].sum(1).max()", "self.attention_mask[index].sum(1).min()"),
     ("responses keep their old width", "self.mask[index].sum(1).max()", "self.mask.sum(1).max()"),
     ("another row's attention mask",
      "self.attention_mask[index, :length]", "self.attention_mask[: len(index), :length]"),
     ("another row's mask", "self.mask[index, :width]", "self.mask[: len(index), :width]")),
    ("data.collate", "unit/test_data.py::test_collate_as_drawn",
     ("padding is attended to",
      "response_mask(lengths, int(lengths.max())).long()", "torch.ones_like(_pad(joined, pad_id))"),
     ("EOS out of the mask",
      "response_mask(response_lengths, ", "response_mask(response_lengths - 1, ")),
    ("data.collate", "unit/test_data.py::test_collate_masks_do_not_look_at_ids",
     ("padding is told by its id", "response_mask(lengths, int(lengths.max())).long()",
      "(_pad(joined, pad_id) != pad_id).long()")),
    ("encoding/codec.Codec.encode_prompt",
     "unit/test_codec.py::test_a_long_prompt_loses_its_beginning",
     ("a long prompt loses its end",
      "ids[:bos] + ids[bos + max(0, len(ids) - self.max_prompt_tokens) :]",
      "ids[: self.max_prompt_tokens]")),
    ("encoding/codec.Codec.encode_response",
     "unit/test_codec.py::test_a_long_response_loses_its_end_and_keeps_eos",
     ("a response without EOS", "ids[: room - ended] + ids[-1:] * ended", "ids[:room]")),
    ("encoding/codec.Codec._read_prompt",
     "unit/test_codec.py::test_as_is_are_exactly_the_ids_of_the_tokenizer",
     ("texts as they are lose their special tokens",
      "self._reader.read(text, room=room, special=True)", "self._reader.read(text, room=room)")),
    ("encoding/codec.Codec._read_response",
     "unit/test_codec.py::test_as_is_are_exactly_the_ids_of_the_tokenizer",
     ("texts as they are get an EOS", "if not as_is:", "if True:")),
    ("encoding/reading.TextReader.read",
     "unit/test_codec.py::test_a_long_text_of_few_tokens_is_read_whole",
     ("a text is read in part that is not cut for certain", "> 2 * room", "> 0")),
    ("encoding/reading.TextReader.read",
     "unit/test_codec.py::test_a_text_of_megabytes_is_read_only_as_far_as_it_may_fit[as_is]",
     ("of a long prompt the beginning is read",
      "text[:most] if from_start else text[-most:]", "text[:most]")),
    ("encoding/chat.require_content",
     "unit/test_codec.py::test_a_chat_template_that_leaves_the_content_out[none]",
     ("a chat template without the content",
      "in _letters(rendered)", "in _letters(rendered) + _letters(_USER['content'])")),
    ("encoding/chat.contains",
     "harness/test_encoding_report.py::test_messages_that_the_chat_template_leaves_out_or_changes_are_counte"
     "d",
     ("a message that is left out is not seen", "return all(", "return any(")),
    ("data.micro_batches", "unit/test_data.py::test_micro_batches_of_equal_rows_keep_their_order",
     ("a group holds one row too many",
      "(len(groups[-1]) + 1) * width", "len(groups[-1]) * width")),
    ("data.Cursor._order", "unit/test_data.py::test_take_goes_through_each_epoch_once",
     ("the same order in each epoch", "self.seed + self.epoch", "self.seed")),

    # models
    ("speed/fast.separate_trunk",
     "unit/test_policy.py::test_a_separate_critic_starts_as_a_copy_with_weights_of_its_own",
     ("a critic with the policy's weights", "copy.deepcopy(model.base_model)", "model.base_model")),
    ("speed/fast.separate_trunk",
     "unit/test_fast.py::test_a_separate_critic_has_a_dense_gradient_of_its_own",
     ("the critic's gradient stays sparse", "module.sparse = False", "pass")),
    ("policy.Policy.__init__", "unit/test_policy.py::test_a_new_value_head_is_zero[shared]",
     ("a new value head is not zero", "nn.init.zeros_(self.value_head.weight)", "pass")),
    ("policy.Policy.__init__", "unit/test_plain.py::test_nothing_of_a_plain_model_is_sped_up",
     ("plain is not plain", "if not plain:", "if True:")),
    ("speed/forward.logprobs_and_states",
     "unit/test_policy.py::test_logprobs_and_entropy_are_those_of_the_model_itself[1.0-gpt2]",
     ("tokens in another order than states",
      "batch.responses[batch.mask]", "batch.responses.T[batch.mask.T]")),
    ("speed/forward.logprobs_and_states",
     "unit/test_policy.py::test_logprobs_and_entropy_are_those_of_the_model_itself[0.7-gpt2]",
     ("temperature forgotten", "temperature=temperature", "temperature=1.0")),
    ("speed/forward.logprobs_and_states",
     "unit/test_policy.py::test_values_are_the_head_on_the_hidden_state_before_each_token"
     "[separate-gpt2]",
     ("the critic reads the policy's trunk",
      "hidden_states(critic_trunk, layout)", "hidden_states(lm.base_model, layout)")),
    ("speed/forward.logprobs_and_states",
     "unit/test_rollout.py::test_a_pass_holds_the_logits_of_few_tokens",
     ("the logits of all tokens at once", "chunk_tokens=CHUNK_TOKENS", "chunk_tokens=10**9")),
    ("policy.Policy.forward",
     "unit/test_policy.py::test_values_are_the_head_on_the_hidden_state_before_each_token"
     "[shared-gpt2]",
     ("values in the wrong cells", "scatter_tokens(self.value_head(hidden)[:, 0], batch.mask)",
      "scatter_tokens(self.value_head(hidden)[:, 0], batch.mask.T).T")),
    ("policy.Policy.forward",
     "unit/test_policy.py::test_logprobs_and_entropy_are_those_of_the_model_itself[1.0-gpt2]",
     ("entropies in the wrong cells",
      "scatter_tokens(entropies, batch.mask)", "scatter_tokens(entropies, batch.mask.T).T"),
     ("log-probabilities in the wrong cells",
      "scatter_tokens(logprobs, batch.mask)", "scatter_tokens(logprobs, batch.mask.T).T")),
    ("policy.Policy.forward", "unit/test_rollout.py::test_full_kl_is_the_sum_over_the_vocabulary",
     ("temperature missing in the exact KL",
      "self._logits(batch, temperature)", "self._logits(batch, 1.0)")),
    ("policy.Policy._logits", "unit/test_policy.py::test_token_logits[gpt2]",
     ("temperature forgotten", "temperature=temperature", "temperature=1.0")),
    ("policy.Policy._plain",
     "unit/test_plain.py::test_outputs_and_gradients_are_the_same[none-gpt2]",
     ("a plain policy forgets the temperature", "temperature=temperature", "temperature=1.0"),
     ("plain: tokens in another order than states",
      "batch.responses[batch.mask]", "batch.responses.T[batch.mask.T]"),
     ("plain: padding is attended to", "batch.attention_mask}", "1 - batch.attention_mask}"),
     ("plain: the entropy has a gradient", "entropy(logits.detach())", "entropy(logits)")),
    ("policy.Policy._plain",
     "unit/test_plain.py::test_outputs_and_gradients_are_the_same[separate-gpt2]",
     ("plain: the critic reads the policy's trunk",
      "self.critic_trunk(**inputs", "self.lm.base_model(**inputs")),
    ("policy.Policy.reference",
     "unit/test_policy.py::test_the_reference_is_frozen_and_stays_what_it_was",
     ("the reference is the policy", "adapters.copied(self.lm, device)", "self.lm"),
     ("the reference has dropout", "disable_dropout(reference)", "pass"),
     ("the reference learns", "reference.requires_grad_(False)", "pass")),
    ("loading/checks.require_known_head",
     "unit/test_loading.py::test_a_language_model_with_an_unknown_head_is_refused",
     ("any head is taken for a linear one",
      "torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.std()))", "True")),
    ("policy.Policy._on_device",
     "unit/test_room.py::test_a_row_that_the_model_has_no_room_for[beyond the vocabulary-forward]",
     ("only the first row's ids are looked at",
      "batch.ids[batch.attention_mask.bool()]", "batch.ids[:1]")),
    ("policy.Policy._on_device", "unit/test_room.py::test_a_padded_neighbour_is_not_named[forward]",
     ("padding needs room", "batch.attention_mask.sum(1)", "(batch.attention_mask | 1).sum(1)")),
    ("policy.Policy.decode", "unit/test_rollout.py::test_rewards_see_no_outer_white_space",
     ("rewards see outer white space", ".strip()", "")),
    ("speed/forward.layout_of",
     "unit/test_packing.py::test_a_model_with_a_sliding_window_is_not_packed[mistral]",
     ("any model is packed", "if not can_pack(lm):", "if False:")),
    ("speed/packing.padded",
     "unit/test_packing.py::test_packing_changes_no_value_and_no_gradient[20-gpt2]",
     ("attention to the padding alone", "batch.attention_mask}", "1 - batch.attention_mask}")),
    ("data.Sequences.predicting", "unit/test_packing.py::test_padded_by_hand",
     ("padding has hidden states",
      "self.mask.nonzero(as_tuple=True)", "(self.mask | True).nonzero(as_tuple=True)"),
     ("shifted by P, not P - 1",
      "self.prompt_lengths[rows] - 1 + t", "self.prompt_lengths[rows] + t")),
    ("speed/packing.packed", "unit/test_packing.py::test_packed_by_hand",
     ("padding is part of the response",
      "(batch.mask.sum(1) - 1).tolist()", "((batch.mask | True).sum(1) - 1).tolist()"),
     ("a second response is predicted by the first one's end",
      "[start + P - 1, *range(stop, stop + n)]", "[*range(stop - 1, stop + n)]"),
     ("a response begins at position 0", "torch.arange(P, P + n)", "torch.arange(n)"),
     ("a response sees its sibling", "((theirs == mine) | (theirs == 0))", "(theirs == theirs)"),
     ("a response does not see its prompt",
      "((theirs == mine) | (theirs == 0))", "(theirs == mine)"),
     ("a row sees its neighbour",
      "(family[:, :, None] == family[:, None, :])", "(family[:, :, None] > -2)"),
     ("a token sees what comes after it", "sees.tril()", "sees")),
    ("speed/packing.packed", "unit/test_packing.py::test_prompts_that_differ_in_one_token_are_two",
     ("prompts that differ in their last token are one",
      "tuple(ids[row, :P].tolist())", "tuple(ids[row, : P - 1].tolist())")),
    ("speed/packing._siblings",
     "unit/test_packing.py::test_many_responses_to_one_prompt_are_no_row_without_end",
     ("a prompt's row without end",
      "if not rows or size > max(width, 2 * longest):", "if not rows:")),
    ("speed/packing._siblings",
     "unit/test_packing.py::test_a_wide_row_holds_all_responses_to_a_prompt",
     ("a wide row holds two responses at most", "max(width, 2 * longest)", "2 * longest")),
    ("speed/packing.first_fit", "unit/test_packing.py::test_first_fit_fills_its_bins",
     ("a bin runs over", "sum(sizes[j] for j in members) + sizes[i] <= width",
      "sum(sizes[j] for j in members) <= width")),
    ("speed/fast.fuse_gelu", "unit/test_fast.py::test_the_fused_activation_is_gpt2s_own",
     ("GPT-2 gets another activation", 'approximate="tanh"', 'approximate="none"')),
    ("speed/fast.can_pack",
     "unit/test_packing.py::test_a_model_with_a_sliding_window_is_not_packed[qwen2 with windows]",
     ("windows are packed", 'kinds == {"full_attention"}', "True")),
    ("speed/fast.can_pack",
     "unit/test_packing.py::test_a_model_whose_frequencies_follow_the_longest_row_is_not_packed"
     "[dynamic]",
     ("frequencies that follow the longest row are packed",
      'rope.get("rope_type") not in ("dynamic", "longrope")', "True")),
    ("speed/fast.can_pack",
     "unit/test_packing.py::test_a_model_whose_frequencies_follow_the_longest_row_is_not_packed"
     "[longrope]",
     ("frequencies that follow the original length are packed",
      '("dynamic", "longrope")', '("dynamic",)')),
    ("speed/fast.make_tied_gradient_sparse",
     "unit/test_fast.py::test_only_a_tied_weight_has_a_sparse_part",
     ("untied weights get a sparse gradient",
      'getattr(head, "weight", None) is embedding.weight', "True")),
    ("reward_model.RewardModel.forward_pairs",
     "unit/test_reward_model.py::test_forward_keeps_the_order_of_the_texts",
     ("scores in another order than texts", "[order.argsort().to(self.device)]", "")),
    ("policy.scatter_tokens", "unit/test_policy.py::test_scatter_tokens_by_hand",
     ("tokens go into the padding", "masked_scatter(mask, x)", "masked_scatter(~mask, x)")),
    ("policy.evaluating",
     "unit/test_reward_model.py::test_score_is_forward_in_eval_mode_whatever_the_mode",
     ("a look leaves dropout on", "model.eval()", "pass")),
    ("policy.evaluating",
     "unit/test_policy.py::test_evaluating_restores_each_mode_even_after_an_error",
     ("a look records a gradient", "with torch.no_grad():", "if True:"),
     ("after a look the mode is lost", "module.training = True", "pass")),
    ("policy.disable_dropout",
     "unit/test_policy.py::test_without_dropout_train_mode_is_eval_mode[gpt2]",
     ("dropout modules stay on", "module.p = 0.0", "pass")),
    ("policy.disable_dropout",
     "unit/test_policy.py::test_without_dropout_train_mode_is_eval_mode[opt]",
     ("dropout numbers stay", "setattr(module, name, 0.0)", "pass")),
    ("reward_model.RewardModel.score",
     "unit/test_reward_model.py::test_scores_depend_neither_on_batching_nor_on_order[bert]",
     ("scores in the order of the groups", "scores[rows] = ", "scores[sorted(rows)] = ")),
    ("reward_model.RewardModel.score",
     "unit/test_reward_model.py::test_score_is_forward_in_eval_mode_whatever_the_mode",
     ("scores with dropout", "evaluating(self)", "evaluating()")),
    ("reward_model.RewardModel.rescale", "unit/test_reward_model.py::test_rescale",
     ("the old bias is not scaled", ".mul_(gain).add_(bias)", ".add_(bias)")),
    ("loading/checks.scoring_tokenizer",
     "unit/test_reward_model.py::test_the_pad_token_of_a_decoder_is_the_tokenizers",
     ("the pad token of the config stays",
      "model.config.get_text_config().pad_token_id = tokenizer.pad_token_id", "pass")),
    ("loading/checks.scoring_tokenizer",
     "unit/test_reward_model.py::test_the_tokenizer_that_was_given_stays_as_it_is",
     ("the user's tokenizer is changed", "copy.deepcopy(tokenizer)", "tokenizer")),
    ("loading/checks._misfit",
     "unit/test_room.py::test_a_row_that_the_model_has_no_room_for[too long-sampled]",
     ("new tokens need no positions", "length + new_tokens <= positions", "length <= positions")),
    ("loading/checks.positions_of", "unit/test_room.py::test_positions[longrope]",
     ("frequencies that follow the longest row", '"longrope"', '"never"')),
    ("loading/checks.positions_of",
     "unit/test_reward_model.py::test_a_roberta_counts_its_positions_from_behind_its_pad_id[4]",
     ("RoBERTa has all its positions",
      "table.num_embeddings - table.padding_idx - 1", "table.num_embeddings"),
     ("RoBERTa's pad id is taken for 1",
      "table.num_embeddings - table.padding_idx - 1", "table.num_embeddings - 2")),
    ("loading/checks.choose_padding_side",
     "unit/test_reward_model.py::test_a_classifier_that_heeds_no_mask_is_refused",
     ("padding that changes a score is taken", "rtol=near, atol=near", "rtol=near, atol=9")),
    ("reward_model.RewardModel.__init__",
     "unit/test_reward_model.py::test_scores_near_2_stay_different_in_bfloat16",
     ("scores in half precision",
      "self._last_layer.register_forward_hook(_linear_in_float32)", "pass")),
    ("reward_model._linear_in_float32",
     "unit/test_reward_model.py::test_under_autocast_the_last_layer_is_in_float32[bert]",
     ("the last layer under autocast all the same", "enabled=False", "enabled=True"),
     ("without its bias", "None if bias is None else at_least_float32(bias)", "None")),

    ("reward_model.RewardModel._scores",
     "unit/test_reward_model.py::test_a_labels_score_is_the_log_of_what_the_pipeline_says"
     "[bert-bert_syllables-multi_label_classification-sigmoid-POSITIVE]",
     ("labels that exclude each other not", "one_of_them=not several", "one_of_them=True")),

    # pairs
    ("encoding/pairs._as_one",
     "unit/test_pairs.py::test_two_parts_of_one_text_are_what_the_tokenizer_makes_of_it",
     ("two words become one", '"" if response[0].isspace() else " "', '""')),
    ("encoding/pairs.PairCodec._read",
     "unit/test_pairs.py::test_what_a_text_spells_is_no_special_token[bytewise]",
     ("a text may write special tokens",
      "split_special_tokens=True", "split_special_tokens=False")),
    ("encoding/pairs.PairCodec._read",
     "unit/test_pairs.py::test_what_a_text_spells_is_no_special_token[unigram]",
     ("special tokens that a text spells stay", "unknown_id if i in self.spelled else i", "i")),
    ("encoding/pairs.PairCodec._read",
     "unit/test_pairs.py::test_elsewhere_a_new_line_and_an_eos_are_added[syllables]",
     ("no EOS where nothing separates", "ids.append(eos_id)", "pass")),
    ("encoding/pairs.PairCodec._read",
     "unit/test_pairs.py::test_a_text_that_is_far_too_long_is_not_tokenised_whole[True]",
     ("a text of any length is tokenised",
      "[text[-letters:] if from_end else text[:letters] for text in some]", "list(some)")),
    ("encoding/pairs._Tokens.fitting",
     "unit/test_pairs.py::test_a_response_that_just_fits_is_whole",
     ("a response that just fits is cut",
      "min(room, len(self.ids))", "min(room - 1, len(self.ids))")),
    ("encoding/pairs._Tokens.fitting",
     "unit/test_reward_model.py::test_a_character_of_several_tokens_is_cut_as_counted[8]",
     ("a character is cut in two", "spans[kept][0] < spans[kept - 1][1]", "False")),
    ("encoding/pairs.PairCodec.encode",
     "unit/test_reward_model.py::test_cuts_end_of_response_then_beginning_of_prompt",
     ("the prompt loses its end",
      "prompt.ids[max(0, len(prompt.ids) - self.room + kept) :]", "prompt.ids[: self.room - kept]"),
     ("no room stays for the prompt", "self.room * 3 // 4", "self.room")),
    ("encoding/pairs.PairCodec.encode",
     "unit/test_pairs.py::test_a_response_that_just_fits_is_whole",
     ("a pair that fits is cut", "self.room - len(prompt.ids)", "0")),
    ("encoding/pairs.PairCodec.pad",
     "unit/test_pairs.py::test_padding_is_masked_on_either_side[right]",
     ("padding is attended to", "[torch.ones_like(pair.ids) for pair in pairs], 0",
      "[torch.ones_like(pair.ids) for pair in pairs], 1")),
    ("encoding/pairs.PairCodec._types",
     "unit/test_reward_model.py::test_a_pair_is_cls_prompt_sep_response_sep",
     ("prompt and response of one type", "[self.text_types[1]]", "[self.text_types[0]]")),

    # sampling
    ("sampling._sample",
     "unit/test_plain.py::test_the_same_uniform_numbers_draw_the_same_tokens[gpt2]",
     ("a plain sampler attends to the padding",
      "attention_mask=attention_mask", "attention_mask=torch.ones_like(attention_mask)"),
     ("a plain sampler counts the padding", "position_ids=positions", "position_ids=None")),
    ("sampling._sample",
     "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]",
     ("the prompts' padding is attended to",
      "attention_mask.to(device)", "torch.ones_like(attention_mask).to(device)"),
     ("positions count the left padding",
      "(attention_mask.cumsum(1) - 1)", "(torch.ones_like(attention_mask).cumsum(1) - 1)"),
     ("each pass attends to the padding",
      "hidden_states(ids, attention_mask,", "hidden_states(ids, torch.ones_like(attention_mask),"),
     ("one random number for all tokens", "uniforms[live, t]", "uniforms[live, 0]"),
     ("rows inherit others' random numbers", "uniforms[live, t]", "uniforms[: len(live), t]"),
     ("rows go on that have ended", "tokens != eos_id", "tokens == eos_id"),
     ("other rows' attention masks", "attention_mask[going]", "attention_mask[: len(going)]"),
     ("new tokens are not attended to",
      "torch.ones_like(tokens[:, None])", "torch.zeros_like(tokens[:, None])")),
    ("sampling._sample",
     "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[0.6-gpt2]",
     ("temperature forgotten", "temperature=temperature", "temperature=1.0")),
    ("sampling.sample",
     "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]",
     ("all rows share their random numbers",
      "torch.rand(len(prompt_ids), max_new_tokens, generator=rng, dtype=torch.float64)",
      "torch.rand(1, max_new_tokens, generator=rng, "
      "dtype=torch.float64).repeat(len(prompt_ids), 1)")),
    ("sampling.sample",
     "unit/test_sampling.py::test_how_many_rows_are_sampled_at_once_changes_nothing",
     ("random numbers reused by later rows", "uniforms[rows]", "uniforms")),
    ("sampling.sample",
     "unit/test_sampling.py::test_dropout_is_off_while_sampling_and_the_mode_comes_back[True]",
     ("samples with dropout", "evaluating(policy)", "evaluating()")),
    ("sampling.sample",
     "unit/test_sampling.py::test_rows_at_once_have_room_for_prompt_and_response",
     ("no room for the responses", "default=0) + max_new_tokens", "default=0)")),
    ("speed/cache.KeyValueCache.select",
     "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]",
     ("the cache keeps other rows", "cache.batch_select_indices(rows)",
      "cache.batch_select_indices(rows.new_tensor(range(len(rows))))")),
    ("sampling._left_padded",
     "unit/test_sampling.py::test_each_row_is_what_the_row_alone_draws_by_hand[1.0-gpt2]",
     ("prompts padded on the right",
      "ids[b, width - len(row) :] = row", "ids[b, : len(row)] = row"),
     ("the mask on the wrong side",
      "attention_mask[b, width - len(row) :] = 1", "attention_mask[b, : len(row)] = 1"),
     ("the mask inverted", "return ids, attention_mask", "return ids, 1 - attention_mask")),
    ("sampling._inverse_cdf",
     "unit/test_sampling.py::test_a_uniform_number_on_an_edge_takes_the_next_token",
     ("an edge takes the token before it", "right=True", "right=False")),
    ("sampling._inverse_cdf",
     "unit/test_sampling.py::test_the_largest_uniform_number_draws_no_impossible_token",
     ("the cdf is not scaled by its end", "uniforms[:, None] * cdf[:, -1:]", "uniforms[:, None]")),
    ("sampling._inverse_cdf",
     "unit/test_sampling.py::test_half_precision_of_the_logits_moves_no_edge[dtype0]",
     ("a softmax in the model's own precision",
      "logits.to(uniforms.dtype).softmax(-1)", "logits.softmax(-1).to(uniforms.dtype)")),
    ("sampling.below_one", "unit/test_sampling.py::test_no_uniform_number_is_rounded_up_to_1",
     ("a uniform number is rounded up to 1",
      "clamp(max=1 - torch.finfo(dtype).eps / 2)", "clamp(max=1)")),
    ("speed/cache.cache_bytes",
     "unit/test_sampling.py::test_a_tokens_keys_and_values_are_as_large_as_the_model_makes_them"
     "[llama]",
     ("a cache for heads that share theirs",
      'getattr(config, "num_key_value_heads", None) or heads', "heads")),
    ("speed/cache.cache_bytes",
     "unit/test_sampling.py::test_a_tokens_keys_and_values_are_as_large_as_the_model_makes_them"
     "[wide_heads]",
     ("heads are as wide as the model over their number",
      'getattr(config, "head_dim", None) or config.hidden_size // heads',
      "config.hidden_size // heads")),
    ("speed/cache._kept_by",
     "unit/test_sampling.py::test_a_model_without_keys_and_values_is_refused[lfm2]",
     ("states of a layer are taken for keys and values",
      "all(type(x) in known for x in cache.layers)", "True")),
    ("speed/cache._kept_by",
     "unit/test_sampling.py::test_the_cache_is_found_by_its_old_and_its_new_name[cache]",
     ("the newer name of the cache is not known",
      "CACHE_NAMES & output.keys()", '{"past_key_values"} & output.keys()')),
    ("speed/cache._kept_by",
     "unit/test_sampling.py::test_the_cache_is_found_by_its_old_and_its_new_name[past_key_values]",
     ("the older name of the cache is not known",
      "CACHE_NAMES & output.keys()", '{"cache"} & output.keys()')),

    # rollout
    ("rollout.Rollout.mask", "unit/test_rollout.py::test_padding_is_zero_in_everything[k1]",
     ("the rollout's mask ignores lengths", "self.sequences.mask", "self.sequences.mask | True")),
    ("rollout.Rollout.lengths", "unit/test_rollout.py::test_padding_is_zero_in_everything[k1]",
     ("lengths without EOS", "self.mask.sum(1)", "self.mask.sum(1) - 1")),
    ("rollout.collect", "unit/test_rollout.py::test_collect_remembers_what_it_sampled",
     ("temperature missing in sampling",
      "temperature=config.temperature,\n        rng", "temperature=1.0,\n        rng"),
     ("temperature missing in scoring",
      "temperature=config.temperature,\n        kl", "temperature=1.0,\n        kl")),
    ("rollout.collect",
     "unit/test_ppo.py::test_a_rollout_and_its_update_pass_no_more_than_max_tokens",
     ("scoring passes of any size", "max_tokens=config.max_tokens", "max_tokens=1024")),
    ("rollout.score_rollout",
     "unit/test_rollout.py::test_scoring_is_without_dropout_and_the_modes_come_back",
     ("scored with dropout", "evaluating(policy, ref_policy)", "evaluating()"),
     ("a reference with dropout", "evaluating(policy, ref_policy)", "evaluating(policy)")),
    ("rollout._score", "unit/test_rollout.py::test_scoring_passes_are_the_plain_ones[gpt2]",
     ("temperature missing in the policy's pass",
      "output = policy(rows, temperature=temperature, ", "output = policy(rows, "),
     ("temperature missing in the reference's pass",
      "ref_policy(rows, temperature=temperature, ", "ref_policy(rows, "),
     ("the policy for the reference", "ref_policy(rows, ", "policy(rows, ")),
    ("rollout.score_rollout", "unit/test_rollout.py::test_scoring_passes_are_the_plain_ones[gpt2]",
     ("rows in the order of the groups", "whole[rows, ", "whole[sorted(rows), "),
     ("sign of the KL",
      "kl_estimate(logprobs, ref_logprobs", "kl_estimate(ref_logprobs, logprobs")),
    ("rollout._score", "unit/test_rollout.py::test_full_kl_is_the_sum_over_the_vocabulary",
     ("exact KL in the wrong cells",
      "scatter_tokens(per_token, rows.mask)", "scatter_tokens(per_token, rows.mask.T).T")),
    ("rollout.score_rollout", "unit/test_rollout.py::test_ended_says_which_rows_end_in_eos",
     ("EOS anywhere ends a response", "bool(ids[-1] == eos_id)", "bool((ids == eos_id).any())"),
     ("ended inverted", "ids[-1] == eos_id", "ids[-1] != eos_id")),
    ("rollout.score_rollout",
     "unit/test_rollout.py::test_a_response_of_one_token_has_ended_only_if_that_is_eos",
     ("one token that is not EOS has ended",
      "bool(ids[-1] == eos_id) for", "bool(len(ids) == 1 or ids[-1] == eos_id) for")),
    ("loading/reward_function._scores",
     "unit/test_rollout.py::test_a_refused_score_stops_collect",
     ("a score of NaN is let through",
      "not abs(score) <= LARGEST_SCORE", "abs(score) > LARGEST_SCORE")),
    ("loading/reward_function._scores", "unit/test_rollout.py::test_a_reward_works_on_copies",
     ("a reward may change the data",
      "_copies(data.get(key, prompts))", "list(data.get(key, prompts))")),
    ("loading/reward_function.as_scores",
     "unit/test_rollout.py::test_what_is_no_score_is_refused_in_one_line",
     ("the keys of a dict are scores",
      "(Mapping, AbstractSet, *_TEXTS)", "(AbstractSet, *_TEXTS)")),

    # sft
    ("sft.batch_loss", "unit/test_sft.py::test_prompt_tokens_get_no_loss",
     ("prompts are imitated",
      "[x.prompt_ids for x in examples], [x.response_ids for x in examples]",
      "[x.prompt_ids[:1] for x in examples], [x.prompt_ids.new_tensor([*x.prompt_ids[1:], "
      "*x.response_ids]) for x in examples]"),
     ("padding is imitated", "batch.mask)", "batch.mask | True)")),
    ("sft.train",
     "unit/test_sft.py::test_dropout_acts_in_training_whatever_the_mode_was_and_not_in_a_look",
     ("trains without dropout", "policy.train()", "pass")),
    ("sft.train", "unit/test_sft.py::test_dropout_differs_from_step_to_step_and_from_seed_to_seed",
     ("the same dropout in each step",
      "dropout_rng, config.seed, state.step,", "dropout_rng, config.seed, 0,"),
     ("each seed has the same dropout",
      "dropout_rng, config.seed, state.step,", "dropout_rng, 0, state.step,")),
    ("sft.train", "unit/test_precision.py::test_a_look_has_the_precision_of_the_run[sft]",
     ("each look in float32", "with state.optimizer.autocast():\n                metrics",
      "if True:\n                metrics")),
    ("optim.accumulate", "unit/test_sft.py::test_micro_batches_leave_the_gradient_as_it_is",
     ("a micro-batch weighs as a batch", "found.loss * found.count / total", "found.loss")),
    ("optim._shares", "unit/test_sft.py::test_evaluate_by_hand",
     ("micro-batches weigh alike", "numbers * count", "numbers")),
    ("optim.accumulate", "unit/test_reward.py::test_micro_batches_leave_the_gradient_as_it_is",
     ("a micro-batch of pairs weighs as a batch",
      "found.loss * found.count / total", "found.loss")),
    ("online.require_finite",
     "unit/test_nonfinite.py::test_a_rollout_that_is_not_finite_in_one_row_moves_no_weight",
     ("a minibatch before the bad one is learned from",
      "buffer.advantages + buffer.returns", "torch.zeros(1)")),
    ("rollout.collect", "unit/test_rollout.py::test_rows_of_a_group_follow_one_another[3]",
     ("rows of a group lie apart",
      "prompt for prompt in prompts for _ in range(group_size)",
      "prompt for _ in range(group_size) for prompt in prompts")),
    ("optim._shares", "unit/test_reward.py::test_evaluate_is_over_all_pairs_and_without_dropout",
     ("pairs of a small micro-batch weigh more", "numbers * count", "numbers")),
    ("optim.accumulate", "unit/test_dpo.py::test_micro_batches_leave_the_gradient_as_it_is",
     ("DPO's micro-batch weighs as a batch", "found.loss * found.count / total", "found.loss")),
    ("optim._shares", "unit/test_dpo.py::test_micro_batches_leave_the_gradient_as_it_is",
     ("DPO's micro-batches weigh alike", "numbers.sum()", "numbers.mean()")),
    ("sft.evaluate", "unit/test_sft.py::test_evaluate_by_hand",
     ("looks with dropout", "evaluating(policy)", "evaluating()")),
    ("data.Cursor.epochs", "unit/test_sft.py::test_epochs_and_tokens_are_counted_on",
     ("the epochs before are not counted", "self.epoch + ", "")),
    ("sft.means", "unit/test_sft.py::test_a_pass_holds_no_more_than_max_tokens",
     ("passes of any size", "max_tokens=config.max_tokens", "max_tokens=1024")),

    # reward
    ("reward.batch_loss", "unit/test_reward.py::test_loss_and_metrics_by_hand",
     ("chosen and rejected exchanged",
      "chosen, rejected = reward_model", "rejected, chosen = reward_model"),
     ("the margin is not handed on", "margin=margin", "margin=None")),
    ("reward.prepare_pairs",
     "unit/test_reward.py::test_pairs_that_are_the_same_tokens_are_left_out_and_counted",
     ("pairs that nothing tells apart are kept",
      "not torch.equal(chosen.ids, rejected.ids)", "True")),
    ("reward.train",
     "unit/test_nonfinite.py::test_scores_that_are_infinite_stop_though_their_loss_is_0",
     ("scores may be infinite where the loss is 0", "step(batch, metrics)", "step(batch)")),
    ("reward.train",
     "unit/test_reward.py::test_dropout_differs_from_step_to_step_and_from_seed_to_seed",
     ("the same dropout in each step",
      "dropout_rng, config.seed, state.step,", "dropout_rng, config.seed, 0,")),
    ("reward.train",
     "unit/test_reward.py::test_when_held_out_pairs_are_looked_at_and_in_which_mode",
     ("trains without dropout", "reward_model.train()", "pass"),
     ("no look at the end", " or state.step == total_steps", "")),
    ("reward.train", "unit/test_precision.py::test_a_look_has_the_precision_of_the_run[reward]",
     ("the reward model's look in float32",
      "with state.optimizer.autocast():\n                metrics",
      "if True:\n                metrics")),
    ("reward.evaluate", "unit/test_reward.py::test_evaluate_is_over_all_pairs_and_without_dropout",
     ("looks with dropout", "evaluating(reward_model)", "evaluating()")),
    ("reward.normalise", "unit/test_reward.py::test_normalised_scores_survive_saving",
     ("multiplied by the deviation", "gain=1 / std", "gain=std"),
     ("the mean is not scaled", "-mean / std", "-mean")),
    ("reward.normalise",
     "unit/test_reward.py::test_scores_that_are_equal_but_for_rounding_cannot_be_normalised",
     ("rounding is a difference of scores", "if not std > 1e-6:", "if not std > 0:")),

    # dpo
    ("dpo.new_state", "unit/test_dpo.py::test_dropout_is_off[True]",
     ("dropout stays on", "disable_dropout(policy)", "pass")),
    ("dpo.new_state", "unit/test_dpo.py::test_training_is_the_plain_loop[True]",
     ("the cache holds the policy", "cache_reference(start,", "cache_reference(policy,")),
    ("dpo.new_state",
     "unit/test_precision.py::test_bfloat16_is_near_float32_and_leaves_weights_and_losses_in_it"
     "[dpo_steps]",
     ("a cached reference in float32", "with optimizer.autocast():", "if True:")),
    ("dpo.response_logprobs",
     "unit/test_dpo.py::test_cache_holds_the_logprobs_of_each_pair_in_its_place",
     ("mean over tokens instead of sum", ".logprobs.sum(1)", ".logprobs.mean(1)"),
     ("chosen and rejected exchanged", "chosen, rejected = policy", "rejected, chosen = policy")),
    ("dpo.batch_loss", "unit/test_dpo.py::test_training_is_the_plain_loop[False]",
     ("the policy for the reference", "_reference(asked,", "_reference(policy,")),
    ("dpo.batch_loss", "unit/test_dpo.py::test_each_loss_gets_the_numbers_that_it_takes"
     "[simpo-0.7-False]",
     ("a mean over the tokens of the other response", "lengths[i % 2]", "lengths[1 - i % 2]"),
     ("the rejected response is imitated too", "sft_term(chosen,", "sft_term(chosen + rejected,"),
     ("the SFT term unweighted", "config.sft_coef * sft_loss.mean()", "sft_loss.mean()")),
    ("dpo.batch_loss",
     "unit/test_dpo.py::test_micro_batches_leave_the_gradient_of_an_sft_term_as_it_is[own1]",
     ("micro-batches decide the weight of a response",
      "sft_loss.mean()", "(sft_loss * lengths[0]).sum() / lengths[0].sum()")),
    ("dpo.batch_loss",
     "unit/test_dpo.py::test_a_loss_without_a_reference_runs_none[True-False]",
     ("a reference that is not needed is run",
      "None if config.reference_free else ref_policy", "ref_policy")),
    ("dpo.preference_loss", "unit/test_dpo.py::test_training_is_the_plain_loop[True]",
     ("label smoothing not handed on",
      "dpo_loss(*logprobs, beta=beta, label_smoothing=config.label_smoothing)",
      "dpo_loss(*logprobs, beta=beta, label_smoothing=0.0)")),
    ("dpo.cache_reference",
     "unit/test_dpo.py::test_cache_holds_the_logprobs_of_each_pair_in_its_place",
     ("the cache in the order of the groups",
      "logprobs[rows] = ", "logprobs[[i - 1 for i in rows]] = ")),
    ("dpo._reference",
     "unit/test_dpo.py::test_a_reference_left_in_train_mode_has_no_dropout[False]",
     ("a reference with dropout", "evaluating(ref_policy)", "evaluating()")),
    ("dpo._reference", "unit/test_dpo.py::test_a_reference_that_is_cached_in_part_is_asked_for_all",
     ("a partly cached reference is a whole one", "len(cached) == len(examples)", "cached")),
    ("dpo.train",
     "unit/test_precision.py::test_a_cached_reference_of_held_out_pairs_has_the_precision_of_the_ru"
     "n",
     ("a cached reference of held-out pairs in float32",
      "and heldout and ref_policy is not None:\n        with state.optimizer.autocast():",
      "and heldout and ref_policy is not None:\n        if True:")),
    ("dpo.train", "unit/test_dpo.py::test_a_pass_holds_no_more_than_max_tokens[True]",
     ("held-out pairs are not cached",
      "if config.cache_reference and heldout and", "if False and")),
    ("dpo.means", "unit/test_dpo.py::test_evaluate_by_hand",
     ("held-out means over a batch", "total=len(examples)", "total=config.batch_size")),

    # kto
    ("kto.new_state", "unit/test_kto.py::test_dropout_is_off",
     ("KTO keeps its dropout", "disable_dropout(policy)", "pass")),
    ("kto.new_state", "unit/test_kto.py::test_training_is_the_plain_loop",
     ("KTO's cache holds the policy", "cache_reference(ref_policy,", "cache_reference(policy,")),
    ("kto.new_state",
     "unit/test_precision.py::test_bfloat16_is_near_float32_and_leaves_weights_and_losses_in_it"
     "[kto_steps]",
     ("KTO's cached reference in float32", "with optimizer.autocast():", "if True:")),
    ("kto.new_state", "unit/test_kto.py::test_a_row_alone_has_no_mismatched_pair",
     ("a batch of one is left over", "_require_no_single_row(len(examples), config)", "pass")),
    ("kto.first_loss", "unit/test_kto.py::test_a_live_start_is_a_tie_of_policy_and_reference",
     ("KTO is said to begin with another loss", "/ len(weights) / 2", "/ len(weights)")),
    ("kto.weight_ratio", "unit/test_kto.py::test_weight_ratio",
     ("the ratio upside down", "desirable / undesirable if undesirable > 0",
      "undesirable / desirable if undesirable > 0")),
    ("kto.mismatched", "unit/test_kto.py::test_responses_are_rotated_by_one",
     ("rotated the other way", "examples[row - places]", "examples[(row + places) % n]"),
     ("each response with its own prompt", "examples[row - places]", "examples[row]")),
    ("kto.mismatched", "unit/test_kto.py::test_no_prompt_meets_a_response_of_its_own",
     ("a response of the pair that the prompt is of", "meetings(places) == 0", "True")),
    ("kto.mismatched",
     "unit/test_kto.py::test_where_prompts_must_meet_their_own_they_do_so_rarely_and_never_the_same"
     "_row",
     ("a row meets itself", "min(range(1, n), key=meetings)", "0"),
     ("as often as can be", "min(range(1, n), key=meetings)", "max(range(1, n), key=meetings)")),
    ("kto.reference_point", "unit/test_kto.py::test_training_is_the_plain_loop",
     ("the KL of the policy against itself", "for model in (policy, ref_policy):",
      "for model in (policy, policy):"),
     ("the KL of matched pairs", "mismatched(examples), ", "examples, ")),
    ("kto.reference_point", "unit/test_kto.py::test_apo_zero_has_no_reference_point",
     ("APO-zero has a reference point", 'config.loss == "apo_zero_unpaired"', "False")),
    ("kto.batch_loss", "unit/test_kto.py::test_training_is_the_plain_loop",
     ("the policy for KTO's reference", "_reference(ref_policy,", "_reference(policy,"),
     ("good or bad beside 0", "found.rewards - config.beta * kl", "found.rewards"),
     ("the reference point is not in the unit of rewards", "config.beta * kl  #", "kl  #")),
    ("kto.means", "unit/test_kto.py::test_micro_batches_leave_the_kl_and_the_gradient_as_they_are",
     ("a KL for each micro-batch", "batch_loss(policy, ref_policy, part, kl, config)",
      "batch_loss(policy, ref_policy, part, reference_point(policy, ref_policy, part, config) "
      "if len(part) > 1 else kl * 0, config)")),
    ("kto.means", "unit/test_kto.py::test_evaluate_by_hand",
     ("rows of the other label in the mean", "metrics[name] = mean / n",
      "metrics[name] = mean / len(examples)")),
    ("kto.means", "unit/test_precision.py::test_the_kl_of_a_step_has_the_precision_of_the_run",
     ("a step's KL in float32",
      "contextlib.nullcontext() if optimizer is None else optimizer.autocast()",
      "contextlib.nullcontext()")),
    ("kto.cache_reference",
     "unit/test_kto.py::test_cache_holds_the_logprob_of_each_row_in_its_place",
     ("cached rows out of place", "logprobs[rows] = ", "logprobs[sorted(rows)] = ")),
    ("kto.response_logprobs",
     "unit/test_kto.py::test_cache_holds_the_logprob_of_each_row_in_its_place",
     ("KTO's mean over tokens instead of sum", ".logprobs.sum(1)", ".logprobs.mean(1)")),
    ("kto._reference", "unit/test_kto.py::test_dropout_is_off[False]",
     ("KTO's reference with dropout", "with evaluating(ref_policy):", "if True:")),
    ("kto._reference", "unit/test_kto.py::test_a_reference_that_is_cached_in_part_is_asked_for_all",
     ("a part of the cache is enough", "len(cached) == len(examples)", "cached")),
    ("kto.check_heldout", "unit/test_kto.py::test_a_row_alone_has_no_mismatched_pair",
     ("one row is held out", 'len(heldout) != 1 or config.loss != "kto"', "True")),
    ("kto.train",
     "unit/test_kto.py::test_what_is_counted_on_the_way_and_when_held_out_rows_are_looked_at",
     ("no look at KTO's end", " or state.step == total_steps", "")),
    ("kto.train", "unit/test_precision.py::test_a_look_has_the_precision_of_the_run[kto]",
     ("KTO's look in float32", "with state.optimizer.autocast():\n                metrics",
      "if True:\n                metrics")),
    ("kto._require_room", "unit/test_kto.py::test_a_mismatched_pair_needs_room_too",
     ("mismatched pairs may be too long",
      "prompt + response <= policy.positions", "True")),

    # ppo
    ("ppo.RunningMoments", "unit/test_ppo.py::test_running_moments_by_hand",
     ("sign of the step to the batch's mean", "batch_mean - self.mean", "self.mean - batch_mean"),
     ("batches weigh alike", "delta * n / total  # (2)", "delta / 2  # (2)"),
     ("the batches' means do not vary",
      "batch_squares + delta**2 * self.count * n / total", "batch_squares"),
     ("biased variance", "max(self.count - 1, 1)", "self.count")),
    ("ppo.RunningMoments", "unit/test_ppo.py::test_running_moments_are_those_of_all_scores",
     ("epsilon outside the root", "(variance + 1e-8) ** 0.5", "(variance**0.5 + 1e-8)")),
    ("ppo.RunningMoments",
     "unit/test_ppo.py::test_running_moments_of_float32_scores_are_sums_in_float64",
     ("moments in the scores' own precision", "scores.cpu().double()", "scores.cpu()")),
    ("online.State.restore", "unit/test_ppo.py::test_resume",
     ("sampling starts again after a resume",
      'self.sampling_rng.set_state(state["sampling_rng"])', "pass")),
    ("ppo.State.restore",
     "unit/test_ppo.py::test_a_fixed_coefficient_is_the_configs_after_a_resume_too",
     ("a fixed coefficient is the saved one",
      "if isinstance(self.kl_control, AdaptiveKL):", "if True:")),
    ("online.new_state", "unit/test_ppo.py::test_dropout_is_off",
     ("dropout stays on", "disable_dropout(policy)", "pass")),
    ("online.new_state", "unit/test_ppo.py::test_training_is_the_plain_loop[shared]",
     ("the schedule counts rollouts",
      "config.steps * config.epochs * config.minibatches", "config.steps"),
     ("one random stream for two purposes", "config.seed + 2 * 10**6", "config.seed + 10**6")),
    ("grpo.batch_loss",
     "parity/test_grpo_1_16.py::test_a_whole_run_ends_at_the_weights_of_trl[dapo]",
     ("cut responses are learned from", "mask & learned_from(rollout, config)[rows, None]", "mask"),
     ("advantages of other rows",
      "buffer.advantages[rows, 0]", "buffer.advantages[: len(rows), 0]"),
     ("the upper limit is the lower one",
      "config.clip if config.clip_high is None else config.clip_high", "config.clip")),
    ("grpo.batch_loss",
     "parity/test_grpo_1_16.py::test_a_whole_run_ends_at_the_weights_of_trl[grpo]",
     ("scored at temperature 1", "temperature=config.temperature", "temperature=1.0"),
     ("the KL in the reward alone",
      'config.kl_coef if config.kl_in == "loss" else 0.0', "0.0")),
    ("grpo.learned_from",
     "parity/test_grpo_1_16.py::test_a_whole_run_ends_at_the_weights_of_trl[dapo]",
     ("those that were cut", "return rollout.ended", "return ~rollout.ended")),
    ("grpo.minibatch_step",
     "parity/test_grpo_1_16.py::test_a_whole_run_ends_at_the_weights_of_trl[dapo]",
     ("a mean over tokens by the number of responses",
      'config.loss_mean == "token"', "False"),
     ("cut responses in the number of tokens",
      "rollout.lengths[rows][learned]", "rollout.lengths[rows]")),
    ("grpo.minibatch_step", "unit/test_grpo.py::test_cut_responses_have_no_ratio[sequence]",
     ("cut responses count as unmoved", "len(rows) / max(int(learned.sum()), 1)", "1")),
    ("grpo.judge", "unit/test_oracle_of_groups.py::"
     "test_one_step_on_every_pair_is_the_gradient_of_the_objective[grpo]",
     ("the KL in the loss alone",
      'config.kl_coef if config.kl_in == "reward" else 0.0', "0.0")),
    ("rloo.judge", "unit/test_oracle_of_groups.py::"
     "test_one_step_on_every_pair_is_the_gradient_of_the_objective[rloo]",
     ("no KL in the reward", "kl_coef=config.kl_coef", "kl_coef=0.0"),
     ("the KL of the last token alone", "rloo_advantages(returns[:, 0]",
      "rloo_advantages(rewards.gather(1, rollout.lengths[:, None] - 1)[:, 0]")),
    ("rloo.batch_loss",
     "parity/test_rloo_1_16.py::test_a_whole_run_ends_at_the_weights_of_trl[rloo, two steps]",
     ("scored at temperature 1", "temperature=config.temperature", "temperature=1.0"),
     ("advantages of other rows",
      "buffer.advantages[rows, 0]", "buffer.advantages[: len(rows), 0]"),
     ("the upper limit is the lower one",
      "config.clip if config.clip_high is None else config.clip_high", "config.clip")),
    ("grpo.judge", "unit/test_grpo.py::test_judge_by_hand",
     ("the score behind the response",
      "rollout.kl, rollout.mask", "rollout.kl, rollout.mask | True"),
     ("returns of no token", "(rewards, rollout.mask)", "(rewards, rollout.mask & False)"),
     ("advantages of the padding",
      "(advantages, rollout.mask)", "(advantages, rollout.mask | True)")),
    ("grpo.batch_loss",
     "parity/test_grpo_1_16.py::test_a_whole_run_ends_at_the_weights_of_trl[grpo]",
     ("padding is learned from", "mask = sequences.mask", "mask = sequences.mask | True")),
    ("grpo.minibatch_step",
     "parity/test_grpo_1_16.py::test_a_whole_run_ends_at_the_weights_of_trl[grpo]",
     ("a pass larger than max_tokens", "sequences.attention_mask", "mask")),
    ("rloo.judge", "unit/test_grpo.py::test_judge_by_hand",
     ("the score behind the response",
      "rollout.kl, rollout.mask", "rollout.kl, rollout.mask | True"),
     ("returns of no token", "(rewards, rollout.mask)", "(rewards, rollout.mask & False)"),
     ("advantages of the padding",
      "(advantages, rollout.mask)", "(advantages, rollout.mask | True)")),
    ("rloo.batch_loss",
     "parity/test_rloo_1_16.py::test_a_whole_run_ends_at_the_weights_of_trl[rloo, two steps]",
     ("padding alone is learned from", "mask,\n        clip=", "~mask,\n        clip="),
     ("the mask upside down", "mask = sequences.mask", "mask = ~sequences.mask")),
    ("rloo.minibatch_step",
     "parity/test_rloo_1_16.py::test_a_whole_run_ends_at_the_weights_of_trl[rloo, two steps]",
     ("a pass larger than max_tokens", "sequences.attention_mask", "mask")),
    ("online.rewards_to_come", "unit/test_grpo.py::test_judge_by_hand",
     ("the first token alone earns", "mask, gamma", "mask & (mask.cumsum(1) == 1), gamma"),
     ("later tokens count less", "gamma=1.0", "gamma=0.9")),
    ("online.at_each_token", "unit/test_grpo.py::test_judge_by_hand",
     ("advantages in the padding of a group", "torch.where(mask, advantages[:, None], 0)",
      "advantages[:, None].expand_as(mask)")),
    ("online.equal_groups", "unit/test_grpo.py::test_equal_groups_are_counted",
     ("groups that differ are counted", "_mean_count(torch", "_mean_count(~torch"),
     ("scores without the KL", "buffer.returns[:, 0]", "buffer.rollout.scores")),
    ("online.final_scores", "unit/test_ppo.py::test_score_clip_and_eos_penalty[options1-last1]",
     ("scores are cut on one side",
      "clamp(-config.score_clip, config.score_clip)", "clamp(max=config.score_clip)")),
    ("online.final_scores", "unit/test_ppo.py::test_score_clip_and_eos_penalty[options2-last2]",
     ("a missing EOS is rewarded", "scores - config.eos_penalty", "scores + config.eos_penalty"),
     ("ended inverted", "torch.where(rollout.ended,", "torch.where(~rollout.ended,")),
    ("ppo.judge", "unit/test_ppo.py::test_judge_by_hand",
     ("rewards in the padding", "rollout.kl, rollout.mask", "rollout.kl, rollout.mask | True"),
     ("advantages in the padding",
      "rollout.values, rollout.mask", "rollout.values, rollout.mask | True"),
     ("gamma and lambda exchanged",
      "gamma=config.gamma, lam=config.lam", "gamma=config.lam, lam=config.gamma")),
    ("ppo.judge", "unit/test_ppo.py::test_judge_whitens_rewards_and_keeps_their_mean",
     ("scaled rewards lose their mean",
      "masked_scale(rewards, rollout.mask)", "masked_whiten(rewards, rollout.mask)")),
    ("ppo.judge", "unit/test_ppo.py::test_judge_whitens_advantages_but_not_returns",
     ("whitened over padding too",
      "(advantages, rollout.mask)", "(advantages, rollout.mask | True)"),
     ("returns of whitened advantages",
      "advantages, returns)\n", "advantages, advantages + rollout.values.nan_to_num())\n")),
    ("ppo.minibatch_step", "unit/test_ppo.py::test_training_is_the_plain_loop[shared]",
     ("the whole rollout's tokens are counted",
      "int(rollout.mask[rows].sum())", "int(rollout.mask.sum())")),
    ("ppo.micro_batch", "unit/test_ppo.py::test_training_is_the_plain_loop[shared]",
     ("temperature missing in the update", "temperature=config.temperature", "temperature=1.0"),
     ("new log-probabilities for the old", "rollout.logprobs[cells]", "new.logprobs.detach()"),
     ("whitened for each minibatch",
      "buffer.advantages[cells]", "masked_whiten(buffer.advantages[cells], mask)"),
     ("the policy's clip for the values", "clip=config.value_clip", "clip=config.clip"),
     ("returns for the old values", "rollout.values[cells]", "buffer.returns[cells]"),
     ("value_coef forgotten", "config.value_coef * value_loss.loss", "value_loss.loss"),
     ("entropy of the padding", "masked_mean(new.entropy, mask)", "new.entropy.mean()"),
     ("padding is learned from", "mask = sequences.mask", "mask = torch.ones_like(sequences.mask)"),
     ("the values of padding are learned", "mask,\n        clip=config.value_clip",
      "torch.ones_like(mask),\n        clip=config.value_clip")),
    ("ppo.minibatch_step",
     "unit/test_ppo.py::test_micro_batches_leave_the_gradient_as_it_is[shared]",
     ("a pass larger than max_tokens",
      "rollout.sequences.attention_mask.sum(1)", "rollout.mask.sum(1)")),
    ("ppo.micro_batch",
     "unit/test_ppo.py::test_micro_batches_leave_the_gradient_as_it_is[shared]",
     ("the policy loss ignores its mask",
      "mask,\n        clip=config.clip", "mask | True,\n        clip=config.clip"),
     ("a micro-batch weighs as a minibatch", "policy_loss.loss * share + ", "policy_loss.loss + "),
     ("its values weigh as a minibatch's", "value_loss.loss * share)", "value_loss.loss)")),
    ("online.epoch", "unit/test_ppo.py::test_training_is_the_plain_loop[shared]",
     ("minibatches in the rollout's order",
      "buffer.minibatches(order,", "buffer.minibatches(order.sort().values,")),
    ("online.update", "unit/test_ppo.py::test_training_is_the_plain_loop[shared]",
     ("the same minibatches in each epoch",
      "generator=rng)", "generator=torch.Generator().manual_seed(rng.initial_seed()))")),
    ("online.update", "unit/test_ppo.py::test_stop_kl_is_measured_in_the_last_epoch",
     ("stop_kl is never heeded", 'epochs[-1]["update_k1"] > config.stop_kl', "False"),
     ("stop_kl looks at the first epoch", 'epochs[-1]["update_k1"]', 'epochs[0]["update_k1"]')),
    ("online.update", "unit/test_ppo.py::test_stop_kl_is_a_limit_of_k1",
     ("stop_kl looks at k3", 'epochs[-1]["update_k1"]', 'epochs[-1]["update_k3"]')),
    ("ppo.train", "unit/test_ppo.py::test_training_is_the_plain_loop[shared]",
     ("scores normalised by the moments before", "moments.update(rollout.scores)",
      "state.moments = RunningMoments(**vars(moments)); state.moments.update(rollout.scores)"),
     ("the rate of the next step is reported",
      '"learning_rate": learning_rate', '"learning_rate": state.optimizer.learning_rate')),
    ("ppo.train", "unit/test_ppo.py::test_the_coefficient_in_use_is_the_one_from_before[adaptive]",
     ("the coefficient moves before its use",
      "buffer = judge(",
      "state.kl_control.update(online._per_response(rollout.kl, rollout.mask), "
      "config.batch_size); buffer = judge(")),
    ("online.conclude", "unit/test_ppo.py::test_max_kl_ends_the_run[0.001-1]",
     ("max_kl is ignored", 'metrics["k1"] > config.max_kl', "False")),
    ("online.conclude", "unit/test_ppo.py::test_max_kl_looks_at_k1_whatever_the_rewards_hold[k2]",
     ("max_kl looks at the estimate in the rewards",
      'metrics["k1"] > config.max_kl', 'metrics["kl"] > config.max_kl')),
    ("ppo.train", "unit/test_ppo.py::test_the_coefficient_follows_the_estimate_in_the_rewards[k2]",
     ("the coefficient follows k1 alone",
      'state.kl_control.update(metrics["kl"]', 'state.kl_control.update(metrics["k1"]')),
    ("online.act", "unit/test_precision.py::test_a_rollout_has_the_precision_of_the_run",
     ("a rollout in float32",
      "with state.optimizer.autocast():\n        return", "if True:\n        return")),
    ("online.conclude", "unit/test_precision.py::test_a_look_has_the_precision_of_the_run[ppo]",
     ("an evaluation in float32", "with state.optimizer.autocast():\n            metrics",
      "if True:\n            metrics")),
    ("ppo.report", "unit/test_ppo.py::test_report_never_looks_at_padding",
     ("the mask of the values inverted", "buffer.rollout.mask", "~buffer.rollout.mask"),
     ("padding in the returns' variance",
      "masked_var(buffer.returns, mask)", "buffer.returns.var()"),
     ("padding in the errors' variance", "masked_var(buffer.returns - rollout.values, mask)",
      "(buffer.returns - rollout.values).var()"),
     ("padding in the value", "masked_mean(rollout.values, mask)", "rollout.values.mean()"),
     ("padding in the return", "masked_mean(buffer.returns, mask)", "buffer.returns.mean()")),
    ("online.report", "unit/test_ppo.py::test_report_never_looks_at_padding",
     ("the report's mask inverted", "buffer.rollout.mask", "~buffer.rollout.mask"),
     ("padding in the KL",
      "_per_response(rollout.kl, mask)", "_per_response(rollout.kl, mask | True)"),
     ("padding in k1", "rollout.ref_logprobs, mask)", "rollout.ref_logprobs, mask | True)"),
     ("padding in k3", "_per_response(k3, mask)", "_per_response(k3, mask | True)"),
     ("padding in the reward",
      "_per_response(buffer.rewards, mask)", "_per_response(buffer.rewards, mask | True)"),
     ("padding in the entropy", "masked_mean(rollout.entropy, mask)", "rollout.entropy.mean()")),
    ("online.report", "unit/test_ppo.py::test_tokens_are_those_of_prompts_and_responses",
     ("the prompts' tokens are not counted",
      "rollout.sequences.attention_mask.sum()", "rollout.mask.sum()")),
    ("online.evaluate",
     "unit/test_ppo.py::test_eval_prompts_are_looked_at_with_the_same_random_numbers",
     ("the mask inverted",
      "rollout.ref_logprobs, rollout.mask)", "rollout.ref_logprobs, ~rollout.mask)"),
     ("other random numbers in each look",
      "torch.Generator().manual_seed(config.seed + 3 * 10**6)", "torch.Generator()"),
     ("a look reports the estimate in the rewards",
      "_per_response(rollout.logprobs - rollout.ref_logprobs, rollout.mask)",
      "_per_response(rollout.kl, rollout.mask)"),
     ("single words are counted as pairs",
      "distinct_n(rollout.responses, 2)", "distinct_n(rollout.responses, 1)")),
    ("online._per_response", "unit/test_ppo.py::test_report_never_looks_at_padding",
     ("per token, not per response", ".sum(1).mean()", ".mean()"),
     ("0 times NaN is NaN", "torch.where(mask, x, 0)", "(x * mask)")),
    ("online.mean_stats", "unit/test_ppo.py::test_training_is_the_plain_loop[shared]",
     ("the smallest ratio_max of the minibatches",
      'max(s["ratio_max"] for s in stats)', 'min(s["ratio_max"] for s in stats)')),
    ("harness/stages/rollouts.alone",
     "unit/test_ppo.py::test_the_rows_at_fault_are_looked_for_where_they_were_learned_from",
     ("rows at fault are looked for at temperature 1",
      "temperature=config.temperature", "temperature=1.0")),
    ("config.PPOConfig.__post_init__",
     "unit/test_ppo.py::test_what_cannot_be_trained_with_is_refused",
     ("an adaptive coefficient may turn negative",
      "self.kl_horizon > 0.2 * self.batch_size", "True")),
    ("config.RolloutConfig", "unit/test_ppo.py::test_what_cannot_be_trained_with_is_refused",
     ("a single score is whitened", "at_least=2", "at_least=1")),

    # optim
    ("optim.adamw",
     "unit/test_optim.py::test_what_a_config_says_reaches_the_optimizer[sft_state-cosine]",
     ("any schedule is a linear one", "else config.schedule", 'else "linear"')),
    ("optim.adamw",
     "unit/test_optim.py::test_what_a_config_says_reaches_the_optimizer[sft_state-linear]",
     ("gradients are clipped at 1 whatever is said",
      "max_grad_norm=config.max_grad_norm", "max_grad_norm=1.0")),
    ("optim.adamw", "unit/test_optim.py::test_adamw_is_its_formula_and_only_matrices_decay[1e-08]",
     ("biases decay", '"weight_decay": 0.0', '"weight_decay": config.weight_decay')),
    ("optim.adamw", "unit/test_optim.py::test_adamw_is_its_formula_and_only_matrices_decay[0.01]",
     ("adam_eps not handed on", "eps=eps", "eps=1e-8"),
     ("frozen weights are given to the optimizer", " if p.requires_grad]", "]")),
    ("optim.adamw", "unit/test_optim.py::test_the_warm_up_is_the_nearest_number_of_steps",
     ("warm-up rounded down",
      "round(config.warmup_share * total_steps)", "int(config.warmup_share * total_steps)"),
     ("warm-up rounded up",
      "round(config.warmup_share * total_steps)", "-int(-config.warmup_share * total_steps // 1)")),
    ("optim.Optimizer.step",
     "unit/test_optim.py::test_a_sparse_gradient_is_stepped_like_a_dense_one",
     ("a sparse gradient stays sparse", "p.grad = p.grad.to_dense()", "p.grad = None")),
    ("optim.Optimizer.step", "unit/test_optim.py::test_fp16_scales_the_loss_and_skips_an_overflow",
     ("clipped before it is unscaled", "self.scaler.unscale_(self.optimizer)", "pass")),
    ("optim.Optimizer.step", "unit/test_optim.py::test_a_long_gradient_is_scaled_down_as_a_whole",
     ("never clipped", "norm > self.max_grad_norm", "False")),
    ("optim.Optimizer.step",
     "unit/test_optim.py::test_a_first_step_that_is_skipped_moves_the_schedule_alone",
     ("the schedule is ahead of the optimizer", "self.optimizer.step()", "pass")),
    ("optim.Optimizer.step",
     "unit/test_optim.py::test_gradients_of_micro_batches_add_up_and_are_cleared_by_the_step",
     ("the gradient is not cleared",
      "self.scaler.update()\n        self.optimizer.zero_grad(set_to_none=True)",
      "self.scaler.update()\n        pass")),
    ("optim.Optimizer.step", "unit/test_optim.py::test_schedule[linear-rates1]",
     ("the schedule is never stepped", "self.scheduler.step()", "pass")),
    ("optim.Optimizer.backward",
     "unit/test_optim.py::test_fp16_scales_the_loss_and_skips_an_overflow",
     ("fp16 loses small gradients", "self.scaler.scale(loss).backward()", "loss.backward()")),
    ("optim.Optimizer._require_finite",
     "unit/test_optim.py::test_a_gradient_that_is_not_finite_raises_before_the_step[nan]",
     ("a gradient of NaN is stepped", "fault is None and math.isfinite(norm)", "fault is None")),
    ("optim.Optimizer._require_finite",
     "unit/test_nonfinite.py::test_a_gradient_names_its_parameter[sft_run]",
     ("skips where it is to stop", 'and self.precision == "fp16"', "")),
    ("optim.Optimizer._require_finite",
     "unit/test_nonfinite.py::test_under_fp16_so_many_overflows_in_a_row_are_no_accident",
     ("skips for ever", "expected and self.skipped_in_a_row < MAX_OVERFLOWS", "expected")),
    ("optim.Optimizer._require_finite",
     "unit/test_nonfinite.py::test_a_good_step_between_starts_the_count_again",
     ("a good step is no end of a row", "self.skipped_in_a_row = 0", "pass")),
    ("optim.Optimizer._require_finite",
     "unit/test_nonfinite.py::test_under_fp16_only_the_gradient_may_overflow",
     ("under fp16 a loss may be infinite", "fault is None and self.precision", "self.precision")),
    ("optim.Optimizer.load_state_dict",
     "unit/test_optim.py::test_a_resume_keeps_the_scale_of_fp16_and_how_often_was_skipped",
     ("a resume forgets what was skipped", 'state["steps"], state["skipped"]', 'state["steps"], 0'),
     ("a resume starts with fp16's first scale", 'if state["scaler"]:', "if False:")),
    ("optim.dropout_rng",
     "unit/test_optim.py::test_dropout_differs_with_seed_step_and_micro_batch",
     ("the same dropout in each step", "1_000_003 * (step + 1) + seed", "seed")),
    ("optim.dropout_rng",
     "unit/test_sft.py::test_dropout_acts_and_leaves_the_global_generator_alone",
     ("dropout uses up global randomness",
      'with torch.random.fork_rng([device] if device.type == "cuda" else []):', "if True:")),
    ("optim.Optimizer.state_dict",
     "unit/test_optim.py::test_a_resume_keeps_the_scale_of_fp16_and_how_often_was_skipped",
     ("a resume may skip as often again",
      '"skipped_in_a_row": self.skipped_in_a_row', '"skipped_in_a_row": 0')),
    ("optim.State.restore", "unit/test_dpo.py::test_resume",
     ("Adam's moments are lost in a resume",
      'self.optimizer.load_state_dict(state["optimizer"])', "pass")),

    # adapters
    ("loading/adapters.add_adapter", "unit/test_lora.py::test_which_layers_and_how_strong",
     ("adapters half as strong", "lora_alpha=2 * lora.rank", "lora_alpha=lora.rank"),
     ("the vocabulary projection has an adapter", "and _within(name, trunk) and", "and")),
    ("loading/adapters._to_train_whole",
     "unit/test_lora.py::test_plain_peft_reads_the_adapter_of_a_reward_model_with_its_head",
     ("a head that was drawn anew is lost", "for name in new_weights", "for name in ()"),
     ("a head is not trained", "sorted(heads) if _is_classifier(model) else []", "[]")),
    ("loading/adapters._inject",
     "unit/test_lora.py::test_a_new_adapter_is_drawn_by_its_seed_and_by_no_other_generator",
     ("adapters are drawn by nobody's seed", "torch.manual_seed(seed)", "pass"),
     ("adapters draw from others' random numbers",
      "torch.random.fork_rng(devices=[])", "torch.enable_grad()")),
    ("loading/adapters._train_whole",
     "unit/test_lora.py::test_training_moves_the_adapters_and_the_head_alone",
     ("the head of an adapted classifier is frozen", "p.requires_grad_(True)", "pass")),
    ("loading/adapters.continue_adapter",
     "unit/test_lora.py::test_an_adapter_that_came_without_a_head_is_saved_with_one",
     ("a head stays out of an adapter that came without it",
      "*_to_train_whole(model, new_weights)}", "}")),
    ("loading/adapters.load_adapter",
     "unit/test_lora.py::test_an_adapter_is_trained_further_as_it_is",
     ("a loaded adapter is frozen", "config.inference_mode = False", "pass")),
    ("loading/adapters.load_adapter",
     "unit/test_lora.py::test_weights_that_are_missing_too_many_or_not_finite_are_refused",
     ("half an adapter is an adapter",
      "name for name in found.missing_keys", "name for name in ()"),
     ("NaN in an adapter", "bool(x.isfinite().all())", "True")),
    ("loading/adapters.load_adapter",
     "unit/test_lora.py::test_an_adapter_of_tied_embeddings_is_refused",
     ("an adapter of the embedding changes the projection too", "not tied & (", "not set() & (")),
    ("loading/adapters.load_adapter", "unit/test_lora.py::test_the_template_goes_with_the_adapter",
     ("an adapter forgets its template", "model.config.prompt_template = str(template)", "pass")),
    ("loading/adapters.copied", "unit/test_lora.py::test_the_frozen_weights_are_in_memory_once",
     ("each copy has the frozen weights again", "if is_adapted(model) and", "if False and"),
     ("copies train the same adapter", "if not p.requires_grad}", "}")),
    ("loading/adapters.copied",
     "unit/test_lora.py::test_on_another_device_the_reference_has_all_weights_for_itself",
     ("the reference takes the policy's weights along", "and _is_on(model, device)", "")),
    ("loading/adapters.merge_adapter",
     "unit/test_lora.py::test_a_merged_folder_is_a_model_like_any_other",
     ("merging changes what others have too", "nn.Parameter(p.detach().clone())", "p"),
     ("merging leaves the adapter out", "layer.merge()", "pass")),
    ("loading/adapters.save_adapter",
     "unit/test_lora.py::test_plain_peft_reads_the_adapter_of_a_reward_model_with_its_head",
     ("a head is not saved with its adapter", "tensors |= _trained_whole(model)", "pass")),
    ("loading/models._adapt", "unit/test_lora.py::test_plain_peft_reads_the_adapter_of_a_policy",
     ("a merged model stays frozen", "model.requires_grad_(True)", "pass"),
     ("a loaded adapter is left out",
      "missing -= load_adapter(model, Path(name_or_path), base=base)",
      "add_adapter(model, LoRA(4), base=base)")),
    ("policy.Policy.reference",
     "unit/test_lora.py::test_after_an_sft_the_reference_of_dpo_is_the_sft_model",
     ("the reference of an adapted policy is its base",
      "lm = adapters.copied(self.lm, device)",
      "lm = adapters.copied(self.lm, device); "
      "[layer.lora_B.default.weight.data.zero_() for _, layer in adapters.adapted_layers(lm)]")),
    ("harness/run/identity.trained_tensors",
     "harness/test_lora_runs.py::test_each_algorithm_resumes_to_the_bit",
     ("a checkpoint holds the base too", "if p.requires_grad}", "}")),
    ("harness/run/identity.identity", "harness/test_lora_runs.py::test_another_base_is_noticed",
     ("another base goes unnoticed",
      "trained_tensors(model) if trained else ()", "dict(model.named_parameters())")),
    ("harness/preflight.memory",
     "harness/test_lora_runs.py::test_the_memory_of_frozen_weights_is_counted_once",
     ("shared weights are counted twice",
      "{p for model in [trained, *frozen] for p in model.parameters()}",
      "[p for model in [trained, *frozen] for p in model.parameters()]")),

    # what decides in the harness
    ("harness/preflight.Check.passed",
     "harness/test_preflight.py::test_a_check_passes_up_to_its_limit",
     ("NaN is within any limit", "self.value <= self.limit", "not self.value > self.limit")),
    ("harness/preflight.eos_supervised",
     "harness/test_preflight.py::test_eos_is_looked_for_on_both_sides_of_many_pairs",
     ("only chosen responses are looked at", "// LOOKED_AT) | 1]", "// LOOKED_AT)]")),
    ("harness/stages/rollouts.ratio_is_one",
     "harness/test_preflight.py::test_the_ratio_is_1_at_any_temperature",
     ("preflight forgets the temperature", "temperature=config.temperature", "temperature=1.0")),
    ("harness/preflight.untouched",
     "harness/test_preflight.py::test_what_a_reward_function_draws_is_put_back",
     ("preflight draws from the run's random numbers", "np.random.set_state(drawn[1])", "pass")),
    ("dpo.first_loss", "unit/test_dpo.py::test_the_first_loss_of_each[orpo]",
     ("the first loss of unequal responses",
      "[equal] * (1 if", "[2 * equal] * (1 if")),
    ("harness/stages/dpo.first_loss",
     "harness/test_preflight.py::test_the_first_loss_of_a_steep_one_may_differ_more",
     ("rounding fails a steep loss", "max(tolerance, abs(", "min(tolerance, abs(")),
    ("harness/stages/dpo.first_loss",
     "harness/test_preflight.py::test_the_first_loss_leaves_out_what_sft_adds",
     ("the first loss with what SFT adds", "replace(config, sft_coef=0.0)", "config")),
    ("harness/stages/dpo.first_loss",
     "harness/test_preflight.py::test_the_first_loss_of_the_family_is_known[simpo]",
     ("a first loss without a reference that nobody knows",
      "replace(x, rejected_ids=x.chosen_ids)", "x")),
    ("harness/stages/dpo.run",
     "harness/test_resume.py::test_a_stopped_run_of_another_loss_ends_like_the_whole_one[simpo]",
     ("nobody knows how far held-out pairs have moved",
      "if config.reference_free and config.cache_reference:", "if False:")),
    ("harness/stages/kto.first_loss",
     "harness/test_preflight.py::test_a_wrong_cache_of_long_rows_in_kto",
     ("the rows of KTO are looked at together", "[x], kl, config).loss for x in few]",
      "few, kl, config).loss for x in few]")),
    ("harness/stages/kto.findings",
     "harness/test_findings.py::test_kto_that_knows_its_own_rows_only_or_that_most_are_of_one_label",
     ("one label for all rows is taken for knowledge",
      'held_out["ci95"][0] <= held_out["one_label"]', 'held_out["ci95"][0] <= 0.5')),
    ("harness/stages/kto.balance",
     "harness/test_kto_runs.py::test_weights_that_are_recommended_are_in_the_range_that_is_recommended",
     ("the other weight is forgotten",
      "low = config.undesirable_weight * undesirable / desirable",
      "low = undesirable / desirable"),
     ("the ratio that is recommended is upside down", "high = config.desirable_weight * desirable "
      "/ undesirable", "high = config.desirable_weight * undesirable / desirable")),
    ("harness/rows/formats._label",
     "harness/test_datafile.py::test_another_label_refuses_the_file_and_names_row_and_value",
     ("a label that is not understood drops its row", "raise Misread(", "raise Unusable(")),
    ("harness/inputs._unpaired",
     "harness/test_inputs.py::test_pairs_are_taken_apart_for_kto_and_the_run_says_so",
     ("chosen and rejected are exchanged", '("chosen", True), ("rejected", False)',
      '("chosen", False), ("rejected", True)')),
    ("harness/run/saving.StageSaver._sign", "harness/test_resume.py::test_the_best_model_is_kept",
     ("the largest loss is the best", '== "lower"', '== "higher"')),
    ("harness/stages/rollouts.too_far",
     "harness/test_stages.py::test_a_kl_that_is_too_large_shows_its_samples",
     ("the smallest KLs are shown", "k1.argsort(descending=True)", "k1.argsort()")),
    ("harness/report/tokens.token_rows",
     "harness/test_tokens.py::test_clipped_tokens_are_those_of_the_policy_loss",
     ("tokens are clipped on one side",
      "max(ratio, 1 - config.clip)", "ratio")),
    ("harness/report/tokens.token_rows",
     "harness/test_tokens.py::test_logprobs_are_those_of_the_row_alone",
     ("tokens at another temperature", "temperature=config.temperature", "temperature=1.0")),
    ("harness/stages/rollouts._ratio",
     "unit/test_nonfinite.py::test_a_ratio_of_a_response_overflows_where_no_token_does",
     ("the ratio of a response is looked for at its tokens", "log_ratio.sum(1)", "log_ratio")),
    ("harness/report/tokens._made_with",
     "harness/test_tokens.py::test_the_advantage_of_a_group_can_be_computed_by_hand[RLOO]",
     ("the first group is shown for all", "row - row % config.group_size", "0")),
    ("harness/report/tokens._ratios",
     "harness/test_tokens.py::test_the_advantage_of_a_group_can_be_computed_by_hand[GSPO]",
     ("the ratio of a response is of their sum", "sum(logs) / len(logs)", "sum(logs)")),
    ("harness/report/tokens.token_records",
     "harness/test_tokens.py::test_the_advantage_of_a_group_can_be_computed_by_hand[GSPO]",
     ("a KL in the loss is told of the rewards", '== "loss"', '== ""')),
    ("harness/report/texts._group_by_hand",
     "harness/test_html.py::test_an_advantage_in_a_group_is_computed_before_the_readers_eyes",
     ("the others with the response itself", 'scale == "leave_one_out"', 'scale == ""'),
     ("the deviation of n", "(len(group) - 1)) **", "len(group)) **")),
    ("harness/run/reading.read_run",
     "harness/test_html.py::test_each_stage_that_samples_is_shown_token_by_token",
     ("tokens of a stage hide those of another",
      '(x["stage"], x["step"], x["row"])', '(x["step"], x["row"])')),
    ("harness/rewards.WeightedSum.__call__",
     "harness/test_rewards.py::test_a_weighted_sum_of_functions_and_a_model",
     ("rewards are not weighed", "weight * self._scores[name]", "self._scores[name]")),
    ("harness/rewards.WeightedSum._part",
     "harness/test_rewards.py::test_the_parts_are_watched_without_scoring_again",
     ("the parts of another batch's texts",
      "if self._texts != (prompts, responses):", "if self._texts is None:")),
    ("harness/rewards._process_unchanged",
     "harness/test_rewards.py::test_what_belongs_to_the_process_is_put_back_and_told_once",
     ("a reward may move the working folder", "put_back(value)", "pass")),
    ("harness/rows/load.split_rows", "harness/test_datafile.py::test_split_sizes_of_single_rows",
     ("a held-out share is rounded down",
      "round(heldout_share * len(rows))", "int(heldout_share * len(rows))")),
    ("harness/report/curves.excursion", "harness/test_html.py::test_excursions",
     ("a single place outside is an excursion", "end - place >= IN_A_ROW", "end - place >= 1")),
    ("harness/stages/ppo.kl_range",
     "harness/test_html.py::test_an_adaptive_kl_may_go_to_twice_its_target",
     ("an adaptive KL is held to a fixed range", '2 * config["kl_target"]', "15")),
    ("harness/stages/rollouts.findings",
     "harness/test_findings.py::test_ratio_spikes_are_counted_with_their_steps_and_the_largest",
     ("a ratio at the limit is a spike", "ratio > RATIO_LIMIT", "ratio >= RATIO_LIMIT")),
    ("harness/stages/rollouts.improvement",
     "harness/test_findings.py::test_a_score_that_did_not_rise",
     ("a score that may have fallen by chance fell",
      'change["mean"] < -SURE * change["error"]', 'change["mean"] < 0'),
     ("any rise of the score is enough",
      'change["mean"] > SURE * change["error"]', 'change["mean"] > 0')),
    ("harness/stages/sft.findings",
     "harness/test_findings.py::test_a_held_out_loss_that_turns_up_is_told_once",
     ("a held-out loss may rise", "losses[-1] > RISE * lowest", "losses[-1] > RISE * losses[0]")),
    ("harness/stages/dpo.findings",
     "harness/test_findings.py::test_dpo_that_knows_its_own_pairs_only",
     ("any gap is learning by heart",
      'not overlap and by_heart(trained["mean"], held_out)', "not overlap"),
     ("a guess is judged by the mean", 'held_out["ci95"][0] <= 0.5', 'held_out["mean"] < 0.5')),
    ("harness/run/faults.first_nonfinite",
     "unit/test_nonfinite.py::test_a_rollout_that_is_not_finite_is_named",
     ("a row at fault is named twice", "sorted(numbers)", "sorted(numbers) * 2")),
]
# fmt: on
MUTANTS = [
    Mutant(fear, where, old, new, test)
    for where, test, *changes in TABLE
    for fear, old, new in changes
]


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
