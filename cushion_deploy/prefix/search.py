"""Greedy prefix search, Algorithm 1 of the paper: append the token that minimizes L_q while it still helps."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix import floor
from cushion_deploy.prefix.average import average_first_position, first_tokens, positions_averaged
from cushion_deploy.prefix.candidates import Candidates, count_sources, gather_candidates, largest
from cushion_deploy.prefix.gradient import gradient_changes, mean_embedding, positions_run
from cushion_deploy.prefix.objective import score_candidates, score_prefix
from cushion_deploy.prefix.screen import self_sink_sizes, sink_depth, tokens_to_screen
from cushion_deploy.prefix.seeds import seed_ids
from cushion_deploy.prefix.trace import ScoredToken, SearchStep, SearchTrace
from cushion_deploy.recipe import Search
from cushion_deploy.store import replace_file

logger = logging.getLogger(__name__)

RUNGS = (64, 128)
"""Text lengths of successive halving before the whole text. These rungs run as many layers as the screen."""
KEEP = (0.15, 0.25)
"""Share of the candidates that each of those rungs keeps."""
FINALISTS = 12
"""The fewest candidates that are scored on the whole text."""
SCAN_CHUNK = 512
"""Tokens between two checkpoints of an exhaustive scan."""


@dataclass(frozen=True)
class Skipped:
    """A step that was not run, because what remains without the sinks of the text, ``floor``, is too much."""

    floor: float


@dataclass
class PrefixSearch:
    """One search and the state that its steps share.

    Attributes:
        model: the model to find a prefix for.
        corpus: token ids int64 ``[n]`` that texts are drawn from.
        config: settings of the search (m, tau, n, objective, mode, numbers of candidates).
        seed: seed of every random choice.
        scratch: folder for the checkpoints of an exhaustive scan; None for no checkpoints.
        progress: where to report progress.
        trace: the steps so far.
    """

    model: TorchRunner
    corpus: IntArray
    config: Search
    seed: int = 0
    scratch: Path | None = None
    progress: Progress = silent
    trace: SearchTrace = field(init=False)

    def __post_init__(self) -> None:
        n = self.config.text_tokens
        if len(self.corpus) < n:
            raise UsageError(
                f"the calibration text holds {len(self.corpus)} tokens, the search needs {n}",
                hint="give more text, or lower search.text_tokens",
            )
        self.trace = SearchTrace(self.config.mode, self.config.objective, self._seed_ids(), bits=self.config.bits)

    def run(self) -> tuple[Prefix, SearchTrace]:
        """Return the prefix, which may be empty, and the trace."""
        begin = time.monotonic()
        ids, trace = self.trace.seed_tokens, self.trace
        trace.stopped = f"the prefix reached its longest length, {self.config.max_length}"
        for number in range(max(0, self.config.max_length - len(ids))):
            step = self._step(ids, number)
            if isinstance(step, Skipped):
                trace.stopped = self._why_skipped(step, ids)
                break
            trace.steps.append(step)
            if not step.accepted:
                trace.stopped = self._why_stopped(step, ids)
                break
            ids = (*ids, step.best.token_id)
        trace.token_ids, trace.tokens = ids, tuple(self.model.token_text(i) for i in ids)
        prefix = self._averaged(self.model.compute_prefix(ids))
        trace.seconds += time.monotonic() - begin
        return prefix, trace

    def _averaged(self, found: Prefix) -> Prefix:
        """Return the prefix with the averaged sink at its first position, if the recipe wants it and it is better.

        Seeds stay as they are: the recipe, or the family of the model, begins every text with them.
        """
        if not found.length or self.trace.seed_tokens or not self.config.average_tokens:
            return found
        tokens = first_tokens(self.model, self.corpus, self.config, self.seed)
        self._count(positions_averaged(self.model, found, self.corpus, tokens), 1)
        prefix, self.trace.averaging = average_first_position(
            self.model,
            found,
            self.corpus,
            tokens,
            objective=self.config.objective,
            bits=self.config.bits,
            progress=self.progress,
        )
        return prefix

    def _step(self, ids: tuple[int, ...], number: int) -> SearchStep | Skipped:
        rng = self._rng(number, 1)
        past = self.model.past(self.model.compute_prefix(ids))
        text = draw_text(self.corpus, self.config.text_tokens, self.seed, number)
        before = score_prefix(self.model, past, text, self.config.objective, bits=self.config.bits)
        if not math.isfinite(before):
            self._refuse(f"the tokens {list(ids)}" if ids else "no prefix", before)
        self._count(1, len(text))
        if self.config.mode == "screen":
            left = floor.floor_of(self.model, past, text, self.config.objective, before, bits=self.config.bits)
            self._count(1, floor.positions_run(text))
            if floor.cannot_pay(left, self.config.tau):
                return Skipped(left)
        self.trace.positions_full_scan += len(self.model.vocabulary) * (len(text) + 1)
        if self.config.mode == "exhaustive":
            layers, screened, entered = 0, 0, len(self.model.vocabulary)
            scored = self._scan(past, text, number)
            proposed = finalists = {"scan": entered}
        else:
            screen = tokens_to_screen(self.model.vocabulary, self.config.screen_tokens, self._rng(number, 4))
            candidates = self._candidates(past, text, screen, rng)
            layers, screened, entered = self._depth, len(screen), len(candidates)
            scored = self._halve(past, text, candidates)
            proposed = count_sources(candidates, candidates)
            finalists = count_sources(candidates, [s.token_id for s in scored])
        best = scored[0]
        accepted = best.objective <= self.config.tau * before
        rank, size = self._audit(past, text, best, rng) if accepted else (0, 0)
        return SearchStep(
            best,
            before,
            accepted,
            tuple(scored[:20]),
            candidates=entered,
            exact=len(scored),
            screen_layers=layers,
            audit_rank=rank,
            audit_size=size,
            proposed=proposed,
            finalists=finalists,
            screened=screened,
        )

    def _rng(self, number: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number, purpose])

    def _candidates(self, past: KeysValues, text: IntArray, tokens: IntArray, rng: np.random.Generator) -> Candidates:
        """Return the candidates of both screens, the obvious tokens and a random sample; ``tokens`` are screened."""
        config = self.config
        sizes = self_sink_sizes(
            self.model, past, tokens, self._depth, batch_positions=config.batch_positions, progress=self.progress
        )
        self._count(len(sizes), 1)
        gradient: list[int] = []
        if config.gradient_candidates:
            start = mean_embedding(self.model)
            changes = gradient_changes(self.model, past, text, start, config.objective, progress=self.progress)
            self._count(1, positions_run(text))
            gradient = [int(self.model.vocabulary[i]) for i in largest(-changes, config.gradient_candidates)]
        screen = [int(tokens[i]) for i in largest(sizes, config.screen_candidates)]
        return gather_candidates(self.model, screen, gradient, config.random_candidates, rng)

    @cached_property
    def _depth(self) -> int:
        return sink_depth(self.model, np.random.default_rng([self.seed, 2]))

    def _halve(self, past: KeysValues, text: IntArray, candidates: Candidates) -> list[ScoredToken]:
        """Return the finalists of successive halving, scored on the whole text, best first."""
        tokens = list(candidates)
        for length, keep in zip(RUNGS, KEEP, strict=True):
            wanted = max(FINALISTS, int(len(tokens) * keep))
            if length < len(text) and wanted < len(tokens):
                scores = self._score(past, text[:length], tokens, self._depth)
                order = np.argsort(scores, kind="stable")[:wanted]
                tokens = [tokens[i] for i in order]
        return self._ranked(tokens, self._score(past, text, tokens), [" + ".join(candidates[t]) for t in tokens])

    def _scan(self, past: KeysValues, text: IntArray, number: int) -> list[ScoredToken]:
        """Score the whole vocabulary, with a checkpoint after every chunk from which a killed scan resumes."""
        file = self.scratch / f"scan-{number}.json" if self.scratch else None
        scores, seconds = _checkpoint(file, self.model.spec.vocab_size) if file else ([], 0.0)
        # The cost of a scan includes what earlier, killed runs spent on it.
        self._count(len(scores), len(text) + 1)
        self.trace.seconds += seconds
        vocabulary, begin = self.model.vocabulary.tolist(), time.monotonic() - seconds
        for start in range(len(scores), len(vocabulary), SCAN_CHUNK):
            scores += self._score(past, text, vocabulary[start : start + SCAN_CHUNK])
            if file and self.model.processes.leads:
                replace_file(file, json.dumps({"scores": scores, "seconds": time.monotonic() - begin}).encode())
            self.progress("scanning the vocabulary", len(scores), len(vocabulary))
        return self._ranked(vocabulary, scores, ["scan"] * len(vocabulary))

    def _audit(self, past: KeysValues, text: IntArray, best: ScoredToken, rng: np.random.Generator) -> tuple[int, int]:
        """Return the rank of the best token in a new random sample of the vocabulary, and the size of the sample."""
        size = min(self.config.audit_tokens, len(self.model.vocabulary))
        sample = rng.choice(self.model.vocabulary, size=size, replace=False)
        scores = self._score(past, text, [int(t) for t in sample])
        return 1 + sum(score < best.objective for score in scores), size

    def _score(self, past: KeysValues, text: IntArray, tokens: Sequence[int], depth: int | None = None) -> list[float]:
        self._count(len(tokens), len(text) + 1)
        scores = score_candidates(
            self.model,
            past,
            text,
            tokens,
            self.config.objective,
            bits=self.config.bits,
            depth=depth,
            batch_positions=self.config.batch_positions,
            progress=self.progress,
        )
        # NaN compares as equal to everything, so it would stay wherever a sort finds it.
        for token, score in zip(tokens, scores, strict=True):
            if not math.isfinite(score):
                self._refuse(f"token {self.model.token_text(token)!r} ({token})", score)
        return scores

    def _refuse(self, prefix: str, score: float) -> NoReturn:
        raise UsageError(
            f"the objective '{self.config.objective}' behind {prefix} is {score}, which cannot be ranked",
            hint="the model overflows in its floating-point type: give --dtype fp32, or check the checkpoint",
        )

    def _ranked(self, tokens: list[int], scores: list[float], sources: Sequence[str]) -> list[ScoredToken]:
        found = [
            ScoredToken(token, self.model.token_text(token), source, score)
            for token, score, source in zip(tokens, scores, sources, strict=True)
        ]
        return sorted(found, key=lambda s: s.objective)

    def _count(self, rows: int, length: int) -> None:
        self.trace.positions_scored += rows * length

    def _seed_ids(self) -> tuple[int, ...]:
        if not self.config.seed_tokens and self.config.max_length:
            return self.model.bare_tokens
        tokenizer = self.model.tokenizer
        return seed_ids(self.config, tokenizer.bos_token_id, lambda text: self.model.encode(text).tolist())

    def _why_stopped(self, step: SearchStep, ids: tuple[int, ...]) -> str:
        best = f"the best of {step.candidates} candidates leaves {step.ratio:.2f} of the objective"
        if ids:
            return f"{best}, more than tau = {self.config.tau}: another token would not pay"
        return f"{best}, more than tau = {self.config.tau}: this model has no sink worth a prefix"

    def _why_skipped(self, step: Skipped, ids: tuple[int, ...]) -> str:
        found = (
            f"{step.floor:.2f} of the objective remains without the attention sinks of the text, much more than "
            f"tau = {self.config.tau}"
        )
        return f"{found}: another token would not pay" if ids else f"{found}: this model has no sink worth a prefix"


def _checkpoint(file: Path, vocabulary: int) -> tuple[list[float], float]:
    """Return the scores and seconds of an interrupted scan; none if there is no checkpoint, or a damaged one."""
    if not file.is_file():
        return [], 0.0
    try:
        found = json.loads(file.read_bytes())
        scores, seconds = list(map(float, found["scores"])), float(found["seconds"])
        if len(scores) > vocabulary or not all(map(math.isfinite, [*scores, seconds])):
            raise ValueError("it has more scores than there are tokens, or one that is not finite")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        logger.warning("the checkpoint %s is damaged, so the scan begins again: %s", file, e)
        return [], 0.0
    return scores, seconds


def draw_text(corpus: IntArray, tokens: int, seed: int, step: int) -> IntArray:
    """Return the text int64 ``[tokens]`` of a step of the search, which depends only on seed and step."""
    start = int(np.random.default_rng([seed, step]).integers(0, len(corpus) - tokens + 1))
    return corpus[start : start + tokens]
