"""Function by function against trl 0.11.3, as recorded on a hundred random cases in float64.

Padding holds random numbers in all of them, so only real tokens are compared where trl leaves
something behind.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recordings import VERSION, Recording
from torch import Tensor
from trainer_harness import SHIMMED, Parity, gap

from rlhf_min.advantages import gae
from rlhf_min.kl import AdaptiveKL, KLKind, exact_kl, kl_estimate, shape_rewards
from rlhf_min.logprobs import entropy, token_logprobs
from rlhf_min.losses import ppo_policy_loss, ppo_value_loss
from rlhf_min.masking import masked_mean, masked_scale, masked_var, masked_whiten
from rlhf_min.ppo import RunningMoments

RECORDED = Recording("functions")
RAGGED = {"cases": 100, "of": "ragged"}
LOSS = {"dtype": SHIMMED, **RAGGED}
KINDS: dict[str, KLKind] = {"kl": "k1", "abs": "abs", "mse": "k2"}


def recorded(name: str) -> list[dict[str, Tensor]]:
    """The cases of one function, as many as the table says."""
    cases = RECORDED.cases(name)
    assert len(cases) == RAGGED["cases"]
    return cases


def compared(ours: Callable[..., Tensor], theirs: str = "", **told: str) -> Any:
    """A function of ours with its row of the table; trl's has the same name unless it is given."""
    name = ours.__name__
    mark = pytest.mark.parity(name, theirs or name, VERSION, **told, **RAGGED)
    return pytest.param(ours, name, marks=mark)


@pytest.mark.eq("masked_mean")
@pytest.mark.eq("masked_var")
@pytest.mark.eq("whiten")
@pytest.mark.eq("scale")
@pytest.mark.parametrize(
    ("ours", "name"),
    [
        compared(masked_mean),
        compared(masked_var, dtype=SHIMMED),
        compared(masked_whiten, dtype=SHIMMED),
        compared(masked_scale, "masked_whiten(shift_mean=False)", dtype=SHIMMED),
    ],
)
def test_masked_functions(ours: Callable[..., Tensor], name: str, parity: Parity) -> None:
    for case in recorded("masked"):
        mask, found, expected = case["mask"], ours(case["x"], case["mask"]), case[name]
        # trl whitens the padding too, which means nothing
        parity(gap(found[mask], expected[mask]) if found.ndim else gap(found, expected))


@pytest.mark.eq("token_logprobs")
@pytest.mark.parity("token_logprobs", "logprobs_from_logits", VERSION, **RAGGED)
def test_token_logprobs(parity: Parity) -> None:
    for case in recorded("logits"):
        found = token_logprobs(case["logits"], case["tokens"])
        parity(gap(found, case["logprobs_from_logits"]))


@pytest.mark.eq("entropy")
@pytest.mark.parity("entropy", "entropy_from_logits", VERSION, **RAGGED)
def test_entropy(parity: Parity) -> None:
    for case in recorded("logits"):
        parity(gap(entropy(case["logits"]), case["entropy_from_logits"]))


@pytest.mark.eq("exact_kl")
@pytest.mark.parity("exact_kl", 'PPOTrainer._kl_penalty("full")', VERSION, **RAGGED)
def test_exact_kl(parity: Parity) -> None:
    for case in recorded("logits"):
        parity(gap(exact_kl(case["logits"], case["ref_logits"]), case["full"]))


@pytest.mark.eq("kl")
@pytest.mark.eq("shape_rewards")
@pytest.mark.parity("kl_estimate", "PPOTrainer._kl_penalty", VERSION, **RAGGED)
@pytest.mark.parity("shape_rewards", "PPOTrainer.compute_rewards", VERSION, **RAGGED)
def test_kl_estimate_and_shape_rewards(parity: Parity) -> None:
    seen = set()
    for case in recorded("rewards"):
        name, mask = RECORDED.facts["kl_penalties"][case["kind"]], case["mask"]
        kl = kl_estimate(case["logprobs"], case["ref_logprobs"], kind=KINDS[name])
        rewards = shape_rewards(case["scores"], kl, mask, kl_coef=case["kl_coef"].item())
        parity(gap(kl, case["kl"]), "kl_estimate")
        parity(gap(rewards[mask], case["rewards"][mask]), "shape_rewards")
        seen.add(name)
    assert seen == set(KINDS)


@pytest.mark.eq("gae")
@pytest.mark.eq("whiten")
@pytest.mark.parity(
    "gae, masked_whiten", "PPOTrainer.compute_advantages", VERSION, dtype=SHIMMED, **RAGGED
)
def test_gae(parity: Parity) -> None:
    for case in recorded("advantages"):
        mask, gamma, lam = case["mask"], case["gamma"].item(), case["lam"].item()
        advantages, returns = gae(case["rewards"], case["values"], mask, gamma=gamma, lam=lam)
        advantages = masked_whiten(advantages, mask)
        parity(gap(advantages[mask], case["advantages"][mask]))
        parity(gap(returns[mask], case["returns"][mask]))


@pytest.mark.eq("ppo_policy")
@pytest.mark.parity("ppo_policy_loss", "PPOTrainer.loss", VERSION, **LOSS)
def test_policy_loss(parity: Parity) -> None:
    clipped = 0
    for case in recorded("loss"):
        mask, new_logprobs = case["mask"], case["new_logprobs"].requires_grad_()
        found = ppo_policy_loss(
            *(new_logprobs, case["logprobs"], case["advantages"], mask), clip=case["clip"].item()
        )
        found.loss.backward()
        k2 = kl_estimate(new_logprobs.detach(), case["logprobs"], kind="k2")
        parity(gap(found.loss.detach(), case["loss/policy"]))
        parity(gap(new_logprobs.grad, case["logprobs_gradient"]))
        parity(gap(found.clip_fraction, case["policy/clipfrac"]))
        parity(gap(found.k1, case["policy/policykl"]))
        parity(gap(masked_mean(k2, mask), case["policy/approxkl"]))
        parity(gap(masked_mean(entropy(case["logits"]), mask), case["policy/entropy"]))
        parity(gap(masked_mean(case["advantages"], mask), case["policy/advantages_mean"]))
        clipped += 0 < found.clip_fraction < 1
    assert clipped > 50


@pytest.mark.eq("ppo_value")
@pytest.mark.parity("ppo_value_loss", "PPOTrainer.loss", VERSION, **LOSS)
def test_value_loss(parity: Parity) -> None:
    clipped = 0
    for case in recorded("loss"):
        mask, new_values = case["mask"], case["new_values"].requires_grad_()
        found = ppo_value_loss(
            *(new_values, case["values"], case["returns"], mask), clip=case["value_clip"].item()
        )
        (case["value_coef"] * found.loss).backward()
        error = (new_values.detach() - case["returns"]).square()
        parity(gap(found.loss.detach(), case["loss/value"]))
        parity(gap(new_values.grad, case["values_gradient"]))
        parity(gap(found.clip_fraction, case["val/clipfrac"]))
        parity(gap(masked_mean(error, mask), case["val/error"]))
        parity(gap(masked_mean(new_values.detach(), mask), case["val/vpred"]))
        parity(gap(masked_mean(case["values"], mask), case["val/mean"]))
        parity(gap(masked_var(case["values"], mask), case["val/var"]))
        parity(gap(masked_mean(case["returns"], mask), case["returns/mean"]))
        parity(gap(masked_var(case["returns"], mask), case["returns/var"]))
        both = case["loss/policy"] + case["value_coef"] * found.loss.detach()
        parity(gap(both, case["loss/total"]))
        clipped += 0 < found.clip_fraction < 1
    assert clipped > 50


@pytest.mark.eq("adaptive_kl")
@pytest.mark.parity("AdaptiveKL", "AdaptiveKLController", VERSION, cases=100, of="runs")
def test_adaptive_kl(parity: Parity) -> None:
    for case in recorded("adaptive_kl"):
        control = AdaptiveKL(
            case["coef"].item(), target=case["target"].item(), horizon=case["horizon"].item()
        )
        coefs = []
        for kl, n in zip(case["kl"].tolist(), case["n"].tolist(), strict=True):
            control.update(kl, n)
            coefs.append(control.coef)
        parity(gap(torch.tensor(coefs, dtype=torch.float64), case["coefs"]))


@pytest.mark.eq("running_moments")
@pytest.mark.parity(
    "RunningMoments", "RunningMoments.update", VERSION, cases=100, of="runs", dtype=SHIMMED
)
def test_running_moments(parity: Parity) -> None:
    for case in recorded("moments"):
        moments, found = RunningMoments(), []
        for scores in case["scores"].split(case["sizes"].tolist()):
            moments.update(scores)
            found.append([moments.mean, (moments.squares / (moments.count - 1)) ** 0.5])
        expected = torch.stack([case["means"], case["stds"]], 1)
        parity(gap(torch.tensor(found, dtype=torch.float64), expected))
