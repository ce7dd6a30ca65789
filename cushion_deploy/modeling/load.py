"""Load a checked Hugging Face folder into a TorchRunner and describe it as a ModelSpec."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cushion_deploy.core.model_spec import ModelSpec, RotaryScaling
from cushion_deploy.core.processes import SINGLE, Processes
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import CushionError, UsageError
from cushion_deploy.families import ACTIVATIONS, Family
from cushion_deploy.modeling.checkpoint import Checkpoint
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
UNLIMITED_POSITIONS = 131_072
"""Context of a model without a limit of its own (ALiBi); memory runs out far below."""
TORCH_NORM_EPS = 1e-5
_YARN = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (*_YARN, "original_max_position_embeddings"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"),
}
"""Parameters of each rotary rule. Checkpoints have other keys too, such as ``type``, the old name of the rule."""


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
    for path in placed.plan(weight_memory(compute, device, processes)):
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


def describe(module: Any, family: Family, source: ModelSource) -> ModelSpec:
    """Return the ModelSpec of a loaded module."""
    c = module.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rotary, local = _rotary(c, family)
    activation = _named(c, family.activation_key)
    # The generation config of a chat model also has the end of a turn; config.json may have only the end of a text.
    eos = getattr(module.generation_config, "eos_token_id", None)
    eos = c.eos_token_id if eos is None else eos
    embedding = getattr(c, "word_embed_proj_dim", c.hidden_size)
    scalar = getattr(c, "query_pre_attn_scalar", None) or head_dim
    rotated = getattr(c, "no_rope_layers", None) or []
    return ModelSpec(
        family=family.name,
        source=Path(source.label).name if source.kind == "gguf" else source.label,
        weights_digest=source.digest,
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=_named(c, family.intermediate_key) or 4 * c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        head_dim=head_dim,
        max_positions=_positions(c, rotary),
        norm_eps=_named(c, family.norm_eps_key) or TORCH_NORM_EPS,
        activation=ACTIVATIONS[activation] if activation else family.activation,
        rotary=rotary,
        tied_head=bool(c.tie_word_embeddings),
        parameters=sum(p.numel() for p in module.parameters()),
        bos_token_id=c.bos_token_id,
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        attention_scale=getattr(c, "attention_multiplier", None) or scalar**-0.5,
        revision=source.revision,
        local_rotary=local,
        windows=_windows(c, family),
        norm_first=bool(getattr(c, "do_layer_norm_before", True)),
        score_cap=getattr(c, "attn_logit_softcapping", None) or 0.0,
        logit_cap=getattr(c, "final_logit_softcapping", None) or 0.0,
        embedding_size=embedding if embedding != c.hidden_size else 0,
        unrotated=tuple(i for i, whether in enumerate(rotated) if not whether),
        embedding_factor=getattr(c, "embedding_multiplier", 1.0),
        residual_factor=getattr(c, "residual_multiplier", 1.0),
        logit_divisor=getattr(c, "logits_scaling", 1.0),
    )


def _positions(config: Any, rotary: RotaryScaling | None) -> int:
    """Return the number of positions in a context.

    ``longrope`` rotates all keys, also those in the cache, by other angles once a context is longer than the original
    one. That is impossible with keys cached after rotation and with a constant prefix, so the context ends there.
    """
    limit = getattr(config, "max_position_embeddings", None) or UNLIMITED_POSITIONS
    if rotary and rotary.rule == "longrope" and rotary.parameters["short_factor"] != rotary.parameters["long_factor"]:
        return min(int(limit), int(cast(float, rotary.parameters["original_max_position_embeddings"])))
    return int(limit)


def _named(config: Any, key: str | None) -> Any:
    return getattr(config, key) if key else None


def _windows(config: Any, family: Family) -> tuple[int, ...]:
    """Return the attention window of each layer, 0 for none; empty if no layer has one."""
    window = 0 if family.windows == "none" else getattr(config, "sliding_window", None) or 0
    kinds = config.layer_types if family.windows == "by_layer" else ["sliding_attention"] * config.num_hidden_layers
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _rotary(config: Any, family: Family) -> tuple[RotaryScaling | None, RotaryScaling | None]:
    """Return the rotary parameters of the model, and those of its local layers if they differ."""
    if family.positions != "rotary":
        return None, None
    rope = config.rope_parameters
    if "full_attention" not in rope:
        return _scaling(rope, config, family), None
    # A config may have parameters for local layers that the model does not have.
    local = rope.get("sliding_attention") if "sliding_attention" in config.layer_types else None
    return _scaling(rope["full_attention"], config, family), _scaling(local, config, family) if local else None


def _scaling(given: dict[str, Any], config: Any, family: Family) -> RotaryScaling:
    rope = {key: value for key, value in given.items() if value is not None}
    rule = str(rope.pop("rope_type", "default"))
    if rule not in family.rotary_rules:
        raise UsageError(
            f"rotary scaling rule '{rule}' is not supported for family {family.name}",
            hint=f"supported: {', '.join(family.rotary_rules)}",
        )
    partial = float(rope.get("partial_rotary_factor", 1.0)) if family.partial_rotary else 1.0
    if rule in ("yarn", "longrope"):
        rope.setdefault("factor", config.max_position_embeddings / rope["original_max_position_embeddings"])
    read = {key: rope[key] for key in PARAMETERS[rule] if key in rope}
    parameters = {k: tuple(map(float, v)) if isinstance(v, list) else float(v) for k, v in sorted(read.items())}
    return RotaryScaling(float(rope["rope_theta"]), rule, parameters, partial)


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
