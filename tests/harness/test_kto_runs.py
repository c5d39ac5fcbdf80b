"""What a run of KTO says of its labels, and what it reads."""

import json
import math
import sys
from dataclasses import replace

import pytest
from small import UNPAIRED, small_policy
from test_cli import example, pairs, write_rows

from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.harness.stages.kto import balance
from rlhf_min.kto import KTOConfig

DESIRABLE = [x for x in UNPAIRED if x.label]
UNDESIRABLE = [x for x in UNPAIRED if not x.label]


def told(desirable, undesirable, **options):
    """What is said of so many rows of each label, all of them different."""
    rows = DESIRABLE[:desirable] + [replace(x, label=False) for x in UNPAIRED[:undesirable]]
    return list(balance(rows, KTOConfig(**options)))


def test_labels_that_are_balanced_are_counted():
    (line,) = balance(UNPAIRED, KTOConfig(undesirable_weight=1.5))
    assert line == (
        "  5 responses are labelled true and 3 false; the true ones weigh 1.11 times as much "
        "together"
    )
    # From 1 to 4/3.
    for weight in (1.0, 4 / 3):
        assert not told(4, 4, desirable_weight=weight)[0].startswith("  warning")
    for weight in (0.98, 1.35):
        assert told(4, 4, desirable_weight=weight)[0].startswith("  warning")


@pytest.mark.parametrize(("desirable", "undesirable"), [(5, 1), (1, 8)])
def test_weights_that_are_recommended_are_in_the_range_that_is_recommended(desirable, undesirable):
    (line, *_) = told(desirable, undesirable, desirable_weight=1.5, undesirable_weight=0.5)
    ratio = 1.5 * desirable / (0.5 * undesirable)
    of_true = "1 response is" if desirable == 1 else f"{desirable} responses are"
    start = (
        f"  warning: {of_true} labelled true and {undesirable} false, so the true "
        f"ones weigh {ratio:.3g} times as much together, beside the recommended 1 to 1.33; give "
    )
    assert line.startswith(start)
    words = line.removeprefix(start).replace(",", "").split()
    given = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    for option, low, high in ((words[0], *words[1:4:2]), (words[5], *words[6:9:2])):
        for weight in (float(low), float(high)):
            changed = given | {option.removeprefix("--"): weight}
            weighed = [changed["desirable_weight"] * desirable]
            weighed.append(changed["undesirable_weight"] * undesirable)
            assert 1 - 0.01 <= weighed[0] / weighed[1] <= 4 / 3 + 0.01


def test_one_label_alone_is_warned_of():
    assert told(3, 0) == [
        "  warning: 3 responses are labelled true and 0 false, so KTO only raises what it is "
        "shown, like SFT; give responses of both kinds"
    ]
    assert "KTO only lowers what it is shown; give responses of both" in told(0, 3)[0]


def test_a_response_that_has_both_labels_is_counted():
    # The first rows of both are 0, 2, 3 and 0, 1, 2.
    line = "  labelled true in one row and false in another: "
    assert told(3, 3)[1:] == [f"{line}2 responses"]
    assert told(1, 1)[1:] == [f"{line}1 response"]
    assert list(balance(UNPAIRED, KTOConfig()))[1:] == []


def test_kto_trains_on_pairs_that_are_taken_apart(tmp_path, monkeypatch, capsys):
    save_policy(small_policy(), tmp_path / "sft")
    data = write_rows(tmp_path / "pairs.jsonl", pairs(12))
    line = (
        f"train_kto.py --data {data} --model {tmp_path}/sft --out {tmp_path}/run --max_length 16 "
    )
    line += "--max_response_tokens 8 --epochs 1 --batch_size 8"
    monkeypatch.setattr(sys, "argv", line.split())
    example("train_kto").main()
    out = capsys.readouterr().out
    assert "  each pair is two rows: chosen, label true; rejected, label false\n" in out
    notes = json.loads((tmp_path / "run/notes.json").read_text(encoding="utf-8"))
    accuracy = notes["kto"]["accuracy"]
    assert accuracy["held out"]["one_label"] == 0.5
    assert accuracy["trained on"]["n"] == notes["kto"]["rows"]
    assert any("are labelled true and" in line for line in notes["kto"]["report"])
    rows = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(math.isfinite(json.loads(row)["kl"]) for row in rows)
