"""The verdict on a run: what is found, with figures by hand, and that page and terminal say it."""

import json
import re
from html import unescape

import pytest
from small import small_policy
from test_cli import example, pairs, write_rows
from test_html import NO_MORE, paragraphs, ppo_row, with_estimates, write_run

from rlhf_min.harness.report import finish
from rlhf_min.harness.report.findings import findings, summary
from rlhf_min.harness.report.page import page
from rlhf_min.harness.run.layout import NOTES
from rlhf_min.harness.run.log import note
from rlhf_min.harness.run.reading import read_run
from rlhf_min.harness.run.saved_models import save_policy


def found(tmp_path, **files):
    """The findings of a run that has these files and no others."""
    return [str(x) for x in findings(read_run(write_run(tmp_path / "run", **NO_MORE | files)))]


def estimate(mean, half, n=100):
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": n}


def rows_of(stage, **series):
    n = len(next(iter(series.values())))
    return [
        {"stage": stage, "step": i + 1} | {k.replace("_of_", "/"): v[i] for k, v in series.items()}
        for i in range(n)
    ]


HEALTHY = [ppo_row(step) for step in range(1, 41)]


def test_a_healthy_run_has_none(tmp_path):
    told, nothing = summary(read_run(write_run(tmp_path / "run", run=None)))
    assert nothing == []
    assert told[-1] == "Nothing stands out: all 12 curves stayed in their range."


# PPO


def test_ratio_spikes_are_counted_with_their_steps_and_the_largest(tmp_path):
    ratios = {3: 10.5, 7: 120.0, 8: 80.0, 20: 10.0}
    rows = [ppo_row(step, ratio_max=ratios.get(step, 1.5)) for step in range(1, 41)]
    assert found(tmp_path, metrics=rows) == [
        "PPO: ratios above 10 in 3 of 40 steps (3, 7, 8): up to 120 in step 7; a lower "
        "--learning_rate, fewer --epochs or --stop_kl keep them near 1"
    ]
    many = [ppo_row(step, ratio_max=11.0) for step in range(1, 41)]
    assert "in 40 of 40 steps (1, 2, 3, 4, 5, ...)" in found(tmp_path, metrics=many)[0]


@pytest.mark.parametrize(
    ("mean", "error", "told"),
    [
        (-0.5, 0.2, "the score fell: 1.000 before, 0.500 after, on 9 fixed prompts (-0.500, -2.5 "),
        (-0.3, 0.2, "the score is not shown to have risen: 1.000 before, 0.700 after, on 9 fixed"),
        (0.3, 0.2, "the score is not shown to have risen: 1.000 before, 1.300 after, on 9 fixed"),
        (0.0, 0.0, "the score is not shown to have risen: 1.000 before, 1.000 after, on 9 fixed"),
        (0.5, 0.2, None),
        (0.5, 0.0, None),
    ],
)
def test_a_score_that_did_not_rise(tmp_path, mean, error, told):
    change = {"n": 9, "before": 1.0, "after": 1 + mean, "mean": mean, "error": error}
    lines = found(tmp_path, metrics=HEALTHY, notes={"ppo": {"change": change}})
    assert len(lines) == (told is not None)
    assert told is None or lines[0].startswith(f"PPO: {told}")
    run = read_run(tmp_path / "run")
    errors = f", {mean / error:.1f} standard errors of 0.200" if error else ""
    assert summary(run)[0][0] == (
        f"PPO: score 1.000 before, {1 + mean:.3f} after, on 9 fixed prompts ({mean:+.3f}{errors})."
    )


def test_what_goes_wrong_in_ppo(tmp_path):
    rows = [
        ppo_row(step, eos_rate=0.5 if step > 32 else 1.0, skipped=max(0, step - 38), score_std=0.0)
        for step in range(1, 41)
    ]
    lines = found(tmp_path, metrics=rows, notes={"ppo": {"reward_notes": ["reward f: odd"]}})
    assert [line.partition(";")[0] for line in lines] == [
        "PPO: 2 updates were skipped from step 39 on: gradients overflowed in fp16",
        "PPO: reward f: odd",
        "PPO: all responses of a rollout had the same score in 40 of 40 steps",
        "PPO: responses were cut in the last fifth of its steps: 50% of them did not end by "
        "themselves",
    ]


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_groups_that_say_nothing_are_told_with_what_to_do(tmp_path, stage, share):
    rows = rows_of(stage, score=[1.0] * 9, equal_groups=[share] * 9, ratio_max=[1.0] * 9)
    lines = found(tmp_path, metrics=rows)
    assert lines == (
        []
        if share < 0.5
        else [
            f"{stage.upper()}: the curve of groups of equal rewards left its range from step 1 to "
            "the end: 0.750 at first, where at most 0.5 is healthy; give a reward that tells "
            "responses apart, prompts that are neither too easy nor too hard, or a larger "
            "--group_size"
        ]
    )


@pytest.mark.parametrize(("level", "most"), [("token", 0.3), ("sequence", 0.9)])
def test_a_clip_as_narrow_as_gspos_holds_many_back(tmp_path, level, most):
    run = {"config": {"GRPOConfig": {"ratio_level": level}}}
    rows = rows_of("grpo", score=[1.0] * 9, clip_fraction=[0.5] * 9, ratio_max=[1.0] * 9)
    lines = found(tmp_path, metrics=rows, run=run)
    assert lines == [
        f"GRPO: the curve of clipped left its range from step 1 to the end: 0.500 at first, where "
        f"at most {most} is healthy; lower --learning_rate or take fewer --epochs"
    ] * (most < 0.5)


def test_the_kl_that_ended_the_run_is_told_with_its_step(tmp_path):
    run = {"config": {"PPOConfig": {"steps": 40, "max_kl": 1.7}}}
    rows = [*(ppo_row(step) for step in range(1, 18)), ppo_row(18, k1=1.75)]
    assert found(tmp_path, metrics=rows, run=run) == [
        "PPO: was ended by --max_kl after step 18: the KL of 1.75 nats per response exceeds 1.7; "
        "raise --kl_coef, lower --learning_rate, or allow more"
    ]


def test_a_curve_that_left_its_range_says_where_and_what_to_do(tmp_path):
    rows = [ppo_row(step, k1=20.0 if 25 <= step < 35 else 2.0) for step in range(1, 41)]
    assert found(tmp_path, metrics=rows) == [
        "PPO: the curve of KL to the reference left its range from step 25 to step 35: 20.000 at "
        "first, where -1 to 15 is healthy; raise --kl_coef or lower --learning_rate"
    ]


# Learning by heart, and not at all


def test_a_held_out_loss_that_turns_up_is_told_once(tmp_path):
    rows = rows_of("sft", loss=[3.0, 2, 1, 0.5], eval_of_loss=[4.0, 1.5, 2.5, 3.0])
    assert found(tmp_path, metrics=rows) == [
        "SFT: the held-out loss turned up after step 2: 1.500 there, 3.000 at step 4: examples are "
        "learned by heart; take fewer --epochs or a lower --learning_rate; --keep_best eval/loss "
        "keeps the best model"
    ]
    rows = rows_of("sft", loss=[3.0, 3, 3], eval_of_loss=[2.0, 2.0, 2.02])
    assert found(tmp_path, metrics=rows)[0].startswith(
        "SFT: the held-out loss did not fall from step 1 to step 3: 2.000 to 2.020"
    )


@pytest.mark.parametrize(
    ("accuracy", "trained", "told"),
    [
        (estimate(0.55, 0.06), 0.6, ["is not shown to know more than a guess on 100 held-out"]),
        (estimate(0.62, 0.06), 0.7, ["is not shown to know more than the lengths on 100 held-out"]),
        (estimate(0.8, 0.05), 0.95, ["learns its pairs by heart in the last fifth of its steps"]),
        (estimate(0.8, 0.05), 0.88, []),
        (estimate(0.8, 0.2), 0.95, []),
    ],
)
def test_a_reward_model_that_learned_little_or_by_heart(tmp_path, accuracy, trained, told):
    estimates = {
        "accuracy": accuracy,
        "longer_wins": estimate(0.42, 0.05),
        "shorter_wins": estimate(0.58, 0.05),
    }
    rows = rows_of("reward_model", accuracy=[0.5] * 8 + [trained - 0.05, trained + 0.05])
    lines = found(tmp_path, metrics=rows, notes={"reward_model": {"estimates": estimates}})
    assert [line.partition(": ")[2][: len(t)] for line, t in zip(lines, told, strict=True)] == told
    # an old run has them in its results
    assert found(tmp_path, metrics=rows, results={"reward_model": estimates}) == lines


def test_dpo_that_knows_its_own_pairs_only(tmp_path):
    rows = rows_of("dpo", accuracy=[0.8, 1.0])

    def lines(trained, held_out):
        accuracy = {"trained on": trained, "held out": held_out}
        return found(tmp_path, metrics=rows, notes={"dpo": {"accuracy": accuracy}})

    few = lines(estimate(0.99, 0.01, 36), estimate(0.5, 0.3, 4))
    assert len(few) == 2
    by_heart, guess = few
    both = (
        "prefers the chosen response in 0.990 [0.980, 1.000] of 36 pairs trained on and 0.500 "
        "[0.200, 0.800] of 4 pairs held out"
    )
    assert by_heart.startswith(f"DPO: learns its pairs by heart: {both}; take fewer --epochs")
    assert guess.startswith(
        f"DPO: is not shown to know more than a guess on 4 held-out pairs: {both}; take more pairs"
    )
    assert lines(estimate(0.85, 0.02), estimate(0.8, 0.04)) == []
    assert lines(estimate(0.95, 0.02), estimate(0.8, 0.04))[0].startswith("DPO: learns its pairs")
    assert lines(estimate(0.9, 0.02), estimate(0.85, 0.01)) == []  # apart, and by little


def test_kto_that_knows_its_own_rows_only_or_that_most_are_of_one_label(tmp_path):
    rows = rows_of("kto", desirable_rewards=[0.0, 0.5], kl=[0.0, 0.25])

    def lines(trained, held_out, one_label=0.5):
        accuracy = {"trained on": trained, "held out": held_out | {"one_label": one_label}}
        return found(tmp_path, metrics=rows, notes={"kto": {"accuracy": accuracy}})

    by_heart, guess = lines(estimate(0.99, 0.01, 36), estimate(0.5, 0.3, 4))
    both = (
        "tells desirable from undesirable in 0.990 [0.980, 1.000] of 36 responses trained on and "
        "0.500 [0.200, 0.800] of 4 responses held out"
    )
    assert by_heart.startswith(f"KTO: learns its responses by heart: {both}; take fewer --epochs")
    assert guess.startswith(
        "KTO: is not shown to know more than that one label is frequent (50% of 4 held-out rows): "
        f"{both}; take more rows"
    )
    assert lines(estimate(0.85, 0.02), estimate(0.8, 0.04)) == []
    # Four fifths of the rows have one label: who says nothing but that one is as good.
    told = lines(estimate(0.85, 0.02), estimate(0.82, 0.04), one_label=0.8)
    assert len(told) == 1
    assert "one label is frequent (80% of 100 held-out rows)" in told[0]
    assert found(tmp_path, metrics=rows, notes={"kto": {}}) == []
    of_each = estimate(0.8, 0.04) | {"one_label": 0.5}
    accuracy = {"trained on": of_each, "held out": of_each}
    run = write_run(
        tmp_path / "run", metrics=rows, notes={"kto": {"accuracy": accuracy}}, **NO_MORE
    )
    (told,) = [line for line in summary(read_run(run))[0] if line.startswith("KTO")]
    assert told == (
        "KTO: tells desirable from undesirable in 0.800 [0.760, 0.840] of 100 responses trained on "
        "and 0.800 [0.760, 0.840] of 100 responses held out. The reference point was above 0 in 1 "
        "of 2 steps."
    )


# Data and the test


def test_warnings_and_dropped_rows_of_the_data_are_told(tmp_path):
    notes = {
        "data": {
            "report": [
                "a.csv: 9 rows read, 7 kept, 2 dropped: prompt is empty (2: rows 2, 3)",
                "b.csv: 9 rows read, 9 kept, 0 dropped",
                "warning: label is not used; leave rows out; or not",
            ]
        },
        "dpo": {"report": ["DPO on 7 pairs", "  warning: 30% of them lose their end; raise it"]},
    }
    assert found(tmp_path, metrics=rows_of("dpo", accuracy=[0.8]), notes=notes) == [
        "Data: 2 of 9 rows were dropped: prompt is empty (2: rows 2, 3); correct them, or do "
        "without",
        "Data: label is not used; leave rows out; or not",
        "DPO: 30% of them lose their end; raise it",
    ]
    text = unescape(page([read_run(tmp_path / "run")]))
    for report in (notes["data"]["report"], notes["dpo"]["report"]):
        for line in report:
            assert f"<li>{line.strip()}</li>" in text


def test_a_model_below_its_baseline_and_a_reward_model_that_is_exploited(tmp_path):
    results = with_estimates(
        sft={"score": (0.0, 0.1), "gold_reward": (3.0, 0.1)},
        ppo={"score": (1.0, 0.1), "gold_reward": (3.05, 0.1)},
        dpo={"score": (-1.0, 0.1), "gold_reward": (3.0, 0.1)},
    )
    lines = found(tmp_path, metrics=HEALTHY, results=results)
    assert len(lines) == 2
    exploited, below = lines
    assert exploited.startswith(
        "Test: ppo's score rose, the gold reward is not shown to have risen on the test prompts: "
        "gold reward 3.050 [2.950, 3.150], sft's 3.000 [2.900, 3.100]; the reward model may be"
    )
    assert below.startswith(
        "Test: dpo is below sft by the score on the test prompts: score -1.000 [-1.100, -0.900], "
        "sft's 0.000 [-0.100, 0.100]; look at the samples"
    )


def test_a_model_that_is_not_shown_to_differ(tmp_path):
    results = with_estimates(
        sft={"score": (0.0, 0.1), "gold_reward": (3.0, 0.1)},
        ppo={"score": (0.1, 0.1), "gold_reward": (3.05, 0.1)},
        dpo={"score": (0.1, 0.1), "gold_reward": (4.0, 0.1)},
    )
    lines = found(tmp_path, metrics=HEALTHY, results=results)
    assert len(lines) == 1
    assert lines[0].startswith(
        "Test: ppo is not shown to differ from sft on the test prompts: score 0.100 [0.000, 0.200],"
        " sft's 0.000 [-0.100, 0.100]; gold reward 3.050 [2.950, 3.150], sft's 3.000 ["
    )


# In both


def said_on(text):
    """The first lines of a page: its sentences, and its findings."""
    first = text[: text.index("<h2")]
    items = [unescape(re.sub("<.*?>", "", x)) for x in re.findall("<li>.*?</li>", first)]
    return paragraphs(first, ""), items


def test_page_and_terminal_say_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    empty = {"prompt": "", "chosen": "a", "rejected": "b"}
    write_rows(tmp_path / "pairs.jsonl", [*pairs(12), empty])
    arguments = "train_dpo.py --data pairs.jsonl --out run --epochs 2 --batch_size 4 --threads 1"
    arguments += " --max_length 16 --max_response_tokens 8 --skip_preflight --model"
    monkeypatch.setattr("sys.argv", [*arguments.split(), str(tmp_path / "sft")])
    save_policy(small_policy(), tmp_path / "sft")
    example("train_dpo").main()
    printed = capsys.readouterr().out.splitlines()
    told, found = summary(read_run(tmp_path / "run"))
    assert len(found) >= 1
    end = [*told, *(f"  - {finding}" for finding in found)]
    assert printed[-1 - len(end) : -1] == end
    paragraphs, items = said_on((tmp_path / "run/report.html").read_text(encoding="utf-8"))
    assert [p for p in paragraphs if p in told] == told
    assert items == [str(finding) for finding in found]
    kept = json.loads((tmp_path / "run/findings.json").read_text(encoding="utf-8"))
    assert kept["told"] == told
    assert [x["what"] for x in kept["findings"]] == [finding.what for finding in found]
    # date, command, models and rows
    assert re.match(r"\d+ \w+ 20\d\d, \d\d:\d\d UTC: python train_dpo.py --data", paragraphs[0])
    assert re.match(r"DPO: GPT2LMHeadModel, [\d,]+ parameters, on \d+ pairs, \d+ h", paragraphs[1])


def test_words_are_explained_where_they_are_used(tmp_path):
    text = page([read_run(write_run(tmp_path / "all"))])
    (told,) = paragraphs(text[: text.index("<h2")], "Score: ")
    assert "Gold reward: the true reward" in told
    assert "Nat: the unit of KL" in told
    rows = rows_of("dpo", accuracy=[0.8])
    plain = page([read_run(write_run(tmp_path / "dpo", metrics=rows, **NO_MORE))])
    assert paragraphs(plain, "Score: ") == paragraphs(plain, "Nat: ") == []


def test_a_verdict_that_cannot_be_written_is_printed_all_the_same(tmp_path, capsys):
    folder = write_run(tmp_path / "run", metrics=[ppo_row(1), ppo_row(40)])
    (folder / "findings.json").mkdir()
    assert finish.show(folder) == ["report.html", "curves.png"]
    printed, warned = capsys.readouterr()
    assert printed.splitlines()[1:] == summary(read_run(folder))[0]
    assert warned.startswith(f"warning: {folder / 'findings.json'} was not written (")


# Notes


def test_notes_are_merged_by_stage_and_name(tmp_path, capsys):
    note(tmp_path, "sft", rows=3, model="GPT2")
    note(tmp_path, "dpo", rows=4)
    note(tmp_path, "sft", rows=5)
    expected = {"sft": {"rows": 5, "model": "GPT2"}, "dpo": {"rows": 4}}
    assert json.loads((tmp_path / NOTES).read_text(encoding="utf-8")) == expected
    (tmp_path / NOTES).write_text('["damaged"', encoding="utf-8")
    note(tmp_path, "ppo", rows=1)
    assert json.loads((tmp_path / NOTES).read_text(encoding="utf-8")) == {"ppo": {"rows": 1}}
    note(tmp_path / "nowhere", "sft", rows=1)
    assert "nowhere/notes.json was not written (No such file" in capsys.readouterr().err
