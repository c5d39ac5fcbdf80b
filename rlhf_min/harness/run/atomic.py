"""Files and folders that are written whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rlhf_min.errors import BadInput, require
from rlhf_min.harness.run import processes
from rlhf_min.harness.run.layout import OLD, discard


class NotWritten(BadInput):
    """The disk does not take what a run has made."""


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it is on the disk."""
    with saving(folder) as new:
        yield new
        publish(new, folder)


@contextmanager
def saving(folder: Path, *, begun: bool = False) -> Iterator[Path]:
    """Where the folder is until it is complete: empty, or as it was `begun`. An error inside
    removes that.

    Raises:
        NotWritten: for what the disk refuses.
    """
    require(not folder.is_file(), f"{folder}: could not be saved: there is a file of this name")
    new = folder.with_name(f".{folder.name}-{os.getpid()}")
    sound = False
    try:
        if not begun:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        yield new
        sound = True
    # A full disk is an OSError for us, a SafetensorError or a RuntimeError for the libraries.
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise NotWritten(f"{folder}: could not be saved: {reason}") from error
    finally:
        if not sound:
            shutil.rmtree(new, ignore_errors=True)


def write_file(file: Path, content: str | bytes) -> None:
    """Write a file that is whole or, if the disk refuses it, as it was before.

    Names of files that are not UTF-8 may stand in a text; they are written with escapes. Of several
    processes the first writes.
    """
    if not processes.is_main():
        return
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    new = file.with_name(f".{file.name}")
    try:
        new.write_bytes(content)
        flush(new)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def publish(new: Path, folder: Path) -> None:
    """Flush everything in a folder to the disk, and give it its name in the place of another.

    Files of the user's that lay in the other move on into it.
    """
    old = new.with_name(f"{new.name}{OLD}")
    for path in [*new.rglob("*"), new]:
        if path.is_file():
            path.chmod(0o644)  # safetensors makes its files readable for their owner only
        flush(path)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    flush(folder.parent)
    if old.exists():
        discard(old, folder)


def flush(path: Path) -> None:
    """Until the file, or the folder's list of names, is on the disk (where folders have that)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
