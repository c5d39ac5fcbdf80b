"""``--shard``: models split among processes compute what whole ones compute in one process."""

import math
from functools import partial

import pytest
import torch
from launch import in_processes
from safetensors.torch import load_file
from small import (
    DEMONSTRATIONS,
    PREFERENCES,
    PROMPTS,
    TEXT_PAIRS,
    UNPAIRED,
    bert,
    bert_syllables,
    generator,
    gpt2,
    gpt2_classifier,
    lengths,
    llama,
    llama_like,
    policy_of,
    seeded,
    small_policy,
    small_reward_model,
    syllables,
    text,
    token_rows,
    without_time,
)
from tolerances import EXACT, FP32, FP64
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_min import distributed, dpo, grpo, kto, ppo, reward, reward_model, rloo, sft
from rlhf_min.config import GRPOConfig, PPOConfig, RLOOConfig
from rlhf_min.data import collate
from rlhf_min.errors import BadInput
from rlhf_min.harness.run.checkpoint import STATES, WEIGHTS, Checkpoint, Snapshot, begin
from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.harness.stages.run_stage import copy_policy
from rlhf_min.optim import adamw
from rlhf_min.reward_model import RewardModel
from rlhf_min.sampling import sample
from rlhf_min.speed import forward
from rlhf_min.speed.sharding import full, is_split, put_together, shard, whole

CHECKPOINT_FILES = [f"step-000002/{name}" for name in (WEIGHTS, *STATES)]
RUN = 1e-10  # whole runs: AdamW divides the rounding of small gradients by their size
PROCESSES = pytest.mark.parametrize("n", [2, 3])
PROMPT_IDS = token_rows([3, 5, 2, 7, 4], seed=1)
RESPONSE_IDS = token_rows([4, 1, 6, 2, 3], seed=2)
PARTS = [[0, 1], [2], [3, 4]]  # a process more or one less than they are


# What is split


def tied_llama():
    config = LlamaConfig(**llama_like(), tie_word_embeddings=True)
    return seeded(lambda: LlamaForCausalLM(config))


def bert_scorer():
    return RewardModel(bert(), bert_syllables())


def gpt2_scorer():
    return RewardModel(gpt2_classifier(), syllables())


MODELS = {
    "gpt2": lambda: policy_of(gpt2()),
    "gpt2-shared": lambda: policy_of(gpt2(), critic="shared"),
    "gpt2-separate": lambda: policy_of(gpt2(), critic="separate"),
    "llama-separate": lambda: policy_of(llama(), critic="separate"),
    "tied-llama-shared": lambda: policy_of(tied_llama(), critic="shared"),
    "bert": bert_scorer,
    "gpt2-classifier": gpt2_scorer,
}


def in_shards(n, works):
    """By the name of each work the largest difference of any number that it returns in one process,
    and in any of n among which its models are split."""
    expected = {name: work() for name, work in works.items()}

    def compared():
        distributed.shard_models()
        return {name: difference(work(), expected[name]) for name, work in works.items()}

    found = in_processes(n, compared)
    return {name: max(one[name] for one in found) for name in works}


def difference(ours, theirs):
    """The largest of any number in tensors, lists and dicts."""
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape
        return float((ours - theirs).abs().max()) if theirs.numel() else 0.0
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list):
        return max([difference(x, y) for x, y in zip(ours, theirs, strict=True)], default=0.0)
    return abs(ours - theirs) if isinstance(theirs, float) else (ours != theirs) * math.inf


def whole_tensors(named):
    """Copies of those that there are."""
    found = {name: full(x.detach()) for name, x in named if x is not None}
    return {name: x.to_dense() if x.is_sparse else x.clone() for name, x in found.items()}


def output_of(model, rows, **options):
    """Log-probabilities, entropies, perhaps values and logits; or scores."""
    if isinstance(model, RewardModel):
        return [model([text([i, 7]) for i in rows], [text(range(i + 3)) for i in rows])]
    batch = collate([PROMPT_IDS[i] for i in rows], [RESPONSE_IDS[i] for i in rows], pad_id=0)
    return [x for x in model(batch, temperature=0.7, **options) if x is not None]


def loss_of(model, rows):
    """Weighted so that no gradient is zero."""
    return sum(
        (x * torch.arange(1, x.numel() + 1).view_as(x).cos()).sum()
        for x in output_of(model, rows)
        if x.requires_grad
    )


def passes(make, prepare=id):
    """What a model computes of all rows, the losses of parts of them, and the gradient."""
    model = shard(make())
    prepare(model)
    model.train()

    def learn(rows):
        loss = loss_of(model, rows)
        (loss * 0 if distributed.is_idle() else loss).backward()
        return loss.detach()

    with torch.no_grad():
        outputs = output_of(model, range(5))
    losses = distributed.deal(learn, PARTS)
    return [outputs, losses, whole_tensors((name, p.grad) for name, p in model.named_parameters())]


@PROCESSES
def test_passes_and_gradients_are_those_of_whole_models(n, monkeypatch):
    monkeypatch.setattr(forward, "CHUNK_TOKENS", 3)  # so that backward computes logits again
    works = {name: partial(passes, make) for name, make in MODELS.items()}
    for name in ("gpt2-separate", "bert"):
        works[f"checkpointed {name}"] = partial(
            passes, MODELS[name], lambda x: x.checkpoint_gradients()
        )
        works[f"plain {name}"] = partial(passes, MODELS[name], lambda x: setattr(x, "plain", True))
    found = in_shards(n, works)
    assert {name: off for name, off in found.items() if off > FP64} == {}


# Whole runs


def learned(model, state, steps):
    """Metrics, weights, and what the optimizer knows of them."""
    metrics = [without_time(x) for x in steps]
    moments = state.optimizer.optimizer.state_dict()["state"]
    return {
        "metrics": metrics,
        "weights": whole_tensors(model.named_parameters()),
        "moments": [whole_tensors(x.items()) for x in moments.values()],
    }


def split_policy(**options):
    return shard(small_policy(**options))


def sft_run():
    policy, config = split_policy(dropout=0.2), sft.SFTConfig(epochs=2, batch_size=5, max_tokens=16)
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    return learned(policy, state, sft.train(policy, config, state, heldout=DEMONSTRATIONS[:3]))


def reward_run():
    scorer = small_reward_model(dropout=0.2)
    pairs, _ = reward.prepare_pairs(scorer, TEXT_PAIRS * 3)
    config = reward.RewardConfig(epochs=2, batch_size=4, max_tokens=48)
    state = reward.new_state(shard(scorer), pairs, config)
    found = learned(scorer, state, reward.train(scorer, config, state, heldout=pairs[:3]))
    texts = ["red", "big ball", "one"], ["two", "small", "green one"]
    split, _, together = scorer.score(*texts), put_together(scorer), scorer.score(*texts)
    return found | {"scores": [split, together], "still split": is_split(scorer)}


def online_run(algorithm, config, critic="none"):
    policy, ref_policy = split_policy(critic=critic), split_policy(seed=1)
    state = algorithm.new_state(policy, PROMPTS, config)
    steps = algorithm.train(policy, ref_policy, lengths, config, state, eval_prompts=PROMPTS[:3])
    return learned(policy, state, steps)


def dpo_run(**options):
    policy, ref_policy = split_policy(), split_policy(seed=1)
    config = dpo.DPOConfig(epochs=2, batch_size=5, max_tokens=24, **options)
    state = dpo.new_state(policy, ref_policy, PREFERENCES, config)
    steps = dpo.train(policy, ref_policy, config, state, heldout=PREFERENCES[:3])
    return learned(policy, state, steps)


def kto_run():
    policy, ref_policy = split_policy(), split_policy(seed=1)
    config = kto.KTOConfig(epochs=2, batch_size=5, max_tokens=24)
    state = kto.new_state(policy, ref_policy, UNPAIRED, config)
    steps = kto.train(policy, ref_policy, config, state, heldout=UNPAIRED[:3])
    return learned(policy, state, steps)


ONLINE = {"batch_size": 6, "minibatch_size": 4, "steps": 2, "max_new_tokens": 4}
ONLINE |= {"max_tokens": 24, "eval_every": 1}
RUNS = {
    "sft": sft_run,
    "reward": reward_run,
    "ppo": lambda: online_run(ppo, PPOConfig(**ONLINE, kl="full"), "separate"),
    "ppo-shared": lambda: online_run(ppo, PPOConfig(**ONLINE), "shared"),
    "grpo": lambda: online_run(grpo, GRPOConfig(**ONLINE, group_size=2)),
    "rloo": lambda: online_run(rloo, RLOOConfig(**ONLINE, group_size=2)),
    "dpo": dpo_run,
    "dpo-live": partial(dpo_run, cache_reference=False),
    "kto": kto_run,
}


OF_THREE = ("sft", "reward", "ppo")  # which have dropout, groups of rows, and a second trunk


@PROCESSES
def test_runs_are_those_of_whole_models(n, monkeypatch):
    # So that some processes pass more groups of rows through the reward model than others.
    monkeypatch.setattr(reward_model, "SIMILAR_TOKENS", 16)
    found = in_shards(n, RUNS if n == 2 else {name: RUNS[name] for name in OF_THREE})
    assert {name: off for name, off in found.items() if not off < RUN} == {}


# Precision


def steps_of(precision, *, scale=1.0):
    """Two steps with clipping in this precision; in fp16 the loss of one part may overflow."""
    policy = shard(policy_of(gpt2().float(), critic="separate"))
    config = PPOConfig(precision=precision, max_grad_norm=0.5, warmup_share=0.0)
    optimizer = adamw(policy, config, 5)

    def learn(rows):
        with optimizer.autocast():
            loss = loss_of(policy, rows)
        optimizer.backward(loss * (scale if rows == PARTS[-1] else 1.0))

    norms = []
    for _ in range(2):
        distributed.deal(learn, PARTS)
        norms.append(optimizer.step())
    norms = [norm for norm in norms if math.isfinite(norm)]
    return [
        norms,
        optimizer.skipped,
        optimizer.scaler.get_scale(),
        whole_tensors(policy.named_parameters()),
    ]


@PROCESSES
def test_half_precision_and_clipping(n):
    works = {name: partial(steps_of, name) for name in ("fp32", "bf16", "fp16")}
    works["overflow"] = partial(steps_of, "fp16", scale=1e9)
    assert steps_of("fp16", scale=1e9)[1] == 2  # skipped
    found = in_shards(n, works)
    assert {name: off for name, off in found.items() if off > FP32} == {}


# Copies and files


def copies():
    policy = shard(policy_of(gpt2(), critic="separate"))
    copied, reference = copy_policy(policy, critic="separate"), policy.reference()
    for x in (copied, reference):
        assert not is_split(x)
        assert x.lm.lm_head.weight is x.lm.transformer.wte.weight  # tied
    assert not any(p.requires_grad for p in reference.parameters())
    with whole(policy) as itself:
        rows = output_of(itself, range(5))[:2]
    if distributed.is_sharded():
        assert is_split(policy)
        assert not any(p.numel() for p in itself.parameters())  # let go
        assert itself.value_head is None  # which nobody samples with
    return [rows, output_of(copied, range(5)), output_of(reference, range(5))]


def samples():
    """What each process samples alone from a whole copy, in which no other one takes part."""
    policy = shard(small_policy(critic="shared"))
    prompts = [x.ids for x in PROMPTS]
    options = {"max_new_tokens": 6, "temperature": 1.0}
    return sample(policy, prompts, **options, rng=generator(3))


@PROCESSES
def test_copies_and_samples(n):
    assert set(in_shards(n, {"copies": copies, "samples": samples}).values()) == {EXACT}


def stage():
    """PPO before its first step, and what starts it."""
    policy, ref_policy = split_policy(critic="separate"), split_policy(seed=1)
    config = PPOConfig(**ONLINE | {"steps": 4})
    state = ppo.new_state(policy, PROMPTS, config)
    snapshot = Snapshot(
        "ppo",
        policy,
        state,
        partial(save_policy, policy),
        models={"policy": policy, "ref_policy": ref_policy},
        texts=["red ball", "blue"],
        examples=PROMPTS,
        total=4,
    )
    return snapshot, lambda: ppo.train(policy, ref_policy, lengths, config, state)


def stopped(folder):
    snapshot, steps = stage()
    for _ in range(2):
        next(steps())
    begin(folder / "step-000002", snapshot, finished=False, sizes={})()
    snapshot.save_model(folder / "model")
    distributed.barrier()
    return learned(snapshot.module, snapshot.state, steps())


def resumed(folder):
    snapshot, steps = stage()
    Checkpoint(folder / "step-000002").restore(snapshot)
    return learned(snapshot.module, snapshot.state, steps())


def test_checkpoints_and_models_are_those_of_whole_ones(tmp_path):
    expected = stopped(tmp_path / "1")

    def two():
        distributed.shard_models()
        return [
            difference(stopped(tmp_path / "2"), expected),
            difference(resumed(tmp_path / "1"), expected),
        ]

    def three():
        distributed.shard_models()
        return difference(resumed(tmp_path / "2"), expected)

    assert max(map(max, in_processes(2, two))) < RUN
    for name in ("model/model.safetensors", "model/value_head.safetensors", *CHECKPOINT_FILES):
        ours, theirs = (load_file(tmp_path / x / name) for x in "21")
        assert difference(ours, theirs) < RUN
    assert difference(resumed(tmp_path / "1"), expected) == EXACT
    assert difference(resumed(tmp_path / "2"), expected) < RUN
    assert max(in_processes(3, three)) < RUN


# What is refused, and what changes nothing


def test_in_one_process_nothing_is_split():
    distributed.shard_models()
    policy = small_policy()
    assert shard(policy) is policy
    assert not is_split(policy)
    with whole(policy) as itself:
        assert itself is policy


def test_a_model_without_a_list_of_layers_is_refused():
    def refused():
        distributed.shard_models()
        policy = small_policy()
        policy.lm.config.n_layer = 3
        with pytest.raises(BadInput, match="--shard: GPT2Model has no list of 3 layers"):
            shard(policy)

    in_processes(2, refused)
