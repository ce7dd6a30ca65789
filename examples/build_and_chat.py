"""Build a bundle of a model and ask it something, all in Python.

Shows: settings as a recipe, a build that resumes in its work folder, the verdict of the report, and a streamed answer.
Needs `pip install 'cushion-deploy[cpu,build,report,chat]'`; the build of a small model takes minutes.

    python examples/build_and_chat.py MODEL OUT "Name three rivers."
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime import load
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore
from cushion_deploy.verbs.build import build


def main() -> None:
    """Build, say what was measured, and answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file, Hugging Face folder, or hub id")
    parser.add_argument("output", type=Path, help="folder of the bundle")
    parser.add_argument("question")
    parser.add_argument("--recipe", type=Path, help="YAML file with other settings")
    parser.add_argument("--work-dir", type=Path, default=Path(".cushion-work"))
    given = parser.parse_args()

    recipe = Recipe.load(given.recipe) if given.recipe else Recipe()
    recipe = recipe.merged({"model": given.model, "engines": ["onnxruntime"]})
    report = build(recipe, Run(StageStore(given.work_dir)), given.output)
    if report.perplexity is not None and report.perplexity.engine is not None:
        print(f"perplexity: {report.perplexity.fp:.2f} originally, {report.perplexity.engine:.2f} in INT8")
    failed = [check for check in report.parity if not check.passed]
    print(f"parity: {len(report.parity) - len(failed)} of {len(report.parity)} checks hold")

    generator = load(given.output)
    for event in generator.stream_chat([{"role": "user", "content": given.question}], max_new_tokens=64):
        print(event.text, end="", flush=True)
    print()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
