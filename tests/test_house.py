"""The house rules: what may import what, and that the library loads without what it does not need."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "platform" / "instantbooth"
PURE = ["errors", "config", "parameters", "prompts", "images", "manifest", "storage", "ledger"]

WEB = ["fastapi", "pydantic", "starlette"]
HEAVY = ["torch", "diffusers", "transformers", "mlflow"]
ABOVE_MODEL = [f"instantbooth.{name}" for name in ("engine", "training", "evaluation", "miniature", "tracking")]

FORBIDDEN = {
    "platform/instantbooth/**/*.py": ["ray", *WEB, "pipelines", "jobs", "serve"],
    **{f"platform/instantbooth/{name}.py": [*HEAVY, "instantbooth.model", *ABOVE_MODEL] for name in PURE},
    **{f"platform/instantbooth/{name}.py": [*HEAVY[:3], "instantbooth.model"] for name in ("presets", "tracking")},
    "platform/instantbooth/model/**/*.py": ABOVE_MODEL,
    "platform/instantbooth/training/**/*.py": ["instantbooth.evaluation", "instantbooth.miniature"],
    "platform/instantbooth/engine/**/*.py": [
        f"instantbooth.{name}" for name in ("training", "evaluation", "miniature")
    ],
    "pipelines/**/*.py": [*WEB, "jobs", "serve"],
    "jobs/**/*.py": WEB,
    "serve/**/*.py": ["pipelines", "jobs"],
}


def run_python(code: str) -> str:
    """What the code prints in a fresh interpreter that starts in the repository and has platform/ on its path."""
    environment = os.environ | {"PYTHONPATH": str(LIBRARY.parent)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def imported_names(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_platform_is_still_the_standard_librarys_module() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists(), "it would shadow Python's own module"
    assert run_python("import platform; print(platform.python_version())") == sys.version.split()[0]


@pytest.mark.parametrize("files", FORBIDDEN)
def test_imports_point_downwards(files: str) -> None:
    paths = list(ROOT.glob(files))
    assert paths, "the rule guards nothing"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in imported_names(path)
        if any(f"{name}.".startswith(f"{forbidden}.") for forbidden in FORBIDDEN[files])
    ]
    assert not wrong


def test_the_library_and_its_pure_modules_load_without_torch_ray_and_mlflow() -> None:
    modules = ", ".join(["instantbooth", *(f"instantbooth.{name}" for name in PURE)])
    loaded = run_python(f"import sys, {modules}; print(*sys.modules)").split()
    assert not {"ray", *HEAVY} & set(loaded)
