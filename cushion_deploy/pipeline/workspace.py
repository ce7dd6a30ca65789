"""What the stages of one run share: recipe, store of finished stages, clock, and the model, loaded only if needed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.source import ModelSource, resolve_source
from cushion_deploy.progress import Progress, silent
from cushion_deploy.recipe import Recipe
from cushion_deploy.store import StageStore
from cushion_deploy.store.manifest import tool_version
from cushion_deploy.types import PRECISIONS, QuantScheme, digest_json

if TYPE_CHECKING:
    from cushion_deploy.calib.corpora import Corpus, Part
    from cushion_deploy.modeling.load import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageTime:
    """Wall time of one stage in this run; ``reused`` when an earlier run's result served."""

    stage: str
    seconds: float
    reused: bool


@dataclass
class Workspace:
    """One run.

    Attributes:
        recipe: every setting.
        store: finished stages.
        progress: where long work reports.
        times: the stages of this run, in order.
    """

    recipe: Recipe
    store: StageStore
    progress: Progress = silent
    times: list[StageTime] = field(default_factory=list)

    @cached_property
    def source(self) -> ModelSource:
        """The checked model on disk."""
        if self.recipe.model is None:
            raise UsageError("no model was given", hint="add --model FILE.gguf, --model FOLDER or --model org/name")
        return resolve_source(self.recipe.model, self.recipe.revision)

    @cached_property
    def model(self) -> LoadedModel:
        """The model in torch; a GGUF file is converted once and kept in the store."""
        from cushion_deploy.modeling.load import load_folder

        folder = self.source.path
        if self.source.kind == "gguf":
            from cushion_deploy.modeling.gguf import convert_gguf

            folder = self.stage("model", {"model": self.source.digest}, lambda out: convert_gguf(self.source, out))
        with self.clock("load"):
            return load_folder(folder, self.source)

    @property
    def scheme(self) -> QuantScheme:
        """What is quantized."""
        base = PRECISIONS[self.recipe.precision]
        return QuantScheme(base.name, base.weight_bits, base.activation_bits, self.recipe.export.quantize_head)

    def corpus(self, data: str | None, part: Part) -> Corpus:
        """Return a corpus; text sampled from the model is drawn once and kept in the store."""
        from cushion_deploy.calib.corpora import load_corpus

        return load_corpus(data, part, self._sampled_text)

    def stage(self, name: str, parents: dict[str, Any], make: Callable[[Path], None]) -> Path:
        """Return the folder of a finished stage, made now or earlier.

        Args:
            name: of the stage.
            parents: everything that decides its result; becomes the key, with the version of the program.
            make: writes the result into an empty folder.
        """
        key = self.key(name, parents)
        start = time.monotonic()
        folder = self.store.find(name, key)
        reused = folder is not None
        if folder is None:
            logger.info("%s: running", name)
            with self.store.write(name, key) as staged:
                make(staged)
            folder = self.store.find(name, key)
            if folder is None:
                raise UsageError(f"stage {name} vanished from {self.store.root}", hint="do not touch the work folder")
        self.times.append(StageTime(name, time.monotonic() - start, reused))
        return folder

    def key(self, name: str, parents: dict[str, Any]) -> str:
        """Return the key of a stage."""
        return digest_json({"stage": name, "version": tool_version(), **parents})

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Time a step that leaves nothing in the store."""
        start = time.monotonic()
        yield
        self.times.append(StageTime(name, time.monotonic() - start, False))

    def _sampled_text(self) -> str:
        from cushion_deploy.modeling.sample import sample_text

        def make(out: Path) -> None:
            (out / "text.txt").write_text(sample_text(self.model, self.recipe.seed, self.progress), encoding="utf-8")

        folder = self.stage("sample", {"model": self.source.digest, "seed": self.recipe.seed}, make)
        return (folder / "text.txt").read_text(encoding="utf-8")
