"""A torch model behind a prefix as a decoder session, so that whatever runs an engine runs it too."""

from __future__ import annotations

import numpy as np
import torch

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.session import NeedLogits, context_limit, require_kept
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.forward import KeysValues, cache_of, prefix_tensors
from cushion_deploy.modeling.load import LoadedModel


class TorchSession:
    """Implements :class:`~cushion_deploy.core.session.DecoderSession` for rows without padding.

    The model is run as it is at each call: inside :func:`~cushion_deploy.modeling.simulate.simulated` the session is
    that of fake-quantization.

    Args:
        model: the model.
        prefix: stands before every row and is not counted; may be empty.
    """

    def __init__(self, model: LoadedModel, prefix: Prefix) -> None:
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
        self._model, self._prefix = model, prefix_tensors(prefix)
        self.reset()

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def reset(self) -> None:
        """Empty the cache."""
        self._past: KeysValues = self._prefix
        self._length = 0

    def close(self) -> None:
        """Empty the cache; everything else goes with the object."""
        self.reset()

    def truncate(self, length: int) -> None:
        """Keep only the first ``length`` tokens of the cache; raises UsageError when it holds fewer."""
        require_kept(length, self._length)
        if length < self._length:
            kept = self.contract.prefix_length + length
            self._past = [(k[:, :, :kept], v[:, :, :kept]) for k, v in self._past]
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
        """Feed tokens int64 ``[batch, new]`` after those in the cache; a call that fails leaves it as it was.

        Raises:
            UsageError: padding or positions are given, or the context is longer than the model's.
        """
        if mask is not None or positions is not None:
            raise UsageError(
                "a torch session takes neither a mask nor positions",
                hint="give rows of equal length, one after another",
            )
        batch, new = ids.shape
        if self._length + new > context_limit(self.contract):
            raise UsageError(
                f"a context of {self._length + new} tokens is longer than the {context_limit(self.contract)} that the "
                "model has positions for",
                hint="give a shorter text",
            )
        start = self.contract.prefix_length + self._length
        given = {
            "input_ids": torch.from_numpy(np.ascontiguousarray(ids)),
            "position_ids": torch.arange(start, start + new)[None],
            "past_key_values": cache_of(self._past, batch),
            "use_cache": True,
        }
        if need_logits == "none":
            out = self._model.module.base_model(**given)
        else:
            out = self._model.module(**given, logits_to_keep=new if need_logits == "all" else 1)
        self._past = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        self._length += new
        if need_logits == "none":
            return None
        logits: FloatArray = out.logits.float().numpy()
        return logits
