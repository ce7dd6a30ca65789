"""The examples in Python do what their first lines say, on tiny models."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ROOT = EXAMPLES.parent
Example = Callable[..., Any]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Example:
    """Return a function that runs an example in an empty folder, and returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return run


def test_every_example_says_what_it_shows() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) == 3
    for file in files:
        header = file.read_text().partition('"""\n\nfrom')[0]
        assert "Shows: " in header
        assert f"python examples/{file.name}" in header
        assert file.name in (EXAMPLES / "README.md").read_text()


def test_build_and_chat(example: Example, planted_bundle: Any, planted_folder: Path, tmp_path: Path) -> None:
    recipe = planted_bundle.options[planted_bundle.options.index("--recipe") + 1]
    texts = dict(zip(planted_bundle.options, planted_bundle.options[1:], strict=False))
    settings = f"calibration: {{windows: 4, window: 64, data: {texts['--calib-data']}}}\n"
    settings += f"evaluation: {{window: 64, max_tokens: 128, data: {texts['--eval-data']}}}\n"
    settings += "\n".join(
        line for line in Path(recipe).read_text().splitlines() if line.startswith(("search", "parity"))
    )
    (tmp_path / "recipe.yaml").write_text(settings + "\nexport: {quantize_head: true}\n")
    options = ("--recipe", "recipe.yaml", "--work-dir", planted_bundle.work)
    code, out, err = example("build_and_chat.py", planted_folder, "OUT", "Name three rivers.", *options)
    assert code == 0, err
    perplexity, parity, *answer = out.splitlines()
    report = json.loads((tmp_path / "OUT" / "report" / "report.json").read_text())
    assert f"{report['perplexity']['fp']:.2f} originally" in perplexity
    assert parity == f"parity: {len(report['parity'])} of {len(report['parity'])} checks hold"
    assert "".join(answer).strip()


def test_comparing_prefixes_finds_the_planted_absorber(
    example: Example, planted_folder: Path, planted_model: Any, plant: Any
) -> None:
    absorber = planted_model.token_text(plant.absorbers[0])
    code, out, err = example("compare_prefixes.py", planted_folder, absorber, "A", "--tokens", 96)
    assert code == 0, err
    rows = {line[:20].strip(): [float(v.replace(",", "")) for v in line[20:].split()] for line in out.splitlines()[1:]}
    assert set(rows) == {"none", repr(absorber), "'A'"}
    assert rows[repr(absorber)][1] < 0.5 * rows["none"][1]
    assert rows[repr(absorber)][1] < rows["'A'"][1]


def test_parity_in_ci(
    example: Example, planted_bundle: Any, planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, baseline = tmp_path / "summary.md", tmp_path / "baseline.json"
    # The result of the build is reused here; tests/parity and tests/cli/test_verbs.py compute it.
    options = ("--work-dir", planted_bundle.work, "--reuse")
    arguments = (planted_bundle.bundle, planted_folder, baseline, *options)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    code, out, err = example("parity_in_ci.py", *arguments)
    assert code == 0, err
    assert "all unchanged" in out
    assert page.read_text().count("✅") >= 5
    assert "testcase" in (tmp_path / "parity.xml").read_text()
    recorded = json.loads(baseline.read_text())
    worse = next(entry for entry in recorded["checks"] if "agreement" in entry["metric"])
    worse.update(value=worse["value"] + 1.0, tolerance=0.0)
    baseline.write_text(json.dumps(recorded))
    code, out, _ = example("parity_in_ci.py", *arguments)
    assert code == 1, out
    assert out.count("❌") == 1


def test_parity_in_ci_writes_a_table_that_markdown_reads() -> None:
    summary = runpy.run_path(str(EXAMPLES / "parity_in_ci.py"))["summary"]
    check = {"rung": "r", "metric": "max |logit|", "value": None, "limit": 0.5, "site": None, "passed": False}
    text = summary({"checks": [check], "unchecked": ["x was not run: no GPU"]})
    table, _, rest = text.partition("\n\n")
    # Cells are separated by the bars that have no backslash before them.
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    assert rows[2] == ["❌", "r", r"max \|logit\|", "not finite", "0.5", ""]
    assert {len(row) for row in rows} == {6}
    assert rest == "Not checked: x was not run: no GPU\n"


def test_parity_in_ci_stops_at_a_damaged_bundle(example: Example, copy: Path, planted_folder: Path) -> None:
    (copy / "scales.json").write_text("{}")
    code, _, err = example("parity_in_ci.py", copy, planted_folder, "baseline.json")
    assert code == 4
    assert "scales.json" in err
