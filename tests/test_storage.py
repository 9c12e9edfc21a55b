from __future__ import annotations

import os
import pickle
import re
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import SSLError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from moto import mock_aws

from instantbooth.errors import ConditionalWriteError, MissingObjectError, StorageError, TransientStorageError
from instantbooth.storage import ObjectStore, _as_storage_error, check_object_uri, open_store, open_uri, read_uri


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in [("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")]:
        monkeypatch.setenv(f"AWS_{name}", value)
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="booth")
        yield "booth"


@pytest.fixture(params=["file", "path", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "s3":
        return open_store(f"s3://{request.getfixturevalue('bucket')}/some/prefix/")
    folder = tmp_path / "a folder #1 100%"
    return open_store(folder.as_uri() if request.param == "file" else str(folder))


def test_an_object_comes_back_by_key_and_by_uri(store: ObjectStore) -> None:
    key = "concepts/ada ü 50%#1?.bin"
    assert not store.exists(key)
    store.put(key, b"old")
    store.put(key, b"new")
    assert store.exists(key)
    assert store.get(key) == read_uri(store.uri(key)) == pickle.loads(pickle.dumps(store)).get(key) == b"new"
    with open_uri(store.uri(key)) as file:
        assert (file.read(1), file.seek(0), file.read()) == (b"n", 0, b"new")
    with pytest.raises(StorageError, match="none"), open_uri(store.uri("none")):
        pass


def test_keys_are_listed_by_prefix_and_sorted(store: ObjectStore) -> None:
    assert list(store.list()) == []
    for key in ["b/2", "b/10", "a", "b!", "b/c/d", "bb/1"]:
        store.put(key, b"")
    assert list(store.list()) == ["a", "b!", "b/10", "b/2", "b/c/d", "bb/1"]
    assert list(store.list("b/")) == ["b/10", "b/2", "b/c/d"]
    assert list(store.list("b/c/")) == ["b/c/d"]
    assert list(store.list("b/1")) == ["b/10"]
    assert list(store.list("nothing/")) == []


def test_the_first_writer_wins_and_only_the_first(store: ObjectStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda writer: store.put_if_absent("runs/1", bytes([writer])), range(8)))
    assert won.count(True) == 1
    assert store.get("runs/1") == bytes([won.index(True)])
    assert list(store.list()) == ["runs/1"]


def test_a_deleted_object_is_gone_and_may_be_written_anew(store: ObjectStore) -> None:
    store.put("runs/1", b"old")
    for _ in range(2):
        store.delete("runs/1")
    assert not store.exists("runs/1")
    assert list(store.list()) == []
    assert store.put_if_absent("runs/1", b"new")


def test_a_missing_or_oversized_object_is_named(store: ObjectStore) -> None:
    with pytest.raises(StorageError, match="runs/none"):
        store.get("runs/none")
    store.put("big", bytes(100))
    assert len(store.get("big", max_bytes=100)) == 100
    with pytest.raises(StorageError, match="big has 100 bytes, at most 99"):
        read_uri(store.uri("big"), max_bytes=99)


HOSTILE_PARTS = st.sampled_from(["..", ".", "", "\0", "a\n", "\ud800", ".unfinished-1", "x" * 256])


@given(
    before=st.lists(st.text(max_size=5), max_size=3),
    part=HOSTILE_PARTS,
    after=st.lists(st.text(max_size=5), max_size=3),
)
@example(before=[], part="", after=["etc", "passwd"])
@example(before=["a", "b"], part="..", after=["..", "..", "etc"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_keys_are_refused_by_every_operation(
    store: ObjectStore, before: list[str], part: str, after: list[str]
) -> None:
    key = "/".join([*before, part, *after])
    for operation in (store.get, store.exists, store.uri, store.delete, lambda key: store.put(key, b"")):
        with pytest.raises(StorageError, match="key"):
            operation(key)


@given(key=st.text(max_size=40), data=st.binary(max_size=10))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_key_is_refused_or_works(store: ObjectStore, key: str, data: bytes) -> None:
    try:
        store.put(key, data)
    except StorageError:
        return
    assert store.get(key) == read_uri(store.uri(key)) == data
    assert key in store.list(key)
    store.delete(key)
    store.delete(key)
    assert not store.exists(key)


def test_a_file_store_is_not_left_through_links(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "out").symlink_to(tmp_path)
    (tmp_path / "store" / "file").symlink_to(tmp_path / "secret")
    (tmp_path / "store" / "loop").symlink_to("loop")
    store = open_store(str(tmp_path / "store"))
    for key in ["out/secret", "file"]:
        for operation in (
            store.get,
            store.exists,
            lambda key: store.put(key, b""),
            lambda key: store.put_if_absent(key, b""),
        ):
            with pytest.raises(StorageError, match="symbolic link"):
                operation(key)
    with pytest.raises(StorageError):
        store.get("loop")
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_a_file_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    for uri in [str(tmp_path), "/dev/zero", (tmp_path / "none").as_uri()]:
        with pytest.raises(StorageError, match="there is no file at"):
            read_uri(uri)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file/below"):
        open_store(str(tmp_path / "file")).put("below", b"")


def test_a_file_is_stored_from_its_start(store: ObjectStore) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"many lines")
        store.put("lines", file)
    assert store.get("lines") == b"many lines"


def test_a_failed_write_leaves_the_old_object_and_nothing_else(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a", b"old")
    with pytest.raises(TypeError):
        store.put("a", "text")  # type: ignore[arg-type]
    assert store.get("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "uri", ["", "gs://bucket/a", "https://example.org", "s3://", "s3:///key", "file://host/a", "a\0b"]
)
def test_a_place_that_no_store_serves_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match="write s3://bucket/key"):
        open_store(uri)


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("s3://bucket", "at least one character"),
        ("s3://bucket/", "at least one character"),
        ("s3://bucket/in/../x.png", "neither . nor .."),
        ("s3://bucket/in//x.png", "no empty part"),
        ("s3://a bucket/x.png", "must lie in a bucket of letters"),
        (f"photos/{'x' * 256}", "at most 255 bytes"),
    ],
)
def test_what_can_be_no_object_is_known_without_a_look(bucket: str, uri: str, rule: str) -> None:
    with pytest.raises(StorageError, match=rf"{re.escape(uri)}' can be no object, whose key .*{re.escape(rule)}"):
        check_object_uri(uri)
    with pytest.raises(StorageError):
        read_uri(uri)


def test_s3_failures_name_bucket_and_key(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = open_store("s3://absent/prefix")
    for operation in (absent.get, lambda key: absent.put(key, b""), lambda key: absent.put_if_absent(key, b"")):
        with pytest.raises(StorageError, match=r"s3://absent/prefix/a.*bucket does not exist"):
            operation("a")
    with pytest.raises(MissingObjectError, match=r"s3://absent/a: .*bucket does not exist"):
        read_uri("s3://absent/a")
    with pytest.raises(StorageError, match="list s3://absent/prefix/"):
        list(absent.list())
    with pytest.raises(StorageError, match=r"(?s)Not A Bucket/a: .*Invalid bucket name"):
        read_uri("s3://Not A Bucket/a")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match=r"s3://booth/a: Unable to locate credentials.*check the name, the AWS_"):
        read_uri("s3://booth/a")


def test_a_server_that_is_away_may_answer_later_and_one_that_is_not_trusted_will_not() -> None:
    with TCPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
    once = Config(retries={"total_max_attempts": 1})
    client = boto3.client(
        *("s3", "us-east-1"),
        endpoint_url=f"http://127.0.0.1:{port}",
        config=once,
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    with pytest.raises(TransientStorageError, match="Could not connect"), _as_storage_error("read it"):
        client.get_object(Bucket="booth", Key="a")
    with pytest.raises(StorageError, match="SSL") as refused, _as_storage_error("read it"):
        raise SSLError(endpoint_url="https://booth", error="self-signed certificate")
    assert not isinstance(refused.value, TransientStorageError)


def test_a_conditional_write_is_tried_again_after_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = [409, 409, 200, 412, *[409] * 5, 501]
    conditions = []

    class Endpoint(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            conditions.append(self.headers["If-None-Match"])
            self.send_response(statuses.pop(0))
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with TCPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in [
            ("ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}"),
            ("ACCESS_KEY_ID", "test"),
            ("SECRET_ACCESS_KEY", "test"),
            ("DEFAULT_REGION", "us-east-1"),
        ]:
            monkeypatch.setenv(f"AWS_{name}", value)
        store = open_store("s3://booth")
        assert store.put_if_absent("a", b"data") is True
        assert store.put_if_absent("a", b"data") is False
        with pytest.raises(StorageError, match="s3://booth/a: 5 conflicts"):
            store.put_if_absent("a", b"data")
        with pytest.raises(ConditionalWriteError, match="501"):
            store.put_if_absent("a", b"data")
        server.shutdown()
    assert conditions == ["*"] * 10
    assert not statuses


def test_hostile_keys_that_others_put_into_a_bucket_are_not_listed(bucket: str) -> None:
    for key in ["run/../../etc/passwd", "run//x", "run/folder/", "run/good"]:
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=b"")
    assert list(open_store(f"s3://{bucket}/run").list()) == ["good"]
