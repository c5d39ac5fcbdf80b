"""The notebook runs from top to bottom, and its text does not promise what it does not show."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FILE = Path(__file__).parents[2] / "examples" / "walkthrough.ipynb"


# A tenth of the rows and a short PPO: the cells are the same, and seconds instead of minutes.
CUT = {
    "inputs = world_inputs(world)": "\ninputs.demonstrations = inputs.demonstrations[:1000]"
    "\ninputs.pairs, inputs.heldout_pairs = inputs.pairs[:1000], inputs.heldout_pairs[:200]",
    "ppo_config = PPOConfig(steps=12, seed=SEED)": "\nppo_config = PPOConfig("
    "steps=2, batch_size=64, minibatch_size=32, seed=SEED)",
    "test = inputs.test[:200]": "\ntest = inputs.test[:50]",
}


def run(folder, *, cut):
    """The notebook after a run in an empty folder.

    Args:
        cut: line of a cell -> what is added behind it.
    """
    notebook = nbformat.read(FILE, as_version=4)
    for line, more in cut.items():
        (cell,) = [cell for cell in notebook.cells if line in cell.source.splitlines()]
        cell.source = cell.source.replace(line, line + more)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with less work."""
    return run(tmp_path_factory.mktemp("walkthrough"), cut=CUT)


def printed_by(cell):
    """What a cell wrote, bars aside; it may have come in several parts."""
    return "".join(o.text for o in cell.get("outputs", ()) if o.get("name") == "stdout")


def printed(notebook):
    """What all cells wrote."""
    return "".join(map(printed_by, notebook.cells))


def compared(notebook):
    """The means of SFT, PPO and DPO in some rows of the last table."""
    return {
        name: [float(x) for x in re.findall(r"(-?[\d.]+) \[", line)]
        for name in ("score", "win rate by score", "KL, nats")
        for line in printed(notebook).splitlines()
        if line.startswith(name + " ")
    }


def test_it_compares_three_models_with_the_first(executed):
    rows = compared(executed)
    assert [len(row) for row in rows.values()] == [3, 3, 3]
    assert rows["win rate by score"][0] == 0.5
    sft, ppo, dpo = rows["KL, nats"]
    assert sft == 0
    assert min(ppo, dpo) > 0


@pytest.mark.real
def test_at_its_full_size_both_algorithms_help(tmp_path):
    rows = compared(run(tmp_path, cut={}))
    sft, ppo, dpo = rows["score"]
    assert sft < dpo < ppo  # PPO is trained on the score, DPO on the pairs that made it
    assert rows["win rate by score"][1] > 0.6
    assert rows["KL, nats"][0] == 0 < rows["KL, nats"][2] < rows["KL, nats"][1] < 15


def test_the_first_kl_and_values_are_zero(executed):
    (table,) = [text for text in map(printed_by, executed.cells) if "advantage" in text]
    rows = [line.split()[-4:] for line in table.splitlines()[3:] if line.strip()]
    assert rows
    for kl, _, value, _ in rows:
        assert float(kl) == float(value) == 0


def test_the_committed_outputs_hold_no_path():
    text = FILE.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|usr|Users)/", text)
