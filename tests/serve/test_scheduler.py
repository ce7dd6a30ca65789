"""The scheduler against `generate`, one text after the other: the same tokens, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cushion_deploy.errors import UsageError
from cushion_deploy.runtime import SamplingParams, generate
from cushion_deploy.serve.job import Job
from cushion_deploy.serve.kv_pool import KvPool
from cushion_deploy.serve.request import Delivery, SequenceRequest
from cushion_deploy.serve.rows import BatchedRows, SingleRow
from cushion_deploy.serve.scheduler import Limits, Refused, Scheduler


class Desk:
    """A scheduler, and what it delivered by sequence."""

    def __init__(self, rows: Any, tokenizer: Any, limits: Limits | None = None) -> None:
        self.scheduler = Scheduler(rows, tokenizer, frozenset({2}), limits)
        self.got: dict[int, list[Delivery]] = {}

    def submit(self, *requests: SequenceRequest) -> list[Job]:
        jobs = self.scheduler.submit(list(requests), lambda i, delivery: collected[i].append(delivery))
        collected = [self.got.setdefault(job.key, []) for job in jobs]
        return jobs

    def run(self) -> None:
        while self.scheduler.step():
            pass

    def tokens(self, job: Job) -> list[int]:
        return [d.token.token_id for d in self.got[job.key] if d.token]

    def text(self, job: Job) -> str:
        return "".join(d.text for d in self.got[job.key])


def request(prompt: list[int], new: int = 12, **more: Any) -> SequenceRequest:
    return SequenceRequest(tuple(prompt), new, **more)


def expected(tiny: Any, tokenizer: Any, r: SequenceRequest) -> tuple[list[int], str, str | None]:
    events = list(
        generate(
            tiny.session(), tokenizer, r.prompt_ids, r.sampling, r.max_new_tokens, stop_ids={2}, stop_strings=r.stop
        )
    )
    return [e.token_id for e in events], "".join(e.text for e in events), events[-1].finish_reason


@pytest.fixture(params=["batched", "pooled", "single"])
def desk(tiny: Any, tokenizer: Any, request: pytest.FixtureRequest) -> Desk:
    session = tiny.session()
    if request.param == "single":
        return Desk(SingleRow(session), tokenizer, Limits(chunk=8))
    pool = KvPool(1 << 22 if request.param == "pooled" else 0)
    return Desk(BatchedRows(session, 3, pool), tokenizer, Limits(chunk=8))


def test_texts_that_arrive_at_any_time_get_the_tokens_of_generate(tiny: Any, tokenizer: Any, desk: Desk) -> None:
    random = np.random.default_rng(3)
    requests = [
        request(
            random.integers(3, 380, random.integers(1, 40)).tolist(),
            int(random.integers(1, 24)),
            sampling=SamplingParams(temperature=float(i % 2), seed=i, repetition_penalty=1.0 + i % 3 / 10),
            stop=("e", "th") if i % 4 == 0 else (),
        )
        for i in range(14)
    ]
    jobs = []
    for r in requests:
        jobs += desk.submit(r)
        for _ in range(int(random.integers(0, 6))):
            desk.scheduler.step()
    desk.run()
    for job, r in zip(jobs, requests, strict=True):
        assert (desk.tokens(job), desk.text(job), desk.got[job.key][-1].end) == expected(tiny, tokenizer, r)
        usage = desk.got[job.key][-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.new_tokens) == (len(r.prompt_ids), len(desk.tokens(job)))


def test_random_conversations_get_the_same_tokens_with_reuse_as_without(tiny: Any, tokenizer: Any) -> None:
    random = np.random.default_rng(4)
    desk = Desk(BatchedRows(tiny.session(), 3, KvPool(120_000)), tokenizer, Limits(chunk=8))
    texts = [random.integers(3, 380, 5).tolist() for _ in range(4)]
    saved = 0
    for _ in range(5):
        requests = [request(text, 4, sampling=SamplingParams(1.0, seed=7)) for text in texts]
        jobs = desk.submit(*requests)
        desk.run()
        for text, job, r in zip(texts, jobs, requests, strict=True):
            assert desk.tokens(job) == expected(tiny, tokenizer, r)[0]
            usage = desk.got[job.key][-1].usage
            assert usage is not None
            saved += usage.cached_tokens
            text += [*desk.tokens(job), *random.integers(3, 380, 3).tolist()]
    assert saved > 100


def test_a_second_turn_pays_only_its_new_tokens(tiny: Any, tokenizer: Any, desk: Desk) -> None:
    (first,) = desk.submit(request([9, 8, 7, 6], 5))
    desk.run()
    (second,) = desk.submit(request([9, 8, 7, 6, *desk.tokens(first), 30, 31], 2))
    desk.run()
    usage = desk.got[second.key][-1].usage
    assert usage is not None
    rows = desk.scheduler.rows
    keeps = not isinstance(rows, BatchedRows) or rows._pool.capacity > 0
    # All that was fed: the last token of the answer was not.
    assert usage.cached_tokens == (4 + len(desk.tokens(first)) - 1 if keeps else 0)


def test_the_choices_of_a_prompt_compute_it_once(tiny: Any, tokenizer: Any) -> None:
    desk = Desk(BatchedRows(tiny.session(), 4, KvPool(1 << 22)), tokenizer, Limits(chunk=8))
    prompt = list(range(10, 40))
    jobs = desk.submit(*[request(prompt, 3, sampling=SamplingParams(1.0, seed=i)) for i in range(4)])
    desk.run()
    usages = [desk.got[job.key][-1].usage for job in jobs]
    assert [usage.cached_tokens for usage in usages if usage] == [0, 29, 29, 29]


def test_a_long_prompt_delays_others_by_one_chunk_at_a_time(tiny: Any, tokenizer: Any) -> None:
    desk = Desk(BatchedRows(tiny.session(), 3, KvPool(0)), tokenizer, Limits(chunk=8))
    (short,) = desk.submit(request([5, 6], 30))
    desk.scheduler.step()
    (long,) = desk.submit(request(list(range(3, 63)), 3))
    while not desk.got[long.key]:
        before = len(desk.got[short.key])
        desk.scheduler.step()
        assert len(desk.got[short.key]) == before + 1
    assert len(desk.got[short.key]) >= 8


def test_short_prompts_share_a_chunk_but_no_more_calls_than_fit_into_its_time(tiny: Any, tokenizer: Any) -> None:
    desk = Desk(BatchedRows(tiny.session(), 9, KvPool(0)), tokenizer, Limits(chunk=128))
    (running,) = desk.submit(request([5, 6], 20))
    desk.scheduler.step()
    jobs = desk.submit(*[request([7 + i, 8, 9], 4) for i in range(6)])
    answered = []
    for _ in range(2):
        before = len(desk.got[running.key])
        desk.scheduler.step()
        assert len(desk.got[running.key]) == before + 1
        answered.append(sum(bool(desk.got[job.key]) for job in jobs))
    assert answered == [4, 6]  # a call counts as at least 32 of 128 tokens
    (longer, other) = desk.submit(request(list(range(3, 63)), 1), request(list(range(3, 53)), 1))
    desk.scheduler.step()
    assert [bool(desk.got[job.key]) for job in (longer, other)] == [True, True]
    desk.run()
    for job in (*jobs, longer, other):
        assert desk.tokens(job) == expected(tiny, tokenizer, job.sequence.request)[0]


def test_a_cancelled_sequence_leaves_at_the_next_step_and_the_others_go_on(tiny: Any, tokenizer: Any) -> None:
    desk = Desk(BatchedRows(tiny.session(), 2, KvPool(0)), tokenizer)
    requests = [request([5, 6, 7], 12), request([8], 12), request([9, 10], 12)]
    a, b, c = desk.submit(*requests)
    desk.scheduler.step()
    desk.scheduler.step()
    assert (desk.scheduler.running, desk.scheduler.waiting) == (2, 1)
    a.cancel()
    desk.scheduler.step()
    assert desk.got[a.key][-1].end == "cancelled"
    assert (desk.scheduler.running, desk.scheduler.waiting) == (2, 0)
    desk.run()
    for job, r in [(b, requests[1]), (c, requests[2])]:
        assert desk.tokens(job) == expected(tiny, tokenizer, r)[0]


def test_a_full_queue_refuses_all_or_nothing(tiny: Any, tokenizer: Any) -> None:
    desk = Desk(SingleRow(tiny.session()), tokenizer, Limits(queue=2))
    desk.submit(request([5]))
    with pytest.raises(Refused, match="at most 2") as caught:
        desk.submit(request([6]), request([7]))
    assert caught.value.retry
    assert desk.scheduler.waiting == 1
    desk.submit(request([6]))
    with pytest.raises(UsageError, match="queue takes 2"):
        desk.submit(*[request([5])] * 3)
    desk.run()


def test_draining_lets_sequences_end_and_cuts_off_those_that_do_not(tiny: Any, tokenizer: Any) -> None:
    desk = Desk(SingleRow(tiny.session()), tokenizer)
    (job,) = desk.submit(request([5], 4))
    desk.scheduler.drain(60)
    with pytest.raises(Refused, match="shutting down"):
        desk.submit(request([6]))
    desk.run()
    assert desk.got[job.key][-1].end == "length"
    desk = Desk(SingleRow(tiny.session()), tokenizer)
    running, waiting = desk.submit(request([5], 40), request([6], 4))
    desk.scheduler.step()
    desk.scheduler.drain(0)
    assert not desk.scheduler.step()
    assert [desk.got[job.key][-1].end for job in (running, waiting)] == ["shutdown"] * 2


def test_a_sequence_that_takes_too_long_is_cut_off(tiny: Any, tokenizer: Any) -> None:
    desk = Desk(SingleRow(tiny.session()), tokenizer)
    (job,) = desk.submit(request([5], 40, timeout=0.0))
    desk.run()
    assert desk.got[job.key][-1].end == "timeout"


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("emptied", [False, True])
def test_an_engine_that_fails_ends_its_batch_and_not_the_server(
    tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, single: bool, emptied: bool
) -> None:
    session = tiny.session()
    desk = Desk(SingleRow(session) if single else BatchedRows(session, 2, KvPool(0)), tokenizer)
    run = session.run

    def fail(*args: Any, **more: Any) -> Any:
        if emptied:
            session.reset()
        raise RuntimeError("out of memory")

    (job,) = desk.submit(request([5, 6, 7], 40))
    desk.scheduler.step()
    monkeypatch.setattr(session, "run", fail)
    desk.run()
    last = desk.got[job.key][-1]
    assert last.end == "error"
    assert "out of memory" in str(last.error)
    monkeypatch.setattr(session, "run", run)
    for r in (request([5, 6, 7, 8], 6), request([6, 7], 6)):
        (job,) = desk.submit(r)
        desk.run()
        assert desk.tokens(job) == expected(tiny, tokenizer, r)[0]


def test_penalties_and_bias_follow_their_definition(tiny: Any, tokenizer: Any) -> None:
    prompt = [5, 6, 7]
    more = {"frequency_penalty": 1.5, "presence_penalty": -0.5, "logit_bias": {50: 1.0}, "top_logprobs": 3}
    desk = Desk(BatchedRows(tiny.session(), 2, KvPool(0)), tokenizer)
    (job,) = desk.submit(request(prompt, 12, **more))
    desk.run()
    new: list[int] = []
    for delivery in desk.got[job.key]:
        raw = tiny.session().run(np.array([prompt + new]), need_logits="last")[0, -1].astype(float)
        logprobs = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
        logits = raw.copy()
        for token in set(new):
            logits[token] -= 1.5 * new.count(token) - 0.5
        logits[50] += 1.0
        assert delivery.token is not None
        assert delivery.token.token_id == int(logits.argmax())
        np.testing.assert_allclose(delivery.token.logprob, logprobs[delivery.token.token_id], atol=1e-3)
        np.testing.assert_allclose([p for _, p in delivery.token.top], sorted(logprobs)[:-4:-1], atol=1e-3)
        new.append(delivery.token.token_id)


class Ending:
    """A grammar that allows every token and is complete behind some of them."""

    def __init__(self, count: int) -> None:
        self._left = count

    def forbid(self, logits: Any) -> Any:
        return logits

    def accept(self, token_id: int) -> bool:
        self._left -= 1
        return self._left == 0


@pytest.mark.parametrize("longest", [5, 12])
def test_a_complete_text_ends_with_what_was_held_back_for_a_stop(
    tiny: Any, tokenizer: Any, desk: Desk, longest: int
) -> None:
    plain = request([5, 6, 7], 5)
    tokens, text, end = expected(tiny, tokenizer, plain)
    assert (end, text[-1:].strip()) == ("length", text[-1:])
    (job,) = desk.submit(request([5, 6, 7], longest, stop=(f"{text[-1]}\0",), constraint=Ending(5)))
    desk.run()
    assert (desk.tokens(job), desk.text(job), desk.got[job.key][-1].end) == (tokens, text, "eos")


def test_an_empty_stop_string_is_refused_at_once(desk: Desk) -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        desk.submit(request([5], stop=("",)))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_each_sequence_ends_once_with_tokens_of_its_own(
    tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = np.random.default_rng(seed)
    session = tiny.session()
    run, failures = session.run, iter(random.random(10_000) < 0.01)

    def unreliable(*args: Any, **more: Any) -> Any:
        if next(failures):
            raise RuntimeError("by chance")
        return run(*args, **more)

    monkeypatch.setattr(session, "run", unreliable)
    desk = Desk(BatchedRows(session, 3, KvPool(200_000)), tokenizer, Limits(chunk=5))
    asked: list[tuple[Job, SequenceRequest]] = []
    texts = [random.integers(3, 380, 25).tolist() for _ in range(3)]
    for _ in range(30):
        text = texts[random.integers(3)][: random.integers(1, 25)] + random.integers(3, 380, 2).tolist()
        r = request(text, int(random.integers(1, 12)), timeout=None if random.random() < 0.9 else 0.0)
        asked += [(job, r) for job in desk.submit(r)]
        for _ in range(int(random.integers(0, 4))):
            desk.scheduler.step()
        if random.random() < 0.3:
            asked[random.integers(len(asked))][0].cancel()
    desk.run()
    assert (desk.scheduler.running, desk.scheduler.waiting) == (0, 0)
    ends = set()
    for job, r in asked:
        assert [d.end is not None for d in desk.got[job.key]] == [False] * (len(desk.got[job.key]) - 1) + [True]
        ends.add(desk.got[job.key][-1].end)
        whole = expected(tiny, tokenizer, r)
        tokens = desk.tokens(job)
        assert tokens == whole[0][: len(tokens)]
        if desk.got[job.key][-1].end in ("eos", "length"):
            assert (tokens, desk.text(job)) == whole[:2]
    assert {"length", "cancelled", "timeout", "error"} <= ends
