"""A realistic report of a small model, as plain JSON data and as the typed document."""

import copy
import math
from typing import Any

import pytest

from cushion_deploy.report.document import Report

LAYERS = 30


def _magnitudes(peak: float) -> list[dict[str, Any]]:
    """Make magnitudes that grow with depth, peak inside and fall at the last layer."""
    rows = []
    for layer in range(LAYERS):
        rise = 1 / (1 + math.exp(-(layer - 9)))
        top = (60 + 0.9 * peak * rise) * (1 if layer < LAYERS - 1 else 0.4)
        top = peak if layer == 20 else min(top, peak)
        rows.append(
            {
                "layer": layer,
                "top1": top,
                "top2": 0.31 * top + 8,
                "top3": 0.12 * top + 7,
                "median": 2 + 0.33 * layer,
            }
        )
    return rows


def _sites() -> list[dict[str, Any]]:
    sites = []
    for layer in range(LAYERS):
        for order, kind in enumerate(("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")):
            amax = (6, 2.2, 9, 4 + 3 * (layer == 11) * 20)[order] * (1.3 + math.sin(1.7 * layer + order) / 2)
            sites.append({"site": f"layers.{layer}.{kind}", "scale": amax / 127 * 0.8, "amax": amax})
    return [*sites, {"site": "head", "scale": 0.31, "amax": 44.0}]


def _tuned(step: int, held_out: float, prediction: float | None, error: float | None) -> dict[str, Any]:
    later = {"whole": None, "later": None, "held_out_error": None}
    return {"step": step, "held_out": held_out, "prediction": prediction, "error": error, **later}


def _candidates(best: float) -> list[dict[str, Any]]:
    tokens = [(198, "\n"), (0, "<|im_start|>"), (216, " "), (30, "."), (28, ","), (264, "<script>alert(1)</script>")]
    return [
        {"token_id": i, "token": t, "source": s, "objective": best * (1 + 0.013 * k)}
        for k, ((i, t), s) in enumerate(
            zip(tokens, ["obvious", "obvious", "screen", "obvious", "random", "random"], strict=True)
        )
    ]


def _parity() -> list[dict[str, Any]]:
    rungs = [
        ("float ONNX against torch", "max |Δlogit|", 3.4e-4, 2e-3, "at most"),
        ("float ONNX against torch", "top-1 agreement", 1.0, 1.0, "at least"),
        ("ONNX against fake-quant", "identical codes", 0.99993, 0.999, "at least"),
        ("ONNX against fake-quant", "largest code difference", 1.0, 1.0, "at most"),
        ("onnxruntime against fake-quant", "perplexity, relative difference", 6.3e-4, 5e-3, "at most"),
        ("onnxruntime against fake-quant", "greedy tokens in common, of 32", 32.0, 24.0, "at least"),
        ("decode against prefill", "max |Δlogit|", 2.9e-5, 1e-3, "at most"),
    ]
    return [
        {"rung": r, "metric": m, "value": v, "limit": lim, "direction": d, "passed": True, "site": None, "note": ""}
        for r, m, v, lim, d in rungs
    ]


_DATA: dict[str, Any] = {
    "schema": 1,
    "tool": {"version": "0.1.0"},
    "created": "2026-03-14T09:26:53Z",
    "model": {
        "family": "llama",
        "parameters": 134515008,
        "source": "HuggingFaceTB/SmolLM2-135M",
        "layers": LAYERS,
        "hidden_size": 576,
        "heads": 9,
        "kv_heads": 3,
        "vocab_size": 49152,
        "weights_digest": "5f" * 32,
    },
    "recipe": {"model": "HuggingFaceTB/SmolLM2-135M", "precision": "w8a8", "calibrate": {"estimator": "mse"}},
    "precision": "w8a8",
    "perplexity": {
        "corpus": "WikiText-2 validation (head)",
        "window": 512,
        "tokens": 65408,
        "text_tokens": 65900,
        "fp": 29.60,
        "fp_prefix": 28.90,
        "quantized": 63.23,
        "quantized_prefix": 31.6,
        "stderr": {"fp": 0.5, "fp_prefix": 0.49, "quantized": 1.25, "quantized_prefix": 0.52},
        "engine": 31.62,
        "engine_stderr": 0.53,
        "divergence": {"fp": 0.0, "fp_prefix": 0.031, "quantized": 0.92, "quantized_prefix": 0.068},
        "divergence_stderr": {"fp": 0.0, "fp_prefix": 0.002, "quantized": 0.03, "quantized_prefix": 0.0041},
        "kl_after_16": {"fp": 0.0, "fp_prefix": 0.0107, "quantized": 0.95, "quantized_prefix": 0.0512},
        "kl_after_16_stderr": {"fp": 0.0, "fp_prefix": 0.001, "quantized": 0.031, "quantized_prefix": 0.003},
    },
    "chat": {
        "prompts": 16,
        "tokens": 63,
        "answer_tokens": 32,
        "answer": {"fp": 0.0, "fp_prefix": 0.0099, "quantized": 0.4, "quantized_prefix": 0.033},
        "answer_stderr": {"fp": 0.0, "fp_prefix": 0.0011, "quantized": 0.02, "quantized_prefix": 0.0044},
        "prompt": {"fp": 0.0, "fp_prefix": 0.021, "quantized": 0.5, "quantized_prefix": 0.044},
        "prompt_stderr": {"fp": 0.0, "fp_prefix": 0.003, "quantized": 0.02, "quantized_prefix": 0.0055},
        "missing": "",
    },
    "search": {
        "mode": "screen",
        "objective": "error",
        "bits": 8,
        "seed_tokens": [],
        "token_ids": [198, 0],
        "tokens": ["\n", "<|im_start|>"],
        "positions_scored": 1482752,
        "positions_full_scan": 50331648,
        "candidates_scored": 392,
        "rank_in_random_sample": [{"rank": 2, "of": 161}, {"rank": 1, "of": 161}],
        "seconds": 214.3,
        "stopped": "the best third token lowered the error only to 0.96 of its value, and less than 0.50 is asked",
        "steps": [
            {
                "token_id": t,
                "token": s,
                "source": "obvious",
                "objective_before": before,
                "objective_after": after,
                "ratio": after / before,
                "accepted": ok,
                "top": _candidates(after),
                "proposed": {"obvious": 24, "self-sink": 64, "gradient": 64, "random": 128},
                "finalists": {"obvious": 3, "self-sink": 5, "gradient": 6, "random": 1},
                "screened": 16384,
            }
            for t, s, before, after, ok in (
                (198, "\n", 81234567.0, 7311111.0, True),
                (0, "<|im_start|>", 7311111.0, 3120011.0, True),
                (216, " ", 3120011.0, 2995210.0, False),
            )
        ],
        "averaging": {
            "tokens": 512,
            "chats": 128,
            "found": {"later": 0.0106, "error": 3120011.0},
            "averaged": {"later": 0.0047, "error": 2910000.0},
            "slack": 1.25,
            "kept": True,
        },
    },
    "tuning": {
        "loss": "distill",
        "scales_tuned": True,
        "steps": 80,
        "seconds": 584.0,
        "kept_step": 80,
        "skipped": 1,
        "states": [
            _tuned(0, 0.0905, None, None),
            _tuned(40, 0.0765, 0.0644, 0.896),
            _tuned(80, 0.0752, 0.0787, 1.073),
        ],
    },
    "choice": {
        "shipped": "with prefix",
        "reason": "divergence",
        "tokens": 1912,
        "answer_tokens": 256,
        "candidates": [
            {
                "name": "without prefix",
                "perplexity": 17.79,
                "divergence": 0.0198,
                "kl_after_16": 0.0195,
                "kl_after_16_stderr": 0.0006,
                "answer": 0.0217,
                "answer_stderr": 0.0022,
            },
            {
                "name": "with prefix",
                "perplexity": 17.06,
                "divergence": 0.035,
                "kl_after_16": 0.0161,
                "kl_after_16_stderr": 0.0007,
                "answer": 0.0116,
                "answer_stderr": 0.0008,
            },
        ],
    },
    "magnitudes": {"without": _magnitudes(24782.0), "with": _magnitudes(110.0)},
    "calibration": {
        "estimator": "mse",
        "corpus": "python topics",
        "tokens": 32768,
        "sites": _sites(),
        "smoothing_alpha": 0.5,
        "rotations": {"mlp.down": 512, "attn.out": 64},
        "window": 512,
        "sliding_window": None,
    },
    "kv_cache": None,
    "export": {
        "opset": 21,
        "linears": 210,
        "packed_linears": 120,
        "quantize_head": True,
        "bytes": 207_000_000,
        "float_bytes": 538_000_000,
        "rules_checked": ["symmetric zero points", "one consumer per Q", "weights stored as INT8"],
        "float_sites": ["layers.3.mlp.down"],
        "float_linears": 1,
    },
    "parity": _parity(),
    "unchecked": [],
    "engines": [
        {
            "engine": "onnxruntime",
            "targets": ["cpu"],
            "linears": 210,
            "int8_linears": 210,
            "fused_attention": 30,
            "ran": True,
            "perplexity": None,
            "stderr": None,
            "note": "",
            "details": {"kernels": {"MatMulInteger": 120}, "rewrites": {"uint8": 120}},
        },
        {
            "engine": "tensorrt-rtx",
            "targets": ["sm80", "sm86", "sm89", "sm120"],
            "linears": 210,
            "int8_linears": 208,
            "fused_attention": 30,
            "ran": False,
            "perplexity": None,
            "stderr": None,
            "note": "no NVIDIA GPU on this machine",
            "details": {},
        },
    ],
    "plan_type": {
        "dtype": "float16",
        "wanted": "auto",
        "margin": 2.0,
        "corpus": "WikiText-2 train",
        "tokens": 16384,
        "values": [
            {"part": part, "tensor": tensor, "value": value, "token": token, "token_id": i, "position": position}
            for part, tensor, value, token, i, position in (
                ("prefix", "a key", 12.5, "\n", 198, -1),
                ("layers.11.mlp", "residual", 1871.25, " ", 216, 77),
                ("head", "MatMul", 44.0, "the", 260, 3),
            )
        ],
    },
    "stages": [
        {"stage": stage, "seconds": seconds, "reused": reused, "ran_on": "cpu, float32" if stage != "load" else ""}
        for stage, seconds, reused in (
            ("load", 3.1, False),
            ("search", 214.3, True),
            ("calibrate", 41.7, False),
            ("export", 6.2, False),
            ("engine onnxruntime", 12.9, False),
            ("engine tensorrt-rtx", 96.0, False),
            ("parity", 58.4, False),
            ("evaluate", 161.0, False),
        )
    ],
    "environment": {
        "python": "3.11.9",
        "platform": "Linux-6.8-x86_64",
        "cpu": "AMD EPYC 7B13, 2 cores",
        "versions": {"numpy": "2.3.1", "onnxruntime": "1.31.1", "torch": "2.13.0"},
        "peak_rss_bytes": 2_310_000_000,
        "peak_device_bytes": None,
    },
}


@pytest.fixture
def data() -> dict[str, Any]:
    """A fresh copy of the report's JSON data, to be changed by the test."""
    return copy.deepcopy(_DATA)


@pytest.fixture
def report(data: dict[str, Any]) -> Report:
    """The typed report of ``data``."""
    return Report.model_validate(data)
