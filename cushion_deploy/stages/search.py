"""Search: find the prefix by Algorithm 1 of the paper; also what precedes a text if there is no prefix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.artifacts import read_prefix, write_prefix
from cushion_deploy.core.prefix import PREFIX_FILE, Prefix
from cushion_deploy.families import get_family
from cushion_deploy.prefix.trace import SearchTrace
from cushion_deploy.recipe import Search as SearchSettings
from cushion_deploy.stages.base import Derived, Node, Part, Speed, Stage
from cushion_deploy.stages.load import ModelFiles
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.windows import require_positions
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

TRACE = "trace.json"


@dataclass(frozen=True)
class FoundPrefix:
    """The prefix that a search found, and the trace of the search."""

    prefix: Prefix
    trace: SearchTrace


@dataclass(frozen=True)
class Search(Stage[FoundPrefix]):
    """Search for a prefix.

    Attributes:
        model: the model in floating point.
        text: the calibration text, on which candidates are scored.
        search: the recipe's section.
        seed: seed of every random choice.
    """

    name: ClassVar[str] = "search"
    version: ClassVar[int] = 6
    shared: ClassVar[bool] = True
    model: Node[TorchRunner]
    text: Node[Corpus]
    search: SearchSettings
    seed: int

    @property
    def prefix(self) -> Node[Prefix]:
        """The prefix without the trace."""
        return Part(self, "prefix")

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the prefix and the trace."""
        from cushion_deploy.prefix.search import PrefixSearch

        model = inputs.get(self.model)
        require_positions("search.text_tokens", self.search.text_tokens, self.search.max_length, model.spec)
        ids = model.encode(inputs.get(self.text).text)
        prefix, trace = PrefixSearch(model, ids, self.search, self.seed, inputs.scratch, inputs.progress).run()
        write_prefix(prefix, out / PREFIX_FILE)
        write_json(out / TRACE, trace.to_json())

    def read(self, folder: Path) -> FoundPrefix:
        """Return the prefix and the trace."""
        return FoundPrefix(read_prefix(folder / PREFIX_FILE), SearchTrace.from_json(read_json(folder / TRACE)))

    def seconds(self, speed: Speed) -> float:
        """Sum the text without candidates, the screen, the rungs of the candidates, the audit and the average."""
        from cushion_deploy.prefix.average import WINDOW, WINDOWS
        from cushion_deploy.prefix.search import FINALISTS, KEEP, RUNGS

        config, vocabulary = self.search, speed.spec.vocab_size
        windows = WINDOWS * WINDOW * (speed.layers + 2 * speed.compared + 2 * speed.scored)
        averaged = config.average_tokens * speed.screened + windows if config.average_tokens else 0.0
        if config.mode == "exhaustive":
            # The last step finds nothing.
            return (1 + speed.search_steps) * vocabulary * (config.text_tokens + 1) * speed.scored + averaged
        screened = min(config.screen_tokens or vocabulary, vocabulary) * speed.depth * speed.screened
        candidates = config.random_candidates + config.screen_candidates + config.gradient_candidates
        filtered = candidates * (RUNGS[0] + KEEP[0] * RUNGS[1]) * speed.depth * speed.scored
        exact = (FINALISTS + config.audit_tokens) * config.text_tokens * speed.scored
        return 3 * config.text_tokens * speed.scored + speed.search_steps * (screened + filtered + exact) + averaged


@dataclass(frozen=True)
class NoPrefix(Derived[Prefix]):
    """What precedes a text if there is no prefix: nothing, or the ``<bos>`` that some families always need.

    Sliding windows move past that ``<bos>``, so that what is measured behind it is measured on the original model.

    Attributes:
        model: the model.
        files: identifies the family.
        bare: whether to omit that ``<bos>`` as well.
    """

    model: Node[TorchRunner]
    files: Node[ModelFiles]
    bare: bool = False

    def make(self, inputs: Inputs) -> Prefix:
        """Return the empty prefix without loading the model, or the one that holds ``<bos>``."""
        spec = inputs.get(self.files).spec
        if self.bare or not get_family(spec.family).needs_bos:
            return Prefix.empty(spec)
        return inputs.get(self.model).no_prefix()
