"""Can the bundle ship? The answer in one sentence, and what it rests on."""

from __future__ import annotations

from dataclasses import dataclass

from cushion_deploy.printable import one_line
from cushion_deploy.report import statements
from cushion_deploy.report.document import Report
from cushion_deploy.report.render.formatting import listing, percent, plural
from cushion_deploy.report.statements import Status

QUESTION = "Can I ship it?"


@dataclass(frozen=True)
class Reason:
    """One thing that the answer rests on.

    Attributes:
        name: what was asked.
        status: whether it speaks for shipping, is not known, or speaks against it.
        result: the status in a word or two.
        sentence: what was found.
    """

    name: str
    status: Status
    result: str
    sentence: str


def answer(report: Report) -> str:
    """Return the answer: yes, not yet or no, and why."""
    status = statements.verdict(report).status
    if status == "failed":
        failed, total = len(statements.failed_checks(report)), len(report.parity)
        return (
            f"No: {failed} of {plural(total, 'parity check')} {'fails' if failed == 1 else 'fail'}, so the bundle does "
            "not compute what was evaluated."
        )
    if status == "incomplete":
        return f"Not yet: {listing(_missing(report))}."
    return "Yes, if this accuracy is enough for what you use it for: the bundle computes what was evaluated."


def reasons(report: Report) -> tuple[Reason, ...]:
    """Return what the answer rests on: parity, accuracy, INT8 coverage, and where it ran."""
    failed = bool(statements.failed_checks(report))
    parity: Status = "failed" if failed else "passed" if report.parity else "incomplete"
    word = {"failed": "fails", "passed": "holds", "incomplete": "not run"}[parity]
    found = [
        Reason("Computes what was evaluated", parity, word, statements.parity_sentence(report)),
        _known("Accuracy", _is_measured(report), "measured", _accuracy(report)),
    ]
    if report.engines:
        covered = listing([f"{statements.coverage(engine)} ({one_line(engine.engine)})" for engine in report.engines])
        found.append(Reason("INT8", "passed", "compiled", f"{covered}."))
    ran = any(engine.ran for engine in report.engines)
    found.append(_known("Engines", ran, "run", statements.engines_sentence(report)))
    return tuple(found)


def _known(name: str, known: bool, result: str, sentence: str) -> Reason:
    return Reason(name, "passed" if known else "incomplete", result if known else f"not {result}", sentence)


def _is_measured(report: Report) -> bool:
    return report.perplexity is not None and report.perplexity.quantized_prefix is not None


def _missing(report: Report) -> list[str]:
    missing = {
        "its perplexity was not measured": not _is_measured(report),
        "the parity ladder was not run": not report.parity,
        "no engine ran on this machine": not any(engine.ran for engine in report.engines),
    }
    return [words for words, is_missing in missing.items() if is_missing]


def _accuracy(report: Report) -> str:
    """Return what ships compared with the original model, without any prefix: perplexity, and divergence."""
    measured, chat = report.perplexity, report.chat
    if measured is None:
        return "Not measured."
    column = "quantized_prefix" if statements.has_prefix(report) else "quantized"
    shipped, parts = getattr(measured, column), []
    if shipped is not None and measured.fp is not None:
        change = percent(shipped / measured.fp - 1)
        parts.append(f"perplexity {shipped:,.2f}, {measured.fp:,.2f} in floating point without a prefix ({change})")
    if measured.kl_after_16 is not None and getattr(measured.kl_after_16, column) is not None:
        parts.append(f"{getattr(measured.kl_after_16, column):.4f} nats per token from the original in text")
    if chat is not None and chat.answer is not None and getattr(chat.answer, column) is not None:
        parts.append(f"{getattr(chat.answer, column):.4f} in answers of chats")
    text = listing(parts)
    return f"{text[0].upper()}{text[1:]}." if parts else "Not finite."
