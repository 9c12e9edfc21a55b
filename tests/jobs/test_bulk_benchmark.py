"""The benchmark of the bulk job: what it refuses, what it counts, and that it works with any model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from instantbooth import Personalizer
from instantbooth.errors import ParameterError
from instantbooth.ledger import Ledger, digest_of
from instantbooth.miniature.samples import write_manifest
from instantbooth.model.denoise import denoise
from instantbooth.presets import miniature_folder
from instantbooth.storage import FileStore
from jobs.benchmarks.bulk import GENERATORS, BulkBenchmark, measure, untrained_model
from jobs.benchmarks.bulk_rivals import steady_rate
from jobs.benchmarks.encode_once import savings, write_comparison
from jobs.benchmarks.peak import H100_TFLOPS, share_of_peak, unet_tflop
from pipelines.personalize import load_manifest
from pipelines.plan import ModelIdentity, concept_key
from tests.tiny import portrait

MODEL = ModelIdentity(base="base", image_encoder=None, weights="weights", config="config")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"subjects": 1}, "subjects must be at least 4 for each generator"),
        ({"generators": GENERATORS + 1, "subjects": 1000}, f"generators must be from 1 to {GENERATORS}"),
        ({"generators": 0}, "generators must be from 1"),
        ({"loop_subjects": 1001}, "loop_subjects must be from 1 to subjects"),
        ({"references": 0}, "references must be from 1 to 16"),
        ({"prompts": 17}, "prompts must be from 1 to 16"),
        ({"peak_tflops": 0.0}, "peak_tflops must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: Mapping[str, Any], rule: str) -> None:
    with pytest.raises(ParameterError, match=rule):
        BulkBenchmark(**options)


def test_every_generator_has_four_batches_or_more() -> None:
    for subjects in (4 * GENERATORS, 12 * GENERATORS, 1000):
        options = BulkBenchmark(subjects=subjects, loop_subjects=1)
        assert 1 <= options.rows_per_batch <= subjects / (4 * options.generators)


def test_rows_that_encode_anew_share_no_concept(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    list(write_manifest(store, "orders", subjects=2, references=1))
    write_comparison(load_manifest(store.uri("orders/manifest.jsonl")), store, "comparison")
    rows = load_manifest(store.uri("comparison/manifest.jsonl"))
    assert len({concept_key(row, MODEL) for row in rows}) == len(rows) == 1 + 2 * (3 + 1 + 4 + 16)
    assert rows[0].id == "warm-up"
    for kind in ("once", "anew"):
        for count in (1, 4, 16):
            prompts = [row.prompts for row in rows if row.id.startswith(f"{kind}-{count}-")]
            assert sum(map(len, prompts)) == 2 * count
            assert len({each for row in prompts for each in row}) == count


def test_savings_are_what_records_say(tmp_path: Path) -> None:
    ledger = Ledger(FileStore(tmp_path))

    def record(row_id: str, pictures: int, encode_s: float) -> None:
        for number in range(pictures):
            seconds = {"encode": encode_s / pictures, "denoise": 1.0}
            key = f"images/{row_id}/{number}.png"
            ledger.succeed(digest_of(row_id, number), key, b"pixels", {"seconds": seconds})

    record("warm-up", 1, 100.0)
    for count in (1, 4, 16):
        record(f"once-{count}-cat-000", count, 1.0)
        for number in range(count):
            record(f"anew-{count}-cat-000-{number}", 1, 1.0)
    assert savings(FileStore(tmp_path)) == {
        "1": {"once_s": 2.0, "anew_s": 2.0, "saved": 0.0},
        "4": {"once_s": 5.0, "anew_s": 8.0, "saved": 0.375},
        "16": {"once_s": 17.0, "anew_s": 32.0, "saved": 0.469},
    }


class Products(TorchFunctionMode):
    """Adds up the operations of layers and of attention from the shapes that they are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_function__(self, call: Any, types: Any, args: Any = (), keywords: Any = None) -> Any:
        output = call(*args, **keywords or {})
        if call in (functional.conv2d, functional.linear):
            self.operations += 2 * output.numel() * args[1][0].numel()
        elif call is functional.scaled_dot_product_attention:
            queries, keys = args[:2]
            self.operations += 4 * queries.numel() * keys.shape[-2]
        return output


def test_the_unets_arithmetic_is_that_of_its_layers_and_attention(booth: Personalizer) -> None:
    image, mask = portrait(0)
    concept = booth.encode([image], "person", [mask])
    [row] = booth.rows(booth.requests("a photo of a {subject}", concept, num_inference_steps=1))
    row.keys_values = booth.keys_values(concept)
    with Products() as products:
        list(denoise(booth.base.unet, [row]))
    assert products.operations > 0
    assert unet_tflop(booth, concept) * 1e12 == products.operations


def test_the_share_of_peak_is_of_every_step(booth: Personalizer) -> None:
    assert booth.defaults.num_inference_steps == 25
    assert share_of_peak(10.0, 0.8, booth.defaults, H100_TFLOPS) == pytest.approx(10 * 25 * 0.8 / 989)


@pytest.mark.full
def test_the_whole_benchmark_works_with_an_untrained_model_in_a_folder(tmp_path: Path) -> None:
    shutil.copytree(miniature_folder() / "base", tmp_path / "model")
    shutil.copytree(miniature_folder() / "clip", tmp_path / "model" / "image_encoder")
    options = BulkBenchmark(subjects=4 * GENERATORS, loop_subjects=1, references=1, peak_tflops=1e-3)
    result: dict[str, Any] = measure(options, untrained_model(tmp_path / "model"), tmp_path)
    rates, shares = result["images_per_second"], result["unet_share_of_peak"]
    assert set(rates) == set(shares) == {"bulk, steady", "loop, one identity at a time", "engines alone, steady"}
    assert min(rates.values()) > 0
    for name, rate in rates.items():
        assert shares[name] == pytest.approx(rate * 25 * result["unet_tflop_of_a_step"] / 1e-3, rel=0.02)
    assert result["bulk_over_engines"] == pytest.approx(
        rates["bulk, steady"] / rates["engines alone, steady"], rel=0.01
    )
    assert list(result["encode_once_saves"]) == ["1", "4", "16"]
    assert result["seconds_to_first_image"] > 0


def test_a_steady_rate_leaves_out_how_work_begins_and_ends() -> None:
    even = [5.0 + number / 4 for number in range(100)]
    assert steady_rate(even) == pytest.approx(4.0)
    assert steady_rate([0.0, *even[1:-1], 90.0]) == pytest.approx(4.0)
