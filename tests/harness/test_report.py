import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from counting import counting_stage, log_in
from matplotlib.image import imread
from small import without_time

from rlhf_min.estimates import Estimate
from rlhf_min.evaluation import Evaluation
from rlhf_min.harness.report.figures import write_curves
from rlhf_min.harness.report.results import (
    pairs_json,
    results_json,
    results_table,
    sample_rows,
    write_json,
    write_samples,
)
from rlhf_min.harness.run.reading import read_run

MEASURED = (
    "score gold_reward correct polite brief gold_win_rate kl bleu rougeL response_length".split()
)


def evaluation(shift, *, gold=True, references=True, responses=("yes", "no")):
    """As `evaluate_policies` returns it: its names, and numbers that tell where they come from."""
    names = ["score", "kl", "response_length", "eos_rate", "win_rate"]
    names += ["gold_reward", "correct", "polite", "brief", "gold_reward_win_rate"] if gold else []
    names += ["bleu", "rouge1", "rouge2", "rougeL"] if references else []
    estimates = {
        name: Estimate(shift + i, shift + i - 0.25, shift + i + 0.5, 2)
        for i, name in enumerate(names)
    }
    shares = {"ties": 0.125, "distinct_1": 0.5, "distinct_2": 0.75, "repeated_4": 0.0625}
    if gold:
        shares["gold_reward_ties"] = 0.375
    signatures = {"bleu": "BLEU|tok:13a", "rouge": "ROUGE|F1"} if references else {}
    return Evaluation(list(responses), [1.5, -0.25], estimates, shares, signatures)


def strictly(text):
    """JSON has no NaN and no infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# results.json


def test_results_json_by_hand(tmp_path):
    reward_model = {"accuracy": Estimate(0.75, 0.5, 0.875, 40)}
    results = results_json(
        {"sft": evaluation(10), "ppo": evaluation(30)}, reward_model=reward_model, seed=7, took=1.5
    )
    write_json(tmp_path / "results.json", results)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    results = strictly(text)
    assert text == json.dumps(results, indent=2) + "\n"
    assert list(results) == ["seed", "sft", "ppo", "reward_model", "took"]
    assert (results["seed"], results["took"]) == (7, 1.5)
    assert results["reward_model"] == {"accuracy": {"mean": 0.75, "ci95": [0.5, 0.875], "n": 40}}
    for model, shift in (("sft", 10), ("ppo", 30)):
        found = results[model]
        # in the order in which `evaluation` numbers them
        numbered = {
            "score": 0,
            "kl": 1,
            "response_length": 2,
            "gold_reward": 5,
            "correct": 6,
            "polite": 7,
            "brief": 8,
            "gold_win_rate": 9,
            "bleu": 10,
            "rougeL": 13,
        }
        assert set(numbered) == set(MEASURED)
        for name, i in numbered.items():
            mean = shift + i
            assert found[name] == {"mean": mean, "ci95": [mean - 0.25, mean + 0.5], "n": 2}
        assert not any("gold_reward_" in name for name in found)
        assert (found["ties"], found["gold_ties"], found["distinct_2"]) == (0.125, 0.375, 0.75)
        assert found["signatures"] == {"bleu": "BLEU|tok:13a", "rouge": "ROUGE|F1"}


def test_results_json_leaves_out_what_was_not_measured():
    plain = evaluation(0, gold=False, references=False)
    found = results_json({"a": plain}, reward_model={}, seed=0)
    assert list(found) == ["seed", "a"]
    assert [k for k, v in found["a"].items() if isinstance(v, dict)] == [
        "score",
        "win_rate",
        "kl",
        "response_length",
        "eos_rate",
        "signatures",
    ]


def test_what_was_not_measured_is_empty_and_has_its_line():
    evaluations = {"sft": evaluation(10), "ppo": evaluation(30)}
    for found in evaluations.values():
        del found.estimates["bleu"]
        found.notes["bleu"] = "BLEU needs 4 words"
    evaluations["ppo"].notes["rouge2"] = "ROUGE-2 needs 2"
    results = results_json(evaluations, reward_model={}, seed=0)
    assert "bleu" not in results["sft"]
    assert results["sft"]["notes"] == {"bleu": "BLEU needs 4 words"}
    assert results["ppo"]["notes"] == {"bleu": "BLEU needs 4 words", "rouge2": "ROUGE-2 needs 2"}
    table = results_table(evaluations, baseline="sft")
    assert table.splitlines()[-2:] == ["sft, ppo: BLEU needs 4 words", "ppo: ROUGE-2 needs 2"]
    assert "BLEU  " not in table
    del evaluations["sft"].notes["bleu"]
    evaluations["sft"].estimates["bleu"] = Estimate(1.0, 0.5, 1.5, 2)
    assert rows_of(results_table(evaluations, baseline="sft"))["BLEU"] == ["1.0 [0.5, 1.5]", ""]


# The table


def rows_of(table):
    """Title -> the cells of its columns, which are 26 wide."""
    rows = {}
    for line in table.splitlines():
        cells = [line[20:][i : i + 26].strip() for i in range(0, len(line) - 20, 26)]
        rows.setdefault(line[:20].strip(), cells)
    return rows


def test_results_table_by_hand():
    rows = rows_of(results_table({"sft": evaluation(10), "ppo": evaluation(30)}, baseline="sft"))
    assert rows[""] == ["sft", "ppo"]
    assert rows["score"] == ["10.000 [9.750, 10.500]", "30.000 [29.750, 30.500]"]
    assert rows["win rate by gold"] == ["19.000 [18.750, 19.500]", "39.000 [38.750, 39.500]"]
    # BLEU and the length, of which nobody wants three decimals
    assert rows["BLEU"] == ["20.0 [19.8, 20.5]", "40.0 [39.8, 40.5]"]
    assert rows["length, tokens"] == ["12.0 [11.8, 12.5]", "32.0 [31.8, 32.5]"]
    assert rows["ties by gold"] == ["0.375", "0.375"]
    assert rows["repeated 4-grams"] == ["0.062", "0.062"]


def test_results_table_names_all_and_tells_how_it_was_measured():
    table = results_table({"sft": evaluation(10), "ppo": evaluation(30)}, baseline="sft")
    lines = table.splitlines()
    titles = [line[:20].strip() for line in lines[1:20]]
    assert titles == [
        *("score", "gold reward", "correct", "polite", "brief"),
        *("win rate by score", "win rate by gold", "KL, nats", "BLEU"),
        *("ROUGE-1", "ROUGE-2", "ROUGE-L", "length, tokens", "ended by EOS"),
        *("ties by score", "ties by gold", "distinct-1", "distinct-2", "repeated 4-grams"),
    ]
    assert lines[20].startswith("2 test prompts")
    assert "wins are over sft" in lines[20]
    assert lines[21:] == ["BLEU|tok:13a", "ROUGE|F1"]


def test_a_model_that_is_named_by_its_folder_keeps_its_name_and_its_column():
    name = "/tmp/runs/Sft-with-a-long-name"
    table = results_table({name: evaluation(10), "ppo": evaluation(30)}, baseline=name)
    head, score, *_ = table.splitlines()
    assert head.split() == [name, "ppo"]
    assert score[: len(head)].endswith("30.000 [29.750, 30.500]")
    assert f"wins are over {name}," in table


def test_results_table_leaves_a_cell_empty_where_one_model_was_not_measured():
    table = results_table(
        {"sft": evaluation(10, references=False), "ppo": evaluation(30)}, baseline="sft"
    )
    assert rows_of(table)["BLEU"] == ["", "40.0 [39.8, 40.5]"]
    alone = results_table({"sft": evaluation(10, gold=False, references=False)}, baseline="sft")
    assert "BLEU" not in alone
    assert "gold" not in alone


# samples.md


def cells_of(line):
    """A row of a Markdown table: a pipe with a backslash before it does not end a cell."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [c.replace("\0", "|") for c in line[2:-2].replace("\\|", "\0").split(" | ")]


def test_samples_are_one_row_each(tmp_path):
    file = tmp_path / "samples.md"
    prompts = ["1 | 2\nor | 3?", "What is a ball?", "never shown"]
    evaluations = {
        "sft": evaluation(0, responses=["a|b", "two\n\nlines"]),
        "ppo": evaluation(0, responses=["", "größer ☺"]),
    }
    write_samples(file, evaluations, prompts, n=2)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Sample responses"
    head, rule, *rows = lines[4:]
    assert cells_of(head) == ["prompt", "sft", "ppo"]
    assert rule == "|---|---|---|"
    assert [cells_of(row) for row in rows] == [
        ["1 | 2<br>or | 3?", "a|b (+1.50)", " (+1.50)"],
        ["What is a ball?", "two<br><br>lines (-0.25)", "größer ☺ (-0.25)"],
    ]


def test_samples_may_be_fewer_than_asked_for(tmp_path):
    write_samples(tmp_path / "s.md", {"sft": evaluation(0)}, ["a", "b"], n=20)
    assert len((tmp_path / "s.md").read_text(encoding="utf-8").splitlines()) == 6 + 2


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_no_line_end_breaks_a_row(tmp_path, end):
    write_samples(tmp_path / "s.md", {"sft": evaluation(0)}, [f"a{end}b", "c"])
    text = (tmp_path / "s.md").read_bytes().decode("utf-8")
    assert len(text.splitlines()) == 6 + 2


# What the report is made from


def test_sample_rows_have_every_model_and_both_rewards():
    def gold(prompts, responses):
        return [len(p) + 10 * len(r) for p, r in zip(prompts, responses, strict=True)]

    evaluations = {"sft": evaluation(0, responses=["a", "bb"]), "ppo": evaluation(0)}
    rows = sample_rows(evaluations, ["one", "four"], gold=gold, n=1)
    assert rows == [
        {"model": "sft", "prompt": "one", "response": "a", "score": 1.5, "gold_reward": 13.0},
        {"model": "ppo", "prompt": "one", "response": "yes", "score": 1.5, "gold_reward": 33.0},
    ]
    plain = sample_rows(evaluations, ["one", "four"])
    assert [row["score"] for row in plain] == [1.5, 1.5, -0.25, -0.25]
    assert not any("gold_reward" in row for row in plain)


def test_pairs_are_written_as_they_were_scored():
    found = pairs_json(torch.tensor([1.5, 2.0]), torch.tensor([0.25, -1.0]))
    assert found == {"chosen": [1.5, 2.0], "rejected": [0.25, -1.0]}


# Metrics and curves


def follow(log, stage, steps, **metrics):
    rows = [{name: f(i) for name, f in metrics.items()} for i in range(steps)]
    log.follow(counting_stage(stage, total=steps), iter(rows), show=("loss",))


def test_metrics_log_writes_a_line_of_json_for_each_step(tmp_path):
    log = log_in(tmp_path)
    follow(log, "sft", 3, loss=lambda i: 2.0**-i)
    follow(log, "ppo", 2, score=lambda i: 0.1 * i, kl=lambda i: -i)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [without_time(strictly(line)) for line in lines] == [
        {"stage": "sft", "step": 1, "loss": 1.0, "skipped": 0},
        {"stage": "sft", "step": 2, "loss": 0.5, "skipped": 0},
        {"stage": "sft", "step": 3, "loss": 0.25, "skipped": 0},
        {"stage": "ppo", "step": 1, "score": 0.0, "kl": 0, "skipped": 0},
        {"stage": "ppo", "step": 2, "score": 0.1, "kl": -1, "skipped": 0},
    ]
    assert [row.get("loss") for row in log.rows] == [1.0, 0.5, 0.25, None, None]


def test_metrics_are_on_the_disk_before_the_next_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    log = log_in(tmp_path)

    def steps():
        for i in range(3):
            yield {"loss": 1.0}
            assert len(file.read_text(encoding="utf-8").splitlines()) == i + 1

    log.follow(counting_stage("sft", total=3), steps(), show=())


def test_a_metric_that_is_now_and_then_measured(tmp_path):
    log = log_in(tmp_path)
    rows = [{"loss": 1.0}, {"loss": 0.5, "eval/loss": 0.75}]
    log.follow(counting_stage("sft", total=2), iter(rows), show=("loss", "eval/loss"))
    assert [row.get("eval/loss") for row in log.rows] == [None, 0.75]


def test_a_number_that_is_not_finite_does_not_break_the_json(tmp_path):
    """The deviation of the scores of a rollout of one, for example."""
    log = log_in(tmp_path)
    follow(log, "ppo", 1, score_std=lambda _: math.nan, update_k3=lambda _: math.inf)
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    strictly(line)


STAGES = {
    "sft": {"loss": lambda i: 2 / (i + 1)},
    "reward_model": {"accuracy": lambda i: 1 - 1 / (i + 2)},
    "ppo": dict.fromkeys(
        "score gold_reward k1 k3 rollout_entropy explained_variance clip_fraction "
        "value_clip_fraction response_length".split(),
        lambda i: i**0.5,
    ),
    "dpo": {"accuracy": lambda _: 0.5, "chosen_rewards": lambda i: i, "eval/accuracy": lambda _: 1},
}


def written_curves(folder, **stages):
    """Of a run of so many steps with these metrics: the pixels of the PNG, the words of the SVG."""
    log = log_in(folder)
    for stage, (steps, metrics) in stages.items():
        follow(log, stage, steps, **metrics)
    write_curves(folder / "curves.png", read_run(folder))
    tree = ElementTree.parse(folder / "curves.svg")
    words = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    return imread(folder / "curves.png")[..., :3], words


# Eleven panels, at most three in a row: one of SFT, one of the reward model, seven of PPO, two of
# DPO.
@pytest.mark.parametrize(
    ("stages", "columns", "rows"),
    [
        (["sft"], 1, 1),
        (["sft", "dpo"], 3, 1),
        (["ppo"], 3, 3),
        (["sft", "reward_model", "ppo", "dpo"], 3, 4),
    ],
)
def test_curves_show_the_stages_that_ran(tmp_path, stages, columns, rows):
    picture, _ = written_curves(tmp_path, **{stage: (70, STAGES[stage]) for stage in stages})
    height, width = 301, 656  # 226 and 492 points at 96 dots to the inch
    assert picture.shape[:2] == (pytest.approx(height * rows, abs=rows), width * columns)
    # Something is drawn in the first panel of the first row, and in each row.
    for i in range(rows):
        panel = picture[i * height : (i + 1) * height, :width]
        assert (panel < 0.7).any(axis=-1).mean() > 0.005


def test_curves_of_a_single_step(tmp_path):
    picture, words = written_curves(tmp_path, sft=(1, STAGES["sft"]))
    assert picture.shape[1] == 656
    assert "SFT: loss" in words


def test_curves_are_an_svg_too_with_its_words_as_words(tmp_path):
    _, words = written_curves(tmp_path, sft=(70, STAGES["sft"]))
    assert {"SFT: loss", "nats per token", "step"} <= set(words)
    svg = (tmp_path / "curves.svg").read_bytes()
    write_curves(tmp_path / "curves.png", read_run(tmp_path))
    assert (tmp_path / "curves.svg").read_bytes() == svg  # no date, no chance


@pytest.mark.parametrize("gold", [True, False])
def test_a_panel_names_gold_only_where_it_was_measured(tmp_path, gold):
    metrics = {name: f for name, f in STAGES["ppo"].items() if gold or "gold" not in name}
    _, words = written_curves(tmp_path, ppo=(3, metrics))
    assert {"PPO: score", "PPO: entropy", "PPO: explained variance of the returns"} <= set(words)
    assert any("gold" in word for word in words) == gold
