"""The tables of rlhf_min/README.md against source, tests and trl: equations, conventions, words."""

import ast
import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import pytest
from readme_tables import README, SECTIONS, equations, put
from test_house import PACKAGE, ROOT, SOURCES, TAG, bound_names, definitions, docstrings, tree

TEXT = README.read_text(encoding="utf-8")
RECORDED = json.loads((ROOT / "tests/parity/recorded/names.json").read_text(encoding="utf-8"))


def rows(title: str) -> list[list[str]]:
    """The cells of the one table of a section, without its head."""
    (section,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_generated_table_is_what_the_script_writes(name):
    readme, make = SECTIONS[name]
    text = readme.read_text(encoding="utf-8")
    assert put(text, name, make()) == text, "python tests/tools/readme_tables.py --write"


def test_each_equation_has_a_row_with_a_source_a_place_and_a_proof():
    found = [line.strip("| ").split(" | ") for line in equations().splitlines()[2:]]
    stated = [tag for path in SOURCES for text in docstrings(path) for tag in TAG.findall(text)]
    assert sorted(tag for tag, *_ in found) == sorted(f"`{tag}`" for tag in stated)
    for _, paper, place, proof, *_ in found:
        assert paper
        file, line = re.search(r"\((\S+)#L(\d+)\)", place).groups()
        code = (PACKAGE / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(r"def |class |@dataclass", code)
        (file, name) = re.fullmatch(r"`(tests/\S+)::(\w+)`", proof).groups()
        assert name in {node.name for node in definitions(ROOT / file)}


def test_the_numbers_of_an_equation_lead_to_its_lines():
    links = re.findall(r"\((\d)\) \[\d+\]\((\S+)#L(\d+)\)", equations())
    assert len(links) >= 40
    for number, file, line in links:
        code = (PACKAGE / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert f"({number})" in code.partition("#")[2]


# Words


@cache
def own_names() -> set[str]:
    return {name for path in SOURCES for _, name in bound_names(tree(path))}


@cache
def names_of_trl() -> set[str]:
    """Identifiers of the trainers of 1.12.0 and the options of those of 0.11.3."""
    folder = Path(importlib.util.find_spec("trl").submodule_search_locations[0])
    files = [*(folder / "experimental/ppo").glob("ppo_*.py")]
    files += [folder / f"trainer/{kind}_{part}.py" for kind in ("dpo", "kto", "reward", "sft")
              for part in ("trainer", "config")]  # fmt: skip
    found = {name for options in RECORDED.values() for name in options}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                    found.add(name)
                case ast.Constant(value=str(name)):  # a column of the data
                    found.add(name)
    return found


@pytest.mark.parametrize("row", rows("Words"), ids=lambda row: row[0])
def test_our_words_are_names_here_and_theirs_in_trl(row):
    ours, theirs, _ = row
    assert names(ours)
    assert set(names(ours)) <= own_names()
    assert names(theirs)
    assert set(names(theirs)) <= names_of_trl()


def test_a_concept_has_one_row():
    told = [name for ours, *_ in rows("Words") for name in names(ours)]
    assert sorted(told) == sorted(set(told))
