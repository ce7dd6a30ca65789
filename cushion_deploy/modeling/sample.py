"""Text drawn from the model itself, for calibration without any data."""

from __future__ import annotations

import torch

from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.modeling.runner import TorchRunner

SAMPLES, SAMPLE_TOKENS = 32, 256
"""Documents, and tokens in each. A decode step takes little longer for many rows than for few."""


@torch.inference_mode()
def sample_text(model: TorchRunner, seed: int, progress: Progress = silent) -> tuple[str, ...]:
    """Return documents drawn from the model at temperature 1, the same ones for the same seed.

    The first token of each is drawn uniformly from the vocabulary, so that the documents differ in topic. Random
    numbers come from a CPU generator on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(SAMPLE_TOKENS, model.spec.max_positions - len(model.bare_tokens))
    ids = model.tensor(torch.randint(model.spec.vocab_size, (SAMPLES, 1), generator=generator))
    before = ids.new_tensor([model.bare_tokens]).expand(SAMPLES, -1)
    output = model.module(input_ids=torch.cat([before, ids], dim=1), use_cache=True)
    for step in range(1, length):
        probabilities = torch.softmax(output.logits[:, -1].float(), dim=-1)
        token = model.tensor(torch.multinomial(model.host(probabilities), 1, generator=generator))
        ids = torch.cat([ids, token], dim=1)
        output = model.module(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        progress("sampling text", step + 1, length)
    return tuple(model.tokenizer.batch_decode(ids, skip_special_tokens=True))
