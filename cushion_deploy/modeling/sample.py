"""Text from the model itself, for calibration without any data."""

from __future__ import annotations

import torch

from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.modeling.load import LoadedModel

SAMPLES, SAMPLE_TOKENS = 32, 256
"""Documents, and tokens in each. A step of many rows takes hardly longer than one of few."""


@torch.inference_mode()
def sample_text(model: LoadedModel, seed: int, progress: Progress = silent) -> tuple[str, ...]:
    """Return documents drawn from the model at temperature 1; the same for a seed.

    The first token is drawn uniformly from the vocabulary, which makes the samples differ in topic.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(SAMPLE_TOKENS, model.spec.max_positions - len(model.bare_tokens))
    ids = torch.randint(model.spec.vocab_size, (SAMPLES, 1), generator=generator)
    before = torch.tensor([model.bare_tokens], dtype=torch.int64).expand(SAMPLES, -1)
    output = model.module(input_ids=torch.cat([before, ids], dim=1), use_cache=True)
    for step in range(1, length):
        chances = torch.softmax(output.logits[:, -1].float(), dim=-1)
        token = torch.multinomial(chances, 1, generator=generator)
        ids = torch.cat([ids, token], dim=1)
        output = model.module(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        progress("sampling text", step + 1, length)
    return tuple(model.tokenizer.batch_decode(ids, skip_special_tokens=True))
