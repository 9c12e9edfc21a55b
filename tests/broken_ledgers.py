"""Ledgers with a defect each, which every check of the commit protocol must notice."""

from __future__ import annotations

from instantbooth.ledger import RECORDS, Ledger, Record


class Unconditional(Ledger):
    """Whoever comes last wins."""

    def _write(self, key: str, data: bytes) -> bool:
        self._patiently(lambda: self._store.put(key, data))
        return True


class RetryIsALoss(Ledger):
    """Who is told that a record exists believes that another has done the work."""

    def _commit(self, record: Record) -> Record | None:
        wrote = self._write(f"{RECORDS}/{record.work[:2]}/{record.work}.json", record.to_bytes())
        return record if wrote else None


class ListsInsteadOfReading(Ledger):
    """Where a listing shows no record, one's own attempt is taken for the one that counts."""

    def _commit(self, record: Record) -> Record | None:
        self._write(f"{RECORDS}/{record.work[:2]}/{record.work}.json", record.to_bytes())
        return self.find(record.work) if record.work in self.committed() else record
