"""The edge runtime: open a bundle and generate text. Imports only numpy, tokenizers and the chosen engine."""

from __future__ import annotations

from cushion_deploy.core.session import DecoderSession
from cushion_deploy.engines.onnxruntime.session import OnnxRuntimeSession, open_session
from cushion_deploy.runtime.bundle import Bundle, open_bundle
from cushion_deploy.runtime.generate import Detokenizer, TokenEvent, Usage, generate
from cushion_deploy.runtime.prompt_cache import PromptCache
from cushion_deploy.runtime.sampling import SamplingParams
from cushion_deploy.runtime.text import Generation, TextGenerator, load

__all__ = [
    "Bundle",
    "DecoderSession",
    "Detokenizer",
    "Generation",
    "OnnxRuntimeSession",
    "PromptCache",
    "SamplingParams",
    "TextGenerator",
    "TokenEvent",
    "Usage",
    "generate",
    "load",
    "open_bundle",
    "open_session",
]
