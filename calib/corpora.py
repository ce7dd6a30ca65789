"""Text for calibration and evaluation: files, hub data sets, samples of the model, or prose that ships with CPython."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from cushion_deploy.calib.rows import FIELDS, Chat, Document, document_of
from cushion_deploy.errors import MissingDependency, UntrustedArtifact, UsageError
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.text_files import read_utf8

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
SEPARATOR = "\n\n"
"""What stands between two documents of plain text."""
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
        documents: text of each document; that of a conversation is as the chat template renders it.
        separator: what stands between two documents.
        said: the messages of users, if the documents are conversations.
    """

    name: str
    documents: tuple[str, ...]
    separator: str = SEPARATOR
    said: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over the documents, and over the separator if it is not the usual one."""
        found = list(self.documents)
        return digest_json(found if self.separator == SEPARATOR else {"documents": found, "separator": self.separator})

    @property
    def text(self) -> str:
        """All documents joined, plain text with a blank line (METHOD section 6)."""
        return self.separator.join(self.documents)

    @property
    def prose(self) -> str:
        """The text without what a chat template puts around messages: of conversations, what users say."""
        return SEPARATOR.join(self.said) or self.text


@dataclass(frozen=True)
class Rows:
    """Documents as a file or data set has them, before a chat template has rendered the conversations.

    Attributes:
        name: name of the text, for reports.
        documents: plain text or a conversation each.
    """

    name: str
    documents: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the documents."""
        return digest_json([each if isinstance(each, str) else each.to_json() for each in self.documents])

    @property
    def chats(self) -> tuple[Chat, ...]:
        """The conversations."""
        return tuple(each for each in self.documents if isinstance(each, Chat))

    def rendered(self, render: Callable[[Chat], str]) -> Corpus:
        """Return the corpus with every conversation rendered.

        Conversations alone follow each other as they are rendered, because a template ends each of them.
        """
        documents = tuple(each if isinstance(each, str) else render(each) for each in self.documents)
        only_chats = bool(documents) and len(self.chats) == len(documents)
        return Corpus(self.name, documents, "" if only_chats else SEPARATOR, tuple(_said(self.chats)))


def load_corpus(data: str | None, part: Part, sample: Callable[[], tuple[str, ...]] | None = None) -> Corpus:
    """Return a corpus of plain text; see :func:`load_rows`.

    Raises:
        UsageError: also if a row is a conversation.
    """
    return load_rows(data, part, sample).rendered(_no_template)


def load_rows(data: str | None, part: Part, sample: Callable[[], tuple[str, ...]] | None = None) -> Rows:
    """Return the text that ``--calib-data`` or ``--eval-data`` names.

    Args:
        data: see ``VALID``; None for the offline default, whose two parts have no document in common. Half of its
            calibration part is sampled from the model if ``sample`` is given, because ranges of prose about a
            programming language do not fit other text.
        part: the part of a corpus with several. A hub data set is calibrated on its train split and evaluated on its
            validation split, the first 2,000 rows each, blank ones left out. A benchmark is evaluated on its test
            split, all rows: joined with a blank line, they are the text that published perplexities are measured on.
        sample: draws documents from the model; None if there is no model.

    Raises:
        UsageError: there is no such corpus, its file type, columns or rows are not supported, it is not UTF-8, or it
            is empty.
        MissingDependency: the hub cannot be reached, or a library is missing.
        UntrustedArtifact: a parquet file is damaged.
    """
    if data is None:
        rows: Corpus | Rows = python_topics(part)
        if part == "calibration" and sample is not None:
            rows = interleaved(python_topics(part), Corpus(OWN_TEXT, sample()), SAMPLED[None])
    elif data == "self":
        if sample is None:
            raise UsageError("text sampled from the model cannot be used here", hint=f"give {VALID}")
        rows = Rows(OWN_TEXT, sample())
    elif _is_file(data):
        rows = _from_file(Path(data))
    elif data in HUB_CORPORA:
        rows = _from_hub(*HUB_CORPORA[data], part, whole=data in BENCHMARKS and part == "evaluation")
    elif _HUB_ID.fullmatch(data) and not data.endswith(_SUFFIXES):
        name, _, config = data.partition(":")
        rows = _from_hub(name, config or None, part)
    else:
        raise UsageError(f"unknown data set '{data}': no such file or name", hint=f"give {VALID}")
    if not any(isinstance(each, Chat) or each.strip() for each in rows.documents):
        raise UsageError(f"{rows.name} holds no text", hint=f"give {VALID}")
    return Rows(rows.name, rows.documents)


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


def _is_file(data: str) -> bool:
    try:
        return Path(data).is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null character, is no file
        return False


def _said(chats: Sequence[Chat]) -> Iterator[str]:
    """Yield the messages of users that are plain text."""
    for chat in chats:
        for message in chat.messages:
            if message.get("role") == "user" and isinstance(message.get("content"), str):
                yield message["content"]


def _no_template(chat: Chat) -> str:
    raise UsageError(
        f"{chat.where} is a conversation, which needs the chat template of a model", hint="give rows with a 'text'"
    )


def _from_file(path: Path) -> Rows:
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{path.name}: files of type '{path.suffix}' are not supported", hint=f"give {VALID}")
    if path.suffix == ".parquet":
        return Rows(path.name, tuple(_parquet_documents(path)))
    text = read_utf8(path)
    if path.suffix == ".jsonl":
        return Rows(path.name, tuple(_jsonl_documents(path.name, text)))
    # As text files are read everywhere: a line ends with a line feed.
    return Rows(path.name, (text.replace("\r\n", "\n").replace("\r", "\n"),))


def _jsonl_documents(name: str, text: str) -> Iterator[Document]:
    # Not splitlines, which also splits at U+2028 and other separators that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                reason = "it is nested too deeply" if isinstance(e, RecursionError) else f"{e!s:.100}"
                raise UsageError(f"{where}: not valid JSON ({reason})", hint="write one object per line") from e
            yield document_of(row, where)


def _parquet_documents(path: Path) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise MissingDependency("reading parquet needs pyarrow", hint="pip install 'cushion-deploy[build]'") from e
    try:
        names = pq.read_schema(path).names
        if not set(FIELDS) & set(names):
            raise UsageError(
                f"{path.name} has no column 'text', 'messages' or 'conversations', but {', '.join(names)[:200]}",
                hint="rename the column that holds the text",
            )
        # The other columns are not read: they may be large.
        table = pq.read_table(path, columns=[name for name in (*FIELDS, "tools", "system") if name in names])
        rows = table.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as e:
        raise UntrustedArtifact(f"{path.name} is not readable as parquet: {e}", hint="write the file again") from e
    for number, row in enumerate(rows, 1):
        document = document_of(row, f"{path.name}, row {number}")
        if document:
            yield document


def _from_hub(name: str, config: str | None, part: Part, *, whole: bool = False) -> Rows:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as e:
        raise MissingDependency("hub data sets need datasets", hint="pip install 'cushion-deploy[build]'") from e
    split = "test" if whole else "train" if part == "calibration" else "validation"
    title = f"{name} {config or ''} ({split})".replace("  ", " ")
    try:
        found: Any = load_dataset(name, config, split=split, streaming=True, trust_remote_code=False)
        rows = list(islice(found, None if whole else MAX_HUB_DOCUMENTS))
    except (DatasetNotFoundError, ValueError) as e:
        raise UsageError(f"data set '{name}' cannot be read: {e}", hint=f"give {VALID}") from e
    except OSError as e:
        raise MissingDependency(
            f"data set '{name}' cannot be fetched from the hub", hint="check the network, or give a local file"
        ) from e
    if rows and not set(FIELDS) & set(rows[0]):
        raise UsageError(
            f"data set '{name}' has no field 'text', 'messages' or 'conversations', but {', '.join(rows[0])[:200]}",
            hint="give one with such a field",
        )
    documents = [document_of(row, f"{title}, row {number}") for number, row in enumerate(rows, 1)]
    return Rows(title, tuple(d for d in documents if whole or isinstance(d, Chat) or d.strip()))
