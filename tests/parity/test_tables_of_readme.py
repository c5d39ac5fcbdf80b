"""The tables of README.md here: parity as the command prints it, and every name of trl's PPO."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from recordings import FOLDER
from tolerances import FP64, LEGACY_STEP

from rlhf_min.ppo import UPDATE_STATS, PPOConfig

ROOT = Path(__file__).parent.parent.parent
NAMES = json.loads((FOLDER / "names.json").read_text(encoding="utf-8"))
README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "examples/compare/coming_from_trl.md").read_text(encoding="utf-8")
GAP = re.compile(r"0|[1-9]e-\d\d")

Cells = list[str]


def tables(text: str) -> list[list[Cells]]:
    """The markdown tables in a text, without their second lines."""
    found: list[list[Cells]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


def section(page: str, title: str) -> str:
    (text,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return text


@pytest.fixture(scope="module")
def printed() -> dict[str, list[Cells]]:
    """The tables that the command prints, by its option; both processes run at once."""
    script = str(ROOT / "tests/tools/parity_table.py")
    started = {
        option: subprocess.Popen(
            [sys.executable, script, option, *more], stdout=subprocess.PIPE, encoding="utf-8"
        )
        for option, *more in (("--list",), ("--only", "masked_mean"))
    }
    found = {}
    for option, process in started.items():
        out, _ = process.communicate()
        assert process.returncode == 0
        (found[option],) = tables(out)
    return found


def test_the_parity_table_lists_what_is_compared(printed: dict[str, list[Cells]]) -> None:
    # All but the digits of the differences, which another processor may round otherwise.
    (told,) = tables(section(README, "Checked against trl"))
    column = told[0].index("largest difference")
    for row in told[1:]:
        assert GAP.fullmatch(row[column]), row
        is_step = row[:2] == ["`ppo.train`", "`PPOTrainer.step` 0.11.3"]
        assert float(row[column]) <= (LEGACY_STEP if is_step else FP64)
        row[column] = "-"
    assert told == printed["--list"]


def test_the_command_prints_what_the_tests_find(printed: dict[str, list[Cells]]) -> None:
    head, row = printed["--only"][:2]
    assert row[head.index("function")] == "`masked_mean`"
    assert GAP.fullmatch(row[head.index("largest difference")])


def told_names(column: int, table: list[Cells]) -> dict[str, str | None]:
    """The names in a column, with the value that stands in brackets behind some."""
    text = " ".join(row[column] for row in table[1:])
    names: dict[str, str | None] = {}
    for name, value in re.findall(r"`([\w/]+)`(?: \(([^)]*)\))?", text):
        names[name] = names.get(name) or value or None
    return names


def same(told: str, default: object) -> bool:
    if isinstance(default, float | int) and not isinstance(default, bool):
        return float(told) == default
    return told == str(default)


def check_fields(told: dict[str, str | None], fields: dict[str, object]) -> None:
    assert fields.keys() <= told.keys(), sorted(fields.keys() - told.keys())
    wrong = {
        name: (told[name], default)
        for name, default in fields.items()
        if told[name] is not None and not same(told[name], default)
    }
    assert wrong == {}


def fields_of_1_12() -> dict[str, object]:
    """What its PPO declares itself, beside the Trainer's arguments."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.ppo import PPOConfig as TheirConfig

    defaults = {field.name: field.default for field in dataclasses.fields(TheirConfig)}
    return {name: defaults[name] for name in TheirConfig.__annotations__ if name in defaults}


def test_every_field_of_both_configs_is_told_with_its_default() -> None:
    _, fields, _ = tables(section(PAGE, "PPO"))
    legacy = {k: v for k, v in NAMES["PPOConfig"].items() if k != "exp_name"}
    check_fields(told_names(1, fields), legacy)
    check_fields(told_names(2, fields), fields_of_1_12())
    ours = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
    check_fields(told_names(0, fields), ours)
    assert ours.keys() <= {name for name, value in told_names(0, fields).items() if value}


def test_every_metric_of_both_trainers_is_told() -> None:
    _, _, metrics = tables(section(PAGE, "PPO"))
    legacy, current = told_names(1, metrics), told_names(2, metrics)
    assert set(NAMES["PPOTrainer.step"]) <= legacy.keys()
    assert set(NAMES["PPOv2Trainer.train"]) <= current.keys()  # 1.12.0 has kept their names
    assert set(UPDATE_STATS) <= told_names(0, metrics).keys()
