"""Load a checked Hugging Face folder into a TorchRunner."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.processes import SINGLE, Processes
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import CushionError, UsageError
from cushion_deploy.families import Family
from cushion_deploy.modeling.checkpoint import Checkpoint
from cushion_deploy.modeling.describe import describe
from cushion_deploy.modeling.devices import DTYPES, resolve_device, resolve_dtype, weight_memory
from cushion_deploy.modeling.placement import PlacedWeights
from cushion_deploy.modeling.quantized_formats import stored_format
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import ModelSource, check_config, read_json
from cushion_deploy.modeling.text_tower import decoder_config
from cushion_deploy.modeling.unused_tensors import Harmless
from cushion_deploy.recipe import Compute

logger = logging.getLogger(__name__)
ON_CPU = Compute(device="cpu", dtype="float32")


def load_folder(
    folder: Path,
    source: ModelSource,
    progress: Progress = silent,
    *,
    compute: Compute = ON_CPU,
    processes: Processes = SINGLE,
) -> TorchRunner:
    """Load a Hugging Face folder, frozen, without remote code.

    Args:
        folder: the folder of ``source``, or the one that :func:`convert_gguf` wrote.
        source: where the model came from; its digest identifies the model.
        progress: where to report progress.
        compute: device, floating-point type and memory. Layers that do not fit are streamed from the folder.
        processes: the processes that load the same model.

    Raises:
        UsageError: the model is not a supported decoder, its tensors do not match its config, or the device is not
            there.
        UntrustedArtifact: the weights are damaged.
    """
    written = read_json(folder / "config.json", "give a Hugging Face folder")
    family, device = check_config(written), resolve_device(compute.device, processes)
    dtype = DTYPES[resolve_dtype(compute, source.dtype)]
    checkpoint = Checkpoint(folder, family, stored_format(written))
    config = _decoder_config(folder, source)
    notes = [_untied(config, checkpoint, family)]
    module = _empty_module(folder, config, family, source, dtype)
    spec = describe(module, family, source)
    _require_tensors(module, checkpoint, spec, family, source)
    left_out = checkpoint.keep(module.state_dict().keys(), spec.num_layers, _further_layers(written))
    notes += [_dequantized(checkpoint), *(_left_out(kind, count) for kind, count in left_out.items() if kind.notable)]
    if processes.leads:
        for note in filter(None, notes):
            logger.warning("%s: %s", source.label, note)
    placed = PlacedWeights(module, checkpoint, family, spec, device, dtype)
    streamed = placed.plan(weight_memory(compute, device, processes))
    if streamed:
        logger.warning(
            "%d of %d layers do not fit into memory and are read from the checkpoint in every pass, which is slower",
            len(streamed),
            spec.num_layers,
        )
    for path in streamed:
        placed.stream(module.get_submodule(path), path)
    placed.load(progress)
    tokenizer = _tokenizer(folder, source)
    sites = bind_sites(module, family, spec)
    return TorchRunner(spec, family, module, tokenizer, sites, checkpoint, folder, placed, processes=processes)


def _decoder_config(folder: Path, source: ModelSource) -> Any:
    """Return the configuration of the decoder, without what says that its weights are quantized."""
    from transformers import AutoConfig

    try:
        config = decoder_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except CushionError:
        raise
    except Exception as e:  # the classes that transformers raises for wrong values share no other base
        raise _not_loadable(source, e) from e
    for key in ("quantization_config", "compression_config"):
        if hasattr(config, key):
            delattr(config, key)
    return config


def _untied(config: Any, checkpoint: Checkpoint, family: Family) -> str:
    """Correct a configuration that ties the head to the embedding although the checkpoint has a head of its own.

    transformers does the same. Returns the sentence for the user; empty if there is nothing to say.
    """
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if not config.tie_word_embeddings or not checkpoint.untie(head, embedding):
        return ""
    config.tie_word_embeddings = False
    return (
        f"config.json sets tie_word_embeddings, but {head} differs from the embedding: the head of the checkpoint is "
        "used, as transformers does"
    )


def _further_layers(written: dict[str, Any]) -> int:
    """Return the number of layers behind those of the model that predict further tokens."""
    count = written.get("num_nextn_predict_layers", 0)
    return count if isinstance(count, int) else 0


def _dequantized(checkpoint: Checkpoint) -> str:
    found = checkpoint.quantized()
    if not found:
        return ""
    kinds = " and ".join(f"{count} as {kind}" for kind, count in sorted(found.items()))
    return (
        f"weights are stored quantized ({kinds}) and are dequantized; quality is measured against these, "
        "not against the model that they were quantized from"
    )


def _left_out(kind: Harmless, count: int) -> str:
    return f"left out: {kind.reason} (tensors: {count})"


def _empty_module(folder: Path, config: Any, family: Family, source: ModelSource, dtype: torch.dtype) -> Any:
    """Return the module that a configuration describes, without weights, frozen and in eval mode."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        with init_empty_weights(include_buffers=False):
            module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=family.attention, trust_remote_code=False
            )
        if (folder / "generation_config.json").is_file():
            module.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as e:  # a wrong size or type in config.json fails anywhere in the module's constructors
        raise _not_loadable(source, e) from e
    # Parameters without memory are not tied while they are created.
    module.tie_weights()
    replace_conv1d(module)
    module.eval().requires_grad_(False)
    return module


def _require_tensors(
    module: nn.Module, checkpoint: Checkpoint, spec: ModelSpec, family: Family, source: ModelSource
) -> None:
    """Raise UsageError unless the checkpoint has every tensor of the module, in its shape."""
    names = checkpoint.names()
    tied = {f"{family.head}.weight"} if spec.tied_head else set()
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - names - tied)
    if missing == [f"{family.head}.weight"]:
        raise UsageError(
            f"{source.label} has no {missing[0]}, and its config.json does not tie the head to the embedding",
            hint="if the model has no head of its own, set tie_word_embeddings to true in config.json",
        )
    if missing:
        raise UsageError(
            f"{source.label} lacks tensors ({len(missing)}): {', '.join(missing[:3])}",
            hint="fetch it again; if it is complete, config.json belongs to another model",
        )
    for name in sorted(wanted.keys() & names):
        if checkpoint.shape(name) != tuple(wanted[name].shape):
            raise UsageError(
                f"{source.label} cannot be loaded: {name} is {list(checkpoint.shape(name))}, and config.json asks for "
                f"{list(wanted[name].shape)}",
                hint="fetch the model again",
            )


def _tokenizer(folder: Path, source: ModelSource) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as e:
        raise UsageError(
            f"{source.label} has no usable tokenizer: {_first_line(e)}",
            hint="put tokenizer.json and tokenizer_config.json beside the weights",
        ) from e


def replace_conv1d(module: nn.Module) -> None:
    """Replace every ``Conv1D``, a linear stored as ``[in, out]``, by an ``nn.Linear``, in place."""
    for path, found in list(module.named_modules()):
        if isinstance(found, Conv1D):
            size_in, size_out = found.weight.shape
            # On the meta device, because its initial weights are replaced at once.
            linear = nn.Linear(size_in, size_out, device="meta")
            linear.weight, linear.bias = nn.Parameter(found.weight.T.contiguous()), found.bias
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, linear)


def bind_sites(module: nn.Module, family: Family, spec: ModelSpec) -> dict[Site, tuple[nn.Linear, ...]]:
    """Return every Site with its linears; raises UsageError if a path is missing or not a linear."""
    modules = dict(module.named_modules())

    def resolve(paths: tuple[str, ...]) -> Iterator[nn.Linear]:
        for path in paths:
            found = modules.get(path)
            if not isinstance(found, nn.Linear):
                raise UsageError(
                    f"'{path}' is {type(found).__name__ if found else 'missing'}, expected a linear layer",
                    hint=f"the model does not follow family '{family.name}'; see cushion_deploy/families",
                )
            yield found

    return {site: tuple(resolve(paths)) for site, paths in family.linears(spec, head=True).items()}


def _not_loadable(source: ModelSource, error: Exception) -> UsageError:
    """Return the error for a config.json that transformers cannot make a model of."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return UsageError(
        f"{source.label} cannot be loaded, its config.json does not describe a model: {' '.join(lines[:2]):.300}",
        hint="correct the value in config.json, or fetch the model again",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
