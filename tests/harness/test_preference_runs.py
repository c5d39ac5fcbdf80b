"""The comparison of preference losses, with a tiny model, and what its page tells."""

import json
import sys
from pathlib import Path

import find_helpers  # noqa: F401
import preference_losses
import preference_tables
import pytest
import torch
from preference_losses import LOSSES

from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.policy import Policy
from rlhf_min.world import small_gpt2, train_bpe


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Runs the example with a tiny model in an empty folder; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    tokenizer = train_bpe(["What is 1 plus 2? It is 3.", "Happy to help: Monday."], 300)
    save_policy(Policy(small_gpt2(tokenizer, positions=64, seed=0), tokenizer), tmp_path / "sft")

    def run(*arguments):
        given = "--model sft --max_length 64 --max_response_tokens 4 --threads 1 --looks 2"
        monkeypatch.setattr(sys, "argv", ["x", *given.split(), *map(str, arguments)])
        try:
            preference_losses.main()
        except SystemExit as error:
            return error.code
        return 0

    yield run
    torch.set_num_threads(threads)


def test_the_comparison(start, capsys):
    losses = ["apo_down", "simpo", "kto"]
    assert start("--losses", *losses, "--pairs", 256, "--test_prompts", 4) == 0
    told, folder = capsys.readouterr().out, Path("runs/preference_losses")
    points = json.loads((folder / "preference_losses.json").read_text("utf-8"))["points"]
    assert list(points) == losses
    for name, (first, middle, last) in points.items():
        assert (first["step"], middle["step"], last["step"]) == (0, 2, 4), name  # 64 pairs each
        assert (first["chosen"], first["rejected"], first["ranked"]) == (0, 0, 0)
        assert last["ranked"] > 0.5
        assert last["kl"] > 0
        assert 1 <= last["tokens"] <= 4
        assert f"{name}: chosen {last['chosen']:+.2f}" in told
    # It alone pulls the chosen response down.
    assert points["apo_down"][-1]["chosen"] < min(points[x][-1]["chosen"] for x in losses[1:])
    for file, start_of in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (folder / f"preference_losses.{file}").read_bytes().startswith(start_of)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--losses", "kto", "dop"), "loss is 'dop'; it must be one of sigmoid, ipo"),
        (("--pairs", "0"), "pairs is 0; it must be above 0"),
        (("--data", "x.csv"), "--data has no true reward"),
    ],
)
def test_what_is_refused(start, capsys, arguments, told):
    assert start(*arguments) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", LOSSES)
def test_the_pulls_of_the_page_are_those_of_its_formulas(name):
    """`formulas` asserts it of each; here that both sides are told, and as long as they are."""
    chosen, rejected = preference_tables.pulls(name)
    assert chosen >= 0 > rejected
    assert (chosen == 0) == (name == "apo_down")
    (row,) = [x for x in preference_tables.formulas().splitlines() if f"[`{name}`]" in x]
    assert f"| {chosen + 0.0:.3g}" in row
    assert f"| {rejected:.3g} = " in row
