"""The commands of many tests ask for the world of the same seed, which takes seconds to make."""

import pickle
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from rlhf_min.world import World, make_world


@lru_cache(maxsize=1)
def _made(*args: Any, **kwargs: Any) -> bytes:
    return pickle.dumps(make_world(*args, **kwargs))


@pytest.fixture(autouse=True, scope="package")
def _a_world_is_made_once() -> Iterator[None]:
    def world(*args: Any, **kwargs: Any) -> World:
        return pickle.loads(_made(*args, **kwargs))  # its own, for who changes rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_min.world.make_world", world)
        yield
