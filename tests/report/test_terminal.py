"""The summary in a terminal: 80 columns, plain text, nothing that moves the cursor."""

from typing import Any

from cushion_deploy.report import summary_lines
from cushion_deploy.report.document import Report


def test_it_fits_eighty_columns_and_holds_every_part(report: Report) -> None:
    lines = summary_lines(report)
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80
    assert text.startswith("SmolLM2-135M runs in static W8A8 at +9.3 % perplexity over FP with the same prefix;")
    for part in (
        "perplexity 29.60 28.90 63.23 31.60",
        "⏎ (198) <|im_start|> (0)",
        "onnxruntime (cpu): 210 of 210 linears run in INT8",
        "208 of 210 linears are compiled in INT8, attention fused 30 of 30; not run: no NVIDIA GPU on this machine",
        "plans float16: largest value 1,871 of 65,504, where the residual stream reaches 1,871 in layers.11.mlp",
        "All 7 parity checks hold.",
        "search reused",
    ):
        assert part in text


def test_strings_of_the_model_are_neither_markup_nor_escapes(data: dict[str, Any]) -> None:
    data["search"]["tokens"] = ["[bold red]x[/]", "\x1b[2J"]
    data["engines"][1]["note"] = "\x1b]0;title\x07 [link=x]y"
    text = "\n".join(summary_lines(Report.model_validate(data)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold red]x[/] (198)" in " ".join(text.replace("␣", " ").split())
    assert "[link=x]y" in text


def test_very_long_names_do_not_widen_it(data: dict[str, Any]) -> None:
    data["model"]["source"] = "m" * 300
    data["engines"][0]["targets"] = ["t" * 200]
    data["search"]["tokens"][1] = "x" * 300
    assert max(map(len, summary_lines(Report.model_validate(data)))) <= 80


def test_every_failed_check_is_listed_up_to_a_handful(data: dict[str, Any]) -> None:
    row = {"metric": "max", "value": 2.0, "limit": 1.0, "direction": "at most", "passed": False}
    data["parity"] = [{"rung": f"rung {i}", **row} for i in range(8)]
    text = "\n".join(summary_lines(Report.model_validate(data)))
    assert "first on rung 'rung 0'" in " ".join(text.split())
    assert "rung 5: max 2, at most 1" in text
    assert "rung 6" not in text
    assert "and 2 more" in text
