"""report.json as immutable types (schema 1): the only input of the page, the figures and the terminal summary."""

from cushion_deploy.report.document.artifacts import Engine, Export, ParityRow
from cushion_deploy.report.document.build import Environment, Model, Stage, Tool
from cushion_deploy.report.document.prefix import Candidate, Rank, Search, SearchStep, Tuning, TuningState
from cushion_deploy.report.document.quality import Divergence, LayerMagnitude, Magnitudes, Perplexity
from cushion_deploy.report.document.quantization import Calibration, KvCache, SiteScale
from cushion_deploy.report.document.report import REPORT_JSON, Report, read_report

__all__ = [
    "REPORT_JSON",
    "Calibration",
    "Candidate",
    "Divergence",
    "Engine",
    "Environment",
    "Export",
    "KvCache",
    "LayerMagnitude",
    "Magnitudes",
    "Model",
    "ParityRow",
    "Perplexity",
    "Rank",
    "Report",
    "Search",
    "SearchStep",
    "SiteScale",
    "Stage",
    "Tool",
    "Tuning",
    "TuningState",
    "read_report",
]
