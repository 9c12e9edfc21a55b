"""The Ray cluster a job runs on."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.data

from instantbooth.errors import ParameterError

ROOT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 512 * 2**20
ANSWER_S = 10.0
"""So long a Ray that is named may take to answer."""
MIN_LOGICAL_CPUS = 4
"""Ray's CPUs are only counted, not bound: with 2, a pipeline's own stages and two training workers stall each other."""


@contextmanager
def ray_cluster() -> Iterator[None]:
    """The cluster at RAY_ADDRESS (set inside a Ray job), else one started on this machine and stopped at the end.

    A cluster that this process is connected to already is used and left as it is. Raises ParameterError for a
    RAY_ADDRESS at which no Ray answers.
    """
    set_up_ray_data()
    if ray.is_initialized():
        yield
        return
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            _knock(address)
            ray.init(logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise ParameterError(
                f"RAY_ADDRESS must name a Ray that runs, is {address!r} ({error}); start that one, correct the "
                "address, or unset it for a Ray of the job's own"
            ) from error
    else:
        # Another Ray on this machine, or one that was killed here, would be connected to otherwise.
        ray.init(
            address="local",
            num_cpus=max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": import_path()},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        # Whoever has the token may run code here, and Ray writes it readable for everyone.
        token = Path.home() / ".ray" / "auth_token"
        if token.is_file():
            token.chmod(0o600)
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at host:port: Ray would try for minutes. Other addresses are Ray's."""
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()


def import_path() -> dict[str, str]:
    """The environment in which workers and submitted jobs on this machine find the code."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT), *filter(None, sys.path)])}


def set_up_ray_data() -> None:
    """A row's error is raised as itself, and what Ray Data narrates is left out; warnings of workers stay."""
    context = ray.data.DataContext.get_current()
    context.raise_original_map_exception = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
