"""Load: the model in memory, and the files of it that a bundle carries."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.modeling.source import ModelSource
from cushion_deploy.stages.base import Derived, Node, Stage
from cushion_deploy.stages.run import Inputs
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

SPEC = "spec.json"


@dataclass(frozen=True)
class Load(Derived["TorchRunner"]):
    """The model in torch.

    Attributes:
        source: the checked model on disk.
        converted: a Hugging Face folder made of it; None where the source is one.
    """

    timed: ClassVar[bool] = True
    source: ModelSource
    converted: Node[Path] | None = None

    @property
    def label(self) -> str:
        """``load``."""
        return "load"

    @property
    def known_digest(self) -> str:
        """The digest of the source: a stage that is reused loads no model."""
        return self.source.digest

    def make(self, inputs: Inputs) -> TorchRunner:
        """Load it."""
        import torch

        from cushion_deploy.modeling.load import load_folder

        folder = inputs.get(self.converted) if self.converted else self.source.path
        # A probability below 1e-38 means nothing, and makes most processors a hundred times slower.
        torch.set_flush_denormal(True)
        return load_folder(folder, self.source, inputs.progress)


@dataclass(frozen=True)
class ModelFiles:
    """Configuration and tokenizer in a folder, and what the model is."""

    folder: Path
    spec: ModelSpec

    @property
    def paths(self) -> list[Path]:
        """The files that a bundle carries."""
        own = {SPEC, "stage.json"}
        return [file for file in sorted(self.folder.iterdir()) if file.name not in own]


@dataclass(frozen=True)
class DescribeModel(Stage[ModelFiles]):
    """Write down what a model is, so that later runs need not load it to know.

    Attributes:
        model: the model.
        generation: digest of its chat templates and generation settings, which the model's digest does not cover.
    """

    name: ClassVar[str] = "tokenizer"
    version: ClassVar[int] = 1
    model: Node[TorchRunner]
    generation: str

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write configuration, tokenizer and ``spec.json``."""
        model = inputs.get(self.model)
        model.module.config.save_pretrained(out)
        model.module.generation_config.save_pretrained(out)
        model.tokenizer.save_pretrained(out)
        _name_tokenizer(out / "tokenizer_config.json")
        write_json(out / SPEC, asdict(model.spec))

    def read(self, folder: Path) -> ModelFiles:
        """Return the folder and the spec."""
        return ModelFiles(folder, ModelSpec.from_json(read_json(folder / SPEC)))

    def digest_of(self, artifact: ModelFiles) -> str:
        """Return a digest of the model, its chat templates and its generation settings."""
        return digest_json([artifact.spec.weights_digest, self.generation])


def _name_tokenizer(file: Path) -> None:
    """Give a generic tokenizer the class name that transformers 4, and optimum with it, knows as well."""
    config = read_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
