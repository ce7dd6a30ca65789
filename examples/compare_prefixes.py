"""Compare tokens as a prefix: the largest activation and the quantization error of a text behind each of them.

Shows: loading a model as a build does, the keys and values of any prefix, and the objective that the search minimizes.
Needs `pip install 'cushion-deploy[cpu,build]'`.

    python examples/compare_prefixes.py MODEL " " "." "The"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cushion_deploy.calib.corpora import python_topics
from cushion_deploy.modeling.magnitudes import layer_magnitudes
from cushion_deploy.prefix.objective import score_prefix
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore


def main() -> None:
    """Print one line for no prefix, and one for each given text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file, Hugging Face folder, or hub id")
    parser.add_argument("prefixes", nargs="+", help="text of a prefix, usually one token")
    parser.add_argument("--tokens", type=int, default=512, help="text tokens to measure on (default: 512)")
    parser.add_argument("--work-dir", type=Path, default=Path(".cushion-work"))
    given = parser.parse_args()

    model = Run(StageStore(given.work_dir)).get(Pipeline.of(Recipe().merged({"model": given.model})).model)
    text = model.encode(python_topics("evaluation").text[: 20 * given.tokens])[: given.tokens]
    print(f"{'prefix':20}{'largest activation':>20}{'quantization error':>20}")
    for name in ("", *given.prefixes):
        prefix = model.compute_prefix(tuple(int(token) for token in model.encode(name))) if name else model.no_prefix()
        largest = max(layer["top1"] for layer in layer_magnitudes(model, prefix, text[None]))
        error = score_prefix(model, model.past(prefix), text, "error")
        print(f"{repr(name) if name else 'none':20}{largest:20,.1f}{error:20.4g}")


if __name__ == "__main__":
    main()
