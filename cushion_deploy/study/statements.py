"""The results of a study as sentences, generated from its numbers. Text between backticks is code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from cushion_deploy.printable import visible
from cushion_deploy.report.render.formatting import (
    count,
    duration,
    extent,
    listing,
    model_name,
    number,
    percent,
    plural,
    signed,
)
from cushion_deploy.report.statements import magnitude_sentence
from cushion_deploy.study.comparisons import lower, nats, over
from cushion_deploy.study.document import PARTS, LayerAttention, Pair, Step, Study, Text
from cushion_deploy.study.paper import paper_tables
from cushion_deploy.study.tables import LATER, mean_of, on, perplexity


def headline(study: Study) -> str:
    """Return the sentence that opens the page: what the deployable recipe costs, without and with the prefix."""
    name = model_name(study.model.source)
    deployed = next((pair for pair in study.table1 or () if pair.deployable), None)
    if deployed is None or not study.texts:
        return f"{name}: {_parts_run(study)} of {len(PARTS)} tables and figures were measured."
    text = study.texts[0]
    without = over(on(deployed.without, text), on(study.fp, text))
    if not deployed.with_prefix:
        return f"{name} in static W8A8 is {without} FP perplexity on {text.title}, without a prefix."
    with_prefix = over(on(deployed.with_prefix, text), on(study.fp, text))
    both = f"{with_prefix} FP perplexity on {text.title} with the prefix, and {without} FP without it"
    return f"{name} in static W8A8 is {both}."


def introduction(study: Study) -> list[str]:
    """State what was studied and how it was measured."""
    m = study.model
    lines = [
        f"{model_name(m.source)} has {count(m.parameters)} parameters in {plural(m.layers, 'layer')} of width "
        f"{m.hidden_size:,}. Ranges and smoothing were calibrated on {study.calibration}."
    ]
    if study.prefix.token_ids:
        tokens = listing([f"`{_code(token)}`" for token in study.prefix.tokens])
        mean = ", with the mean of many first tokens at its first position" if study.prefix.averaged else ""
        how = f"tuned after the search{mean}" if study.prefix.tuned else f"as the search found it{mean}, without tuning"
        lines.append(f"The prefix is {plural(len(study.prefix.tokens), 'token')} long, {tokens}, {how}.")
    else:
        lines.append("There is no prefix: the search found no sink that justifies one, or the recipe disables it.")
    if study.texts:
        parts = [(t, extent(t.tokens, t.window, t.text_tokens)) for t in study.texts]
        texts = listing([f"{t.name} ({part}) in windows of {t.window:,}" for t, part in parts])
        lines.append(
            f"Perplexity is measured on {texts}. Windows do not overlap, and tokens of the prefix are not scored. "
            f"KL is the mean divergence from the original model without prefix or quantization{_later(study)}. "
            "Standard errors (±) treat tokens as independent; all rows are measured on the same tokens, so the "
            "difference between two of them is more certain than either. "
            "A prefix alone changes perplexity, so results are also compared with FP with the same prefix."
        )
    return lines


def _later(study: Study) -> str:
    if all(score.kl_after_16 is None for score in study.fp):
        return ""
    return (
        f"; '{LATER}' leaves out the predictions that are made at the positions 0 to 15 of every window, where the "
        "original model has its attention sink"
    )


def sentences(study: Study, part: str) -> list[str]:
    """Return the statements of a part, or the reason why a requested part was left out."""
    if part in study.left_out:
        return [f"Left out: {study.left_out[part]}."]
    makers = {
        "table1": _table1,
        "table2": _table2,
        "table3": _table3,
        "remedies": _remedies,
        "table4": _table4,
        "table5": _table5,
        "table6": _table6,
        "figure2": _figure2,
        "figure3": _figure3,
    }
    return makers[part](study)


def _table1(study: Study) -> list[str]:
    lines = [
        "The schemes are those of the paper: asymmetric activations, min-max ranges, group-wise weights, and the "
        "paper's alpha for SmoothQuant. The last row is the model that `cushion-deploy build` deploys."
    ]
    pairs = study.table1 or ()
    for text in study.texts:
        lines += _worst_and_gains(study, pairs, text)
    printed = paper_tables()["table1"]
    static, fp = printed.row("per-tensor static").with_prefix, printed.row("FP16").without
    over = [value / base - 1 for value, base in zip(static, fp, strict=True)]
    lines.append(
        f"In the paper, per-tensor static W8A8 with CushionCache is {percent(min(over))} to {percent(max(over))} over "
        f"FP16 on {len(over)} models."
    )
    return lines


def _worst_and_gains(study: Study, pairs: Sequence[Pair], text: Text) -> list[str]:
    """State which scheme is worst without the prefix, and how many schemes the prefix improves."""
    known = [(s.perplexity, p) for p in pairs if (s := on(p.without, text)) and s.perplexity is not None]
    if not known:
        return []
    worst = max(known, key=lambda row: row[0])[1]
    before, after = on(worst.without, text), on(worst.with_prefix, text)
    sentence = (
        f"On {text.title}, {worst.label} is worst: perplexity {perplexity(before)} without the prefix, "
        f"{over(before, on(study.fp, text))} FP"
    )
    if after is None:
        return [sentence + "."]
    sentence += f"; {perplexity(after)} with it, {over(after, on(study.fp_prefix, text))} FP with the same prefix."
    both = [(on(p.without, text), on(p.with_prefix, text)) for p in pairs]
    gains = sum(lower(b, a, "perplexity") for a, b in both)
    closer = sum(lower(b, a, "distance") for a, b in both)
    return [
        f"{sentence} The prefix lowers perplexity in {gains} of {plural(len(pairs), 'scheme')} and reduces the "
        f"divergence from the original model in {closer} of them."
    ]


def _table2(study: Study) -> list[str]:
    pairs = study.table2 or ()
    if not pairs or not pairs[0].without:
        return []
    fp = 100 * mean_of([r.value for r in pairs[0].without])
    rows = f"the first {plural(study.task_limit, 'row')} of each task" if study.task_limit else "every row"
    errors = [r.stderr for r in pairs[0].without if r.stderr is not None]
    lines = [f"FP reaches an average of {fp:.2f} % over {rows}."]
    if len(errors) == len(pairs[0].without):
        spread = 100 * math.hypot(*errors) / len(errors)
        lines[0] += f" The standard error of this average is {spread:.1f} points."
    last = pairs[-1]
    without = 100 * mean_of([r.value for r in last.without])
    sentence = f"The deployed recipe reaches {without:.2f} % without the prefix ({signed(without - fp)} points)"
    if last.with_prefix:
        with_prefix = 100 * mean_of([r.value for r in last.with_prefix])
        sentence += f" and {with_prefix:.2f} % with it ({signed(with_prefix - fp)})"
    return [*lines, sentence + "."]


def _table3(study: Study) -> list[str]:
    steps = study.table3 or ()
    lines = [
        "Every row is a recipe in the deployable scheme (static, per-tensor, symmetric) with the recipe's smoothing "
        "and ranges. The paper reports accuracy under per-tensor dynamic quantization; this table reports perplexity."
    ]
    for text in study.texts:
        scores = [on(step.scores, text) for step in steps]
        values = [s.perplexity for s in scores if s is not None and s.perplexity is not None]
        if 2 < len(values) == len(steps):
            lines.append(f"On {text.title}, {_share_of_the_search(values[0], values[1], values[-1])}.")
    rows = [row.without[0] for row in paper_tables()["table3"].rows[1:]]
    lines.append(
        f"In the paper, the search brings {100 * (rows[1] - rows[0]) / (rows[-1] - rows[0]):.0f} % of the gain in "
        "accuracy."
    )
    return lines


def _share_of_the_search(first: float, greedy: float, last: float) -> str:
    """State which share of the gain in perplexity comes from the search, before any tuning."""
    course = (
        f"perplexity goes from {first:,.2f} to {greedy:,.2f} with the searched prefix and to {last:,.2f} with tuning: "
    )
    if min(greedy, last) >= first:
        return course + "the method brings no gain"
    if last >= greedy:
        return course + "the search alone brings all of the gain"
    if greedy >= first:
        return course + "tuning alone brings all of the gain"
    return course + f"the search alone brings {100 * (first - greedy) / (first - last):.0f} % of the gain"


def _remedies(study: Study) -> list[str]:
    steps = study.remedies or ()
    lines = ["A row that begins with + adds one remedy to the row above; the three range estimators are alternatives."]
    for text in study.texts:
        known = [(s.distance, step) for step in steps if (s := on(step.scores, text)) and s.distance is not None]
        if not known:
            continue
        best = min(known, key=lambda row: row[0])[1]
        score, same = on(best.scores, text), on(best.fp, text)
        lines.append(
            f"On {text.title}, '{best.label}' is closest to the original model: {nats(score)} at "
            f"perplexity {perplexity(score)}, {over(score, on(study.fp, text))} FP and {over(score, same)} "
            f"FP with the same prefix.{_largest_step(known)}"
        )
    return lines


def _largest_step(known: Sequence[tuple[float, Step]]) -> str:
    drops = [
        (before - after, step.label) for (before, _), (after, step) in pairwise(known) if step.label.startswith("+")
    ]
    if not drops or max(drops)[0] <= 0:
        return " No remedy added to the ranges lowers the divergence."
    drop, label = max(drops)
    return f" The largest single step is '{label}', which lowers the divergence by {drop:.4f} nats."


def _table4(study: Study) -> list[str]:
    lines = ["Fewer bits with one scale per token: simulated as in the paper, not deployable."]
    pairs = study.table4 or ()
    if any(pair.rotated for pair in pairs):
        lines.append("Rows whose inputs are rotated, by the rotations of the recipe, are not in the paper.")
    lines += [_own_prefix(pair) for pair in pairs if pair.prefix]
    for text in study.texts:
        both = [(on(p.without, text), on(p.with_prefix, text)) for p in pairs]
        known = [(a, b) for a, b in both if a and b]
        if known:
            gains = sum(lower(b, a, "perplexity") for a, b in known)
            lines.append(f"On {text.title}, the prefix lowers perplexity in {gains} of {plural(len(known), 'scheme')}.")
    return lines


def _own_prefix(pair: Pair) -> str:
    found = pair.prefix.tokens if pair.prefix else ()
    tokens = listing([f"`{_code(token)}`" for token in found]) if found else "none that pays"
    return (
        f"The prefix of {pair.label} was searched with its bits, and is not that of the other tables: {tokens}. It is "
        "compared with FP with the same prefix."
    )


def _table5(study: Study) -> list[str]:
    found = study.table5
    if found is None:
        return []
    sentence = f"Without a prefix, the largest value that enters the last block is {found.without.top1:,.2f}, "
    sentence += f"{_times(found.without.top1, found.without.median)} the median"
    if found.with_prefix is None:
        return [sentence + "."]
    after = found.with_prefix
    return [
        f"{sentence}; with the prefix it is {after.top1:,.2f}, {_times(after.top1, after.median)} the median. "
        f"The median itself changes from {found.without.median:,.2f} to {after.median:,.2f}."
    ]


def _table6(study: Study) -> list[str]:
    found = study.table6
    if found is None:
        return []
    lines = []
    if found.search_seconds is not None:
        sentence = (
            f"The search ({found.search_mode}) took {duration(found.search_seconds)} and scored "
            f"{plural(found.candidates_scored, 'candidate')} exactly"
        )
        if 0 < found.positions_scored < found.positions_full_scan:
            ratio = found.positions_full_scan / found.positions_scored
            sentence += f"; a scan of the whole vocabulary would need {ratio:,.0f} times as many positions"
        lines.append(sentence + ".")
    else:
        lines.append("No search was run.")
    if found.tuning_seconds is not None:
        lines.append(
            f"Tuning ({found.tuning_loss}) took {duration(found.tuning_seconds)} for "
            f"{plural(found.tuning_steps, 'step')}."
        )
    return lines


def _figure2(study: Study) -> list[str]:
    return [magnitude_sentence(study.figure2)] if study.figure2 is not None and study.figure2.without else []


def _figure3(study: Study) -> list[str]:
    found = study.figure3
    if found is None or not found.without:
        return []
    first = _mean(found.without, "first")
    lines = [
        f"Shares of attention on a text of {plural(found.tokens, 'token')}, averaged over heads and all text tokens "
        f"except the first. Without a prefix, {first:.0%} of the attention is on the first token, averaged over layers."
    ]
    if found.with_prefix:
        lines.append(
            f"With the prefix, {_mean(found.with_prefix, 'prefix'):.0%} is on the prefix, "
            f"{_mean(found.with_prefix, 'first'):.0%} on the first token of the text and "
            f"{_mean(found.with_prefix, 'rest'):.0%} on all others."
        )
    return [text.replace("%", " %") for text in lines]


def _mean(layers: Sequence[LayerAttention], name: str) -> float:
    return mean_of([getattr(layer, name) for layer in layers])


def _code(token: str) -> str:
    """Return a token without characters that are invisible or end a code span."""
    return visible(token).replace("`", "‹U+0060›")


def _times(value: float, base: float) -> str:
    return f"{number(value / base, 3)} times" if base else "with zero as"


def _parts_run(study: Study) -> int:
    return sum(getattr(study, part) is not None for part in PARTS)
