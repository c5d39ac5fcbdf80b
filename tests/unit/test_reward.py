import math
import statistics
from dataclasses import replace

import pytest
import torch
from small import (
    WORDS,
    assert_deterministic,
    assert_is_the_plain_loop,
    assert_resumes,
    bert,
    bert_syllables,
    gpt2_classifier,
    largest_difference,
    shuffled,
    small_reward_model,
    syllables,
    text,
)
from tolerances import FP32, FP64
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_min import reward
from rlhf_min.data import Cursor
from rlhf_min.errors import BadInput
from rlhf_min.harness.inputs import Inputs
from rlhf_min.harness.rows.encoding_report import summary
from rlhf_min.harness.run.saved_models import save_reward_model
from rlhf_min.harness.stages.reward import _prepared
from rlhf_min.optim import Optimizer, State
from rlhf_min.reward_model import RewardModel

PAIRS = [
    {"prompt": "red ball", "chosen": "one", "rejected": "two two two"},
    {"prompt": "big", "chosen": "two two small ball", "rejected": "one", "margin": 0.5},
    {"prompt": "blue big ball ball", "chosen": "green", "rejected": "red", "margin": None},
    {"prompt": "green one small", "chosen": "red blue", "rejected": "blue red", "margin": 2.0},
    {"prompt": "two small", "chosen": "big one big", "rejected": "small", "margin": 0.0},
    {"prompt": "small", "chosen": "small red", "rejected": "ball"},
    {"prompt": "one red one", "chosen": "green", "rejected": "big big big", "margin": 1.0},
]
# Where a gradient is 0 but for rounding, as that of a key's bias, Adam divides rounding by 1e-8:
# only a low rate keeps two loops within FP64 of each other.
RATE = 1e-4
CONFIG = reward.RewardConfig(
    epochs=2, batch_size=3, learning_rate=1e-2, weight_decay=0.1, center_coef=0.3, eval_every=2
)


def examples(reward_model, pairs=PAIRS):
    return reward.prepare_pairs(reward_model, pairs)[0]


def plain_score(reward_model, prompt, response):
    """The classifier's own output for the two texts alone, with gradient."""
    inputs = reward_model.tokenizer(prompt, response, return_tensors="pt")
    return reward_model.model(**inputs).logits[0, 0]


def plain_loss(reward_model, pairs, center_coef):
    """The mean of -log(1 / (1 + e^-d)) + center_coef * s^2, with d less the margin, s the sum."""
    losses = []
    for pair in pairs:
        chosen, rejected = (
            plain_score(reward_model, pair["prompt"], pair[side]) for side in ("chosen", "rejected")
        )
        d = chosen - rejected - (pair.get("margin") or 0.0)
        losses.append((1 + (-d).exp()).log() + center_coef * (chosen + rejected) ** 2)
    return sum(losses) / len(losses)


def test_loss_and_metrics_by_hand():
    reward_model = small_reward_model()
    found = reward.batch_loss(reward_model, examples(reward_model), center_coef=0.3)
    assert found.loss.item() == pytest.approx(plain_loss(reward_model, PAIRS, 0.3).item(), abs=FP64)
    margins = [
        float(
            plain_score(reward_model, p["prompt"], p["chosen"]).detach()
            - plain_score(reward_model, p["prompt"], p["rejected"]).detach()
        )
        for p in PAIRS
    ]
    assert found.margin.item() == pytest.approx(statistics.fmean(margins), abs=FP64)
    right = sum(margin > 0 for margin in margins)
    assert found.accuracy.item() == pytest.approx(right / 7, abs=FP64)
    assert 0 < right < 7
    assert int(found.count) == 7
    chosen, rejected = reward.pair_scores(reward_model, PAIRS)
    assert (chosen - rejected).tolist() == pytest.approx(margins, abs=FP64)


def test_training_is_the_plain_loop():
    reward_model, plain = small_reward_model(), small_reward_model()
    config = replace(CONFIG, epochs=1, max_tokens=40, warmup_share=0.34, learning_rate=RATE)
    state = reward.new_state(reward_model, examples(reward_model), config)
    found = list(reward.train(reward_model, config, state))

    def loss_of(rows):
        return plain_loss(plain, [PAIRS[i] for i in rows], 0.3), {}

    assert_is_the_plain_loop(found, plain, loss_of, order=shuffled(7, seed=0), rate=RATE)
    assert largest_difference(reward_model, plain) < FP64
    assert largest_difference(reward_model, small_reward_model()) > RATE / 2


def one_step(max_tokens):
    reward_model, batches = small_reward_model(), []
    forward = reward_model.forward_pairs

    def counted(pairs):
        batches.append(len(pairs))
        return forward(pairs)

    reward_model.forward_pairs = counted
    state = State(
        Optimizer(torch.optim.SGD(reward_model.parameters(), lr=0.1)),
        Cursor(examples(reward_model), seed=0),
    )
    config = replace(CONFIG, batch_size=7, max_tokens=max_tokens)
    metrics = next(reward.train(reward_model, config, state))
    return reward_model, metrics, batches


def test_micro_batches_leave_the_gradient_as_it_is():
    together, metrics, batches = one_step(10_000)
    assert batches == [14]
    # Two inputs of at most 10, 9, 9, 8, 7, 6, 6 tokens with [CLS] and two [SEP].
    for max_tokens, expected in ((1, [2] * 7), (40, [4, 4, 4, 2])):
        apart, split_metrics, batches = one_step(max_tokens)
        assert batches == expected
        assert largest_difference(apart, together) < FP64
        for name in ("loss", "accuracy", "ties", "margin", "grad_norm"):
            assert split_metrics[name] == pytest.approx(metrics[name], abs=FP64)
    assert largest_difference(together, small_reward_model()) > 1e-3


def test_a_pass_holds_no_more_than_max_tokens():
    reward_model, cells = small_reward_model(), []
    reward_model.model.register_forward_pre_hook(
        lambda _, __, inputs: cells.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    reward.evaluate(reward_model, examples(reward_model), replace(CONFIG, max_tokens=40))
    assert len(cells) > 2
    assert max(cells) <= 40


def test_pairs_are_prepared_as_they_are():
    reward_model = small_reward_model()
    for x, pair in zip(examples(reward_model), PAIRS, strict=True):
        assert (x.prompt, x.chosen, x.rejected) == (
            pair["prompt"],
            pair["chosen"],
            pair["rejected"],
        )
        assert x.margin == pair.get("margin")
        inputs = reward_model.tokenizer(
            [pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]], padding=True
        )
        assert x.length == sum(map(len, inputs.input_ids))


def test_pairs_that_are_the_same_tokens_are_left_out_and_counted():
    pairs = [
        {"prompt": "red", "chosen": "Ball", "rejected": "ball"},  # the tokenizer knows no case
        {"prompt": "red", "chosen": "ball 😀", "rejected": "ball 😡"},  # and neither of these
        {"prompt": "red", "chosen": "big  ball", "rejected": "big\nball"},
        {"prompt": "red", "chosen": "one " * 40, "rejected": "one " * 40 + "two"},
        {"prompt": "red", "chosen": "one", "rejected": "two"},
    ]
    kept, report = reward.prepare_pairs(small_reward_model(), pairs)
    assert [(x.chosen, x.rejected) for x in kept] == [("one", "two")]
    assert (report.equal_tokens, report.equal_after_cut) == (3, 1)
    assert report.unknown_tokens == 2
    assert report.tokens == 10 + 2 + 4 + 4 + 81 + 2  # each prompt twice
    told = summary(report)
    assert "3 pairs dropped: the tokenizer makes the same tokens of both responses" in told
    assert "1 pairs dropped: equal after the cut" in told
    assert "1.9% of the tokens are unknown" in told


def test_texts_are_tokenised_once_and_not_in_each_step(monkeypatch):
    reward_model = small_reward_model()
    prepared = examples(reward_model)
    monkeypatch.setattr(reward_model.codec, "encode", None)
    monkeypatch.setattr(type(reward_model.tokenizer), "__call__", None)
    state = reward.new_state(reward_model, prepared, CONFIG)
    assert len(list(reward.train(reward_model, CONFIG, state, heldout=prepared))) == 6


def test_evaluate_is_over_all_pairs_and_without_dropout():
    reward_model = small_reward_model()
    for module in reward_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    reward_model.train()
    found = reward.evaluate(reward_model, examples(reward_model), replace(CONFIG, max_tokens=40))
    whole = reward.batch_loss(small_reward_model(), examples(reward_model), center_coef=0.3)
    assert set(found) == {"eval/loss", "eval/accuracy", "eval/ties", "eval/margin"}
    assert reward_model.training  # as it was found
    for name in ("loss", "accuracy", "ties", "margin"):
        assert found[f"eval/{name}"] == pytest.approx(getattr(whole, name).item(), abs=FP64)


def test_when_held_out_pairs_are_looked_at_and_in_which_mode():
    reward_model, modes = small_reward_model().eval(), []  # as a loaded model is
    reward_model.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    config = replace(CONFIG, batch_size=3, eval_every=4)
    state = reward.new_state(reward_model, examples(reward_model), config)
    heldout = examples(reward_model)[:1]
    found = list(reward.train(reward_model, config, state, heldout=heldout))
    assert ["eval/loss" in m for m in found] == [False, False, False, True, False, True]
    assert [m["epoch"] for m in found] == [3 / 7, 6 / 7, 1.0, 10 / 7, 13 / 7, 2.0]
    assert modes == [True, True, True, True, False, True, True, False]


def test_a_classifier_without_bias_keeps_its_mean():
    reward_model = RewardModel(gpt2_classifier(), syllables())
    prompts, responses = [text([i]) for i in range(6)], [text([i, i + 3]) for i in range(6)]
    before = reward_model.score(prompts, responses)
    mean, std = reward.normalise(reward_model, prompts, responses)
    after = reward_model.score(prompts, responses)
    assert (mean, std) == pytest.approx((float(before.mean()), float(before.std())))
    assert after.tolist() == pytest.approx((before / std).tolist(), abs=FP64)


def test_length_rules_by_hand():
    pairs = [
        {"chosen": "long one", "rejected": "short"},
        {"chosen": "a", "rejected": "bc"},
        {"chosen": "ab", "rejected": "cd"},
        {"chosen": "w w w", "rejected": "longer"},  # characters count, not words
    ]
    longer, shorter = reward.length_rules(pairs)
    assert longer.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert shorter.tolist() == [0.0, 1.0, 0.5, 1.0]


def test_normalised_scores_survive_saving(tmp_path):
    reward_model = small_reward_model()
    prompts = [pair["prompt"] for pair in PAIRS]
    responses = [pair["chosen"] for pair in PAIRS]
    scores = [
        plain_score(reward_model, p, r).item() for p, r in zip(prompts, responses, strict=True)
    ]
    found = reward.normalise(reward_model, prompts, responses)
    assert found == pytest.approx((statistics.fmean(scores), statistics.stdev(scores)), abs=FP64)
    save_reward_model(reward_model, tmp_path / "model")

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float64
    loaded = [
        model(**tokenizer(p, r, return_tensors="pt")).logits[0, 0].item()
        for p, r in zip(prompts, responses, strict=True)
    ]
    assert statistics.fmean(loaded) == pytest.approx(0.0, abs=FP64)
    assert statistics.variance(loaded) == pytest.approx(1.0, abs=FP64)
    # The order stays, and so does the ratio of any two differences.
    mean, std = found
    assert loaded == pytest.approx([(s - mean) / std for s in scores], abs=FP64)


def test_scores_that_are_all_equal_cannot_be_normalised():
    reward_model = small_reward_model()
    torch.nn.init.zeros_(reward_model.model.classifier.weight)
    torch.nn.init.constant_(reward_model.model.classifier.bias, 3.0)
    with pytest.raises(BadInput, match=r"all 2 texts the same score 3\b"):
        reward.normalise(reward_model, ["red", "big"], ["ball", "one"])
    assert reward_model.model.classifier.bias.item() == 3.0


@pytest.mark.parametrize("size", [1e-9, 1e-4])
def test_scores_that_are_equal_but_for_rounding_cannot_be_normalised(size):
    reward_model = small_reward_model()
    last = reward_model.model.classifier
    with torch.no_grad():
        last.weight.mul_(size)
    before = last.weight.clone()
    prompts, responses = ["red", "big", "one"], ["ball", "one", "two"]
    if size < 1e-6:
        with pytest.raises(BadInput, match="all 3 texts the same score"):
            reward.normalise(reward_model, prompts, responses)
        assert torch.equal(last.weight, before)
    else:
        reward.normalise(reward_model, prompts, responses)
        assert float(reward_model.score(prompts, responses).std()) == pytest.approx(1.0)


def test_a_small_model_ranks_32_pairs_right():
    pairs = [
        {"prompt": f"{a} {b}", "chosen": f"{a} ball", "rejected": f"{b} ball"}
        for a in WORDS
        for b in WORDS
        if a < b
    ] + [{"prompt": w, "chosen": f"{w} one", "rejected": "two"} for w in WORDS[:4]]
    assert len(pairs) == 32
    reward_model = small_reward_model(dtype=torch.float32)
    config = reward.RewardConfig(epochs=80, batch_size=32, learning_rate=1e-2)
    state = reward.new_state(reward_model, examples(reward_model, pairs), config)
    metrics = list(reward.train(reward_model, config, state))
    assert metrics[0]["accuracy"] < 0.9
    assert metrics[-1]["accuracy"] == pytest.approx(1.0, abs=FP32)
    chosen, rejected = reward.pair_scores(reward_model, pairs)
    assert bool((chosen > rejected).all())
    assert metrics[-1]["loss"] < metrics[0]["loss"] < 2 * math.log(2)


def build(dropout: float = 0.0):
    reward_model = small_reward_model(dtype=torch.float32, dropout=dropout)
    state = reward.new_state(reward_model, examples(reward_model), CONFIG)
    return (
        reward_model,
        state,
        lambda: reward.train(reward_model, CONFIG, state, heldout=examples(reward_model)[:3]),
    )


def test_dropout_differs_from_step_to_step_and_from_seed_to_seed():
    """One pair, weights that stay: only the dropout can make two losses differ."""
    losses = []
    for seed in (0, 1):
        reward_model = small_reward_model(dropout=0.5)
        optimizer = Optimizer(torch.optim.SGD(reward_model.parameters(), lr=0.0))
        config = replace(CONFIG, epochs=3, seed=seed)
        state = State(optimizer, Cursor(examples(reward_model)[1:2], seed=seed))
        losses += [m["loss"] for m in reward.train(reward_model, config, state)]
    assert len(set(losses)) == 6


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resume(dropout):
    assert_resumes(lambda: build(dropout), steps=6)


def test_determinism():
    assert_deterministic(build)


def test_held_out_pairs_that_are_all_equal_have_a_cure_of_their_own():
    model = RewardModel(bert(), bert_syllables())
    equal = {"prompt": "ba", "chosen": "zzz", "rejected": "qqq"}  # unknown words
    good = {"prompt": "ba", "chosen": "ba", "rejected": "be"}
    with pytest.raises(BadInput, match=r"of all 1 held out, .*; give another --seed, a larg"):
        _prepared(model, Inputs(pairs=[good, equal], heldout_pairs=[equal]))
    with pytest.raises(BadInput, match=r"no pair is left to train on: .*; give pairs that differ"):
        _prepared(model, Inputs(pairs=[equal], heldout_pairs=[good]))
