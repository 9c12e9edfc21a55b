"""Objects at file:// and s3://: bytes under keys, in a store that is a folder or a bucket's prefix.

A key is a relative path with "/" between its parts. The same keys are refused by every store, so that what one store
holds any other can hold, and a folder is never left: no "..", no empty part, no control character.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from instantbooth.errors import (
    ConditionalWriteError,
    MissingObjectError,
    OversizedObjectError,
    StorageError,
    TransientStorageError,
)

MAX_KEY_BYTES = 1024
MAX_PART_BYTES = 255
UNSTORABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
BUCKET = re.compile(r"[A-Za-z0-9._:-]{1,255}")
"""Of an S3 bucket's name, or an access point's ARN."""
UNFINISHED = ".unfinished-"
CONFLICT_TRIES = 5
TRANSIENT_ERRNOS = (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY)
UNSUPPORTED_ERRNOS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without hard links answer."""
TRIES = 6
"""A storage call that fails for now is made so often, with growing pauses: 6 s in all."""

Answer = TypeVar("Answer")


class ObjectStore(Protocol):
    """Bytes under keys. Every method raises StorageError, naming the object, for a bad key or a failed operation."""

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The object's bytes; MissingObjectError where there is none, OversizedObjectError beyond `max_bytes`."""
        ...

    def put(self, key: str, data: bytes | io.BufferedIOBase) -> None:
        """Writes or replaces an object at once: a reader sees the old bytes or the new ones, never a part.

        `data` may be an open file, read from its start, for objects too large to hold.
        """
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Writes an object unless there is one; of many writers exactly one is told True.

        Over S3 a writer whose successful answer got lost on the network is told False when it tries again. Raises
        ConditionalWriteError where the store says that it has no conditional writes.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with `prefix` (any text, as in S3), sorted; names that are no valid key are left out."""
        ...

    def exists(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Takes an object away; one that is not there is no error."""
        ...

    def sweep(self, folder: str) -> None:
        """Takes away what writers that were killed left unfinished below a key; nobody else may be writing there."""
        ...

    def uri(self, key: str) -> str:
        """Where the object is, for `read_uri`."""
        ...


def open_store(uri: str) -> ObjectStore:
    """The store at file:///folder, s3://bucket/prefix, or a plain path. Nothing is created or contacted before its use.

    Raises StorageError for another scheme.
    """
    if check_uri(uri) == "s3":
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix.strip("/"))
    return FileStore(_local_path(uri).absolute())


def absolute_uri(uri: str, folder: Path | None = None) -> str:
    """The same place from any working directory: at file:// or at a plain path, as an absolute path.

    A relative path is meant from `folder`; None is the working directory. Raises StorageError for another scheme.
    """
    return uri if check_uri(uri) == "s3" else str((folder or Path.cwd()) / _local_path(uri))


def read_uri(uri: str, *, max_bytes: int | None = None) -> bytes:
    """One object by its file:// or s3:// URI or plain path; a symbolic link to a file is followed.

    Raises StorageError where it cannot be read or is larger than `max_bytes`.
    """
    if check_uri(uri) == "s3":
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return S3Store(bucket).get(key, max_bytes=max_bytes)
    with _as_storage_error(f"read {uri}"):
        path = _local_path(uri).resolve()
        return _read_file(path, uri, max_bytes)


@contextmanager
def open_uri(uri: str) -> Iterator[IO[bytes]]:
    """One object as a file, for objects too large to hold; one at s3:// is copied to a temporary file first.

    Raises StorageError where it cannot be read.
    """
    if check_uri(uri) == "s3":
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        with tempfile.TemporaryFile() as file:
            patiently(lambda: S3Store(bucket).copy(key, file))
            file.seek(0)
            yield file
        return
    with _as_storage_error(f"read {uri}"):
        local = _local_path(uri).open("rb")
    with local:
        yield local


def check_uri(uri: str) -> str:
    """The URI's scheme, "file" (for plain paths too) or "s3". Raises StorageError for one that no store can serve."""
    if not isinstance(uri, str) or not uri or UNSTORABLE.search(uri):
        raise StorageError(
            f"a URI must be text without control characters, is {uri!r}; write s3://bucket/key, file:///path or a path"
        )
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return "file"
    if scheme == "s3" and rest.partition("/")[0]:
        return "s3"
    if scheme == "file" and urlsplit(uri).netloc in ("", "localhost"):
        return "file"
    raise StorageError(f"{uri} is not at a known place; write s3://bucket/key, file:///path or a plain path")


def check_object_uri(uri: str) -> str:
    """The scheme of a URI that may be one object's. Raises StorageError where no store could hold such an object."""
    scheme, fault = check_uri(uri), None
    if scheme == "s3":
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        fault = _key_fault(key) if BUCKET.fullmatch(bucket) else "must lie in a bucket of letters, digits and . - _"
    elif any(len(part.encode()) > MAX_PART_BYTES for part in _local_path(uri).parts):
        fault = f"must have at most {MAX_PART_BYTES} bytes in each part"
    if fault:
        raise StorageError(f"{uri!r} can be no object, whose key {fault}; write s3://bucket/folder/name or a path")
    return scheme


def check_key(key: str) -> str:
    """The key itself. Raises StorageError for one that could leave its store or that some store cannot hold."""
    if fault := _key_fault(key):
        raise StorageError(f"the key {key!r} {fault}; use a relative path such as concepts/ada.safetensors")
    return key


def patiently(operation: Callable[[], Answer], *, pause_s: float = 0.2) -> Answer:
    """Repeats a storage call while it raises TransientStorageError, then raises that.

    `pause_s` is the first pause; each further one is twice as long. A write that failed may have taken place all the
    same, which its repetition finds out.
    """
    for attempt in range(TRIES - 1):
        try:
            return operation()
        except TransientStorageError:
            time.sleep(pause_s * 2**attempt)
    return operation()


@dataclass(frozen=True)
class FileStore:
    """A folder. It is made by the first write, and no key leads out of it, symbolic links included."""

    root: Path

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        with self._operation("read", key) as path:
            return _read_file(path, self.uri(key), max_bytes)

    def put(self, key: str, data: bytes | io.BufferedIOBase) -> None:
        with self._operation("write", key) as path, _unfinished(path, data) as unfinished:
            os.replace(unfinished, path)
            _flush_folder(path.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._operation("write", key) as path, _unfinished(path, data) as unfinished:
            try:
                os.link(unfinished, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in UNSUPPORTED_ERRNOS:
                    raise
                raise ConditionalWriteError(
                    f"cannot write {path}: its file system has no hard links ({error.strerror}), and so no conditional "
                    "writes; use another"
                ) from error
            _flush_folder(path.parent)
            return True

    def list(self, prefix: str = "") -> Iterator[str]:
        folder = _check_prefix(prefix)
        start = self._path(folder) if folder else self.root
        with _as_storage_error(f"list {start}"):
            paths = (Path(parent, name) for parent, _, names in os.walk(start) for name in names)
            keys = (path.relative_to(self.root).as_posix() for path in paths)
            yield from sorted(key for key in keys if key.startswith(prefix) and not _key_fault(key))

    def exists(self, key: str) -> bool:
        with self._operation("look for", key) as path:
            return path.is_file()

    def delete(self, key: str) -> None:
        with self._operation("delete", key) as path:
            path.unlink(missing_ok=True)

    def sweep(self, folder: str) -> None:
        with self._operation("sweep", folder) as path:
            for unfinished in path.rglob(f"{UNFINISHED}*"):
                unfinished.unlink(missing_ok=True)

    def uri(self, key: str) -> str:
        return (self.root / check_key(key)).absolute().as_uri()

    def _path(self, key: str) -> Path:
        path = self.root / key
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise StorageError(f"{path} leads out of {self.root} through a symbolic link; remove the link")
        return path

    @contextmanager
    def _operation(self, verb: str, key: str) -> Iterator[Path]:
        with _as_storage_error(f"{verb} {self.root / check_key(key)}"):
            yield self._path(key)


@dataclass(frozen=True)
class S3Store:
    """A bucket, or the part of one below a prefix. Endpoint, region, credentials: boto3's usual AWS_* settings."""

    bucket: str
    prefix: str = ""

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        with self._operation("read", key) as (client, target):
            try:
                answer = client.get_object(**target)
            except (client.exceptions.NoSuchKey, client.exceptions.NoSuchBucket) as error:
                reason = error.response["Error"]["Message"]
                raise MissingObjectError(f"there is no object at {self.uri(key)}: {reason}; check the name") from None
            _check_size(answer["ContentLength"], self.uri(key), max_bytes)
            return bytes(answer["Body"].read())

    def copy(self, key: str, file: IO[bytes]) -> None:
        """Writes the object's bytes into a local file, from its start."""
        file.seek(0)
        file.truncate()
        with self._operation("read", key) as (client, target):
            for chunk in client.get_object(**target)["Body"].iter_chunks(2**20):
                file.write(chunk)

    def put(self, key: str, data: bytes | io.BufferedIOBase) -> None:
        if isinstance(data, io.BufferedIOBase):
            data.seek(0)
        with self._operation("write", key) as (client, target):
            client.put_object(**target, Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._operation("write", key) as (client, target):
            for attempt in range(CONFLICT_TRIES):
                # S3 answers 409 while another conditional write of the key is under way, and asks to try again.
                time.sleep(0.05 * attempt)
                status = _status_of((409, 412, 501), client.put_object, **target, Body=data, IfNoneMatch="*")
                if status == 501:
                    raise ConditionalWriteError(
                        f"cannot write {self.uri(key)}: the store has no conditional writes (it answers 501); use "
                        "another"
                    )
                if status != 409:
                    return status != 412
        raise TransientStorageError(
            f"cannot write {self.uri(key)}: {CONFLICT_TRIES} conflicts with other writers; try again"
        )

    def list(self, prefix: str = "") -> Iterator[str]:
        _check_prefix(prefix)
        root = self._full_key("")
        with _as_storage_error(f"list s3://{self.bucket}/{root}{prefix}"):
            pages = _s3_client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root + prefix)
            for page in pages:
                keys = (item["Key"].removeprefix(root) for item in page.get("Contents", ()))
                yield from (key for key in keys if not _key_fault(key))

    def exists(self, key: str) -> bool:
        with self._operation("look for", key) as (client, target):
            return _status_of((404,), client.head_object, **target) != 404

    def delete(self, key: str) -> None:
        with self._operation("delete", key) as (client, target):
            client.delete_object(**target)

    def sweep(self, folder: str) -> None:
        """Nothing is left: an object is there whole or not at all."""

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._full_key(check_key(key))}"

    def _full_key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @contextmanager
    def _operation(self, verb: str, key: str) -> Iterator[tuple[Any, dict[str, str]]]:
        with _as_storage_error(f"{verb} {self.uri(key)}"):
            yield _s3_client(), {"Bucket": self.bucket, "Key": self._full_key(key)}


def _key_fault(key: str) -> str | None:
    if not isinstance(key, str) or not key:
        return "must be text of at least one character"
    if UNSTORABLE.search(key):
        return "must hold no control character and no lone surrogate"
    parts = key.split("/")
    if not parts[0]:
        return "must not be absolute"
    if "" in parts or "." in parts or ".." in parts:
        return "must have no empty part and neither . nor .."
    if any(part.startswith(UNFINISHED) for part in parts):
        return f"must have no part that starts with {UNFINISHED}"
    if len(key.encode()) > MAX_KEY_BYTES or any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        return f"must have at most {MAX_KEY_BYTES} bytes, {MAX_PART_BYTES} in each part"
    return None


def _check_prefix(prefix: str) -> str:
    """The folder that a prefix names; "" for the store itself."""
    folder = prefix.rpartition("/")[0]
    return check_key(folder) if folder else ""


def _check_size(size: int, uri: str, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise OversizedObjectError(f"{uri} has {size} bytes, at most {max_bytes} are read; make it smaller")


def _local_path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path)) if uri.startswith("file://") else Path(uri)


def _read_file(path: Path, uri: str, max_bytes: int | None) -> bytes:
    # A device or a pipe has no size and may never end.
    if not path.is_file():
        raise MissingObjectError(f"there is no file at {uri}; check the path")
    _check_size(path.stat().st_size, uri, max_bytes)
    return path.read_bytes()


@contextmanager
def _unfinished(path: Path, data: bytes | io.BufferedIOBase) -> Iterator[Path]:
    """A flushed file with `data` beside `path`, gone in the end unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")
    try:
        # Not tempfile: its files are readable by their owner alone.
        with unfinished.open("xb") as file:
            if isinstance(data, io.BufferedIOBase):
                data.seek(0)
                shutil.copyfileobj(data, file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield unfinished
    finally:
        unfinished.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Makes a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _s3_client() -> Any:
    return _s3_client_of(tuple(sorted(pair for pair in os.environ.items() if pair[0].startswith("AWS_"))))


@functools.lru_cache(maxsize=4)
def _s3_client_of(settings: tuple[tuple[str, str], ...]) -> Any:
    """One client per process and AWS_* settings: making one takes 0.2 s. Clients are safe across threads."""
    import boto3
    from botocore.config import Config

    # Many self-hosted servers reject the checksum trailers that boto3 sends by default.
    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=32,
    )
    return boto3.session.Session().client("s3", config=config)


def _status_of(expected: tuple[int, ...], operation: Callable[..., Any], **arguments: object) -> int:
    """200, or the HTTP status of an S3 operation that failed with an expected one."""
    from botocore.exceptions import ClientError

    try:
        operation(**arguments)
    except ClientError as error:
        status = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        if status in expected:
            return status
        raise
    return 200


@contextmanager
def _as_storage_error(what: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        # boto3's errors are recognised by module, so that a file store never imports it.
        if isinstance(error, (OSError, RuntimeError)):
            kind = TransientStorageError if getattr(error, "errno", None) in TRANSIENT_ERRNOS else StorageError
            raise kind(f"cannot {what}: {error}; check the path, and that access is allowed") from error
        if type(error).__module__.startswith(("botocore", "boto3", "urllib3")):
            kind = TransientStorageError if _is_transient(error) else StorageError
            raise kind(f"cannot {what}: {error}; check the name, the AWS_* settings and your access") from error
        raise


def _is_transient(error: Exception) -> bool:
    """Whether S3 did not answer (a connection that was not made or broke off), or answered to come back later."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError, SSLError

    if isinstance(error, ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
        return status >= 500 or status in (408, 429)
    unanswered = isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError)
    return (unanswered and not isinstance(error, SSLError)) or type(error).__module__.startswith("urllib3")
