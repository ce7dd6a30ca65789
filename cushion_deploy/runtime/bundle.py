"""Open a bundle: verify every byte, then read graph, tokenizer, chat template and special tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cushion_deploy.core.graphs import GRAPH_FILE, ExportedGraph, GraphContract, PrefixMode
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.runtime.chat import ChatTemplate, Message, encode_chat, encode_prompt
from cushion_deploy.store import (
    MANIFEST_NAME,
    BundleManifest,
    FileState,
    file_states,
    hash_file,
    require_unchanged,
    verify_bundle,
)
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.manifest import read_json
from cushion_deploy.store.text_files import read_utf8

GRAPH_NAME = "model.onnx"
TEXT_NAME = "text.json"
"""How prompts are tokenized: ``{"keep_bos": bool}``, true if the file is absent; ``changes`` says in words
how the tokenizer files differ from those of the model."""
_REBUILD = "build the bundle again with this version of cushion-deploy"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        path: folder of the bundle.
        manifest: files with their digests, the recipe, and the digests of what the bundle was built from.
        config: config.json of the model.
        generation_config: generation_config.json; empty if there is none.
        graph: the decoder graph, in the file ``graph.path``.
        tokenizer: tokenizer of the model, without padding and truncation.
        chat_template: chat template; None for a model that was not trained to chat.
        bos_token_id: beginning-of-sequence token; None if the model has none.
        eos_token_ids: tokens that end a generation: all that generation_config.json, config.json or the tokenizer name.
        keep_bos: whether a prompt keeps the beginning-of-sequence token that its tokenizer or template adds; False if
            the prefix takes the place of that token.
        states: the files as they were before they were verified; compared again once an engine has read them.
    """

    path: Path
    manifest: BundleManifest
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    graph: ExportedGraph
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    keep_bos: bool = True
    states: Mapping[str, FileState] = field(default_factory=dict, repr=False)

    @property
    def contract(self) -> GraphContract:
        """Inputs and outputs of the graph."""
        return self.graph.contract

    @property
    def model_path(self) -> Path:
        """Path of the graph, ``model.onnx``."""
        return self.graph.path

    @property
    def prefix_mode(self) -> PrefixMode:
        """Where the prefix is: in the graph, in the cache, or nowhere."""
        return self.contract.prefix_mode

    def require_unchanged(self) -> None:
        """Check that no file was written since it was verified; raises UntrustedArtifact if one was."""
        require_unchanged(self.path, self.states)

    def verified_again(self) -> Bundle:
        """Return the bundle with the present state of its files, after comparing every byte with the same manifest.

        Raises:
            UntrustedArtifact: a file was altered, or another bundle is in the folder.
        """
        states = file_states(self.path)
        if verify_bundle(self.path).digest != self.manifest.digest:
            raise UntrustedArtifact(
                f"{self.path} was replaced by another bundle while it was loaded", hint="run the command again"
            )
        return replace(self, states=states)

    def require_chat_template(self) -> ChatTemplate:
        """Return the chat template; raises UsageError if the model has none."""
        if self.chat_template is None:
            raise UsageError(
                f"{self.path} has no chat template: its model was not trained to chat",
                hint="give a plain prompt to `generate` instead of messages",
            )
        return self.chat_template

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Return the token ids of a conversation; raises UsageError if the model has no chat template.

        Args:
            messages: the conversation.
            variables: further variables of the template, such as ``tools``.
        """
        rendered = self.require_chat_template().render(messages, **variables)
        return encode_chat(self.tokenizer, rendered, self.bos_token_id, keep_bos=self.keep_bos)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a plain text."""
        return encode_prompt(self.tokenizer, text, self.bos_token_id, keep_bos=self.keep_bos)


def open_bundle(path: Path | str, *, accept: Callable[[BundleManifest], object] | None = None) -> Bundle:
    """Verify a bundle and read it; no engine is loaded.

    Args:
        path: folder of the bundle.
        accept: is called with the manifest when every file has been compared with it and none has been read; what it
            raises refuses the bundle.

    Raises:
        UsageError: the path is not a folder.
        UntrustedArtifact: a file is missing, added, altered, or not valid in a bundle.
    """
    path = Path(path)
    # Only the folder of a bundle is searched: another could be large.
    states = file_states(path) if (path / MANIFEST_NAME).is_file() else {}
    manifest = verify_bundle(path)
    if accept is not None:
        accept(manifest)
    config = _read(path / "config.json")
    generation = _read(path / "generation_config.json", optional=True)
    text = read_text_files(path)
    return Bundle(
        path=path,
        manifest=manifest,
        config=config,
        generation_config=generation,
        graph=read_graph(path),
        tokenizer=text.tokenizer,
        chat_template=text.chat_template,
        bos_token_id=text.bos_token_id,
        eos_token_ids=text.eos_token_ids,
        keep_bos=_keep_bos(path / TEXT_NAME),
        states=states,
    )


@dataclass(frozen=True)
class TextFiles:
    """What turns text and conversations into token ids; see :class:`Bundle`."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def read_text_files(path: Path) -> TextFiles:
    """Read the tokenizer, chat template and special tokens from the folder of a bundle or a model.

    Raises:
        UntrustedArtifact: a file is missing or not valid.
    """
    config = _read(path / "config.json")
    generation = _read(path / "generation_config.json", optional=True)
    tokenizer_config = _read(path / "tokenizer_config.json", optional=True)
    tokenizer = _tokenizer(path / "tokenizer.json")
    special = _special_tokens(tokenizer_config)
    return TextFiles(
        tokenizer=tokenizer,
        chat_template=_chat_template(path, tokenizer_config, special),
        bos_token_id=_bos(tokenizer, special, config),
        eos_token_ids=_eos(tokenizer, special, generation, config),
    )


def _read(path: Path, *, optional: bool = False) -> Mapping[str, Any]:
    if optional and not path.is_file():
        return {}
    _, value = read_json(path)
    if not isinstance(value, dict):
        raise UntrustedArtifact(f"{path} is not a JSON object", hint=_REBUILD)
    return value


def _keep_bos(path: Path) -> bool:
    value = _read(path, optional=True).get("keep_bos", True)
    if not isinstance(value, bool):
        raise UntrustedArtifact(f"{path}: keep_bos is {value!r}, expected true or false", hint=_REBUILD)
    return value


def read_graph(path: Path) -> ExportedGraph:
    """Read the graph of a bundle or of a folder of ``export``; raises UntrustedArtifact if there is none."""
    data = _read(path / GRAPH_FILE)
    try:
        # The file name is fixed: a path read from a file could point anywhere.
        graph = ExportedGraph.from_json({**data, "path": GRAPH_NAME}, path)
    except (TypeError, KeyError) as e:
        raise UntrustedArtifact(f"{path / GRAPH_FILE} does not describe a graph: {e}", hint=_REBUILD) from e
    if data.get("path") != GRAPH_NAME or not graph.path.is_file():
        raise UntrustedArtifact(
            f"{path / GRAPH_FILE} describes {data.get('path')!r}, expected {GRAPH_NAME!r} in {path}", hint=_REBUILD
        )
    return graph


def verify_graph(graph: ExportedGraph) -> None:
    """Compare the files of a graph with the digest recorded at export; raises UntrustedArtifact if they differ."""
    missing = [file.name for file in graph.files if not file.is_file()]
    if missing or digest_json({file.name: hash_file(file) for file in graph.files}) != graph.digest:
        raise UntrustedArtifact(
            f"{graph.path} or its data is not what was exported{f' ({missing[0]} is missing)' if missing else ''}",
            hint="export the graph again",
        )


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UntrustedArtifact(f"{path.parent} has no {path.name}", hint=_REBUILD)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise UntrustedArtifact(f"{path} is not a tokenizer: {e!s:.200}", hint=_REBUILD) from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in tokenizer_config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _chat_template(path: Path, tokenizer_config: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return ChatTemplate(read_utf8(file), special)
        except UsageError as e:
            raise UntrustedArtifact(e.message, hint="fetch the model again, or " + e.hint) from e
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):  # several templates by name
        source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
    return ChatTemplate(source, special) if isinstance(source, str) else None


def _bos(tokenizer: Tokenizer, special: Mapping[str, str], config: Mapping[str, Any]) -> int | None:
    if "bos_token" in special and (found := tokenizer.token_to_id(special["bos_token"])) is not None:
        return int(found)
    value = config.get("bos_token_id")
    return value if isinstance(value, int) else None


def _eos(
    tokenizer: Tokenizer, special: Mapping[str, str], generation: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return every token that any file of the model names as an end; a chat may end with another one than a text."""
    found: set[int] = set()
    for source in (generation, config):
        value = source.get("eos_token_id")
        found |= {int(v) for v in (value if isinstance(value, list) else [value]) if v is not None}
    of_tokenizer = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return tuple(sorted(found if of_tokenizer is None else {*found, int(of_tokenizer)}))
