"""The main job from end to end on this machine: render, ingest, train, personalize, report."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import torch
import tyro
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console
from rich.progress import track

from instantbooth.errors import InstantBoothError, ParameterError
from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.evaluation.metrics import identification_top1, prompt_accuracy
from instantbooth.images import decode_image
from instantbooth.manifest import ManifestRow
from instantbooth.miniature.samples import SUBJECTS_PER_SET, write_manifest, write_pairs
from instantbooth.parameters import MAX_REFERENCES
from instantbooth.presets import miniature_folder, tracking_uri
from instantbooth.storage import FileStore, read_uri
from instantbooth.tracking import TrackedRun
from instantbooth.training.adapters import AdapterTrainingConfig
from jobs import cli
from jobs.cluster import import_path, ray_cluster
from jobs.demo_page import Curve, Subject, write_contact_sheet, write_page
from jobs.train import TrainConfig, TrainReport, train
from pipelines.ingest import IngestConfig, IngestReport, ingest
from pipelines.model import ModelConfig
from pipelines.outcome import SUCCEEDED
from pipelines.personalize import load_manifest
from pipelines.places import FAILED
from pipelines.plan import IMAGES


@dataclass(frozen=True, kw_only=True)
class DemoModel(ModelConfig):
    """A base model and trained weights."""

    tracking_uri: tyro.conf.Suppress[str] = field(default_factory=tracking_uri)
    """Not asked for: the demo tracks its training in its own output folder."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo; the defaults take some minutes on two cores."""

    output: Path = Path("out/demo")
    """Folder of everything written. Earlier runs' data stay; report, contact sheet and summary are replaced."""
    pairs: int = 330
    """Text-image pairs to render and train on, beside a few that curation must drop."""
    subjects: int = 32
    """Subjects to personalize, seen in no training; four prompts each."""
    references: int = 3
    """Reference images of each subject."""
    model: ModelConfig = field(default_factory=DemoModel)
    """Base model and weights to continue from. MLflow is always a SQLite file in the output folder."""
    judges: Path | None = None
    """Folder with the judges attributes/ and identity/; the shipped ones if none is given."""
    training: AdapterTrainingConfig = field(
        default_factory=lambda: AdapterTrainingConfig(
            steps=60, batch_size=16, adapter_learning_rate=1e-4, encoder_learning_rate=1e-4, warmup_steps=20
        )
    )
    """The short run of training."""

    def __post_init__(self) -> None:
        if self.subjects < 1 or self.pairs < self.training.batch_size:
            raise ParameterError(
                f"subjects must be at least 1 and pairs at least a batch ({self.training.batch_size}),"
                f" are {self.subjects} and {self.pairs}; raise them"
            )
        if not 1 <= self.references <= MAX_REFERENCES:
            raise ParameterError(f"references must be from 1 to {MAX_REFERENCES}, is {self.references}; correct it")
        self.model.identity()
        if self.judges is not None:
            load_judges(self.judges)
        _train_config(self, FileStore(self.output))


def demo(config: DemoConfig) -> dict[str, Any]:
    """Runs every stage and returns what summary.json says."""
    output = config.output.absolute()
    cli.make_folder(output)
    store = FileStore(output / "store" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}")
    model = ModelConfig(**asdict(config.model) | {"tracking_uri": f"sqlite:///{output}/mlflow.db"})
    config = replace(config, model=model)
    seconds: dict[str, float] = {}
    with _timed("render", seconds):
        _render(store, config)
    with ExitStack() as stack:
        with _timed("start Ray", seconds), Console().status("starting Ray"):
            stack.enter_context(ray_cluster())
        with _timed("ingest", seconds), Console().status("ingesting"):
            curation = ingest(IngestConfig(source=store.uri("pairs"), output=store.uri("curated")))
        with _timed("train", seconds):
            training = train(_train_config(config, store))
        with _timed("personalize", seconds):
            _personalize(config, store, training)
    with _timed("report", seconds):
        rows = load_manifest(store.uri("orders/manifest.jsonl"))
        subjects = _subjects(store, rows)
        failures = [json.loads(line) for line in store.get(f"results/{FAILED}").splitlines()]
        summary = {
            "identities": len(rows),
            "images": sum(len(subject.pictures) for subject in subjects),
            "failed": len(failures),
            "train_steps": training.steps,
            "mlflow_run_id": training.run_id,
            "weights": training.weights,
            **_judge(config, rows, subjects),
            "seconds": seconds,
        }
        _write(output, subjects, curation, failures, summary, training, config)
    summary["seconds"] = {stage: round(value, 1) for stage, value in seconds.items()}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _render(store: FileStore, config: DemoConfig) -> None:
    for _ in track(write_pairs(store, "pairs", config.pairs), "rendering pairs", total=config.pairs):
        pass
    subjects = write_manifest(store, "orders", subjects=config.subjects, references=config.references)
    for _ in track(subjects, "rendering manifest", total=config.subjects):
        pass


def _train_config(config: DemoConfig, store: FileStore) -> TrainConfig:
    output = config.output.absolute()
    return TrainConfig(
        data=store.uri("curated"),
        output=str(output / "training" / f"demo-{store.root.name}"),
        model=config.model,
        artifacts=(output / "mlflow-artifacts").as_uri(),
        adapters=config.training,
    )


def _personalize(config: DemoConfig, store: FileStore, training: TrainReport) -> None:
    """Runs jobs.personalize as a Ray job and follows it by the pictures it stores."""
    model = asdict(replace(config.model, weights=training.weights))
    arguments = [f"--manifest={store.uri('orders/manifest.jsonl')}", f"--output={store.uri('results')}"]
    arguments += [f"--model.{name}={value}" for name, value in model.items() if value is not None]
    wanted = sum(len(row.prompts) for row in load_manifest(store.uri("orders/manifest.jsonl")))

    def look() -> tuple[int, str]:
        return sum(1 for _ in store.list(f"results/{IMAGES}/")), "pictures"

    with cli.following("personalizing", wanted, look):
        run_ray_job(["-m", "jobs.personalize", *arguments])


def run_ray_job(arguments: list[str]) -> None:
    """Runs Python with these arguments as a job of the connected cluster, whose end is the job's end too.

    Raises InstantBoothError with the end of the job's log where it fails.
    """
    client = JobSubmissionClient(ray.get_runtime_context().gcs_address)
    job = submit(client, arguments, patience_s=60)
    # Left early by Ctrl-C it is not stopped here: Ray's dashboard, which would be asked to, hears Ctrl-C as well and
    # ends. Ray kills the job's processes a second after the cluster.
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.5)
    if status != JobStatus.SUCCEEDED:
        log = client.get_job_logs(job).strip().splitlines()
        raise InstantBoothError("\n".join([f"the Ray job {job} {status.value.lower()}; its log ends:", *log[-20:]]))


def submit(client: JobSubmissionClient, arguments: list[str], patience_s: float) -> str:
    """The id of the job, once the cluster takes one: just started on a busy machine, it has no agent for jobs yet."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            # exec: stopping the job must reach Python, not a shell around it.
            return client.submit_job(
                entrypoint=f"exec {shlex.join([sys.executable, *arguments])}", runtime_env={"env_vars": import_path()}
            )
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise InstantBoothError(
                    "Ray has no agent for jobs, whose port 52365 another Ray on this machine may hold; end that one "
                    "(`ray stop`), then run this again"
                ) from error
        time.sleep(1)


def _subjects(store: FileStore, rows: list[ManifestRow]) -> list[Subject]:
    """The rows that have pictures, in the manifest's order."""
    by_id = {row.id: row for row in rows}
    records = [json.loads(line) for line in store.get(f"results/{SUCCEEDED}").splitlines()]
    return [
        Subject(
            id=record["id"],
            references=[decode_image(read_uri(uri)) for uri in by_id[record["id"]].images],
            prompts=by_id[record["id"]].prompts,
            kinds=record["metadata"]["kinds"],
            pictures=[decode_image(store.get(f"results/{image['key']}")) for image in record["images"]],
        )
        for record in records
    ]


def _judge(config: DemoConfig, rows: list[ManifestRow], subjects: list[Subject]) -> dict[str, float]:
    """identification_top1 among all subjects of the manifest, and prompt_accuracy, over every picture."""
    if not subjects:
        return {"identification_top1": 0.0, "prompt_accuracy": 0.0}
    attributes, identities = load_judges(config.judges or miniature_folder() / "judges")
    by_id = {row.id: number for number, row in enumerate(rows)}
    gallery = torch.stack([identities.embed([decode_image(read_uri(uri)) for uri in row.images]) for row in rows])
    pictures = [picture for subject in subjects for picture in subject.pictures]
    labels = [by_id[subject.id] for subject in subjects for _ in subject.pictures]
    wanted = [named for subject in subjects for named in rows[by_id[subject.id]].metadata["wanted"]]
    return {
        "identification_top1": round(identification_top1(identities.embed(pictures), torch.tensor(labels), gallery), 4),
        "prompt_accuracy": round(prompt_accuracy(attributes, pictures, wanted), 4),
    }


def load_judges(folder: Path) -> tuple[AttributeJudge, IdentityJudge]:
    """From attributes/ and identity/. WeightsError where one is not there."""
    return AttributeJudge.load(folder / "attributes"), IdentityJudge.load(folder / "identity")


def _write(
    output: Path,
    subjects: list[Subject],
    curation: IngestReport,
    failures: list[dict[str, Any]],
    summary: dict[str, Any],
    training: TrainReport,
    config: DemoConfig,
) -> None:
    run = TrackedRun(tracking_uri=config.model.tracking_uri, run_id=training.run_id)
    write_page(
        output / "report.html",
        subjects=subjects,
        curve=Curve(points=run.curve("loss")),
        curation=asdict(curation),
        failures=failures,
        summary=summary,
    )
    first = [subject for subject in subjects if subject.prompts == subjects[0].prompts][:SUBJECTS_PER_SET]
    write_contact_sheet(output / "contact_sheet.png", first)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def run(config: DemoConfig) -> dict[str, Any]:
    """Runs the demo and prints its figures and where to look."""
    summary = demo(config)
    console = Console()
    console.print(
        f"{summary['images']} pictures of {summary['identities']} subjects, {summary['failed']} rows failed; "
        f"identified {summary['identification_top1']:.0%}, prompts followed {summary['prompt_accuracy']:.0%}, "
        f"{sum(summary['seconds'].values()):.0f} s"
    )
    for path in (config.output / name for name in ("report.html", "contact_sheet.png", "summary.json")):
        if path.exists():
            console.print(f"  {path}", soft_wrap=True)
    return summary


if __name__ == "__main__":
    cli.main(run, DemoConfig, __doc__)
