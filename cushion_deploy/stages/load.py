"""Load: the model in memory, and the model files that a bundle carries."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.progress import elapsed
from cushion_deploy.modeling.source import ModelSource
from cushion_deploy.recipe import Compute
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
        source: the validated model on disk.
        converted: the Hugging Face folder it was converted to; None if the source already is one.
        dtype: floating-point type to compute in.
        compute: device and memory; they change how long a stage takes, and results by rounding only.
    """

    timed: ClassVar[bool] = True
    exclusive: ClassVar[bool] = True
    source: ModelSource
    converted: Node[Path] | None = None
    dtype: Dtype = "float32"
    compute: Compute = field(default=Compute(), compare=False)

    @property
    def label(self) -> str:
        """``load``."""
        return "load"

    @property
    def known_digest(self) -> str:
        """The digest of the source and of the type, so that reusing a stage does not load the model."""
        return self.source.digest if self.dtype == "float32" else digest_json([self.source.digest, self.dtype])

    def ran_on(self, artifact: TorchRunner) -> str:
        """Return device and floating-point type."""
        from cushion_deploy.modeling.devices import device_name

        return f"{device_name(artifact.device)}, {self.dtype}"

    def make(self, inputs: Inputs) -> TorchRunner:
        """Load the model."""
        with elapsed(inputs.progress, "importing PyTorch and transformers"):
            import torch

            from cushion_deploy.modeling.load import load_folder

        folder = inputs.get(self.converted) if self.converted else self.source.path
        # Flush denormals: a probability below 1e-38 has no effect but slows most processors down a hundredfold.
        torch.set_flush_denormal(True)
        compute = self.compute.model_copy(update={"dtype": self.dtype})
        processes = inputs.run.processes
        return load_folder(folder, self.source, inputs.progress, compute=compute, processes=processes)


@dataclass(frozen=True)
class ModelFiles:
    """A folder with the configuration and tokenizer of a model, and the model's spec."""

    folder: Path
    spec: ModelSpec

    @property
    def paths(self) -> list[Path]:
        """The files that a bundle carries."""
        own = {SPEC, "stage.json"}
        return [file for file in sorted(self.folder.iterdir()) if file.name not in own]


@dataclass(frozen=True)
class DescribeModel(Stage[ModelFiles]):
    """Write the configuration, tokenizer and spec of a model, so that later runs need not load it to read them.

    Attributes:
        model: the model.
        generation: digest of its chat templates and generation settings, which the model's digest does not cover.
    """

    name: ClassVar[str] = "tokenizer"
    version: ClassVar[int] = 2
    runs_model: ClassVar[bool] = False
    model: Node[TorchRunner]
    generation: str

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the configuration, the tokenizer and ``spec.json``."""
        model = inputs.get(self.model)
        model.module.config.save_pretrained(out)
        # Not save_pretrained, which refuses combinations that checkpoints have, such as a temperature without sampling.
        model.module.generation_config.to_json_file(out / "generation_config.json")
        model.tokenizer.save_pretrained(out)
        _name_tokenizer(out / "tokenizer_config.json")
        write_json(out / SPEC, asdict(model.spec))

    def read(self, folder: Path) -> ModelFiles:
        """Return the folder and the spec."""
        return ModelFiles(folder, ModelSpec.from_json(read_json(folder / SPEC)))


def _name_tokenizer(file: Path) -> None:
    """Replace the class name of a generic tokenizer by one that transformers 4, and with it optimum, also knows."""
    config = read_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def compute_dtype(compute: Compute, source: ModelSource) -> Dtype:
    """Return the floating-point type to compute in; torch is imported only if the answer depends on the device."""
    if compute.dtype != "auto":
        return compute.dtype
    if source.dtype == "float32" or compute.device == "cpu":
        return "float32"
    from cushion_deploy.modeling.devices import resolve_dtype

    return resolve_dtype(compute, source.dtype)
