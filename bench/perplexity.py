"""The four perplexity columns on a text, for every window length, estimator and head."""

from __future__ import annotations

import json

from common import arguments, new_run, pipeline


def main() -> None:
    """Print one row for each combination."""
    parser = arguments(__doc__)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--window", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--estimator", nargs="+", default=["percentile"])
    parser.add_argument("--head", nargs="+", choices=["float", "int8"], default=["float", "int8"])
    parser.add_argument("--max-tokens", type=int, default=1_000_000)
    options = parser.parse_args()
    run = new_run(options)
    for estimator in options.estimator:
        for head in options.head:
            for window in options.window:
                nodes = pipeline(
                    options,
                    **{
                        "evaluation.data": options.eval_data,
                        "evaluation.window": window,
                        "evaluation.max_tokens": options.max_tokens,
                        "calibration.estimator": estimator,
                        "export.quantize_head": head == "int8",
                    },
                )
                row = run.get(nodes.evaluation)["perplexity"]
                cost = row["quantized_prefix"] / row["fp_prefix"] - 1
                bare = row["quantized"] / row["fp"] - 1
                extra = {"with_prefix": f"{100 * cost:+.1f} %", "without": f"{100 * bare:+.1f} %"}
                print(json.dumps({"estimator": estimator, "head": head, **row, **extra}), flush=True)


if __name__ == "__main__":
    main()
