"""Tables: made on Ray, resumed where they stopped, refused before any model runs where something is wrong."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tyro

from instantbooth.errors import InstantBoothError, ParameterError, WeightsError
from instantbooth.evaluation.judges import AttributeJudge
from instantbooth.evaluation.methods.registry import METHODS, Settings
from instantbooth.presets import miniature_folder
from jobs.evaluation.frontier import Frontier, entrants_of, plot
from jobs.evaluation.protocol import Protocol
from jobs.evaluation.report import Report, best_of, chosen, report
from jobs.evaluation.sweep import Entrant
from jobs.evaluation.table1 import Table1, table1
from jobs.evaluation.tune import Grid, Tune, candidates, score, tune

FAST = {"num_inference_steps": 1, "guidance_scale": 1.0}


def small_table(folder: Path) -> Table1:
    settings = folder / "settings.json"
    settings.write_text('{"dreambooth": {"steps": 1, "batch_size": 1, "prior_pictures": 1}}')
    return Table1(
        output=str(folder),
        settings=settings,
        methods=("dreambooth", "instantbooth"),
        split="validation",
        identities=2,
        gallery=4,
        references=2,
        prompts_per_kind=1,
        cpus=1,
        **FAST,
    )


def test_a_table_is_made_once_and_resumed_cell_by_cell(ray_session: None, tmp_path: Path) -> None:
    options = small_table(tmp_path)
    table1(options)
    rows = json.loads((tmp_path / "table1.json").read_text())["rows"]
    assert list(rows) == ["dreambooth", "instantbooth"]
    assert rows["dreambooth"]["settings"]["steps"] == 1
    assert rows["instantbooth"]["seconds_ratio"] == 1
    assert rows["dreambooth"]["seconds_ratio"] == pytest.approx(
        rows["dreambooth"]["seconds"]["mean"] / rows["instantbooth"]["seconds"]["mean"]
    )
    assert rows["instantbooth"]["instantbooth_more"]["alignment"] == {"mean": 0, "low": 0, "high": 0}
    more = rows["dreambooth"]["instantbooth_more"]["alignment"]["mean"]
    assert more == pytest.approx(rows["instantbooth"]["alignment"]["mean"] - rows["dreambooth"]["alignment"]["mean"])
    assert 0 <= rows["instantbooth"]["prompt_accuracy"]["low"] <= rows["instantbooth"]["prompt_accuracy"]["high"] <= 1

    page_options = {each.name: getattr(options, each.name) for each in fields(options)}
    reported = {"alignment": 0.3142, "reconstruction": 0.7265}
    verdict = {"alignment": "agrees", "reconstruction": "higher here"}
    row = rows["instantbooth"] | {"title": "U-Net tuned", "reported": reported, "verdict": verdict}
    made = json.loads((tmp_path / "table1.json").read_text())["made_by"] | {"training": {"steps": 7}}
    (tmp_path / "ablations.json").write_text(json.dumps({"made_by": made, "rows": {"unet-tuned": row}}))
    report(Report(**page_options, shown=1))
    page = (tmp_path / "report.html").read_text()
    assert all(words in page for words in ("U-Net tuned", "0.3142 ✓", "0.7265 higher here", "trained 7 steps"))
    assert page.count("<img") == 2 * (2 + 5 * 2), "two subjects with two references, five prompts and two methods each"
    assert "data:image/jpeg" in page
    assert "http" not in page, "the page loads nothing"

    records = sorted((tmp_path / "cells").rglob("cell.json"))
    assert len(records) == 4
    before = {path: path.stat().st_mtime_ns for path in records}
    records[2].unlink()
    table1(options)
    after = {path: path.stat().st_mtime_ns for path in records}
    assert [path for path in records if before[path] != after[path]] == [records[2]]


def test_other_settings_weights_or_sampling_are_other_cells(tmp_path: Path) -> None:
    parts = Protocol(output=str(tmp_path), **FAST).parts
    entrant = Entrant(label="", method="dreambooth", parts=parts)
    changed = replace(parts.settings, dreambooth=replace(parts.settings.dreambooth, steps=7))
    copied = tmp_path / "adapters"
    shutil.copytree(str(parts.models.weights), copied)
    (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
    other_weights = replace(parts, models=replace(parts.models, weights=str(copied)))
    digests = {
        entrant.digest,
        replace(entrant, parts=replace(parts, settings=changed)).digest,
        replace(entrant, parts=replace(parts, sampling=replace(parts.sampling, num_inference_steps=2))).digest,
    }
    assert len(digests) == 3
    # What a method has no part in is nothing to it.
    assert replace(entrant, parts=other_weights).digest == entrant.digest
    own = replace(entrant, method="instantbooth")
    assert replace(own, parts=other_weights).digest != own.digest


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"methods": ("dreamboth",)}, ParameterError, "Did you mean 'dreambooth'"),
        ({"methods": ()}, ParameterError, "no method is chosen"),
        ({"methods": ("ip-adapter",), "ip_adapter": Path("nowhere")}, WeightsError, r"jobs\.train_ip_adapter"),
        ({"identities": 0}, ParameterError, "identities must be at least 1"),
        ({"sampler": "eulr"}, ParameterError, "Did you mean 'euler'"),
        ({"num_inference_steps": 0}, ParameterError, "num_inference_steps must be"),
        ({"references": 0}, ParameterError, "references must be at least 1"),
        ({"settings": Path("nowhere.json")}, ParameterError, "nowhere.json cannot be read"),
        ({"models": Path("nowhere")}, InstantBoothError, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_any_model_runs(
    changes: dict[str, object], error: type[Exception], words: str, tmp_path: Path
) -> None:
    options = replace(small_table(tmp_path), **{"methods": ("instantbooth",), **changes})
    with pytest.raises(error, match=words):
        table1(options)
    assert not (tmp_path / "cells").exists()


def test_settings_survive_their_file_and_unknown_ones_are_refused() -> None:
    settings = Settings.from_json('{"textual_inversion": {"steps": 12}}')
    assert settings.textual_inversion.steps == 12
    assert Settings.from_json(settings.to_json()) == settings
    with pytest.raises(ParameterError, match="Did you mean 'dreambooth'"):
        Settings.from_json('{"dreamboth": {}}')
    with pytest.raises(ParameterError, match="cannot be read"):
        Settings.from_json('{"dreambooth": {"step": 3}}')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"dreambooth": {"steps": "many"}}', "dreambooth: steps must be int, is 'many'"),
        ('{"dreambooth": {"steps": 1.5}}', "steps must be int, is 1.5"),
        ('{"dreambooth": {"steps": true}}', "steps must be int, is True"),
        ('{"instantbooth": {"adapter_scale": "0.3"}}', "adapter_scale must be float | None, is '0.3'"),
        ('{"dreambooth": 3}', "cannot be read"),
        ("[]", "cannot be read"),
    ],
)
def test_settings_of_the_wrong_type_are_refused(text: str, words: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(words)):
        Settings.from_json(text)
    assert Settings.from_json('{"ip_adapter": {"scale": 1}, "instantbooth": {"adapter_scale": null}}')


def test_an_attribute_judge_that_lacks_what_prompts_want_is_refused(tmp_path: Path) -> None:
    for part in ("base", "clip", "segmenter", "adapters"):
        (tmp_path / part).symlink_to(miniature_folder() / part)
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "identity").symlink_to(miniature_folder() / "judges" / "identity")
    AttributeJudge({"style": ["photo", "watercolor"]}).save(tmp_path / "judges" / "attributes")
    options = replace(small_table(tmp_path), models=tmp_path, methods=("instantbooth",))
    with pytest.raises(ParameterError, match="the judge knows no"):
        table1(options)
    assert not (tmp_path / "cells").exists()


def test_tuning_tries_each_value_with_each_and_never_on_the_test_split(tmp_path: Path) -> None:
    parts = Protocol(output=str(tmp_path), **FAST).parts
    grid = Grid(dreambooth_learning_rate=(1e-4, 1e-3), dreambooth_steps=(1, 2, 3))
    entrants = candidates("dreambooth", parts, grid)
    tried = {(each.parts.settings.dreambooth.learning_rate, each.parts.settings.dreambooth.steps) for each in entrants}
    assert tried == {(rate, steps) for rate in (1e-4, 1e-3) for steps in (1, 2, 3)}
    assert len({each.label for each in entrants}) == len({each.digest for each in entrants}) == 6
    tuned = [name for name in METHODS if not name.startswith("instantbooth")]
    assert all(grid.of(name) for name in tuned)
    with pytest.raises(ParameterError, match="nothing to tune"):
        grid.of("instantbooth")
    with pytest.raises(ParameterError, match="not chosen on the split"):
        tune(Tune(split="test"))
    with pytest.raises(ParameterError, match="Did you mean 'dreambooth'"):
        tune(Tune(methods=("dreamboth",)))


def test_a_trial_that_gives_up_one_figure_for_the_other_does_not_win() -> None:
    def row(accuracy: float, similarity: float) -> dict[str, dict[str, float]]:
        return {"prompt_accuracy": {"mean": accuracy}, "face_similarity": {"mean": similarity}}

    assert score(row(0.6, 0.6)) > score(row(1.0, 0.3)) > score(row(0.9, -0.2)) == 0
    aligned = {"alignment": {"mean": 0.25}, "face_similarity": {"mean": 0.36}}
    assert score(aligned) == pytest.approx(0.3), "of photographs nobody knows attributes"


def test_the_page_shows_the_best_the_middle_and_the_worst_subject_and_none_of_them_twice() -> None:
    order = [(case, case / 10) for case in reversed(range(7))]
    assert chosen(order, 2) == [
        ("best", 6, 0.6),
        ("best", 5, 0.5),
        ("middle", 3, 0.3),
        ("worst", 1, 0.1),
        ("worst", 0, 0),
    ]
    assert chosen(order, 0) == [("middle", 3, 0.3)]
    for count in range(1, 7):
        assert len({case for _, case, _ in chosen(order[:count], 2)}) == min(count, 5)


def test_the_best_distance_is_the_lowest_and_the_best_of_the_rest_the_highest() -> None:
    rows = {
        "one": {"alignment": {"mean": 0.3}, "face_distance": {"mean": 0.9}},
        "two": {"alignment": {"mean": 0.2}, "face_distance": {"mean": 0.5}},
    }
    assert best_of(rows) == {"alignment": "one", "face_distance": "two"}


@pytest.mark.parametrize("method", ["foo", "dreambooth"])
def test_the_frontier_is_of_instantbooth(method: str) -> None:
    assert tyro.cli(Frontier, args=["--method", "instantbooth"]).method == "instantbooth"
    with pytest.raises(SystemExit) as ended:
        tyro.cli(Frontier, args=["--method", method])
    assert ended.value.code == 2


def test_the_frontier_varies_nothing_but_the_strengths(tmp_path: Path) -> None:
    options = Frontier(output=str(tmp_path), adapter_scales=(0.5, 1.0), concept_scales=(0.4,), ip_adapter_scales=(0.6,))
    series = entrants_of(options)
    betas = [each.parts.settings.instantbooth_masked.adapter_scale for each in series["grid"]]
    assert betas == [0.5, 1.0]
    assert {each.parts.sampling for entrants in series.values() for each in entrants} == {options.parts.sampling}
    assert [each.parts.settings.ip_adapter_plus.scale for each in series["ip-adapter-plus"]] == [0.6]
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    rows = {name: [{"title": name, "alignment": interval, "face_similarity": interval}] for name in series}
    assert plot(rows, "InstantBooth + M").startswith(b"<?xml")
