"""The main job from end to end on a tiny model with random weights: pairs → shards → training → pictures."""

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from instantbooth import Personalizer
from instantbooth.errors import ManifestError, ParameterError, WeightsError
from instantbooth.manifest import ManifestRow
from instantbooth.miniature.samples import write_manifest, write_pairs
from instantbooth.storage import FileStore
from instantbooth.tracking import TrackedRun
from instantbooth.training.adapters import AdapterTrainingConfig
from jobs.train import TrainConfig, TrainReport, train
from pipelines.ingest import IngestConfig, ingest
from pipelines.model import ModelConfig
from pipelines.personalize import PersonalizeConfig, load_manifest, personalize, picture_key, requests
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
    ingest(IngestConfig(source=f"{folder}/pairs", output=f"{folder}/curated", rows_per_shard=8))
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
        dataset=f"{project.folder}/curated",
        storage=f"{project.folder}/train",
        run_name="short",
        model=project.model,
        artifacts=f"{project.folder}/artifacts",
        checkpoint_every=2,
        adapters=AdapterTrainingConfig(steps=steps, batch_size=4, warmup_steps=1),
    )


@pytest.fixture(scope="module")
def trained(project: Project) -> TrainReport:
    return train(train_config(project, steps=5))


def test_training_changes_the_weights_and_is_tracked_and_registered(project: Project, trained: TrainReport) -> None:
    run = TrackedRun(tracking_uri=project.model.tracking_uri, run_id=trained.run_id)
    assert [step for step, _ in run.curve("loss")] == [1, 2, 3, 4, 5]
    assert trained.steps == 5
    registered = ModelConfig(**(vars(project.model) | {"weights": trained.weights})).load(device="cpu")
    local = Personalizer.from_pretrained(
        project.model.base, image_encoder=project.model.image_encoder, weights=trained.folder, device="cpu"
    )
    before = project.model.load(device="cpu")
    assert registered.weights_digest == local.weights_digest != before.weights_digest


def test_a_run_of_the_same_name_continues_from_its_last_checkpoint(project: Project, trained: TrainReport) -> None:
    longer = train(train_config(project, steps=7))
    run = TrackedRun(tracking_uri=project.model.tracking_uri, run_id=longer.run_id)
    assert [step for step, _ in run.curve("loss")][-2:] == [6, 7]
    assert longer.weights != trained.weights


def test_what_training_cannot_have_is_refused_at_once(project: Project) -> None:
    config = train_config(project, steps=5)
    with pytest.raises(ParameterError, match="the cluster has 0"):
        train(TrainConfig(**(vars(config) | {"gpus_per_worker": 1})))
    missing = ModelConfig(**(vars(project.model) | {"weights": "models:/instantbooth@nobody"}))
    with pytest.raises(WeightsError, match="nobody"):
        train(TrainConfig(**(vars(config) | {"model": missing})))


def test_a_bad_row_fails_alone_and_a_picture_does_not_depend_on_its_company(project: Project) -> None:
    rows = load_manifest(f"{project.folder}/orders/manifest.jsonl")
    unreadable = ManifestRow(
        id="absent", images=(f"{project.folder}/no.png",), class_noun="cat", prompts=rows[0].prompts
    )
    long = "very " * 40 + "nice {subject}"
    overlong = ManifestRow(id="overlong", images=rows[0].images, class_noun="cat", prompts=(long,))

    def run(name: str, manifest: list[ManifestRow]) -> list[dict[str, object]]:
        project.store.put(f"{name}.jsonl", "".join(row.to_json() + "\n" for row in manifest).encode())
        report = personalize(
            PersonalizeConfig(
                manifest=f"{project.folder}/{name}.jsonl",
                output=f"{project.folder}/{name}",
                model=project.model,
                generators=1,
                images_per_call=5,
            )
        )
        succeeded = [json.loads(line) for line in project.store.get(f"{name}/succeeded.jsonl").splitlines()]
        failed = [json.loads(line) for line in project.store.get(f"{name}/failed.jsonl").splitlines()]
        assert (report.rows, report.failed) == (len(manifest), len(failed))
        assert report.images == sum(len(record["images"]) for record in succeeded)
        return succeeded + failed

    together = run("together", [unreadable, *rows, overlong])
    assert [record["id"] for record in together] == [*(row.id for row in rows), "absent", "overlong"]
    assert "no.png" in together[-2]["error"]
    assert "token" in together[-1]["error"]

    run("alone", [rows[1]])
    for request in requests(rows[1]):
        key = picture_key(rows[1].id, request.prompt_index, request.number)
        alone, among = (Image.open(BytesIO(project.store.get(f"{run}/{key}"))) for run in ("alone", "together"))
        assert alone.tobytes() == among.tobytes()
        assert alone.text["prompt"] == request.prompt
        assert alone.text["seed"] == str(request.seed)
        assert alone.text.keys() >= {"weights", "concept", "class_noun"}


def test_a_malformed_manifest_is_refused_whole_with_every_fault(project: Project) -> None:
    project.store.put("malformed.jsonl", b'{"id": "a/b"}\n{"id": 3}\n')
    with pytest.raises(ManifestError, match=r"(?s)line 1: .*line 2: "):
        personalize(PersonalizeConfig(manifest=f"{project.folder}/malformed.jsonl", output=f"{project.folder}/none"))
