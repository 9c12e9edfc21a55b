"""The main job from end to end on a tiny model with random weights: pairs → shards → training → pictures."""

import json
import shutil
import signal
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import ray
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save

from instantbooth import Personalizer
from instantbooth.errors import InstantBoothError, ManifestError, ParameterError, TrainingError, WeightsError
from instantbooth.images import read_metadata
from instantbooth.manifest import ManifestRow
from instantbooth.miniature.samples import write_manifest, write_pairs
from instantbooth.model.weights import CONFIG_FILE, TENSORS_FILE
from instantbooth.prompts import PLACEHOLDER_TOKEN
from instantbooth.storage import FileStore, open_store, read_uri
from instantbooth.tracking import OUTPUT, TrackedRun
from instantbooth.training.adapters import AdapterTrainingConfig
from instantbooth.training.checkpoints import log_lines
from instantbooth.training.session import ComputeConfig
from jobs.bulk import BulkConfig, run
from jobs.train import TrainConfig, TrainReport, train
from pipelines.curation.precompute import Precomputed
from pipelines.ingest import IngestConfig, ingest
from pipelines.model import ModelConfig
from pipelines.outcome import SUCCEEDED, SUCCESS, Outcome, PersonalizeReport
from pipelines.personalize import OnRow, PersonalizeConfig, Pool, Tally, load_manifest, personalize
from pipelines.places import FAILED
from pipelines.trainer import LOG, PICTURES, Ending, Monitor, ValidationConfig, train_worker
from tests.curated import write_curated
from tests.tiny import tiny_booth, tiny_model

pytestmark = pytest.mark.usefixtures("ray_session")


@dataclass(frozen=True)
class Project:
    """Curated pairs, a manifest of three subjects, and a model."""

    folder: Path
    store: FileStore
    model: ModelConfig


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Project:
    folder = tmp_path_factory.mktemp("project")
    store = FileStore(folder)
    list(write_pairs(store, "pairs", 24))
    list(write_manifest(store, "orders", subjects=3, references=2))
    ingest(IngestConfig(source=f"{folder}/pairs", output=f"{folder}/curated", rows_per_shard=8, validation=0.2))
    tiny = tiny_model(folder / "model")
    tiny_booth(tiny).save_weights(folder / "weights")
    model = ModelConfig(
        base=str(tiny / "base"),
        image_encoder=str(tiny / "clip"),
        weights=str(folder / "weights"),
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
    )
    return Project(folder, store, model)


def train_config(project: Project, steps: int) -> TrainConfig:
    return TrainConfig(
        data=f"{project.folder}/curated",
        output=f"{project.folder}/train/short",
        model=project.model,
        artifacts=f"{project.folder}/artifacts",
        checkpoint_every=2,
        validation=ValidationConfig(every=3, pairs=2, pictures=1),
        adapters=AdapterTrainingConfig(steps=steps, batch_size=4, warmup_steps=1),
    )


@pytest.fixture(scope="module")
def trained(project: Project) -> TrainReport:
    before = signal.getsignal(signal.SIGINT)
    report = train(train_config(project, steps=5))
    assert signal.getsignal(signal.SIGINT) is before, "Ctrl-C would be lost on whatever comes after a training"
    return report


def test_training_changes_the_weights_and_is_tracked_and_registered(project: Project, trained: TrainReport) -> None:
    run = TrackedRun(tracking_uri=project.model.tracking_uri, run_id=trained.run_id)
    assert [step for step, _ in run.curve("loss")] == [1, 2, 3, 4, 5]
    assert trained.steps == 5
    tags = MlflowClient(project.model.tracking_uri).get_run(trained.run_id).data.tags
    assert tags["machine"].startswith("2 × "), "the workers', as their log tells"
    candidate = replace(project.model, weights="models:/instantbooth@candidate")
    assert candidate.pinned().weights == trained.weights, "an alias may move while a job runs"
    registered = candidate.pinned().load(device="cpu")
    local = Personalizer.from_pretrained(
        project.model.base, image_encoder=project.model.image_encoder, weights=trained.folder, device="cpu"
    )
    before = project.model.load(device="cpu")
    assert registered.weights_digest == local.weights_digest != before.weights_digest


def test_a_training_tells_whether_it_is_learning(project: Project, trained: TrainReport) -> None:
    run = TrackedRun(tracking_uri=project.model.tracking_uri, run_id=trained.run_id)
    layers = list(project.model.load(device="cpu").trained.adapters)
    for layer in layers:
        assert [step for step, _ in run.curve(f"gate/{layer}")] == [1, 2, 3, 4, 5]
    buckets = [dict(run.curve(f"validation/loss_t{timestep}")) for timestep in (125, 375, 625, 875)]
    assert [list(bucket) for bucket in buckets] == [[3]] * 4
    assert dict(run.curve("validation/loss"))[3] == pytest.approx(sum(bucket[3] for bucket in buckets) / 4)
    (picture,) = run.kept(PICTURES)
    assert Image.open(BytesIO(project.store.get(f"train/short/{picture}"))).size == (32, 64)
    speeds = dict(run.curve("samples_per_second"))
    assert list(speeds) == [1, 2, 3, 4, 5]
    assert min(speeds.values()) > 0, "a checkpoint must not reset it to nothing"
    assert min(value for _, value in run.curve("peak_memory_mb")) > 100


def test_the_best_checkpoint_is_the_one_that_was_validated(project: Project, trained: TrainReport) -> None:
    checkpoints = train_config(project, steps=5).checkpoints()
    assert checkpoints.steps() == [3, 4, 5], "2 and 4 were saved by their number, 3 as it was validated, 5 at the end"


@pytest.mark.full
def test_a_training_stops_at_samples_that_are_no_numbers_and_names_them(project: Project) -> None:
    base = Path(project.model.base)
    ids = write_curated(
        FileStore(project.folder / "poisoned"),
        6,
        precomputed=Precomputed.by(base, PLACEHOLDER_TOKEN),
        latents=np.full(4 * 16 * 16, np.nan, np.float16).tobytes(),
        prompt_embeds=np.zeros(24 * 32, np.float16).tobytes(),
    )
    config = replace(
        train_config(project, steps=5),
        data=f"{project.folder}/poisoned",
        output=f"{project.folder}/train/poisoned",
        precomputed=True,
        validation=ValidationConfig(),
        compute=ComputeConfig(max_skipped=0),
    )
    with pytest.raises(TrainingError, match="step 1: the loss is nan; 1 batches were skipped, at most 0 may be"):
        train(config)
    (line,) = log_lines(open_store(config.output), LOG).values()
    assert line["skipped"] == "the loss is nan"
    assert len(line["samples"]) == 4
    assert set(line["samples"]) <= {each[:15] for each in ids}


@pytest.mark.full
def test_a_pair_that_cannot_be_trained_on_is_named_before_a_training_starts(project: Project) -> None:
    caption = "very " * 30 + "nice {subject}"
    (name,) = write_curated(FileStore(project.folder / "overlong"), 1, caption=caption)
    config = replace(
        train_config(project, steps=5),
        data=f"{project.folder}/overlong",
        output=f"{project.folder}/train/overlong",
    )
    with pytest.raises(TrainingError, match=rf"^1 of 1 pairs cannot be trained on, first row {name} of \S*/overlong/"):
        train(config)
    assert not list(open_store(config.output).list())


def test_workers_that_are_started_again_learn_what_no_restart_mends() -> None:
    monitor = ray.remote(Monitor).options(num_cpus=0).remote(0)
    ray.get(monitor.fail.remote("the caption is too long"))
    assert train_worker({"job": None, "monitor": monitor}) == Ending(step=0, failure="the caption is too long")


def test_a_run_of_the_same_name_continues_from_its_last_checkpoint_whatever_is_ingested_since(
    project: Project, trained: TrainReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    whole = train_config(project, steps=7)
    model = ModelConfig(
        base="model/base", image_encoder="model/clip", weights="weights", tracking_uri="sqlite:///mlflow.db"
    )
    manifest = project.folder / "curated" / "manifest.json"
    began_with = manifest.read_text()
    files = [each for each in json.loads(began_with)["files"] if each["split"] != "train"]
    manifest.write_text(json.dumps(json.loads(began_with) | {"files": files}))
    longer = train(replace(whole, data="curated", output="train/short", artifacts="artifacts", model=model))
    manifest.write_text(began_with)
    run = TrackedRun(tracking_uri=project.model.tracking_uri, run_id=longer.run_id)
    assert [step for step, _ in run.curve("loss")][-2:] == [6, 7]
    assert longer.weights != trained.weights
    assert longer.run_id == trained.run_id
    assert train(whole) == longer


@pytest.mark.full
def test_a_training_goes_on_where_mlflow_is_down(project: Project) -> None:
    config = train_config(project, steps=1)
    output, model = f"{project.folder}/train/untracked", replace(config.model, tracking_uri="http://127.0.0.1:9")
    report = train(replace(config, output=output, model=model))
    assert (report.steps, report.run_id, report.weights) == (1, "", f"{output}/weights")
    assert train(replace(config, output=output)).weights.startswith("models:/instantbooth/")


def other_models(project: Project) -> tuple[ModelConfig, ModelConfig]:
    """The project's, with another noise schedule; the project's, with another CLIP. All shapes are the same."""
    folder = project.folder / "others"
    for part in ("base", "clip"):
        shutil.copytree(project.folder / "model" / part, folder / part)
    schedule = folder / "base" / "scheduler" / "scheduler_config.json"
    schedule.write_text(schedule.read_text().replace("0.012", "0.011"))
    clip = folder / "clip" / "model.safetensors"
    clip.write_bytes(save({name: values + 0.01 for name, values in load_file(clip).items()}, {"format": "pt"}))
    return (
        replace(project.model, base=str(folder / "base")),
        replace(project.model, image_encoder=str(folder / "clip")),
    )


def test_what_training_cannot_have_is_refused_at_once(project: Project, trained: TrainReport) -> None:
    config = train_config(project, steps=5)
    with pytest.raises(ParameterError, match=r"asks for 2 GPU, the cluster has 0; .*minReplicas"):
        train(replace(config, gpus_per_worker=1))
    with pytest.raises(ParameterError, match=r"5 CPU, 4 for workers and one for the feed .* has 4; lower workers"):
        train(replace(config, workers=4))
    with pytest.raises(ParameterError, match=r"identities is 2, and \S*/base is no miniature .*identities 0"):
        train(replace(config, validation=replace(config.validation, identities=2)))
    with pytest.raises(TrainingError, match="batch size 4, not"):
        train(replace(config, adapters=replace(config.adapters, batch_size=8)))
    for model, part in zip(other_models(project), ("base", "image encoder"), strict=True):
        with pytest.raises(TrainingError, match=rf"a run with {part} \w{{16}}, not {part} \w{{16}}; a run keeps"):
            train(replace(config, model=model))
    write_curated(FileStore(project.folder / "all-trained-on"), 4, validation=0)
    with pytest.raises(TrainingError, match=r"every is 3, and \S*/all-trained-on holds out no pairs to validate on"):
        train(replace(config, data=f"{project.folder}/all-trained-on"))
    with pytest.raises(TrainingError, match="nothing precomputed"):
        train(replace(config, precomputed=True))
    missing = ModelConfig(**(vars(project.model) | {"weights": "models:/instantbooth@nobody"}))
    with pytest.raises(WeightsError, match="nobody"):
        train(TrainConfig(**(vars(config) | {"model": missing})))


def interrupt(tally: Tally, outcome: Outcome | None) -> None:
    """Ctrl-C before the first row."""
    raise KeyboardInterrupt


def personalized(
    project: Project, name: str, manifest: list[ManifestRow], on_row: OnRow = lambda tally, outcome: None
) -> tuple[PersonalizeReport, list[dict], list[dict]]:
    """Runs the job on these rows; its report, and what it says of rows that succeeded and failed."""
    project.store.put(f"{name}.jsonl", "".join(row.to_json() + "\n" for row in manifest).encode())
    report = personalize(
        PersonalizeConfig(
            manifest=f"{project.folder}/{name}.jsonl",
            output=f"{project.folder}/{name}",
            model=project.model,
            diffusion=Pool(),
            row_budget=6,
            exact=True,
        ),
        on_row,
    )
    succeeded, failed = (
        [json.loads(line) for line in project.store.get(f"{name}/{kind}").splitlines()] for kind in (SUCCEEDED, FAILED)
    )
    assert (report.rows, report.failed) == (len(manifest), len(failed))
    return report, succeeded, failed


def test_a_bad_row_fails_alone_and_a_picture_does_not_depend_on_its_company(project: Project) -> None:
    rows = load_manifest(f"{project.folder}/orders/manifest.jsonl")
    unreadable = ManifestRow(
        id="absent", images=(f"{project.folder}/no.png",), class_noun="cat", prompts=rows[0].prompts
    )
    overlong = ManifestRow(
        id="overlong", images=rows[0].images, class_noun="cat", prompts=("very " * 40 + "nice {subject}", "{subject}")
    )
    report, succeeded, failed = personalized(project, "together", [unreadable, *rows, overlong])
    assert [record["id"] for record in succeeded] == [row.id for row in rows]
    assert [(record["id"], record["code"]) for record in failed] == [
        ("absent", "missing_object"),
        ("overlong", "prompt"),
    ]
    assert "no.png" in failed[0]["error"]
    assert "token" in failed[1]["error"]
    assert report.failures == {"missing_object": len(rows[0].prompts), "prompt": 1}
    (made,) = failed[1]["pictures"]
    assert failed[1]["prompts"] == [overlong.prompts[0]], "what was made is not to be made again"
    assert made["prompt"] == overlong.prompts[1]
    assert project.store.exists(f"together/{made['key']}")
    assert failed[0]["pictures"] == []
    again = load_manifest(f"{project.folder}/together/{FAILED}")
    assert [(row.id, row.attempt) for row in again] == [("absent", 1), ("overlong", 1)]
    assert report.images == sum(len(record["images"]) for record in succeeded) + 1

    _, alone, _ = personalized(project, "alone", [rows[1]])
    among = next(record for record in succeeded if record["id"] == rows[1].id)
    assert alone == [among]
    for image in among["images"]:
        first, second = (
            Image.open(BytesIO(project.store.get(f"{run}/{image['key']}"))) for run in ("alone", "together")
        )
        assert first.tobytes() == second.tobytes()
        assert first.text["prompt"] == image["prompt"]
        assert first.text["seed"] == str(image["seed"])
        assert first.text.keys() >= {"weights", "concept", "class_noun", "work"}

    assert report.stage_seconds.keys() == {"fetch", "encode", "denoise", "decode", "pack"}
    assert all(seconds > 0 for seconds in report.stage_seconds.values())
    page = project.store.get("together/report.html").decode()
    assert page.count('<section class="subject">') == len(rows)
    assert page.count("data:image/jpeg") == sum(len(row.images) + len(row.prompts) for row in rows)
    assert "no.png" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_job_as_it_is_typed_writes_webp_events_and_counters(project: Project, tmp_path: Path) -> None:
    rows = load_manifest(f"{project.folder}/orders/manifest.jsonl")[:1]
    project.store.put("typed.jsonl", (rows[0].to_json() + "\n").encode())
    report = run(
        BulkConfig(
            manifest=f"{project.folder}/typed.jsonl",
            output=f"{project.folder}/typed",
            model=project.model,
            concepts=f"{project.folder}/together",
            image_format="webp",
            diffusion=Pool(),
            row_budget=6,
            cost_per_gpu_hour=3.6,
            log=tmp_path / "events.jsonl",
        )
    )
    assert report.stage_cost == pytest.approx(
        {stage: report.stage_seconds[stage] / 1000 for stage in report.stage_cost}, abs=2e-4
    )
    (line,) = [json.loads(line) for line in project.store.get(f"typed/{SUCCEEDED}").splitlines()]
    carried = read_metadata(project.store.get(f"typed/{line['images'][0]['key']}"))
    assert (carried["seed"], carried["prompt"]) == (str(line["images"][0]["seed"]), rows[0].prompts[0])
    assert (carried["weights"], carried["concept"]) == (line["weights"], line["concept"])
    assert not list(project.store.list("typed/concepts/")), "the earlier output's concept serves"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "progress", "finished"]
    client = MlflowClient(project.model.tracking_uri)
    (logged,) = client.search_runs(["1"], f"tags.`{OUTPUT}` = '{project.folder}/typed'")
    assert logged.info.status == "FINISHED"
    assert (logged.data.metrics["rows_done"], logged.data.metrics["images"]) == (1, len(rows[0].prompts))


def test_a_job_run_again_does_only_what_is_missing(project: Project) -> None:
    rows = load_manifest(f"{project.folder}/orders/manifest.jsonl")
    first, succeeded, _ = personalized(project, "again", rows)
    stored = sorted(project.store.list("again/"))
    times = {key: (project.folder / key).stat().st_mtime_ns for key in stored}
    assert personalized(project, "again", rows)[0] == first
    assert {key: (project.folder / key).stat().st_mtime_ns for key in stored} == times

    changed = replace(rows[0], prompts=("a watercolor of a {subject}", *rows[0].prompts[1:]))
    with pytest.raises(KeyboardInterrupt):
        personalized(project, "again", [changed, *rows[1:]], interrupt)
    assert not project.store.exists(f"again/{SUCCESS}"), "it is not this job that is whole"
    second, after, _ = personalized(project, "again", [changed, *rows[1:]])
    assert second.images == first.images
    before, now = ({image["key"] for record in each for image in record["images"]} for each in (succeeded, after))
    assert len(now - before) == 1
    new = {key for key in project.store.list("again/") if key not in stored}
    assert len([key for key in new if key.startswith("again/images/")]) == 1
    assert not [key for key in new if key.startswith("again/concepts/")]


@pytest.mark.full
def test_a_job_that_goes_wrong_stops_and_goes_on_when_run_again(project: Project) -> None:
    rows = load_manifest(f"{project.folder}/orders/manifest.jsonl")
    lost = [replace(rows[0], id=f"lost{n}", images=(f"{project.folder}/no{n}.png",), masks=None) for n in range(3)]
    project.store.put("wrong.jsonl", "".join(row.to_json() + "\n" for row in lost).encode())
    config = PersonalizeConfig(
        manifest=f"{project.folder}/wrong.jsonl",
        output=f"{project.folder}/wrong",
        model=project.model,
        diffusion=Pool(),
        row_budget=6,
        max_failures=1,
    )
    for told in ("at last lost", "allows;"):
        # The second run stops before it does anything: rows that failed count in every run.
        with pytest.raises(InstantBoothError, match=rf"2 of 3 rows have failed .* more than max_failures .*{told}"):
            personalize(config)
    assert personalize(replace(config, max_failures=None)).failed == 3

    project.store.put("no0.png", read_uri(rows[0].images[0]))
    retried = replace(config, manifest=f"{project.folder}/wrong/../wrong/{FAILED}", max_failures=None)
    with pytest.raises(ParameterError, match="pass another --output, and --concepts"):
        personalize(retried)
    again = personalize(replace(retried, output=f"{project.folder}/wrong-again", concepts=f"{project.folder}/wrong"))
    assert (again.rows, again.failed, again.images) == (3, 2, len(rows[0].prompts))


def test_what_the_cluster_lacks_is_told_at_once(project: Project) -> None:
    config = PersonalizeConfig(
        manifest=f"{project.folder}/orders/manifest.jsonl", output=f"{project.folder}/none", model=project.model
    )
    with pytest.raises(ParameterError, match=r"1 of 0.5, .* takes 1 GPU; the cluster has 0"):
        personalize(replace(config, diffusion=Pool(gpus=0.5)))
    with pytest.raises(ParameterError, match=r"3 \+ 1 actors .* 1 more; the cluster has 4"):
        personalize(replace(config, concept=Pool(min=3, max=3)))


def test_weights_that_do_not_fit_end_the_job_in_their_own_words(project: Project) -> None:
    tensors = load_file(project.folder / "weights" / TENSORS_FILE)
    lacking = {name: value for name, value in tensors.items() if name != "encoders.patch.bias"}
    config = project.store.get(f"weights/{CONFIG_FILE}")
    project.store.put(f"lacking/{CONFIG_FILE}", config)
    project.store.put(f"lacking/{TENSORS_FILE}", save(lacking))
    with pytest.raises(WeightsError, match=r"does not fit the model in 1 tensors, first encoders.patch.bias"):
        run(
            BulkConfig(
                manifest=f"{project.folder}/orders/manifest.jsonl",
                output=f"{project.folder}/none",
                model=replace(project.model, weights=f"{project.folder}/lacking"),
                track=False,
            )
        )
    assert not [key for key in project.store.list("none/records/") if key.endswith(".json")]


def test_a_malformed_manifest_is_refused_whole_with_every_fault(project: Project) -> None:
    project.store.put("malformed.jsonl", b'{"id": "a/b"}\n{"id": 3}\n')
    with pytest.raises(ManifestError, match=r"(?s)line 1: .*line 2: "):
        personalize(PersonalizeConfig(manifest=f"{project.folder}/malformed.jsonl", output=f"{project.folder}/none"))
