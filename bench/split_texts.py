"""Create the texts of the committed study from WikiText-2 and C4 files, so that scored text is never calibrated on.

    python bench/split_texts.py WIKITEXT2_TRAIN.txt C4.jsonl OUT

writes `calibration.jsonl` (documents from the first half of C4, interleaved with as much WikiText-2 training text) and
`c4-held-out.jsonl` (the second half). The other scored text is the unmodified WikiText-2 validation text.
"""

from __future__ import annotations

import argparse
import json
from itertools import zip_longest
from pathlib import Path


def main(train: Path, c4: Path, out: Path) -> None:
    """Write both files into ``out``."""
    documents = [json.loads(line)["text"] for line in c4.read_text(encoding="utf-8").split("\n") if line.strip()]
    first, second = documents[: len(documents) // 2], documents[len(documents) // 2 :]
    size = sum(map(len, first)) // len(first)
    text = train.read_text(encoding="utf-8")
    pieces = [text[start : start + size] for start in range(0, min(len(text), size * len(first)), size)]
    mixed = [piece for pair in zip_longest(first, pieces) for piece in pair if piece and piece.strip()]
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("calibration.jsonl", mixed), ("c4-held-out.jsonl", second)):
        lines = [json.dumps({"text": document}) for document in chosen]
        (out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path, help="training text of WikiText-2, plain text")
    parser.add_argument("c4", type=Path, help="documents of C4, one JSON object with 'text' a line")
    parser.add_argument("out", type=Path, help="folder to write to")
    main(**vars(parser.parse_args()))
