"""Photos by url: whom the endpoint asks, and what it takes."""

from __future__ import annotations

import socketserver
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from serve.errors import ApiError
from serve.fetch import fetch


@pytest.mark.parametrize(
    "url",
    [
        "http://photos.example/a",
        "https://elsewhere.example/a",
        "https://me@photos.example/a",
        "file:///etc/passwd",
        "https://[::1/",
    ],
)
def test_only_named_hosts_are_asked_for_pictures(url: str) -> None:
    with pytest.raises(ApiError, match="image_url"):
        fetch(url, ["photos.example"], 100)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npicture", b"gibberish\r\n"])
def test_a_named_host_is_asked(answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with photo_host(answer, tmp_path, monkeypatch) as url:
        if answer.startswith(b"HTTP"):
            assert fetch(url, ["localhost"], 100) == b"picture"
            with pytest.raises(ApiError, match="over 3 bytes"):
                fetch(url, ["localhost"], 3)
        else:
            with pytest.raises(ApiError, match="cannot be had"):
                fetch(url, ["localhost"], 100)


@contextmanager
def photo_host(answer: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The url of a photo on an HTTPS server that this process trusts and that answers so."""
    key, certificate = certificate_for_localhost()
    (folder / "both.pem").write_bytes(key + certificate)
    (folder / "certificate.pem").write_bytes(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "certificate.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both.pem")

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"https://localhost:{server.server_address[1]}/photo.png"
        finally:
            server.shutdown()


def certificate_for_localhost() -> tuple[bytes, bytes]:
    """A key and a certificate that it signed itself, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, certificate.public_bytes(Encoding.PEM)
