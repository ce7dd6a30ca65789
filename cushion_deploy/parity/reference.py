"""The torch side of the parity ladder: floating point and fake-quant on the parity text, behind the prefix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, elapsed, silent
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import EMBEDDING_BLOCK, QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.fakequant import weight_codes
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import quantized_sites, simulated
from cushion_deploy.parity.blame import SiteInputs
from cushion_deploy.parity.noise import float_noise
from cushion_deploy.parity.segments import SiteCodes
from cushion_deploy.parity.stored_values import LinearWeights, Table
from cushion_deploy.parity.torch_results import TorchReference

PROMPT_TOKENS = GREEDY_TOKENS = 32


def torch_reference(
    model: TorchRunner, quantization: Quantization, ids: IntArray, windows: IntArray, progress: Progress = silent
) -> TorchReference:
    """Run the model in floating point and in fake-quant.

    Args:
        model: the model as it was loaded. The smoothing of ``quantization`` is folded in for fake-quant only, so that
            the comparison of floating-point logits covers the folding too.
        quantization: what is deployed.
        ids: int64 ``[1, n]`` for logits and codes.
        windows: int64 ``[count, window]`` for perplexity.
        progress: where to report progress.
    """
    prefix, scheme, kv = quantization.prefix, quantization.scheme, quantization.kv_scales
    with elapsed(progress, "logits in floating point"):
        float_logits = model.logits(ids, prefix)
    folded = model.folded(quantization.smoothing)
    codes: SiteCodes = {}

    def keep(site: Site, found: Tensor) -> None:
        codes[site] = folded.array(found)

    with elapsed(progress, "codes of fake-quant"), simulated(folded, scheme, quantization.scales, keep, kv):
        quantized_logits = folded.logits(ids, prefix)
    prompt = ids[:, :PROMPT_TOKENS]
    with ExitStack() as stack:
        with elapsed(progress, "quantizing the weights"):
            stack.enter_context(simulated(folded, scheme, quantization.scales, kv=kv))
        losses = folded.token_nll(windows, prefix, progress, "perplexity of fake-quant")
        greedy = folded.greedy(prompt, prefix, GREEDY_TOKENS, progress, "continuation by fake-quant")
    with elapsed(progress, "rounding noise of the model"):
        noise = float_noise(model, prefix, ids)
    return TorchReference(ids, float_logits, quantized_logits, codes, windows, losses, prompt, greedy, noise)


@torch.inference_mode()
def float_inputs(model: TorchRunner, prefix: Prefix, ids: IntArray) -> SiteInputs:
    """Return the input of every Site of the floating-point model, ``[1, n, features]``, in order of computation.

    Args:
        model: the model, with its smoothing folded in.
        prefix: precedes the text.
        ids: int64 ``[1, n]``.
    """
    found: dict[Site, FloatArray] = {}
    with observed(model, lambda site, x: found.__setitem__(site, model.array(x))):
        model.run(model.tensor(ids), model.past(prefix))
    return {site: found[site] for site in model.sites}


def embedding_codes(model: TorchRunner) -> Table:
    """Return codes and scales of the token embedding as fake-quant uses them."""
    table = model.placed[f"{model.family.embedding}.weight"].float()
    codes, scale = weight_codes(table, "embedding", group=EMBEDDING_BLOCK)
    return model.array(codes).astype(np.int8), model.array(scale)


def linear_codes(model: TorchRunner, scheme: QuantScheme) -> Iterator[LinearWeights]:
    """Yield Site, codes and scales of every quantized linear as fake-quant uses them, one linear at a time."""
    for site in quantized_sites(model, scheme):
        for i, weight in enumerate(model.weights_of(site)):
            codes, scale = weight_codes(weight.float(), f"{site}[{i}]")
            yield site, model.array(codes).astype(np.int8), model.array(scale)[:, 0]
