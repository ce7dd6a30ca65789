"""Check a bundle in CI: every file against the manifest, and parity against a baseline that is under version control.

Shows: the two commands that a pipeline needs, their exit codes, and a summary for the page of a GitHub job. The first
run writes the baseline; commit it.
Needs `pip install 'cushion-deploy[cpu,build]'`.

    python examples/parity_in_ci.py BUNDLE MODEL parity-baseline.json

Further options are those of `cushion-deploy parity`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


def cushion_deploy(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command; its errors go to the log of the job."""
    command = [sys.executable, "-m", "cushion_deploy", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)


def summary(report: dict[str, object]) -> str:
    """Return the checks as a Markdown table, and what could not be checked."""
    lines = ["| | rung | metric | value | limit | Site |", "| --- | --- | --- | --- | --- | --- |"]
    for check in report["checks"]:  # type: ignore[attr-defined]
        value = "not finite" if check["value"] is None else f"{check['value']:.4g}"
        cells = check["rung"], check["metric"], value, f"{check['limit']:g}", check["site"] or ""
        # A metric such as `max |logit difference|` would end its cell.
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| {'✅' if check['passed'] else '❌'} | {row} |")
    return "\n".join([*lines, *(f"\nNot checked: {each}" for each in report["unchecked"]), ""])  # type: ignore[attr-defined]


def main() -> int:
    """Return the exit code of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("model", help="the original: GGUF file, Hugging Face folder, or hub id")
    parser.add_argument("baseline", type=Path)
    given, more = parser.parse_known_args()

    verified = cushion_deploy("verify", given.bundle)
    print(verified.stdout, end="")
    if verified.returncode:
        return verified.returncode
    option = "--baseline" if given.baseline.exists() else "--write-baseline"
    options = ("--model", given.model, "--junit", "parity.xml", "--json", *more)
    parity = cushion_deploy("parity", given.bundle, *options, option, given.baseline)
    if parity.stdout:
        text = summary(json.loads(parity.stdout))
        print(text)
        if page := os.environ.get("GITHUB_STEP_SUMMARY"):
            with open(page, "a", encoding="utf-8") as file:
                file.write(text)
    return parity.returncode


if __name__ == "__main__":
    sys.exit(main())
