"""Requests that schemathesis derives from the server's own OpenAPI page, sound and unsound."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of graphql, which is not used here
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis needs Python 3.11")
    checks = pytest.importorskip("schemathesis.checks")

pytestmark = pytest.mark.parametrize("tiny", ["baked"], indirect=True)
checks.load_all_checks()
CHECKS = [
    checks.CHECKS.get_one(name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
    )
]
SOUND, UNSOUND = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
KINDS = [
    ("POST", "/v1/completions", SOUND),
    ("POST", "/v1/completions", UNSOUND),
    ("POST", "/v1/chat/completions", SOUND),
    ("POST", "/v1/chat/completions", UNSOUND),
    ("GET", "/v1/models/{name}", SOUND),
]


def few(body: Any) -> Any:
    """Ask for few tokens, so that no time is spent on answers; what a field means is tested elsewhere."""
    if isinstance(body, dict) and body.get("max_tokens", 9) == 9 and "max_completion_tokens" not in body:
        body["max_tokens"] = 2
    return body


@pytest.mark.parametrize(("method", "path", "mode"), KINDS)
def test_every_answer_is_one_that_the_page_documents(served: Any, method: str, path: str, mode: Any) -> None:
    operation = schemathesis.openapi.from_url(f"{served.url}/openapi.json")[path][method]

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def sent(case: Any) -> None:
        if mode is SOUND:
            case.body = few(case.body)
        response = case.call(base_url=served.url, timeout=60)
        case.validate_response(response, checks=CHECKS)
        assert response.status_code < 500

    sent()


def test_the_page_names_the_model_and_no_status_that_is_never_sent(served: Any) -> None:
    page = served.get("/openapi.json").json()
    for name in ("ChatRequest", "CompletionRequest"):
        assert page["components"]["schemas"][name]["properties"]["model"]["enum"] == ["tiny"]
    statuses = {status for path in page["paths"].values() for op in path.values() for status in op["responses"]}
    assert statuses == {"200", "4XX", "503", "5XX"}
