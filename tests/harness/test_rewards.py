"""Rewards by name: functions, models, weighted sums."""

import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import bert, bert_syllables

from rlhf_min.errors import BadInput
from rlhf_min.harness.rewards import WeightedSum, guarded, load_reward, models_in, unserved
from rlhf_min.loading.reward_function import call_reward
from rlhf_min.reward_model import RewardModel

CODE = """
import json, os, signal, sys, threading, time, torch
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
    sys.exit(3)
def long_told(prompts, responses):
    raise ValueError("line 1" + chr(10) + 300 * "x")
def generated(prompts, responses):
    return (helper(r) for r in responses)
def library(prompts, responses):
    return json.loads("{")
class Counts:
    def __call__(self, prompts, responses, wanted):
        return [float(len(w)) for w in wanted]
counts = Counts()
def hangs(prompts, responses):
    time.sleep(60)
def interrupts(prompts, responses):
    raise KeyboardInterrupt
class Odd:
    def __float__(self):
        return 1 / 0
class Stops:
    def __float__(self):
        raise SystemExit(0)
def odd(prompts, responses):
    return [Odd()] * len(responses)
def odder(prompts, responses):
    return [Stops()] * len(responses)
def keyed(prompts, responses):
    return dict.fromkeys(range(len(responses)), 1.0)
def defaults(prompts, responses, wanted=None, *, weight=2.0, **columns):
    return [weight] * len(responses)
def silences(prompts, responses):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    return [0.0] * len(responses)
async def later(prompts, responses):
    return [0.0] * len(responses)
def bends(prompts, responses):
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(torch.get_num_threads() + 1)
    return [0.0] * len(responses)
def handles(prompts, responses):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return [0.0] * len(responses)
def thread(prompts, responses):
    return [float(threading.current_thread() is threading.main_thread())] * len(responses)
"""
BROKEN = {"typo": "def f(:", "stops": "raise SystemExit(1 / 0)", "leaves": "raise SystemExit(0)"}
LINES = CODE.splitlines()
PROMPTS, RESPONSES = ["p1", "p2"], ["abc", "a"]
ROWS = [{"wanted": "b"}, {"wanted": "b"}]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(CODE, encoding="utf-8")
    for name, code in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return tmp_path


def model(name, *, label):
    """A reward model whose score is 10 for everything, and 20 for its label."""
    assert (name, label) in {("runs/rm", None), ("runs/rm", "GOOD")}
    return SimpleNamespace(score=lambda _, r: [20.0 if label else 10.0] * len(r))


def scores(reward, rows=(), responses=RESPONSES, **options):
    """Of a reward, or of what the command line calls so."""
    if isinstance(reward, str):
        reward = load_reward(reward.split(), model, **options)
    return call_reward(reward, PROMPTS, responses, rows).tolist()


@pytest.mark.parametrize("where", ["my_rewards", "my_rewards.py"])
def test_one_function(where):
    assert scores(f"{where}:length") == [3, 1]


def test_a_weighted_sum_of_functions_and_a_model():
    # 2 * [3, 1] - [1, 0] + 0.5 * [10, 10]; "abc" holds the wanted b, "a" does not
    assert scores("2*my_rewards:length -1*my_rewards:hits 0.5*runs/rm", ROWS) == [10, 7]


def test_a_label_of_a_model_is_a_part_of_its_own():
    assert scores("runs/rm@GOOD") == [20, 20]
    assert scores("0.5*runs/rm@GOOD -1*my_rewards:length runs/rm") == [17, 19]


def test_an_at_in_the_name_of_a_folder_is_no_label(folder):
    (folder / "runs").mkdir()
    (folder / "runs/rm@GOOD").mkdir()
    loaded = []

    def load(name, *, label):
        loaded.append((name, label))
        return SimpleNamespace(score=length)

    load_reward(["runs/rm@GOOD", "runs/rm@GOOD@BAD", "2*owner/name@5 stars"], load)
    expected = [("runs/rm@GOOD", None), ("runs/rm@GOOD", "BAD"), ("owner/name", "5 stars")]
    assert loaded == expected


def test_the_parts_are_watched_without_scoring_again():
    reward = load_reward(["my_rewards.py:length", "runs/rm"], model)
    scores(reward, ROWS)
    calls = reward.parts["my_rewards.py:length"][1].__wrapped__.__globals__["calls"]
    assert calls == [2]
    watched = {name: scores(monitor, ROWS) for name, monitor in reward.monitors.items()}
    assert watched == {"reward/my_rewards.py:length": [3, 1], "reward/runs/rm": [10, 10]}
    assert calls == [2]
    monitor = reward.monitors["reward/my_rewards.py:length"]
    assert scores(monitor, ROWS, ["xxxx", "xxxxx"]) == [4, 5]


def test_a_tensor_sums_like_a_list():
    assert scores(WeightedSum({"t": (3.0, lambda _, r: torch.arange(len(r)))})) == [0, 3]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["nowhere:f"], "--reward nowhere: cannot be imported (No module named 'nowhere')"),
        (["nowhere.py:f"], "--reward nowhere.py: no such file"),
        (["2*mine.py"], "--reward 2*mine.py: no function of the file is named; give 2*mine.py:F"),
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
        (
            ["leaves.py:f"],
            "--reward leaves.py: cannot be imported (it ends the process: SystemExit:",
        ),
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
    assert scores(reward, rows) == [4, 1]
    assert scores(reward.monitors["reward/my_rewards:hits"], rows)[0] == 1
    assert scores(length, rows) == [3, 1]


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
        scores(reward)


def test_a_file_may_import_its_neighbours(folder):
    (folder / "sub").mkdir()
    (folder / "sub/neighbour.py").write_text("factor = 2", encoding="utf-8")
    code = "import neighbour\ndef f(p, r): return [neighbour.factor] * len(r)"
    (folder / "sub/own.py").write_text(code, encoding="utf-8")
    assert scores("sub/own.py:f") == [2, 2]


def test_the_models_among_the_parts():
    reward_model = RewardModel(bert(), bert_syllables())
    reward = load_reward(["my_rewards:length", "rm"], lambda _, **_label: reward_model)
    assert models_in(reward) == models_in(reward_model) == [reward_model]
    assert models_in(length) == []


def test_nan_names_the_function_and_the_prompt():
    message = "reward broken gave nan for the prompt 'p2' in row 1 of the batch"
    with pytest.raises(BadInput, match=message):
        scores("my_rewards:length my_rewards:broken")


@pytest.mark.parametrize("timeout", [0, 60])
@pytest.mark.parametrize(
    ("name", "says", "line"),
    [
        ("divide", "raised ZeroDivisionError: division by zero", "    return 1 / 0"),
        ("generated", "raised ZeroDivisionError: division by zero", "    return 1 / 0"),
        ("quiet", "raised KeyError (", "    raise KeyError"),
        ("leaves", "raised SystemExit: 3", "    sys.exit(3)"),
        ("odder", "raised SystemExit: 0", "        raise SystemExit(0)"),
        ("long_told", "raised ValueError: line 1 xxx", "    raise ValueError("),
        ("library", "raised JSONDecodeError: Expecting", "    return json.loads("),
    ],
)
def test_what_a_reward_raises_is_told_with_its_line(folder, name, says, line, timeout):
    with pytest.raises(BadInput) as caught:
        scores(f"my_rewards.py:{name}", timeout=timeout)
    told = str(caught.value)
    assert told.startswith(f"reward my_rewards.py:{name} {says}")
    (number,) = [i for i, text in enumerate(LINES, start=1) if text.startswith(line)]
    assert told.endswith(f" ({folder.resolve() / 'my_rewards.py'}:{number})")
    assert "\n" not in told
    assert len(told) < 400


@pytest.mark.parametrize("timeout", [0, 60])
def test_what_cannot_be_a_score_is_told_with_the_name_of_the_command_line(timeout):
    for name, told in [
        ("odd", "; row 0 of the batch: division by zero"),
        ("keyed", ", in their order, as a list; it returned a dict"),
    ]:
        with pytest.raises(BadInput) as caught:
            scores(f"my_rewards.py:{name}", timeout=timeout)
        wanted = f"reward my_rewards.py:{name} must return one number per response"
        assert str(caught.value) == wanted + told


def test_an_interrupt_of_its_own_is_the_rewards_fault(capsys):
    with pytest.raises(BadInput, match=r"interrupts raised KeyboardInterrupt \("):
        scores("my_rewards.py:interrupts")
    assert capsys.readouterr().err == ""


def test_what_belongs_to_the_process_is_put_back_and_told_once(folder, capsys):
    reward = load_reward(["my_rewards:bends"], model, timeout=0)
    threads = torch.get_num_threads()
    for _ in range(2):
        scores(reward)
        assert Path.cwd() == folder
        assert torch.get_default_dtype() == torch.float32
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_num_threads() == threads
    lines = capsys.readouterr().out.splitlines()
    assert lines == reward.notes
    assert [line.partition(" (")[0] for line in lines] == [
        f"reward my_rewards:bends has changed {what}"
        for what in (
            "the working folder",
            "PyTorch's default dtype",
            "PyTorch's threads",
            "PyTorch's precision of products",
        )
    ]
    assert lines[1].endswith(" (torch.float32 to torch.float64); this was put back")


def test_a_reward_cannot_silence_the_run(capsys):
    scores("my_rewards:silences")
    told = [f"reward my_rewards:silences has changed sys.{x}" for x in ("stdout", "stderr")]
    assert capsys.readouterr().out.splitlines() == [f"{x}; this was put back" for x in told]


def test_an_async_reward_is_refused_before_it_is_called(recwarn):
    with pytest.raises(BadInput, match="reward later is async"):
        scores("my_rewards:later")
    assert not recwarn.list


def test_what_cannot_be_shown_is_named_by_its_type(folder):
    code = """
class Mute(Exception):
    def __str__(self): raise RuntimeError("mute")
    __repr__ = __str__
def raises(p, r): raise Mute
def gives(p, r): return [Mute()] * len(r)
def keeps(p, r, further=Mute()): return [0.0] * len(r)
"""
    (folder / "mute.py").write_text(code, encoding="utf-8")
    (folder / "mute_module.py").write_text(f"{code}\nraise Mute", encoding="utf-8")
    shown = "a Mute that cannot be shown"
    for name, says in [
        ("raises", f"raised Mute: {shown}"),
        ("gives", f"row 0 of the batch: {shown}"),
    ]:
        with pytest.raises(BadInput, match=says):
            scores(f"mute.py:{name}")
    (line,) = unserved(load_reward(["mute.py:keeps"], model), ["prompt"])
    assert f"keeps its default {shown}" in line
    with pytest.raises(BadInput, match=rf"cannot be imported \({shown}"):
        load_reward(["mute_module.py:f"], model)


@pytest.mark.parametrize("timeout", [0, 60])
def test_a_reward_may_empty_its_responses(folder, timeout):
    code = "def f(p, r): return [float(len(r.pop())) for _ in range(len(r))][::-1]"
    (folder / "pops.py").write_text(code, encoding="utf-8")
    assert scores("pops.py:f", timeout=timeout) == [len(x) for x in RESPONSES]


def test_a_reward_model_in_a_sum_gets_no_columns():
    reward_model = RewardModel(bert(), bert_syllables())
    reward = WeightedSum({"bert": (1.0, reward_model.score)})
    assert unserved(reward, ["prompt"]) == []
    columns = [{"max_tokens": "many"}] * len(PROMPTS)
    expected = reward_model.score(PROMPTS, RESPONSES).tolist()
    assert scores(reward, columns) == scores(reward_model.score, columns) == expected


def test_the_handlers_of_signals_are_put_back():
    at_start = signal.getsignal(signal.SIGINT)  # ignored in a job in the background
    before = signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    reward = load_reward(["my_rewards:handles"], model, timeout=0)
    scores(reward)
    assert signal.getsignal(signal.SIGINT) is before
    assert reward.notes == [
        "reward my_rewards:handles has changed what SIGINT does; this was put back"
    ]
    with pytest.raises(BadInput, match=r"main thread.*; --reward_timeout 0 calls it in the main t"):
        scores("my_rewards:handles")
    signal.signal(signal.SIGINT, at_start)


def test_a_module_that_bends_the_process_when_imported(folder):
    code = "import os\nos.chdir('/')\ndef f(p, r): return [0.0] * len(r)"
    (folder / "moves.py").write_text(code, encoding="utf-8")
    reward = load_reward(["moves.py:f"], model)
    assert Path.cwd() == folder
    assert reward.notes == [
        f"--reward moves.py has changed the working folder ({folder} to /); this was put back"
    ]


def test_parameters_that_no_column_serves_are_told():
    reward = load_reward(["my_rewards:length", "my_rewards:defaults", "my_rewards:hits"], model)
    assert unserved(reward, ["prompt", "Wanted"]) == [
        "reward defaults: its parameter wanted is no column of the data and keeps its default "
        "None; the columns are prompt, Wanted",
        "reward defaults: its parameter weight is no column of the data and keeps its default "
        "2.0; the columns are prompt, Wanted",
        "reward hits: its parameter wanted is no column of the data; the columns are prompt, "
        "Wanted",
    ]
    assert len(unserved(reward, ["prompt", "wanted", "weight"])) == 0
    assert unserved(length, ["prompt"]) == unserved(RewardModel(bert(), bert_syllables()), []) == []


def test_a_module_has_dataclasses_and_late_neighbours(folder):
    (folder / "sub").mkdir()
    (folder / "sub/late_neighbour.py").write_text("factor = 3", encoding="utf-8")
    code = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Weight:
    value: float
def f(p, r):
    import late_neighbour
    return [Weight(late_neighbour.factor).value] * len(r)
"""
    (folder / "sub/data_reward.py").write_text(code, encoding="utf-8")
    assert scores("sub/data_reward.py:f") == [3, 3]


def test_a_reward_that_hangs_is_given_up():
    with pytest.raises(BadInput, match=r"reward my_rewards:hangs has not returned after 0\.05 s"):
        scores("my_rewards:hangs", timeout=0.05)


def test_without_a_limit_a_reward_has_no_thread_of_its_own():
    for timeout, found in ((60, 0.0), (0, 1.0)):
        assert scores("my_rewards:thread", timeout=timeout) == [found] * 2


def test_an_object_that_is_called_gets_its_columns():
    rows = [{"wanted": "bb", "other": 1}, {"wanted": "", "other": 2}]
    assert scores("my_rewards:counts", rows) == [2, 0]
    with pytest.raises(BadInput, match=r"raised TypeError: .*wanted"):
        scores("my_rewards:counts")


def test_ctrl_c_is_no_fault_of_the_reward():
    def stopped(_prompts, _responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded("stopped", stopped, Path.cwd(), timeout=0)([], [])
