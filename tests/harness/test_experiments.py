"""The experiments: best-of-n against enumeration, verdicts on made curves, and tiny runs."""

import importlib.util
import json
import os
import pickle
import re
import signal
import sys
from itertools import combinations, product
from math import isclose, log
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_cli import example
from tolerances import EXACT, FP32, FP64

from rlhf_min.config import PPOConfig
from rlhf_min.errors import BadInput, NonFinite
from rlhf_min.estimates import best_of_n_bound, best_of_n_kl, best_of_n_mean, pass_at_k
from rlhf_min.harness import experiments
from rlhf_min.harness.experiments import (
    ExperimentOptions,
    at_once,
    best_of_n,
    draw_curve,
    points_of,
    table,
    verdict,
)
from rlhf_min.harness.inputs import Inputs
from rlhf_min.harness.models import make_codec
from rlhf_min.harness.run import layout
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.harness.stages import reward, sft
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.world import build_wordpiece, small_bert, small_gpt2, train_bpe

EXAMPLES = Path(__file__).parents[2] / "examples"

# Best of n: four texts with their probabilities, scores and values; two of them share a score.
SHARES = (0.5, 0.125, 0.25, 0.125)
STRICT, TIED = (1.0, 2.0, 4.0, 3.0), (1.0, 2.0, 2.0, 3.0)
VALUES = (3.0, 7.0, 1.0, -2.0)


def chosen(scores, n):
    """With what probability each text is the best of n, by going through all ways to draw n."""
    found = np.zeros(len(SHARES))
    for drawn in product(range(len(SHARES)), repeat=n):
        best = [i for i in drawn if scores[i] == max(scores[j] for j in drawn)]
        for i in best:  # a tie is broken at random
            found[i] += np.prod([SHARES[j] for j in drawn]) / len(best)
    return found


def as_sample(per_text):
    """Eight responses in which each text has exactly its share."""
    return np.array(
        [[x for x, share in zip(per_text, SHARES, strict=True) for _ in range(int(8 * share))]]
    )


@pytest.mark.eq("best_of_n_kl")
@pytest.mark.parametrize("scores", [STRICT, TIED, (0.0,) * 4])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_kl_is_that_of_all_ways_to_draw(scores, n):
    best = chosen(scores, n)
    wanted = sum(b * log(b / p) for b, p in zip(best, SHARES, strict=True))
    (found,) = best_of_n_kl(as_sample(scores), n)
    assert isclose(found, wanted, abs_tol=FP64)


@pytest.mark.eq("best_of_n_bound")
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_kl_is_below_its_bound(n):
    bound = best_of_n_bound(n)
    strict, tied = (best_of_n_kl(as_sample(scores), n)[0] for scores in (STRICT, TIED))
    assert tied <= strict <= bound + FP64
    if n > 1:
        assert tied < strict < bound
    # Where every text is unlikely, the bound is reached.
    (fine,) = best_of_n_kl(np.arange(4000.0)[None], n)
    assert 0 <= bound - fine + FP64 < (n / 4000) ** 2


def test_a_share_too_small_for_a_float_is_no_nan():
    (found,) = best_of_n_kl(np.arange(2000.0)[None], 1000)  # (1 / 2000)^1000 is 0
    assert 0 < best_of_n_bound(1000) - found < (1000 / 2000) ** 2


@pytest.mark.eq("best_of_n_mean")
@pytest.mark.parametrize("scores", [STRICT, TIED])
@pytest.mark.parametrize(("size", "n"), [(1, 1), (3, 1), (3, 2), (4, 2), (4, 4), (5, 3)])
def test_the_estimate_is_right_on_average(scores, size, n):
    found = 0.0
    for drawn in product(range(len(SHARES)), repeat=size):  # every sample that could be had
        of_sample = best_of_n_mean(
            np.array([[scores[i] for i in drawn]]), np.array([[VALUES[i] for i in drawn]]), n
        )
        found += np.prod([SHARES[i] for i in drawn]) * of_sample[0]
    assert isclose(found, chosen(scores, n) @ VALUES, abs_tol=FP64)


@pytest.mark.eq("pass_at_k")
@pytest.mark.parametrize(("size", "k"), [(1, 1), (4, 1), (4, 2), (4, 4), (5, 3)])
def test_pass_at_k_is_right_on_average(size, k):
    p = 0.3  # that a response is correct
    found = 0.0
    for drawn in product([True, False], repeat=size):  # every sample that could be had
        chance = np.prod([p if correct else 1 - p for correct in drawn])
        found += chance * pass_at_k(np.array([drawn]), k)[0]
    assert isclose(found, 1 - (1 - p) ** k, abs_tol=FP64)


@pytest.mark.eq("pass_at_k")
def test_pass_at_k_is_the_share_of_all_choices_of_k():
    rows = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]])
    for k in range(1, 6):
        expected = [np.mean([max(some) for some in combinations(row, k)]) for row in rows]
        assert np.abs(pass_at_k(rows, k) - expected).max() <= FP64
    for k in (0, 6):
        with pytest.raises(BadInput, match=f"pass@{k} cannot be estimated from 5 responses"):
            pass_at_k(rows, k)


def test_best_of_n_of_a_model(models):
    policy, reward_model = models
    options = ExperimentOptions(test_prompts=3, max_response_tokens=1, max_length=64)
    scored = []

    def gold(prompts, responses):
        scored.extend(zip(prompts, responses, strict=True))
        return -reward_model.score(prompts, responses)

    prompts = ("Add 1 and 2.", "Ann: hello", "What is it?", "not asked for")
    inputs = Inputs(test=[{"prompt": prompt} for prompt in prompts], monitors={"gold_reward": gold})
    codec = make_codec(policy, options)
    found = best_of_n(policy, reward_model, codec, inputs, options, samples=64)
    assert list(found) == [1, 2, 4, 8, 16, 32]
    assert {prompt for prompt, _ in scored} == set(prompts[:3])
    assert len(set(scored)) == len(scored) < 3 * 64  # some are the same, and have the same score
    assert np.abs(found[1]["kl"]).max() <= FP64
    for n, columns in found.items():
        assert {column.shape for column in columns.values()} == {(3,)}
        assert (columns["kl"] <= columns["kl_bound"] + FP64).all()
        assert columns["kl_bound"].tolist() == [best_of_n_bound(n)] * 3
        assert np.abs(columns["gold_reward"] + columns["score"]).max() <= FP64  # chosen by score
    scores = np.array([columns["score"].mean() for columns in found.values()])
    assert (np.diff(scores) > 0).all()
    assert (found[8]["kl"] > found[2]["kl"]).all()


# Verdicts


def looks(gold, score, kl=(0.0, 1.0, 4.0)):
    """A run of three looks; an entry is a number for all 40 prompts, or one for each."""
    names = ("gold_reward", "score", "kl")
    return {
        step: {name: np.broadcast_to(x, 40) for name, x in zip(names, row, strict=True)}
        for step, row in zip((0, 10, 20), zip(gold, score, kl, strict=True), strict=True)
    }


def test_a_verdict_of_turning_down():
    # Two seeds whose means are 2, 3, 2.5, and whose KL is 0, 1, 4.
    runs = [
        looks((2, 2.5, 2), (0, 1, 2), kl=(0, 0.5, 3)),
        looks((2, 3.5, 3), (0, 1, 2.5), (0, 1.5, 5)),
    ]
    assert verdict(runs, seed=0) == (
        "gold peaks at KL 1.0 nats and falls by 0.50 [0.50, 0.50] until KL 4.0, "
        "while the score climbs by 1.25 [1.25, 1.25]"
    )


def test_a_verdict_without_a_climb():
    told = verdict([looks((2, 3, 1), (0, 1, 1))], seed=0)
    assert told.endswith("falls by 2.00 [2.00, 2.00] until KL 4.0, while the score does not climb")


@pytest.mark.parametrize("gold", [(2, 3, 3.5), (2, 3, 3), (2, 1, 2.5)])
def test_a_verdict_of_not_turning_down(gold):
    told = verdict([looks(gold, (0, 1, 2), kl=(0.0, 6.0, 4.0))], seed=0)
    assert told == "gold does not turn down within KL 6.0 nats"


def test_a_peak_by_chance_is_no_turning_down():
    # Every other prompt has a peak by chance, of which the rest know nothing.
    chance = np.where(np.arange(40) % 2, 2.9, 9.0)
    assert "does not turn down" in verdict([looks((2, chance, 3), (0, 1, 2))], seed=0)
    assert "does not turn down" in verdict([looks((2, chance[::-1], 3), (0, 1, 2))], seed=0)
    # One that all prompts agree on, but some far too little to be sure.
    unsure = np.where(np.arange(40) < 4, 9.0, 2.8)
    assert "does not turn down" in verdict([looks((2, unsure, 3), (0, 1, 2))], seed=0)


def test_the_fall_is_from_the_peak_of_the_rest():
    # Even prompts peak at the second look with 6, odd ones at the first with 4; all end at 1.
    even = np.arange(40) % 2 == 0
    first, second = np.where(even, 3.0, 4.0), np.where(even, 6.0, 3.5)
    told = verdict([looks((first, second, 1), (0, 1, 2))], seed=0)
    # Even ones fall from 3, odd ones from 3.5; the mean is highest at the second look.
    assert told.startswith("gold peaks at KL 1.0 nats and falls by 2.25 [2.")
    assert "while the score climbs by 1.50 [1." in told


# Points and curves


def test_points_tables_and_curves():
    runs = [
        looks((2, 3, np.repeat([0, 4], 20)), (0, 1, 2)),
        looks((2, 5, 3), (0, 1, 3), kl=(0, 3, 6)),
        looks((2, 1, 7), (0, 1, 7), kl=(0, 5, 11)),
    ]
    points = points_of({"PPO": runs}, seed=0)
    assert [(p["seed"], p["step"]) for p in points["PPO"]] == list(product(range(3), (0, 10, 20)))
    assert points["PPO"][2]["gold_reward"]["mean"] == 2.0
    assert points["PPO"][2]["gold_reward"]["n"] == 40
    low, high = points["PPO"][2]["gold_reward"]["ci95"]
    assert 1 < low < 2 < high < 3
    assert json.loads(json.dumps(points)) == points

    header, row = table(points, {"kl": "KL", "score": "score"}).splitlines()
    assert header.split() == ["KL", "score"]
    assert row.split() == ["PPO", "7.00", "(4.00-11.00)", "4.00", "(2.00-7.00)"]

    axes = Figure().subplots()
    draw_curve(axes, points["PPO"], "kl", "gold_reward", label="PPO")
    assert axes.lines[0].get_xydata().tolist() == [[0, 2], [3, 3], [7, 4]]
    across, upright = (np.array(bars.get_segments()).tolist() for bars in axes.collections)
    assert across == [[[0, 2], [0, 2]], [[1, 3], [5, 3]], [[4, 4], [11, 4]]]
    assert upright == [[[0, 2], [0, 2]], [[3, 1], [3, 5]], [[7, 2], [7, 7]]]


# Several at once


def job(number):
    """Its own number, the threads it has, and a figure that depends on how they add up."""
    rng = torch.Generator().manual_seed(number)
    x = torch.randn(300, 3000, generator=rng)
    return number, torch.get_num_threads(), float((x @ x.T).square().sum())


def end_by_signal(_):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number):
    if number == 1:
        raise NonFinite(3, "scores", lambda: None, [number])
    return number


def test_at_once_is_as_one_after_the_other(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what a process would start with
    before, jobs = torch.get_num_threads(), [3, 1, 2]
    torch.set_num_threads(2)
    one = list(at_once(job, jobs, processes=1))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert [(number, threads) for number, threads, _ in one] == [(3, 1), (1, 1), (2, 1)]
    assert list(at_once(job, jobs, processes=2)) == one


def test_a_killed_process_is_told():
    with pytest.raises(BadInput, match=r"one of 2 processes was killed.*lower --threads"):
        list(at_once(end_by_signal, [0], processes=2))


def test_an_error_can_be_sent_from_process_to_process():
    results = at_once(fail, [0, 1], processes=1)
    assert next(results) == 0
    with pytest.raises(BadInput, match="scores is not finite") as caught:
        next(results)
    assert type(caught.value) is BadInput
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# The commands


@pytest.fixture(scope="module")
def models():
    """Models that nothing was learned by; their responses are noise."""
    texts = ["What is 1 plus 2? It is 3.", "Happy to help: the answer is Monday."]
    tokenizer, wordpiece = train_bpe(texts, 300), build_wordpiece(texts, 200)
    policy = Policy(small_gpt2(tokenizer, positions=64, seed=0), tokenizer)
    return policy, RewardModel(small_bert(wordpiece, positions=128, seed=0), wordpiece)


@pytest.fixture
def start(models, monkeypatch, tmp_path, capsys):
    """Runs an example with these models on one thread: its exit code, output, errors and module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")
    save_policy(models[0], tmp_path / "sft")
    save_reward_model(models[1], tmp_path / "reward_model")
    threads = torch.get_num_threads()

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        shared = "--model sft --max_length 64 --max_response_tokens 4 --threads 1 --test_prompts 8"
        if name in ("frontier", "overoptimization"):
            shared += " --reward_model reward_model --seeds 1 --ppo_steps 2 --looks 2"
        monkeypatch.setattr(sys, "argv", [name, *shared.split(), *map(str, arguments)])
        capsys.readouterr()  # of the saving
        code = 0
        try:
            module.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr(), module

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("given", [(), ("model",), ("reward_model",), ("model", "reward_model")])
def test_models_are_trained_unless_they_are_given(given, models, monkeypatch, tmp_path):
    trained = []

    def run_sft(policy, _codec, _inputs, _config, log):
        trained.append("model")
        save_policy(policy, log.folder / "sft")

    def run_reward(reward_model, _inputs, _config, log, **_):
        trained.append("reward_model")
        save_reward_model(reward_model, log.folder / "reward_model")

    monkeypatch.setattr(sft, "run", run_sft)
    monkeypatch.setattr(reward, "run", run_reward)
    save_policy(models[0], tmp_path / "model")
    save_reward_model(models[1], tmp_path / "reward_model")
    options = ExperimentOptions(max_length=64, **{name: str(tmp_path / name) for name in given})
    inputs = Inputs(demonstrations=[{"prompt": "Add 1 and 2.", "response": "It is 3."}])
    policy, reward_model, _ = experiments.prepare(options, tmp_path / "run", inputs)
    assert {*trained, *given} == {"model", "reward_model"}
    assert len(trained) + len(given) == 2
    for file, weights in [("sft", policy.lm), ("reward_model", reward_model.model)]:
        saved = torch.load(tmp_path / "run" / file / "model.pt", weights_only=True)
        assert all(torch.equal(saved[key], x) for key, x in weights.state_dict().items())


def test_a_run_does_not_take_the_threads_of_the_command(monkeypatch, tmp_path):
    seen = []

    def start_policy(options, *_, **__):
        seen.append(options.threads)
        raise KeyError

    monkeypatch.setattr(experiments, "start_policy", start_policy)
    with pytest.raises(KeyError):
        experiments.run(ExperimentOptions(threads=4), tmp_path, PPOConfig())
    assert seen == [None]  # so each job has the one that it was started with


def means(points, key):
    return [point[key]["mean"] for point in points]


def test_the_frontier(start):
    code, out, errors, _ = start("frontier", "--kl_coefs", 0.1, "--betas", 0.5, "--pairs", 130)
    assert code == 0, errors
    results = json.loads(Path("runs/frontier/frontier.json").read_text("utf-8"))
    assert results["config"]["FrontierOptions"]["betas"] == [0.5]
    names = ("PPO, kl_coef 0.1", "DPO, beta 0.5", "RLOO, kl_coef 0.1")
    ppo, dpo, rloo = (results["points"][name] for name in names)
    # DPO's steps are two batches of 64; the last two pairs wait for an epoch that never comes.
    assert (
        [p["step"] for p in ppo]
        == [p["step"] for p in dpo]
        == [p["step"] for p in rloo]
        == [0, 1, 2]
    )
    for points in (ppo, dpo, rloo):
        assert points[0] == ppo[0]  # all start from the same model
        kl = means(points, "kl")
        assert kl[0] == EXACT
        assert all(x > 0 for x in kl[1:])
        assert means(points, "kl") != means(ppo, "kl") or points is ppo
    assert {point["gold_reward"]["n"] for point in ppo + dpo + rloo} == {8}
    assert 0 < results["seconds"]["prepare"] < results["seconds"]["total"]
    rows = {line[:18].strip(): line for line in out.splitlines() if "(" in line}
    end = ppo[-1]["kl"]["mean"]
    assert f" {end:.2f} ({end:.2f}-{end:.2f}) " in rows["PPO, kl_coef 0.1"]
    assert rows["SFT"].split()[:2] == ["SFT", "0.00"]
    for file, start_of in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert Path(f"runs/frontier/frontier.{file}").read_bytes().startswith(start_of)


def test_overoptimization(start, monkeypatch):
    learned_from = []

    def prepare(options, out, inputs):
        learned_from.extend(inputs.pairs)
        return real(options, out, inputs)

    real = experiments.prepare
    monkeypatch.setattr(experiments, "prepare", prepare)
    options = ("--kl_coefs", 0, "--samples", 4, "--pairs", 400, "--label_noise", 0.25)
    code, out, errors, module = start("overoptimization", *options)
    assert code == 0, errors
    results = json.loads(Path("runs/overoptimization/overoptimization.json").read_text("utf-8"))
    points, verdicts = results["points"], results["verdicts"]
    assert list(points) == list(verdicts) == ["PPO, kl_coef 0", "best of n"]
    assert [point["step"] for point in points["best of n"]] == [1, 2]
    assert [point["step"] for point in points["PPO, kl_coef 0"]] == [0, 1, 2]
    for name, told in verdicts.items():
        assert f"{name}: {told}" in out.splitlines()
    assert module.draw(points, "as told").get_suptitle() == "as told"

    world = experiments.load_world(ExperimentOptions(pairs=400)).pairs
    turned = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in world]
    kinds = [world[i] == pair for i, pair in enumerate(learned_from)]
    assert all(kinds[i] or turned[i] == pair for i, pair in enumerate(learned_from))
    assert 70 < kinds.count(False) < 130  # 100 expected


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("frontier", ["--data", "mine.csv"], "--data has no true reward"),
        ("frontier", ["--betas", "-1"], "beta is -1.0; it must be above 0"),
        ("overoptimization", ["--kl_coefs", "-1"], "kl_coef is -1.0; it must be at least 0"),
        ("overoptimization", ["--label_noise", "2"], "label_noise is 2.0; it must be at least 0"),
        ("overoptimization", ["--samples", "1"], "samples is 1; it must be at least 2"),
        ("overoptimization", ["--test_prompts", "1"], "test_prompts is 1; it must be at least 2"),
    ],
)
def test_what_is_refused(start, name, arguments, told):
    code, _, errors, _ = start(name, *arguments)
    assert code == 2
    assert told in errors
    assert len(errors.strip().splitlines()) == 1
    assert not Path("runs").exists()


# Rejection sampling


def test_rejection_sampling(start):
    """The shortest response is the best here, so that the best of n learns to be brief."""
    code = "def score(prompts, responses): return [-len(r) for r in responses]"
    Path("short.py").write_text(code, encoding="utf-8")
    rows = [json.dumps({"prompt": f"Add {i} and {i + 1}."}) for i in range(40)]
    Path("a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = "--data a.jsonl --reward short.py:score --n 4 --rounds 2 --epochs 2 --batch_size 8"
    code, out, errors, _ = start("rejection_sampling", *options.split(), "--learning_rate", 6e-3)
    assert code == 0, errors
    run = Path("runs/rejection_sampling")
    results = json.loads((run / "results.json").read_text("utf-8"))
    models = ("start", "best_of_n", "random_of_n")
    score = {name: results[name]["score"]["mean"] for name in models}
    assert score["best_of_n"] > max(score["start"], score["random_of_n"])
    assert abs(results["start"]["kl"]["mean"]) <= FP32
    for name in ("best_of_n", "random_of_n"):
        assert results[name]["kl"]["mean"] > 0
        rounds = [line for line in out.splitlines() if "chosen_score" in line and name in line]
        assert len(rounds) == 2
        assert Policy.from_pretrained(run / name, critic="none").positions == 64
    assert layout.clear(run) == [run / ".lock"]  # --overwrite knows all the rest of it


# pass@k and arithmetic


def test_the_last_number_must_be_the_answer():
    responses = ["It is 7.", "3 plus 4 is 8", "7 or 8?", "8, no: 7", "none", "1,007 of them", "-7"]
    answers = ["7", "7", 7, 7, "7", "#### 1007", 7]
    exact_match = example("arithmetic").exact_match
    assert exact_match([""] * 7, responses, answers) == [1, 0, 0, 1, 0, 1, 0]
    assert exact_match([""], ["nothing"], ["no number"]) == [0]
    assert exact_match([""] * 2, ["it is 10-7", "it is -7"], ["7", "-7"]) == [1, 1]


def test_pass_at_k_before_and_after():
    # question by question: of 4 responses 1 and 2 are right before, 4 and 0 after
    before = np.array([[1, 0, 0, 0], [0, 1, 1, 0]]) == 1
    after = np.array([[1, 1, 1, 1], [0, 0, 0, 0]]) == 1
    found = experiments.pass_estimates({"before": before, "after": after}, seed=0)
    means = {name: {k: x.mean for k, x in of.items()} for name, of in found.items()}
    # pass@2 is 1 - C(3, 2) / C(4, 2) = 1/2 and 1 - C(2, 2) / C(4, 2) = 5/6
    expected = {
        "before": {"pass@1": 3 / 8, "pass@2": 2 / 3},
        "after": {"pass@1": 1 / 2, "pass@2": 1 / 2},
        "gain": {"pass@1": 1 / 8, "pass@2": -1 / 6},
    }
    for name, of in expected.items():
        assert means[name] == pytest.approx(of, abs=FP64)
    header, *lines, told = experiments.pass_table(found).splitlines()
    assert header.split() == ["before", "after", "gain"]
    assert [line.split()[0] for line in lines] == ["pass@1", "pass@2"]
    assert {len(line) for line in (header, *lines)} == {8 + 3 * 25}
    assert told.startswith("2 held-out questions")


def test_the_questions_of_the_world_have_their_answers():
    inputs = experiments.load_world(ExperimentOptions())
    experiments.only_kinds(inputs, ("sum", "count"))
    assert len(inputs.prompts) == 2 * 2300
    assert len(inputs.test) == 2 * 150
    of_training = {row["prompt"] for row in inputs.prompts}
    assert not of_training & {row["prompt"] for row in (*inputs.test, *inputs.eval_prompts)}
    assert of_training >= {row["prompt"] for row in inputs.demonstrations}
    assert len(inputs.demonstrations) > 2500
    sums = [row for row in inputs.test if row["kind"] == "sum"]
    for row in sums:
        assert int(row["answer"]) == sum(map(int, re.findall(r"[0-9]+", row["prompt"])))
    assert len(sums) == 150


def test_arithmetic(start):
    """What is wanted is written at times by noise: nothing but the plumbing is shown here."""
    rows = [json.dumps({"prompt": f"Add {i} and 1.", "answer": i + 1}) for i in range(40)]
    Path("a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = (
        "--data a.jsonl --steps 2 --batch_size 8 --minibatch_size 8 --group_size 4 --samples 4"
    )
    options += " --max_new_tokens 4 --skip_preflight --heldout_share 0.2"
    code, out, errors, _ = start("arithmetic", *options.split())
    assert code == 0, errors
    run = Path("runs/arithmetic")
    found = json.loads((run / "arithmetic.json").read_text("utf-8"))
    assert found["config"]["GRPOConfig"]["group_size"] == 4
    assert found["before"]["pass@2"]["n"] == 8
    assert list(found["gain"]) == ["pass@1", "pass@2"]
    assert "8 held-out questions" in out
    assert Policy.from_pretrained(run / "grpo", critic="none").positions == 64
    assert layout.clear(run) == [run / ".lock"]
