"""The README's tables that follow from the source: equations, and conventions with their tests.

python tests/readme_tables.py            # prints them
python tests/readme_tables.py --write    # puts them between their marks in README.md
"""

import argparse
import ast
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from test_conventions import CONVENTIONS, Convention, case
from test_house import FLOORS, ROOT, SOURCES, TAG, TESTS, definitions, module_name

README = ROOT / "README.md"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


# Equations


def equations() -> str:
    """Tag, source, place, proof and counterpart of each, from the floors upwards."""
    order = [name for floor in FLOORS for name in floor]
    stated = [
        (order.index(module_name(path).partition(".")[0]), node.lineno, tag, path, node)
        for path in SOURCES
        for node in definitions(path)
        for tag in TAG.findall(ast.get_docstring(node) or "")
    ]
    head = ("equation", "source", "stated in", "proved by", "in trl")
    return table(head, [row(tag, path, node) for *_, tag, path, node in sorted(stated)])


def row(tag: str, path: Path, node: ast.FunctionDef | ast.ClassDef) -> tuple[str, ...]:
    paper, in_trl = source(ast.get_docstring(node) or "")
    file = path.relative_to(ROOT).as_posix()
    first, *others = proofs(tag, node.name)
    more = f", {len(others)} more" if others else ""
    place = f"[`{node.name}`]({file}#L{node.lineno}), `{path.name}:{node.lineno}`"
    return f"`{tag}`", paper, place, f"`{first}`{more}", in_trl


def source(docstring: str) -> tuple[str, str]:
    """Of what stands under Source: the papers, and the counterpart in trl."""
    (text,) = re.findall(r"^Source: (.*?)(?:\n\n|\Z)", docstring, re.DOTALL | re.MULTILINE)
    words = " ".join(text.split()).replace("``", "`")
    paper, _, in_trl = words.removesuffix(".").partition("; trl ")
    return paper, in_trl


def proofs(tag: str, function: str) -> list[str]:
    """The tests that carry the tag. First those of the function alone, last those beside trl."""
    found = [test for test, tags in tags_of_tests().items() if tag in tags]
    return sorted(found, key=lambda test: ("parity" in test, f"::test_{function}" not in test))


@cache
def tags_of_tests() -> dict[str, set[str]]:
    return {
        f"{path.relative_to(ROOT).as_posix()}::{node.name}": {
            call.args[0].value
            for call in node.decorator_list
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.eq"
        }
        for path in TESTS
        for node in definitions(path)
    }


# Conventions


def conventions() -> str:
    """What is done here and elsewhere, and the number that it decides."""
    head = ("convention", "here", "elsewhere", "the number", "test")
    return table(head, [cells(key, convention) for key, convention in CONVENTIONS.items()])


def cells(key: str, convention: Convention) -> tuple[str, ...]:
    others = [f"{x.what} ({x.who}): `{x.number:g}`" for x in convention.elsewhere]
    here = f"{convention.here}: `{convention.number:g}`"
    tests = [f"`[{case(key, other)}]`" for other in convention.elsewhere]
    return convention.title, here, "; ".join(others), convention.meaning, ", ".join(tests)


SECTIONS = {"equations": equations, "conventions": conventions}


def put(text: str, name: str, content: str) -> str:
    """The text with this content between the marks of a section."""
    begin, end = f"<!-- begin:{name} -->\n", f"<!-- end:{name} -->"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    assert (begun, ended) == (begin, end), f"README.md has no place for {name}"
    return f"{before}{begin}{content}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="Write them into README.md.")
    write = parser.parse_args().write
    text = README.read_text(encoding="utf-8")
    for name, make in SECTIONS.items():
        text = put(text, name, make())
        if not write:
            print(make(), end="\n\n")
    if write:
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
