"""Tables: made on Ray, resumed where they stopped, refused before any model runs where something is wrong."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from mlflow import MlflowClient

from instantbooth.errors import InstantBoothError, ParameterError, WeightsError
from instantbooth.evaluation.cells import Cell, Seconds
from instantbooth.evaluation.figures import Value
from instantbooth.evaluation.judges import AttributeJudge
from instantbooth.evaluation.methods.registry import METHODS, Settings
from instantbooth.presets import miniature_folder
from instantbooth.storage import open_store
from instantbooth.tracking import EXPERIMENT
from jobs.cli import command_line
from jobs.evaluation.found import Found, differences, look
from jobs.evaluation.frontier import Frontier, entrants_of, plot
from jobs.evaluation.goals import goals_at_equal_alignment, goals_of
from jobs.evaluation.protocol import Photographs, Protocol
from jobs.evaluation.report import Report, best_of, chosen, page_of, report
from jobs.evaluation.sweep import Entrant, sweep
from jobs.evaluation.table1 import DRAWN, Judged, Table1, judge_all, machines_in_words, made_by, table1, table_rows
from jobs.evaluation.tune import Grid, Tune, candidates, score, tune, with_settings

FAST = {"num_inference_steps": 1, "guidance_scale": 1.0}


def small_table(folder: Path) -> Table1:
    (folder / "settings.json").write_text('{"dreambooth": {"steps": 1, "batch_size": 1, "prior_pictures": 1}}')
    return Table1(
        output=str(folder),
        methods=("dreambooth", "instantbooth"),
        split="validation",
        identities=2,
        gallery=4,
        references=2,
        prompts_per_kind=1,
        cpus=1,
        **FAST,
    )


def missing_its_goals(options: Table1) -> dict[str, Any]:
    """The table of methods that one step did not train."""
    with pytest.raises(SystemExit) as ended:
        table1(options)
    assert ended.value.code == 1
    found: dict[str, Any] = json.loads(Path(options.output, "table1.json").read_text())
    return found


def write_beside(folder: Path, table: dict[str, Any]) -> None:
    """What the other commands would leave: the table's rows in their layouts."""
    made, row = table["made_by"], table["rows"]["instantbooth"]
    reported = {"alignment": 0.3142, "reconstruction": 0.7265}
    verdict = {"alignment": "agrees", "reconstruction": "higher here"}
    tuned = row | {"title": "U-Net tuned", "reported": reported, "verdict": verdict}
    ablations = {"made_by": made | {"training": {"steps": 7}}, "rows": {"unet-tuned": tuned}}
    (folder / "ablations.json").write_text(json.dumps(ablations))
    (folder / "references.json").write_text(json.dumps({"made_by": made, "rows": {"7": {"instantbooth": row}}}))
    strong = row | {"method": "instantbooth", "settings": {"adapter_scale": 1.25, "concept_scale": 0.45}}
    series = {"grid": [strong], "points": [strong], "ip-adapter": [strong], "ip-adapter-plus": [strong]}
    goals = {"ahead at equal alignment": [0.25, 0.0, True]}
    (folder / "frontier.json").write_text(json.dumps({"made_by": made, "series": series, "goals": goals}))
    (folder / "frontier.svg").write_bytes(plot(series, "InstantBooth"))


def test_a_table_is_made_once_and_resumed_cell_by_cell_and_shown_on_a_page(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray's workers are not where the driver is: relative places must be the driver's.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    Path("models").symlink_to(miniature_folder())
    options = replace(small_table(tmp_path), output=".", models=Path("models"))
    table = missing_its_goals(options)
    rows = table["rows"]
    assert list(rows) == ["dreambooth", "instantbooth"]
    assert rows["dreambooth"]["settings"]["steps"] == 1
    assert rows["dreambooth"]["settings_from"] == f"tuned, {tmp_path.as_uri()}/settings.json"
    assert rows["instantbooth"]["settings_from"] == "the weights' own"
    assert rows["instantbooth"]["seconds_ratio"] == 1
    ratio = rows["dreambooth"]["seconds"]["mean"] / rows["instantbooth"]["seconds"]["mean"]
    assert rows["dreambooth"]["seconds_ratio"] == pytest.approx(ratio)
    assert table["goals"]["InstantBooth: times as fast as DreamBooth"] == [pytest.approx(ratio), 100, False]
    assert rows["instantbooth"]["leads"]["instantbooth"]["alignment"] == {"mean": 0, "low": 0, "high": 0}
    more = rows["dreambooth"]["leads"]["instantbooth"]["alignment"]["mean"]
    assert more == pytest.approx(rows["instantbooth"]["alignment"]["mean"] - rows["dreambooth"]["alignment"]["mean"])
    assert table["drawn"]["prompt_accuracy"]["mean"] > 0.97
    assert 0 <= rows["instantbooth"]["prompt_accuracy"]["low"] <= rows["instantbooth"]["prompt_accuracy"]["high"] <= 1

    write_beside(tmp_path, table)
    options_of_page = Report(**{each.name: getattr(options, each.name) for each in fields(options)}, shown=1)
    # A table of fewer subjects, made since, is not what the page shows.
    (tmp_path / "table1.json").write_text("{}")
    report(options_of_page)
    assert json.loads((tmp_path / "table1.json").read_text()) == table
    page = (tmp_path / "report.html").read_text()
    assert DRAWN in page
    assert all(words in page for words in ("U-Net tuned", "0.3142 ✓", "0.7265 higher here", "trained 7 steps"))
    assert all(words in page for words in ("<td>0.45</td><td>1.25</td>", "<td>7</td>", "ahead at equal alignment"))
    assert page.count("<img") == 2 * (2 + 5 * 2), "two subjects with two references, five prompts and two methods each"
    loaded = re.findall(r'(?:src|href)="([^"]*)', page)
    assert any(each.startswith("data:image/jpeg") for each in loaded)
    assert any(each.startswith("#") for each in loaded), "the plot is there"
    assert all(each.startswith(("data:image/jpeg", "#")) for each in loaded), "the page loads nothing"
    assert not {"<?xml", "<!DOCTYPE svg"} & set(re.findall(r"<\?xml|<!DOCTYPE svg", page))

    client = MlflowClient("sqlite:///mlflow.db")
    [experiment] = [each for each in client.search_experiments() if each.name == EXPERIMENT]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["table1.dreambooth.alignment.mean"] == rows["dreambooth"]["alignment"]["mean"]
    assert {name.partition(".")[0] for name in run.data.metrics} == {"table1", "ablations", "references", "frontier"}
    assert run.data.params["digests.base"] == table["made_by"]["digests"]["base"]
    assert run.data.params["settings.dreambooth.steps"] == "1"

    judged = [
        replace(each, values=[value for value in each.values if value.column != "reconstruction"])
        for each in judge_all(options, options.entrants)
    ]
    made, nothing = table["made_by"], Found(files={}, left_out=("frontier.json is left out",))
    bare = page_of(options_of_page, judged, table_rows(options, judged), None, made, nothing, None)
    assert "Reconstruction" not in bare
    assert "frontier.json is left out" in bare

    with pytest.raises(
        ParameterError, match=r"2 of 6 cells are not made yet, such as DreamBooth's; run jobs\.evaluate table1"
    ):
        report(replace(options_of_page, identities=3))

    records = sorted((tmp_path / "cells").rglob("cell.json"))
    assert len(records) == 4
    before = {path: path.stat().st_mtime_ns for path in records}
    records[2].unlink()
    missing_its_goals(options)
    after = {path: path.stat().st_mtime_ns for path in records}
    assert [path for path in records if before[path] != after[path]] == [records[2]]


def test_times_of_different_machines_are_not_compared(tmp_path: Path) -> None:
    options = small_table(tmp_path)
    values = [Value(column=column, case=0, kind="", value=2.0) for column in ("seconds", "seconds_all")]
    seconds = Seconds(fit=1.0, first=1.0, rest=0.0)

    def row_of_dreambooth(*machines: str) -> tuple[dict[str, Any], str]:
        cells = [Cell(seconds=seconds, pictures=(), machine=machine, code="v1") for machine in ("abacus", *machines)]
        judged = [
            Judged(entrant=each, cells=own, values=values)
            for each, own in zip(options.entrants, (cells, cells[:1]), strict=True)
        ]
        rows = table_rows(options, judged)
        return rows["dreambooth"], machines_in_words(rows)

    row, words = row_of_dreambooth("abacus")
    assert (row["seconds_ratio"], words) == (1, "Times: abacus.")
    row, words = row_of_dreambooth("loom")
    assert "seconds_ratio" not in row
    assert words.endswith("do not compare: DreamBooth: abacus and loom; InstantBooth: abacus.")


def test_the_goals_are_those_of_the_method_and_each_can_be_missed() -> None:
    def row(alignment: float, distance: float, identification: float, ratio: float) -> dict[str, Any]:
        figures = {"alignment": alignment, "face_distance": distance, "identification": identification}
        more = {name: {"mean": value, "low": value - 0.1, "high": value + 0.1} for name, value in figures.items()}
        return {"leads": dict.fromkeys(("instantbooth", "instantbooth-masked"), more | {"times_as_fast": ratio})}

    own = {"instantbooth": row(0, 0, 0, 1)}
    reached = own | {
        "textual-inversion": row(0.11, -0.11, 0, 250),
        "dreambooth": row(0.11, -0.11, 0, 100),
        "ip-adapter": row(-0.009, 0, 0.11, 1),
    }
    assert len(goals_of(reached)) == 8
    both = goals_of(reached | {"instantbooth-masked": row(0, 0, 0, 1)})
    assert len(both) == 16, "asked of both rows of the method"
    assert all(met for _, _, met in goals_of(reached).values())
    missed = own | {"dreambooth": row(0.09, -0.09, 0, 99), "ip-adapter": row(-0.02, 0, 0.09, 1)}
    assert not any(met for _, _, met in goals_of(missed).values())
    assert goals_of({"dreambooth": reached["dreambooth"]}) == {}
    lead = {**reached["dreambooth"]["leads"]["instantbooth"]}
    del lead["times_as_fast"]
    elsewhere = goals_of(own | {"dreambooth": {"leads": {"instantbooth": lead}}})
    assert elsewhere["InstantBooth: times as fast as DreamBooth"] == (0, 100, False), "timed on another machine"


def test_a_peer_is_met_where_its_scales_give_the_same_alignment() -> None:
    def row(alignment: float, identification: float) -> dict[str, Any]:
        return {"title": "Ours", "alignment": {"mean": alignment}, "identification": {"mean": identification}}

    curve = {"ip-adapter": [row(0.3, 0.4), row(0.2, 0.8)]}
    name = "Ours: identification above IP-Adapter's at equal alignment"
    assert goals_at_equal_alignment(row(0.25, 0.7), curve)[name] == (pytest.approx(0.1), 0, True)
    assert goals_at_equal_alignment(row(0.25, 0.5), curve)[name] == (pytest.approx(-0.1), 0, False)
    assert goals_at_equal_alignment(row(0.4, 0.5), curve)[name] == (pytest.approx(0.1), 0, True)
    assert goals_at_equal_alignment(row(0.1, 0.7), curve)[name] == (pytest.approx(-0.1), 0, False)
    turning = {"ip-adapter": [row(0.3, 0.3), row(0.31, 0.45), row(0.2, 0.8)]}
    assert goals_at_equal_alignment(row(0.3, 0.4), turning)[name][2] is False, "better on both axes at a higher scale"


def test_what_was_made_of_other_subjects_or_models_is_left_out_of_the_page(tmp_path: Path) -> None:
    made = made_by(small_table(tmp_path), "report")
    assert made["protocol"]["identities"] == 2
    store = open_store(str(tmp_path))
    for file, change in (("frontier.json", {"weights": "x"}), ("references.json", {"base": "x"})):
        other = made | {"digests": made["digests"] | change, "command": "python -m this"}
        store.put(file, json.dumps({"made_by": other}).encode())
    trained_otherwise = made | {"digests": made["digests"] | {"weights": "x"}}
    store.put("ablations.json", json.dumps({"made_by": trained_otherwise}).encode())
    found = look(store, made)
    assert list(found.files) == ["ablations.json"], "the rows have weights of their own"
    assert sorted(found.left_out) == [
        "frontier.json is left out: made with other weights, by python -m this",
        "references.json is left out: made with other base, by python -m this",
    ]
    others = (replace(small_table(tmp_path), **change) for change in ({"identities": 3}, {"num_inference_steps": 2}))
    assert [differences(made, made_by(other, "report")) for other in others] == [
        ["identities", "subjects"],
        ["num_inference_steps"],
    ]


def test_a_record_names_the_command_that_makes_the_same(tmp_path: Path) -> None:
    options = replace(
        small_table(tmp_path), photographs=Photographs(data=tmp_path / "my photos", face_size=112), gpus=1
    )
    words = shlex.split(made_by_command := command_line("jobs.evaluate table1", options))
    assert words[:4] == ["python", "-m", "jobs.evaluate", "table1"]
    assert tyro.cli(Table1, args=words[4:]) == options
    assert "--sampler" not in made_by_command


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
    peer = replace(entrant, method="ip-adapter")
    assert replace(peer, parts=replace(parts, ip_adapter_image_encoder=str(copied))).digest != peer.digest
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


def test_a_subject_must_fit_on_one_machine_of_the_cluster(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(small_table(tmp_path), cpus=3)
    small, away = ({"Alive": alive, "Resources": {"CPU": cpus}} for alive, cpus in ((True, 2.0), (False, 8.0)))
    monkeypatch.setattr("jobs.evaluation.sweep.ray.nodes", lambda: [small, small, away])
    with pytest.raises(ParameterError, match=r"take 3 CPUs and 0 GPUs, .* 2 CPUs and 0 GPUs; 2 CPUs and 0 GPUs; pass"):
        sweep(options, options.entrants)


def test_settings_survive_their_file_and_unknown_ones_are_refused() -> None:
    settings = Settings.from_json('{"textual_inversion": {"steps": 12}}')
    assert settings.textual_inversion.steps == 12
    assert Settings.from_json(settings.to_json()) == settings
    with pytest.raises(ParameterError, match="Did you mean 'dreambooth'"):
        Settings.from_json('{"dreamboth": {}}')
    with pytest.raises(ParameterError, match="cannot be read"):
        Settings.from_json('{"dreambooth": {"step": 3}}')


def test_what_tuning_left_is_read_and_what_it_did_not_tune_is_said(tmp_path: Path) -> None:
    tuned = with_settings(Settings(), "dreambooth-lora", replace(Settings().dreambooth_lora, steps=9))
    assert Protocol(output=str(tmp_path)).settings_from("dreambooth-lora") == "tuned, the shipped miniature's"
    assert Protocol(output=str(tmp_path), models=tmp_path).settings_from("dreambooth-lora") == "defaults, not tuned"
    (tmp_path / "settings.json").write_text(tuned.to_json({"dreambooth-lora"}))
    protocol = Protocol(output=str(tmp_path))
    assert protocol.parts.settings == tuned
    assert protocol.methods_set == ["dreambooth-lora"]
    assert protocol.settings_from("dreambooth-lora") == f"tuned, {tmp_path.as_uri()}/settings.json"
    assert protocol.settings_from("dreambooth") == "defaults, not tuned"
    (tmp_path / "mine.json").write_text(tuned.to_json())
    named = Protocol(output=str(tmp_path), settings=tmp_path / "mine.json")
    assert named.settings_from("dreambooth") == f"given, {tmp_path / 'mine.json'}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"dreambooth": {"steps": "many"}}', "dreambooth: steps must be int, is 'many'"),
        ('{"dreambooth": {"steps": 1.5}}', "steps must be int, is 1.5"),
        ('{"dreambooth": {"steps": true}}', "steps must be int, is True"),
        ('{"instantbooth": {"adapter_scale": "0.3"}}', "adapter_scale must be float | None, is '0.3'"),
        ('{"dreambooth": {"lora_rank": -1}}', "dreambooth: lora_rank must be at least 0, is -1"),
        ('{"textual_inversion": {"steps": 0}}', "textual_inversion: steps must be at least 1, is 0"),
        ('{"ip_adapter": {"variant": "plsu"}}', "Did you mean 'plus'"),
        ('{"instantbooth": {"adapter_scale": 5}}', "instantbooth: adapter_scale must be a number from 0 to 2, is 5"),
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
    assert all(grid.of(name) for name in METHODS)
    with pytest.raises(ParameterError, match="not chosen on the split"):
        tune(Tune(split="test"))
    with pytest.raises(ParameterError, match="Did you mean 'dreambooth'"):
        tune(Tune(methods=("dreamboth",)))


def test_earlier_trials_compete_and_a_best_value_at_the_edge_is_told(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"identities": 2, "gallery": 2, "references": 1, "prompts_per_kind": 1, "cpus": 1, **FAST}
    options = Tune(output=str(tmp_path), methods=("textual-inversion",), **small)
    grids = [Grid(textual_inversion_learning_rate=(rate,), textual_inversion_steps=(1,)) for rate in (1e-9, 10.0)]
    for grid in grids:
        tune(replace(options, grid=grid))
    trials = json.loads((tmp_path / "tuning.json").read_text())
    assert [each["settings"]["learning_rate"] for each in trials.values()] == [10.0, 1e-9]
    best = max(trials.values(), key=lambda row: (row["score"], row["face_similarity"]["mean"]))
    chosen = json.loads((tmp_path / "settings.json").read_text())["textual_inversion"]
    assert chosen == best["settings"]
    edge = "lowest" if chosen["learning_rate"] < 1 else "highest"
    assert f"learning_rate {chosen['learning_rate']:g} is the {edge} tried" in capsys.readouterr().out

    for record in (tmp_path / "cells").rglob("cell.json"):
        record.unlink()
    tune(replace(options, grid=grids[0]))
    assert len(json.loads((tmp_path / "tuning.json").read_text())) == 1, "a trial without cells cannot be judged"


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
