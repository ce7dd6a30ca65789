"""Convert: dequantize a GGUF file into a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.modeling.source import ModelSource
from cushion_deploy.stages.base import Stage
from cushion_deploy.stages.run import Inputs


@dataclass(frozen=True)
class Convert(Stage[Path]):
    """Convert a GGUF file once, so that later runs read the folder.

    Attributes:
        source: the validated file.
    """

    name: ClassVar[str] = "convert"
    version: ClassVar[int] = 2
    source: ModelSource

    @property
    def known_digest(self) -> str:
        """The digest of the file."""
        return self.source.digest

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write config, tokenizer and safetensors."""
        from cushion_deploy.modeling.gguf import convert_gguf

        convert_gguf(self.source, out, inputs.progress)

    def read(self, folder: Path) -> Path:
        """Return the folder."""
        return folder

    def room(self, inputs: Inputs) -> int:
        """Allow for eight times the file: GGUF may use half a byte per parameter, the converted model uses four."""
        return 8 * self.source.path.stat().st_size

    def disk(self, spec: ModelSpec) -> int:
        """Return four bytes per parameter."""
        return 4 * spec.parameters
