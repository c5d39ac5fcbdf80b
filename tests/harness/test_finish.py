import errno
import os
import sys

import pytest

from rlhf_min.errors import BadInput
from rlhf_min.harness.cli import command
from rlhf_min.harness.report import figures, finish, page
from rlhf_min.harness.run.atomic import write_file
from rlhf_min.harness.run.signals import Stopped


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}", encoding="utf-8")
    row = '{"stage": "sft", "step": 1, "loss": 2.0}\n'
    (folder / "metrics.jsonl").write_text(row, encoding="utf-8")
    return folder


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_a_run_is_shown(run, capsys):
    assert finish.show(run) == ["report.html", "curves.png"]
    assert capsys.readouterr().err == ""
    assert {p.name for p in run.iterdir()} == {
        *("run.json", "metrics.jsonl", "findings.json", "report.html"),
        *("curves.png", "curves.svg"),
    }


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), "OSError: Stale file handle"),
        (OSError("in a library's own words"), "OSError: in a library's own words"),
        (BadInput("run.json: cannot be read"), "BadInput: run.json: cannot be read"),
        (RuntimeError("of a font\nthat is odd"), "RuntimeError: of a font that is odd"),
        (KeyError("prompt"), "KeyError: 'prompt'"),
        (MemoryError(), "MemoryError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_picture_or_a_page_that_fails_is_one_warning(run, monkeypatch, capsys, error, told):
    monkeypatch.setattr(page, "write_report", raising(error))
    monkeypatch.setattr(figures, "write_curves", raising(error))
    assert finish.show(run) == []
    again = f"examples/make_report.py {run} makes it again"
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {run}/{name} was not written ({told}); {again}"
        for name in ("report.html", "curves.png")
    ]


def test_who_ends_the_process_is_not_held_up(run, monkeypatch):
    monkeypatch.setattr(page, "write_report", raising(SystemExit(3)))
    with pytest.raises(SystemExit, match="3"):
        finish.show(run)


def test_a_folder_in_the_place_of_the_page_stays(run, capsys):
    (run / "report.html").mkdir()
    (run / "report.html" / "mine").touch()
    assert finish.show(run) == ["curves.png"]
    assert "report.html was not written (IsADirectoryError: Is a directory)" in (
        capsys.readouterr().err
    )
    assert [p.name for p in (run / "report.html").iterdir()] == ["mine"]


def test_without_a_library_for_pictures_there_is_a_page(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert finish.show(run) == ["report.html"]
    assert "curves.png was not written (ModuleNotFoundError" in capsys.readouterr().err
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<p>No figure: " in text
    assert "2.000 at step 1." in text


def test_a_file_that_the_disk_refuses_is_as_it_was(run, monkeypatch):
    write_file(run / "a", "before \udcff")
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_file(run / "a", b"after")
    assert (run / "a").read_bytes() == rb"before \udcff"
    assert {p.name for p in run.iterdir()} == {"run.json", "metrics.jsonl", "a"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EFBIG, "File too large")])
def test_how_a_stopped_run_goes_on_is_told_before_its_page_is_made(run, monkeypatch, capsys, error):
    monkeypatch.setattr(page, "write_report", raising(error))

    @command
    def main():
        raise Stopped("stopped by a signal; go on with: python x --resume run", run, 143)

    with pytest.raises(SystemExit, match="143"):
        main()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "stopped by a signal; go on with: python x --resume run"  # on request: no error
    assert second.startswith(f"warning: {run}/report.html was not written (")
