"""A model in torch, ready to run behind a constant prefix; the only place where numpy and torch meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.sites import Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.core.weights import WeightSource
from cushion_deploy.errors import UsageError
from cushion_deploy.families import Family
from cushion_deploy.modeling.fold import fold
from cushion_deploy.modeling.past_key_values import KeysValues, keys_values, length_of, new_cache

CPU = torch.device("cpu")


@dataclass(frozen=True)
class TorchRunner:
    """A frozen model in eval mode with everything that a forward pass needs.

    Attributes:
        spec, family: the model's configuration and its family.
        module: the transformers ``...ForCausalLM``.
        tokenizer: the transformers tokenizer.
        sites: each Site, ``head`` included, with the linears that share it as input.
        weights: the tensors on disk, for export.
        folder: the Hugging Face folder that the model was loaded from.
        smoothing: the factors folded into ``module`` (not into ``weights``); None for none.
        device: where the module and all tensors of a pass are.
        dtype: floating-point type of weights and activations.
    """

    spec: ModelSpec
    family: Family
    module: Any
    tokenizer: Any
    sites: dict[Site, tuple[nn.Linear, ...]]
    weights: WeightSource
    folder: Path
    smoothing: Smoothing | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    _folded: dict[str, TorchRunner] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def decoder(self) -> nn.Module:
        """The module that contains the layers; every forward pass goes through it."""
        found: nn.Module = self.module.get_submodule(self.family.layers.rpartition(".")[0])
        return found

    @property
    def layers(self) -> nn.ModuleList:
        """The layers in order."""
        found: nn.ModuleList = self.module.get_submodule(self.family.layers)
        return found

    @property
    def bare_tokens(self) -> tuple[int, ...]:
        """The tokens before every text when there is no prefix: none, or ``<bos>`` for a family that needs it."""
        bos = self.tokenizer.bos_token_id if self.family.needs_bos else None
        return () if bos is None else (int(bos),)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights and of everything that decides how they run."""
        return self.spec.weights_digest

    @property
    def smoothing_digest(self) -> str:
        """SHA-256 of the folded smoothing; empty for none."""
        return self.smoothing.digest if self.smoothing else ""

    def lineage(self, prefix: Prefix, text: str = "") -> Lineage:
        """Return the lineage of what is measured on this model behind ``prefix``, on the text with digest ``text``."""
        return Lineage(model=self.digest, prefix=prefix.digest, smoothing=self.smoothing_digest, text=text)

    def folded(self, smoothing: Smoothing | None) -> TorchRunner:
        """Return the model with a smoothing folded in: this one where there is nothing to fold.

        The last folded model is kept.

        Raises:
            UsageError: another smoothing is already folded into this model.
        """
        wanted = smoothing.digest if smoothing else ""
        if wanted == self.smoothing_digest:
            return self
        if smoothing is None or self.smoothing_digest:
            raise UsageError(
                "another smoothing is already folded into this model", hint="fold into the model as it was loaded"
            )
        if wanted not in self._folded:
            # Dropped first: two folded copies need not fit into memory.
            self._folded.clear()
            self._folded[wanted] = fold(self, smoothing)
        return self._folded[wanted]

    def encode(self, text: str) -> IntArray:
        """Return the token ids of plain text, int64 ``[n]``, without special tokens."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token; a special token is its name."""
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))

    def tensor(self, values: npt.ArrayLike | Tensor) -> Tensor:
        """Return an array, a number or a tensor of the CPU as a tensor on the device, type unchanged."""
        return torch.as_tensor(values, device=self.device)

    @staticmethod
    def host(tensor: Tensor) -> Tensor:
        """Return a tensor, without its gradient history, on the CPU."""
        return tensor.detach().cpu()

    @staticmethod
    def array(tensor: Tensor) -> npt.NDArray[Any]:
        """Return a tensor as a numpy array of the same type; not bfloat16, which numpy does not have."""
        found: npt.NDArray[Any] = TorchRunner.host(tensor).numpy()
        return found

    def arange(self, start: int, stop: int) -> Tensor:
        """Return the integers from ``start`` up to, not including, ``stop`` on the device, int64."""
        return torch.arange(start, stop, device=self.device)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return zeros on the device, of the model's type unless another is given."""
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def past(self, prefix: Prefix) -> KeysValues:
        """Return the keys and values of a prefix as tensors with batch size 1."""
        parts = zip(self.tensor(prefix.keys).to(self.dtype), self.tensor(prefix.values).to(self.dtype), strict=True)
        return [(keys[None], values[None]) for keys, values in parts]

    def run(
        self,
        ids: Tensor,
        past: KeysValues,
        mask: Tensor | None = None,
        *,
        head: bool = True,
        keep_cache: bool = False,
        **options: Any,
    ) -> Any:
        """Run text at the positions that follow ``past``.

        Args:
            ids: token ids int64 ``[batch, length]``, or input embeddings ``[batch, length, hidden]``.
            past: keys and values before the text, batch size 1 or that of ``ids``; never changed.
            mask: int64 ``[batch, length]``, 0 on padding (left or right); None if nothing is padded.
            head: whether to compute logits (``.logits``) or only hidden states (``.last_hidden_state``).
            keep_cache: whether ``.past_key_values`` of the output also stores the states of the text. A pass whose
                cache nobody reads needs less memory without them.
            options: further arguments of the module, such as ``output_attentions``.

        Returns:
            The transformers output.
        """
        module = self.module if head else self.module.base_model
        batch, length = ids.shape[:2]
        begin = length_of(past)
        options["inputs_embeds" if ids.is_floating_point() else "input_ids"] = ids
        options["past_key_values"] = new_cache(past, batch, keep=keep_cache)
        if mask is None:
            options["position_ids"] = self.arange(begin, begin + length)[None]
        else:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + begin
            options["attention_mask"] = torch.cat([mask.new_ones(batch, begin), mask], dim=1)
        return module(use_cache=True, **options)

    @torch.inference_mode()
    def compute_prefix(self, token_ids: tuple[int, ...]) -> Prefix:
        """Return the Prefix whose keys and values the model computes for ``token_ids`` at positions 0..P-1."""
        if not token_ids:
            return Prefix.empty(self.spec)
        cache = self.run(self.tensor([token_ids]), [], head=False, keep_cache=True).past_key_values
        keys, values = (torch.cat(part).float() for part in zip(*keys_values(cache), strict=True))
        return Prefix(token_ids, self.array(keys), self.array(values), self.digest)

    @torch.inference_mode()
    def logits(self, ids: IntArray, prefix: Prefix) -> FloatArray:
        """Return logits float32 ``[batch, length, vocab]`` of ``ids`` int64 ``[batch, length]`` behind ``prefix``."""
        return self.array(self.run(self.tensor(ids), self.past(prefix)).logits.float())

    @torch.inference_mode()
    def token_nll(self, ids: IntArray, prefix: Prefix) -> FloatArray:
        """Return the negative log likelihood (nats) of tokens 1.. of each row behind ``prefix``.

        Args:
            ids: int64 ``[batch, length]``.
            prefix: the prefix before every row.

        Returns:
            float32 ``[batch, length - 1]``.
        """
        tokens = self.tensor(ids)
        scores = self.run(tokens, self.past(prefix)).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return self.array(loss.reshape(len(tokens), -1))

    @torch.inference_mode()
    def greedy(self, prompt: IntArray, prefix: Prefix, count: int) -> tuple[int, ...]:
        """Return the greedy continuation of ``prompt`` int64 ``[1, n]`` behind ``prefix``.

        The whole text is run again for every token, so that no error of a cache can enter.
        """
        past, ids = self.past(prefix), self.tensor(prompt)
        for _ in range(count):
            ids = torch.cat([ids, self.run(ids, past).logits[:, -1:].argmax(-1)], dim=1)
        return tuple(ids[0, prompt.shape[1] :].tolist())
