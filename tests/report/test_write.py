"""Writing the report: the files, and the install line when a library is missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cushion_deploy.errors import ExitCode, MissingDependency
from cushion_deploy.report import read_report, write_json, write_report
from cushion_deploy.report.document import Report


def test_a_folder_receives_every_file(tmp_path: Path, report: Report, data: dict[str, Any]) -> None:
    names = write_report(report, tmp_path / "report")
    assert names == ["report.json", "report.html", "magnitudes.png", "perplexity.png", "scales.png", "stages.png"]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "report").iterdir())
    assert json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8")) == data
    assert read_report(tmp_path / "report" / "report.json") == report
    for name in names[2:]:
        with Image.open(tmp_path / "report" / name) as image:
            image.verify()
            assert image.format == "PNG"


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_gives_the_install_line_and_writes_nothing(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    data.update(magnitudes=None, calibration=None, perplexity=None, stages=data["stages"][:1])
    for module in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependency, match=library) as caught:
        write_report(Report.model_validate(data), tmp_path)
    assert caught.value.hint == "pip install 'cushion-deploy[report]'"
    assert caught.value.exit_code == ExitCode.MISSING
    assert list(tmp_path.iterdir()) == []


def test_json_and_summary_need_no_extra(tmp_path: Path, report: Report) -> None:
    write_json(report, tmp_path)
    code = (
        "import sys, pathlib; from cushion_deploy.report import read_report, summary_lines;"
        "summary_lines(read_report(pathlib.Path(sys.argv[1])));"
        "print(sorted({'matplotlib', 'jinja2', 'torch', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "report.json")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
