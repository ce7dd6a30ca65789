"""Small tasks of lm-eval with local data, and where the seven zero-shot tasks lie offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[3] / "shared"
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: choice.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """
task: tiny_last_word
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: !function tiny_words.beginning
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
SENTENCES = (
    "The quick brown fox jumps over the lazy dog",
    "A head attends to the first token of the text",
    "The dog sleeps and the fox is gone by then",
    "A few empty tokens become attention sinks",
    "Nothing else is worth attending to",
    "It carries very large activations",
)


def write_tasks(folder: Path, data: Path) -> Path:
    """Write two tasks into ``folder`` and their rows into ``data``; return ``folder``."""
    folder.mkdir(exist_ok=True)
    data.mkdir(exist_ok=True)
    (folder / "choice.yaml").write_text(CHOICE)
    (folder / "words.yaml").write_text(LAST_WORD)
    (folder / "tiny_words.py").write_text("def beginning(doc):\n    return ' '.join(doc['text'].split(' ')[:-1])\n")
    questions = [
        {"question": s, "choices": [" and then", " the fox", " of it all, and more"], "answer": i % 3}
        for i, s in enumerate(SENTENCES)
    ]
    (data / "choice.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (data / "words.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in SENTENCES))
    return folder


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep data sets out of the user's cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.fixture
def tiny_tasks(tmp_path: Path, no_cache: None) -> tuple[Path, Path]:
    """Return the folders of two small tasks and of their data."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    return write_tasks(tmp_path / "tasks", tmp_path / "rows"), tmp_path / "rows"


@pytest.fixture
def seven_tasks(no_cache: None) -> tuple[Path, Path]:
    """Return the folders of the seven tasks of the paper and of their data, or skip."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tasks, data = LOCAL / "lm_eval", LOCAL / "data" / "zeroshot"
    if not (tasks.is_dir() and data.is_dir()):
        pytest.skip("the zero-shot tasks are not beside this checkout")
    return tasks, data
