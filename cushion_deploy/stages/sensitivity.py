"""Sensitivity: measure the cost of quantizing each Site, and choose the Sites that stay in floating point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.model_spec import ModelSpec
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
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

WINDOWS, WINDOW = 2, 256
"""Number of windows, and tokens in each, on which Sites are compared."""
SITES_A_LAYER = 4
COSTS = "costs.json"


@dataclass(frozen=True)
class Sensitivity(Stage[dict[Site, float]]):
    """Measure the cost of each Site when it alone is quantized, in nats per token on calibration text.

    Attributes:
        model: the model in floating point.
        quantization: the quantization with every Site quantized.
        text: the calibration text.
    """

    name: ClassVar[str] = "sensitivity"
    version: ClassVar[int] = 4
    shared: ClassVar[bool] = True
    model: Node[TorchRunner]
    quantization: AssembleQuantization
    text: Node[Corpus]

    @property
    def label(self) -> str:
        """The name; a build compares Sites with the prefix and without one."""
        return f"{self.name}-without-prefix" if isinstance(self.quantization.prefix, NoPrefix) else self.name

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the cost of each Site, in the order of computation."""
        from cushion_deploy.calib.sensitivity import site_costs

        model, quantization = inputs.get(self.model), inputs.get(self.quantization)
        length = min(WINDOW, model.spec.max_positions - quantization.prefix.length)
        windows = spread_windows(model, inputs.get(self.text), WINDOWS, length)
        write_json(out / COSTS, site_costs(model, quantization, windows, inputs.progress))

    def read(self, folder: Path) -> dict[Site, float]:
        """Return the cost of each Site."""
        found: dict[Site, float] = read_json(folder / COSTS)
        return found

    def seconds(self, speed: Speed) -> float:
        """Count one compared pass per Site."""
        return SITES_A_LAYER * speed.spec.num_layers * WINDOWS * WINDOW * speed.compared + speed.swap


@dataclass(frozen=True)
class ChooseScheme(Derived[QuantScheme]):
    """The scheme with the Sites that the recipe keeps in floating point, given by name or chosen by cost.

    Attributes:
        files: determine which Sites the model has.
        scheme: the scheme with every Site quantized.
        keep_float: entries of ``export.keep_float``: names of Sites, and ``auto:N`` for the N most costly ones.
        sensitivity: cost of each Site; None if no entry is automatic.
        embedding: whether the token embedding is stored as INT8 codes; None if the scheme says so.
    """

    files: Node[ModelFiles]
    scheme: QuantScheme
    keep_float: tuple[str, ...]
    sensitivity: Node[dict[Site, float]] | None
    embedding: Node[bool] | None = None

    def make(self, inputs: Inputs) -> QuantScheme:
        """Return the scheme.

        Raises:
            UsageError: an entry names a Site that the model does not have, or ``auto:`` lacks a number.
        """
        scheme = replace(self.scheme, int8_embedding=inputs.get(self.embedding)) if self.embedding else self.scheme
        if not self.keep_float:
            return scheme
        known = check_keep_float(inputs.get(self.files).spec, self.scheme, self.keep_float)
        named = [Site(entry) for entry in self.keep_float if not is_automatic(entry)]
        count = sum(_automatic(entry) for entry in self.keep_float if is_automatic(entry))
        if self.sensitivity and count:
            costs = inputs.get(self.sensitivity)
            named += [site for site in sorted(costs, key=lambda s: -costs[s]) if site not in named][:count]
        chosen = set(named)
        return replace(scheme, float_sites=tuple(site for site in known if site in chosen))


def check_keep_float(spec: ModelSpec, scheme: QuantScheme, keep_float: tuple[str, ...]) -> list[Site]:
    """Return the Sites that a scheme quantizes in a model, in the order of computation.

    Raises:
        UsageError: an entry of ``export.keep_float`` is not one of them, ``auto:`` lacks a number, or no Site is
            left to quantize.
    """
    known = list(get_family(spec.family).linears(spec, head=scheme.quantize_head))
    kept = len({entry for entry in keep_float if not is_automatic(entry)})
    for entry in keep_float:
        if is_automatic(entry):
            kept += _automatic(entry)
        elif entry not in known:
            raise UsageError(
                f"export.keep_float names '{entry}', which is not a quantized Site of this model",
                hint=f"Sites are named {known[0]} to {known[-1]}; or give auto:N",
            )
    if kept >= len(known):
        raise UsageError(
            f"export.keep_float keeps all {len(known)} Sites of this model, so nothing would be quantized",
            hint="keep fewer, or `cushion-deploy export --float` for a graph in floating point",
        )
    return known


def is_automatic(entry: str) -> bool:
    """Return whether an entry of ``export.keep_float`` asks for the most costly Sites."""
    return entry.startswith("auto:")


def _automatic(entry: str) -> int:
    number = entry.partition(":")[2]
    if not number.isdecimal() or int(number) == 0:
        raise UsageError(f"export.keep_float holds '{entry}'", hint="write auto:N with N of 1 or more, such as auto:4")
    return int(number)
