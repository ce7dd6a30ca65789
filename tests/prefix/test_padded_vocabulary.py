"""Rows of the embedding that no text becomes are never searched, drawn or sampled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.modeling import sample
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.modeling.vocabulary import producible_tokens
from cushion_deploy.prefix import search
from cushion_deploy.prefix.candidates import gather_candidates
from cushion_deploy.prefix.search import PrefixSearch
from cushion_deploy.recipe import Search

TOKENS, ROWS = 320, 384


@pytest.fixture(scope="module")
def padded(
    tiny_writer: Callable[..., Path], sink_planter: Callable[[Any], None], plant: Any, tmp_path_factory: Any
) -> TorchRunner:
    """Return a model with a planted sink whose absorbers are rows beyond the tokenizer, which its head prefers too."""

    def edit(module: Any) -> None:
        sink_planter(module)
        embedding, head = module.get_input_embeddings().weight, module.lm_head.weight
        for number, token in enumerate(plant.absorbers):
            embedding[[token, TOKENS + number]] = embedding[[TOKENS + number, token]]
        head[TOKENS:] = 20 * head[:64]

    folder = tiny_writer(tmp_path_factory.mktemp("padded"), edit, vocab_size=ROWS)
    return load_folder(folder, resolve_source(str(folder)))


@pytest.mark.parametrize("mode", ["screen", "exhaustive"])
def test_a_row_that_no_text_becomes_is_no_candidate(
    mode: Any, padded: TorchRunner, plain_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    score = search.score_candidates

    def seen(model: Any, past: Any, text: Any, tokens: Any, *arguments: Any, **options: Any) -> Any:
        scored.extend(tokens)
        return score(model, past, text, tokens, *arguments, **options)

    monkeypatch.setattr(search, "score_candidates", seen)
    settings = {"text_tokens": 24, "random_candidates": 300, "screen_candidates": 64, "average_tokens": 0}
    config = Search(mode=mode, max_length=1, audit_tokens=ROWS, tau=1.0, gradient_candidates=32, **settings)
    _, trace = PrefixSearch(padded, plain_ids[:24], config).run()
    assert set(scored) == set(range(TOKENS))
    assert trace.steps[0].screened == (TOKENS if mode == "screen" else 0)


def test_random_candidates_are_tokens(padded: TorchRunner) -> None:
    found = gather_candidates(padded, [], [], ROWS, np.random.default_rng(0))
    assert {token for token, sources in found.items() if "random" in sources} == set(range(TOKENS))


def test_text_of_the_model_itself_is_tokens(padded: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 12)
    seen: list[torch.Tensor] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(padded.tokenizer, name)

        def batch_decode(self, ids: torch.Tensor, **options: Any) -> Any:
            seen.append(ids)
            return padded.tokenizer.batch_decode(ids, **options)

    watched = padded.__class__(**{**fields_of(padded), "tokenizer": Recorder()})
    sample.sample_text(watched, 0)
    assert seen[0].shape == (sample.SAMPLES, 12)
    assert int(seen[0].max()) < TOKENS
    answers = sample.answer_greedily(padded, np.full((2, 3), 70), 6)
    assert answers.max() < TOKENS


def fields_of(model: TorchRunner) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.__dataclass_fields__}


def test_names_that_no_merge_makes_are_no_tokens(tiny_folder: Path) -> None:
    """GGUF files name the padding rows; what an exhaustive pairing by the merges makes is the oracle."""
    from transformers import PreTrainedTokenizerFast

    written = json.loads((tiny_folder / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    vocabulary |= {f"[PAD{i}]": i for i in range(TOKENS, 330)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(written)))
    assert tokenizer("[PAD325]", add_special_tokens=False)["input_ids"] != [325]
    assert len(tokenizer.get_vocab()) == 330
    assert producible_tokens(tokenizer, ROWS).tolist() == list(range(TOKENS))
    assert producible_tokens(tokenizer, 100).tolist() == list(range(100))
    tokenizer.add_tokens(["[PAD325]"], special_tokens=True)
    assert tokenizer("[PAD325]", add_special_tokens=False)["input_ids"] == [325]
    assert producible_tokens(tokenizer, ROWS).tolist() == [*range(TOKENS), 325]
