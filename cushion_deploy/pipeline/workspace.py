"""What the stages of one run share: recipe, store of finished stages, clock, and the model, loaded only if needed."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.schemes import PRECISIONS, QuantScheme
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.source import ModelSource, resolve_source
from cushion_deploy.pipeline.files import read_json, write_json
from cushion_deploy.recipe import Recipe
from cushion_deploy.store import StageStore, hash_file, require_space
from cushion_deploy.store.digests import digest_json

if TYPE_CHECKING:
    from cushion_deploy.calib.corpora import Corpus, Part
    from cushion_deploy.modeling.runner import TorchRunner

logger = logging.getLogger(__name__)
PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "gguf", "numpy", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "tokenizers")


@cache
def computed_by() -> dict[str, str]:
    """Return what a result depends on beside its inputs: this program's own source, libraries, and the processor."""
    h = hashlib.sha256()
    # os.walk, because in a checkout export, engines and calib are links, which Path.rglob does not enter.
    sources = (Path(top) / name for top, _, names in os.walk(PACKAGE, followlinks=True) for name in names)
    for file in sorted(path for path in sources if path.suffix == ".py"):
        h.update(f"{file.relative_to(PACKAGE)}:{hash_file(file)};".encode())
    machine = {"source": h.hexdigest(), "machine": platform.machine(), "cpu": cpu_flags()}
    return {**machine, **installed_versions(LIBRARIES)}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_flags() -> str:
    """Return a digest of the instruction sets of the processor, which decide the kernels; empty where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return digest_json(sorted(flags))


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
    _corpora: dict[tuple[str | None, str], Corpus] = field(default_factory=dict, repr=False)

    @cached_property
    def source(self) -> ModelSource:
        """The checked model on disk."""
        if self.recipe.model is None:
            raise UsageError("no model was given", hint="add --model FILE.gguf, --model FOLDER or --model org/name")
        return resolve_source(self.recipe.model, self.recipe.revision)

    @cached_property
    def model(self) -> TorchRunner:
        """The model in torch; a GGUF file is converted once and kept in the store."""
        from cushion_deploy.modeling.load import load_folder

        folder = self.source.path
        if self.source.kind == "gguf":
            folder = self.stage("model", {"model": self.source.digest}, self._convert, self._converted_size)
        import torch

        # A probability below 1e-38 means nothing, and makes most processors a hundred times slower.
        torch.set_flush_denormal(True)
        with self.clock("load"):
            return load_folder(folder, self.source, self.progress)

    def _convert(self, out: Path) -> None:
        from cushion_deploy.modeling.gguf import convert_gguf

        convert_gguf(self.source, out, self.progress)

    def folded(self, smoothing: Smoothing | None) -> TorchRunner:
        """Return the model with a smoothing folded in; the last one is kept."""
        return self.model.folded(smoothing)

    def altered(self, settings: Mapping[str, Any]) -> Workspace:
        """Return a run with some settings of the recipe replaced that shares all else with this one."""
        recipe = self.recipe.merged(settings)
        return _Altered(recipe, self.store, self.progress, self.times, self._corpora, origin=self)

    @property
    def scheme(self) -> QuantScheme:
        """What is quantized."""
        return replace(PRECISIONS[self.recipe.precision], quantize_head=self.recipe.export.quantize_head)

    def corpus(self, data: str | None, part: Part) -> Corpus:
        """Return a corpus; text sampled from the model is drawn once and kept in the store."""
        from cushion_deploy.calib.corpora import load_corpus

        known = self._corpora.get((data, part))
        if known is None:
            known = self._corpora[data, part] = load_corpus(data, part, self._sampled_text)
        return known

    def stage(
        self,
        name: str,
        parents: dict[str, Any],
        make: Callable[[Path], None],
        space: Callable[[], int] | None = None,
    ) -> Path:
        """Return the folder of a finished stage, made now or earlier.

        Args:
            name: of the stage.
            parents: everything that decides its result; becomes the key, with the version of the program.
            make: writes the result into an empty folder.
            space: returns about how many bytes it writes, where that is much; asked only if it has to run.

        Raises:
            UsageError: the disk has no room for them.
        """
        key = self.key(name, parents)
        start, inner = time.monotonic(), self._timed()
        folder = self.store.find(name, key)
        reused = folder is not None
        if folder is None:
            logger.info("%s: running", name)
            if space:
                require_space(self.store.root, space())
            with self.store.write(name, key) as staged:
                make(staged)
            folder = self.store.find(name, key)
            if folder is None:
                raise UsageError(f"stage {name} vanished from {self.store.root}", hint="do not touch the work folder")
        # A stage that needs the model runs the load inside its own time: that time is the load's.
        self.times.append(StageTime(name, time.monotonic() - start - (self._timed() - inner), reused))
        return folder

    def key(self, name: str, parents: dict[str, Any]) -> str:
        """Return the key of a stage."""
        return digest_json({"stage": name, "computed by": computed_by(), **parents})

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Time a step that leaves nothing in the store."""
        start = time.monotonic()
        yield
        self.times.append(StageTime(name, time.monotonic() - start, False))

    def _timed(self) -> float:
        return sum(t.seconds for t in self.times)

    def _sample_parents(self) -> dict[str, Any]:
        return {"model": self.source.digest, "seed": self.recipe.seed}

    def _converted_size(self) -> int:
        # A GGUF file may spend half a byte on a parameter; converted it takes four.
        return 8 * self.source.path.stat().st_size

    def _sampled_text(self) -> tuple[str, ...]:
        from cushion_deploy.modeling.sample import sample_text

        def make(out: Path) -> None:
            write_json(out / "documents.json", sample_text(self.model, self.recipe.seed, self.progress))

        folder = self.stage("sample", self._sample_parents(), make)
        return tuple(read_json(folder / "documents.json"))


@dataclass
class _Altered(Workspace):
    """A run that shares the model and the texts of the run it comes from."""

    origin: Workspace = field(kw_only=True)

    @cached_property
    def source(self) -> ModelSource:
        return self.origin.source

    @cached_property
    def model(self) -> TorchRunner:
        return self.origin.model
