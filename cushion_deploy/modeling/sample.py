"""Text drawn from the model itself, for calibration without any data."""

from __future__ import annotations

import torch
from torch import Tensor

from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.modeling.past_key_values import reserved_cache
from cushion_deploy.modeling.runner import TorchRunner

SAMPLES, SAMPLE_TOKENS = 32, 256
"""Documents, and tokens in each. A decode step takes little longer for many rows than for few."""


@torch.inference_mode()
def sample_text(model: TorchRunner, seed: int, progress: Progress = silent) -> tuple[str, ...]:
    """Return documents drawn from the model at temperature 1, the same ones for the same seed.

    The first token of each is drawn uniformly from the vocabulary, so that the documents differ in topic. Random
    numbers come from a CPU generator on every device: one number for each token.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(SAMPLE_TOKENS, model.spec.max_positions - len(model.bare_tokens))
    ids = model.tensor(torch.randint(model.spec.vocab_size, (SAMPLES, 1), generator=generator))
    new = torch.cat([ids.new_tensor([model.bare_tokens]).expand(SAMPLES, -1), ids], dim=1)
    cache = reserved_cache(model.spec.num_layers, len(model.bare_tokens) + length)
    for step in range(1, length):
        logits = model.module(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1]
        uniform = torch.rand(SAMPLES, generator=generator, dtype=torch.float64)
        # On a device without float64 the token is drawn on the CPU.
        on_device = model.wide == torch.float64
        drawn = draw(logits, model.tensor(uniform)) if on_device else draw(model.host(logits), uniform)
        new = model.tensor(drawn)[:, None]
        ids = torch.cat([ids, new], dim=1)
        progress("sampling text", step + 1, length)
    return tuple(model.tokenizer.batch_decode(ids, skip_special_tokens=True))


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return one token of each row from softmax(logits), by inversion of the cumulative distribution.

    Args:
        logits: ``[rows, vocab]``.
        uniform: float64 ``[rows]``, in [0, 1).

    Returns:
        int64 ``[rows]``: the first token up to which the probability exceeds ``uniform``.
    """
    # In float64, because in float32 a sum close to 1 no longer grows by the tokens with less than 3e-8.
    cumulative = torch.softmax(logits.float(), dim=-1).double().cumsum(dim=-1)
    # A float64 number below 1 times the sum is rounded to less than the sum, so there always is such a token.
    targets = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]
