"""The torch side of the ladder: floating point and fake-quant on the parity text, behind the prefix."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.fakequant import quantize_weight
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.simulate import quantized_sites, simulated
from cushion_deploy.parity.blame import SiteInputs
from cushion_deploy.parity.constants import LinearWeights
from cushion_deploy.parity.ladder import GREEDY_TOKENS, TorchReference
from cushion_deploy.parity.segments import SiteCodes

PROMPT_TOKENS = 32


def torch_reference(
    model: TorchRunner,
    prefix: Prefix,
    scales: ActivationScales,
    scheme: QuantScheme,
    ids: IntArray,
    windows: IntArray,
    progress: Progress = silent,
    original: TorchRunner | None = None,
    kv: KvScales | None = None,
) -> TorchReference:
    """Run both torch models.

    Args:
        model, prefix, scales, scheme: what is deployed; smoothing is folded into ``model``.
        ids: int64 ``[1, n]`` for logits and codes.
        windows: int64 ``[count, window]`` for perplexity.
        progress: where to report windows done.
        original: the model before folding; floating point is compared with it, so that folding is proven too.
        kv: scales of an INT8 cache; None for one in floating point.
    """
    plain = logits(original or model, ids, prefix)
    codes: SiteCodes = {}
    with simulated(model, scheme, scales, lambda site, c: codes.__setitem__(site, c.numpy()), kv):
        quantized = model.logits(ids, prefix)
    losses = []
    with simulated(model, scheme, scales, kv=kv):
        for done, window in enumerate(windows, 1):
            losses.append(model.token_nll(window[None], prefix)[0])
            progress("perplexity of fake-quant", done, len(windows))
        prompt = ids[:, :PROMPT_TOKENS]
        greedy = _greedy(model, prefix, prompt)
    return TorchReference(ids, plain, quantized, codes, windows, np.stack(losses), prompt, greedy)


@torch.inference_mode()
def float_inputs(model: TorchRunner, prefix: Prefix, ids: IntArray) -> SiteInputs:
    """Return what enters every Site of the floating-point model, ``[1, n, features]``, in computation order.

    Args:
        model, prefix: what is deployed.
        ids: int64 ``[1, n]``.
    """
    found: dict[Site, FloatArray] = {}
    with observed(model, lambda site, x: found.__setitem__(site, x.numpy())):
        model.run(torch.from_numpy(ids), prefix_tensors(prefix))
    return {site: found[site] for site in model.sites}


def linear_codes(model: TorchRunner, scheme: QuantScheme) -> Iterator[LinearWeights]:
    """Yield Site, codes and scales of every linear as fake-quant computes with them, one linear at a time."""
    for site, linears in quantized_sites(model, scheme).items():
        for i, linear in enumerate(linears):
            yield site, *quantize_weight(linear.weight.detach().numpy(), f"{site}[{i}]")


@torch.inference_mode()
def _greedy(model: TorchRunner, prefix: Prefix, prompt: IntArray) -> tuple[int, ...]:
    """Return the greedy continuation, with the whole text run again for every token: no cache that could err."""
    past, ids = prefix_tensors(prefix), torch.from_numpy(prompt)
    for _ in range(GREEDY_TOKENS):
        ids = torch.cat([ids, model.run(ids, past).logits[:, -1:].argmax(-1)], dim=1)
    return tuple(int(i) for i in ids[0, prompt.shape[1] :])
