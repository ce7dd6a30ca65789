"""Read the file of an exported graph, whose tensors lie in a file beside it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from cushion_deploy.errors import UsageError


def read_model(path: Path) -> ir.Model:
    """Return a graph; its tensors are read from the files beside it when their values are used.

    Raises:
        UsageError: such a file has a second hard link. onnx_ir refuses to read it, because someone who may write to the
            folder could have linked a file that only this user may read.
    """
    model = ir.load(path)
    for tensor in (value.const_value for value in model.graph.initializers.values()):
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).stat().st_nlink > 1:
            raise UsageError(
                f"{tensor.path} has a second hard link, for example from a copy by `cp -l`",
                hint=f"replace it by a copy: `cp -r {path.parent} COPY`, and use that, or remove the other link",
            )
    return model
