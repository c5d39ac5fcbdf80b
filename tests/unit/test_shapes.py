"""The exact shapes of GPT2-medium and BERT-base, with random weights: saved to a folder, loaded
from it, and one step of each stage in float32 and bfloat16. Each step runs in a process of its own,
so that its peak of memory is its own."""

import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from small import lengths
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from rlhf_min import dpo, ppo, reward, sft
from rlhf_min.data import PreferenceExample, PromptExample, SFTExample
from rlhf_min.harness.preflight import TOLERANCE
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.world import build_wordpiece, train_bpe

pytestmark = pytest.mark.real

GIB = 2**30
MOST = 12 * GIB
ROWS, PROMPT, RESPONSE = 4, 8, 8
# The config.json of gpt2-medium and of bert-base-cased, where they differ from the defaults.
GPT2_MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
BERT_BASE_CASED = {"vocab_size": 28996}


@dataclass
class Step:
    """What one step in a new process told."""

    metrics: dict[str, float]
    peak_bytes: int
    seconds: float
    dtypes: set[torch.dtype]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each model."""
    texts = ["the quick brown fox jumps over the lazy dog"]
    gpt2_medium, bert_base = (tmp_path_factory.mktemp(name) for name in ("gpt2", "bert"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = GPT2LMHeadModel(GPT2Config(**GPT2_MEDIUM))
        config = BertConfig(**BERT_BASE_CASED)
        config.num_labels = 1
        classifier = BertForSequenceClassification(config)
        # A random head prefers some words, and dropout some rows: 0.65 to 0.85 on 4 pairs.
        torch.nn.init.zeros_(classifier.classifier.weight)
    # With the embeddings, the positions and the vocabulary projection, which is the embeddings.
    assert sum(p.numel() for p in lm.parameters()) == 354_823_168
    assert sum(p.numel() for p in classifier.parameters()) == 108_311_041
    for folder, model, tokenizer in (
        (gpt2_medium, lm, train_bpe(texts, 300)),
        (bert_base, classifier, build_wordpiece(texts, 300)),
    ):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"policy": str(gpt2_medium), "reward_model": str(bert_base)}


def rows(length, seed):
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randint(5, 50257, (ROWS, length), generator=rng))


def sft_step(folder, precision):
    policy = Policy.from_pretrained(folder, critic="none")
    examples = list(map(SFTExample, rows(PROMPT, 0), rows(RESPONSE, 1)))
    config = sft.SFTConfig(epochs=1, batch_size=ROWS, precision=precision)
    return policy, sft.train(policy, config, sft.new_state(policy, examples, config))


def ppo_step(folder, precision):
    policy = Policy.from_pretrained(folder, critic="shared", new_head=True)
    prompts = [PromptExample("", ids) for ids in rows(PROMPT, 0)]
    config = ppo.PPOConfig(
        steps=1,
        batch_size=ROWS,
        minibatch_size=ROWS,
        epochs=1,
        max_new_tokens=RESPONSE,
        precision=precision,
    )
    state = ppo.new_state(policy, prompts, config)
    return policy, ppo.train(policy, policy.reference(), lengths, config, state)


def dpo_step(folder, precision):
    policy = Policy.from_pretrained(folder, critic="none")
    examples = list(map(PreferenceExample, rows(PROMPT, 0), rows(RESPONSE, 1), rows(RESPONSE, 2)))
    config = dpo.DPOConfig(batch_size=ROWS, cache_reference=False, precision=precision)
    reference = policy.reference()
    state = dpo.new_state(policy, reference, examples, config)
    return policy, dpo.train(policy, reference, config, state)


def reward_step(folder, precision):
    model = RewardModel.from_pretrained(folder)
    pairs = [
        {"prompt": "the fox " * n, "chosen": "jumps over " * 8, "rejected": "the lazy " * 8}
        for n in range(1, ROWS + 1)
    ]
    config = reward.RewardConfig(epochs=1, batch_size=ROWS, precision=precision)
    examples, _ = reward.prepare_pairs(model, pairs)
    return model, reward.train(model, config, reward.new_state(model, examples, config))


def take(step, folder, precision):
    """In the new process: one step, its metrics, and the process's peak of memory."""
    started = time.perf_counter()
    model, train = step(folder, precision)
    [metrics] = train
    return Step(
        metrics,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        time.perf_counter() - started,
        {p.dtype for p in model.parameters()},
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [sft_step, reward_step, ppo_step, dpo_step])
def test_one_step_at_full_size(step, precision, folders):
    folder = folders["reward_model" if step is reward_step else "policy"]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        found = pool.submit(take, step, folder, precision).result()
    print(f"{step.__name__} {precision}: {found.peak_bytes / GIB:.1f} GiB, {found.seconds:.0f} s")
    assert found.peak_bytes < MOST
    assert found.dtypes == {torch.float32}
    assert all(torch.isfinite(torch.tensor(x)) for x in found.metrics.values())
    if step is ppo_step:
        # Not 0 to the bit: threads may split products of this size otherwise each time.
        assert abs(found.metrics["kl"]) <= RESPONSE * TOLERANCE["fp32"]
        assert found.metrics["ratio"] == pytest.approx(1, abs=0.02)
    else:
        # A model that knows nothing: uniform over the vocabulary, or undecided between two.
        expected = {sft_step: 10.82, reward_step: 0.693, dpo_step: 0.6931}[step]
        assert found.metrics["loss"] == pytest.approx(expected, rel=0.05)
