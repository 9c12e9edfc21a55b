"""Every fault of the proxy is what its name says, seen from a client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, IncompleteRead, RemoteDisconnected
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import pytest

from tests.chaos.proxy import SLOW_S, FaultProxy

BODY = b"all of it"


class Server(ThreadingHTTPServer):
    """Keeps what is put, in whole, and tells it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Objects)
        self.objects: dict[str, bytes] = {}

    def handle_error(self, *_: object) -> None:
        """Uploads that break off are meant to."""


class Objects(BaseHTTPRequestHandler):
    server: Server

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if len(body) == int(self.headers["Content-Length"]):
            self.server.objects[self.path] = body
            self._answer(b"")

    def do_GET(self) -> None:
        self._answer(self.server.objects[self.path])

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def faulty(server: Server, kind: str, **settings: float) -> Iterator[FaultProxy]:
    """A proxy whose every call goes wrong in one way."""
    with FaultProxy(upstream=f"http://127.0.0.1:{server.server_port}", rate=1.0, kinds=(kind,), **settings) as proxy:
        yield proxy
        assert set(proxy.faults) == {kind}


def call(proxy: FaultProxy, method: str, body: bytes | None = None) -> tuple[int, bytes]:
    place = urlsplit(proxy.url)
    connection = HTTPConnection(str(place.hostname), place.port, timeout=10)
    try:
        connection.request(method, "/bucket/key", body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_without_faults_the_proxy_changes_nothing(server: Server) -> None:
    with FaultProxy(upstream=f"http://127.0.0.1:{server.server_port}") as proxy:
        assert call(proxy, "PUT", BODY) == (200, b"")
        assert call(proxy, "GET") == (200, BODY)
        assert (proxy.applied, proxy.calls) == ({"/bucket/key": 1}, {"PUT": 1, "GET": 1})
        assert not proxy.faults


def test_an_unavailable_server_answers_and_does_nothing(server: Server) -> None:
    with faulty(server, "unavailable") as proxy:
        assert call(proxy, "PUT", BODY)[0] == 503
        assert not server.objects


@pytest.mark.parametrize(("kind", "applied"), [("reset", False), ("truncated", False), ("applied then dropped", True)])
def test_a_write_without_an_answer_has_taken_place_or_not(server: Server, kind: str, applied: bool) -> None:
    with faulty(server, kind) as proxy:
        with pytest.raises((ConnectionResetError, RemoteDisconnected)):
            call(proxy, "PUT", BODY)
        assert (server.objects == {"/bucket/key": BODY}) is applied
        assert bool(proxy.applied) is applied


def test_a_truncated_answer_says_how_long_it_was_to_be(server: Server) -> None:
    server.objects["/bucket/key"] = BODY
    with faulty(server, "truncated") as proxy, pytest.raises((IncompleteRead, ConnectionResetError)):
        call(proxy, "GET")


def test_a_slow_call_is_answered_in_the_end(server: Server) -> None:
    with faulty(server, "slow") as proxy:
        started = time.monotonic()
        assert call(proxy, "PUT", BODY)[0] == 200
        assert time.monotonic() - started >= SLOW_S


def test_connections_are_refused_for_a_while_and_then_taken_at_the_same_place(server: Server) -> None:
    with faulty(server, "refused", refused_s=1.0) as proxy:
        with pytest.raises((ConnectionResetError, RemoteDisconnected)):
            call(proxy, "PUT", BODY)
        with pytest.raises(ConnectionRefusedError):
            call(proxy, "PUT", BODY)
        assert not server.objects
        proxy.rate = 0.0
        assert call_patiently(proxy, "PUT", BODY) == (200, b"")
        assert server.objects == {"/bucket/key": BODY}


def call_patiently(proxy: FaultProxy, method: str, body: bytes) -> tuple[int, bytes]:
    """Tries until a connection is taken, for 10 s."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return call(proxy, method, body)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the door stays closed"
            time.sleep(0.1)
