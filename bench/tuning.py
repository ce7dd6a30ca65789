"""Measure the gain of tuning and its noise: the same prefix tuned with several seeds, on other text.

    python bench/tuning.py --calib-data TEXT --eval-data TEXT [--eval-data TEXT] --seeds 0 1 2 [--loss distill]

Prints, for the untuned start and every seed, the held-out loss of the tuning itself and, for each text, perplexity and
divergence from the original model, with mean and standard deviation of the changes over the seeds.
"""

from __future__ import annotations

import json
from statistics import mean, stdev
from typing import Any

from common import arguments, new_run, pipeline

from cushion_deploy.core.progress import Progress
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.evaluate.perplexity import TextScore, cut_windows
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.teacher import Teacher
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.base import Given


def main() -> None:
    """Print the comparison as JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--loss", choices=("invisible", "distill", "ce"), default="invisible")
    parser.add_argument("--epochs", type=int, default=Recipe().tuning.epochs)
    parser.add_argument("--calibration-windows", type=int, default=32)
    options = parser.parse_args()
    settings = {"tuning.loss": options.loss, "tuning.epochs": options.epochs}
    settings["calibration.windows"] = options.calibration_windows
    run, nodes = new_run(options), pipeline(options, **settings)
    start = run.get(nodes.behind(nodes.prefix, tuned=False).quantization)
    model = run.get(nodes.model)
    teacher = Teacher(model)
    texts = {}
    for data in options.eval_data:
        corpus = run.get(nodes.corpus(data, "evaluation"))
        texts[corpus.name] = cut_windows(model.encode(corpus.text), options.window, options.max_tokens, corpus.name).ids
        teacher.remember(texts[corpus.name], run.progress)
    rows: dict[str, Any] = {"untuned": judge(model, start, teacher, texts, run.progress)}
    searched = Given(run.get(nodes.prefix))
    for seed in options.seeds:
        # The same prefix for every seed, so that only the tuning differs.
        branch = nodes.altered({"seed": seed, "tuning.enabled": True}).behind(searched)
        tuned = run.get(branch.quantization)
        trace = run.get(branch.tuning).trace if branch.tuning else None
        states = trace.states if trace else ()
        held_out = {"held out": [state.held_out for state in (states[0], min(states, key=_loss))]}
        rows[f"seed {seed}"] = {**held_out, **judge(model, tuned, teacher, texts, run.progress)}
    changes: dict[str, Any] = {}
    for name in texts:
        for kind in ("perplexity", "divergence"):
            found = [rows[f"seed {s}"][name][kind] / rows["untuned"][name][kind] - 1 for s in options.seeds]
            spread = stdev(found) if len(found) > 1 else None
            changes[f"{name}: {kind}"] = {"each": found, "mean": mean(found), "standard deviation": spread}
    print(json.dumps({"rows": rows, "changes": changes}, indent=1))


def judge(
    model: TorchRunner, quantization: Quantization, teacher: Teacher, texts: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Return perplexity and divergence on every text, quantized and in floating point with the same prefix."""
    found = {}
    folded, prefix = model.folded(quantization.smoothing), quantization.prefix
    for name, windows in texts.items():
        plain = teacher.compare(model, prefix, windows, progress, f"FP + prefix, {name}")
        with simulated(folded, quantization.scheme, quantization.scales):
            quantized = teacher.compare(folded, prefix, windows, progress, f"W8A8 + prefix, {name}")
        found[name] = {
            "perplexity": TextScore(quantized.losses).perplexity,
            "divergence": quantized.divergence,
            "fp perplexity": TextScore(plain.losses).perplexity,
            "fp divergence": plain.divergence,
        }
    return found


def _loss(state: Any) -> float:
    return float("inf") if state.held_out is None else float(state.held_out)


if __name__ == "__main__":
    main()
