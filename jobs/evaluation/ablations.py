"""The paper's Table 3: what each part of the method is worth, by training it without, at one budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from instantbooth.errors import ParameterError, did_you_mean
from instantbooth.evaluation.ablations import ABLATIONS, AGREES, FULL, Ablation, verdict
from instantbooth.evaluation.cases import check_count
from instantbooth.evaluation.cells import Cell
from instantbooth.evaluation.figures import COLUMNS, difference
from instantbooth.miniature.ablations import Trained, train_ablation
from instantbooth.miniature.corpus import Corpus, render_corpus, renderer_digest
from instantbooth.miniature.pairs import corpus_latents, loop_of
from instantbooth.miniature.recipe import RECIPES
from instantbooth.model.base import BaseModel, device_of, locate
from instantbooth.storage import open_store
from instantbooth.training.adapters import AdapterTrainingConfig
from jobs import cli
from jobs.evaluation.protocol import Protocol, refuse_unused
from jobs.evaluation.sweep import DIGEST_LENGTH, Entrant, folder_digest, sweep
from jobs.evaluation.table1 import Judged, console, figure, judge_made, made_by, row_of

FILE = "ablations.json"
METHOD = "instantbooth"
"""The paper masks nothing at test time, and neither do its ablations."""
REPORTED = ("alignment", "reconstruction")
"""What the paper's table has."""
SHOWN = (*REPORTED, "prompt_accuracy", "face_similarity", "identification")


@dataclass(frozen=True, kw_only=True)
class Ablations(Protocol):
    """Which rows, and how long each of them is trained."""

    rows: tuple[str, ...] = tuple(ABLATIONS)
    """Rows of the table, beside the full method."""
    trained: Path = Path("out/ablations")
    """Where rows are trained: rendered pairs, checkpoints, weights. All machines must see it."""
    pictures: int = RECIPES["gpu"].adapter_pictures
    """Rendered text-image pairs they learn from."""
    training: cli.Flat[AdapterTrainingConfig] = replace(
        RECIPES["gpu"].adapters,
        steps=1500,
        replaced_backgrounds=RECIPES["gpu"].backgrounds.replaced_backgrounds,
    )
    """The miniature's own training, shorter and in one round; the same for all rows."""
    tuned_rate: float = 0.1
    """Learning rate of a tuned image encoder or U-Net, as a multiple of the others'."""

    @property
    def chosen(self) -> dict[str, Ablation]:
        """The rows by name, the full method first: all are compared with it."""
        return {name: ABLATIONS[name] for name in dict.fromkeys((FULL, *self.rows))}

    def check_rows(self) -> None:
        """What can be wrong before anything is trained. Raises InstantBoothError."""
        for name in self.rows:
            if name not in ABLATIONS:
                raise ParameterError(f"row {name!r} is unknown. {did_you_mean(name, ABLATIONS)}")
        if self.real:
            raise ParameterError("the rows are trained on the miniature's rendered pairs; leave out --data")
        if not 0 < self.tuned_rate <= 1:
            raise ParameterError(f"tuned_rate must be above 0 and at most 1, is {self.tuned_rate:g}; correct it")
        unused = ("weights", "ip_adapter", "ip_adapter_image_encoder")
        refuse_unused(self, unused, "does nothing: all rows are trained here")
        check_count("pictures", self.pictures, 1)
        loop_of(self.training)
        self.check((METHOD,))

    def where(self, ablation: Ablation) -> Trained:
        """The folder of a row's training, named by all that it depends on."""
        named = [ablation.training, asdict(self.training), self.pictures, renderer_digest(), self._models_digest]
        if ablation.tuned is not None:
            named.append(self.tuned_rate)
        digest = sha256(json.dumps(named).encode()).hexdigest()[:DIGEST_LENGTH]
        return Trained(folder=self.trained.absolute() / digest)

    @property
    def _models_digest(self) -> str:
        folders = [folder_digest(locate(each)) for each in (self.preset.base, self.preset.image_encoder)]
        return sha256(json.dumps([folders, self.preset.patch_layer]).encode()).hexdigest()

    def pairs(self, device: torch.device) -> tuple[Corpus, torch.Tensor]:
        """The rendered pairs and their latents, which are kept for each base."""
        corpus = render_corpus("pretraining", self.pictures, 1, self.trained / "corpora")
        vae = BaseModel.load(self.preset.base, device=device, dtype=torch.float32).vae
        folder = self.trained / "latents" / folder_digest(locate(self.preset.base))[:DIGEST_LENGTH]
        folder.mkdir(parents=True, exist_ok=True)
        return corpus, corpus_latents(corpus, vae, folder)


def ablations(options: cli.Flat[Ablations]) -> None:
    """Trains every row, writes ablations.json and prints the table; what an earlier run finished is not done again.

    A training that was interrupted goes on from its last checkpoint.
    """
    options.check_rows()
    train_missing(options)
    entrants = entrants_of(options)
    rows = rows_of(options, judge_made(options, entrants, made_of(options, entrants)))
    made = made_by(options, "ablations") | {"training": asdict(options.training), "pictures": options.pictures}
    result = {"made_by": made, "rows": rows}
    open_store(options.output).put(FILE, (json.dumps(result, indent=2) + "\n").encode())
    _show(rows)


def train_missing(options: Ablations) -> None:
    """Every training that is not done yet. Before Ray starts: its threads do not survive the loop's fork."""
    rows = options.chosen.values()
    missing = {where.folder: (each, where) for each in rows if not (where := options.where(each)).done}
    if not missing:
        return
    device = device_of(None)
    corpus, latents = options.pairs(device)
    for number, (ablation, where) in enumerate(missing.values(), start=1):
        Console().print(f"training {number} of {len(missing)}: {ablation.title}", highlight=False)
        train_ablation(
            ablation,
            options.preset,
            corpus,
            latents,
            options.training,
            tuned_rate=options.tuned_rate,
            trained=where,
            device=device,
        )


def entrants_of(options: Ablations) -> list[Entrant]:
    """The rows as methods, each with its own models."""
    parts = options.parts
    return [
        Entrant(
            label=name,
            method=METHOD,
            parts=replace(
                parts,
                models=options.where(ablation).preset(parts.models, ablation),
                personalizer=ablation.personalizer,
            ),
        )
        for name, ablation in options.chosen.items()
    ]


def made_of(options: Ablations, entrants: Sequence[Entrant]) -> dict[str, list[Cell]]:
    """The cells of every row, each given as many references as it says."""
    made: dict[str, list[Cell]] = {}
    counts = {each.label: ABLATIONS[each.label].references or options.given for each in entrants}
    for count in dict.fromkeys(counts.values()):
        given = replace(options, references=count)
        made |= sweep(given, [each for each in entrants if counts[each.label] == count])
    return made


def rows_of(options: Ablations, judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Row → its figures, what they have more than the full method's, and whether the paper's go the same way."""
    full = next(each for each in judged if each.entrant.label == FULL)
    rows = {}
    for each in judged:
        ablation = ABLATIONS[each.entrant.label]
        more = difference(each.values, full.values)
        rows[each.entrant.label] = {
            **row_of(each),
            "title": ablation.title,
            "training": options.where(ablation).record,
            "reported": {column: getattr(ablation, column) for column in REPORTED},
            "more_than_full": more,
            "verdict": {} if each is full else verdicts(ablation, more),
        }
    return rows


def verdicts(ablation: Ablation, more: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Column of the paper's table → what `verdict` says of the row's change in it."""
    full = ABLATIONS[FULL]
    changes = {column: getattr(ablation, column) - getattr(full, column) for column in REPORTED}
    return {column: verdict(change, more[column]) for column, change in changes.items()}


def beside(row: Mapping[str, Any], column: str) -> str:
    """The paper's figure, ticked where the direction agrees."""
    word = row["verdict"].get(column, "")
    return f"{row['reported'][column]:.4f} {'✓' if word == AGREES else word}".strip()


def _show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("row", *(COLUMNS[column] for column in SHOWN), *(f"{COLUMNS[each]}, paper" for each in REPORTED))
    for row in rows.values():
        figures = (figure(row[column]) for column in SHOWN)
        table.add_row(row["title"], *figures, *(beside(row, column) for column in REPORTED))
    console().print(table)
