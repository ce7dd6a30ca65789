"""Resolve ``--model`` and refuse what cannot or must not be loaded, before torch is imported."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.errors import MissingDependency, UntrustedArtifact, UsageError
from cushion_deploy.families import ACTIVATIONS, Family, family_for_model_type
from cushion_deploy.modeling.quantized_formats import stored_format
from cushion_deploy.modeling.text_tower import has_towers, text_config
from cushion_deploy.store import MANIFEST_NAME
from cushion_deploy.store.digest_cache import cached_digests
from cushion_deploy.store.digests import digest_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
SUPPORTED = "a .gguf file, a local Hugging Face folder with safetensors, or a hub id such as org/name"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
"""The tokenizer in all its layouts."""
GENERATION_FILES = ("generation_config.json", "chat_template*.j*", "additional_chat_templates/*.jinja")
"""Files that decide how text is generated, not what the model computes for given token ids."""
_HUB_FILES = [
    "README.md",
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
    *GENERATION_FILES,
]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form of a hub id, ``org/name``."""
    return _HUB_ID.fullmatch(text) is not None


@dataclass(frozen=True)
class ModelSource:
    """A checked model on disk.

    A GGUF file has one digest, which is used for both: editing its chat template makes it another model.

    Attributes:
        kind: ``gguf`` (one file) or ``folder`` (Hugging Face layout, safetensors).
        path: the file or folder.
        label: what the user wrote, for reports.
        revision: hub revision asked for, if any.
        digest: SHA-256 over what decides token ids and logits: config.json, the weights, and the tokenizer without its
            chat template. A prefix, scales and a graph belong to the model with this digest.
        generation_digest: SHA-256 over what decides only how text is generated: generation_config.json and chat
            templates, including the one inside tokenizer_config.json.
        dtype: type of the stored weights, as config.json says; float32 for GGUF, which is dequantized.
    """

    kind: Literal["gguf", "folder"]
    path: Path
    label: str
    revision: str | None
    digest: str
    generation_digest: str
    dtype: Dtype = "float32"


def resolve_source(model: str, revision: str | None = None) -> ModelSource:
    """Return the checked source for a GGUF file, a local folder or a hub id.

    Raises:
        UsageError: it does not exist, is not a decoder, is of an unknown family or is quantized in an unknown way.
        UntrustedArtifact: a pickle checkpoint or a damaged file.
        MissingDependency: it is a hub id and the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if not model:  # as a path, the folder of the process
        raise UsageError("model '' does not exist", hint=f"give {SUPPORTED}")
    if path.is_file():
        return _from_file(path, model)
    if path.is_dir():
        return _from_folder(path, model, revision)
    if _HUB_ID.fullmatch(model) and path.suffix.lower() != ".gguf":
        return _from_folder(_download(model, revision), model, revision)
    raise UsageError(f"model '{model}' does not exist", hint=_similar(path) or f"give {SUPPORTED}")


def _similar(path: Path) -> str:
    """Return a question that names what is beside a path that does not exist and has nearly its name; else nothing."""
    with suppress(OSError):
        found = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
        return f"did you mean {path.parent / found[0]}?" if found else ""
    return ""


def _from_file(path: Path, label: str) -> ModelSource:
    if path.suffix.lower() in PICKLES:
        raise _pickle_error(path)
    with path.open("rb") as f:
        magic = f.read(4)
    if magic != b"GGUF":
        raise UsageError(f"{path.name} is not a GGUF file (it begins with {magic!r})", hint=f"give {SUPPORTED}")
    digest = cached_digests([path])[path]
    return ModelSource("gguf", path, label, None, digest, digest)


def _from_folder(path: Path, label: str, revision: str | None) -> ModelSource:
    if not (path / "config.json").is_file():
        inside = next((f": give {file}" for file in sorted(path.glob("*.gguf"))), "")
        raise UsageError(
            f"folder '{label}' has no config.json, as a Hugging Face folder has", hint=f"give {SUPPORTED}{inside}"
        )
    if (path / MANIFEST_NAME).is_file():
        raise UsageError(f"'{label}' is a bundle, not a model", hint="give the model that it was built from")
    config = read_json(path / "config.json", f"give {SUPPORTED}")
    check_config(config)
    numbers = [path / "config.json", *weight_files(path), *_matching(path, TOKENIZER_FILES)]
    generation = _matching(path, GENERATION_FILES)
    digests = cached_digests([*numbers, *generation])
    of_numbers, of_generation = (
        {file.relative_to(path).as_posix(): digests[file] for file in files} for files in (numbers, generation)
    )
    if (path / TOKENIZER_CONFIG).is_file():
        settings = read_json(path / TOKENIZER_CONFIG, "fetch the file again")
        template = settings.pop("chat_template", None)
        of_numbers[TOKENIZER_CONFIG] = json.dumps(settings, sort_keys=True)
        if template is not None:
            of_generation[TOKENIZER_CONFIG] = json.dumps(template, sort_keys=True)
    digests_of = digest_json(of_numbers), digest_json(of_generation)
    return ModelSource("folder", path, label, revision, *digests_of, stored_dtype(config))


def stored_dtype(config: dict[str, Any]) -> Dtype:
    """Return the type in which a checkpoint stores its weights, from its config.json; float32 if it does not say."""
    named = next((d[k] for d in (config, text_config(config)) for k in ("dtype", "torch_dtype") if d.get(k)), None)
    return next((known for known in get_args(Dtype) if known == named), "float32")


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the matching files of a folder, sorted, except tokenizer_config.json: it contributes to both digests."""
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(found - {folder / TOKENIZER_CONFIG})


def check_config(config: dict[str, Any]) -> Family:
    """Return the family of a config.json.

    Raises:
        UsageError: it is no supported decoder, or its weights are quantized in a way that is not read.
    """
    architectures = config.get("architectures") or []
    _require_names(config, architectures)
    decoders = has_towers(config) or any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    if config.get("is_encoder_decoder") or (architectures and not decoders):
        raise UsageError(
            f"{', '.join(architectures) or 'this model'} is not a decoder-only language model",
            hint="give a model whose architecture is a ...ForCausalLM, such as LlamaForCausalLM",
        )
    whole, config = config, text_config(config)
    family = family_for_model_type(config.get("model_type"))
    stored_format(whole)
    if other := whole.get("transformers_weights"):
        raise UsageError(
            f"config.json sends the loader to other weights ({other})",
            hint="name that file model.safetensors and remove transformers_weights from config.json",
        )
    key = family.activation_key
    if key and config.get(key) is not None and str(config[key]) not in ACTIVATIONS:
        raise UsageError(
            f"activation '{config[key]}' is not supported", hint=f"supported: {', '.join(sorted(ACTIVATIONS))}"
        )
    for key, allowed in family.required.items():
        if key in config and config[key] not in allowed:
            raise UsageError(
                f"config.json sets {key} to {config[key]!r}, which is not supported for family {family.name}",
                hint=f"supported: {', '.join(repr(value) for value in allowed)}",
            )
    return family


def _require_names(config: dict[str, Any], architectures: Any) -> None:
    """Check the types of what a config.json names its model by."""
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UsageError(
            f"config.json has {architectures!r:.80} as architectures, expected a list of class names",
            hint='correct it, for instance to ["LlamaForCausalLM"], or fetch the model again',
        )
    for part in (config, config.get("text_config")):
        given = part.get("model_type") if isinstance(part, dict) else None
        if given is not None and not isinstance(given, str):
            raise UsageError(
                f"config.json has {given!r:.80} as model_type, expected a name",
                hint='correct it, for instance to "llama", or fetch the model again',
            )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder that transformers would load, in order.

    As in transformers, a single ``model.safetensors`` takes precedence over an index.

    Raises:
        UntrustedArtifact: the folder has only pickled weights, or the index is damaged.
        UsageError: the folder has no weights, or a shard is missing.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = [whole] if whole.is_file() else []
    if index.is_file():
        weight_map = read_json(index, "fetch the model again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UntrustedArtifact(f"{index.name} maps no tensors to files", hint="fetch the model again")
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise UntrustedArtifact(
                f"{index.name} points outside its folder", hint="do not use this checkpoint; fetch it again"
            )
        files = files or [folder / name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise UsageError(
            f"{index.name} names shards that are missing: {', '.join(missing)}", hint="fetch them into the same folder"
        )
    if not files:
        pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise _pickle_error(pickles[0])
        raise UsageError(f"no safetensors weights in {folder}", hint=f"give {SUPPORTED}")
    return files


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        UsageError: the file does not exist; ``hint`` says what to do.
        UntrustedArtifact: it is not valid JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UsageError(f"{path} does not exist", hint=hint) from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UntrustedArtifact(f"{path} is not valid JSON ({e})", hint="fetch the file again") from e
    if not isinstance(value, dict):
        raise UntrustedArtifact(f"{path} holds no JSON object", hint="fetch the file again")
    return value


def _download(model: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as e:
        raise MissingDependency(
            "reading a hub id needs huggingface_hub", hint="pip install 'cushion-deploy[build]'"
        ) from e
    try:
        folder = Path(
            snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["consolidated*"])
        )
    except RepositoryNotFoundError as e:
        raise UsageError(
            f"the hub has no model '{model}', or it is private",
            hint="check the name; for a gated model log in with `hf auth login`",
        ) from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise MissingDependency(
            f"'{model}' is neither a local path nor in the local hub cache, and the hub cannot be reached",
            hint="check the network, or download the model elsewhere and give its folder",
        ) from e
    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"'{model}' has no safetensors weights on the hub; pickled ones, which can run code, are never fetched",
            hint="give a --revision that has them (hub bots offer one as refs/pr/N), or convert it where you trust it",
        )
    return folder


def _pickle_error(path: Path) -> UntrustedArtifact:
    return UntrustedArtifact(
        f"{path.name} is a pickle-style checkpoint, which can run code when it is opened",
        hint="convert it to safetensors where you trust it (`save_pretrained(..., safe_serialization=True)`)",
    )
