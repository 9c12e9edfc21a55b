"""The commit protocol under every interleaving of attempts, lost answers and kills; and the check that would notice."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
from greenlet import GreenletExit, getcurrent, greenlet
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from instantbooth.errors import ConditionalWriteError, MissingObjectError, StorageError, TransientStorageError
from instantbooth.ledger import RECORDS, Ledger, Record, digest_of
from instantbooth.storage import FileStore
from tests.broken_ledgers import ListsInsteadOfReading, RetryIsALoss, Unconditional

INTERLEAVINGS = int(os.environ.get("LEDGER_INTERLEAVINGS", "200"))
ITEMS = 2
FAULTS = ["none", "none", "refused", "applied then dropped"]


class Memory:
    """A store that hands control to the test before every operation, which says what goes wrong with it.

    Listings are a step behind, as they may be.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.listed: list[str] = []
        self.replaced: list[str] = []

    def put(self, key: str, data: bytes) -> None:
        self._operate(lambda: self._store(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._operate(lambda: key not in self.objects and self._store(key, data))

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        found: bytes | None = self._operate(lambda: self.objects.get(key))
        if found is None:
            raise MissingObjectError(key)
        return found

    def list(self, prefix: str = "") -> Iterator[str]:
        listed, self.listed = self.listed, sorted(self.objects)
        return (key for key in listed if key.startswith(prefix))

    def exists(self, key: str) -> bool:
        return bool(self._operate(lambda: key in self.objects))

    def uri(self, key: str) -> str:
        return f"memory://{key}"

    def _store(self, key: str, data: bytes) -> bool:
        if self.objects.get(key, data) != data:
            self.replaced.append(key)
        self.objects[key] = data
        return True

    def _operate(self, operation: object) -> object:
        parent = getcurrent().parent
        fault = parent.switch() if parent else "none"
        if fault == "refused":
            raise TransientStorageError("refused")
        answer = operation()  # type: ignore[operator]
        if fault == "applied then dropped":
            raise TransientStorageError("the answer got lost")
        return answer


class Attempts(RuleBasedStateMachine):
    """Workers attempt items; the machine chooses whose storage call goes next and what becomes of it."""

    ledger_class: type[Ledger] = Ledger

    def __init__(self) -> None:
        super().__init__()
        self.store = Memory()
        self.ledger = self.ledger_class(self.store, pause_s=0)
        self.running: list[greenlet] = []
        self.attempts = 0
        self.answers: list[tuple[str, Record | None]] = []

    @precondition(lambda self: len(self.running) < 4)
    @rule(item=st.integers(0, ITEMS - 1), works=st.booleans())
    def begin(self, item: int, works: bool) -> None:
        self.attempts += 1
        number = self.attempts

        def attempt() -> None:
            work = digest_of("item", item)
            if self.ledger.find(work) is not None:
                return
            if works:
                # Attempts on a GPU differ in the last bits.
                record = self.ledger.succeed(work, f"images/{work}.png", f"picture {item} by {number}".encode(), {})
            else:
                record = self.ledger.fail(work, {"message": f"attempt {number}"})
            self.answers.append((work, record))

        worker = greenlet(attempt)
        worker.switch()
        self.running = [each for each in [*self.running, worker] if not each.dead]

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3), fault=st.sampled_from(FAULTS))
    def proceed(self, which: int, fault: str) -> None:
        worker = self.running[which % len(self.running)]
        # Where the store was down for too long, a later attempt will do it.
        with suppress(StorageError):
            worker.switch(fault)
        self.running = [each for each in self.running if not each.dead]

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3))
    def kill(self, which: int) -> None:
        self.running.pop(which % len(self.running)).throw(GreenletExit)

    def teardown(self) -> None:
        while self.running:
            self.proceed(0, "none")
        for item in range(ITEMS):
            self.begin(item, True)
            while self.running:
                self.proceed(0, "none")
        check(self.store, self.answers)


def check(store: Memory, answers: list[tuple[str, Record | None]]) -> None:
    """Every item has one record, nothing was replaced, results are what records say, and nobody was told otherwise."""
    assert not store.replaced
    records = {key: Record.from_bytes(data) for key, data in store.objects.items() if key.startswith(f"{RECORDS}/")}
    assert {record.work for record in records.values()} == {digest_of("item", item) for item in range(ITEMS)}
    assert len(records) == ITEMS
    for record in records.values():
        if record.status == "succeeded":
            assert sha256(store.objects[record.key]).hexdigest() == record.sha256
    for work, answer in answers:
        assert answer == records[f"{RECORDS}/{work[:2]}/{work}.json"]


def drive(ledger: type[Ledger], interleavings: int, *, derandomize: bool = False) -> None:
    machine = type("Machine", (Attempts,), {"ledger_class": ledger})
    chosen = settings(
        max_examples=interleavings,
        stateful_step_count=30,
        phases=[Phase.generate],
        database=None,
        derandomize=derandomize,
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_every_item_is_committed_once_whatever_happens() -> None:
    drive(Ledger, INTERLEAVINGS)


@pytest.mark.parametrize("defect", [Unconditional, RetryIsALoss, ListsInsteadOfReading])
def test_the_check_notices_a_broken_protocol(defect: type[Ledger]) -> None:
    with pytest.raises(AssertionError):
        drive(defect, 500, derandomize=True)


def test_a_store_without_conditional_writes_is_found_out(tmp_path: Path) -> None:
    class Careless(FileStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            self.put(key, data)
            return True

    careless = Careless(tmp_path / "careless")

    class Racing(FileStore):
        """One that looks, and then writes."""

        def put_if_absent(self, key: str, data: bytes) -> bool:
            if self.exists(key):
                return False
            time.sleep(0.1)
            self.put(key, data)
            return True

    with pytest.raises(ConditionalWriteError, match="exactly once"):
        Ledger(careless).check_store()
    with pytest.raises(ConditionalWriteError, match="exactly once"):
        Ledger(Racing(tmp_path / "racing")).check_store()
    alone = Ledger(careless, conditional=False)
    first = alone.succeed("ab1", "images/ab1.png", b"pixels", {})
    assert alone.succeed("ab1", "images/ab1.png", b"others", {}) == first
    assert careless.get("images/ab1.png") == b"pixels"
    ledger = Ledger(FileStore(tmp_path / "good"))
    ledger.check_store()
    ledger.check_store()
    assert not list(ledger.committed())


def test_records_come_back_in_order_and_open_work_is_none(tmp_path: Path) -> None:
    ledger = Ledger(FileStore(tmp_path), pause_s=0)
    works = [digest_of("row", number) for number in range(20)]
    for number, work in enumerate(works[:15]):
        if number % 3:
            ledger.succeed(work, f"images/{number}.png", b"pixels", {"number": number})
        else:
            ledger.fail(work, {"number": number})
    found = list(ledger.find_all(works))
    assert [record.details["number"] for record in found if record] == list(range(15))
    assert found[15:] == [None] * 5
    assert sorted(ledger.committed()) == sorted(works[:15])


def test_a_damaged_record_is_reported(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put(f"{RECORDS}/ab/abc.json", b"{}")
    with pytest.raises(StorageError, match=r"records/ab/abc\.json is damaged .*delete it"):
        Ledger(store, pause_s=0).find("abc")
