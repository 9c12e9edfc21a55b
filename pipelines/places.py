"""Where a bulk job reads and writes. Neither torch nor Ray is loaded: a dry run checks it too."""

from __future__ import annotations

from instantbooth.errors import ParameterError
from instantbooth.storage import FileStore, open_store

FAILED = "failed.jsonl"
"""Key of the manifest to try failed rows again."""


def check_manifest_apart(manifest: str, output: str) -> None:
    """Raises ParameterError for a manifest that the job itself would replace at its end."""
    folder, slash, name = manifest.rpartition("/")
    if name == FAILED and _place(folder + slash or ".") == _place(output):
        raise ParameterError(
            f"{manifest} is what the run would replace, with what it tells of succeeded rows; pass another --output, "
            f"and --concepts {output} to reuse its concepts"
        )


def _place(uri: str) -> object:
    """Equal for two names of one folder or prefix."""
    store = open_store(uri)
    return store.root.resolve() if isinstance(store, FileStore) else store
