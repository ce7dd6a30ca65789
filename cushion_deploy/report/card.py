"""The model card of a bundle: `README.md` with the YAML front matter of the Hugging Face hub."""

from __future__ import annotations

import json
from typing import Any

from cushion_deploy.core.origin import Origin
from cushion_deploy.printable import one_line
from cushion_deploy.report import sections, statements
from cushion_deploy.report.document import Report
from cushion_deploy.report.render.elements import Page, Paragraph, Preformatted, Section, Span, Text
from cushion_deploy.report.render.formatting import model_name
from cushion_deploy.report.render.markdown import render_markdown
from cushion_deploy.report.scores import text_words

CARD_NAME = "README.md"
_PYTHON = """from cushion_deploy.runtime import load

generator = load("FOLDER")
print(generator.generate("The capital of France is", max_new_tokens=16).text)"""


def model_card(report: Report, origin: Origin) -> str:
    """Return the text of a model card: front matter, the verdict, how to run the bundle, and what was measured.

    Args:
        report: the report of the bundle; all numbers come from it.
        origin: name and licence of the original model, which the card repeats.
    """
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in _metadata(report, origin).items()]
    # JSON is YAML, so strings of any content stay strings.
    return "\n".join(["---", *lines, "---", "", render_markdown(_page(report, origin))])


def _metadata(report: Report, origin: Origin) -> dict[str, Any]:
    engines = sorted({engine.engine.partition("-")[0] for engine in report.engines})
    found: dict[str, Any] = {
        "library_name": "cushion-deploy",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", *engines, "int8", one_line(report.precision).lower(), "cushioncache"],
    }
    stated = {
        "license": origin.license,
        "license_name": origin.license_name,
        "license_link": origin.license_link,
        "language": list(origin.languages),
        "base_model": origin.base_model,
        "base_model_relation": "quantized" if origin.base_model else None,
    }
    found |= {name: value for name, value in stated.items() if value}
    if results := _results(report):
        found["model-index"] = [{"name": f"{model_name(report.model.source)} {_precision(report)}", "results": results}]
    return found


def _results(report: Report) -> list[dict[str, Any]]:
    measured = report.perplexity
    if measured is None:
        return []
    values = {"perplexity of the engine": measured.engine, "perplexity of the original model": measured.fp}
    metrics = [
        {"type": "perplexity", "name": name, "value": round(value, 4)} for name, value in values.items() if value
    ]
    dataset = {"type": "text", "name": text_words(measured)}
    task = {"type": "text-generation", "name": "Text generation"}
    return [{"task": task, "dataset": dataset, "metrics": metrics}] if metrics else []


def _page(report: Report, origin: Origin) -> Page:
    name = f"{model_name(report.model.source)} in static {_precision(report)}"
    measured = (
        *sections.perplexity(report, {}),
        Paragraph(statements.prefix_sentence(report)),
        Paragraph(statements.parity_sentence(report)),
        Paragraph(statements.engines_sentence(report)),
    )
    return Page(
        title=name,
        eyebrow=statements.verdict(report).sentence,
        headline=name,
        introduction=(_origin_sentence(origin),),
        facts=(),
        sections=(Section("use", "Use", _use()), Section("measured", "Measured", measured)),
        footer=f"Built with cushion-deploy {report.tool.version}; all numbers are from report/report.json.",
    )


def _use() -> tuple[Paragraph | Preformatted, ...]:
    commands = (
        "pip install 'cushion-deploy[cpu,chat,hub]'",
        "cushion-deploy verify FOLDER    # or ORG/NAME, the name of this repository",
        "cushion-deploy chat FOLDER",
    )
    every: Text = (
        "The prefix is inside the graph or in ",
        Span("prefix.safetensors", "code"),
        "; every file but this one is compared with ",
        Span("cushion.json", "code"),
        " before it is used.",
    )
    return Preformatted("\n".join(commands), "sh"), Preformatted(_PYTHON, "python"), Paragraph(every)


def _origin_sentence(origin: Origin) -> str:
    base = f"A quantized version of {origin.base_model}." if origin.base_model else "The original model is not named."
    words = origin.license_name or origin.license
    return f"{base} Licence of the original model: {words}." if words else f"{base} Its licence is not stated."


def _precision(report: Report) -> str:
    return one_line(report.precision).upper()
