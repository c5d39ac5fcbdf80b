"""The README says what is so: its code runs, and its figures are those that a command wrote."""

import json
import re
import sys
from pathlib import Path

import check_quickstart
import pytest
import torch
from tiny import bert, bert_words, gpt2, words

from rlhf_min.harness import experiments
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # as it is for the command
import frontier  # noqa: E402
import overoptimization  # noqa: E402
from benchmark import scaling  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    save_policy(Policy(gpt2().float(), words()), tmp_path / "runs/quickstart/sft")
    reward_model = RewardModel(bert().float(), bert_words())
    save_reward_model(reward_model, tmp_path / "runs/quickstart/reward_model")
    monkeypatch.chdir(tmp_path)
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert blocks
    names: dict = {}  # a later block goes on from an earlier one
    weights = []
    for code in blocks:
        # The tiny models here have no room for 128 tokens.
        code = code.replace("max_prompt_tokens=80, max_response_tokens=48", "8, 8")
        code = code.replace("batch_size=16", "batch_size=16, max_new_tokens=8")
        exec(compile(code, "README.md", "exec"), names)
        weights.append(names["policy"].lm.transformer.wte.weight.detach().clone())
    assert not torch.equal(*weights)  # the second block trains on
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 5
    assert all(len([float(x) for x in line.split()]) == 2 for line in printed)


def test_the_table_is_what_the_quickstart_wrote():
    results = json.loads((ROOT / "examples/results/quickstart-seed-0.json").read_text("utf-8"))
    (table,) = [text for _, text in BLOCKS if "SFT" in text and "ROUGE-L" in text]
    names = {
        "score": "score",
        "gold reward": "gold_reward",
        "correct": "correct",
        "polite": "polite",
        "brief": "brief",
        "win rate by gold": "gold_win_rate",
        "KL, nats": "kl",
        "BLEU": "bleu",
        "ROUGE-L": "rougeL",
        "length, tokens": "response_length",
    }
    shown = {}
    for line in table.splitlines():
        figures = re.findall(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]", line)
        if len(figures) == 3:
            title = line[: line.index(figures[0][0])].strip()
            shown[title] = [tuple(map(float, figure)) for figure in figures]
    for title, name in names.items():
        for model, (mean, lo, hi) in zip(("sft", "ppo", "dpo"), shown[title], strict=True):
            found = results[model][name]
            wanted = [found["mean"], *found["ci95"]]
            digits = 1 if name in ("bleu", "response_length") else 3
            assert [f"{x:.{digits}f}" for x in wanted] == [
                f"{x:.{digits}f}" for x in (mean, lo, hi)
            ], f"{title}, {model}"


def test_the_figures_of_three_seeds_are_what_the_check_prints(capsys):
    (told,) = [text for _, text in BLOCKS if text.startswith("promise")]
    files = sorted((ROOT / "examples/results").glob("quickstart-seed-*.json"))
    assert check_quickstart.main([str(file) for file in files]) == 0
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("line", re.findall(r"^python -m venv .*$", README, flags=re.MULTILINE))
def test_the_commands_name_files_that_exist(line):
    for name in re.findall(r"examples/\w+\.py", line):
        assert (ROOT / name).is_file()


def test_the_bench_is_what_was_written():
    results = json.loads((ROOT / "examples/results/benchmark.json").read_text("utf-8"))
    (table,) = [text for _, text in BLOCKS if "times as fast" in text]
    runs, growths = results.pop("run"), results.pop("scaling")
    lines = [f"{what}: {run[what]}" for run in runs.values() for what in ("threads", "versions")]
    lines += [scaling.told(name, growth) for name, growth in growths.items()]
    for workload in results.values():
        for opponent, precisions in workload.items():
            assert f"against {opponent}\n" in table
            for precision, found in precisions.items():
                low, high = found["ratio_min"], found["ratio_max"]
                lines.append(
                    f"  {precision}: {found['ratio']:.2f} times as fast ({low:.2f}-{high:.2f}), "
                    f"{found['memory_share']:.2f} of the memory, "
                    f"{found['above_fixed_share']:.2f} of that above the fixed part"
                )
    assert len(lines) > 8
    for line in lines:
        assert line in table.splitlines()


def test_the_experiments_are_what_was_written():
    results = ROOT / "examples/results"
    points = json.loads((results / "frontier.json").read_text("utf-8"))["points"]
    start = [point for point in next(iter(points.values())) if point["step"] == 0]
    tables = [experiments.table({"SFT": start} | points, frontier.SHOWN)]
    points = json.loads((results / "overoptimization.json").read_text("utf-8"))["points"]
    tables.append(experiments.table(points, overoptimization.SHOWN))
    by_n = {f"best of {point['step']}": [point] for point in points["best of n"]}
    tables.append(experiments.table(by_n, {"kl_bound": "KL at most"} | overoptimization.SHOWN))
    blocks = "".join(text for _, text in BLOCKS)
    assert all(f"{table}\n" in blocks for table in tables)
    files = sorted(results.glob("overoptimization*.json"))
    assert len(files) == 4
    for file in files:
        for name, verdict in json.loads(file.read_text("utf-8"))["verdicts"].items():
            assert f"| {name} | {verdict} |" in README


def test_every_example_is_told_and_every_told_example_exists():
    told = set(re.findall(r"examples/(\w+\.py)", README))
    assert told == {path.name for path in (ROOT / "examples").glob("*.py")}
