"""The sentences of the report, against numbers worked out by hand."""

from typing import Any

import pytest

from cushion_deploy.report.document import Report
from cushion_deploy.report.document.prefix import Choice
from cushion_deploy.report.page import report_page
from cushion_deploy.report.render.html import render_html
from cushion_deploy.report.scores import chat_rows, engine_perplexity_sentence, perplexity_rows
from cushion_deploy.report.sections import tuning
from cushion_deploy.report.statements import (
    averaging_sentence,
    cache_sentence,
    choice_sentence,
    engines_sentence,
    found_prefix,
    fused_attention_sentence,
    has_prefix,
    magnitude_sentence,
    not_run_reason,
    parity_sentence,
    prefix_sentence,
    tuning_sentence,
    verdict,
)
from cushion_deploy.report.terminal import summary_lines


def _fail(data: dict[str, Any], index: int, value: float, site: str | None = None) -> None:
    data["parity"][index].update(value=value, passed=False, site=site)


def test_the_verdict_compares_each_quantized_column_with_its_own_reference(report: Report) -> None:
    # 31.6 / 28.9 = 1.09343; 63.23 / 29.60 = 2.13615
    outcome = verdict(report)
    assert outcome.sentence == (
        "SmolLM2-135M runs in static W8A8 at +9.3 % perplexity over FP with the same prefix; "
        "without the prefix it would be +114 %."
    )
    assert outcome.status == "passed"


def test_a_quantized_model_may_be_better_than_its_reference(data: dict[str, Any]) -> None:
    data["perplexity"]["quantized_prefix"] = 28.4665  # 0.985 of 28.90
    assert "at −1.5 % perplexity relative to FP with the same prefix" in verdict(Report.model_validate(data)).sentence


def test_a_failed_check_comes_before_every_good_number(data: dict[str, Any]) -> None:
    _fail(data, 2, 0.99, "layers.3.mlp.down")
    _fail(data, 6, 0.5)
    outcome = verdict(Report.model_validate(data))
    assert outcome.status == "failed"
    assert outcome.sentence.startswith("Do not ship: 2 of 7 parity checks fail at layers.3.mlp.down. ")


@pytest.mark.parametrize(
    ("section", "value"), [("parity", []), ("engines", []), ("perplexity", None)], ids=lambda x: str(x)
)
def test_missing_proof_is_never_a_pass(data: dict[str, Any], section: str, value: Any) -> None:
    data[section] = value
    assert verdict(Report.model_validate(data)).status == "incomplete"


def test_a_compiled_engine_alone_does_not_make_the_model_run(data: dict[str, Any]) -> None:
    data["engines"] = data["engines"][1:]
    report = Report.model_validate(data)
    assert verdict(report).status == "incomplete"
    assert "not run by any engine on this machine" in verdict(report).sentence
    assert "runs in static" not in verdict(report).sentence
    assert engines_sentence(report) == "tensorrt-rtx was compiled but not run here."
    assert not_run_reason(report.engines[0]) == "not run: no NVIDIA GPU on this machine"


def test_the_choice_is_said_with_both_numbers_and_what_decided(data: dict[str, Any]) -> None:
    report = Report.model_validate(data)
    assert has_prefix(report)
    said = choice_sentence(report.choice)
    for words in (
        "ships with prefix",
        "1,912 predictions of text",
        "and on 256 of answers in chats",
        "0.0116 in answers",
        "its divergence on",
        "0.0195",
        "0.0161",
        "17.06",
    ):
        assert words in said
    data["choice"] |= {"shipped": "without prefix", "reason": "perplexity"}
    report = Report.model_validate(data)
    assert found_prefix(report)
    assert not has_prefix(report)
    assert "its perplexity, because the divergences are too close" in choice_sentence(report.choice)
    assert "ships without a prefix" in prefix_sentence(report)
    sentence = verdict(report).sentence
    assert "it ships without a prefix, which does not pay" in sentence
    # What ships is the third column: 63.23 / 29.60 = 2.13615.
    assert "+114 % perplexity over FP" in sentence
    engine = engine_perplexity_sentence(report.perplexity, prefix=False)
    change = report.perplexity.engine / report.perplexity.quantized - 1
    assert f"{abs(change) * 100:.2g}" in engine
    assert "without the prefix" in engine
    told = " ".join(" ".join(summary_lines(report)).split())
    assert choice_sentence(report.choice) in told
    nothing = Choice(shipped="with prefix", reason="only")
    assert choice_sentence(nothing) == ""


def test_an_empty_prefix_is_a_result_and_is_said_in_words(data: dict[str, Any]) -> None:
    data["search"].update(token_ids=[], tokens=[], rank_in_random_sample=[])
    data["perplexity"].update(fp=20.0, fp_prefix=20.0, quantized=20.5, quantized_prefix=20.5)
    report = Report.model_validate(data)
    assert verdict(report).sentence == (
        "SmolLM2-135M runs in static W8A8 at +2.5 % perplexity over FP; "
        "no prefix was needed: the search found no attention sink that justifies one."
    )
    assert prefix_sentence(report).startswith("No prefix was needed.")


def test_a_prefix_that_precedes_every_text_anyway_is_not_compared_with_itself(data: dict[str, Any]) -> None:
    data["search"].update(token_ids=[2], tokens=["<bos>"])
    data["perplexity"].update(fp=20.0, fp_prefix=20.0, quantized=20.36, quantized_prefix=20.36)
    data["magnitudes"]["with"] = data["magnitudes"]["without"]
    report = Report.model_validate(data)
    assert verdict(report).sentence == (
        "SmolLM2-135M runs in static W8A8 at +1.8 % perplexity over FP; its prefix, <bos>, precedes every text anyway."
    )
    assert report.magnitudes is not None
    assert magnitude_sentence(report.magnitudes) == (
        "The largest activation is 24,782, in layer 20, with and without the prefix."
    )


def test_a_prefix_that_changes_nothing_to_be_seen_says_so(data: dict[str, Any]) -> None:
    data["perplexity"].update(fp=20.0, fp_prefix=19.0, quantized=20.36, quantized_prefix=19.342)
    sentence = verdict(Report.model_validate(data)).sentence
    assert "at +1.8 % perplexity over FP with the same prefix; without the prefix it would be as much" in sentence


def test_an_averaged_first_position_is_told_with_both_divergences(data: dict[str, Any]) -> None:
    mean = "the mean over 512 tokens, 128 of them the one that every chat begins with, each as the first one"
    report = Report.model_validate(data)
    assert f"Tuning began with {mean}." in prefix_sentence(report)
    told = " ".join(" ".join(summary_lines(report)).split())
    assert "trained from the mean of 512 first tokens, in place of" in told
    data["tuning"] = None
    report = Report.model_validate(data)
    assert report.search is not None
    assert report.search.averaging is not None
    assert f"Those at the first position are {mean}." in prefix_sentence(report)
    sentence = averaging_sentence(report.search.averaging)
    assert "was kept" in sentence
    assert "0.0047 nats per token instead of 0.0106" in sentence
    told = " ".join(" ".join(summary_lines(report)).split())
    assert "prefix the mean of 512 first tokens, in place of" in told
    data["search"]["averaging"]["kept"] = False
    report = Report.model_validate(data)
    assert "mean" not in prefix_sentence(report)
    assert "in place of" not in " ".join(summary_lines(report))


def test_no_search_is_not_told_as_no_need(data: dict[str, Any]) -> None:
    data["search"] = None
    report = Report.model_validate(data)
    assert "it was built without a prefix" in verdict(report).sentence
    assert "needed" not in verdict(report).sentence + prefix_sentence(report)


def test_a_collapse_to_no_number_is_said(data: dict[str, Any]) -> None:
    data["perplexity"]["quantized"] = None
    assert "without the prefix no finite perplexity was measured" in verdict(Report.model_validate(data)).sentence


def test_the_four_columns_carry_both_deltas(report: Report) -> None:
    assert report.perplexity is not None
    assert perplexity_rows(report.perplexity) == [
        ("perplexity", ["29.60", "28.90", "63.23", "31.60"]),
        ("standard error", ["± 0.50", "± 0.49", "± 1.25", "± 0.52"]),
        ("vs. FP", ["", "−2.4 %", "+114 %", "+6.8 %"]),
        ("vs. FP + prefix", ["+2.4 %", "", "+119 %", "+9.3 %"]),
        ("KL from FP, nats/token", ["0.0000", "0.0310", "0.9200", "0.0680"]),
        ("standard error", ["± 0.0000", "± 0.0020", "± 0.0300", "± 0.0041"]),
        ("KL from position 16 on", ["0.0000", "0.0107", "0.9500", "0.0512"]),
        ("standard error", ["± 0.0000", "± 0.0010", "± 0.0310", "± 0.0030"]),
    ]
    assert engine_perplexity_sentence(report.perplexity).startswith(
        "The compiled engine measures 31.62 ± 0.53, +0.06 %"
    )


def test_terminal_and_page_show_the_later_divergence_and_the_noise(report: Report) -> None:
    page = render_html(report_page(report, {}))
    for text in ("KL from position 16 on", "0.0512", "± 0.0030", "± 0.52"):
        assert text in page
        assert text in "\n".join(summary_lines(report))
    assert "treat tokens as independent" in page


def test_chats_have_rows_of_their_own(report: Report) -> None:
    assert chat_rows(report.chat) == [
        ("KL, answers in chats", ["0.0000", "0.0099", "0.4000", "0.0330"]),
        ("standard error", ["± 0.0000", "± 0.0011", "± 0.0200", "± 0.0044"]),
        ("  their prompts", ["0.0000", "0.0210", "0.5000", "0.0440"]),
        ("standard error", ["± 0.0000", "± 0.0030", "± 0.0200", "± 0.0055"]),
    ]
    page = render_html(report_page(report, {}))
    for text in ("KL, answers in chats", "± 0.0055", "0.0330"):
        assert text in page
        assert text in "\n".join(summary_lines(report))
    assert "Chats are 16 prompts of 63 tokens" in page
    assert "with what the original model answers in 32 tokens" in page


def test_why_no_chat_was_measured_is_said(data: dict[str, Any]) -> None:
    data["chat"] = {"prompts": 0, "tokens": 0, "missing": "the model has no chat template"}
    report = Report.model_validate(data)
    assert chat_rows(report.chat) == []
    for text in (render_html(report_page(report, {})), " ".join(" ".join(summary_lines(report)).split())):
        assert "Chats were not measured: the model has no chat template." in text
    data["chat"] = None
    assert "Chats" not in render_html(report_page(Report.model_validate(data), {}))


def test_a_part_of_a_text_is_said_beside_every_result(data: dict[str, Any]) -> None:
    whole = Report.model_validate(data)
    # 128 windows of 512 are 65,536 tokens, and the 364 that remain are no window.
    assert "first" not in verdict(whole).sentence
    text = " ".join(" ".join(summary_lines(whole)).split())
    assert "text WikiText-2 validation (head): all 65,900 tokens, in windows of 512" in text
    data["perplexity"]["text_tokens"] = 70_001
    part = Report.model_validate(data)
    assert verdict(part).sentence.endswith("it would be +114 % (first 65,536 of 70,001 tokens).")
    text = "WikiText-2 validation (head): first 65,536 of 70,001 tokens, in windows of 512"
    assert text in " ".join(" ".join(summary_lines(part)).split())
    assert f"Measured on {text}; calibration did not use this text." in render_html(report_page(part, {}))
    data["perplexity"]["quantized"] = None
    assert "(first 65,536 of 70,001 tokens); without the prefix" in verdict(Report.model_validate(data)).sentence
    data["search"] = None
    assert "(first 65,536 of 70,001 tokens); it was built" in verdict(Report.model_validate(data)).sentence


def test_windows_too_short_for_a_later_divergence_are_said(data: dict[str, Any]) -> None:
    empty = dict.fromkeys(("fp", "fp_prefix", "quantized", "quantized_prefix"))
    data["perplexity"] |= {"window": 17, "kl_after_16": empty, "kl_after_16_stderr": empty}
    report = Report.model_validate(data)
    assert report.perplexity is not None
    assert "KL from position 16 on" not in dict(perplexity_rows(report.perplexity))
    for text in (render_html(report_page(report, {})), " ".join(" ".join(summary_lines(report)).split())):
        assert "windows of 17 tokens have no prediction there; set evaluation.window to at least 18" in text


def test_a_report_of_an_earlier_version_is_read_and_shown(data: dict[str, Any]) -> None:
    data["chat"] = None
    new = ("text_tokens", "stderr", "engine_stderr", "divergence_stderr", "kl_after_16", "kl_after_16_stderr")
    data["perplexity"] = {name: value for name, value in data["perplexity"].items() if name not in new}
    report = Report.model_validate(data)
    assert report.perplexity is not None
    assert [name for name, _ in perplexity_rows(report.perplexity)][-1] == "KL from FP, nats/token"
    assert "±" not in "".join(summary_lines(report))
    assert "no prediction" not in render_html(report_page(report, {}))


def test_the_first_diverging_site_is_named(data: dict[str, Any]) -> None:
    _fail(data, 0, 0.0031)
    _fail(data, 2, 0.99, "layers.3.mlp.down")
    assert parity_sentence(Report.model_validate(data)) == (
        "2 of 7 parity checks fail, first on rung 'float ONNX against torch': "
        "max |Δlogit| 0.0031, at most 0.002. First diverging Site: layers.3.mlp.down."
    )


def test_an_unclimbed_ladder_proves_nothing(data: dict[str, Any]) -> None:
    data["parity"] = []
    assert "was not run" in parity_sentence(Report.model_validate(data))


def test_what_tuning_brought_is_told(data: dict[str, Any]) -> None:
    report = Report.model_validate(data)
    assert report.tuning is not None
    assert tuning_sentence(report.tuning) == (
        "80 steps of tuning keys, values and activation scales (1 skipped because a gradient was not finite) "
        "changed the quantized model's divergence from the original model on held-out text from 0.0905 to 0.0752 "
        "nats per token; the state after step 80 was kept."
    )


def test_a_tuning_that_brought_nothing_says_so(data: dict[str, Any]) -> None:
    data["tuning"] |= {"kept_step": 0, "skipped": 0, "loss": "ce", "scales_tuned": False}
    data["tuning"]["states"][1]["held_out"] = None
    report = Report.model_validate(data)
    assert report.tuning is not None
    assert tuning_sentence(report.tuning) == (
        "80 steps of tuning keys and values did not lower the cross-entropy on held-out text, so the untuned prefix "
        "was kept."
    )


@pytest.fixture
def invisible(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data of a report whose prefix was tuned to be invisible."""
    losses = ((0.0216, 0.0197, 0.0121, 1.0), (0.0151, 0.0134, 0.0067, 1.02), (0.0139, 0.0120, 0.0052, 0.998))
    names = ("held_out", "whole", "later", "held_out_error")
    for state, values in zip(data["tuning"]["states"], losses, strict=True):
        state |= dict(zip(names, values, strict=True))
    data["tuning"] |= {"loss": "invisible", "scales_tuned": False, "skipped": 0}
    return data


def test_what_an_invisible_prefix_changes_is_told(invisible: dict[str, Any]) -> None:
    report = Report.model_validate(invisible)
    assert report.tuning is not None
    assert tuning_sentence(report.tuning) == (
        "80 steps of tuning keys and values changed the unquantized model's divergence from the original model on "
        "held-out text from 0.0197 to 0.0120 nats per token (beyond its first 16 positions from 0.0121 to 0.0052); "
        "the state after step 80 was kept, with 1.00 times the quantization error; smoothing and scales were measured "
        "again behind it."
    )
    shown = "".join(map(str, tuning(report)))
    for value in ("0.0134", "0.0067", "1.020", "from position 16 on"):
        assert value in shown


def test_an_invisible_prefix_that_costs_too_much_says_so(invisible: dict[str, Any]) -> None:
    invisible["tuning"]["kept_step"] = 0
    report = Report.model_validate(invisible)
    assert report.tuning is not None
    assert tuning_sentence(report.tuning).endswith(
        "did not lower the divergence from the original model on held-out text without a larger quantization error, so "
        "the untuned prefix was kept."
    )


def test_windows_within_the_first_positions_have_nothing_beyond_them(invisible: dict[str, Any]) -> None:
    for state in invisible["tuning"]["states"]:
        state |= {"later": None, "held_out_error": None}
    report = Report.model_validate(invisible)
    assert report.tuning is not None
    assert "from 0.0197 to 0.0120 nats per token; the state after step 80 was kept; smooth" in tuning_sentence(
        report.tuning
    )


def _with_cache(data: dict[str, Any], **changes: Any) -> Report:
    cache = {
        "scales": "per-head",
        "with_prefix": False,
        "bytes_a_token": 11520,
        "float32_bytes_a_token": 46080,
        "float_perplexity": 31.2,
        "float_stderr": 0.48,
        **changes,
    }
    return Report.model_validate({**data, "kv_cache": cache})


def test_an_int8_cache_states_its_cost_and_its_size(data: dict[str, Any]) -> None:
    assert cache_sentence(Report.model_validate(data)) == ""
    # 31.6 / 31.2 = 1.01282
    assert cache_sentence(_with_cache(data)) == (
        "INT8, one scale per head, the prefix in floating point: perplexity 31.20 ± 0.48 with a floating-point cache, "
        "31.60 ± 0.52 with this one (+1.3 %); 11.5 kB per token, compared with 46.1 kB in float32."
    )
    other = cache_sentence(_with_cache(data, scales="per-tensor", with_prefix=True, float_perplexity=None))
    assert other.startswith("INT8, one scale per tensor, the prefix quantized too: perplexity — with")
    assert "%" not in other


def test_attention_that_an_int8_cache_leaves_unfused_is_stated(data: dict[str, Any]) -> None:
    report = _with_cache(data)
    onnx, plan = report.engines
    assert fused_attention_sentence(report, onnx) == ""
    assert (
        fused_attention_sentence(report, plan) == "All 30 attention layers are fused kernels, also with the INT8 cache."
    )
    data["engines"][1]["fused_attention"] = 28
    report = _with_cache(data)
    assert fused_attention_sentence(report, report.engines[1]).startswith(
        "28 of 30 attention layers are fused kernels with"
    )
    floating = Report.model_validate(data)
    assert fused_attention_sentence(floating, floating.engines[1]) == ""


def test_terminal_and_page_show_the_cache(data: dict[str, Any]) -> None:
    report = _with_cache(data)
    lines = " ".join(" ".join(summary_lines(report)).split())
    assert "cache INT8, one scale per head, the prefix in floating point: perplexity 31.20" in lines
    assert "All 30 attention layers are fused kernels" in lines
    page = render_html(report_page(report, {}))
    assert "The key/value cache is INT8, one scale per head" in page
    assert "All 30 attention layers are fused kernels, also with the INT8 cache." in page
    assert "key/value cache is INT8" not in render_html(report_page(Report.model_validate(data), {}))


def test_an_engine_that_could_not_be_compared_is_said_beside_the_checks(data: dict[str, Any]) -> None:
    data["unchecked"] = ["tensorrt-rtx was not run: the context is longer than 256"]
    report = Report.model_validate(data)
    assert parity_sentence(report).endswith("Not checked: tensorrt-rtx was not run: the context is longer than 256.")
    assert "Not checked" in render_html(report_page(report, {}))
