"""Entry points, one a file, and what they share: `python -m jobs.demo --help`.

The settings below are read when transformers, diffusers and MLflow are imported, so they are made here, before any of
them. Workers inherit them. What the user has set stands.
"""

import os
import sys
from types import TracebackType

os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A tracking server that is down is given up on after seconds, not minutes: what it misses is delivered later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # Ctrl-C in the seconds of importing is no defect.
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _excepthook
