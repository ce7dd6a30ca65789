"""Sensitivity: what each quantized Site costs, and which Sites stay in floating point for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError
from cushion_deploy.families import get_family
from cushion_deploy.stages.base import Derived, Node, Speed, Stage
from cushion_deploy.stages.load import ModelFiles
from cushion_deploy.stages.quantization import AssembleQuantization
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.search import NoPrefix
from cushion_deploy.stages.windows import spread_windows
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

WINDOWS, WINDOW = 2, 256
"""Windows of text, and tokens in each, that Sites are compared on."""
SITES_A_LAYER = 4
COSTS = "costs.json"


@dataclass(frozen=True)
class Sensitivity(Stage[dict[Site, float]]):
    """Measure what each Site costs when it alone is quantized, in nats a token on calibration text.

    Attributes:
        model: in floating point.
        quantization: everything quantized.
        text: the calibration text.
    """

    name: ClassVar[str] = "sensitivity"
    version: ClassVar[int] = 1
    model: Node[TorchRunner]
    quantization: AssembleQuantization
    text: Node[Corpus]

    @property
    def label(self) -> str:
        """The name; a build compares Sites behind the prefix and without one."""
        return f"{self.name}-without-prefix" if isinstance(self.quantization.prefix, NoPrefix) else self.name

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write Site to cost, in the order of the computation."""
        from cushion_deploy.calib.sensitivity import site_costs

        model, quantization = inputs.get(self.model), inputs.get(self.quantization)
        length = min(WINDOW, model.spec.max_positions - quantization.prefix.length)
        windows = spread_windows(model, inputs.get(self.text), WINDOWS, length)
        write_json(out / COSTS, site_costs(model, quantization, windows, inputs.progress))

    def read(self, folder: Path) -> dict[Site, float]:
        """Return Site to cost."""
        found: dict[Site, float] = read_json(folder / COSTS)
        return found

    def digest_of(self, artifact: dict[Site, float]) -> str:
        """Return the digest of the costs."""
        return digest_json(artifact)

    def seconds(self, speed: Speed) -> float:
        """One pass a Site."""
        return SITES_A_LAYER * speed.spec.num_layers * WINDOWS * WINDOW * speed.whole


@dataclass(frozen=True)
class ChooseScheme(Derived[QuantScheme]):
    """The scheme with the Sites that the recipe keeps in floating point, named or found by their cost.

    Attributes:
        files: says which Sites the model has.
        scheme: everything quantized.
        wishes: names of Sites, and ``auto:N`` for the N that cost most.
        sensitivity: what Sites cost; None where no wish asks for it.
    """

    files: Node[ModelFiles]
    scheme: QuantScheme
    wishes: tuple[str, ...]
    sensitivity: Node[dict[Site, float]] | None

    def make(self, inputs: Inputs) -> QuantScheme:
        """Return the scheme.

        Raises:
            UsageError: a wish that names no Site of the model, or no number.
        """
        if not self.wishes:
            return self.scheme
        spec = inputs.get(self.files).spec
        known = list(get_family(spec.family).linears(spec, head=self.scheme.quantize_head))
        named = [Site(wish) for wish in self.wishes if not is_automatic(wish)]
        unknown = [site for site in named if site not in known]
        if unknown:
            raise UsageError(
                f"export.keep_float names '{unknown[0]}', which is no quantized Site of this model",
                hint=f"Sites are called {known[0]} to {known[-1]}; or give auto:N",
            )
        count = sum(_automatic(wish) for wish in self.wishes if is_automatic(wish))
        if self.sensitivity and count:
            costs = inputs.get(self.sensitivity)
            named += [site for site in sorted(costs, key=lambda s: -costs[s]) if site not in named][:count]
        chosen = set(named)
        return replace(self.scheme, float_sites=tuple(site for site in known if site in chosen))


def is_automatic(wish: str) -> bool:
    """Return whether a wish of ``export.keep_float`` asks for the Sites that cost most."""
    return wish.startswith("auto:")


def _automatic(wish: str) -> int:
    number = wish.partition(":")[2]
    if not number.isdecimal() or int(number) == 0:
        raise UsageError(f"export.keep_float holds '{wish}'", hint="write auto:N with N of 1 or more, such as auto:4")
    return int(number)
