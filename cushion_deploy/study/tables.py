"""The tables of a study, from study.json, and the tables of the paper that they are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cushion_deploy.report.render.elements import Table
from cushion_deploy.report.render.formatting import NONE, NOT_FINITE, duration, percent, plural, signed, with_error
from cushion_deploy.study.document import BlockInput, Effort, LastBlock, Pair, Score, Step, Study, TaskPair, Text
from cushion_deploy.study.paper import PaperTable, paper_tables

LATER = "KL from position 16"


def tables(study: Study, part: str) -> list[Table]:
    """Return the measured tables of a part; empty if the part was not run or is a figure."""
    if part in ("table1", "table4"):
        pairs: Sequence[Pair] | None = study.table1 if part == "table1" else study.table4
        return [_pairs(study, pairs, text) for text in study.texts] if pairs is not None else []
    if part in ("table3", "remedies"):
        steps: Sequence[Step] | None = study.table3 if part == "table3" else study.remedies
        return [_steps(study, steps, text) for text in study.texts] if steps is not None else []
    if part == "table2" and study.table2 is not None:
        return [_accuracy(study.table2), _tasks(study.table2)]
    if part == "table5" and study.table5 is not None:
        return [_last_block(study.table5)]
    if part == "table6" and study.table6 is not None:
        return [_effort(study.table6)]
    return []


def paper_table(part: str) -> Table | None:
    """Return the paper's table for a part; None if the paper has none."""
    found = paper_tables().get(part)
    return _printed(found, part) if found else None


def on(scores: Iterable[Score], text: Text) -> Score | None:
    """Return the score on a text; None if there is none."""
    return next((score for score in scores if score.text == text.name), None)


def change(value: Score | None, base: Score | None) -> str:
    """Return the relative change of a perplexity from another one, in percent."""
    if value is None or base is None or value.perplexity is None or base.perplexity is None:
        return NONE
    return percent(value.perplexity / base.perplexity - 1)


def perplexity(score: Score | None) -> str:
    """Return the perplexity of a score with its standard error, with two decimals."""
    if score is None:
        return NONE
    return NOT_FINITE if score.perplexity is None else with_error(score.perplexity, score.stderr)


def divergence(score: Score | None) -> str:
    """Return the divergence of a score with its standard error, with four decimals."""
    if score is None:
        return NONE
    return NOT_FINITE if score.divergence is None else with_error(score.divergence, score.divergence_stderr, 4)


def later_divergence(score: Score | None) -> str:
    """Return the divergence from position 16 on; ``—`` if it was not measured."""
    if score is None or score.divergence is None:
        return divergence(score)
    return with_error(score.kl_after_16, score.kl_after_16_stderr, 4)


def mean_of(results: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(results) / len(results)


def _pairs(study: Study, pairs: Sequence[Pair], text: Text) -> Table:
    fp, fp_prefix = on(study.fp, text), on(study.fp_prefix, text)
    rows = [_pair_row("FP", fp, fp_prefix, None, None)]
    for pair in pairs:
        same = on(pair.fp_prefix, text) or fp_prefix
        rows.append(_pair_row(pair.label, on(pair.without, text), on(pair.with_prefix, text), fp, same))
    with_prefix = ("with prefix", "over FP + prefix", "over FP", "KL", LATER)
    head = ("scheme", "without", "over FP", "KL", LATER, *with_prefix)
    strong = frozenset(i for i, pair in enumerate(pairs, 1) if pair.deployable)
    caption = f"Perplexity on {text.title}, and KL divergence from the original model in nats per token"
    return Table(*_without_missing(head, rows), caption, strong=strong)


def _pair_row(
    label: str, without: Score | None, with_prefix: Score | None, fp: Score | None, fp_prefix: Score | None
) -> tuple[str, ...]:
    # Without fp this is the row of the float model itself.
    over_fp, over_fp_prefix = ("", "") if fp is None else (change(without, fp), change(with_prefix, fp_prefix))
    before = (perplexity(without), over_fp, divergence(without), later_divergence(without))
    changes = (over_fp_prefix, change(with_prefix, fp or without))
    after = (perplexity(with_prefix), *changes, divergence(with_prefix), later_divergence(with_prefix))
    return (label, *before, *after)


def _steps(study: Study, steps: Sequence[Step], text: Text) -> Table:
    fp = on(study.fp, text)
    rows = [("FP, no prefix", perplexity(fp), "", "", divergence(fp), later_divergence(fp))]
    for step in steps:
        score, same = on(step.scores, text), on(step.fp, text)
        changes = (change(score, fp), change(score, same))
        rows.append((step.label, perplexity(score), *changes, divergence(score), later_divergence(score)))
    best = _best(steps, text)
    head = ("static W8A8", "perplexity", "over FP", "over FP with the same prefix", "KL", LATER)
    strong = frozenset() if best is None else frozenset({best + 1})
    caption = f"Perplexity on {text.title}, and KL divergence from the original model in nats per token"
    return Table(*_without_missing(head, rows), caption, strong=strong)


def _without_missing(
    head: tuple[str, ...], rows: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Leave out divergences from position 16 on that no row has."""
    kept = [i for i, name in enumerate(head) if name != LATER or any(row[i] != NONE for row in rows)]
    return tuple(head[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows)


def _best(steps: Sequence[Step], text: Text) -> int | None:
    found = [(score.perplexity, i) for i, step in enumerate(steps) if (score := on(step.scores, text))]
    finite = [(value, i) for value, i in found if value is not None]
    return min(finite)[1] if finite else None


def _accuracy(pairs: Sequence[TaskPair]) -> Table:
    rows = []
    for pair in pairs:
        without = 100 * mean_of([r.value for r in pair.without])
        row = [pair.label, f"{without:.2f}", NONE, NONE]
        if pair.with_prefix:
            with_prefix = 100 * mean_of([r.value for r in pair.with_prefix])
            row[2:] = [f"{with_prefix:.2f}", signed(with_prefix - without)]
        rows.append(tuple(row))
    tasks = plural(len(pairs[0].without), "task") if pairs else "no task"
    head = ("scheme", "without", "with prefix", "change, points")
    return Table(head, tuple(rows), f"Average over {tasks}, %", strong=frozenset({len(rows) - 1}))


def _tasks(pairs: Sequence[TaskPair]) -> Table:
    first = pairs[0].without if pairs else ()
    kinds = {(r.metric, r.n) for r in first}
    # A first word that all names share, such as the name of their collection, carries no information.
    collections = {r.task.partition("_")[0] for r in first if len(first) > 1}
    shared = f"{collections.pop()}_" if len(collections) == 1 else ""
    names = [r.task.removeprefix(shared) for r in first]
    if len(kinds) == 1:
        caption, head = f"Every task, % ({first[0].metric}, {first[0].n:,} rows each)", ("scheme", *names)
    else:
        caption = "Every task, %"
        head = ("scheme", *(f"{name} ({r.metric}, n={r.n:,})" for name, r in zip(names, first, strict=True)))
    rows: list[tuple[str, ...]] = []
    for pair in pairs:
        rows.append((pair.label, *(f"{100 * r.value:.1f}" for r in pair.without)))
        if pair.with_prefix:
            rows.append((f"{pair.label}, with prefix", *(f"{100 * r.value:.1f}" for r in pair.with_prefix)))
    return Table(head, tuple(rows), caption)


def _last_block(found: LastBlock) -> Table:
    rows = [_block_row("without prefix", found.without)]
    if found.with_prefix is not None:
        rows.append(_block_row("with prefix", found.with_prefix))
    caption = f"Mean over {plural(found.windows, 'window')} of {found.length} tokens"
    head = ("input of the last block", "top-1", "top 10 %", "median")
    return Table(head, tuple(rows), caption, strong=frozenset({1}))


def _block_row(label: str, found: BlockInput) -> tuple[str, ...]:
    return label, f"{found.top1:,.2f}", f"{found.top10:,.2f}", f"{found.median:,.2f}"


def _effort(found: Effort) -> Table:
    rows: list[tuple[str, ...]] = []
    if found.search_seconds is not None:
        scored = f"{found.positions_scored:,} positions of {found.positions_full_scan:,} in a full scan"
        rows.append(("greedy search", duration(found.search_seconds), scored))
    if found.tuning_seconds is not None:
        rows.append(("prefix tuning", duration(found.tuning_seconds), plural(found.tuning_steps, "optimizer step")))
    both = (found.search_seconds or 0) + (found.tuning_seconds or 0)
    if len(rows) == 2:
        rows.append(("both", duration(both), ""))
    return Table(("step", "time", "work"), tuple(rows), "Wall time on this machine")


def _printed(table: PaperTable, part: str) -> Table:
    rows: list[tuple[str, ...]] = []
    for row in table.rows:
        rows.append((row.name, *(f"{value:,.2f}" for value in row.without)))
        if row.with_prefix:
            label = "+ CushionCache" if part != "table5" else f"{row.name} + CushionCache"
            rows.append((label, *(f"{value:,.2f}" for value in row.with_prefix)))
    strong = frozenset(i for i, row in enumerate(rows) if "CushionCache" in row[0])
    return Table(("", *table.columns), tuple(rows), f"Paper: {table.measure}", strong=strong)
