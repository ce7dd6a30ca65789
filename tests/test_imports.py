"""What an import costs: the edge runtime and help load nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "datasets", "matplotlib", "pandas")


def loaded(code: str, *arguments: str) -> set[str]:
    """Return the top-level modules in a process of its own after ``code`` has run."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        timeout=120,
    )
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_the_runtime_loads_no_library_of_the_build() -> None:
    assert not loaded("import cushion_deploy.runtime") & set(HEAVY)


def test_the_runtime_needs_numpy_and_tokenizers_alone() -> None:
    others = {"filelock", "pydantic", "click", "rich", "ruamel", "psutil", "safetensors", "jinja2"}
    found = loaded("import cushion_deploy.runtime")
    assert not found & others
    assert found >= {"numpy", "tokenizers"}


def test_the_table_of_engines_loads_no_engine() -> None:
    found = loaded("import cushion_deploy.engines.registry")
    assert not found & {"torch", "transformers", "onnxruntime", "openvino", "tensorrt_rtx"}


@pytest.mark.parametrize("verb", ["generate", "chat", "serve", "verify"])
def test_the_commands_of_the_edge_load_no_library_of_the_build(verb: str) -> None:
    found = loaded(f"import cushion_deploy.cli.main, cushion_deploy.cli.{verb}")
    assert not found & {*HEAVY, "pydantic", "rich", "ruamel", "psutil", "fastapi", "uvicorn", "onnxruntime", "openvino"}


def test_versions_and_completion_import_no_library() -> None:
    run = "from cushion_deploy.cli.main import run\ntry:\n  run(sys.argv[1:])\nexcept SystemExit:\n  pass"
    for arguments in (["--version"], ["completion", "fish"]):
        assert not loaded(run, *arguments) & {*HEAVY, "onnxruntime", "openvino", "tensorrt_rtx", "pydantic"}


def test_the_doctor_without_a_model_imports_no_torch() -> None:
    run = "from cushion_deploy.cli.main import run\nassert run(['doctor', '--json']) == 0"
    assert not loaded(run) & set(HEAVY)


@pytest.mark.parametrize(
    "verb", ["", "build", "search", "calibrate", "export", "engine", "parity", "generate", "serve", "doctor"]
)
def test_help_loads_nothing_heavy(verb: str) -> None:
    arguments = [verb, "--help"] if verb else ["--help"]
    found = loaded(f"from cushion_deploy.cli.main import run\nassert run({arguments!r}) == 0")
    assert not found & {*HEAVY, "onnxruntime", "openvino", "tensorrt_rtx"}
