"""The notebook runs from top to bottom, and its text does not promise what it does not show."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FILE = Path(__file__).parent.parent / "examples" / "walkthrough.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run in an empty folder."""
    notebook = nbformat.read(FILE, as_version=4)
    folder = tmp_path_factory.mktemp("walkthrough")
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    return notebook


def printed(notebook):
    """What the code cells wrote, bars aside."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(o.text for o in outputs if o.get("name") == "stdout")


def test_it_trains_and_compares(executed):
    text = printed(executed)
    rows = {
        name: [float(x) for x in re.findall(r"(-?[\d.]+) \[", line)]
        for name in ("score", "win rate by score", "KL, nats")
        for line in text.splitlines()
        if line.startswith(name + " ")
    }
    sft, ppo, dpo = rows["score"]
    assert sft < dpo < ppo  # PPO is trained on the score, DPO on the pairs that made it
    assert rows["win rate by score"][1] > 0.6
    assert rows["KL, nats"][0] == 0 < rows["KL, nats"][2] < rows["KL, nats"][1] < 15


def test_the_first_kl_and_values_are_zero(executed):
    (table,) = [
        output.text
        for cell in executed.cells
        for output in cell.get("outputs", ())
        if "advantage" in output.get("text", "")
    ]
    rows = [line.split()[-4:] for line in table.splitlines()[3:] if line.strip()]
    assert rows
    for kl, _, value, _ in rows:
        assert float(kl) == float(value) == 0


def test_the_committed_outputs_hold_no_path():
    text = FILE.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|usr|Users)/", text)
