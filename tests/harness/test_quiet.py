"""No library shows a bar, a table or a warning of its own: not in the API, nor in the commands."""

import contextlib
import io
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from small import DEMONSTRATIONS, PREFERENCES, small_policy, small_reward_model
from test_bad_input import all_of_stderr
from test_cli import example, pairs, write_rows
from transformers import BertModel
from transformers.utils import logging

from rlhf_min import dpo, ppo, reward, sft
from rlhf_min.data import PromptExample, collate
from rlhf_min.encoding.codec import Codec
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.loading.models import quiet
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.sampling import sample

TRL_HEAD = Path(__file__).parents[1] / "parity" / "recorded" / "trl_v_head" / "gpt2"
LONG = " ".join(["red ball"] * 20)
STEPS = {"epochs": 1, "batch_size": 2}


@pytest.fixture
def talkative():
    """``transformers`` as it is when it was just imported, whatever ran before."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    logging.warning_once.cache_clear()
    yield
    logging.set_verbosity(verbosity)
    if not bars:
        logging.disable_progress_bar()


@contextlib.contextmanager
def nothing_shown():
    with contextlib.redirect_stdout(io.StringIO()) as out, all_of_stderr() as err:
        yield
    assert (out.getvalue(), "".join(err)) == ("", "")


@pytest.fixture
def folders(tmp_path):
    """A policy and a BERT without its head, whose tokenizers say that 4 tokens are too many."""
    policy, model = small_policy(dtype=torch.float32), small_reward_model(dtype=torch.float32)
    for tokenizer in (policy.tokenizer, model.tokenizer):
        tokenizer.model_max_length = 4
    with quiet():
        save_policy(policy, tmp_path / "policy")
        BertModel(model.model.config).save_pretrained(tmp_path / "bert")
        model.tokenizer.save_pretrained(tmp_path / "bert")
        shutil.copytree(TRL_HEAD, tmp_path / "trl")
        policy.tokenizer.save_pretrained(tmp_path / "trl")
        shutil.copytree(tmp_path / "policy", tmp_path / "prefixed")
        file = tmp_path / "prefixed" / "model.safetensors"
        named = {f"pretrained_model.{name}": x for name, x in load_file(file).items()}
        save_file(named, file, metadata={"format": "pt"})
    return tmp_path


@pytest.mark.usefixtures("talkative")
def test_loading_and_saving_show_nothing(folders):
    with nothing_shown():
        policy = Policy.from_pretrained(folders / "policy", critic="shared", new_head=True)
        Policy.from_pretrained(folders / "trl", critic="shared")
        Policy.from_pretrained(folders / "prefixed", critic="none")  # is read twice
        model = RewardModel.from_pretrained(folders / "bert", new_head=True, max_length=16)
        save_policy(policy, folders / "again")
        save_reward_model(model, folders / "again too")
        Policy.from_pretrained(folders / "again", critic="shared").reference()


@pytest.mark.usefixtures("talkative")
def test_the_functions_show_nothing():
    model = small_reward_model(dtype=torch.float32)
    with nothing_shown():
        policy = small_policy(dtype=torch.float32, critic="shared")  # its head is checked
        policy.tokenizer.model_max_length = model.tokenizer.model_max_length = 4
        codec = Codec(policy.tokenizer, max_prompt_tokens=8, max_response_tokens=5)
        prompts, _ = codec.encode_prompts([{"prompt": LONG}, {"prompt": "red"}])
        codec.encode_preferences([{"prompt": LONG, "chosen": LONG, "rejected": "red"}])
        assert model.score([LONG, "red"], ["blue", LONG]).isfinite().all()
        ids = [x.ids for x in prompts]
        rng = torch.Generator().manual_seed(0)
        responses = sample(policy, ids, max_new_tokens=4, temperature=1.0, rng=rng)
        policy(collate(ids, responses, pad_id=policy.pad_id))
        policy.decode(responses[0])


@pytest.mark.usefixtures("talkative")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_shows_nothing(precision, checkpointing):
    options = STEPS | {"precision": precision}
    policy = small_policy(dtype=torch.float32, critic="shared")
    model, ref_policy = small_reward_model(dtype=torch.float32), policy.reference()
    found, _ = reward.prepare_pairs(model, pairs(4))
    prompts = [PromptExample("red", x.prompt_ids) for x in DEMONSTRATIONS[:4]]
    with nothing_shown():
        if checkpointing:
            policy.checkpoint_gradients()
            model.checkpoint_gradients()
        sft_config = sft.SFTConfig(**options)
        next(sft.train(policy, sft_config, sft.new_state(policy, DEMONSTRATIONS, sft_config)))
        dpo_config = dpo.DPOConfig(**options)
        dpo_state = dpo.new_state(policy, ref_policy, PREFERENCES, dpo_config)
        next(dpo.train(policy, ref_policy, dpo_config, dpo_state))
        config = reward.RewardConfig(**options)
        next(reward.train(model, config, reward.new_state(model, found, config)))
        ppo_config = ppo.PPOConfig(
            steps=1, batch_size=4, minibatch_size=2, max_new_tokens=4, precision=precision
        )
        state = ppo.new_state(policy, prompts, ppo_config)
        next(ppo.train(policy, ref_policy, model.score, ppo_config, state))


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.usefixtures("talkative")
def test_what_a_caller_has_set_comes_back(bars, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", bars)
    logging.set_verbosity_info()
    downloads = not are_progress_bars_disabled()
    filters = list(warnings.filters)
    with contextlib.suppress(KeyError), quiet():
        assert not logging.is_progress_bar_enabled()
        assert (not are_progress_bars_disabled()) == downloads  # of a large file it is missed
        raise KeyError
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled() == bars
    assert (not are_progress_bars_disabled()) == downloads
    assert warnings.filters == filters


OUR_BAR = re.compile(r"\s*(sft|reward_model|ppo|dpo): +\d+%\|.*\||")
QUICK = "--sft_epochs 1 --reward_epochs 1 --ppo_steps 2 --ppo_batch_size 8 --dpo_epochs 1 "
QUICK += "--max_length 16 --max_response_tokens 6 --test_prompts 3 --threads 1"


COMMANDS = {
    "quickstart": f"--data rows.jsonl --model sft --reward_model bert --out run {QUICK}",
    "evaluate_models": "--data rows.jsonl --models sft --reward_model bert --test_prompts 3 "
    "--max_length 16 --max_response_tokens 6",
    "chat": "--models sft --reward_model bert --max_length 16 --max_response_tokens 6",
}


@pytest.mark.usefixtures("talkative")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_show_nothing_of_a_library(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_policy(small_policy(dtype=torch.float32), tmp_path / "sft")
    save_reward_model(small_reward_model(dtype=torch.float32), tmp_path / "bert")
    write_rows(tmp_path / "rows.jsonl", pairs(40))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *COMMANDS[name].split()])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"red {LONG}\n"))
    with contextlib.redirect_stdout(io.StringIO()) as out, all_of_stderr() as err:
        example(name).main()
    assert out.getvalue()
    lines = re.split(r"[\r\n]+", "".join(err))
    assert [line for line in lines if not OUR_BAR.match(line)] == []
    assert name != "quickstart" or any(line.strip().startswith("ppo: 100%") for line in lines)
    assert re.findall(r"(?i).*(?:warning|deprecat|LOAD REPORT).*", out.getvalue()) == []
