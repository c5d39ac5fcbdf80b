"""LoRA: an adapter changes what it should and nothing else, and the frozen weights exist once."""

import json
import math
import shutil
from functools import partial
from itertools import islice

import peft
import pytest
import torch
from devices import PretendedDevices
from safetensors.torch import load_file, save_file
from small import (
    DEMONSTRATIONS,
    EOS,
    PREFERENCES,
    PROMPTS,
    TEXT_PAIRS,
    UNPAIRED,
    bert,
    bert_config,
    bert_syllables,
    generator,
    gpt2,
    lengths,
    llama,
    seeded,
    small_policy,
    small_reward_model,
    syllables,
    token_rows,
    weights,
)
from strategies import assert_close
from tolerances import EXACT, FP32, FP64
from torch import nn
from transformers import AutoModelForCausalLM, BertForMaskedLM, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

from rlhf_min import dpo, grpo, kto, ppo, reward, rloo, sft
from rlhf_min.config import GRPOConfig, RLOOConfig
from rlhf_min.data import collate
from rlhf_min.errors import BadInput
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.harness.stages.run_stage import copy_policy
from rlhf_min.loading import adapters
from rlhf_min.loading.adapters import LoRA
from rlhf_min.policy import Policy, evaluating
from rlhf_min.reward_model import RewardModel
from rlhf_min.sampling import sample

# peft asks a newer transformers by an older name, and repairs what an older peft left undone.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

KNOWN = 28  # tokens of `syllables`
BATCH = collate(
    token_rows([3, 1, 5], seed=40, vocabulary=KNOWN),
    token_rows([2, 6, 1], seed=41, vocabulary=KNOWN),
    pad_id=0,
)
TEXTS = (["ba be", "bi", "go"], ["bo bu da", "de", "di do du fa fe fi"])
# A norm of Llama is computed in float32.
LMS = pytest.mark.parametrize(
    ("make", "tolerance"), [(gpt2, 10 * FP64), (llama, FP32)], ids=["gpt2", "llama"]
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Saved models: of each family, a masked language model without pooler and head, and those of
    `small_policy` and `small_reward_model`."""
    folder = tmp_path_factory.mktemp("bases")
    for make in (gpt2, llama):
        make(vocabulary=KNOWN).save_pretrained(folder / make.__name__)
        syllables().save_pretrained(folder / make.__name__)
    bert().save_pretrained(folder / "bert")
    seeded(lambda: BertForMaskedLM(bert_config())).save_pretrained(folder / "masked")
    for name in ("bert", "masked"):
        bert_syllables().save_pretrained(folder / name)
    save_policy(small_policy(), folder / "policy")
    save_reward_model(small_reward_model(), folder / "reward_model")
    return folder


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def moved(module, seed=0, size=0.3):
    """The same module with all that is trained moved away from where it started, B from zero."""
    rng = generator(seed)
    with torch.no_grad():
        for p in trained(module).values():
            p.add_(size * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return module


def adapted(folder, *, critic="none", plain=False, **options):
    lora = LoRA(**({"rank": 4} | options))
    return Policy.from_pretrained(folder, critic=critic, new_head=True, plain=plain, lora=lora)


def scorer(folder, *, plain=False, new_head=True, **options):
    lora = LoRA(**({"rank": 4} | options))
    return RewardModel.from_pretrained(folder, new_head=new_head, plain=plain, lora=lora)


def said(load, *args, **options):
    with pytest.raises(BadInput) as raised:
        load(*args, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


# A new adapter


@LMS
def test_a_new_adapter_changes_nothing(make, tolerance, bases):
    del tolerance
    base = Policy.from_pretrained(bases / make.__name__, critic="none")
    new = adapted(bases / make.__name__)
    with torch.no_grad():
        assert_close(new(BATCH).logprobs, base(BATCH).logprobs, EXACT)


def test_a_new_adapter_is_drawn_by_its_seed_and_by_no_other_generator(bases):
    before = torch.get_rng_state()
    first, again, other = (adapted(bases / "gpt2", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, p in trained(first).items():
        assert torch.equal(p, dict(again.named_parameters())[name])
        if "lora_A" in name:
            # Uniform, of the deviation that a linear layer starts with.
            width = p.shape[1]
            assert float(p.detach().abs().max()) <= width**-0.5
            assert not torch.equal(p, dict(other.named_parameters())[name])
        else:
            assert not p.any()


@pytest.mark.parametrize(
    ("name", "options", "matrices", "scale"),
    [
        ("gpt2", {}, 8, 2.0),
        ("gpt2", {"targets": ["c_attn"]}, 2, 2.0),
        ("gpt2", {"targets": ["mlp.c_proj", "c_fc"], "alpha": 2}, 4, 0.5),
        ("llama", {}, 14, 2.0),
        ("llama", {"targets": ["q_proj", "v_proj"], "alpha": 12}, 4, 3.0),
    ],
)
def test_which_layers_and_how_strong(name, options, matrices, scale, bases):
    policy = adapted(bases / name, **options)
    layers = dict(adapters.adapted_layers(policy.lm))
    assert len(layers) == matrices
    assert {layer.scaling["default"] for layer in layers.values()} == {scale}
    assert len(trained(policy)) == 2 * matrices  # A and B; the head is frozen, and embeddings
    assert adapters.config_of(policy.lm).fan_in_fan_out == (name == "gpt2")
    for target in options.get("targets", ()):
        assert any(layer.endswith(target) for layer in layers)


# What is computed


def dense(policy):
    """The weights of the same policy without an adapter, by the formula: W + scale * B A."""
    found = {}
    for name, layer in adapters.adapted_layers(policy.lm):
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        change = layer.scaling["default"] * B @ A  # (out, in)
        base = layer.get_base_layer()
        found[f"{name}.weight"] = base.weight + (
            change if isinstance(base, nn.Linear) else change.T  # GPT-2 keeps it transposed
        )
    return found


@LMS
def test_an_adapter_is_a_sum_and_its_gradient_that_of_the_sum(make, tolerance, bases):
    policy = moved(adapted(bases / make.__name__, critic="shared"))
    whole = Policy.from_pretrained(bases / make.__name__, critic="none")
    with torch.no_grad():
        for name, weight in dense(policy).items():
            whole.lm.get_parameter(name).copy_(weight)
    rows = torch.linspace(-1, 1, BATCH.mask.shape[1], dtype=torch.float64)
    found, expected = policy(BATCH), whole(BATCH)
    assert_close(found.logprobs, expected.logprobs, tolerance)
    (found.logprobs * rows).sum().backward()
    (expected.logprobs * rows).sum().backward()
    for name, layer in adapters.adapted_layers(policy.lm):
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        gradient = whole.lm.get_parameter(f"{name}.weight").grad
        if not isinstance(layer.get_base_layer(), nn.Linear):
            gradient = gradient.T
        scale = layer.scaling["default"]
        assert_close(B.grad, scale * gradient @ A.T, tolerance)
        assert_close(A.grad, scale * B.T @ gradient, tolerance)
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


@LMS
@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_a_plain_policy_gives_the_same(make, tolerance, on, bases):
    pair = [adapted(bases / make.__name__, critic="shared", plain=plain) for plain in (True, False)]
    if on:
        pair = [moved(policy) for policy in pair]
    plain, fast = pair
    for policy in pair:
        output = policy(BATCH, temperature=0.7)
        (output.logprobs.sum() + output.values.sum()).backward()
    with torch.no_grad():
        for ours, theirs in zip(fast(BATCH)[:3], plain(BATCH)[:3], strict=True):
            assert_close(ours, theirs, tolerance)
    for (name, p), (_, q) in zip(trained(fast).items(), trained(plain).items(), strict=True):
        if on or "lora_A" not in name:  # whose gradient is zero while B is
            assert float(p.grad.abs().max()) > 0
        assert_close(p.grad, q.grad, 10 * tolerance)


@LMS
def test_responses_are_sampled_through_the_adapter(make, tolerance, bases):
    del tolerance
    pair = [moved(adapted(bases / make.__name__, plain=p), size=0.5) for p in (True, False)]
    base = Policy.from_pretrained(bases / make.__name__, critic="none")
    prompts = token_rows([3, 1, 5, 4], seed=42, vocabulary=KNOWN)
    plain, fast, before = (
        sample(policy, prompts, max_new_tokens=8, temperature=1.0, rng=generator(3))
        for policy in (*pair, base)
    )
    assert [x.tolist() for x in plain] == [x.tolist() for x in fast]
    assert [x.tolist() for x in plain] != [x.tolist() for x in before]
    assert any(int(x[-1]) != EOS for x in plain)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_a_plain_reward_model_gives_the_same(name, on, bases):
    pair = []
    for plain in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the new head
            pair.append(scorer(bases / name, plain=plain))
    if on:
        pair = [moved(model) for model in pair]
    plain, fast = pair
    for model in pair:
        model(*TEXTS).square().sum().backward()
    assert_close(fast.score(*TEXTS), plain.score(*TEXTS), 10 * FP64)
    for p, q in zip(trained(fast).values(), trained(plain).values(), strict=True):
        assert_close(p.grad, q.grad, 100 * FP64)


@LMS
def test_layers_that_are_computed_again_give_the_same_gradient(make, tolerance, bases):
    kept, again = (moved(adapted(bases / make.__name__)) for _ in range(2))
    again.checkpoint_gradients()
    for policy in (kept, again):
        policy.train()
        policy(BATCH).logprobs.square().sum().backward()
    for p, q in zip(trained(kept).values(), trained(again).values(), strict=True):
        assert float(p.grad.abs().max()) > 0
        assert_close(p.grad, q.grad, tolerance)


def test_in_half_precision_the_adapters_stay_in_float32(bases):
    policy = moved(adapted(bases / "gpt2")).float()
    whole = policy(BATCH).logprobs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = policy(BATCH).logprobs
    half.sum().backward()
    assert_close(half, whole, 0.3)
    assert not torch.equal(half, whole)
    assert {p.grad.dtype for p in trained(policy).values()} == {torch.float32}


# Copies and the reference


def addresses(module):
    return {p.data_ptr() for p in module.parameters()}


def test_the_frozen_weights_are_in_memory_once(bases):
    start = adapted(bases / "gpt2", critic="shared")
    policy, reference = copy_policy(start, critic="shared"), start.reference()
    frozen = {p.data_ptr() for p in start.parameters() if not p.requires_grad}
    for one in (policy, reference):
        assert frozen < addresses(one)
    own = [{p.data_ptr() for p in trained(x).values()} for x in (start, policy)]
    own.append(addresses(reference) - frozen)
    assert len(set.union(*own)) == sum(map(len, own)) == 3 * 16 + 2 * 2  # A and B, 8 of each
    assert not trained(reference)


def test_on_another_device_the_reference_has_all_weights_for_itself(bases):
    policy = adapted(bases / "gpt2")
    reference = policy.reference(torch.device("meta"))
    assert {p.device.type for p in reference.parameters()} == {"meta"}
    assert {p.device.type for p in policy.parameters()} == {"cpu"}
    # Moving a weight may move it for all that have it.
    copied = adapters.copied(policy.lm, torch.device("meta"))
    assert not addresses(copied) & addresses(policy)


@pytest.mark.parametrize("other", ["cuda:0", "cuda:1"])
def test_dpo_with_the_reference_beside_it_or_on_another_device(other, bases):
    def losses(policy_on, ref_on):
        start = moved(adapted(bases / "policy")).to(policy_on)
        policy, reference = copy_policy(start, critic="none"), start.reference(torch.device(ref_on))
        assert addresses(reference).isdisjoint(addresses(policy)) == (policy_on != ref_on)
        config = dpo.DPOConfig(batch_size=4, learning_rate=0.05, cache_reference=False)
        state = dpo.new_state(policy, reference, PREFERENCES, config)
        return [metrics["loss"] for metrics in dpo.train(policy, reference, config, state)]

    expected = losses("cpu", "cpu")
    with PretendedDevices():
        assert losses("cuda:0", other) == pytest.approx(expected, abs=FP64)


def test_a_whole_model_is_copied_whole(bases):
    policy = Policy.from_pretrained(bases / "gpt2", critic="none")
    for copied in (policy.reference(), copy_policy(policy, critic="none")):
        assert not addresses(copied) & addresses(policy)


def test_the_reference_has_no_dropout_and_no_mode_but_its_own(tmp_path):
    gpt2(vocabulary=KNOWN, dropout=0.5).save_pretrained(tmp_path)
    syllables().save_pretrained(tmp_path)
    policy = moved(adapted(tmp_path))
    expected = policy(BATCH).logprobs
    reference = policy.reference()
    policy.train()
    assert not any(module.training for module in reference.modules())
    reference.train()
    assert_close(reference(BATCH).logprobs, expected, EXACT)
    with evaluating(policy, reference):
        assert_close(policy(BATCH).logprobs, reference(BATCH).logprobs, EXACT)
    assert all(module.training for module in policy.modules())
    assert not torch.equal(policy(BATCH).logprobs, expected)  # its dropout is on again


def runs(bases):
    """Of each algorithm, what makes a new module, its state and its generator."""
    both = {"learning_rate": 0.05, "batch_size": 4, "warmup_share": 0.0}

    def of_sft():
        policy = adapted(bases / "policy")
        config = sft.SFTConfig(**both)
        state = sft.new_state(policy, DEMONSTRATIONS, config)
        return policy, state, sft.train(policy, config, state)

    def of_reward():
        model = scorer(bases / "reward_model")
        config = reward.RewardConfig(**both)
        examples, _ = reward.prepare_pairs(model, TEXT_PAIRS * 3)
        state = reward.new_state(model, examples, config)
        return model, state, reward.train(model, config, state)

    def of_dpo(cache=True):
        start = moved(adapted(bases / "policy"))
        policy, reference = copy_policy(start, critic="none"), start.reference()
        config = dpo.DPOConfig(**both, epochs=3, cache_reference=cache)
        state = dpo.new_state(policy, reference, PREFERENCES, config)
        return policy, state, dpo.train(policy, reference, config, state)

    def of_ppo():
        start = moved(adapted(bases / "policy", critic="shared"))
        policy, reference = copy_policy(start, critic="shared"), start.reference()
        config = ppo.PPOConfig(
            **both, steps=3, epochs=2, minibatch_size=2, max_new_tokens=3, kl_coef=0.1
        )
        state = ppo.new_state(policy, PROMPTS, config)
        return policy, state, ppo.train(policy, reference, lengths, config, state)

    def of_kto():
        start = moved(adapted(bases / "policy"))
        policy, reference = copy_policy(start, critic="none"), start.reference()
        config = kto.KTOConfig(**both, epochs=2)
        state = kto.new_state(policy, reference, UNPAIRED, config)
        return policy, state, kto.train(policy, reference, config, state)

    def of_groups(algorithm, config_class):
        start = moved(adapted(bases / "policy"))
        policy, reference = copy_policy(start, critic="none"), start.reference()
        config = config_class(
            **both, steps=3, group_size=2, minibatch_size=2, max_new_tokens=3, kl_coef=0.1
        )
        state = algorithm.new_state(policy, PROMPTS, config)
        steps = algorithm.train(policy, reference, lengths, config, state)
        return policy, state, steps

    return {
        "sft": of_sft,
        "reward": of_reward,
        "dpo": of_dpo,
        "kto": of_kto,
        "ppo": of_ppo,
        "grpo": partial(of_groups, grpo, GRPOConfig),
        "rloo": partial(of_groups, rloo, RLOOConfig),
    }


ALGORITHMS = pytest.mark.parametrize(
    "algorithm", ["sft", "reward", "dpo", "kto", "ppo", "grpo", "rloo"]
)


@ALGORITHMS
def test_training_moves_the_adapters_and_the_head_alone(algorithm, bases):
    module, _, steps = runs(bases)[algorithm]()
    before = weights(module)
    found = list(islice(steps, 3))
    assert len(found) >= 3 or algorithm == "reward"
    heads = {"reward": "model.classifier.", "ppo": "value_head."}
    for name, p in module.named_parameters():
        learns = "lora_" in name or name.startswith(heads.get(algorithm, "none"))
        assert p.requires_grad == learns
        assert torch.equal(p, before[name]) != learns, name


def test_the_reference_stays_and_is_where_the_policy_began(bases):
    live, cached = (list(runs(bases)["dpo"](cache)[2]) for cache in (False, True))
    assert live[0]["loss"] == pytest.approx(math.log(2), abs=FP64)
    assert live[-1]["loss"] != pytest.approx(math.log(2), abs=0.01)
    for first, again in zip(live, cached, strict=True):
        first["accuracy"] = again["accuracy"] = 0  # at the start it hangs on rounding
        assert first == pytest.approx(again, abs=FP64)
    kls = [metrics["kl"] for metrics in runs(bases)["ppo"]()[2]]
    assert kls[0] == pytest.approx(0.0, abs=FP64)
    assert abs(kls[-1]) > 0.001


def test_after_an_sft_the_reference_of_dpo_is_the_sft_model(bases, tmp_path):
    sft_policy = moved(adapted(bases / "policy"))
    save_policy(sft_policy, tmp_path / "sft")
    start = adapted(tmp_path / "sft")
    policy, reference = copy_policy(start, critic="none"), start.reference()
    config = dpo.DPOConfig(batch_size=4, epochs=3, learning_rate=0.05)
    state = dpo.new_state(policy, reference, PREFERENCES, config)
    base = Policy.from_pretrained(bases / "policy", critic="none")
    chosen = [x.ref_logprobs[0] for x in state.cursor.examples]
    with torch.no_grad():
        of_sft, _ = dpo.response_logprobs(sft_policy, PREFERENCES)
        of_base, _ = dpo.response_logprobs(base, PREFERENCES)
    assert_close(torch.tensor(chosen, dtype=torch.float64), of_sft, FP64)
    assert float((of_sft - of_base).abs().min()) > 0.01
    for _ in dpo.train(policy, reference, config, state):
        pass
    # The finished adapter is one of the first base, and gives the trained model there.
    save_policy(policy, tmp_path / "dpo")
    named = json.loads((tmp_path / "dpo" / "adapter_config.json").read_text("utf-8"))
    assert named["base_model_name_or_path"] == str(bases / "policy")
    plain = read_by_peft(tmp_path / "dpo")
    ids = torch.arange(2, 10)[None]
    assert_close(plain(ids).logits, policy.lm(ids).logits, 10 * FP64)
    assert bool(((plain(ids).logits - sft_policy.lm(ids).logits).abs() > 0.01).any())


# What is saved and loaded


def read_by_peft(folder, kind=peft.AutoPeftModelForCausalLM, **options):
    return kind.from_pretrained(folder, dtype=torch.float64, **options).eval()


@LMS
def test_plain_peft_reads_the_adapter_of_a_policy(make, tolerance, bases, tmp_path):
    policy = moved(
        adapted(
            bases / make.__name__,
            critic="shared",
            targets=["c_attn", "c_fc"] if make is gpt2 else (),
        )
    )
    save_policy(policy, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    logits = policy.lm(BATCH.ids).logits
    assert_close(read_by_peft(tmp_path)(BATCH.ids).logits, logits, tolerance)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(by_transformers(BATCH.ids).logits, logits, tolerance)
    merged = Policy.from_pretrained(tmp_path, critic="shared")
    assert len(trained(merged)) == len(list(merged.parameters()))
    with torch.no_grad():
        for ours, theirs in zip(merged(BATCH)[:3], policy(BATCH)[:3], strict=True):
            assert_close(ours, theirs, tolerance)
        again = adapted(tmp_path, critic="shared")
        for ours, theirs in zip(again(BATCH)[:3], policy(BATCH)[:3], strict=True):
            assert_close(ours, theirs, EXACT)


@LMS
def test_a_merged_folder_is_a_model_like_any_other(make, tolerance, bases, tmp_path):
    policy = moved(adapted(bases / make.__name__, critic="shared", merge=True))
    before = weights(policy)
    save_policy(copy_policy(policy, critic="shared"), tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(plain(BATCH.ids).logits, policy.lm(BATCH.ids).logits, tolerance)
    assert set(torch.load(tmp_path / "model.pt", weights_only=True)) == set(plain.state_dict())
    loaded = Policy.from_pretrained(tmp_path, critic="shared")
    assert_close(loaded(BATCH).values, policy(BATCH).values, tolerance)
    for name, p in policy.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("bert", ["classifier"]),
        ("masked", ["bert.pooler.dense", "classifier"]),
        ("gpt2", ["score"]),
        ("roberta", ["classifier"]),  # a head of two layers
    ],
)
def test_plain_peft_reads_the_adapter_of_a_reward_model_with_its_head(name, whole, bases, tmp_path):
    base = bases / name
    if name == "roberta":
        base = tmp_path / "base"
        config = RobertaConfig(**{**bert_config().to_dict(), "model_type": "roberta"})
        config.num_labels = 1
        seeded(lambda: Roberta(config)).save_pretrained(base)
        bert_syllables().save_pretrained(base)
    model = moved(scorer(base))
    assert adapters.config_of(model.model).modules_to_save == whole
    before = weights(model)
    model.rescale(gain=-2.0, bias=0.5 if model.has_bias else 0.0)
    last = "model.score." if name == "gpt2" else "model.classifier."
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key]) != (key.startswith(last) and "dense" not in key), key
    save_reward_model(model, tmp_path / "out")
    scores = model.score(*TEXTS)
    assert float(scores.std()) > 0.01
    for loaded in (
        RewardModel.from_pretrained(tmp_path / "out"),
        scorer(tmp_path / "out", new_head=False),
    ):
        assert_close(loaded.score(*TEXTS), scores, 10 * FP64)
        assert loaded.new_weights == []
    plain = read_by_peft(
        tmp_path / "out", peft.AutoPeftModelForSequenceClassification, num_labels=1
    )
    plain.config.pad_token_id = model.model.config.pad_token_id
    with torch.no_grad():
        found = plain(**model.encode(*TEXTS)).logits[:, 0]
    assert_close(found, scores, 100 * FP64)


@pytest.mark.parametrize(
    ("name", "whole"),
    [("bert", ["classifier"]), ("masked", ["bert.pooler.dense", "classifier"])],
)
def test_an_adapter_that_came_without_a_head_is_saved_with_one(name, whole, bases, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["query"])
    made = moved(peft.get_peft_model(bert(), config))
    made.peft_config["default"].base_model_name_or_path = str(bases / name)
    made.save_pretrained(tmp_path / "without")
    model = scorer(tmp_path / "without")
    assert adapters.config_of(model.model).modules_to_save == whole
    moved(model)
    model.rescale(gain=-2.0, bias=0.5)
    scores = model.score(*TEXTS)
    save_reward_model(model, tmp_path / "out")
    loaded = scorer(tmp_path / "out", new_head=False)
    assert_close(loaded.score(*TEXTS), scores, EXACT)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_an_adapter_that_peft_made_is_merged(options, bases, tmp_path):
    base = gpt2(vocabulary=KNOWN)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["c_attn"], task_type="CAUSAL_LM", **options
    )
    made = moved(peft.get_peft_model(base, config)).eval()
    made.peft_config["default"].base_model_name_or_path = str(bases / "gpt2")
    made.save_pretrained(tmp_path)
    loaded = Policy.from_pretrained(tmp_path, critic="none")  # with the tokenizer of the base
    assert not adapters.is_adapted(loaded.lm)
    assert_close(loaded.lm(BATCH.ids).logits, made(BATCH.ids).logits, 100 * FP64)


def test_the_template_goes_with_the_adapter(bases, tmp_path):
    policy = adapted(bases / "gpt2")
    policy.lm.config.prompt_template = "Q: {prompt}\nA:"
    save_policy(policy, tmp_path)
    loaded = adapted(tmp_path)
    assert getattr(loaded.lm.config, "prompt_template", None) == "Q: {prompt}\nA:"


# What is refused


@pytest.fixture
def saved(bases, tmp_path):
    """The folder of an adapter of rank 4."""
    folder = tmp_path / "saved"
    save_policy(moved(adapted(bases / "gpt2")), folder)
    return folder


def edited(folder, **changes):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def load(folder):
    return Policy.from_pretrained(folder, critic="none")


def test_a_base_that_is_not_there_is_named_with_who_names_it(saved):
    for base in ("/nowhere/base", "no/such/base", "runs/base"):
        message = said(load, edited(saved, base_model_name_or_path=base))
        assert f"the base of this adapter is {base}, says adapter_config.json there" in message
        assert "no such folder" in message
        assert "correct base_model_name_or_path" in message
    assert "does not say of which model" in said(load, edited(saved, base_model_name_or_path=None))


def test_an_adapter_of_an_adapter_is_refused(saved, tmp_path):
    other = shutil.copytree(saved, tmp_path / "other")
    message = said(load, edited(other, base_model_name_or_path=str(saved)))
    assert f"{saved} is an adapter itself" in message


def test_what_is_no_lora_is_refused(saved):
    message = said(load, edited(saved, peft_type="IA3"))
    assert "an adapter of IA3, and only LoRA's are read; merge it" in message
    message = said(load, edited(saved, peft_type="LORA", trainable_token_indices=[1]))
    assert "has trainable_token_indices, which is not read here; merge it" in message


def test_another_base_is_refused_by_names_and_shapes(saved, bases):
    message = said(load, edited(saved, base_model_name_or_path=str(bases / "llama")))
    assert f"{saved}: the adapter does not fit {bases / 'llama'}: " in message
    message = said(load, edited(saved, base_model_name_or_path=str(bases / "gpt2"), r=8))
    assert "size mismatch" in message


def test_weights_that_are_missing_too_many_or_not_finite_are_refused(saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    for changed, what in [
        ({k: v for k, v in tensors.items() if k != name}, "it lacks"),
        (tensors | {name.replace(".0.", ".9."): tensors[name].clone()}, "it also has"),
        (tensors | {name: tensors[name] * torch.inf}, "holds NaN or infinite numbers"),
    ]:
        save_file(changed, file)
        assert what in said(load, saved)
    file.write_bytes(b"x" * 40)
    assert "damaged" in said(load, saved)
    file.unlink()
    assert "there is an adapter_config.json, but no adapter_model.safetensors" in said(load, saved)


def test_a_policys_adapter_is_no_reward_model_and_the_other_way_round(saved, bases, tmp_path):
    assert "weights are missing (score.weight)" in said(RewardModel.from_pretrained, saved)
    assert RewardModel.from_pretrained(saved, new_head=True).new_weights == ["score.weight"]
    assert "cannot be trained further here" in said(scorer, saved)
    save_reward_model(scorer(bases / "gpt2"), tmp_path / "scorer")
    assert "the adapter of a classifier and cannot be the policy" in said(load, tmp_path / "scorer")


def test_an_adapter_of_tied_embeddings_is_refused(bases, tmp_path):
    for options in ({"target_modules": ["wte"]}, {"modules_to_save": ["wte"]}):
        config = peft.LoraConfig(
            **({"target_modules": ["c_attn"]} | options), task_type="CAUSAL_LM"
        )
        made = moved(peft.get_peft_model(gpt2(vocabulary=KNOWN), config))
        made.peft_config["default"].base_model_name_or_path = str(bases / "gpt2")
        made.save_pretrained(tmp_path, save_embedding_layers=False)
        message = said(load, tmp_path)
        assert "an embedding, which is the vocabulary projection of GPT2LMHeadModel too" in message


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (
            {"rank": 8},
            "--lora_rank 8: the adapter in .* has rank 4 and is trained further as it is",
        ),
        (
            {"alpha": 3},
            "--lora_alpha 3: the adapter in .* has alpha 8 .*; give that or leave it out",
        ),
        ({"targets": ["c_fc"]}, "--lora_targets: the adapter in .* leave the option out"),
    ],
)
def test_an_adapter_is_trained_further_as_it_is(options, what, saved):
    assert len(trained(adapted(saved, alpha=8))) == 16
    with pytest.raises(BadInput, match=what):
        adapted(saved, **options)


def test_layers_that_are_not_there_or_not_linear_are_refused(bases):
    for target in ("q_proj", "wte", "lm_head", "ln_1"):
        message = said(adapted, bases / "gpt2", targets=[target])
        assert f"--lora_targets {target}: {bases / 'gpt2'} has no linear layer" in message
        assert "there are c_attn, c_fc, c_proj" in message


def test_a_separate_critic_is_refused(bases):
    for make in (
        lambda: adapted(bases / "gpt2", critic="separate"),
        lambda: copy_policy(adapted(bases / "gpt2"), critic="separate"),
    ):
        with pytest.raises(BadInput, match="a separate critic is a second trunk"):
            make()
