"""Rewards by name: functions, models, weighted sums."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import bert, bert_words

from rlhf_min.errors import BadInput
from rlhf_min.harness.rewards import WeightedSum, guarded, load_reward, models_in
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

def divide(prompts, responses):
    return [helper(r) for r in responses]
def helper(response):
    return 1 / 0
def quiet(prompts, responses):
    raise KeyError
def leaves(prompts, responses):
    import sys
    sys.exit(3)
def long_told(prompts, responses):
    raise ValueError("line 1" + chr(10) + 300 * "x")
def generated(prompts, responses):
    return (helper(r) for r in responses)
def library(prompts, responses):
    import json
    return json.loads("{")
class Counts:
    def __call__(self, prompts, responses, wanted):
        return [float(len(w)) for w in wanted]
counts = Counts()
def hangs(prompts, responses):
    import time
    time.sleep(60)
def thread(prompts, responses):
    import threading
    return [float(threading.current_thread() is threading.main_thread())] * len(responses)
"""
LINES = CODE.splitlines()
PROMPTS, RESPONSES = ["p1", "p2"], ["abc", "a"]
ROWS = [{"wanted": "b"}, {"wanted": "b"}]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "typo.py").write_text("def f(:", encoding="utf-8")
    (tmp_path / "stops.py").write_text("raise SystemExit(1 / 0)", encoding="utf-8")
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
    calls = reward.parts["my_rewards.py:length"][1].__wrapped__.__globals__["calls"]
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
        (["stops:f"], "--reward stops: cannot be imported (division by zero)"),
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
    message = "reward broken gave nan for the prompt 'p2' in row 1 of the batch"
    with pytest.raises(BadInput, match=message):
        call_reward(reward, PROMPTS, RESPONSES)


@pytest.mark.parametrize("timeout", [0, 60])
@pytest.mark.parametrize(
    ("name", "says", "line"),
    [
        ("divide", "raised ZeroDivisionError: division by zero", "    return 1 / 0"),
        ("generated", "raised ZeroDivisionError: division by zero", "    return 1 / 0"),
        ("quiet", "raised KeyError (", "    raise KeyError"),
        ("leaves", "raised SystemExit: 3", "    sys.exit(3)"),
        ("long_told", "raised ValueError: line 1 xxx", "    raise ValueError("),
        ("library", "raised JSONDecodeError: Expecting", "    return json.loads("),
    ],
)
def test_what_a_reward_raises_is_told_with_its_line(folder, name, says, line, timeout):
    reward = load_reward([f"my_rewards.py:{name}"], model, timeout=timeout)
    with pytest.raises(BadInput) as caught:
        call_reward(reward, PROMPTS, RESPONSES)
    told = str(caught.value)
    assert told.startswith(f"reward my_rewards.py:{name} {says}")
    (number,) = [i for i, text in enumerate(LINES, start=1) if text.startswith(line)]
    assert told.endswith(f" ({folder.resolve() / 'my_rewards.py'}:{number})")
    assert "\n" not in told
    assert len(told) < 400


def test_a_reward_that_hangs_is_given_up():
    reward = load_reward(["my_rewards:hangs"], model, timeout=0.05)
    with pytest.raises(BadInput, match=r"reward my_rewards:hangs has not returned after 0\.05 s"):
        call_reward(reward, PROMPTS, RESPONSES)


def test_without_a_limit_a_reward_has_no_thread_of_its_own():
    for timeout, found in ((60, 0.0), (0, 1.0)):
        reward = load_reward(["my_rewards:thread"], model, timeout=timeout)
        assert call_reward(reward, PROMPTS, RESPONSES).tolist() == [found] * 2


def test_an_object_that_is_called_gets_its_columns():
    reward = load_reward(["my_rewards:counts"], model)
    rows = [{"wanted": "bb", "other": 1}, {"wanted": "", "other": 2}]
    assert call_reward(reward, PROMPTS, RESPONSES, rows).tolist() == [2, 0]
    with pytest.raises(BadInput, match=r"raised TypeError: .*wanted"):
        call_reward(reward, PROMPTS, RESPONSES)


def test_ctrl_c_is_no_fault_of_the_reward():
    def stopped(_prompts, _responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded("stopped", stopped, Path.cwd(), timeout=0)([], [])
