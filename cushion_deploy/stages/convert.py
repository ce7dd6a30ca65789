"""Convert: a GGUF file as a Hugging Face folder."""

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
    """Dequantize a GGUF file once.

    Attributes:
        source: the checked file.
    """

    name: ClassVar[str] = "convert"
    version: ClassVar[int] = 1
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
        """A GGUF file may take half a byte for a parameter; converted it takes four."""
        return 8 * self.source.path.stat().st_size

    def disk(self, spec: ModelSpec) -> int:
        """Four bytes a parameter."""
        return 4 * spec.parameters
