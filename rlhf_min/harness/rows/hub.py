"""Rows that the `datasets` library finds: in a folder of files, or under a name on the Hub."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants

from rlhf_min.encoding.conversation import Place
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.rows.files import (
    FORMATS,
    SUFFIXES,
    Row,
    check_room,
    format_of,
    printable,
    read_file,
)
from rlhf_min.loading import sources

LISTED = 40  # configurations that a message names

_NOT_READ = (  # what the library raises
    OSError,  # offline, unknown, forbidden, or empty
    ValueError,  # no such split, or a configuration is missing
    RuntimeError,
    datasets.exceptions.DatasetsError,
)


def load_hub(data: str, split: str) -> datasets.Dataset:
    """The rows of a dataset on the Hub, or of its copy in the cache if the Hub is out of reach.

    Raises:
        BadInput: there is no such dataset, configuration or split.
    """
    name, _, config = data.partition(":")
    with _offline_without_the_hub() as unanswered:
        try:
            if not config:
                return datasets.load_dataset(name, split=split)
            return datasets.load_dataset(name, config, split=split)
        except _NOT_READ as error:
            _check_config(name, name, config, error)
            require(
                not unanswered,
                f"{data}: no such file here, none of this name in the cache, and the Hub "
                f"({constants.ENDPOINT}) cannot be asked: no answer within "
                f"{sources.HUB_SECONDS:g} s; look at the name, go online, or give a file",
            )
            raise BadInput(
                f"{data}: no such file here, and the Hub does not give the split {split!r} of such "
                f"a dataset ({_short(error)}); look at the name and --split, go online, or give a "
                "file"
            ) from error


def read_folder(
    folder: str, config: str, split: str | None, usual: str
) -> tuple[str, list[tuple[Place, Row]], list[str]]:
    """The rows of one split of a folder: of its files, or of what `save_to_disk` wrote.

    Args:
        config: of a folder that has several; "" if none is named.
        split: its name; None for the `usual` one, or the only one that there is.

    Returns:
        The split, the rows with their places, and files that would be rows but belong to no split.

    Raises:
        BadInput: there are no files, or no such split, or one of the files cannot be read.
    """
    source = printable(folder)
    if any((Path(folder) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        saved = _saved(folder, source)
        splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {usual: saved}
        name = _split(source, list(map(str, splits)), split, usual)
        return name, list(enumerate(splits[name].to_list(), start=1)), []
    files = _files(folder, config, source)
    name = _split(source, list(files), split, usual)
    check_room(sum(map(os.path.getsize, files[name])), source)
    rows: list[tuple[Place, Row]] = []
    for file in files[name]:
        short = os.path.relpath(file, folder)
        of_file = read_file(file, printable(os.path.join(folder, short)))
        rows += [(f"{printable(short)}:{number}", row) for number, row in of_file]
    known = {os.path.abspath(file) for of_split in files.values() for file in of_split}
    left = [
        str(path.relative_to(folder))
        for path in sorted(Path(folder).rglob("[!.]*"))
        if format_of(path) in SUFFIXES
        and os.path.abspath(path) not in known
        and not path.name.startswith("dataset_info")  # what the library notes beside the files
    ]
    return name, rows, [] if config else left


def _saved(folder: str, source: str) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_from_disk(folder)
    except (*_NOT_READ, KeyError, TypeError) as error:
        raise BadInput(
            f"{source}: this saved dataset cannot be read ({_short(error)}); save it again"
        ) from error


def _files(folder: str, config: str, source: str) -> dict[str, list[str]]:
    """The files of each split, found by the library's rules for names and configurations."""
    whole = os.path.abspath(folder)  # a relative path could be a name on the Hub
    try:
        builder = datasets.load_dataset_builder(whole, name=config or None)
    except _NOT_READ as error:
        _check_config(whole, source, config, error)
        none = isinstance(error, FileNotFoundError)
        why = "" if none else f" that cannot be read ({_short(error)})"
        raise BadInput(f"{source}: this is a folder{why}; give a {FORMATS} file in it") from error
    found: Any = builder.config.data_files or {}
    return {str(split): [str(file) for file in files] for split, files in found.items()}


def _split(source: str, names: Sequence[str], split: str | None, usual: str) -> str:
    if split is None:
        split = names[0] if len(names) == 1 else usual
    require(
        split in names,
        f"{source}: there is no split {split!r}; give one of {', '.join(names)} as --split or "
        "--heldout_split",
    )
    return split


def _check_config(name: str, source: str, config: str, error: Exception) -> None:
    """Name all configurations if the error is about a missing or an unknown one."""
    if not isinstance(error, ValueError):
        return
    try:
        names = datasets.get_dataset_config_names(name)
    except _NOT_READ:
        return
    if config in names or (not config and len(names) < 2):
        return
    listed = ", ".join(names[:LISTED]) + f" and {len(names) - LISTED} more" * (len(names) > LISTED)
    what = f"there is no configuration {config}" if config else "it has several configurations"
    raise BadInput(f"{source}: {what}; give one of {listed}, like {source}:{names[0]}") from error


def _short(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return reason if len(reason) <= 160 else reason[:157] + "..."


@contextmanager
def _offline_without_the_hub() -> Iterator[bool]:
    """Inside, a Hub that does not answer is not asked again. Whether that is so."""
    places: tuple[Any, ...] = (datasets.config, constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    unanswered = not any(before) and not sources.hub_answers()
    if unanswered:
        for place in places:
            place.HF_HUB_OFFLINE = True
    try:
        yield unanswered
    finally:
        for place, was in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = was
