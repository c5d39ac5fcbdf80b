"""Runs that train adapters: what they start from and what they save; they resume to the bit."""

import json
import shutil
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from small import DEMONSTRATIONS, PREFERENCES, largest_difference, without_time
from test_lora import ALGORITHMS, adapted, bases, runs, scorer, trained  # noqa: F401 (a fixture)
from test_quiet import nothing_shown, talkative  # noqa: F401 (a fixture)
from test_resume import resume, run, start
from torture import command_line, prepare, result

from rlhf_min import sft
from rlhf_min.errors import BadInput
from rlhf_min.harness import preflight
from rlhf_min.harness.report import finish
from rlhf_min.harness.run.checkpoint import WEIGHTS, Checkpoint, Snapshot, begin, checkpoints
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.loading import adapters
from rlhf_min.loading.adapters import LoRA
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel

RANK = ("--lora_rank", "2")
IDS = torch.arange(2, 10)[None]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A run of each algorithm; DPO and PPO start from the adapter of SFT, and PPO's reward is the
    adapter of the reward model. DPO's is merged."""
    work = tmp_path_factory.mktemp("work")
    prepare(work)
    show, finish.show = finish.show, lambda _: []  # no pages
    of_sft = ("--model", work / "sft-run/sft")
    of_pairs = ("--reward_model", work / "reward_model-run/reward_model")
    options = {
        "sft": (),
        "reward_model": (),
        "dpo": (*of_sft, "--lora_merge", "--epochs", 1),
        "ppo": (*of_sft, *of_pairs, "--steps", 2),
    }
    try:
        for name, given in options.items():
            assert start(name, work, work / f"{name}-run", *RANK, *given) == 0
    finally:
        finish.show = show
    return work


def load(folder, **options):
    if "reward_model" in folder.name:
        return RewardModel.from_pretrained(folder, **options)
    return Policy.from_pretrained(folder, critic="none", **options)


@pytest.mark.parametrize("algorithm", ["sft", "reward_model", "ppo"])
def test_only_what_is_trained_is_saved_and_the_base_is_as_it_was(algorithm, work):
    out = work / f"{algorithm}-run"
    saved = load_file(checkpoints(out / "checkpoints" / algorithm)[-1] / WEIGHTS)
    heads = {"reward_model": "model.classifier.", "ppo": "value_head."}
    assert all("lora_" in x or x.startswith(heads.get(algorithm, "none")) for x in saved)
    folder = out / algorithm
    assert not list(folder.glob("model*"))
    assert (folder / "value_head.safetensors").is_file() == (algorithm == "ppo")
    # Of the same base, though PPO began with the adapter of SFT.
    base = work / ("reward_model" if algorithm == "reward_model" else "sft")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(base.resolve())
    before = dict(load(base).named_parameters())
    for name, p in load(folder, lora=LoRA(2)).named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[name.replace(".base_layer", "")])
        elif "classifier" not in name:  # which is rescaled after the last checkpoint
            assert torch.equal(p, saved[name])
            assert bool(p.any())
    notes = json.loads((out / "notes.json").read_text("utf-8"))[algorithm]
    assert notes["trained"] == sum(x.numel() for x in saved.values()) < notes["parameters"]
    finish.show(out)
    assert f"parameters ({notes['trained']:,} trained)" in (out / "report.html").read_text("utf-8")


def test_dpo_and_ppo_move_away_from_the_sft_model_which_stays(work):
    sft = load(work / "sft-run/sft").lm(IDS).logits
    base = load(work / "sft").lm(IDS).logits
    for name in ("dpo", "ppo"):
        found = load(work / f"{name}-run/{name}").lm(IDS).logits
        assert 0 < (found - sft).abs().max() < (base - sft).abs().max()
    assert (work / "dpo-run/dpo/model.safetensors").is_file()  # merged
    assert not (work / "dpo-run/dpo/adapter_config.json").exists()


def test_a_stopped_run_ends_like_the_whole_one(work, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "show", lambda _: [])
    out = tmp_path / "run"
    assert start("sft", work, out, *RANK, stop_at=5) == 143
    assert resume("sft", out) == 0
    assert result(out) == result(work / "sft-run")


def test_without_the_option_the_adapter_is_merged_and_all_is_trained(work, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "show", lambda _: [])
    folder = work / "sft-run/sft"
    options = command_line("sft", work)[:-2]
    assert run("sft", *options, "--model", folder, "--epochs", 1, "--out", tmp_path / "run") == 0
    whole, before = load(tmp_path / "run/sft"), load(folder)
    assert (tmp_path / "run/sft/model.safetensors").is_file()
    for name, p in whole.named_parameters():
        assert not torch.equal(p, before.get_parameter(name)), name


def test_the_base_is_not_overwritten(work, tmp_path, capsys):
    base = shutil.copytree(work / "sft", tmp_path / "run/sft")
    options = command_line("sft", work)[:-2]
    assert run("sft", *options, "--model", base, *RANK, "--out", tmp_path / "run") == 2
    assert run("sft", *options, "--model", base, *RANK, "--out", base.parent, "--overwrite") == 2
    assert f"--overwrite would remove {base}" in capsys.readouterr().err
    assert (base / "model.safetensors").is_file()


def test_without_peft_it_says_what_to_install(work, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_min.harness.cli.find_spec", lambda _: None)
    assert start("sft", work, work / "never", *RANK) == 2
    assert capsys.readouterr().err.startswith(
        "error: --lora_rank needs one more package: pip install peft\n"
    )


@pytest.mark.usefixtures("talkative")
def test_adapters_are_loaded_saved_and_trained_in_silence(bases, tmp_path):  # noqa: F811
    with nothing_shown():
        policy = adapted(bases / "policy", critic="shared", targets=["c_attn", "c_fc"])
        policy.checkpoint_gradients()
        config = sft.SFTConfig(batch_size=4, precision="bf16")
        next(sft.train(policy, config, sft.new_state(policy, DEMONSTRATIONS, config)))
        save_policy(policy, tmp_path / "policy")
        again = adapted(tmp_path / "policy", critic="shared", merge=True)
        save_policy(again, tmp_path / "merged")
        Policy.from_pretrained(tmp_path / "policy", critic="shared").reference()
        model = scorer(bases / "masked")
        save_reward_model(model, tmp_path / "reward_model")
        RewardModel.from_pretrained(tmp_path / "reward_model").score(["ba"], ["be"])


# Checkpoints


def snapshot(module, state, **models):
    known = {"reward_model" if isinstance(module, RewardModel) else "policy": module, **models}
    return Snapshot(
        "sft", module, state, print, known, texts=["red"], examples=PREFERENCES, total=9
    )


@ALGORITHMS
def test_each_algorithm_resumes_to_the_bit(algorithm, bases, tmp_path):  # noqa: F811
    made = runs(bases)[algorithm]
    module, _, steps = made()
    whole = [without_time(metrics) for metrics in steps]
    stopped, state, steps = made()
    before = [without_time(metrics) for metrics in islice(steps, 1)]
    begin(tmp_path / "step-000001", snapshot(stopped, state), finished=False, sizes={})()
    saved = load_file(tmp_path / "step-000001" / WEIGHTS)
    assert saved.keys() == trained(stopped).keys()

    resumed, state, steps = made()
    Checkpoint(tmp_path / "step-000001").restore(snapshot(resumed, state))
    after = [without_time(metrics) for metrics in steps]
    assert before + after == whole
    assert len(after) > 0
    assert largest_difference(resumed, module) == 0
    assert largest_difference(resumed, stopped) > 0


def test_another_base_is_noticed(bases, tmp_path):  # noqa: F811
    for part, name in [("policy", "policy"), ("reference", "ref_policy")]:
        made = runs(bases)["dpo"]
        module, state, _ = made()
        reference = adapted(bases / "policy").reference()
        path = tmp_path / part / "step-000001"
        begin(path, snapshot(module, state, ref_policy=reference), finished=False, sizes={})()
        module, state, _ = made()
        changed = {"policy": module, "reference": reference}[part]
        changed.lm.transformer.wpe.weight.data[3, 2] += 2**-20
        with pytest.raises(BadInput, match=f"{name} is not what this was saved with: 1 of its"):
            Checkpoint(path).restore(snapshot(module, state, ref_policy=reference))


def test_the_memory_of_frozen_weights_is_counted_once(bases, monkeypatch):  # noqa: F811
    monkeypatch.setattr(preflight, "available_bytes", lambda _: 10_000.0)
    module, state, _ = runs(bases)["dpo"]()
    reference = module.reference()
    (found,) = preflight.memory(module, [reference], state.optimizer, {}, 0)
    adapter = sum(p.nbytes for p in trained(module).values())
    weights = sum(p.nbytes for p in module.parameters()) + adapter  # and that of the reference
    # With a gradient and two states of Adam for each trained number.
    assert found.value == (weights + 3 * adapter) / (10_000 + weights)


def test_a_checkpoint_of_a_whole_model_does_not_fit_an_adapter(bases, tmp_path):  # noqa: F811
    module, state, _ = runs(bases)["sft"]()
    whole = Policy.from_pretrained(bases / "policy", critic="none")
    path = tmp_path / "step-000001"
    begin(path, snapshot(whole, state), finished=False, sizes={})()
    assert load_file(path / WEIGHTS).keys() == dict(whole.named_parameters()).keys()
    with pytest.raises(
        BadInput, match=r"policy is not what this was saved with: .* weights differ"
    ):
        Checkpoint(path).restore(snapshot(module, state))
    assert adapters.is_adapted(module.lm)
