"""The model card of a bundle, read with huggingface_hub's own parser and checked by its own validation."""

from __future__ import annotations

from typing import Any

import pytest
from fake_hub import fake_hub
from huggingface_hub import ModelCard, repocard

from cushion_deploy.core.origin import Origin
from cushion_deploy.modeling.origin import origin_of_card
from cushion_deploy.report.card import model_card

ORIGIN = Origin("org/name", "other", "The 'Llama' licence: \"4\" — # é", "https://x.org/l?a=1#b", ("en", "no"))


def test_the_hub_reads_what_the_report_and_the_origin_say(report: Any) -> None:
    card = ModelCard(model_card(report, ORIGIN), ignore_metadata_errors=False)
    data = card.data
    assert (data.base_model, data.license, data.license_name) == ("org/name", "other", ORIGIN.license_name)
    assert (data.license_link, data.language) == (ORIGIN.license_link, ["en", "no"])
    assert (data.library_name, data.pipeline_tag) == ("cushion-deploy", "text-generation")
    assert {"onnx", "int8", report.precision} <= set(data.tags)
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values["perplexity of the engine"] == pytest.approx(report.perplexity.engine, abs=1e-4)
    assert values["perplexity of the original model"] == pytest.approx(report.perplexity.fp, abs=1e-4)
    assert all(result.metric_type == "perplexity" for result in data.eval_results)


def test_the_hubs_validation_accepts_it(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = model_card(report, ORIGIN)
    with fake_hub() as hub:
        monkeypatch.setattr(repocard.constants, "ENDPOINT", hub.url)
        ModelCard(text).validate(repo_type="model")
        assert len(hub.cards) == 1
        with pytest.raises(ValueError, match="message"):
            ModelCard.validate(type("Broken", (), {"__str__": lambda _: "---\na: [\n---\n"})(), repo_type="model")  # type: ignore[arg-type]


def test_a_card_without_an_origin_claims_none(report: Any) -> None:
    data = ModelCard(model_card(report, Origin()), ignore_metadata_errors=False).data.to_dict()
    assert not {"license", "license_name", "license_link", "base_model", "base_model_relation", "language"} & set(data)
    assert origin_of_card(model_card(report, ORIGIN)) == ORIGIN


def test_the_text_has_the_verdict_and_no_place_for_markup(report: Any) -> None:
    hostile = report.model_copy(
        update={"model": report.model.model_copy(update={"source": "/home/me/<img src=x>|`a`"})}
    )
    text = model_card(hostile, Origin())
    assert "/home/me" not in text
    assert "<img" not in text.partition("\n---\n")[2].replace("\\<", "")
    assert "parity check" in text
