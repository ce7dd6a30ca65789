"""The decoder of a checkpoint of several modalities is loaded alone, and computes what the whole model does."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    LlavaConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from cushion_deploy.core.prefix import Prefix
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.source import resolve_source

IDS = np.random.default_rng(8).integers(3, 290, (1, 24))
TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {**TEXT, "head_dim": 16}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION: dict[str, Any] = {**SIZES, "image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14}
QWEN_TOKENS = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}


def of_llama(kind: Any, **more: Any) -> Any:
    text, vision = {**WIDE, "model_type": "llama"}, {**VISION, **more.pop("vision", {})}
    return kind(text_config=text, vision_config=vision, **more)


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "Gemma 3": (
        "gemma3",
        lambda: Gemma3Config(
            text_config={**WIDE, "sliding_window": 12, "query_pre_attn_scalar": 16},
            vision_config=VISION,
            mm_tokens_per_image=4,
        ),
    ),
    "Qwen2-VL": (
        "qwen2",
        lambda: Qwen2VLConfig(
            text_config={**TEXT, **ROPE},
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
            **QWEN_TOKENS,
        ),
    ),
    "Qwen2.5-VL": (
        "qwen2",
        lambda: Qwen2_5_VLConfig(
            text_config={**TEXT, **ROPE}, vision_config={**QWEN_VISION, "out_hidden_size": 64}, **QWEN_TOKENS
        ),
    ),
    "Qwen3-VL": (
        "qwen3",
        lambda: Qwen3VLConfig(
            text_config={**WIDE, **ROPE},
            vision_config={**QWEN_VISION, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
            **QWEN_TOKENS,
        ),
    ),
    "SmolVLM": ("llama", lambda: of_llama(SmolVLMConfig, image_token_id=300)),
    "Idefics3, tied": ("llama", lambda: of_llama(Idefics3Config, image_token_id=300, tie_word_embeddings=True)),
    "LLaVA": (
        "llama",
        lambda: of_llama(LlavaConfig, image_token_index=300, vision={"model_type": "clip_vision_model"}),
    ),
    "Mistral 3": (
        "mistral",
        lambda: Mistral3Config(
            text_config={**WIDE, "model_type": "mistral", "sliding_window": 12},
            vision_config={**VISION, "model_type": "pixtral"},
            image_token_index=300,
        ),
    ),
}


@pytest.fixture(scope="module")
def folder_of(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a name to the folder of a random whole model, with the tiny tokenizer."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("whole")
            AutoModelForImageTextToText.from_config(MODELS[name][1]()).save_pretrained(made[name])
            for file in tiny_folder.glob("tokenizer*"):
                (made[name] / file.name).write_bytes(file.read_bytes())
        return made[name]

    return folder


def logits_of_transformers(folder: Path) -> np.ndarray:
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return np.asarray(whole(input_ids=torch.from_numpy(IDS)).logits.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_computes_what_the_whole_model_does(
    name: str, folder_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(name)
    source = resolve_source(str(folder))
    with caplog.at_level(logging.WARNING):
        model = load_folder(folder, source)
    expected = logits_of_transformers(folder)
    assert np.ptp(expected, axis=-1).min() > 0.5
    np.testing.assert_allclose(model.logits(IDS, Prefix.empty(model.spec)), expected, atol=1e-4)
    assert model.spec.family == MODELS[name][0]
    assert "left out: the part that reads images or sound" in caplog.text
    written = model.module.config.to_dict()
    assert not [key for key in written if "vision" in key or "mrope" in json.dumps(written[key])]


def test_names_and_configuration_as_they_were_published(folder_of: Any, tmp_path: Path) -> None:
    """Qwen2.5-VL of the hub: no ``text_config``, and ``mrope`` as the name of the rotary rule."""
    whole = folder_of("Qwen2.5-VL")
    folder = tmp_path / "flat"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    del text["rope_parameters"], text["model_type"]
    old = {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    (folder / "config.json").write_text(json.dumps({**text, **config, **old}))
    model = load_folder(folder, resolve_source(str(folder)))
    np.testing.assert_allclose(model.logits(IDS, Prefix.empty(model.spec)), logits_of_transformers(whole), atol=1e-4)


def test_what_belongs_to_no_known_part_is_refused(folder_of: Any, tmp_path: Path) -> None:
    whole = folder_of("LLaVA")
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["language_model.model.layers.0.cross_attn.gate"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"language_model\.model\.layers\.0\.cross_attn\.gate"):
        load_folder(tmp_path, resolve_source(str(tmp_path)))


def test_a_decoder_of_no_supported_family_is_named(folder_of: Any, tmp_path: Path) -> None:
    for file in folder_of("LLaVA").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "mllama_text_model"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="'mllama_text_model' is not supported"):
        resolve_source(str(tmp_path))
