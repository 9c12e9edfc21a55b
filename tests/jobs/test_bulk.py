"""What the bulk job tells while it runs: events and counters."""

from __future__ import annotations

import errno
import json
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from instantbooth.errors import ConditionalWriteError, ManifestError, ParameterError, StorageError
from instantbooth.storage import FileStore
from instantbooth.tracking import open_run
from jobs.benchmarks.million import MillionEstimate, page
from jobs.bulk import BulkConfig, _event_log, _events, _tracked, run
from pipelines.checks import check_store, gpus_for
from pipelines.failed_rows import FailedRows
from pipelines.model import ModelConfig
from pipelines.outcome import Outcome
from pipelines.personalize import PersonalizeConfig, Pool, Tally, _bound, load_manifest
from pipelines.places import check_manifest_apart


def test_every_failure_is_an_event_and_progress_adds_up(tmp_path: Path) -> None:
    tally = Tally(rows=3, images=6, started=time.monotonic() - 2)
    with _event_log(tmp_path / "logs" / "run.jsonl") as write:
        tell = _events(write)
        tell(tally, None)
        for outcome in (
            Outcome(id="ada", succeeded=2, failed=0, open=0),
            Outcome(id="eve", succeeded=1, failed=1, open=0, code="prompt", error="too long"),
            Outcome(id="bob", succeeded=2, failed=0, open=0),
        ):
            tally.add(outcome)
            tell(tally, outcome)
    events = [json.loads(line) for line in (tmp_path / "logs" / "run.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "progress", "row_failed", "progress"]
    assert (events[2]["id"], events[2]["error"]) == ("eve", "too long")
    assert [events[3][name] for name in ("rows_done", "rows_failed", "rows_open", "images")] == [3, 1, 0, 5]
    assert (events[1]["rows"], events[3]["seconds_left"]) == (3, 0)
    assert events[1]["seconds_left"] == pytest.approx(4, abs=1)
    assert events[3]["images_per_second"] == pytest.approx(2.5, rel=0.1)


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for log in (tmp_path, tmp_path / "file" / "run.jsonl"):
        with pytest.raises(ParameterError, match=f"log must be a file that can be written, is {log} "):
            run(BulkConfig(manifest="rows.jsonl", output="out", log=log, track=False))


def test_a_run_that_ends_early_says_so_in_its_log(tmp_path: Path) -> None:
    config = BulkConfig(
        manifest=str(tmp_path / "no.jsonl"), output=str(tmp_path), log=tmp_path / "log.jsonl", track=False
    )
    with pytest.raises(StorageError):
        run(config)
    (event,) = map(json.loads, config.log.read_text().splitlines())
    assert (event["event"], event["kind"]) == ("stopped", "StorageError")
    assert "no.jsonl" in event["error"]


def test_what_ends_a_run_from_without_is_tracked_as_killed(tmp_path: Path) -> None:
    tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = BulkConfig(manifest="rows.jsonl", output="ada's run/", model=ModelConfig(tracking_uri=tracking_uri))
    earlier = open_run(tracking_uri, str(Path("ada's run").absolute()))

    def end() -> None:
        with _tracked(config) as tell:
            tell(Tally(rows=1, images=1), None)
            sys.exit(15)

    with pytest.raises(SystemExit):
        end()
    (tracked,) = MlflowClient(tracking_uri).search_runs(["1"])
    assert (tracked.info.run_id, tracked.info.status) == (earlier.run_id, "KILLED")
    assert tracked.data.metrics["rows_done"] == 0
    with pytest.raises(SystemExit), _tracked(config):
        sys.exit(15)
    assert MlflowClient(tracking_uri).get_run(earlier.run_id).info.status == "KILLED"


def test_points_that_a_tracking_server_missed_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = ModelConfig(tracking_uri="http://127.0.0.1:9")
    with _tracked(BulkConfig(manifest="rows.jsonl", output="s3://bucket/run", model=away)) as tell:
        assert tell is not None
        tell(Tally(rows=1, images=1), None)
    assert "1 points of the curves are lost: MLflow at http://127.0.0.1:9" in capsys.readouterr().err
    began = time.perf_counter()
    with _tracked(BulkConfig(manifest="rows.jsonl", output="s3://bucket/run", model=away)):
        pass
    assert time.perf_counter() - began < 1, "a run that has nothing to tell does not wait for MLflow"
    assert not capsys.readouterr().err


def test_failures_are_bounded_by_number_or_by_share() -> None:
    assert (_bound(0, 200), _bound(3, 200), _bound(0.05, 200)) == (0, 3, 10)


def test_a_row_that_fails_twice_is_one_failed_row_and_the_last_one_is_kept(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    first = FailedRows(store, "job")
    first.add("ada", is_open=True)
    first.add("eve", is_open=False)
    assert FailedRows(store, "job").count == 1, "the second comes within seconds of the first"
    first.save()
    second = FailedRows(store, "job")
    assert second.count == 2
    second.add("ada", is_open=False)
    second.add("bob", is_open=False)
    second.save()
    assert FailedRows(store, "job").count == 3
    assert FailedRows(store, "another job").count == 0


def test_a_row_is_failed_or_open_and_not_both() -> None:
    tally = Tally(rows=2, images=4)
    tally.add(Outcome(id="ada", succeeded=0, failed=1, open=1, code="prompt", error="too long"))
    tally.add(Outcome(id="eve", succeeded=1, failed=0, open=1, code="storage", error="no answer"))
    assert (tally.done, tally.failed, tally.open) == (2, 1, 1)


def test_the_faults_of_a_hopeless_manifest_are_told_up_to_a_number(tmp_path: Path) -> None:
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("oops\n" * 1500)
    with pytest.raises(ManifestError, match=r"line 1000: .*\nand 500 more$"):
        load_manifest(str(manifest))


def test_a_store_without_conditional_writes_is_refused_or_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Careless(FileStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            self.put(key, data)
            return True

    with pytest.raises(ConditionalWriteError, match="--allow-unconditional"):
        check_store(Careless(tmp_path), allow_unconditional=False)
    assert not caplog.records
    assert check_store(Careless(tmp_path), allow_unconditional=True) is False
    assert "NOT EXACTLY ONCE" in caplog.text
    assert check_store(FileStore(tmp_path / "good"), allow_unconditional=True) is True


def test_a_file_system_without_hard_links_is_known_for_one_without_conditional_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    with pytest.raises(ConditionalWriteError, match=r"no hard links .*--allow-unconditional"):
        check_store(FileStore(tmp_path), allow_unconditional=False)
    assert check_store(FileStore(tmp_path), allow_unconditional=True) is False


@pytest.mark.parametrize(
    ("shares", "gpus"),
    [([], 0), ([0.0, 0.0], 0), ([0.1] * 10, 1), ([0.4] * 5, 3), ([0.6, 0.6, 0.5], 3), ([0.2, 0.8, 0.2, 0.8], 2)],
)
def test_no_actor_lies_on_two_gpus(shares: list[float], gpus: int) -> None:
    assert gpus_for(shares) == gpus


def test_a_run_into_its_own_manifest_is_refused_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for manifest, output in (
        ("s3://out/run/failed.jsonl", "s3://out/run/"),
        ("s3://out/failed.jsonl", "s3://out"),
        ("out/../run/failed.jsonl", (tmp_path / "run").as_uri()),
        ("failed.jsonl", str(tmp_path)),
    ):
        with pytest.raises(ParameterError, match=f"{manifest} is what the run would replace"):
            check_manifest_apart(manifest, output)
        check_manifest_apart(manifest, f"{output.rstrip('/')}/again")
    check_manifest_apart("s3://out/run/orders.jsonl", "s3://out/run")


def test_the_page_on_a_million_identities_is_what_the_command_prints() -> None:
    root = Path(__file__).parents[2]
    assert (root / "infra" / "million.md").read_text() == page(MillionEstimate())


def test_options_that_cannot_work_are_refused() -> None:
    for wrong in ({"min": 0}, {"min": 3, "max": 2}, {"gpus": 1.5}, {"gpus": 2.0}, {"gpus": -1.0}):
        with pytest.raises(ParameterError, match="correct"):
            Pool(**wrong)
    for option in (
        {"image_format": "gif"},
        {"exact": True},
        {"max_failures": -1},
        {"max_failures": float("nan")},
        {"row_budget": 0},
        {"cost_per_gpu_hour": -1.0},
    ):
        with pytest.raises(ParameterError, match=next(iter(option))):
            PersonalizeConfig(manifest="m.jsonl", output="out", **option)
