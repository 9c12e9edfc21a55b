"""A small proxy before an S3 server that lets a share of the calls go wrong, and remembers what was applied."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

FAULTS = ("unavailable", "reset", "refused", "slow", "truncated", "applied then dropped")
METHODS = ("GET", "PUT", "POST", "HEAD", "DELETE")
HOP_BY_HOP = ("connection", "content-length", "transfer-encoding", "keep-alive")
SLOW_S = 1.5
POLL_S = 0.05
BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER for a socket whose close is a reset."""


@dataclass(kw_only=True)
class FaultProxy:
    """Forwards to `upstream`; started and stopped as a context manager."""

    upstream: str
    """http://host:port."""
    rate: float = 0.0
    """Share of the calls that go wrong; may change while the proxy runs."""
    kinds: tuple[str, ...] = FAULTS
    """What may go wrong."""
    refused_s: float = 0.3
    """Seconds for which no connection is taken where one is refused."""
    faults: Counter[str] = field(default_factory=Counter)
    """Kind → how often."""
    applied: Counter[str] = field(default_factory=Counter)
    """Path → writes that the server has applied, whatever the client was told."""
    calls: Counter[str] = field(default_factory=Counter)
    """Method → calls."""
    random: random.Random = field(default_factory=lambda: random.Random(0))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> FaultProxy:
        # Bound and never listening: the port stays taken while connections are refused.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self._door = threading.Lock()
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        # Never given back: what is closed stays closed.
        self._door.acquire()
        self._close()
        self._place.close()

    def refuse(self, then: Callable[[], None]) -> None:
        """Closes the door for a while, `then` being called at once; where it is closed already, only that."""
        if not self._door.acquire(blocking=False):
            then()
            return
        try:
            self._close()
            then()
            time.sleep(self.refused_s)
            self._open()
        finally:
            self._door.release()

    def _open(self) -> None:
        calls = {f"do_{each}": _Handler.handle_call for each in METHODS}
        self._server = _Server(self._place.getsockname(), type("Handler", (_Handler,), {"proxy": self} | calls))
        threading.Thread(target=self._server.serve_forever, args=(POLL_S,), daemon=True).start()

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """What clients shall take for the server."""
        return f"http://127.0.0.1:{self._place.getsockname()[1]}"

    def draw(self) -> str | None:
        """The fault of the next call, if it is to have one."""
        with self.lock:
            if self.random.random() >= self.rate:
                return None
            fault = self.random.choice(self.kinds)
            self.faults[fault] += 1
            return fault

    def records(self, folder: str) -> int:
        """Records applied so far below a folder of any bucket."""
        with self.lock:
            return sum(count for path, count in self.applied.items() if f"/{folder}/records/" in path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that were killed say no goodbye."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_call(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.draw()
        if fault == "unavailable":
            self._answer(503, {"Content-Type": "application/xml"}, BUSY)
        elif fault == "reset":
            self._reset()
        elif fault == "refused":
            self.proxy.refuse(self._reset)
        elif fault == "truncated" and body:
            self._forward(body[: len(body) // 2], cut=True)
            self._reset()
        else:
            if fault == "slow":
                time.sleep(SLOW_S)
            status, headers, answer = self._forward(body)
            if fault == "applied then dropped":
                self._reset()
            elif fault == "truncated" and answer:
                self._answer(status, headers, answer, sent=len(answer) // 2)
                self._reset()
            else:
                self._answer(status, headers, answer)

    def _forward(self, body: bytes, *, cut: bool = False) -> tuple[int, dict[str, str], bytes]:
        """The server's answer; with `cut` the connection ends before the body does, and there is none."""
        place = urlsplit(self.proxy.upstream)
        connection = HTTPConnection(place.hostname or "", place.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            if cut:
                return 0, {}, b""
            response = connection.getresponse()
            answer = response.read()
        except (OSError, HTTPException):
            return 503, {"Content-Type": "application/xml"}, BUSY
        finally:
            connection.close()
        with self.proxy.lock:
            self.proxy.calls[self.command] += 1
            if self.command == "PUT" and response.status == 200:
                self.proxy.applied[unquote(urlsplit(self.path).path)] += 1
        headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
        if self.command == "HEAD":
            headers["Content-Length"] = response.getheader("Content-Length") or "0"
        return response.status, headers, answer

    def _answer(self, status: int, headers: dict[str, str], body: bytes, *, sent: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        # shutdown() by the server would end the connection politely. An open file on it would put the reset off.
        self.rfile.close()
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass
