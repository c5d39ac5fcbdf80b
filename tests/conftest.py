"""``pytest --eq gae`` runs the tests that prove the equation with the tag ``[eq:gae]``;
``pytest -m real`` those with real weights or models of full size, which are skipped otherwise."""

import os
import signal

import pytest

# Models of the tests are so small that a second thread only waits: beside other busy processes it
# multiplies the time. Set before torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in the background without SIGINT, and tests send it to their processes.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--eq", metavar="TAG", help="only the tests that prove this equation")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "real" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason="minutes and gigabytes: pytest -m real"))
    wanted = config.getoption("--eq")
    if wanted is None:
        return
    tags_of = {item: {mark.args[0] for mark in item.iter_markers("eq")} for item in items}
    known = set().union(*tags_of.values())
    if wanted not in known:
        raise pytest.UsageError(f"--eq {wanted}: no test proves it; known: {sorted(known)}")
    config.hook.pytest_deselected(items=[item for item in items if wanted not in tags_of[item]])
    items[:] = [item for item in items if wanted in tags_of[item]]
