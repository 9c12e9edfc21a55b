"""One Ray for the whole run, and an environment in which nothing reaches the network."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from instantbooth import Personalizer

# Ray's workers inherit these. Set before torch is first imported: several torch processes with a thread per core each
# starve one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

# A busy machine is no failure. The same tree has the same result; --hypothesis-profile=explore looks for others.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of four logical CPUs: with two, a pipeline's stages and two training workers wait for each other."""
    # Starting Ray takes 5 to 18 s, and importing it seconds more: tests without it shall not pay.
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=500_000_000,
        _node_ip_address="127.0.0.1",
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/ and clip/: a model with random weights, in the true formats."""
    from tests.tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def booth(tiny: Path) -> Personalizer:
    """The tiny model with open gates; shared, so tests leave it as it is."""
    from tests.tiny import tiny_booth

    return tiny_booth(tiny)
