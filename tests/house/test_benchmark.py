"""The benchmark counts what it says it counts, and refuses to compare unlike work."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import EXACT, FP64
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel, GPT2LMHeadModel

from rlhf_min.errors import BadInput

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as it is for the command
import benchmark_vs_trl  # noqa: E402
from benchmark import scaling  # noqa: E402
from benchmark.commands import fixed_bytes  # noqa: E402
from benchmark.flops import TRAINED, Shape, forward, useful  # noqa: E402
from benchmark.models import SIZES, Size, save_models  # noqa: E402
from benchmark.report import entries, table  # noqa: E402
from benchmark.rounds import Comparison, Outcome, check_same_work, play  # noqa: E402
from benchmark.sides import Played, Side, Worker, environment  # noqa: E402
from benchmark.workloads import Rollouts, Task, dpo_pairs, reward_pairs  # noqa: E402

TINY = SIZES["tiny"]
OURS = Side("rlhf_min", "ours", "fp32", sys.executable)


def counted(function):
    """FLOPs as torch counts them while the function runs."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# FLOPs


def tiny_lm():
    config = TINY.gpt2_config()
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager")


def test_forward_of_a_causal_model():
    # Token by token with a cache, so that none is multiplied with those behind it.
    lm, prompt, response = tiny_lm().eval(), 5, 3

    @torch.no_grad()
    def run():
        cache, hidden = None, []
        for token in torch.arange(prompt + response)[:, None, None]:
            output = lm.transformer(input_ids=token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            hidden.append(output.last_hidden_state[0])
        lm.lm_head(torch.cat(hidden[prompt - 1 : -1]))  # where the response is predicted

    found = forward(Shape.of(lm.config), [(prompt, response)])
    assert found.trunk + found.head - counted(run) == EXACT


def test_forward_of_a_bidirectional_model():
    config = TINY.bert_config()
    config._attn_implementation = "eager"
    bert = BertModel(config, add_pooling_layer=False).eval()
    found = forward(Shape.of(config), 2 * [(4, 3)])
    assert found.head == 0
    assert found.trunk - counted(lambda: bert(input_ids=torch.ones(2, 7).long())) == EXACT


def test_training_is_three_forward_passes():
    lm, ids = tiny_lm(), torch.arange(14).view(2, 7)
    once = counted(lambda: lm(input_ids=ids))
    assert counted(lambda: lm(input_ids=ids).logits.sum().backward()) == TRAINED * once


def test_what_a_round_needs_by_hand():
    # One layer, H = 2, F = 8, V = 12; one row of 1 + 1 tokens.
    size = Size(
        {"n_embd": 2, "n_layer": 1, "n_head": 1, "vocab_size": 12},
        {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 12}
        | {"intermediate_size": 8},
        prompts=4,
        pairs=4,
    )
    # 2 tokens x 2 x (4 x 4 + 2 x 2 x 8) and 4 x 2 x (1 + 2) pairs
    trunk, head = 192 + 24, 2 * 2 * 12
    bert = 2 * 5 * 48 + 4 * 2 * 5 * 5  # with three special tokens

    def total(workload, part="all", own_critic=False):
        found = useful(workload, size, [(1, 1)], own_critic=own_critic)[part]
        return found.trunk + found.head

    assert total("sampling") == trunk + head
    assert total("dpo") == 4 * (trunk + head)  # three for the policy, one for the reference
    assert total("ppo", "update") == 4 * 3 * (trunk + head)
    assert total("ppo") == (2 + 12) * (trunk + head) + bert  # sampling, reference, update, reward
    assert total("ppo", "update", own_critic=True) == 12 * (trunk + head) + 12 * trunk
    assert total("ppo", own_critic=True) == 14 * (trunk + head) + 12 * trunk + 2 * trunk
    assert total("reward") == 3 * (2 * 2 * 48 + 4 * 2 * 2 * 2)  # its lengths hold them already


# Memory


def test_fixed_bytes_are_those_of_a_training_step():
    lm, frozen = tiny_lm(), tiny_lm()
    optimizer = torch.optim.AdamW(lm.parameters())
    lm(input_ids=torch.arange(6)[None]).logits.sum().backward()
    optimizer.step()
    tensors = [p.data for model in (lm, frozen) for p in model.parameters()]
    tensors += [p.grad for p in lm.parameters()]
    moments = [t for state in optimizer.state.values() for k, t in state.items() if k != "step"]
    bytes_held = sum(t.nbytes for t in (*tensors, *moments))
    assert fixed_bytes(trained=[lm], frozen=[frozen]) == bytes_held


# Workloads


def test_the_lengths_are_those_promised():
    size = SIZES["small"]
    prompts, responses = zip(*Rollouts.draw(size).lengths, strict=True)
    assert (len(prompts), min(prompts), max(prompts)) == (16, 16, 32)
    assert (min(responses), max(responses)) == (16, 48)
    assert all(r[-1] == 50256 for r in Rollouts.draw(size).responses)
    rows = [row for pair in dpo_pairs(size) for row in pair.rows]
    assert len(rows) == 2 * 8
    assert (min(p for p, _ in rows), max(p for p, _ in rows)) == (32, 128)
    assert (min(r + 1 for _, r in rows), max(r + 1 for _, r in rows)) == (16, 64)  # with EOS
    totals = [p + r + 3 for pair in reward_pairs(size) for p, r in pair.rows]
    assert (min(totals), max(totals)) == (32, 256)


# Growing work


def test_growth_by_hand(monkeypatch):
    tasks = [Task("ppo", f"tiny {change}", "fp32", "") for change in ("32 tokens", "256 tokens")]
    work = dict(zip(tasks, (2.0, 3.0), strict=True))
    monkeypatch.setattr(scaling, "flops_per_token", work.get)

    def answer(seconds, tokens, peak):
        return {"seconds": {"all": seconds}, "tokens": tokens, "peak": peak}

    rounds = [  # 1 and 2 seconds for each token, then 1 and 1.5, then 2 and 5
        [answer(8.0, 8, 100), answer(80.0, 40, 100)],
        [answer(8.0, 8, 100), answer(60.0, 40, 110)],
        [answer(16.0, 8, 120), answer(200.0, 40, 126)],
    ]
    found = scaling.compare(tasks, rounds)
    assert found["time_per_token"] == 2.0
    assert (found["time_per_token_min"], found["time_per_token_max"]) == (1.5, 2.5)
    assert found["work_per_token"] == 1.5
    assert found["memory"] == 1.05


def test_work_for_each_token_grows_with_attention_alone():
    small, large = (
        scaling.flops_per_token(Task("ppo", f"small {change}", "fp32", ""))
        for change in ("32 tokens", "256 tokens")
    )
    # 4 H k beside 2 (4 H H + 8 H H) in each of 12 layers, and 2 H V for every other token; k is
    # 16.5 and 128.5 pairs on average. BERT reads three more tokens than there are, and all pairs.
    hidden, vocabulary = 768, 50257

    def by_hand(pairs, bert_tokens, bert_pairs):
        weights = 24 * hidden**2
        lm = 12 * (weights + 4 * hidden * pairs) + hidden * vocabulary
        bert = 12 * (weights + 4 * hidden * bert_pairs) * bert_tokens
        return (2 + 3) * lm + bert

    expected = by_hand(128.5, 259 / 256, 259) / by_hand(16.5, 35 / 32, 35)
    assert large / small == pytest.approx(expected, rel=FP64)


def test_a_workload_measured_again_replaces_itself_alone(tmp_path):
    file = tmp_path / "benchmark.json"
    benchmark_vs_trl.add_to(file, {"threads": "1"}, {"ppo": {"a": 1}, "dpo": {"b": 2}})
    found = benchmark_vs_trl.add_to(file, {"threads": "2"}, {"dpo": {"c": 3}})
    run = {"ppo": {"threads": "1"}, "dpo": {"threads": "2"}}
    assert found == {"run": run, "ppo": {"a": 1}, "dpo": {"c": 3}}
    assert json.loads(file.read_text(encoding="utf-8")) == found


# Unlike work


def outcome(**theirs):
    """DPO in which both sides did the same but for `theirs`."""
    other = replace(OURS, label="trl 9", module="theirs")
    task = Task("dpo", "tiny", "fp32", "")
    right = {"tokens": task.expected().tokens, "steps": 1, "figures": {"loss": 0.5}}
    played = {
        side: Played(side, rounds=[dict(right), dict(right)], ready={}) for side in (OURS, other)
    }
    played[other].rounds[0] |= theirs
    return Outcome(Comparison("dpo", "trl 9", {"fp32": (OURS, other)}), task, played, rates={})


def test_like_work_is_noted():
    fine = outcome(figures={"loss": 0.50001})
    check_same_work(fine)
    assert fine.gaps["fp32"]["loss"] == (pytest.approx(1e-5), 0.0)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"steps": 2}, "trl 9 fp32 did other work in dpo: .* 2 optimizer steps instead of .* 1"),
        ({"tokens": 7}, "7 tokens"),
        ({"figures": {"loss": 0.5002}}, "loss differs by 2.0e-04"),
        ({"figures": {"loss": float("nan")}}, "loss differs by nan"),
    ],
)
def test_unlike_work_is_refused(theirs, told):
    with pytest.raises(BadInput, match=told):
        check_same_work(outcome(**theirs))


# Processes


def script(path, *lines):
    """A file that the system runs in the place of a Python."""
    path.write_text("\n".join(("#!/bin/sh", *lines, "")), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_worker_that_fails_says_why(tmp_path):
    python = script(tmp_path / "python", "echo 'KeyError: here' >&2", "exit 1")
    task = Task("dpo", "tiny", "fp32", str(tmp_path))
    with pytest.raises(BadInput, match=r"rlhf_min fp32 in .*python failed: KeyError: here"):
        Worker(replace(OURS, python=python), task, environment(threads=1, large_blocks=False))


def test_a_killed_side_is_reported_and_the_other_goes_on(tmp_path):
    killed = replace(OURS, label="another", python=script(tmp_path / "python", "kill -9 $$"))
    save_models(TINY, tmp_path)
    comparison = Comparison("sampling", "another", {"fp32": (OURS, killed)})
    task = Task("sampling", "tiny", "fp32", str(tmp_path))
    found = play(comparison, task, rounds=1, threads=1)
    check_same_work(found)
    assert len(found.played[OURS].counted) == 1
    entry = entries(found)["fp32"]
    assert entry["ratio"] is entry["memory_share"] is None
    assert entry["killed"] == "another fp32 killed by SIGKILL"
    assert "fp32: another fp32 killed by SIGKILL" in table(found)


# The command


@pytest.mark.parametrize("workload", ["sampling", "dpo"])
def test_a_tiny_run(tmp_path, workload, monkeypatch, capsys):
    if workload == "dpo":
        pytest.importorskip("trl", reason="needs trl to compare with")
    options = ["--size", "tiny", "--rounds", "2", "--threads", "1", "--precisions", "fp32"]
    command = ["benchmark_vs_trl.py", "--only", workload, *options, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    benchmark_vs_trl.main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "benchmark.json").read_text(encoding="utf-8"))
    assert results.keys() == {"run", workload}
    assert results["run"][workload]["threads"] == "1"
    ((opponent, precisions),) = results[workload].items()
    entry = precisions["fp32"]
    assert 0 < entry["ratio_min"] <= entry["ratio"] <= entry["ratio_max"]
    assert entry["memory_share"] == entry["ours"]["peak_bytes"] / entry["theirs"]["peak_bytes"]
    assert entry["theirs"]["side"] == f"{opponent} fp32"
    for side in (entry["ours"], entry["theirs"]):
        assert len(side["seconds"]) == 2
        assert 0 < side["fixed_bytes"] < side["peak_bytes"]
    assert all(first <= 1e-4 for first, _ in entry["gaps"].values())
    assert f"{entry['ratio']:.2f} times as fast" in printed
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--trl-python", "/nowhere/python"], "/nowhere/python is not a Python that runs"),
        (["--trl-python", "EMPTY"], "it has no trl"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--precisions", "fp8"], "--precisions fp8"),
    ],
)
def test_bad_options_in_one_line(arguments, told, tmp_path, monkeypatch, capsys):
    empty = script(tmp_path / "empty", "echo '{}'")  # no package is installed
    arguments = [empty if a == "EMPTY" else a for a in arguments]
    quick = ["--only", "sampling", "--size", "tiny"]  # should it run after all
    monkeypatch.setattr(sys, "argv", ["benchmark_vs_trl.py", *quick, *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("benchmark_vs_trl").main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err.strip().splitlines()[-1]


def test_which_trl_can_do_what():
    kind = importlib.import_module("benchmark_vs_trl").trl_kind
    assert [kind(v, "ppo") for v in ("0.11.3", "1.12.0", "1.16.0", "")] == [
        "legacy",
        "experimental",
        "",
        "",
    ]
    assert [kind(v, "dpo") for v in ("0.11.3", "1.12.0", "1.16.0", "")] == [
        "",
        "current",
        "current",
        "",
    ]
