"""Load a checked Hugging Face folder into torch, and describe it as a ModelSpec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.families import Family, family_for_model_type
from cushion_deploy.modeling.bars import reported_bars
from cushion_deploy.modeling.source import ModelSource, check_config, read_json, weight_files
from cushion_deploy.progress import Progress, silent
from cushion_deploy.types import FloatArray, IntArray, ModelSpec, RotaryScaling, Site, Smoothing


@dataclass(frozen=True)
class LoadedModel:
    """A model in torch (float32, eval mode, frozen), its tokenizer, and its weights on disk.

    Attributes:
        spec, family: what it is.
        module: the transformers ``...ForCausalLM``.
        tokenizer: the transformers tokenizer.
        sites: Site to the linears that it feeds; ``head`` included.
        weights: the tensors on disk, for export.
        folder: Hugging Face folder that it was loaded from.
        smoothing: what was folded into ``module`` and is not in ``weights``; None for nothing.
    """

    spec: ModelSpec
    family: Family
    module: Any
    tokenizer: Any
    sites: dict[Site, tuple[nn.Linear, ...]]
    weights: SafetensorsWeights
    folder: Path
    smoothing: Smoothing | None = None

    def encode(self, text: str) -> IntArray:
        """Return the token ids of plain text, int64 ``[n]``, without special tokens."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token, special tokens by their name."""
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))


class SafetensorsWeights:
    """Tensors of a folder, read one at a time and widened to float32 (implements ``WeightSource``)."""

    def __init__(self, folder: Path) -> None:
        """Index the safetensors files of ``folder``; raises UntrustedArtifact when one is damaged."""
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            try:
                with safe_open(file, framework="pt") as f:
                    self._files.update(dict.fromkeys(f.keys(), file))
            except SafetensorError as e:
                raise UntrustedArtifact(f"{file.name} is damaged: {e}", hint="fetch the model again") from e

    def names(self) -> frozenset[str]:
        """Return every tensor name."""
        return frozenset(self._files)

    def get(self, name: str) -> FloatArray:
        """Return one tensor as float32; raises KeyError for an unknown name."""
        with safe_open(self._files[name], framework="pt") as f:
            array: FloatArray = f.get_tensor(name).to(torch.float32).numpy()
        return array


def load_folder(folder: Path, source: ModelSource, progress: Progress = silent) -> LoadedModel:
    """Load a Hugging Face folder (float32, frozen); remote code stays off.

    Args:
        folder: the source itself, or what :func:`convert_gguf` made of it.
        source: where it came from; its digest names the model.
        progress: where to report.

    Raises:
        UsageError: not a supported decoder, or its tensors do not fit its config.
        UntrustedArtifact: damaged weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = read_json(folder / "config.json", "give a Hugging Face folder")
    check_config(config)
    weights = SafetensorsWeights(folder)
    try:
        with reported_bars(progress):
            module, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except (ValueError, KeyError, OSError, RuntimeError) as e:
        raise UsageError(f"{source.label} cannot be loaded: {_first_line(e)}", hint="fetch the model again") from e
    if info["missing_keys"]:
        raise UsageError(
            f"{source.label} lacks tensors: {', '.join(sorted(info['missing_keys'])[:3])}", hint="fetch it again"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as e:
        raise UsageError(
            f"{source.label} has no usable tokenizer: {_first_line(e)}",
            hint="put tokenizer.json and tokenizer_config.json beside the weights",
        ) from e
    module.eval().requires_grad_(False)
    family = family_for_model_type(module.config.model_type)
    spec = describe(module, family, source)
    return LoadedModel(spec, family, module, tokenizer, bind_sites(module, family, spec), weights, folder)


def describe(module: Any, family: Family, source: ModelSource) -> ModelSpec:
    """Return the ModelSpec of a loaded module."""
    c = module.config
    rope = dict(c.rope_parameters)
    rule = str(rope.pop("rope_type", "default"))
    theta = float(rope.pop("rope_theta"))
    if rule not in family.rotary_rules:
        raise UsageError(
            f"rotary scaling rule '{rule}' is not supported for family {family.name}",
            hint=f"supported: {', '.join(family.rotary_rules)}",
        )
    eos = c.eos_token_id
    return ModelSpec(
        family=family.name,
        source=Path(source.label).name if source.kind == "gguf" else source.label,
        weights_digest=source.digest,
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        max_positions=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
        activation=c.hidden_act,
        rotary=RotaryScaling(theta, rule, {k: float(v) for k, v in sorted(rope.items()) if v is not None}),
        tied_head=bool(c.tie_word_embeddings),
        attention_bias=bool(getattr(c, "attention_bias", False)),
        mlp_bias=bool(getattr(c, "mlp_bias", False)),
        parameters=sum(p.numel() for p in module.parameters()),
        bos_token_id=c.bos_token_id,
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        revision=source.revision,
    )


def bind_sites(module: nn.Module, family: Family, spec: ModelSpec) -> dict[Site, tuple[nn.Linear, ...]]:
    """Return every Site with its linears; a path that is missing or no linear is a UsageError."""
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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
