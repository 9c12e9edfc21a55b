"""One endpoint on the shared Ray, with the tiny model and two tenants."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.tiny import portrait, tiny_booth

if TYPE_CHECKING:
    from ray.serve import Application


@dataclass(frozen=True, kw_only=True)
class Client:
    """Somebody who calls the endpoint."""

    url: str
    key: str | None

    def __call__(self, method: str, path: str, **arguments: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= arguments.pop("headers", {})
        return requests.request(method, f"{self.url}{path}", headers=headers, timeout=60, **arguments)

    def new_concept(self, seed: int = 1, **fields: str) -> str:
        """The id of a concept made of one picture."""
        answer = self("POST", "/v1/concepts", files=[("image", png(seed))], data=fields)
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]


@dataclass(frozen=True, kw_only=True)
class Server:
    url: str
    store: Path
    ada: Client
    bob: Client

    def stranger(self, key: str | None = None) -> Client:
        return Client(url=self.url, key=key)


def png(seed: int, size: int = 40) -> bytes:
    """A tiny picture whose alpha channel is its mask: no model would find a subject in it."""
    buffer = io.BytesIO()
    image, mask = portrait(seed, size)
    image.putalpha(mask)
    image.save(buffer, "PNG")
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="package")
def deployed(
    ray_session: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Application]]:
    """The endpoint, and what it is an application of."""
    from ray import serve

    from serve.app import build
    from serve.config import ServeConfig
    from serve.keys import new_key

    folder = tmp_path_factory.mktemp("endpoint")
    tiny_booth(tiny).save_weights(folder / "weights")
    ada, bob = new_key(), new_key()
    config = ServeConfig(
        base=str(tiny / "base"),
        image_encoder=str(tiny / "clip"),
        weights=str(folder / "weights"),
        store=str(folder / "store"),
        keys={"ada": [ada[1]], "bob": [bob[1]]},
        row_budget=8,
        max_requests=24,
        max_pending_images=20,
        deadline_s=60,
        sweep_s=0.5,
        clean_up_s=0.5,
        max_body_bytes=2_000_000,
        max_image_bytes=1_000_000,
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    application = build(config)
    serve.run(application)
    url = f"http://127.0.0.1:{port}"
    server = Server(
        url=url,
        store=folder / "store",
        ada=Client(url=url, key=ada[0]),
        bob=Client(url=url, key=bob[0]),
    )
    yield server, application
    serve.shutdown()


@pytest.fixture
def server(deployed: tuple[Server, Application]) -> Server:
    """The endpoint, up again where a test took it down."""
    from ray import serve

    server, application = deployed
    if not serve.status().applications:
        serve.run(application)
    return server


@pytest.fixture(scope="package")
def concept(deployed: tuple[Server, Application]) -> str:
    """A concept of ada's."""
    return deployed[0].ada.new_concept()
