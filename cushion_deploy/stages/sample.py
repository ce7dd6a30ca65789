"""Sample: text from the model itself; and every other text that stages read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cushion_deploy.calib.corpora import SAMPLED, Corpus, Part, load_corpus
from cushion_deploy.stages.base import Derived, Node, Speed, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

DOCUMENTS = "documents.json"
ROW_SHARE = 0.6
"""Rows that are decoded together share the reading of the weights, which is most of a decode step."""


@dataclass(frozen=True)
class Sample(Stage[tuple[str, ...]]):
    """Draw documents from the model.

    Attributes:
        model: the model.
        seed: of the sampling.
    """

    name: ClassVar[str] = "sample"
    version: ClassVar[int] = 1
    model: Node[TorchRunner]
    seed: int

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the documents."""
        from cushion_deploy.modeling.sample import sample_text

        write_json(out / DOCUMENTS, sample_text(inputs.get(self.model), self.seed, inputs.progress))

    def read(self, folder: Path) -> tuple[str, ...]:
        """Return the documents."""
        return tuple(read_json(folder / DOCUMENTS))

    def digest_of(self, artifact: tuple[str, ...]) -> str:
        """Return the digest of the documents."""
        return digest_json(list(artifact))

    def seconds(self, speed: Speed) -> float:
        """Every token is one decode step of one row."""
        from cushion_deploy.modeling.sample import SAMPLE_TOKENS, SAMPLES

        return SAMPLES * SAMPLE_TOKENS * ROW_SHARE * speed.whole


@dataclass(frozen=True)
class ReadText(Derived[Corpus]):
    """A text: a file, a hub data set, prose that CPython ships, or what the model says.

    Attributes:
        data: as the recipe names it; None for the offline default.
        part: calibration or evaluation.
        sample: documents from the model, where the text is made of them.
    """

    data: str | None
    part: Part
    sample: Node[tuple[str, ...]] | None = None

    @classmethod
    def of(cls, data: str | None, part: Part, sample: Node[tuple[str, ...]]) -> ReadText:
        """Return the node of a text, which samples from the model only where the text is made of that."""
        own = data == "self" or (data in SAMPLED and part == "calibration")
        return cls(data, part, sample if own else None)

    def make(self, inputs: Inputs) -> Corpus:
        """Read it."""
        sample = self.sample
        return load_corpus(self.data, self.part, (lambda: inputs.get(sample)) if sample else None)
