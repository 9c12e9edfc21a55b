"""What the other commands left in the output, for the report: taken where it was made as the table was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from instantbooth.evaluation.methods.registry import METHODS, field_of
from instantbooth.storage import ObjectStore
from jobs.evaluation import ablations, frontier, references
from jobs.evaluation.goals import PEERS, REFERENCE

PEERS_MODELS = (*map(field_of, PEERS), "ip_adapter_image_encoder")
OTHERS_SETTINGS = tuple(f"settings of {field_of(name)}" for name in METHODS if not name.startswith(REFERENCE))
NOT_OF = {
    ablations.FILE: ("weights", *PEERS_MODELS, *OTHERS_SETTINGS),
    references.FILE: (
        *("identities", "subjects", "references", "gallery", "dropped"),
        *PEERS_MODELS,
        *OTHERS_SETTINGS,
    ),
    frontier.FILE: (),
}
"""Files, and what of a table's record may be other: what their figures do not depend on, and of references.json whom it
is about, as its subjects are those with the most pictures."""
COMPARED = ("protocol", "sampling", "digests", "settings")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files by name, and why others were left out."""

    files: Mapping[str, Mapping[str, Any]]
    left_out: tuple[str, ...]


def look(store: ObjectStore, made: Mapping[str, Any]) -> Found:
    """Reads what is there. `made` is the record of the page that it is for."""
    files, left_out = {}, []
    made = json.loads(json.dumps(made))
    for file, aside in NOT_OF.items():
        if store.exists(file):
            content = json.loads(store.get(file))
            other = [name for name in differences(made, content["made_by"]) if name not in aside]
            if other:
                left_out.append(
                    f"{file} is left out: made with other {', '.join(other)}, by {content['made_by']['command']}"
                )
            else:
                files[file] = content
    return Found(files=files, left_out=tuple(left_out))


def differences(made: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two records differ that figures depend on."""
    found = []
    for part in COMPARED:
        mine, theirs = made[part], other.get(part, {})
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        found += [f"settings of {name}" for name in names] if part == "settings" else names
    return found


def named_rows(file: str, content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, row) of every row in a file, whatever its layout."""
    if file == frontier.FILE:
        for series, rows in content["series"].items():
            for row in rows:
                strengths = [f"{name} {value}" for name, value in row["settings"].items() if name.endswith("scale")]
                yield " ".join([series, row["method"], *strengths]), row
    elif file == references.FILE:
        for count, rows in content["rows"].items():
            yield from ((f"{method} {count}", row) for method, row in rows.items())
    else:
        yield from content["rows"].items()
