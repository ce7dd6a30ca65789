"""A torch model behind a prefix as a decoder session, so that code written for engines runs it too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.session import NeedLogits, context_limit, require_kept
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.past_key_values import keys_values
from cushion_deploy.modeling.runner import TorchRunner


class TorchSession:
    """Implements :class:`~cushion_deploy.core.session.DecoderSession` for rows without padding.

    Each call runs the model as it is at that moment: inside :func:`~cushion_deploy.modeling.simulate.simulated` the
    session runs fake-quant.

    Args:
        model: the model.
        prefix: precedes every row and is not counted in the length; may be empty.
    """

    def __init__(self, model: TorchRunner, prefix: Prefix) -> None:
        """Begin with an empty cache."""
        spec = model.spec
        self.contract = GraphContract(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            vocab_size=spec.vocab_size,
            max_positions=spec.max_positions,
            dtype="float32",
            prefix_length=prefix.length,
        )
        self._model, self._prefix = model, model.past(prefix)
        self.reset()

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def reset(self) -> None:
        """Empty the cache."""
        self._past = self._prefix
        self._length = 0

    def close(self) -> None:
        """Empty the cache; the garbage collector frees everything else."""
        self.reset()

    def truncate(self, length: int) -> None:
        """Keep only the first ``length`` tokens of the cache; raises UsageError if it holds fewer."""
        require_kept(length, self._length)
        if length < self._length:
            kept = self.contract.prefix_length + length
            layers = [(keys[:, :, :kept], values[:, :, :kept]) for keys, values in self._past.layers]
            self._past = replace(self._past, layers=layers)
            self._length = length

    @torch.inference_mode()
    def run(
        self,
        ids: IntArray,
        mask: IntArray | None = None,
        positions: IntArray | None = None,
        *,
        need_logits: NeedLogits = "last",
    ) -> FloatArray | None:
        """Append tokens int64 ``[batch, new]`` to those in the cache; a call that fails leaves the cache unchanged.

        Raises:
            UsageError: padding or positions are given, or the context is longer than the model's.
        """
        if mask is not None or positions is not None:
            raise UsageError(
                "a torch session takes neither a mask nor positions",
                hint="give rows of equal length, one after another",
            )
        new, limit = ids.shape[1], context_limit(self.contract)
        if self._length + new > limit:
            raise UsageError(
                f"a context of {self._length + new} tokens is longer than the {limit} that fit behind the prefix",
                hint="give a shorter text",
            )
        tokens, head = self._model.tensor(np.ascontiguousarray(ids)), need_logits != "none"
        options: dict[str, Any] = {"logits_to_keep": new if need_logits == "all" else 1} if head else {}
        out = self._model.run(tokens, self._past, head=head, keep_cache=True, **options)
        self._past = keys_values(out.past_key_values, self._prefix.kept)
        self._length += new
        return self._model.array(out.logits.float()) if head else None
