import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_min.harness.run import terminal
from rlhf_min.harness.run.terminal import is_read, outlive_terminal

# Run by its path, so that nothing else is imported and Python starts at once.
SCRIPT = f"""
import runpy, sys
runpy.run_path({terminal.__file__!r})["outlive_terminal"]()
for i in range(3000):
    print("a long line of a run \\u2192 \\udcff", i)
    print("and one of its bar", i, file=sys.stderr)
open("done", "w").close()
print("the end", end="")
"""


@pytest.fixture
def stream(monkeypatch):
    """Makes a stream to a descriptor stdout, as Python's own."""

    def make(descriptor, **settings):
        made = io.TextIOWrapper(
            io.BufferedWriter(io.FileIO(descriptor, "w")), **{"encoding": "utf-8"} | settings
        )
        monkeypatch.setattr(sys, "stdout", made)
        monkeypatch.setattr(sys, "__stdout__", made)
        outlive_terminal()
        return sys.stdout

    return make


def pipe_without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("how", ["no reader", "full", "closed", "read-only"])
def test_a_script_ends_well_whatever_has_become_of_its_terminal(tmp_path, name, how):
    """Also when Python flushes its streams at its end, where a failure would be exit code 120."""
    number = 1 if name == "stdout" else 2
    if how == "full" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    start = f"import os, sys; os.execv(sys.executable, [sys.executable, '-c', {SCRIPT!r}])"
    if how == "closed":
        start = f"import os; os.close({number}); {start}"
    opened = {
        "no reader": pipe_without_reader,
        "full": lambda: os.open("/dev/full", os.O_WRONLY),
        "closed": lambda: os.open(os.devnull, os.O_WRONLY),
        "read-only": lambda: os.open(os.devnull, os.O_RDONLY),
    }[how]()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {name: opened}
    command = [sys.executable, "-c", start]
    ended = subprocess.run(command, cwd=tmp_path, timeout=60, encoding="utf-8", **streams)
    os.close(opened)
    assert ended.returncode == 0
    assert (tmp_path / "done").exists()
    other = ended.stderr if name == "stdout" else ended.stdout
    assert len(other.splitlines()) == (3000 if name == "stdout" else 3001)
    assert "BrokenPipe" not in other


def test_what_there_is_no_letter_for_is_escaped(stream):
    reader, writer = os.pipe()
    for encoding, errors, shown in (
        ("ascii", "strict", rb"a \xe9 \u2192 \udcff"),
        ("utf-8", "surrogateescape", "a é → ".encode() + rb"\udcff"),
        ("utf-8", "strict", "a é → ".encode() + rb"\udcff"),
        ("ascii", "replace", b"a ? ? ?"),
    ):
        out = stream(os.dup(writer), encoding=encoding, errors=errors)
        print("a é → \udcff", end="", flush=True)
        assert os.read(reader, 100) == shown
        assert (out.encoding, is_read()) == (encoding, True)
    os.close(reader)
    os.close(writer)


def test_printing_goes_on_when_there_is_room_again(stream, tmp_path, monkeypatch):
    file = (tmp_path / "log").open("wb", buffering=0)
    out = stream(os.dup(file.fileno()), line_buffering=True)
    raw = out.buffer.raw._raw

    def full(_):
        raise OSError(28, "No space left on device")

    print("before")
    with monkeypatch.context() as patch:
        patch.setattr(out.buffer.raw, "_raw", type("Full", (), {"write": staticmethod(full)}))
        print("dropped")
        assert not is_read()
    assert out.buffer.raw._raw is raw
    print("after")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "before\nafter\n"


def test_a_stream_of_somebody_else_stays_as_it_is(monkeypatch):
    ours = io.StringIO()
    monkeypatch.setattr(sys, "stdout", ours)
    outlive_terminal()
    assert sys.stdout is ours
    assert is_read()
