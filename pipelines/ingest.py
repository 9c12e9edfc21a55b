"""Raw text-image pairs become curated Parquet shards.

A source (see curation.sources) is read in units, and each unit is cut into slices. A slice goes through the pipeline as
one: name the subject → decode → find the subject → judge the mask → stage. Then, with every pair known, duplicates and
the split are decided, and each slice becomes a shard for training, one for validation, and a list of what was dropped.

The outcome depends on the source and the configuration alone. Names are digests of what decides the content, and
everything is written at once and never replaced: a run that was killed anywhere is repeated, and goes on from what is
there; a run over a source that has grown reads only what is new, and rewrites the few slices of which a new picture
makes an older one a duplicate. (A rule by which the older picture stays would spare that, but then the outcome would
tell in which order a source grew.)

Output: what curation.shards lists; `manifest.json`, every file of the data set with its SHA-256; `report.html`; and,
written last, `report.json`. What the manifest does not list is no part of the data set.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from transformers import CLIPTokenizer

from instantbooth.errors import MissingObjectError, ParameterError, StorageError
from instantbooth.ledger import digest_of
from instantbooth.model.base import anywhere, check_layout, load_tokenizer, locate
from instantbooth.model.weights import folder_digest
from instantbooth.presets import preset
from instantbooth.prompts import PLACEHOLDER_TOKEN
from instantbooth.storage import FileStore, ObjectStore, S3Store, open_store, patiently
from pipelines.checks import check_actors
from pipelines.curation.decisions import Decisions, Staged
from pipelines.curation.pairs import OnPairs, Reason, Slice
from pipelines.curation.precompute import Precomputed, Precomputer
from pipelines.curation.report import IngestReport, report_page, summarize
from pipelines.curation.segment import SubjectFinder, load_model
from pipelines.curation.shards import ENTRY, Draft, load_draft, stage, staged_key, unit_key, write_draft
from pipelines.curation.sources import MAX_SLICE_BYTES, Columns, Unit, plan, read_slices
from pipelines.curation.steps import Rules, decode, judge_mask, name_subject

MANIFEST = "manifest.json"
REPORT = "report.json"
PAGE = "report.html"
VERSION = 3
"""Raised when the same rules come to another outcome: nothing that an older version staged is used then."""
READERS = 16


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """What is read, what is kept, and where it goes."""

    source: str
    """URI of a folder or file: WebDataset tars, Parquet files, an image folder with metadata, or lists of URIs."""
    output: str
    """URI of the folder for shards and reports. A later run with the same folder goes on from what is there."""
    rules: Rules = field(default_factory=Rules)
    """What a pair must be to be kept."""
    columns: Columns = field(default_factory=Columns)
    """Names of the source's columns, where they are unusual."""
    segmenter: str | None = None
    """Folder or hub name of a segmentation model that finds the subject of pairs without a mask."""
    base: str | None = None
    """Preset, folder or hub name of the Stable Diffusion to be trained: pairs are dropped whose captions are so long
    that its text encoder does not reach the subject."""
    precompute: bool = False
    """Whether shards also hold what `base` makes of picture and caption: `latents` and `prompt_embeds`, as float16."""
    actors: int = 1
    """Actors with the segmentation model, and later with the base."""
    actor_batch: int = 16
    """Pictures that one of them works on together."""
    gpus_per_actor: float = 0.0
    """GPUs each of them claims; with 0 it computes on the CPU."""
    near_bits: int = 8
    """Perceptual hashes (128 bits) that differ in at most so many bits are of duplicates."""
    max_unreadable: float = 0.1
    """Share of pairs that cannot be read for now, beyond which the run fails and the data set stays as it was."""
    validation: float = 0.02
    """Share of pictures that is held out, chosen by their content."""
    rows_per_shard: int = 64
    """Pairs read for one shard."""
    rows_per_group: int = 32
    """Pairs in one Parquet row group."""

    def __post_init__(self) -> None:
        for name in ("actors", "actor_batch", "rows_per_shard", "rows_per_group"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be at least 1, is {getattr(self, name)}; raise it")
        if not 0 <= self.gpus_per_actor <= 1:
            raise ParameterError(f"gpus_per_actor must be from 0 to 1, is {self.gpus_per_actor:g}; 0 is the default")
        if not 0 <= self.near_bits < 64:
            raise ParameterError(f"near_bits must be from 0 to 63, is {self.near_bits}; 8 is the default")
        if not 0 <= self.max_unreadable <= 1:
            raise ParameterError(f"max_unreadable must be a share from 0 to 1, is {self.max_unreadable}; try 0.1")
        if not 0 <= self.validation < 1:
            raise ParameterError(f"validation must be a share from 0 to under 1, is {self.validation}; try 0.02")
        if self.precompute and not self.base:
            raise ParameterError("precompute needs a base, which is None; name the Stable Diffusion to be trained")
        if _is_within(self.output, self.source):
            raise ParameterError(f"output {self.output} lies within source {self.source}: it would be read; move it")


def ingest(config: IngestConfig) -> IngestReport:
    """Curates every pair of the source. One bad pair costs itself alone.

    Raises StorageError where the source cannot be listed, too much of it cannot be read or nothing of it is kept, or
    the output cannot be written or is something else's, WeightsError for a segmenter that cannot be loaded,
    ParameterError for columns that the source cannot have, and for more actors or GPUs than the cluster has.
    """
    started = time.perf_counter()
    output = open_store(config.output)
    base = _base_folder(config)
    rules = _rules_digest(config, base)
    units = plan(config.source, lines_per_unit=config.rows_per_shard)
    config.columns.check(units)
    present = set(output.list())
    entries = {key: entry for key, entry in _known_entries(config.output).items() if key in present}
    known = _known_slices(output, [unit.id(rules) for unit in units], present)
    new = [unit for unit in units if unit.id(rules) not in known]
    if new and config.segmenter:
        # Its actors' constructors would fail with an error of Ray's.
        load_model(locate(config.segmenter), torch.device("cpu"))
    if config.segmenter or config.precompute:
        check_actors(config.actors, config.gpus_per_actor)
    fresh, processed = _curate(config, new, rules, output, load_tokenizer(base) if base else None)
    digests = known | fresh
    slices = [Staged(digest=digest, source=unit.key) for unit in units for digest in digests[unit.id(rules)]]
    decisions = Decisions(config.output, slices, near_bits=config.near_bits, validation=config.validation)
    _check_outcome(config, decisions)
    precomputed = Precomputed.by(base, PLACEHOLDER_TOKEN) if base and config.precompute else None
    files = _write(config, decisions, output, entries, precomputed)
    report = summarize(decisions, files)
    report = replace(report, processed=processed, seconds=round(time.perf_counter() - started, 1))
    manifest = {
        "version": VERSION,
        "rules": rules,
        "captions": base and caption_rules(base, PLACEHOLDER_TOKEN),
        "precomputed": precomputed and asdict(precomputed),
    }
    finished = {
        MANIFEST: _json(manifest | {"files": files}),
        PAGE: report_page(report, decisions, config.output, config.source).encode(),
        REPORT: _json(asdict(report)),
    }
    for key, data in finished.items():
        patiently(partial(output.put, key, data))
    return report


def _check_outcome(config: IngestConfig, decisions: Decisions) -> None:
    """Raises StorageError for one that nobody can want instead of the data set that may be there."""
    read, dropped = len(decisions.reasons), decisions.dropped()
    unread = dropped.get(Reason.UNREADABLE, 0)
    if unread > config.max_unreadable * read:
        first = decisions.name(int(np.flatnonzero(decisions.reasons == Reason.UNREADABLE)[0]))
        raise StorageError(
            f"{unread} of {read} pairs cannot be read, the first {first}; max_unreadable allows a share of "
            f"{config.max_unreadable:g}: mend the source, or raise it. What is in {config.output} stays as it was"
        )
    if read and not len(decisions.kept):
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise StorageError(
            f"none of {read} pairs is kept ({counts}); look at --columns and --rules. What is in {config.output} stays "
            "as it was"
        )


def curated(
    config: IngestConfig, units: Sequence[Unit], rules: str, output: ObjectStore, tokenizer: CLIPTokenizer | None
) -> ray.data.Dataset:
    """The pipeline: units → slices → staged slices, a row for each."""
    read = partial(_read, columns=config.columns, pairs_per_slice=config.rows_per_shard, rules=rules, store=output)
    slices = (
        ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
        .flat_map(read)
        .map(OnPairs(step=partial(name_subject, rules=config.rules, tokenizer=tokenizer)))
        .map(OnPairs(step=partial(decode, rules=config.rules)))
    )
    if config.segmenter:
        slices = slices.map(
            SubjectFinder,
            fn_constructor_args=(anywhere(config.segmenter),),
            fn_constructor_kwargs={"rules": config.rules, **_placed(config)},
            compute=ray.data.ActorPoolStrategy(size=config.actors),
            num_gpus=config.gpus_per_actor,
        )
    return slices.map(OnPairs(step=partial(judge_mask, rules=config.rules))).map(partial(stage, store=output))


def written(config: IngestConfig, drafts: Sequence[Draft], output: ObjectStore) -> ray.data.Dataset:
    """The second pipeline: drafts → shards, a row of manifest entries for each."""
    loaded = ray.data.from_items([{"draft": draft} for draft in drafts], override_num_blocks=len(drafts)).map(
        partial(load_draft, store=output)
    )
    if config.precompute:
        loaded = loaded.map(
            Precomputer,
            fn_constructor_args=(_base(config),),
            fn_constructor_kwargs={"placeholder": PLACEHOLDER_TOKEN, **_placed(config)},
            compute=ray.data.ActorPoolStrategy(size=config.actors),
            num_gpus=config.gpus_per_actor,
        )
    return loaded.map(partial(write_draft, store=output, rows_per_group=config.rows_per_group))


def caption_rules(base: Path, placeholder: str) -> str:
    """What a data set says of its captions: the digest of the tokenizer that reaches their subjects, and of V̂."""
    return digest_of(folder_digest(base / "tokenizer"), placeholder)


def read_manifest(dataset: str) -> dict[str, Any]:
    """The manifest of an ingestion's output folder. MissingObjectError without one, StorageError for a foreign one."""
    data = patiently(partial(open_store(dataset).get, MANIFEST))
    try:
        manifest: dict[str, Any] = json.loads(data)
        for entry in manifest["files"]:
            for name, kind in ENTRY.items():
                if not isinstance(entry[name], kind):
                    raise TypeError(f"{name} is {entry[name]!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"{MANIFEST} in {dataset} is damaged, or no ingestion's ({type(error).__name__}: {error}); name another "
            "folder, or remove it and ingest again"
        ) from error
    return manifest


def _read(
    item: dict[str, Unit], *, columns: Columns, pairs_per_slice: int, rules: str, store: ObjectStore
) -> Iterator[dict[str, Slice]]:
    """A unit's slices; one that an earlier run staged goes on without its pairs."""
    for part in read_slices(item["unit"], columns, pairs_per_slice=pairs_per_slice, rules=rules):
        staged = patiently(partial(store.exists, staged_key(part.digest)))
        yield {"slice": replace(part, pairs=(), staged=True) if staged else part}


def _curate(
    config: IngestConfig, units: Sequence[Unit], rules: str, output: ObjectStore, tokenizer: CLIPTokenizer | None
) -> tuple[dict[str, list[str]], int]:
    """Runs the pipeline; unit → its slices, and how many pairs were new. Notes each unit as it is done."""
    slices: dict[str, dict[int, str]] = {}
    lengths: dict[str, int] = {}
    unsettled: set[str] = set()
    processed = 0
    for row in curated(config, units, rules, output, tokenizer).iter_rows() if units else ():
        unit = row["unit"]
        slices.setdefault(unit, {})[row["number"]] = row["digest"]
        processed += row["pairs"]
        if row["last"]:
            lengths[unit] = row["number"] + 1
        if not row["settled"]:
            unsettled.add(unit)
        if len(slices[unit]) == lengths.get(unit) and unit not in unsettled:
            patiently(partial(output.put, unit_key(unit), _json(_in_order(slices[unit]))))
    return {unit: _in_order(numbered) for unit, numbered in slices.items()}, processed


def _write(
    config: IngestConfig,
    decisions: Decisions,
    output: ObjectStore,
    known: dict[str, dict[str, Any]],
    precomputed: Precomputed | None,
) -> list[dict[str, Any]]:
    """Writes the shards that are not known; the manifest's entries of all of them, in the order of the source."""
    entries = dict(known)
    extras = [config.actor_batch, asdict(precomputed)] if precomputed else []
    drafts = list(decisions.drafts(digest_of(config.rows_per_group, extras)))
    missing = [draft for draft in drafts if not draft.keys <= entries.keys()]
    for row in written(config, missing, output).iter_rows() if missing else ():
        entries |= {entry["key"]: entry for entry in json.loads(row["entries"])}
    return [entries[key] for draft in drafts for key in sorted(draft.keys)]


def _known_slices(output: ObjectStore, units: Iterable[str], present: set[str]) -> dict[str, list[str]]:
    """The slices of those units that an earlier run read to their end, where they are all still there."""
    wanted = [unit for unit in units if unit_key(unit) in present]
    with ThreadPoolExecutor(READERS) as readers:
        notes = readers.map(lambda unit: patiently(lambda: output.get(unit_key(unit))), wanted)
        slices = {unit: json.loads(note) for unit, note in zip(wanted, notes, strict=True)}
    return {unit: known for unit, known in slices.items() if all(staged_key(digest) in present for digest in known)}


def _known_entries(output: str) -> dict[str, dict[str, Any]]:
    """The manifest's entries of an earlier run."""
    try:
        return {entry["key"]: entry for entry in read_manifest(output)["files"]}
    except MissingObjectError:
        return {}


def _rules_digest(config: IngestConfig, base: Path | None) -> str:
    """Of all that decides what becomes of a pair before duplicates are looked for."""
    segmenter = folder_digest(locate(config.segmenter)) if config.segmenter else None
    batch = config.actor_batch if config.segmenter else None
    tokenizer = folder_digest(base / "tokenizer") if base else None
    sizes = (config.rows_per_shard, MAX_SLICE_BYTES)
    return digest_of(VERSION, asdict(config.rules), asdict(config.columns), segmenter, batch, tokenizer, sizes)


def _base(config: IngestConfig) -> str:
    """The base's folder, or its name on the hub: what every machine can find. WeightsError for an unknown preset."""
    named = Path(config.base).is_dir() or "/" in config.base
    return anywhere(config.base if named else preset(config.base).base)


def _base_folder(config: IngestConfig) -> Path | None:
    """On this machine, with its tokenizer at least. BaseModelError or WeightsError where there is none."""
    if config.base is None:
        return None
    if not config.precompute:
        return locate(_base(config), "tokenizer/")
    folder = locate(_base(config))
    check_layout(folder)
    return folder


def _placed(config: IngestConfig) -> dict[str, Any]:
    return {"batch_size": config.actor_batch, "device": "cuda" if config.gpus_per_actor else "cpu"}


def _is_within(inner: str, outer: str) -> bool:
    one, other = open_store(inner), open_store(outer)
    if isinstance(one, FileStore) and isinstance(other, FileStore):
        return one.root.is_relative_to(other.root)
    if isinstance(one, S3Store) and isinstance(other, S3Store):
        return one.bucket == other.bucket and f"{one.prefix}/".startswith(f"{other.prefix}/".lstrip("/"))
    return False


def _in_order(numbered: dict[int, str]) -> list[str]:
    return [numbered[number] for number in sorted(numbered)]


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
