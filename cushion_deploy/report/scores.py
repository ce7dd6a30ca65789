"""Perplexity and divergence of a report: rows of the four-column table, and what is said about them."""

from __future__ import annotations

from cushion_deploy.printable import one_line
from cushion_deploy.report.document.measurements import LATER_WINDOW, Chat, Columns, Perplexity
from cushion_deploy.report.render.formatting import NONE, excerpt, extent, percent, perplexity, plural, with_error

COLUMNS = ("FP", "FP + prefix", "quantized", "quantized + prefix")
KL, LATER, ERROR = "KL from FP, nats/token", "KL from position 16 on", "standard error"


def perplexity_rows(measured: Perplexity) -> list[tuple[str, list[str]]]:
    """Return the rows of the four-column table.

    These are values, changes relative to FP and FP + prefix, and the KL divergence whole and from position 16 on; what
    has a standard error is followed by it.
    """
    columns = (measured.fp, measured.fp_prefix, measured.quantized, measured.quantized_prefix)

    def changes(reference: int) -> list[str]:
        base = columns[reference]
        return [
            "" if value is None or base is None or index == reference else percent(value / base - 1)
            for index, value in enumerate(columns)
        ]

    rows = [("perplexity", [perplexity(value) for value in columns])]
    rows += _errors(measured.stderr, 2)
    rows += [("vs. FP", changes(0)), ("vs. FP + prefix", changes(1))]
    if measured.divergence is not None:
        rows += _divergences(KL, measured.divergence, measured.divergence_stderr)
    if measured.kl_after_16 is not None and measured.window >= LATER_WINDOW:
        rows += _divergences(LATER, measured.kl_after_16, measured.kl_after_16_stderr)
    return rows


def chat_rows(chat: Chat | None) -> list[tuple[str, list[str]]]:
    """Return the rows of the four-column table for chats."""
    if chat is None or chat.answer is None or chat.prompt is None:
        return []
    answer = _divergences("KL, answers in chats", chat.answer, chat.answer_stderr)
    return answer + _divergences("  their prompts", chat.prompt, chat.prompt_stderr)


def chat_sentence(chat: Chat | None) -> str:
    """State how chats were measured, or why they were not; empty if it was not tried."""
    if chat is None:
        return ""
    if chat.missing:
        return f"Chats were not measured: {one_line(chat.missing)}."
    return (
        f"Chats are {plural(chat.prompts, 'prompt')} of {plural(chat.tokens, 'token')}, a passage as the message of a "
        "user in the model's chat template, with what the original model answers in "
        f"{plural(chat.answer_tokens, 'token')}; nobody reads what a model predicts within a prompt. Standard errors "
        "are those of the mean over prompts."
    )


def text_words(measured: Perplexity) -> str:
    """Return what was scored: ``wiki.txt: first 4,096 of 68,011 tokens, in windows of 512``."""
    part = extent(measured.tokens, measured.window, measured.text_tokens)
    return f"{one_line(measured.corpus)}: {part}, in windows of {measured.window:,}"


def excerpt_words(measured: Perplexity) -> str:
    """Return `` (first 4,096 of 68,011 tokens)``, to follow a result; empty if all of the text was scored."""
    part = excerpt(measured.tokens, measured.window, measured.text_tokens)
    return f" ({part})" if part else ""


def noise_sentence(measured: Perplexity) -> str:
    """State what the standard errors mean; empty if there are none."""
    if measured.stderr is None:
        return ""
    return (
        "Standard errors treat tokens as independent. All columns are measured on the same tokens, so the difference "
        "between two of them is more certain than either."
    )


def later_sentence(measured: Perplexity) -> str:
    """State why there is no divergence from position 16 on; empty if there is one, or no divergence at all."""
    if measured.kl_after_16 is None or measured.window >= LATER_WINDOW:
        return ""
    return (
        f"There is no KL from position 16 on: windows of {measured.window} tokens have no prediction there; "
        f"set evaluation.window to at least {LATER_WINDOW}."
    )


def engine_perplexity_sentence(measured: Perplexity, *, prefix: bool = True) -> str:
    """State the perplexity of the compiled engine, next to that of simulated quantization of the same model.

    Args:
        measured: the scores.
        prefix: whether the engine has the prefix of the last column.
    """
    if measured.engine is None:
        return "Quantization is simulated in these columns; no compiled engine was measured."
    text = f"The compiled engine measures {with_error(measured.engine, measured.engine_stderr)}"
    simulated = measured.quantized_prefix if prefix else measured.quantized
    if simulated is not None:
        change = percent(measured.engine / simulated - 1)
        column = "in the last column" if prefix else "without the prefix"
        text += f", {change} relative to the simulated quantization {column}"
    return text + "."


def _divergences(name: str, found: Columns, errors: Columns | None) -> list[tuple[str, list[str]]]:
    return [(name, [NONE if value is None else f"{value:.4f}" for value in _four(found)]), *_errors(errors, 4)]


def _errors(found: Columns | None, digits: int) -> list[tuple[str, list[str]]]:
    if found is None:
        return []
    return [(ERROR, ["" if value is None else f"± {value:,.{digits}f}" for value in _four(found)])]


def _four(columns: Columns) -> tuple[float | None, ...]:
    return columns.fp, columns.fp_prefix, columns.quantized, columns.quantized_prefix
