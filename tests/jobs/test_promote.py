"""From a registered candidate to a champion that anyone can load by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from instantbooth import Personalizer
from instantbooth.config import GenerationDefaults
from instantbooth.errors import ParameterError, TrackingError, WeightsError
from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.evaluation.miniature import judges_of
from instantbooth.miniature.world import ATTRIBUTES
from instantbooth.model.weights import read_tensors, tensors_digest
from instantbooth.presets import miniature_folder
from instantbooth.tracking import CANDIDATE, CHAMPION, Registry, open_run
from jobs.evaluation.protocol import Photographs, Protocol
from jobs.promote import GATES, PromoteConfig, promote, weigh
from serve.config import ServeConfig
from serve.model import pinned
from tests.photographed import VALIDATION, Embedding, people
from tests.tiny import tiny_booth


@pytest.fixture
def config(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> PromoteConfig:
    """A registry with one candidate, and judges that learned nothing."""
    tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    AttributeJudge(ATTRIBUTES).save(tmp_path / "judges/attributes")
    IdentityJudge().save(tmp_path / "judges/identity")
    config = PromoteConfig(tracking_uri=tracking_uri, identities=2, judges=tmp_path / "judges")
    register(config, tiny, tmp_path, step=1)
    return config


def register(config: PromoteConfig, tiny: Path, folder: Path, *, step: int) -> str:
    booth = tiny_booth(tiny)
    booth.defaults = GenerationDefaults(num_inference_steps=2 + step)
    booth.save_weights(folder / "weights")
    run = open_run(config.tracking_uri, "file:///some/run", artifacts=(folder / "artifacts").as_uri())
    return run.register(folder / "weights", step=step, base=str(tiny / "base"), image_encoder=str(tiny / "clip"))


def test_a_candidate_becomes_champion_and_is_loaded_by_name(config: PromoteConfig, tiny: Path, tmp_path: Path) -> None:
    first = promote(config)
    assert (first.promoted, first.champion, first.candidate) == (True, None, "models:/instantbooth/1")
    booth = Personalizer.from_pretrained("models:/instantbooth@champion", device="cpu")
    assert booth.weights_digest == tiny_booth(tiny).weights_digest
    named = Personalizer.from_pretrained(
        tiny / "base", image_encoder=tiny / "clip", weights="models:/instantbooth@champion", device="cpu"
    )
    assert named.weights_digest == booth.weights_digest
    endpoint = pinned(ServeConfig(weights="models:/instantbooth@champion"))
    assert endpoint.weights == "models:/instantbooth/1"
    table = Protocol(weights=Path("models:/instantbooth@champion")).parts
    assert table.sampling.num_inference_steps == booth.defaults.num_inference_steps
    assert tensors_digest(read_tensors(Path(table.models.weights or ""))) == booth.weights_digest

    assert register(config, tiny, tmp_path, step=2) == "models:/instantbooth/2"
    assert register(config, tiny, tmp_path, step=2) == "models:/instantbooth/2"
    refused = promote(replace(config, tolerance=-2.0))
    assert (refused.promoted, refused.champion) == (False, "models:/instantbooth/1")
    registry = Registry(config.tracking_uri)
    assert registry.version(CHAMPION).number == "1"
    assert promote(replace(config, tolerance=2.0)).promoted
    assert registry.version(CHAMPION).number == "2"
    assert Personalizer.from_pretrained("models:/instantbooth@champion").defaults.num_inference_steps == 4

    tags = (
        MlflowClient(config.tracking_uri, registry_uri=config.tracking_uri).get_model_version("instantbooth", "2").tags
    )
    assert tags["promotion"] == "promoted"
    assert "prompt_accuracy" in tags["reasons"]


def test_a_registry_that_does_not_answer_is_not_taken_for_one_without_a_champion(
    config: PromoteConfig, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(config)
    register(config, tiny, tmp_path, step=2)
    look_up = MlflowClient.get_model_version_by_alias

    def hiccup(client: MlflowClient, name: str, alias: str) -> object:
        if alias == CHAMPION:
            raise MlflowException("the database is locked")
        return look_up(client, name, alias)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_model_version_by_alias", hiccup)
        with pytest.raises(TrackingError, match="the database is locked"):
            promote(config)
    assert Registry(config.tracking_uri).version(CHAMPION).number == "1"


def test_a_registration_cut_short_gets_its_alias_and_an_older_one_does_not_take_it(
    config: PromoteConfig, tiny: Path, tmp_path: Path
) -> None:
    registry = Registry(config.tracking_uri)
    register(config, tiny, tmp_path, step=2)
    MlflowClient(config.tracking_uri, registry_uri=config.tracking_uri).set_registered_model_alias(
        "instantbooth", CANDIDATE, "1"
    )
    register(config, tiny, tmp_path, step=2)
    assert registry.version(CANDIDATE).number == "2"
    register(config, tiny, tmp_path, step=1)
    assert registry.version(CANDIDATE).number == "2"


def test_a_gate_fails_where_the_candidate_is_worse_by_more_than_the_tolerance() -> None:
    config = PromoteConfig(tolerance=0.02, floors=(0.0, 0.0, 0.5))
    champion = {"identification_top1": 0.5, "identity_similarity": 0.6, "prompt_accuracy": 0.9}
    assert weigh(champion, champion, config)[0] == []
    assert weigh(champion | {"identification_top1": 0.481}, champion, config)[0] == []
    failed, reasons = weigh(champion | {"identification_top1": 0.479}, champion, config)
    assert failed == ["identification_top1"]
    assert "0.4790 fails: at least 0.4800 (champion 0.5000)" in reasons[0]
    assert weigh(champion | {"prompt_accuracy": 0.4}, None, config)[0] == ["prompt_accuracy"]


def test_a_base_is_judged_by_its_own_miniatures_judges_or_by_those_that_are_named(config: PromoteConfig) -> None:
    assert judges_of("miniature") == miniature_folder() / "judges" == judges_of(str(miniature_folder() / "base"))
    assert judges_of("sd15") is None
    with pytest.raises(ParameterError, match=r"belongs to \S*/base, which is no miniature .* name photographs"):
        promote(replace(config, judges=None))


def test_versions_for_a_base_of_the_real_world_are_judged_on_photographs(
    config: PromoteConfig, tiny: Path, tmp_path: Path
) -> None:
    torch.jit.script(Embedding()).save(str(tmp_path / "face.pt"))
    photographs = Photographs(
        data=people(tmp_path, dict.fromkeys(VALIDATION, 5)),
        clip=str(tiny / "clip"),
        face=tmp_path / "face.pt",
        masks=tmp_path / "masks",
    )
    unfloored = replace(config, judges=None, photographs=photographs, floors=(-1.0, -1.0, -1.0))
    decision = promote(unfloored)
    assert decision.promoted
    assert {*decision.figures["candidate"]} == {*GATES}
    with pytest.raises(ParameterError, match="has 2 usable subjects of its validation split, identities is 3"):
        promote(replace(config, photographs=photographs, identities=3))
    with pytest.raises(ParameterError, match=r"--layout is for jobs\.evaluate"):
        replace(config, photographs=replace(photographs, layout="dreambench"))
    with pytest.raises(ParameterError, match="--face is for photographs"):
        replace(config, photographs=Photographs(face=tmp_path / "face.pt"))


@pytest.mark.usefixtures("config")
def test_what_is_not_registered_is_named() -> None:
    with pytest.raises(WeightsError, match="instantbooth@champion"):
        Personalizer.from_pretrained("models:/instantbooth@champion")
    with pytest.raises(WeightsError, match="names no version"):
        Personalizer.from_pretrained("models:/instantbooth")
