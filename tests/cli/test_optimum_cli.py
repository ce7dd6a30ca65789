"""`optimum-cli export cushion` is `cushion-deploy build`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OptimumCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def optimum_cli() -> OptimumCli:
    """Return a function that runs optimum-cli in a process of its own."""
    tool = Path(sys.executable).with_name("optimum-cli")
    if not tool.exists():
        pytest.skip("optimum is not installed")

    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(tool), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            timeout=600,
        )

    return run


def test_it_is_listed_among_the_exports(optimum_cli: OptimumCli) -> None:
    listed = optimum_cli("export", "--help")
    assert listed.returncode == 0, listed.stderr
    assert "static INT8 bundle" in " ".join(listed.stdout.split())
    assert "cushion-deploy build" in " ".join(optimum_cli("export", "cushion", "--help").stdout.split())


def test_it_writes_the_bundle_that_build_writes(
    optimum_cli: OptimumCli, tiny_bundle: Any, cli: Any, tmp_path: Path
) -> None:
    model, *options = tiny_bundle.options[1:]
    done = optimum_cli(
        "export", "cushion", "--model", model, tmp_path / "bundle", *options, "--engine", "onnxruntime", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert cli("verify", tmp_path / "bundle").code == 0
    for name in ("model.onnx", "scales.json", "prefix.safetensors", "tokenizer.json"):
        assert (tmp_path / "bundle" / name).read_bytes() == (tiny_bundle.bundle / name).read_bytes()


def test_it_fails_as_build_fails(optimum_cli: OptimumCli, tmp_path: Path) -> None:
    done = optimum_cli("export", "cushion", "--model", tmp_path / "absent.gguf", tmp_path / "bundle")
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "absent.gguf" in done.stderr
    assert not (tmp_path / "bundle").exists()
