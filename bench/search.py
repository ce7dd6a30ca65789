"""Time the prefix search, and rank its tokens among new random tokens that are scored exactly in the same context."""

from __future__ import annotations

import json
import time

import numpy as np
from common import arguments, new_run, pipeline

from cushion_deploy.prefix.objective import score_candidates
from cushion_deploy.prefix.search import PrefixSearch, draw_text


def main() -> None:
    """Search, then rank every found token within a random sample that the search did not use."""
    parser = arguments(__doc__)
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--rejected", action="store_true", help="also rank the tokens of rejected steps")
    options = parser.parse_args()
    run, nodes = new_run(options), pipeline(options)
    config, model = nodes.recipe.search, run.get(nodes.model)
    text = model.encode(run.get(nodes.text).text)
    begin = time.monotonic()
    _, trace = PrefixSearch(model, text, config, options.seed, None, run.progress).run()
    seconds = time.monotonic() - begin
    rng = np.random.default_rng(987_654_321)
    ranks = []
    for number, step in enumerate(trace.steps):
        if not (step.accepted or options.rejected):
            continue
        past = model.past(model.compute_prefix(trace.token_ids[: len(trace.seed_tokens) + number]))
        sample = [int(t) for t in rng.choice(model.vocabulary, size=options.sample, replace=False)]
        drawn = draw_text(text, config.text_tokens, options.seed, number)
        scores = score_candidates(model, past, drawn, sample, config.objective, bits=config.bits, progress=run.progress)
        better = sum(score < step.best.objective for score in scores)
        ranks.append(
            {
                "token": step.best.token,
                "accepted": step.accepted,
                "leaves": round(step.ratio, 4),
                "better_in_sample": better,
                "sample": options.sample,
                "best_percent": round(100 * (better + 1) / (options.sample + 1), 2),
            }
        )
    print(
        json.dumps(
            {
                "seconds": round(seconds, 1),
                "positions_scored": trace.positions_scored,
                "positions_full_scan": trace.positions_full_scan,
                "tokens": trace.tokens,
                "stopped": trace.stopped,
                "steps": ranks,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
