"""Text from files, data sets, the model, or CPython; windows cut from it; errors that name what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cushion_deploy.calib.corpora import MAX_HUB_DOCUMENTS, Corpus, load_corpus
from cushion_deploy.calib.packing import pack_windows
from cushion_deploy.errors import ExitCode, UntrustedArtifact, UsageError


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_text("Grüße\n\nzwei", encoding="utf-8")
    corpus = load_corpus(str(file), "calibration")
    assert (corpus.name, corpus.documents) == (file.name, ("Grüße\n\nzwei",))


def test_jsonl_is_a_document_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "zw\\u00f6", "id": 3}\n', encoding="utf-8")
    corpus = load_corpus(str(file), "evaluation")
    assert corpus.documents == ("one", "zwö")
    assert corpus.text == "one\n\nzwö"


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_corpus(str(file), "calibration").documents == ("a\u2028b\x85c",)


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"txt": "a"}', "3"])
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=r"a\.jsonl, line 3"):
        load_corpus(str(file), "calibration")


def test_parquet_gives_its_text_column(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "", "two"], "n": [1, 2, 3]}), file)
    assert load_corpus(str(file), "calibration").documents == ("one", "two")


def test_parquet_without_a_text_column_is_bad_usage(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"words": ["one"]}), file)
    with pytest.raises(UsageError, match="no column 'text'"):
        load_corpus(str(file), "calibration")


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UntrustedArtifact, match=r"a\.parquet"):
        load_corpus(str(tmp_path / "a.parquet"), "calibration")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_that_is_not_utf8_is_bad_usage(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b'{"text": "caf\xe9 au lait"}')
    with pytest.raises(UsageError, match=f"{suffix} is not UTF-8 text: byte 0xe9 at offset 13"):
        load_corpus(str(file), "calibration")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, suffix: str) -> None:
    text = "one" if suffix == ".txt" else '{"text": "one"}'
    file = tmp_path / f"a{suffix}"
    file.write_text(text, encoding="utf-8-sig")
    assert load_corpus(str(file), "calibration").documents == ("one",)


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_a_file_without_text_is_bad_usage(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UsageError, match=r"a\.txt holds no text"):
        load_corpus(str(tmp_path / "a.txt"), "calibration")


def test_a_file_of_another_type_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(UsageError, match=r"'\.pdf' are not supported") as e:
        load_corpus(str(tmp_path / "a.pdf"), "calibration")
    assert ".jsonl" in e.value.hint


@pytest.mark.parametrize("name", ["wikitxt", "missing.txt", "dir/missing.jsonl", ""])
def test_an_unknown_name_lists_the_valid_ones(name: str) -> None:
    with pytest.raises(UsageError, match="unknown data set") as e:
        load_corpus(name, "calibration")
    for valid in ("wikitext", "c4", "self", ".parquet", "org/name"):
        assert valid in e.value.hint


def test_the_offline_default_has_two_parts_without_a_common_document() -> None:
    calibration, evaluation = (load_corpus(None, part).documents for part in ("calibration", "evaluation"))
    assert not set(calibration) & set(evaluation)
    assert sum(map(len, calibration)) > 200_000
    assert sum(map(len, evaluation)) > 50_000
    assert load_corpus(None, "calibration").digest == load_corpus(None, "calibration").digest


def test_self_is_text_of_the_model_where_there_is_one() -> None:
    assert load_corpus("self", "calibration", lambda: ("drawn", "twice")).documents == ("drawn", "twice")
    with pytest.raises(UsageError, match="cannot be used here"):
        load_corpus("self", "evaluation")


def test_half_of_the_offline_default_is_text_of_the_model_where_there_is_one() -> None:
    drawn = tuple(f"{'drawn ' * 40}{i}" for i in range(100))
    mixed = load_corpus(None, "calibration", lambda: drawn)
    topics = [text for text in mixed.documents if text not in drawn]
    whole = load_corpus(None, "calibration").documents
    assert all(any(text.startswith(topic) for text in whole) for topic in topics)
    assert tuple(text for text in mixed.documents if text in drawn) == drawn
    ours, theirs = sum(map(len, drawn)), sum(map(len, topics))
    assert 0.7 < theirs / ours < 1.5
    # Both kinds are everywhere: each quarter of the corpus holds some of each.
    quarter = len(mixed.documents) // 4
    for start in range(0, 4 * quarter, quarter):
        piece = mixed.documents[start : start + quarter]
        assert 0 < sum(text in drawn for text in piece) < quarter
    assert load_corpus(None, "evaluation", lambda: drawn).digest == load_corpus(None, "evaluation").digest


def test_a_digest_tells_where_documents_end() -> None:
    assert Corpus("a", ("x", "y")).digest != Corpus("a", ("x\n\ny",)).digest
    assert Corpus("a", ("x", "y")).digest == Corpus("b", ("x", "y")).digest


SPLITS = ("train", "validation", "test")
SCRIPT = """
import sys
from cushion_deploy.calib.corpora import load_corpus
from cushion_deploy.errors import CushionError
try:
    corpus = load_corpus(sys.argv[1], sys.argv[2])
except CushionError as e:
    print(type(e).__name__, e.message, "|", e.hint)
    sys.exit(int(e.exit_code))
print(corpus.name)
print(corpus.documents)
"""


def load_offline(folder: Path, name: str, part: str) -> subprocess.CompletedProcess[str]:
    """Load a data set and print its name and its documents."""
    return run_offline(folder, SCRIPT, name, part)


def run_offline(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, without network: the libraries of data sets read the environment at import."""
    env = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write_dataset(folder: Path, column: str) -> None:
    for split in ("train", "validation"):
        (folder / "org" / "name").mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({column: f"{split} {i}"}) for i in range(3)] + [json.dumps({column: "  "})]
        (folder / "org" / "name" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")


def write_wikitext(folder: Path, count: int) -> dict[str, list[str]]:
    """Write splits with the headings and blank rows of WikiText-2 where its name on the hub leads to; return them."""
    home = folder / "Salesforce" / "wikitext"
    home.mkdir(parents=True)
    kinds = ("", " = Heading {} = \n", " A {split} paragraph , number {} . \n")
    rows = {split: [kinds[i % 3].format(i, split=split) for i in range(count)] for split in SPLITS}
    for split, texts in rows.items():
        (home / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = "".join(f"\n  - {{split: {split}, path: {split}.jsonl}}" for split in SPLITS)
    config = f"configs:\n- config_name: wikitext-2-raw-v1\n  data_files:{files}\n"
    (home / "README.md").write_text(f"---\n{config}---\n")
    return rows


@pytest.mark.parametrize(("part", "split"), [("calibration", "train"), ("evaluation", "validation")])
def test_a_data_set_gives_the_split_of_its_part(tmp_path: Path, part: str, split: str) -> None:
    write_dataset(tmp_path, "text")
    done = load_offline(tmp_path, "org/name", part)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[1] == str(tuple(f"{split} {i}" for i in range(3)))


@pytest.mark.parametrize(
    ("part", "split", "count"), [("calibration", "train", MAX_HUB_DOCUMENTS), ("evaluation", "test", 2400)]
)
def test_wikitext_is_evaluated_on_every_row_of_its_test_split(
    tmp_path: Path, part: str, split: str, count: int
) -> None:
    rows = write_wikitext(tmp_path, 2400)
    done = load_offline(tmp_path, "wikitext", part)
    assert done.returncode == 0, done.stdout + done.stderr
    name, documents = done.stdout.splitlines()
    assert name == f"Salesforce/wikitext wikitext-2-raw-v1 ({split})"
    expected = rows[split][:count] if split == "test" else [row for row in rows[split][:count] if row.strip()]
    assert documents == str(tuple(expected))


def test_the_text_of_wikitext_is_what_published_perplexities_are_measured_on(tmp_path: Path) -> None:
    rows = write_wikitext(tmp_path, 12)
    # As in the documentation of transformers: "\n\n".join(test["text"])
    code = (
        "from datasets import load_dataset\nfrom cushion_deploy.calib.corpora import load_corpus\n"
        "test = load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1', split='test')\n"
        "assert load_corpus('wikitext', 'evaluation').text == '\\n\\n'.join(test['text'])\nprint(len(test))"
    )
    done = run_offline(tmp_path, code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [str(len(rows["test"]))]


def test_a_data_set_without_text_is_bad_usage(tmp_path: Path) -> None:
    write_dataset(tmp_path, "words")
    (tmp_path / "org" / "nulls").mkdir()
    rows = [json.dumps({"text": text}) for text in ("one", None, "three")]
    (tmp_path / "org" / "nulls" / "train.jsonl").write_text("\n".join(rows) + "\n")
    # Importing the library takes most of the time: one process for both.
    code = (
        "from cushion_deploy.calib.corpora import load_corpus\nfrom cushion_deploy.errors import UsageError\n"
        "for name in ('org/name', 'org/nulls'):\n    try:\n        load_corpus(name, 'calibration')\n"
        "    except UsageError as e:\n        print(e.message)\n"
    )
    done = run_offline(tmp_path, code)
    assert done.stdout.splitlines() == [
        "data set 'org/name' has no field 'text', 'messages' or 'conversations', but words",
        "org/nulls (train), row 2: 'text' is null, expected text",
    ], done.stderr


def test_a_data_set_that_cannot_be_fetched_says_so(tmp_path: Path) -> None:
    done = load_offline(tmp_path, "org/absent", "calibration")
    assert done.returncode == ExitCode.MISSING, done.stdout + done.stderr
    assert "org/absent" in done.stdout
    assert "network" in done.stdout


DOCUMENTS = st.lists(st.integers(0, 90), min_size=1, max_size=6)


@given(DOCUMENTS, st.integers(2, 40), st.integers(1, 8))
def test_windows_are_consecutive_pieces_of_documents(lengths: list[int], window: int, count: int) -> None:
    ends = np.cumsum(lengths)
    documents = [np.arange(end - n, end) + 1 for end, n in zip(ends, lengths, strict=True)]
    if ends[-1] < window:
        with pytest.raises(UsageError, match=f"corpus holds {ends[-1]} tokens, fewer than one window of {window}"):
            pack_windows(documents, window, count, "corpus")
        return
    ids, mask = pack_windows(documents, window, count, "corpus")
    assert ids.shape == mask.shape
    assert ids.shape[1] == window
    assert 1 <= len(ids) <= count
    assert ids.dtype == mask.dtype == np.int64
    firsts = []
    for row, kept in zip(ids, mask, strict=True):
        n = int(kept.sum())
        assert n >= 1
        assert kept.tolist() == [1] * n + [0] * (window - n), "padding stands on the right"
        piece = row[:n]
        assert not row[n:].any()
        assert piece.tolist() == list(range(piece[0], piece[0] + n))
        document = int(np.searchsorted(ends, piece[0] - 1, side="right"))
        assert piece[-1] <= ends[document], "a window holds one document"
        firsts.append(int(piece[0]))
    assert firsts == sorted(set(firsts))


def test_few_windows_are_spread_over_the_whole_corpus() -> None:
    ids, mask = pack_windows([np.arange(1, 1001)], 50, 3, "corpus")
    assert ids[:, 0].tolist() == [1, 451, 951]
    assert mask.all()
