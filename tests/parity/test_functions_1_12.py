"""Function by function against trl 1.12.0, each on a thousand random ragged cases in float64.

k1, k3, the shaped reward and GAE are no functions in trl but lines of ``PPOTrainer.train()``. It
runs here, on one batch of a thousand responses, and what it hands to its own functions before and
after these lines is recorded.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_harness import (
    PROMPT_WIDTH,
    random_batches,
    random_models,
    train_trl,
    trl_ppo,
)
from torch import Tensor
from trainer_harness import SHIMMED, VERSION, Parity, float64, gap
from trl.trainer.utils import entropy_from_logits

from rlhf_min.advantages import gae
from rlhf_min.kl import kl_estimate, shape_rewards
from rlhf_min.logprobs import entropy, token_logprobs
from rlhf_min.masking import masked_mean, masked_scale, masked_var, masked_whiten, response_mask
from rlhf_min.ppo import PPOConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of trl to transformers

CASES = 1000
ON_CASES = {"cases": CASES, "of": "ragged"}
IN_TRAIN = {"cases": CASES, "of": "rows", "dtype": SHIMMED, "convention": "score cell"}
TOGETHER = PPOConfig(
    steps=1,
    batch_size=CASES,
    minibatch_size=CASES // 2,
    epochs=1,
    critic="separate",
    max_new_tokens=11,
    max_grad_norm=None,
    whiten_rewards=True,  # by a function of trl, which thereby tells us the rewards
)


def ragged_cases(*, real_tokens: int) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
    """Numbers of all sizes with their mask, and the generator for more. Each ``(B, T)``."""
    rng = torch.Generator().manual_seed(0)
    cases = 0
    while cases < CASES:
        rows, width = torch.randint(1, 9, (2,), generator=rng).tolist()
        mask = response_mask(torch.randint(1, width + 1, (rows,), generator=rng), width)
        if int(mask.sum()) >= real_tokens:
            spread = float(torch.rand((), generator=rng)) * 10
            x = torch.randn(rows, width, generator=rng, dtype=torch.float64) * spread + spread
            yield x, mask, rng
            cases += 1


@pytest.mark.eq("token_logprobs")
@pytest.mark.parity("token_logprobs", "selective_log_softmax", VERSION, **ON_CASES)
def test_token_logprobs(parity: Parity) -> None:
    gaps = []
    for x, mask, rng in ragged_cases(real_tokens=1):
        vocabulary = int(torch.randint(2, 40, (), generator=rng))
        logits = 5 * torch.randn(*x.shape, vocabulary, generator=rng, dtype=torch.float64)
        tokens = torch.randint(vocabulary, x.shape, generator=rng)
        expected = trl_ppo.selective_log_softmax(logits, tokens)
        gaps.append(gap(token_logprobs(logits[mask], tokens[mask]), expected[mask]))
    parity(gaps)


@pytest.mark.eq("entropy")
@pytest.mark.parity("entropy", "entropy_from_logits", VERSION, **ON_CASES)
def test_entropy(parity: Parity) -> None:
    gaps = []
    for x, mask, rng in ragged_cases(real_tokens=1):
        vocabulary = int(torch.randint(2, 40, (), generator=rng))
        logits = 5 * torch.randn(*x.shape, vocabulary, generator=rng, dtype=torch.float64)
        expected = entropy_from_logits(logits)
        gaps.append(gap(entropy(logits[mask]), expected[mask]))
    parity(gaps)


def compared(ours: Callable[..., Tensor], *rest: Any, theirs: str = "", **told: str) -> Any:
    """A function of ours with its row of the table; trl's has the same name unless it is given."""
    name = ours.__name__
    mark = pytest.mark.parity(name, theirs or name, VERSION, **told, **ON_CASES)
    return pytest.param(ours, *rest, marks=mark)


@pytest.mark.eq("masked_mean")
@pytest.mark.eq("masked_var")
@pytest.mark.parametrize(
    ("ours", "theirs", "real_tokens"),
    [
        compared(masked_mean, trl_ppo.masked_mean, 1),
        compared(masked_var, trl_ppo.masked_var, 2, dtype=SHIMMED),
    ],
)
def test_masked_moments(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    real_tokens: int,
    parity: Parity,
) -> None:
    gaps = []
    for x, mask, _ in ragged_cases(real_tokens=real_tokens):
        with float64():  # trl divides n by n - 1 in the default dtype
            expected = theirs(x, mask)
        gaps.append(gap(ours(x, mask), expected))
    parity(gaps)


@pytest.mark.eq("whiten")
@pytest.mark.eq("scale")
@pytest.mark.parametrize(
    ("ours", "shift_mean"),
    [
        compared(masked_whiten, True, dtype=SHIMMED),
        compared(masked_scale, False, theirs="masked_whiten(shift_mean=False)", dtype=SHIMMED),
    ],
)
def test_masked_whiten(ours: Callable[..., Tensor], shift_mean: bool, parity: Parity) -> None:
    gaps = []
    for x, mask, _ in ragged_cases(real_tokens=2):
        with float64():
            expected = trl_ppo.masked_whiten(x, mask, shift_mean=shift_mean)
        gaps.append(gap(ours(x, mask)[mask], expected[mask]))
    parity(gaps)


def record(patch: pytest.MonkeyPatch, name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """Arguments and result of each call that trl's trainer makes of a function; nothing changes."""
    function, calls = getattr(trl_ppo, name), []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls.append((args, result))
        return result

    patch.setattr(trl_ppo, name, recorded)
    return calls


@pytest.mark.eq("kl")
@pytest.mark.eq("shape_rewards")
@pytest.mark.eq("gae")
@pytest.mark.parity("kl_estimate, shape_rewards", "PPOTrainer.train", VERSION, **IN_TRAIN)
@pytest.mark.parity("gae", "PPOTrainer.train", VERSION, **IN_TRAIN)
@pytest.mark.parametrize(
    "config",
    [
        replace(TOGETHER, kl="k1", kl_coef=0.3, gamma=1.0, lam=0.95),
        replace(TOGETHER, kl="k3", kl_coef=1.0, gamma=0.9, lam=0.8),
    ],
    ids=["k1", "k3"],
)
def test_kl_rewards_and_gae(
    config: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parity: Parity
) -> None:
    (batch,) = random_batches(config)
    of_tokens = record(monkeypatch, "selective_log_softmax")
    of_models = record(monkeypatch, "get_reward")
    whitened = record(monkeypatch, "masked_whiten")
    train_trl(random_models(), [batch], config, tmp_path)

    (_, logprobs), (_, ref_logprobs) = of_tokens[:2]
    (_, (all_values, _, _)), (_, (_, scores, _)) = of_models
    values = all_values[:, PROMPT_WIDTH - 1 : -1, 0]
    ((rewards, *_), scaled_rewards), ((advantages, _), _) = whitened

    lengths = torch.tensor([len(ids) for ids in batch.response_ids])
    mask = response_mask(lengths, batch.width)
    value_mask = response_mask((lengths + 1).clamp(max=batch.width), batch.width)
    kl = torch.where(mask, kl_estimate(logprobs, ref_logprobs, kind=config.kl), 0)
    ours = shape_rewards(scores, kl, value_mask, kl_coef=config.kl_coef)
    parity(gap(ours, rewards), "kl_estimate, shape_rewards")

    ours, _ = gae(scaled_rewards, values, value_mask, gamma=config.gamma, lam=config.lam)
    parity(gap(ours, advantages), "gae")
