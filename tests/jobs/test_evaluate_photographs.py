"""The tables on photographs, from end to end with tiny models, and what is refused before any of it is made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from instantbooth.errors import ImageError, InstantBoothError, ParameterError, WeightsError
from instantbooth.evaluation.ip_adapter import weights
from instantbooth.evaluation.ip_adapter.origin import MODELS
from instantbooth.evaluation.methods.registry import METHODS
from instantbooth.evaluation.metrics import reconstruction
from instantbooth.evaluation.miniature_cases import draw_cases
from instantbooth.images import mask_coverage
from instantbooth.model.record import RECORD
from instantbooth.presets import miniature_folder
from jobs.evaluation.frontier import Frontier, frontier
from jobs.evaluation.protocol import Photographs
from jobs.evaluation.references import References, references
from jobs.evaluation.sweep import Entrant, sweep
from jobs.evaluation.table1 import Table1, made_by, table1
from jobs.evaluation.tune import Grid, Tune, tune
from tests.photographed import TEST, VALIDATION, people, photographed, untrained_adapters, write


def read(options: Any, file: str) -> Any:
    return json.loads((Path(options.output) / file).read_text())


def pictured(options: Any, method: str) -> set[str]:
    """Whose cells of a method there are."""
    return {path.parent.name.rpartition("-")[0] for path in Path(options.output).glob(f"cells/{method}/*/*/cell.json")}


def test_settings_are_tuned_on_identities_that_are_not_tested(ray_session: None, tiny: Path, tmp_path: Path) -> None:
    grid = Grid(textual_inversion_learning_rate=(1e-3,), textual_inversion_steps=(1, 2), ip_adapter_scale=(0.5, 1.0))
    options = Tune(**photographed(tiny, tmp_path), references=1, methods=("textual-inversion", "ip-adapter"), grid=grid)
    tune(options)
    trials = read(options, "tuning.json")
    assert len(trials) == 4
    for row in trials.values():
        assert "prompt_accuracy" not in row, "no judge knows attributes of photographs"
        found = max(row["alignment"]["mean"], 0) * max(row["face_similarity"]["mean"], 0)
        assert row["score"] == pytest.approx(found**0.5)
    tried = [row for label, row in trials.items() if label.startswith("ip-adapter")]
    best = max(tried, key=lambda row: (row["score"], row["face_similarity"]["mean"]))
    chosen = read(options, "settings.json")
    assert set(chosen) == {"textual_inversion", "ip_adapter"}, "the others were not tuned"
    assert chosen["ip_adapter"] == best["settings"]
    assert pictured(options, "ip-adapter") == set(VALIDATION)


def test_the_number_of_references_changes_what_is_given_and_nothing_else(
    ray_session: None, tiny: Path, tmp_path: Path
) -> None:
    options = References(**photographed(tiny, tmp_path), methods=("instantbooth",), counts=(1, 3))
    # With one picture alone it would come first among those who have enough for the lowest count.
    people(tmp_path, {"abel": 1})
    references(options)
    found = read(options, "references.json")
    assert list(found["rows"]) == ["1", "3"]
    assert found["made_by"]["protocol"]["references"] == 3
    assert "--references" not in found["made_by"]["command"], "which refuses it"
    assert found["made_by"]["protocol"]["gallery"] == len(TEST), "as many as there are"
    assert found["made_by"]["protocol"]["dropped"] == {"abel": "1 pictures, 3 are needed"}
    assert pictured(options, "instantbooth") == {"ada", "ben"}

    entrant = Entrant(label="instantbooth", method="instantbooth", parts=options.parts)
    cells = sweep(replace(options, references=1), [entrant])["instantbooth"]
    judges, cases = options.judges, replace(options, references=3).cases
    expected = [
        reconstruction(judges.clip, judges.processor, cell.pictures[-2:], [each.image for each in case.references])
        for case, cell in zip(cases, cells, strict=True)
    ]
    shown = found["rows"]["1"]["instantbooth"]["reconstruction"]["mean"]
    assert shown == pytest.approx(float(torch.cat(expected).mean())), "one was given, three are compared with"


def test_the_frontier_is_made_of_photographs_too(ray_session: None, tiny: Path, tmp_path: Path) -> None:
    options = Frontier(
        **photographed(tiny, tmp_path),
        references=1,
        method="instantbooth",
        adapter_scales=(0.5,),
        concept_scales=(0.4, 0.8),
        ip_adapter_scales=(0.5,),
        points=("instantbooth-masked",),
    )
    code = 0
    try:
        frontier(options)
    except SystemExit as ended:
        code = ended.code
    found = read(options, "frontier.json")
    assert code == (0 if all(met for _, _, met in found["goals"].values()) else 1)
    series = found["series"]
    assert {name: len(rows) for name, rows in series.items()} == {
        "grid": 2,
        "points": 2,
        "ip-adapter": 1,
        "ip-adapter-plus": 1,
    }
    assert len({row["alignment"]["mean"] for rows in series.values() for row in rows}) == 6, "each has its own pictures"
    assert "<svg" in (tmp_path / "out" / "frontier.svg").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"models": Path("elsewhere")}, ParameterError, "--models is for the miniature"),
        ({"prompts_per_kind": 3}, ParameterError, "--prompts-per-kind is for the miniature"),
        ({"pictures_per_prompt": 1}, ParameterError, "--pictures-per-prompt is for --layout dreambench"),
        ({"layout": "dreambench"}, ParameterError, "--masks is for identities"),
        (
            {"layout": "dreambench", "masks": None, "split": "validation"},
            ParameterError,
            "all of DreamBench's subjects are",
        ),
        (
            {"layout": "dreambench", "masks": None, "pictures_per_prompt": 0},
            ParameterError,
            "pictures_per_prompt must be",
        ),
        ({"identities": 0}, ParameterError, "identities must be at least 1, is 0"),
        ({"identities": -5}, ParameterError, "identities must be at least 1, is -5"),
        ({"identities": 9}, ParameterError, "3 usable subjects of its test split, identities is 9"),
        ({"identities": 3, "split": "validation"}, ParameterError, "2 usable subjects of its validation split"),
        ({"masks": None}, ParameterError, "instantbooth-masked needs masks, and the pictures of ada have none"),
        ({"class_noun": "persn"}, ParameterError, "Did you mean 'person'"),
        ({"weights": miniature_folder() / "adapters"}, WeightsError, "does not fit the model"),
        ({"cpus": 0.0}, ParameterError, "cpus must be above 0, is 0"),
        ({"cpus": -1.0}, ParameterError, "cpus must be above 0, is -1"),
        ({"gpus": 1.5}, ParameterError, "gpus must be whole or a part of one, is 1.5"),
    ],
)
def test_what_is_wrong_with_photographs_is_said_before_any_cell(
    changes: dict[str, Any], error: type[Exception], words: str, prepared: dict[str, Any], tmp_path: Path
) -> None:
    known = vars(prepared["photographs"])
    photographs = replace(prepared["photographs"], **{key: changes[key] for key in changes if key in known})
    others = {key: changes[key] for key in changes if key not in known}
    given = prepared | {"references": 1, "photographs": photographs, "output": str(tmp_path)} | others
    with pytest.raises(error, match=words):
        table1(Table1(**given, methods=("instantbooth-masked",)))
    assert not (tmp_path / "cells").exists()


def test_nothing_is_tuned_on_dreambench(prepared: dict[str, Any]) -> None:
    photographs = replace(prepared["photographs"], layout="dreambench", masks=None)
    with pytest.raises(ParameterError, match="all of DreamBench's subjects are for the test"):
        tune(Tune(**prepared | {"photographs": photographs}, methods=("dreambooth",)))


@pytest.fixture(scope="module")
def prepared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return photographed(tiny, tmp_path_factory.mktemp("prepared"))


def test_an_ip_adapter_of_another_base_is_refused_before_any_cell(prepared: dict[str, Any], tmp_path: Path) -> None:
    foreign = str(miniature_folder() / "clip")
    options = Table1(**prepared, ip_adapter_image_encoder=foreign, references=1, methods=("ip-adapter",))
    with pytest.raises(WeightsError, match="reads another image encoder"):
        table1(options)
    file = tmp_path / "global" / weights.FILE
    file.parent.mkdir()
    tensors = load_file(prepared["ip_adapter"] / "global" / weights.FILE)
    tensors["ip_adapter.1.to_k_ip.weight"] = torch.zeros(8, 8)
    save_file(tensors, file)
    options = Table1(**prepared | {"ip_adapter": tmp_path, "output": str(tmp_path / "out")}, methods=("ip-adapter",))
    with pytest.raises(WeightsError, match="does not fit the base"):
        table1(replace(options, references=1))
    file.with_name(RECORD).write_text(json.dumps({MODELS: {}}))
    with pytest.raises(WeightsError, match="was trained for another tokenizer"):
        table1(replace(options, references=1))


def test_an_ip_adapter_may_read_an_image_encoder_of_its_own(
    prepared: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    clip = miniature_folder() / "clip"
    own = {"ip_adapter": untrained_adapters(tiny, tmp_path, clip), "ip_adapter_image_encoder": str(clip)}
    options = Table1(**prepared | own, references=1, methods=("ip-adapter",))
    options.check(options.methods)
    method = METHODS["ip-adapter"].build(options.parts)
    assert method.image_encoder.folder == clip


def test_methods_of_any_class_need_no_noun_that_weights_know(
    prepared: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = people(tmp_path, {"ada": 2, "ben": 2, "joe": 1})
    photographs = replace(prepared["photographs"], data=data, masks=tmp_path / "masks", class_noun="teapot")
    options = Table1(**prepared | {"photographs": photographs}, references=2, methods=("dreambooth",))
    options.check(options.methods)
    assert [case.class_noun for case in options.cases] == ["teapot"] * 2
    assert "left out: joe, 1 pictures, 2 are needed" in capsys.readouterr().err
    assert made_by(options, "table1")["protocol"]["dropped"] == {"joe": "1 pictures, 2 are needed"}


def test_only_the_chosen_subjects_are_decoded(prepared: dict[str, Any], tmp_path: Path) -> None:
    data = people(tmp_path, {"ada": 1, "ben": 1, "eve": 1})
    (data / "eve" / "0.jpg").write_bytes(b"no picture")
    photographs = replace(prepared["photographs"], data=data, masks=None)
    options = Table1(**prepared | {"photographs": photographs}, references=1)
    assert [case.name for case in options.cases] == ["ada", "ben"]
    with pytest.raises(ImageError, match=r"0\.jpg"):
        _ = replace(options, identities=3).cases


def test_a_damaged_picture_of_the_gallery_is_told_before_any_cell(prepared: dict[str, Any], tmp_path: Path) -> None:
    data = people(tmp_path, {"ada": 1, "ben": 1, "eve": 1})
    (data / "eve" / "0.jpg").write_bytes(b"no picture")
    photographs = replace(prepared["photographs"], data=data, masks=None)
    options = Table1(**prepared | {"photographs": photographs}, references=1, methods=("dreambooth",))
    with pytest.raises(ImageError, match=r"eve/0\.jpg"):
        options.check(options.methods)
    replace(options, gallery=2).check(options.methods)


def test_a_reference_without_its_subject_is_told_before_any_cell(prepared: dict[str, Any], tmp_path: Path) -> None:
    segmenter = str(miniature_folder() / "segmenter")
    photographs = replace(prepared["photographs"], data=tmp_path / "photos", masks=None, segmenter=segmenter)
    write(tmp_path / "photos" / "ada" / "0.png", Image.new("RGB", (64, 64), "white"))
    options = Table1(**prepared | {"photographs": photographs, "identities": 1}, references=1)
    for method in ("instantbooth-masked", "ip-adapter"):
        with pytest.raises(ImageError, match="ada, reference 1: no person found in it"):
            replace(options, methods=(method,)).check((method,))
    replace(options, methods=("dreambooth",)).check(("dreambooth",))


def test_masks_are_found_once_for_all_methods_that_read_them(prepared: dict[str, Any], tmp_path: Path) -> None:
    segmenter = str(miniature_folder() / "segmenter")
    photographs = replace(prepared["photographs"], data=tmp_path / "photos", masks=None, segmenter=segmenter)
    for number, case in enumerate(draw_cases("validation", 3, references=1)[::2]):
        write(tmp_path / "photos" / TEST[number] / "0.png", case.references[0].image)
    options = Table1(**prepared | {"photographs": photographs}, references=1, methods=("ip-adapter",))
    found = [case.references[0].mask for case in options.cases]
    assert all(mask is not None and 0.05 < mask_coverage(mask) < 0.9 for mask in found)
    others = replace(options, methods=("dreambooth",)).cases
    assert all(case.references[0].mask is None for case in others), "nobody reads them"
    teapots = replace(options, photographs=replace(photographs, class_noun="teapot")).cases
    assert all(case.references[0].mask is None for case in teapots), "the segmenter knows none"


def test_another_clip_may_judge_than_methods_read(prepared: dict[str, Any], tiny: Path) -> None:
    photographs = replace(prepared["photographs"], judge_clip=str(miniature_folder() / "clip"))
    options = Table1(**prepared | {"photographs": photographs}, references=1)
    assert options.preset.image_encoder == str(tiny / "clip")
    assert (
        options.judges.clip.config.projection_dim
        != replace(options, photographs=prepared["photographs"]).judges.clip.config.projection_dim
    )
    assert made_by(options, "table1")["places"]["judge_clip"] == str(miniature_folder() / "clip")


def test_the_number_of_references_is_said_by_the_counts_alone() -> None:
    with pytest.raises(ParameterError, match="--references does nothing here"):
        references(References(references=2))


@pytest.mark.parametrize(
    "name", ["base", "clip", "judge_clip", "face", "face_size", "layout", "class_noun", "masks", "segmenter"]
)
def test_options_for_photographs_do_nothing_without_any_and_are_refused(name: str) -> None:
    value: Any = "dreambench" if name == "layout" else Path("given") if name in ("face", "masks") else "given"
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(InstantBoothError, match=f"{option} is for photographs, and there are none without --data"):
        table1(Table1(photographs=Photographs(**{name: value})))
