"""Text for calibration and evaluation: files, hub data sets, samples of the model, or prose that ships with CPython."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.errors import MissingDependency, UntrustedArtifact, UsageError
from cushion_deploy.store.digests import digest_json

Part = Literal["calibration", "evaluation"]
HUB_CORPORA = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
BENCHMARKS = {"wikitext": 341_469}
"""Hub corpora whose evaluation part is the whole test split, as published results have it, and its tokens (LLaMA-2)."""
OWN_TEXT = "text sampled from the model"
SAMPLED = {None: f"CPython language topics and {OWN_TEXT}", "self": OWN_TEXT}
"""Values of ``--calib-data`` whose text is sampled from the model, wholly or in part, and the name of that text."""
SHORTEST_PIECE = 2000
"""Characters that remain at least when a document is cut to mix two corpora."""
MAX_HUB_DOCUMENTS = 2000
_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
VALID = (
    f"a {', '.join(_SUFFIXES)} file, {', '.join(HUB_CORPORA)}, org/name[:config] on the hub, "
    "self (text sampled from the model), or nothing for the offline default"
)


@dataclass(frozen=True)
class Corpus:
    """Documents of text.

    Attributes:
        name: name of the text, for reports.
        documents: plain text of each document.
    """

    name: str
    documents: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the documents."""
        return digest_json(list(self.documents))

    @property
    def text(self) -> str:
        """All documents joined with a blank line (METHOD section 6)."""
        return "\n\n".join(self.documents)


def load_corpus(data: str | None, part: Part, sample: Callable[[], tuple[str, ...]] | None = None) -> Corpus:
    """Return the corpus that ``--calib-data`` or ``--eval-data`` names.

    Args:
        data: see ``VALID``; None for the offline default, whose two parts have no document in common. Half of its
            calibration part is sampled from the model if ``sample`` is given, because ranges of prose about a
            programming language do not fit other text.
        part: the part of a corpus with several. A hub data set is calibrated on its train split and evaluated on its
            validation split, the first 2,000 rows each, blank ones left out. A benchmark is evaluated on its test
            split, all rows: joined with a blank line, they are the text that published perplexities are measured on.
        sample: draws documents from the model; None if there is no model.

    Raises:
        UsageError: there is no such corpus, its file type or columns are not supported, or it is empty.
        MissingDependency: the hub cannot be reached, or a library is missing.
        UntrustedArtifact: a parquet file is damaged.
    """
    if data is None:
        corpus = python_topics(part)
        if part == "calibration" and sample is not None:
            corpus = interleaved(corpus, Corpus(OWN_TEXT, sample()), SAMPLED[None])
    elif data == "self":
        if sample is None:
            raise UsageError("text sampled from the model cannot be used here", hint=f"give {VALID}")
        corpus = Corpus(OWN_TEXT, sample())
    elif Path(data).is_file():
        corpus = _from_file(Path(data))
    elif data in HUB_CORPORA:
        corpus = _from_hub(*HUB_CORPORA[data], part, whole=data in BENCHMARKS and part == "evaluation")
    elif _HUB_ID.fullmatch(data) and not data.endswith(_SUFFIXES):
        name, _, config = data.partition(":")
        corpus = _from_hub(name, config or None, part)
    else:
        raise UsageError(f"unknown data set '{data}': no such file or name", hint=f"give {VALID}")
    if not corpus.text.strip():
        raise UsageError(f"{corpus.name} holds no text", hint=f"give {VALID}")
    return corpus


def python_topics(part: Part) -> Corpus:
    """Return the language reference topics that ship with CPython; every fourth is reserved for evaluation."""
    from pydoc_data.topics import topics

    held_out = part == "evaluation"
    chosen = [text for i, (_, text) in enumerate(sorted(topics.items())) if (i % 4 == 3) == held_out]
    return Corpus(f"CPython language topics ({part} part)", tuple(chosen))


def interleaved(first: Corpus, second: Corpus, name: str) -> Corpus:
    """Return the documents of ``second`` interleaved with as much text from all parts of ``first``, approximately."""
    stride = max(1, len(first.text) // max(1, len(second.text)))
    # Every stride-th document first, so that the text comes from all parts.
    others = [text for start in range(stride) for text in first.documents[start::stride]]
    documents: list[str] = []
    taken = due = 0
    for document in second.documents:
        due += len(document)
        while others and taken < due:
            piece = others.pop(0)[: max(due - taken, SHORTEST_PIECE)]
            taken += len(piece)
            documents.append(piece)
        documents.append(document)
    return Corpus(name, tuple(documents))


def pack_windows(documents: list[IntArray], window: int, count: int, name: str) -> tuple[IntArray, IntArray]:
    """Cut documents into windows and select up to ``count`` of them, spread evenly over the corpus.

    Args:
        documents: token ids int64 ``[n]`` of each document.
        window: tokens per window; the last window of a document is padded on the right.
        count: largest number of windows.
        name: name of the corpus, for the error.

    Returns:
        ids and mask, int64 ``[windows, window]``; the mask is 0 on padding.

    Raises:
        UsageError: the corpus is shorter than one window.
    """
    total = sum(len(d) for d in documents)
    if total < window:
        raise UsageError(
            f"{name} holds {total} tokens, fewer than one window of {window}",
            hint="give more text, or a smaller window (calibration.window)",
        )
    pieces = [d[i : i + window] for d in documents for i in range(0, len(d), window)]
    pieces = [p for p in pieces if len(p) >= min(window, 32)] or pieces
    chosen = [pieces[i] for i in np.unique(np.linspace(0, len(pieces) - 1, min(count, len(pieces))).astype(int))]
    ids = np.zeros((len(chosen), window), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, piece in enumerate(chosen):
        ids[row, : len(piece)], mask[row, : len(piece)] = piece, 1
    return ids, mask


def _from_file(path: Path) -> Corpus:
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{path.name}: files of type '{path.suffix}' are not supported", hint=f"give {VALID}")
    if path.suffix == ".parquet":
        return Corpus(path.name, tuple(_parquet_texts(path)))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(f"{path.name} is not UTF-8 text ({e.reason})", hint="convert it to UTF-8") from e
    if path.suffix == ".jsonl":
        return Corpus(path.name, tuple(_jsonl_texts(path.name, text)))
    return Corpus(path.name, (text,))


def _jsonl_texts(name: str, text: str) -> list[str]:
    found = []
    # Not splitlines, which also splits at U+2028 and other separators that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise UsageError(
                f"{name}, line {number}: no JSON object with a 'text' field", hint="write one such object per line"
            ) from e
        found.append(str(value))
    return found


def _parquet_texts(path: Path) -> list[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise MissingDependency("reading parquet needs pyarrow", hint="pip install 'cushion-deploy[build]'") from e
    try:
        if "text" not in pq.read_schema(path).names:
            raise UsageError(f"{path.name} has no column 'text'", hint="rename the column that holds the text")
        table = pq.read_table(path, columns=["text"])
    except pa.ArrowException as e:
        raise UntrustedArtifact(f"{path.name} is not readable as parquet: {e}", hint="write the file again") from e
    return [str(value) for value in table.column("text").to_pylist() if value]


def _from_hub(name: str, config: str | None, part: Part, *, whole: bool = False) -> Corpus:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as e:
        raise MissingDependency("hub data sets need datasets", hint="pip install 'cushion-deploy[build]'") from e
    split = "test" if whole else "train" if part == "calibration" else "validation"
    try:
        rows: Any = load_dataset(name, config, split=split, streaming=True, trust_remote_code=False)
        texts = [str(row["text"]) for row in islice(rows, None if whole else MAX_HUB_DOCUMENTS)]
    except KeyError as e:
        raise UsageError(f"data set '{name}' has no field 'text'", hint="give one with a field 'text'") from e
    except (DatasetNotFoundError, ValueError) as e:
        raise UsageError(f"data set '{name}' cannot be read: {e}", hint=f"give {VALID}") from e
    except OSError as e:
        raise MissingDependency(
            f"data set '{name}' cannot be fetched from the hub", hint="check the network, or give a local file"
        ) from e
    return Corpus(f"{name} {config or ''} ({split})".replace("  ", " "), tuple(t for t in texts if whole or t.strip()))
