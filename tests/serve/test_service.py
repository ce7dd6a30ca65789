"""The service around the API: limits, keys, hosts, clients that go away, shutdown, health and metrics."""

from __future__ import annotations

import socket
import threading
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cushion_deploy.serve.app import AppSettings
from cushion_deploy.serve.engine import EngineSettings
from cushion_deploy.serve.scheduler import Limits

pytestmark = pytest.mark.parametrize("tiny", ["baked"], indirect=True)
LONG: Any = {"model": "tiny", "prompt": "the", "max_tokens": 85, "temperature": 0, "logit_bias": {"2": -100}}


class Slow:
    """A session that takes its time for every step, so that requests overlap."""

    def __init__(self, session: Any, seconds: float = 0.05) -> None:
        self._session, self._seconds = session, seconds
        self.contract, self.reset, self.truncate = session.contract, session.reset, session.truncate
        self.hold, self.restore, self.gather = session.hold, session.restore, session.gather
        self.close = session.close

    length = property(lambda self: self._session.length)

    def run(self, *args: Any, **more: Any) -> Any:
        sleep(self._seconds)
        return self._session.run(*args, **more)


class OneRow:
    """A session without the operations of a batch."""

    def __init__(self, session: Any) -> None:
        self.contract = session.contract
        self.run, self.reset, self.truncate, self.close = session.run, session.reset, session.truncate, session.close
        self._session = session

    length = property(lambda self: self._session.length)


def test_health_and_readiness(served: Any) -> None:
    assert served.get("/health").json() == {"status": "ok"}
    assert served.get("/ready").json() == {"ready": True}


def test_metrics_count_what_was_done(serve: Any) -> None:
    served = serve()
    client = served.client()
    for _ in range(2):
        client.completions.create(**{**LONG, "prompt": "the quick brown", "max_tokens": 4})
    assert served.idle()
    samples = {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(served.get("/metrics").text)
        for s in family.samples
    }
    prompt = client.completions.create(**{**LONG, "prompt": "the quick brown", "max_tokens": 1}).usage.prompt_tokens
    assert samples[("cushion_prompt_tokens_total",)] == 2 * prompt
    assert samples[("cushion_cached_prompt_tokens_total",)] == prompt - 1
    assert samples[("cushion_generated_tokens_total",)] == 8
    assert samples[("cushion_sequences_finished_total", "length")] == 2
    assert samples[("cushion_time_to_first_token_seconds_count",)] == 2
    assert samples[("cushion_time_per_output_token_seconds_count",)] == 6
    assert samples[("cushion_sequences_running",)] == 0
    assert samples[("cushion_kv_pool_texts",)] >= 1


def test_an_engine_that_cannot_batch_serves_one_request_at_a_time(serve: Any, generator: Any) -> None:
    served = serve(change=OneRow)
    assert not served.engine.batches
    client = served.client()
    got = client.completions.create(model="tiny", prompt=["the", "fox", "the"], max_tokens=6, temperature=0)
    expected = [generator.generate(p, max_new_tokens=6).text for p in ("the", "fox", "the")]
    assert [c.text for c in got.choices] == expected


def test_a_full_queue_is_429_with_retry_after(serve: Any) -> None:
    served = serve(settings=EngineSettings(max_rows=1, limits=Limits(queue=1)), change=Slow)
    client = served.client()
    first = iter(client.completions.create(**LONG, stream=True))
    next(first)
    second = client.completions.create(**LONG, stream=True)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(**LONG)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "queue_full"
    second.close()


def test_a_client_that_goes_away_frees_its_row(serve: Any) -> None:
    served = serve(change=Slow)
    stream = served.client().completions.create(**LONG, stream=True)
    next(iter(stream))
    assert served.engine.scheduler.running == 1
    began = monotonic()
    stream.close()
    assert served.idle(2)
    assert monotonic() - began < 2
    # The same without a stream: 85 steps would take more than 4 seconds.
    with pytest.raises(openai.APITimeoutError):
        served.client(timeout=0.5).completions.create(**LONG)
    assert served.idle(1.5)


def test_a_body_that_is_too_large_or_too_slow_is_refused(serve: Any) -> None:
    served = serve(AppSettings(max_body=1000, body_seconds=0.5))
    body = {**LONG, "prompt": "x" * 2000}
    assert served.post("/v1/completions", json=body).status_code == 413
    chunked = served.post(
        "/v1/completions",
        content=iter([b'{"model": "'] + [b"x" * 500] * 4),
        headers={"content-type": "application/json"},
    )
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "too_large")
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_an_answer_that_takes_too_long_is_cut_off(serve: Any) -> None:
    served = serve(AppSettings(request_seconds=0.4), change=Slow)
    with pytest.raises(openai.InternalServerError) as caught:
        served.client(max_retries=2).completions.create(**LONG)
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    with pytest.raises(openai.APIError, match="longer than the server allows"):
        list(served.client().completions.create(**LONG, stream=True))


def test_a_key_is_required_where_there_is_one(serve: Any) -> None:
    served = serve(AppSettings(api_key="secret"))
    assert served.client(api_key="secret").models.list().data
    with pytest.raises(openai.AuthenticationError) as caught:
        served.client(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    paths = ["/health", "/ready", "/", "/page.js", "/metrics", "/proof", "/v1/models", "/openapi.json"]
    assert [served.get(path).status_code for path in paths] == [200] * 4 + [401] * 4
    assert "secret" not in served.get("/").text


def test_a_page_of_another_host_reaches_nothing(serve: Any) -> None:
    served = serve(AppSettings(hosts=("127.0.0.1",)))
    assert served.get("/v1/models").status_code == 200
    assert served.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421
    assert served.get("/v1/models", headers={"Host": "127.0.0.1.evil.example:80"}).status_code == 421
    answer = served.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_cors_is_only_for_the_origins_that_were_given(serve: Any) -> None:
    served = serve(AppSettings(cors_origins=["http://a.example"]))
    allowed = served.get("/v1/models", headers={"Origin": "http://a.example"})
    assert allowed.headers["access-control-allow-origin"] == "http://a.example"
    assert "access-control-allow-origin" not in served.get("/v1/models", headers={"Origin": "http://b.example"}).headers


def test_shutdown_lets_answers_end(serve: Any, generator: Any) -> None:
    served = serve(change=Slow, drain=30)
    stream = iter(served.client().completions.create(**{**LONG, "max_tokens": 10}, stream=True))
    pieces = [next(stream).choices[0].text]
    served.server.handle_exit(15, None)
    assert not served.engine.ready
    pieces += [chunk.choices[0].text for chunk in stream]
    assert len(pieces) > 2
    served.thread.join(10)
    assert not served.thread.is_alive()


def test_shutdown_cuts_off_what_does_not_end_with_a_reason(serve: Any) -> None:
    served = serve(change=lambda session: Slow(session, 0.2), drain=0.5)
    stream = iter(served.client().completions.create(**LONG, stream=True))
    next(stream)
    caught: list[Exception] = []

    def wait() -> None:
        try:
            served.client().completions.create(**LONG)
        except openai.APIStatusError as e:
            caught.append(e)

    other = threading.Thread(target=wait)
    other.start()
    while served.engine.scheduler.running < 2:
        sleep(0.01)
    served.server.handle_exit(15, None)
    with pytest.raises(openai.APIError, match="shut down"):
        list(stream)
    other.join(10)
    assert [getattr(e, "status_code", None) for e in caught] == [503]
    served.thread.join(10)
    assert not served.thread.is_alive()


def test_a_failure_of_the_engine_is_a_500_and_the_next_request_works(serve: Any) -> None:
    failing = {"now": True}

    class Failing(Slow):
        def run(self, *args: Any, **more: Any) -> Any:
            if failing["now"]:
                raise RuntimeError("broken")
            return self._session.run(*args, **more)

    served = serve(change=Failing)
    with pytest.raises(openai.InternalServerError, match="broken"):
        served.client().completions.create(**LONG)
    failing["now"] = False
    assert served.client().completions.create(**LONG).choices[0].text


def test_an_engine_thread_that_ends_is_seen_and_leaves_nobody_waiting(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(change=Slow)
    stream = iter(served.client().completions.create(**LONG, stream=True))
    next(stream)

    def broken() -> bool:
        raise ValueError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda arguments: None)
        patch.setattr(served.engine.scheduler, "step", broken)
        with pytest.raises(openai.APIError, match="engine has stopped"):
            list(stream)
        served.engine._thread.join(5)
    assert [served.get(path).status_code for path in ("/health", "/ready")] == [503, 503]
    assert served.post("/v1/completions", json=LONG).status_code == 503


def test_more_sequences_than_the_queue_takes_are_refused_for_good(serve: Any) -> None:
    served = serve(settings=EngineSettings(limits=Limits(queue=3)))
    with pytest.raises(openai.BadRequestError, match="queue takes 3"):
        served.client().completions.create(**{**LONG, "n": 4})
