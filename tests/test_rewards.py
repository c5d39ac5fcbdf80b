"""Rewards by name: functions, models, weighted sums."""

import re
from types import SimpleNamespace

import pytest
import torch
from tiny import bert, bert_words

from rlhf_min.errors import BadInput
from rlhf_min.harness.rewards import WeightedSum, load_reward, models_in
from rlhf_min.models import RewardModel
from rlhf_min.rollout import call_reward

CODE = """
calls = []
def length(prompts, responses):
    calls.append(len(responses))
    return [len(r) for r in responses]
def hits(prompts, responses, wanted):
    return [float(w in r) for r, w in zip(responses, wanted)]
def broken(prompts, responses):
    return [float("nan") if p == "p2" else 0.0 for p in prompts]
number = 3
"""
PROMPTS, RESPONSES = ["p1", "p2"], ["abc", "a"]
ROWS = [{"wanted": "b"}, {"wanted": "b"}]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "typo.py").write_text("def f(:", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    return tmp_path


def model(name):
    """A reward model whose score is 10 for everything."""
    assert name == "runs/rm"
    return SimpleNamespace(score=lambda _, responses: [10.0] * len(responses))


@pytest.mark.parametrize("where", ["my_rewards", "my_rewards.py"])
def test_one_function(where):
    reward = load_reward([f"{where}:length"], model)
    assert call_reward(reward, PROMPTS, RESPONSES).tolist() == [3, 1]


def test_a_weighted_sum_of_functions_and_a_model():
    specs = ["2*my_rewards:length", "-1*my_rewards:hits", "0.5*runs/rm"]
    reward = load_reward(specs, model)
    # 2 * [3, 1] - [1, 0] + 0.5 * [10, 10]; "abc" holds the wanted b, "a" does not
    assert call_reward(reward, PROMPTS, RESPONSES, ROWS).tolist() == [10, 7]


def test_the_parts_are_watched_without_scoring_again():
    reward = load_reward(["my_rewards.py:length", "runs/rm"], model)
    call_reward(reward, PROMPTS, RESPONSES, ROWS)
    calls = reward.parts["my_rewards.py:length"][1].__globals__["calls"]
    assert calls == [2]
    watched = {
        name: call_reward(monitor, PROMPTS, RESPONSES, ROWS).tolist()
        for name, monitor in reward.monitors.items()
    }
    assert watched == {"reward/my_rewards.py:length": [3, 1], "reward/runs/rm": [10, 10]}
    assert calls == [2]
    other = call_reward(reward.monitors["reward/my_rewards.py:length"], ["p"], ["xxxx"], ROWS[:1])
    assert other.tolist() == [4]


def test_a_tensor_sums_like_a_list():
    reward = WeightedSum({"t": (3.0, lambda _, r: torch.arange(len(r)))})
    assert call_reward(reward, PROMPTS, RESPONSES).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["nowhere:f"], "--reward nowhere: cannot be imported (No module named 'nowhere')"),
        (["nowhere.py:f"], "--reward nowhere.py: no such file"),
        (["my_rewards:missing"], "my_rewards has no function 'missing'"),
        (["my_rewards:number"], "my_rewards has no function 'number'"),
        (["x*my_rewards:length"], "'x' is not a weight"),
        (["nan*my_rewards:length"], "the weight must be finite"),
        (["my_rewards:length", "2*my_rewards:length"], "names my_rewards:length twice"),
        ([], "--reward names nothing"),
        (["2*"], "--reward '2*' names nothing"),
        (["typo.py:f"], "--reward typo.py: cannot be imported"),
        ([":f"], "cannot be imported (Empty module name)"),
    ],
)
def test_bad_names(specs, message):
    with pytest.raises(BadInput, match=re.escape(message)) as error:
        load_reward(specs, model)
    assert "\n" not in str(error.value)


def test_columns_may_be_called_like_the_arguments():
    # the file's own columns "prompts", "responses", "self" and "name" are not handed over twice
    rows = [{"wanted": "b", "prompts": 1, "responses": 2, "self": 3, "name": 4}] * 2
    reward = load_reward(["my_rewards:hits", "my_rewards:length"], model)
    assert call_reward(reward, PROMPTS, RESPONSES, rows).tolist() == [4, 1]
    assert call_reward(reward.monitors["reward/my_rewards:hits"], PROMPTS, RESPONSES, rows)[0] == 1
    assert call_reward(length, PROMPTS, RESPONSES, rows).tolist() == [3, 1]


def length(prompts, responses, **_columns):
    assert len(prompts) == len(responses)
    return [len(r) for r in responses]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, prompts: completions + prompts, "takes completions first"),
        (lambda responses: responses, "must take prompts and responses"),
    ],
)
def test_a_reward_of_other_arguments_is_refused(reward, message):
    with pytest.raises(BadInput, match=message):
        call_reward(reward, PROMPTS, RESPONSES)


def test_a_file_may_import_its_neighbours(folder):
    (folder / "sub").mkdir()
    (folder / "sub/neighbour.py").write_text("factor = 2", encoding="utf-8")
    code = "import neighbour\ndef f(p, r): return [neighbour.factor] * len(r)"
    (folder / "sub/own.py").write_text(code, encoding="utf-8")
    assert call_reward(load_reward(["sub/own.py:f"], model), PROMPTS, RESPONSES).tolist() == [2, 2]


def test_the_models_among_the_parts():
    reward_model = RewardModel(bert(), bert_words())
    reward = load_reward(["my_rewards:length", "rm"], lambda _: reward_model)
    assert models_in(reward) == models_in(reward_model) == [reward_model]
    assert models_in(length) == []


def test_nan_names_the_function_and_the_prompt():
    reward = load_reward(["my_rewards:length", "my_rewards:broken"], model)
    with pytest.raises(BadInput, match="reward broken gave nan for the prompt 'p2'"):
        call_reward(reward, PROMPTS, RESPONSES)
