"""The summary of a report for a terminal of 80 columns, printed by ``build`` and ``cushion-deploy report``."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cushion_deploy.printable import one_line, visible
from cushion_deploy.report import plans, scores, shipping, statements
from cushion_deploy.report.document import Engine, ParityRow, Report
from cushion_deploy.report.render.formatting import duration

WIDTH = 80
_COLOURS = {"passed": "green", "incomplete": "yellow", "failed": "red"}
_SHOWN_FAILURES = 5


def summary(report: Report) -> RenderableType:
    """Return the summary as a rich renderable. Strings of the report are never read as markup."""
    outcome = statements.verdict(report)
    parts: list[RenderableType] = [Text(outcome.sentence, style=f"bold {_COLOURS[outcome.status]}"), Text()]
    parts += [_labelled("ship it?", Text(shipping.answer(report))), Text()]
    if report.perplexity is not None:
        rows = [*scores.perplexity_rows(report.perplexity), *scores.chat_rows(report.chat)]
        parts += [_four_columns(rows), Text()]
        if missing := scores.later_sentence(report.perplexity):
            parts.append(_labelled("KL", Text(missing)))
    if report.perplexity is not None:
        parts.append(_labelled("text", Text(scores.text_words(report.perplexity))))
    if report.chat is not None and report.chat.missing:
        parts.append(_labelled("chat", Text(scores.chat_sentence(report.chat))))
    parts += [_labelled("prefix", _prefix(report))]
    # Where something else than the prefix of the last column ships, that needs its numbers: the table is of other text.
    if report.choice is not None and report.choice.shipped in (statements.WITHOUT, statements.UNTUNED):
        parts.append(_labelled("", Text(statements.choice_sentence(report.choice))))
    parts += [_labelled("engine" if not i else "", _engine(report, e)) for i, e in enumerate(report.engines)]
    if report.plan_type is not None:
        parts.append(_labelled("plans", Text(plans.type_sentence(report.plan_type))))
    warnings = (plans.attention_warning(report, engine) for engine in report.engines)
    parts += [_labelled("", Text(warning, style="yellow")) for warning in warnings if warning]
    if report.kv_cache is not None:
        parts.append(_labelled("cache", Text(statements.cache_sentence(report))))
        fused = (statements.fused_attention_sentence(report, engine) for engine in report.engines)
        parts += [_labelled("", Text(sentence)) for sentence in fused if sentence]
    if not report.engines:
        parts.append(_labelled("engine", Text(statements.engines_sentence(report))))
    parts.append(_labelled("parity", Text(statements.parity_sentence(report))))
    # The sentence above names the first failure; these are the others.
    failed = statements.failed_checks(report)[1:]
    parts += [_labelled("", _failure(row)) for row in failed[:_SHOWN_FAILURES]]
    if len(failed) > _SHOWN_FAILURES:
        parts.append(_labelled("", Text(f"and {len(failed) - _SHOWN_FAILURES} more")))
    if report.stages:
        parts.append(_labelled("time", _stages(report)))
    return Group(*parts)


def summary_lines(report: Report) -> list[str]:
    """Return the summary as plain lines of at most 80 columns, without colour."""
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False, _environ={}
    )
    console.print(summary(report))
    return [text.rstrip() for text in buffer.getvalue().splitlines()]


def _labelled(label: str, content: Text) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=8, style="dim")
    grid.add_column(overflow="fold")
    grid.add_row(Text(label), content)
    return grid


def _four_columns(rows: Sequence[tuple[str, list[str]]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", style="dim")
    for name in scores.COLUMNS:
        table.add_column(name, justify="right")
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _prefix(report: Report) -> Text:
    if report.search is None or not statements.has_prefix(report):
        return Text(statements.prefix_sentence(report))
    if report.choice is not None and report.choice.shipped == statements.UNTUNED:
        return Text("the untuned one, because the quantized model is closer to the original with it")
    pairs = zip(report.search.tokens, report.search.token_ids, strict=True)
    tokens = [Text(f"{visible(token)} ({token_id})") for token, token_id in pairs]
    if report.search.averaging and report.search.averaged:
        begin = "trained from " if statements.ships_tuned(report) else ""
        mean = f"{begin}the mean of {report.search.averaging.tokens:,} first tokens, in place of "
        tokens[0] = Text(mean).append(tokens[0])
    return Text("  ").join(tokens)


def _engine(report: Report, engine: Engine) -> Text:
    name = one_line(f"{engine.engine} ({', '.join(engine.targets)})")
    fused = plans.attention_words(report, engine)
    text = Text(f"{name}: {', '.join(filter(None, (statements.coverage(engine), fused)))}")
    return text if engine.ran else text.append(f"; {statements.not_run_reason(engine)}", style="yellow")


def _failure(row: ParityRow) -> Text:
    where = f" ({one_line(row.site)})" if row.site else ""
    return Text(f"{one_line(row.rung)}: {statements.check_summary(row)}{where}", style="red")


def _stages(report: Report) -> Text:
    named = ", ".join(
        f"{one_line(stage.stage)} {'reused' if stage.reused else duration(stage.seconds)}" for stage in report.stages
    )
    return Text(f"{duration(report.build_seconds)}: {named}")
