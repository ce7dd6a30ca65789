"""The search removes a planted sink, finds none where there is none, and does what its settings say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix import search
from cushion_deploy.prefix.search import PrefixSearch
from cushion_deploy.prefix.trace import SearchTrace
from cushion_deploy.recipe import Search

Oracle = Callable[..., dict[str, float]]


def config(**changes: Any) -> Search:
    """Return small settings: 48 tokens of text, few candidates."""
    small = {
        "text_tokens": 48,
        "random_candidates": 32,
        "screen_candidates": 16,
        "audit_tokens": 8,
        "average_tokens": 0,
    }
    return Search(**{**small, **changes})


@pytest.mark.parametrize("objective", ["error", "max"])
@pytest.mark.parametrize("start", [0, 150, 300])
def test_a_planted_sink_is_found_and_removed(
    planted_model: TorchRunner, plain_ids: IntArray, plant: Any, oracle: Oracle, objective: Any, start: int
) -> None:
    text = plain_ids[start : start + 48]
    assert oracle(planted_model, (), text)["max"] > plant.massive
    prefix, trace = PrefixSearch(planted_model, text, config(objective=objective), seed=start).run()
    assert 1 <= prefix.length <= 2
    assert trace.steps[0].accepted
    assert trace.steps[0].ratio < 0.2
    assert oracle(planted_model, prefix.token_ids, text)["max"] < plant.massive / 2


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_error_is_that_of_codes_with_the_bits_of_the_recipe(
    planted_model: TorchRunner, plain_ids: IntArray, oracle: Oracle, bits: Any
) -> None:
    text = plain_ids[:48]
    _, trace = PrefixSearch(planted_model, text, config(bits=bits, max_length=1)).run()
    step = trace.steps[0]
    assert step.before == pytest.approx(oracle(planted_model, (), text, bits)["error"], rel=1e-3)
    assert step.best.objective == pytest.approx(
        oracle(planted_model, (step.best.token_id,), text, bits)["error"], rel=1e-3
    )
    assert SearchTrace.from_json(trace.to_json()).bits == bits


def test_an_absorber_removes_the_sink_from_every_text(
    planted_model: TorchRunner, plain_ids: IntArray, plant: Any, oracle: Oracle
) -> None:
    for start in range(0, 500, 100):
        text = plain_ids[start : start + 48]
        assert oracle(planted_model, plant.absorbers[:1], text)["max"] < plant.massive / 2


@pytest.mark.parametrize("mode", ["screen", "exhaustive"])
def test_a_model_without_sink_gets_an_empty_prefix_and_the_words_say_so(
    tiny_model: TorchRunner, plain_ids: IntArray, mode: Any
) -> None:
    prefix, trace = PrefixSearch(tiny_model, plain_ids, config(mode=mode)).run()
    assert (prefix.length, prefix.token_ids, trace.token_ids, trace.tokens) == (0, (), (), ())
    assert "no sink worth a prefix" in trace.stopped
    assert not any(step.accepted for step in trace.steps)
    assert len(trace.steps) == (mode == "exhaustive"), "a screened search sees it before it screens anything"


def test_the_prefix_is_the_models_own_for_the_tokens_found(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    prefix, trace = PrefixSearch(planted_model, plain_ids, config()).run()
    assert prefix.digest == planted_model.compute_prefix(trace.token_ids).digest
    assert trace.tokens == tuple(planted_model.token_text(i) for i in trace.token_ids)


@pytest.mark.parametrize("mode", ["screen", "exhaustive"])
def test_a_seed_decides_everything(planted_model: TorchRunner, plain_ids: IntArray, mode: Any) -> None:
    traces = []
    for seed in (5, 5, 6):
        _, trace = PrefixSearch(planted_model, plain_ids, config(mode=mode, max_length=1), seed=seed).run()
        traces.append({**trace.to_json(), "seconds": 0})
    assert traces[0] == traces[1]
    assert traces[0] != traces[2]


def test_an_exhaustive_search_finds_the_brute_force_best(
    planted_model: TorchRunner, plain_ids: IntArray, oracle: Oracle
) -> None:
    text = plain_ids[:48]
    _, trace = PrefixSearch(planted_model, text, config(mode="exhaustive", max_length=1)).run()
    scores = np.array([oracle(planted_model, (token,), text)["error"] for token in range(320)])
    best = trace.steps[0].best
    assert best.token_id == int(scores.argmin())
    assert best.objective == pytest.approx(scores.min(), rel=1e-3)
    assert trace.steps[0].before == pytest.approx(oracle(planted_model, (), text)["error"], rel=1e-3)
    assert [t.objective for t in trace.steps[0].top] == pytest.approx(sorted(scores)[:20], rel=1e-3)
    assert (trace.steps[0].candidates, trace.steps[0].screen_layers) == (320, 0)


def test_screened_scores_are_exact(planted_model: TorchRunner, plain_ids: IntArray, oracle: Oracle) -> None:
    text = plain_ids[:200]
    _, trace = PrefixSearch(planted_model, text, config(text_tokens=200, max_length=1)).run()
    for scored in trace.steps[0].top[:5]:
        expected = oracle(planted_model, (scored.token_id,), text)["error"]
        assert scored.objective == pytest.approx(expected, rel=1e-3)
    objectives = [s.objective for s in trace.steps[0].top]
    assert objectives == sorted(objectives)
    assert trace.steps[0].best == trace.steps[0].top[0]


def test_the_audit_ranks_the_found_token_among_fresh_ones(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    settings = config(mode="exhaustive", max_length=1, audit_tokens=40)
    _, trace = PrefixSearch(planted_model, plain_ids, settings).run()
    step = trace.steps[0]
    assert (step.audit_rank, step.audit_size) == (1, 40), "nothing beats the best of the whole vocabulary"


def test_a_scan_that_was_interrupted_goes_on_where_it_stopped(
    planted_model: TorchRunner, plain_ids: IntArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SCAN_CHUNK", 64)
    settings = config(mode="exhaustive", max_length=1, audit_tokens=0)
    scored: list[int] = []
    score = search.score_candidates

    def counting(model: Any, past: Any, text: Any, tokens: Any, *rest: Any, **options: Any) -> list[float]:
        scored.extend(tokens)
        return score(model, past, text, tokens, *rest, **options)

    monkeypatch.setattr(search, "score_candidates", counting)
    _, whole = PrefixSearch(planted_model, plain_ids, settings).run()
    assert scored == list(range(320))
    scored.clear()

    def interrupt(task: str, done: int, total: int) -> None:
        if task == "scanning the vocabulary" and done == 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PrefixSearch(planted_model, plain_ids, settings, scratch=tmp_path, progress=interrupt).run()
    assert scored == list(range(128))
    scored.clear()
    _, resumed = PrefixSearch(planted_model, plain_ids, settings, scratch=tmp_path).run()
    assert scored == list(range(128, 320))
    assert [s.best for s in resumed.steps] == [s.best for s in whole.steps]
    assert resumed.positions_scored == whole.positions_scored


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]", b'{"scores": [1, NaN], "seconds": 1}', b'{"scores": "ab"}', b"\xff"]
)
def test_a_damaged_checkpoint_of_a_scan_begins_it_again(
    planted_model: TorchRunner, plain_ids: IntArray, tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(mode="exhaustive", max_length=1, audit_tokens=0, text_tokens=16)
    (tmp_path / "scan-0.json").write_bytes(damage)
    _, found = PrefixSearch(planted_model, plain_ids, settings, scratch=tmp_path).run()
    _, whole = PrefixSearch(planted_model, plain_ids, settings).run()
    assert [s.best for s in found.steps] == [s.best for s in whole.steps]
    assert found.positions_scored == whole.positions_scored
    assert "scan-0.json is damaged, so the scan begins again" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_objective_that_is_no_number_is_refused_by_name(
    planted_model: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def score(model: Any, past: Any, text: Any, tokens: Any, *rest: Any, **options: Any) -> list[float]:
        return [3.0, value, *[1.0] * (len(tokens) - 2)]

    monkeypatch.setattr(search, "score_candidates", score)
    token = planted_model.token_text(1)
    with pytest.raises(UsageError) as e:
        PrefixSearch(planted_model, plain_ids, config(mode="exhaustive", max_length=1)).run()
    assert f"behind token {token!r} (1) is {value}, which cannot be ranked" in e.value.message


def test_the_seconds_of_an_interrupted_scan_add_up(
    planted_model: TorchRunner, plain_ids: IntArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that only scoring moves, by one second a token.
    clock = [0.0]
    score = search.score_candidates

    def slow(model: Any, past: Any, text: Any, tokens: Any, *rest: Any, **options: Any) -> list[float]:
        clock[0] += len(tokens)
        return score(model, past, text, tokens, *rest, **options)

    monkeypatch.setattr(search, "SCAN_CHUNK", 64)
    monkeypatch.setattr(search, "score_candidates", slow)
    monkeypatch.setattr(search.time, "monotonic", lambda: clock[0])

    def stop_at(wanted: int) -> Any:
        def report(task: str, done: int, total: int) -> None:
            if task == "scanning the vocabulary" and done == wanted:
                raise KeyboardInterrupt

        return report

    settings = config(mode="exhaustive", max_length=1, audit_tokens=0)
    for wanted in (128, 192):
        with pytest.raises(KeyboardInterrupt):
            PrefixSearch(planted_model, plain_ids, settings, scratch=tmp_path, progress=stop_at(wanted)).run()
    _, trace = PrefixSearch(planted_model, plain_ids, settings, scratch=tmp_path).run()
    assert trace.seconds == 320


def test_seeds_stand_first_and_count_towards_the_length(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    newline = int(planted_model.encode("\n")[0])
    settings = config(seed_tokens=("\n", "<bos>"), max_length=2)
    prefix, trace = PrefixSearch(planted_model, plain_ids, settings).run()
    assert prefix.token_ids == trace.seed_tokens == (newline, 1)
    assert trace.steps == []
    assert "longest length, 2" in trace.stopped


def test_a_seed_that_absorbs_the_sink_leaves_nothing_to_add(
    planted_model: TorchRunner, plain_ids: IntArray, plant: Any
) -> None:
    text = planted_model.token_text(plant.absorbers[0])
    assert planted_model.encode(text).tolist() == [plant.absorbers[0]], "the absorber can be written as text"
    prefix, trace = PrefixSearch(planted_model, plain_ids, config(seed_tokens=(text,))).run()
    assert prefix.token_ids == plant.absorbers[:1]
    assert "another token would not pay" in trace.stopped


def test_more_seeds_than_the_prefix_may_be_long_are_refused(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    with pytest.raises(UsageError, match=r"3 tokens, more than search.max_length = 2") as e:
        PrefixSearch(tiny_model, plain_ids, config(seed_tokens=("1", "2", "3"), max_length=2))
    assert "fewer seeds" in e.value.hint


@pytest.mark.parametrize("length", [0, 1])
def test_the_prefix_never_grows_beyond_its_longest_length(
    planted_model: TorchRunner, plain_ids: IntArray, length: int
) -> None:
    prefix, trace = PrefixSearch(planted_model, plain_ids, config(max_length=length)).run()
    assert prefix.length == len(trace.steps) == length
    assert f"longest length, {length}" in trace.stopped


def test_tau_decides_what_pays(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    # In a model without sink the best token leaves somewhat less than all of the error: tau = 1 takes it.
    strict, _ = PrefixSearch(tiny_model, plain_ids, config(max_length=1, tau=0.1)).run()
    generous, trace = PrefixSearch(tiny_model, plain_ids, config(max_length=1, tau=1.0)).run()
    assert 0.1 < trace.steps[0].ratio <= 1.0
    assert (strict.length, generous.length) == (0, 1)


def test_a_text_that_is_too_short_is_refused(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    with pytest.raises(UsageError, match="holds 47 tokens, the search needs 48") as e:
        PrefixSearch(tiny_model, plain_ids[:47], config())
    assert "search.text_tokens" in e.value.hint


def test_a_trace_survives_json(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    _, trace = PrefixSearch(planted_model, plain_ids, config(max_length=2)).run()
    again = SearchTrace.from_json(json.loads(json.dumps(trace.to_json(), allow_nan=False)))
    assert again == trace
    assert again.steps[0].ratio == trace.steps[0].ratio


def test_positions_are_counted(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    _, trace = PrefixSearch(tiny_model, plain_ids, config(mode="exhaustive", max_length=1)).run()
    assert trace.positions_scored == 48 + 320 * 49
    assert trace.positions_full_scan == 320 * 49, "a scan takes the token and the text, as it is counted above"


def test_every_step_is_screened_as_deep_as_sinks_form_with_nothing_before_them(
    planted_model: TorchRunner, plain_ids: IntArray
) -> None:
    # Once the sink is taken no token becomes one, so a sample taken then would ask for every layer.
    _, trace = PrefixSearch(planted_model, plain_ids, config(max_length=2)).run()
    assert [step.screen_layers for step in trace.steps] == [2, 2]


def test_without_gradient_candidates_no_gradient_is_taken(
    planted_model: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    take = search.gradient_changes

    def counting(*args: Any, **options: Any) -> Any:
        calls.append("gradient")
        return take(*args, **options)

    monkeypatch.setattr(search, "gradient_changes", counting)
    _, without = PrefixSearch(planted_model, plain_ids, config(max_length=1, gradient_candidates=0)).run()
    assert calls == []
    assert set(without.steps[0].proposed) == {"obvious", "self-sink", "random"}
    _, with_it = PrefixSearch(planted_model, plain_ids, config(max_length=1, gradient_candidates=10)).run()
    assert calls == ["gradient"]
    (step,), (before,) = with_it.steps, without.steps
    assert step.proposed == {**before.proposed, "gradient": 10}, "the other sources propose what they did"
    # Forward and backward over the slot and the text, and an exact score of what the gradient alone proposed.
    added = step.candidates - before.candidates
    assert added > 0
    assert with_it.positions_scored == without.positions_scored + 2 * 49 + added * 49


def test_a_candidate_tells_every_source_that_named_it(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    settings = config(max_length=1, screen_candidates=320, gradient_candidates=320, random_candidates=0)
    (step,) = PrefixSearch(planted_model, plain_ids, settings).run()[1].steps
    assert {t.source for t in step.top} <= {"self-sink + gradient", "obvious + self-sink + gradient"}
    assert step.best.source.endswith("self-sink + gradient")
    assert step.proposed["self-sink"] == step.proposed["gradient"] == step.candidates == 320
    assert step.finalists["self-sink"] == step.finalists["gradient"] == step.exact


def test_a_scan_is_its_own_source(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    (step,) = PrefixSearch(planted_model, plain_ids, config(mode="exhaustive", max_length=1)).run()[1].steps
    assert (step.best.source, step.proposed, step.finalists) == ("scan", {"scan": 320}, {"scan": 320})


def test_a_trace_from_before_sources_were_counted_is_read(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    _, trace = PrefixSearch(planted_model, plain_ids, config(max_length=1)).run()
    data = json.loads(json.dumps(trace.to_json()))
    del data["steps"][0]["proposed"], data["steps"][0]["finalists"]
    (step,) = SearchTrace.from_json(data).steps
    assert (step.proposed, step.best) == ({}, trace.steps[0].best)


def test_the_screen_runs_as_many_tokens_as_the_settings_say(
    planted_model: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    screened: list[np.ndarray] = []
    sizes = search.self_sink_sizes

    def recording(model: Any, past: Any, tokens: np.ndarray, *rest: Any, **options: Any) -> Any:
        screened.append(tokens)
        return sizes(model, past, tokens, *rest, **options)

    monkeypatch.setattr(search, "self_sink_sizes", recording)
    settings = config(max_length=1, screen_tokens=100, random_candidates=0, gradient_candidates=0)
    (step,) = PrefixSearch(planted_model, plain_ids, settings, seed=1).run()[1].steps
    PrefixSearch(planted_model, plain_ids, settings, seed=1).run()
    PrefixSearch(planted_model, plain_ids, settings, seed=2).run()
    assert [len(tokens) for tokens in screened] == [100, 100, 100] == [step.screened] * 3
    assert screened[0].tolist() == screened[1].tolist() != screened[2].tolist()
    proposed = {t.token_id for t in step.top if "self-sink" in t.source}
    assert proposed <= set(screened[0].tolist())
    assert step.proposed["self-sink"] == 16
    (whole,) = PrefixSearch(planted_model, plain_ids, config(max_length=1, screen_tokens=None)).run()[1].steps
    assert whole.screened == 320


def test_only_the_last_rung_runs_every_layer(
    planted_model: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int | None]] = []
    score = search.score_candidates

    def recording(model: Any, past: Any, text: Any, tokens: Any, *rest: Any, **options: Any) -> list[float]:
        calls.append((len(text), options["depth"]))
        return score(model, past, text, tokens, *rest, **options)

    monkeypatch.setattr(search, "score_candidates", recording)
    PrefixSearch(planted_model, plain_ids, config(text_tokens=200, max_length=1)).run()
    # Sinks form within 2 of the 3 layers. The last call is the audit.
    assert calls == [(64, 2), (128, 2), (200, None), (200, None)]


def test_a_trace_from_before_screened_tokens_were_counted_is_read(
    planted_model: TorchRunner, plain_ids: IntArray
) -> None:
    _, trace = PrefixSearch(planted_model, plain_ids, config(max_length=1)).run()
    data = json.loads(json.dumps(trace.to_json()))
    del data["steps"][0]["screened"]
    (step,) = SearchTrace.from_json(data).steps
    assert step.screened == 0
