"""Quantized checkpoints are dequantized where their meaning is certain, and refused by name otherwise."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cushion_deploy.core.weights import whole
from cushion_deploy.errors import ExitCode, UsageError
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.packing import Packing
from cushion_deploy.modeling.source import resolve_source

PROJECTION = "model.layers.1.mlp.up_proj.weight"  # [96, 64]
BESIDE = PROJECTION.removesuffix("weight")
FP8, INT8 = torch.float8_e4m3fn, torch.int8
Numbers = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny folder, to be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def write(folder: Path, tensors: dict[str, torch.Tensor | None], **config: Any) -> Path:
    """Add, replace or remove (None) tensors of a folder, and set keys of its configuration."""
    found = {**load_file(folder / "model.safetensors"), **tensors}
    save_file({n: t.contiguous() for n, t in found.items() if t is not None}, folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    return folder


def refused(folder: Path) -> UsageError:
    def use() -> None:
        source = resolve_source(str(folder))
        load_folder(source.path, source)

    with pytest.raises(UsageError) as e:
        use()
    assert e.value.exit_code == ExitCode.USAGE
    assert e.value.hint
    return e.value


def codes(dtype: torch.dtype) -> tuple[torch.Tensor, Numbers]:
    """Return all finite codes of a type in a matrix ``[96, 64]``, and their values by the definition of the type."""
    raw = np.random.default_rng(3).permutation(96 * 64).reshape(96, 64).astype(np.uint8)
    if dtype == INT8:
        return torch.from_numpy(raw.view(np.int8)), raw.view(np.int8).astype(np.float32)
    raw[(raw & 127) == 127] = 1
    exponent, mantissa, sign = (raw >> 3) & 15, raw & 7, np.where(raw > 127, -1, 1)
    value = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7), mantissa / 8 * 2.0**-6)
    return torch.from_numpy(raw).view(FP8), (sign * value).astype(np.float32)


def scales(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(4).uniform(0.001, 0.01, shape).astype(np.float32))


def fp8(**keys: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", **keys}}


def compressed(form: str, kind: str, strategy: str, **keys: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, **keys}
    group = {"weights": weights, "targets": ["Linear"], "input_activations": None}
    found = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return {"quantization_config": {**found, "quantization_status": "compressed", "ignore": ["lm_head"]}}


NOTHING: dict[str, Any] = {}
MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
FBGEMM = {"quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}}
CASES: dict[str, tuple[torch.dtype, str, tuple[int, ...], dict[str, Any]]] = {
    "one scale, nothing said": (FP8, "weight_scale", (), NOTHING),
    "one scale of one element, nothing said": (FP8, "weight_scale", (1,), NOTHING),
    "per channel, nothing said": (FP8, "weight_scale", (96,), NOTHING),
    "per channel in a column, nothing said": (FP8, "weight_scale", (96, 1), NOTHING),
    "one block of 128, nothing said": (FP8, "weight_scale_inv", (1, 1), NOTHING),
    "groups of 16, nothing said": (FP8, "weight_scale", (96, 4), NOTHING),
    "INT8 per channel, nothing said": (INT8, "weight_scale", (96, 1), NOTHING),
    "DeepSeek blocks that do not divide": (FP8, "weight_scale_inv", (3, 3), fp8(weight_block_size=[40, 24])),
    "Ministral, one scale": (FP8, "weight_scale_inv", (), fp8(weight_block_size=None)),
    "AutoFP8, one scale": (FP8, "weight_scale", (1,), fp8(activation_scheme="static")),
    "modelopt FP8": (FP8, "weight_scale", (), MODELOPT),
    "fbgemm FP8 per channel": (FP8, "weight_scale", (96, 1), FBGEMM),
    "compressed-tensors FP8": (FP8, "weight_scale", (96, 1), compressed("float-quantized", "float", "channel")),
    "compressed-tensors INT8": (INT8, "weight_scale", (96, 1), compressed("int-quantized", "int", "channel")),
    "compressed-tensors INT8, one scale": (INT8, "weight_scale", (1,), compressed("int-quantized", "int", "tensor")),
    "compressed-tensors INT8 groups": (
        INT8,
        "weight_scale",
        (96, 2),
        compressed("int-quantized", "int", "group", group_size=32),
    ),
    "compressed-tensors FP8 blocks": (
        FP8,
        "weight_scale",
        (2, 4),
        compressed("float-quantized", "float", "block", block_structure=[50, 16]),
    ),
}
BLOCKS = {
    "groups of 16, nothing said": (1, 16),
    "DeepSeek blocks that do not divide": (40, 24),
    "compressed-tensors INT8 groups": (1, 32),
    "compressed-tensors FP8 blocks": (50, 16),
}


def spread(scale: torch.Tensor, block: tuple[int, int] | None) -> Numbers:
    """Return the scale of every element of a matrix ``[96, 64]``, by the definition of blocks."""
    table = scale.numpy()
    if block is None:
        return (
            np.broadcast_to(table.reshape(-1, 1), (96, 64))
            if table.size > 1
            else np.full((96, 64), table.item(), np.float32)
        )
    found = np.empty((96, 64), np.float32)
    for i in range(96):
        for j in range(64):
            found[i, j] = table[i // block[0], j // block[1]]
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_its_codes_times_their_scales(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    dtype, suffix, shape, config = CASES[name]
    stored, values = codes(dtype)
    scale = scales(*shape)
    write(folder, {PROJECTION: stored, BESIDE + suffix: scale, BESIDE + "input_scale": torch.ones(1)}, **config)
    with caplog.at_level(logging.WARNING):
        model = load_folder(folder, resolve_source(str(folder)))
    expected = values * spread(scale, BLOCKS.get(name))
    np.testing.assert_array_equal(model.module.get_parameter(PROJECTION).numpy(), expected)
    np.testing.assert_array_equal(whole(model.weights, PROJECTION), expected)
    np.testing.assert_array_equal(model.weights.rows(PROJECTION, 37, 71), expected[37:71])
    assert "dequantized" in caplog.text
    assert not hasattr(model.module.config, "quantization_config"), "the bundle would say that it is quantized"


def test_a_scale_may_lie_in_another_file_and_zero_points_are_subtracted(folder: Path) -> None:
    stored, values = codes(INT8)
    zero = torch.arange(96, dtype=torch.int8)[:, None] - 50
    scale = scales(96, 1)
    write(folder, {PROJECTION: stored, BESIDE + "weight_zero_point": zero})
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({BESIDE + "weight_scale": scale}, folder / "model-00002-of-00002.safetensors")
    weight_map = {**dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    weight_map[BESIDE + "weight_scale"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = load_folder(folder, resolve_source(str(folder)))
    expected = (values - zero.numpy().astype(np.float32)) * scale.numpy()
    np.testing.assert_array_equal(whole(model.weights, PROJECTION), expected)


def test_fp8_without_scales_and_without_a_configuration_is_a_type_like_any_other(folder: Path) -> None:
    stored, values = codes(FP8)
    write(folder, {PROJECTION: stored})
    model = load_folder(folder, resolve_source(str(folder)))
    np.testing.assert_array_equal(whole(model.weights, PROJECTION), values)


def test_a_transposed_linear_is_dequantized_as_it_is_stored(tiny_writer: Callable[..., Path], tmp_path: Path) -> None:
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 256, "tie_word_embeddings": True}
    folder = tiny_writer(tmp_path / "gpt2", None, "gpt2", **shape)
    name = "transformer.h.1.mlp.c_proj.weight"
    key = next(key for key in load_file(folder / "model.safetensors") if key.endswith("h.1.mlp.c_proj.weight"))
    stored, values = codes(FP8)
    scale = scales(96, 2)
    write(folder, {key: stored, key + "_scale": scale})
    model = load_folder(folder, resolve_source(str(folder)))
    expected = (values * np.repeat(scale.numpy(), 32, axis=1)).T
    np.testing.assert_array_equal(whole(model.weights, name), expected)
    np.testing.assert_array_equal(model.weights.rows(name, 5, 9), expected[5:9])
    np.testing.assert_array_equal(model.module.get_parameter(name).numpy(), expected)


def test_a_whole_fp8_model_has_the_logits_of_transformers_own_dequantization(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    tensors: dict[str, torch.Tensor | None] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            blocks = tensor.reshape(tensor.shape[0] // 32, 32, tensor.shape[1] // 32, 32)
            scale = blocks.abs().amax(dim=(1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(FP8)
            tensors[name + "_scale_inv"] = scale
    write(folder, tensors, **fp8(weight_block_size=[32, 32]))
    model = load_folder(folder, resolve_source(str(folder)))
    settings = FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).eval()
    ids = torch.randint(3, 320, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = oracle(ids).logits
        found = model.module(ids).logits
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        method: ({"quantization_config": {"quant_method": method}}, method)
        for method in ("awq", "gptq", "bitsandbytes", "mxfp4", "aqlm", "hqq", "torchao", "quanto", "auto-round")
    },
    "packed 3 bits": (
        compressed("pack-quantized", "int", "group", group_size=32, num_bits=3),
        "packed weights of 3 bits",
    ),
    "packed floats": (compressed("pack-quantized", "float", "channel"), "packed weights of 8 bits"),
    "packed, one scale": (compressed("pack-quantized", "int", "tensor"), "scales per 'tensor'"),
    "packed in another order": (compressed("pack-quantized", "int", "channel", actorder="group"), "ordered by 'group'"),
    "another compression": (compressed("marlin-24", "int", "channel", num_bits=4), "marlin-24"),
    "4 bits": (compressed("int-quantized", "int", "channel", num_bits=4), "4-bit"),
    "sparse": (
        {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}},
        "sparse-24",
    ),
    "rotated": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "transform_config": {"config_groups": {"a": 1}},
            }
        },
        "transform_config",
    ),
    "NVFP4": ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "NVFP4"),
    "E5M2": (fp8(fmt="e5m2"), "e5m2"),
    "no object": ({"quantization_config": "fp8"}, "expected an object"),
    "the older key": ({"compression_config": {"quant_method": "gptq"}}, "compression_config"),
    "no method": ({"quantization_config": {"bits": 4}}, "an unknown way"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name_before_any_weight_is(name: str, folder: Path) -> None:
    config, named = REFUSED[name]
    write(folder, {}, **config)
    with pytest.raises(UsageError) as e:
        resolve_source(str(folder))
    assert named in e.value.message
    assert "floating-point checkpoint" in e.value.hint


STORED_WRONGLY: dict[str, tuple[dict[str, torch.Tensor | None], dict[str, Any], str]] = {
    "a float with a scale": ({BESIDE + "weight_scale": scales(96)}, NOTHING, "not certain"),
    "a float with zero points": ({BESIDE + "weight_zero_point": scales(96)}, NOTHING, "zero points beside it and no"),
    "FP8 with zero points": (
        {PROJECTION: codes(FP8)[0], BESIDE + "weight_zero_point": scales(96)},
        NOTHING,
        "zero points beside it and no scale",
    ),
    "codes without a scale": ({PROJECTION: codes(INT8)[0]}, NOTHING, "without a scale"),
    "FP8 that should have a scale": ({PROJECTION: codes(FP8)[0]}, fp8(), "without a scale"),
    "another type": ({PROJECTION: torch.ones(96, 64, dtype=torch.uint8)}, NOTHING, "stored as U8"),
    "two scales": (
        {PROJECTION: codes(FP8)[0], BESIDE + "weight_scale": scales(96), BESIDE + "weight_scale_inv": scales(96)},
        NOTHING,
        "two scales",
    ),
    "scales of another shape": ({PROJECTION: codes(FP8)[0], BESIDE + "weight_scale": scales(95)}, NOTHING, "[95]"),
    "scales of other blocks": (
        {PROJECTION: codes(FP8)[0], BESIDE + "weight_scale_inv": scales(3, 2)},
        fp8(weight_block_size=[40, 24]),
        "40 by 24",
    ),
    "blocks of unknown size": ({PROJECTION: codes(FP8)[0], BESIDE + "weight_scale": scales(3, 2)}, NOTHING, "[3, 2]"),
    "zero points of another shape": (
        {PROJECTION: codes(INT8)[0], BESIDE + "weight_scale": scales(96), BESIDE + "weight_zero_point": scales(1)},
        NOTHING,
        "zero points",
    ),
    "the names of GPTQ": (
        {PROJECTION: None, BESIDE + "qweight": torch.ones(2, 2, dtype=torch.int32)},
        NOTHING,
        PROJECTION,
    ),
}


def packed(matrix: Numbers, bits: int, axis: int = 1) -> torch.Tensor:
    """Return signed codes as compressed-tensors packs them, by its definition: the first one in the lowest bits."""
    lines = (matrix if axis == 1 else matrix.T).astype(int) + 2 ** (bits - 1)
    step = 32 // bits
    words = [
        [
            sum(int(code) << bits * i for i, code in enumerate(line[start : start + step]))
            for start in range(0, len(line), step)
        ]
        for line in lines
    ]
    found = torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))
    return found if axis == 1 else found.T.contiguous()


def packed_config(bits: int, group: int | None, symmetric: bool = True) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return compressed("pack-quantized", "int", **strategy, num_bits=bits, symmetric=symmetric)


def packed_tensors(bits: int, group: int | None, zero: bool = False) -> tuple[dict[str, torch.Tensor | None], Numbers]:
    """Return the tensors of a packed projection ``[96, 64]``, and its values."""
    rng, half = np.random.default_rng(bits), 2 ** (bits - 1)
    found, groups = rng.integers(-half, half, (96, 64)), 64 // group if group else 1
    scale, points = scales(96, groups), rng.integers(-half, half, (96, groups)) * zero
    tensors: dict[str, torch.Tensor | None] = {PROJECTION: None, BESIDE + "weight_packed": packed(found, bits)}
    tensors |= {BESIDE + "weight_scale": scale, BESIDE + "weight_shape": torch.tensor([96, 64])}
    if zero:
        tensors[BESIDE + "weight_zero_point"] = packed(points, bits, 0)
    spread_points, spread_scale = (np.repeat(each, 64 // groups, axis=1) for each in (points, scale.numpy()))
    return tensors, ((found - spread_points).astype(np.float32) * spread_scale).astype(np.float32)


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_are_read_from_their_words(folder: Path, bits: int, group: int | None, zero: bool) -> None:
    tensors, expected = packed_tensors(bits, group, zero)
    write(folder, tensors, **packed_config(bits, group, not zero))
    model = load_folder(folder, resolve_source(str(folder)))
    np.testing.assert_array_equal(model.module.get_parameter(PROJECTION).numpy(), expected)
    np.testing.assert_array_equal(model.weights.rows(PROJECTION, 37, 71), expected[37:71])


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_compressed_tensors_packs_has_the_values_that_it_unpacks(
    folder: Path, bits: int, group: int | None, zero: bool
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    config = packed_config(bits, group, not zero)
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    shape, half = (96, 64 // group if group else 1), 2 ** (bits - 1)
    points = torch.from_numpy(np.random.default_rng(2).integers(-half, half, shape).astype(np.int8))
    given = {"weight": load_file(folder / "model.safetensors")[PROJECTION], "weight_scale": scales(*shape) * 100 / half}
    compressed_ = PackedQuantizationCompressor.compress({**given, "weight_zero_point": points * zero}, scheme)
    expected = PackedQuantizationCompressor.decompress(compressed_, scheme)["weight"]
    assert len(expected.unique()) > half
    write(folder, {PROJECTION: None, **{BESIDE + name: tensor for name, tensor in compressed_.items()}}, **config)
    found = load_folder(folder, resolve_source(str(folder))).module.get_parameter(PROJECTION)
    assert torch.equal(found, expected)


def test_the_last_words_may_have_room_for_more() -> None:
    for bits, axis in ((4, 1), (4, 0), (8, 1)):
        half = 2 ** (bits - 1)
        matrix = np.random.default_rng(0).integers(-half, half, (13, 11))
        packing = Packing(bits, axis, matrix.shape[axis])
        words = packed(matrix, bits, axis)
        assert words.shape[axis] == packing.words
        np.testing.assert_array_equal(packing.unpack(words).numpy(), matrix)


PACKED_WRONGLY: dict[str, tuple[dict[str, torch.Tensor | None], dict[str, Any], str]] = {
    "nothing said": ({}, NOTHING, "does not say how to unpack"),
    "another format": ({}, compressed("int-quantized", "int", "channel"), "does not say how to unpack"),
    "other words": ({BESIDE + "weight_packed": torch.zeros(96, 9, dtype=torch.int32)}, packed_config(4, 16), "[96, 9]"),
    "no words": ({BESIDE + "weight_packed": torch.zeros(96, 8)}, packed_config(4, 16), "is F32"),
    "no scale": ({BESIDE + "weight_scale": None}, packed_config(4, 16), "weight_scale missing"),
    "no shape": ({BESIDE + "weight_shape": None}, packed_config(4, 16), "weight_shape missing"),
    "no matrix": ({BESIDE + "weight_shape": torch.tensor([96])}, packed_config(4, 16), "expected a matrix"),
    "other groups": ({}, packed_config(4, 32), "block of 1 by 32"),
    "no zero points": ({}, packed_config(4, 16, symmetric=False), "weight_zero_point missing"),
    "zero points of symmetric codes": (
        {BESIDE + "weight_zero_point": torch.zeros(12, 4, dtype=torch.int32)},
        packed_config(4, 16),
        "which its symmetric codes do not have",
    ),
    "the weight beside it": ({PROJECTION: torch.ones(96, 64)}, packed_config(4, 16), "there twice"),
    "an order of columns": ({BESIDE + "weight_g_idx": torch.arange(64)}, packed_config(4, 16), "weight_g_idx"),
}


@pytest.mark.parametrize("name", PACKED_WRONGLY)
def test_words_whose_meaning_is_not_certain_are_refused_with_their_name(name: str, folder: Path) -> None:
    changes, config, said = PACKED_WRONGLY[name]
    message = refused(write(folder, {**packed_tensors(4, 16)[0], **changes}, **config)).message
    assert said in message
    assert BESIDE in message


@pytest.mark.parametrize("name", STORED_WRONGLY)
def test_numbers_whose_meaning_is_not_certain_are_refused_with_their_name(name: str, folder: Path) -> None:
    tensors, config, said = STORED_WRONGLY[name]
    message = refused(write(folder, tensors, **config)).message
    assert said in message
    assert BESIDE in message


def test_weights_that_are_not_compressed_yet_are_floats_with_scales_of_no_effect(folder: Path) -> None:
    config = compressed("int-quantized", "int", "channel")
    config["quantization_config"]["quantization_status"] = "frozen"
    # Copied, because the file is written again below, and older versions of safetensors map it.
    expected = load_file(folder / "model.safetensors")[PROJECTION].numpy().copy()
    write(folder, {BESIDE + "weight_scale": scales(96, 1)}, **config)
    model = load_folder(folder, resolve_source(str(folder)))
    np.testing.assert_array_equal(whole(model.weights, PROJECTION), expected)
