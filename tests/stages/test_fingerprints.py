"""A change of the code behind a stage is a question: must its version rise, so that kept results are not reused?"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
ASK = (
    "the code behind stage '{name}' is not the recorded one. If results that users have kept would differ from what "
    "the stage computes now, raise its version ({file}); in either case record the code: "
    "python tests/stages/fingerprint.py"
)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stage_fingerprint", HERE / "fingerprint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load()


def test_every_stage_is_recorded_and_no_other() -> None:
    assert set(tool.stages()) == set(tool.recorded())
    assert {"convert", "sample", "search", "smooth", "calibrate", "sensitivity", "tune", "export", "engine"} <= set(
        tool.stages()
    )


@pytest.mark.parametrize("name", list(tool.stages()))
def test_the_code_of_a_stage_is_the_recorded_one(name: str) -> None:
    kind, kept = tool.stages()[name], tool.recorded()[name]
    file = f"cushion_deploy/{kind.__module__.partition('.')[2].replace('.', '/')}.py"
    assert (kind.version, tool.fingerprint(kind)) == (kept["version"], kept["code"]), ASK.format(name=name, file=file)


def test_words_decide_nothing_and_numbers_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = tool._code("cushion_deploy.calib.estimators")
    source = tool._file("cushion_deploy.calib.estimators").read_text()

    def changed(old: str, new: str) -> str:
        assert old in source
        file = tmp_path / "estimators.py"
        file.write_text(source.replace(old, new))
        monkeypatch.setattr(tool, "_file", lambda module: file)
        return str(tool._code("cushion_deploy.calib.estimators"))

    assert changed("Range estimators:", "Estimators of ranges:") == before
    assert changed("BINS = 8192", "BINS = 8192  # a comment") == before
    assert changed("has no asymmetric form", "cannot be asymmetric") == before
    assert changed("BINS = 8192", "BINS = 4096") != before


def test_a_stage_depends_on_the_code_that_it_imports_in_a_function() -> None:
    assert "cushion_deploy.prefix.objective" in tool._imported("cushion_deploy.stages.search")
    assert "cushion_deploy.prefix.objective" not in tool._imported("cushion_deploy.stages.smooth")
    assert "cushion_deploy.errors" not in tool._imported("cushion_deploy.stages.search")
