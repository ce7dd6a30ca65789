"""Convert a GGUF file to a Hugging Face folder with float32 safetensors, so that later loads are fast."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.errors import CushionError, UntrustedArtifact, UsageError
from cushion_deploy.families import family_for_model_type
from cushion_deploy.modeling.source import ModelSource
from cushion_deploy.modeling.transformers_progress import reported_bars

MODEL_TYPES = {"gemma3": "gemma3_text"}
"""GGUF architectures that have another name in transformers."""


def convert_gguf(source: ModelSource, folder: Path, progress: Progress = silent) -> None:
    """Write config, tokenizer and dequantized float32 weights of a GGUF file into ``folder``.

    Args:
        source: the checked file.
        folder: an existing folder to write to.
        progress: where to report progress.

    Raises:
        UntrustedArtifact: the file is truncated or malformed.
        UsageError: its architecture or its rotary scaling is not supported.
    """
    with _one_reader(source.path), reported_bars(progress):
        architecture = _architecture(source.path)
        family_for_model_type(MODEL_TYPES.get(architecture, architecture))
        _convert(source, folder)


@contextmanager
def _one_reader(path: Path) -> Iterator[None]:
    """Parse a file once within the context: transformers opens it for the config, the weights and the tokenizer.

    Reading the 262,144 tokens of a vocabulary takes seconds every time.
    """
    import gguf

    usual, readers = gguf.GGUFReader, {}

    def reader(file: Any, *options: Any) -> Any:
        if Path(file) != path or options:
            return usual(file, *options)
        if path not in readers:
            readers[path] = usual(file)
        return readers[path]

    gguf.GGUFReader = reader
    try:
        yield
    finally:
        gguf.GGUFReader = usual


def _convert(source: ModelSource, folder: Path) -> None:
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    except CushionError:
        raise
    except Exception as e:  # what transformers and gguf raise for damaged files shares no other base
        raise _damaged(source.path, e) from e
    _require_complete(source.path, model, loaded["missing_keys"])
    # transformers refuses to save a model whose config says that it came from GGUF: drop that entry.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with init_empty_weights(include_buffers=False):
        fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _require_complete(path: Path, model: Any, missing: Collection[str]) -> None:
    """Refuse a file with tensors that the model does not have, or without one that it has.

    transformers leaves out the former and invents the latter.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, model.config.num_hidden_layers)
    read = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
    unused = sorted({tensor.name for tensor in reader.tensors} - read)
    for problem, found in (("has tensors that its architecture does not use", unused), ("lacks tensors", missing)):
        if found:
            raise UsageError(
                f"{path.name} {problem}: {', '.join(sorted(found)[:3])}",
                hint="fetch it again; if it is as its author published it, give the model as a Hugging Face folder",
            )


def _architecture(path: Path) -> str:
    """Return ``general.architecture`` after checking that the file contains every tensor completely."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        for tensor in reader.tensors:
            if tensor.data_offset + tensor.n_bytes > path.stat().st_size:
                raise ValueError(f"tensor {tensor.name} extends past the end of the file")
        field = reader.fields["general.architecture"]
    except (ValueError, KeyError, IndexError, OSError, struct.error) as e:
        raise _damaged(path, e) from e
    _require_unscaled_rotary(path, reader)
    return str(field.contents())


def _require_unscaled_rotary(path: Path, reader: Any) -> None:
    """Refuse a file with scaled rotary positions, because transformers would load it without the scaling."""
    keys = [key for key in reader.fields if key.endswith((".rope.scaling.type", ".rope.scaling.factor"))]
    kinds = {key: reader.fields[key].contents() for key in keys}
    scaled = [key for key, kind in kinds.items() if kind not in ("none", 0.0, 1.0)]
    scaled += [tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs", "rope_factors"))]
    if scaled:
        raise UsageError(
            f"{path.name} scales its rotary positions ({scaled[0]}), which transformers does not read from GGUF",
            hint="give the model as a Hugging Face folder or hub id",
        )


def _damaged(path: Path, error: Exception) -> UntrustedArtifact:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if reason.startswith("cannot reshape array"):
        # What numpy says where the file ends within a tensor.
        reason = f"it ends within a tensor, after {path.stat().st_size:,} bytes"
    return UntrustedArtifact(f"{path.name} is truncated or damaged: {reason}", hint="download the GGUF file again")
