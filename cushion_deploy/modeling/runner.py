"""A model in torch, ready to run behind a constant prefix; the only place where numpy and torch meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
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
from cushion_deploy.core.processes import SINGLE, Processes
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UsageError
from cushion_deploy.families import Family
from cushion_deploy.modeling.checkpoint import Checkpoint
from cushion_deploy.modeling.current_pass import CurrentPass
from cushion_deploy.modeling.past_key_values import KeysValues, keys_values, new_cache
from cushion_deploy.modeling.placement import PlacedWeights
from cushion_deploy.modeling.processes import Reduction, reduce
from cushion_deploy.modeling.sliding_windows import masks_keeping
from cushion_deploy.modeling.sweep import Batch, Sweep
from cushion_deploy.modeling.vocabulary import producible_tokens
from cushion_deploy.modeling.weight_state import WeightFormat

PIECE = 128
"""Tokens whose logits are computed at once: those of a window and a large vocabulary would take a gigabyte."""


@dataclass(frozen=True)
class TorchRunner:
    """A frozen model in eval mode with everything that a forward pass needs.

    Views of one model with different smoothings share its weights, which change when another view runs.

    Attributes:
        spec, family: the model's configuration and its family.
        transformer: the transformers ``...ForCausalLM``, with the weights of the view that ran last; see
            :attr:`module`.
        tokenizer: the transformers tokenizer.
        sites: each Site, ``head`` included, with the linears that share it as input.
        weights: the tensors on disk.
        folder: the Hugging Face folder that the model was loaded from.
        placed: the tensors of ``module``: their device and type, what is folded into them and what is quantized.
        smoothing: the factors that are folded into the weights when this view runs; None for none.
        processes: the processes that share the batches of a sweep.
        current: the pass that is running.
        watchers: called with the last hidden states of every pass, see :meth:`watching_head`.
    """

    spec: ModelSpec
    family: Family
    transformer: Any
    tokenizer: Any
    sites: dict[Site, tuple[nn.Linear, ...]]
    weights: Checkpoint
    folder: Path
    placed: PlacedWeights
    smoothing: Smoothing | None = None
    processes: Processes = SINGLE
    current: CurrentPass = field(default_factory=CurrentPass, repr=False)
    watchers: list[Callable[[Tensor], None]] = field(default_factory=list, repr=False)

    @property
    def device(self) -> torch.device:
        """The device of the module and of all tensors of a pass."""
        return self.placed.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of weights and activations."""
        return self.placed.dtype

    @property
    def wide(self) -> torch.dtype:
        """The type that sums are accumulated in: float64, or float32 on a device that has no float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def module(self) -> Any:
        """The transformers ``...ForCausalLM``, with the smoothing of this view folded in.

        Raises:
            UsageError: weights are quantized with another smoothing folded in.
        """
        self.placed.use(self.smoothing)
        return self.transformer

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

    @cached_property
    def vocabulary(self) -> IntArray:
        """The tokens that some text is encoded to, ascending, int64 ``[n]``; the model may have rows for more."""
        return producible_tokens(self.tokenizer, self.spec.vocab_size)

    @cached_property
    def padding_tokens(self) -> IntArray:
        """The rows of the embedding that no text is encoded to, ascending, int64 ``[n]``."""
        found: IntArray = np.setdiff1d(np.arange(self.spec.vocab_size, dtype=np.int64), self.vocabulary)
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
        """Return the view of the model with a smoothing folded in: this one where there is nothing to fold.

        Raises:
            UsageError: another smoothing is already folded into this model, or it was measured on another model.
        """
        wanted = smoothing.digest if smoothing else ""
        if wanted == self.smoothing_digest:
            return self
        if smoothing is None or self.smoothing_digest:
            raise UsageError(
                "another smoothing is already folded into this model", hint="fold into the model as it was loaded"
            )
        self.placed.state_with(smoothing)
        return replace(self, smoothing=smoothing)

    @contextmanager
    def quantized(self, formats: Mapping[str, WeightFormat]) -> Iterator[None]:
        """Run with some weights, by their names in the module, replaced by their dequantized codes; undone on exit."""
        with self.placed.quantized(self.smoothing, formats):
            yield

    def weights_of(self, site: Site) -> Iterator[Tensor]:
        """Yield the weights ``[out, in]`` of the linears of a Site, folded and not quantized, one at a time."""
        state = self.placed.state_with(self.smoothing)
        for path in self.family.linears(self.spec, head=True)[site]:
            yield self.placed.read(f"{path}.weight", state)

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

    def batches(self, ids: IntArray, mask: IntArray | None, size: int) -> list[Batch]:
        """Cut rows and mask (0 on padding), int64 ``[rows, length]`` each, into batches of ``size`` rows."""
        found = []
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            padded = mask is not None and not mask[part].all()
            found.append(
                Batch(self.tensor(ids[part]), self.tensor(mask[part]) if padded and mask is not None else None)
            )
        return found

    @staticmethod
    def host(tensor: Tensor) -> Tensor:
        """Return a tensor, without its gradient history, on the CPU."""
        return tensor.detach().cpu()

    @staticmethod
    def array(tensor: Tensor) -> npt.NDArray[Any]:
        """Return a tensor as a numpy array of the same type; bfloat16, which numpy does not have, becomes float32."""
        host = TorchRunner.host(tensor)
        found: npt.NDArray[Any] = (host.float() if host.dtype == torch.bfloat16 else host).numpy()
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
        return KeysValues([(keys[None], values[None]) for keys, values in parts], prefix.kept)

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
        """Run text at the positions that follow ``past``; what ``past`` keeps is seen beyond every sliding window.

        Args:
            ids: token ids int64 ``[batch, length]``, or input embeddings ``[batch, length, hidden]``.
            past: what comes before the text, batch size 1 or that of ``ids``; never changed.
            mask: int64 ``[batch, length]``, 0 on padding (left or right); None if nothing is padded.
            head: whether to compute logits (``.logits``) or only hidden states (``.last_hidden_state``).
            keep_cache: whether ``.past_key_values`` of the output also stores the states of the text. A pass whose
                cache nobody reads needs less memory without them.
            options: further arguments of the module, such as ``output_attentions``.

        Returns:
            The transformers output.
        """
        self.current.begin(len(ids), mask)
        module = self.module if head else self.module.base_model
        batch, length = ids.shape[:2]
        begin = past.length
        options["inputs_embeds" if ids.is_floating_point() else "input_ids"] = ids
        cache = options["past_key_values"] = new_cache(past, batch, keep=keep_cache)
        if mask is None:
            options["position_ids"] = self.arange(begin, begin + length)[None]
        else:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + begin
            options["attention_mask"] = torch.cat([mask.new_ones(batch, begin), mask], dim=1)
        # Within the windows, and without a prefix, the model's own masks are right.
        if past.kept and 0 < self.spec.smallest_window < begin + length:
            like, padding = self.zeros(batch, length, 0), options.get("attention_mask")
            options["attention_mask"] = masks_keeping(past.kept, self.spec.windows, module.config, like, padding, cache)
        return module(use_cache=True, **options)

    @torch.inference_mode()
    def sweep(
        self,
        batches: Sequence[Batch],
        past: KeysValues,
        *,
        before: Callable[[int], None] = lambda number: None,
        after: Callable[[int, Tensor], None] = lambda number, hidden: None,
        progress: Progress = silent,
        task: str = "",
    ) -> None:
        """Run many batches, without logits; where weights are streamed, layer by layer, so that each is read once.

        Every process runs its share of the batches; the caller combines what they found with :meth:`reduced`.

        Args:
            batches: all batches, the same in every process.
            past: keys and values before every batch.
            before: called with the number of the batch that runs next, before each of its passes or layers.
            after: called with the number of a batch and its last hidden states ``[rows, length, hidden]``.
            progress, task: where to report the rows that are done, and as what.
        """
        Sweep(self, batches, past, before, after, progress, task).run()

    @contextmanager
    def watching_head(self, watcher: Callable[[Tensor], None]) -> Iterator[None]:
        """Call ``watcher`` with the input of the head, ``[batch, length, hidden]``, in every sweep."""
        self.watchers.append(watcher)
        try:
            yield
        finally:
            self.watchers.remove(watcher)

    def reduce(self, tensor: Tensor, reduction: Reduction) -> Tensor:
        """Return the elementwise sum, maximum or minimum of a tensor over all processes; it is changed in place."""
        return reduce(tensor, reduction, self.processes)

    def of_leader(self, tensor: Tensor) -> Tensor:
        """Return the tensor that the first process has, in every process."""
        return self.reduce(tensor if self.processes.leads else torch.zeros_like(tensor), "sum")

    def reduced(self, values: npt.NDArray[Any], reduction: Reduction) -> npt.NDArray[Any]:
        """Return the elementwise sum, maximum or minimum of an array over all processes."""
        if self.processes.size == 1:
            return values
        return self.array(self.reduce(torch.as_tensor(values.copy()), reduction))

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits float32 ``[..., vocab]`` of last hidden states, scaled and capped as in the model."""
        return self.scaled_logits(self.module.get_submodule(self.family.head)(hidden))

    def scaled_logits(self, scores: Tensor) -> Tensor:
        """Return the logits float32 ``[..., vocab]`` of what the head puts out."""
        found, cap, divisor = scores.float(), self.spec.logit_cap, self.spec.logit_divisor
        found = found / divisor if divisor != 1 else found
        return cap * torch.tanh(found / cap) if cap else found

    def predictions(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the logits of all tokens but the last, in pieces: which tokens, and logits float32 ``[piece, vocab]``.

        A head that is quantized gets the whole text at once, because a dynamic scale covers all of its tokens.

        Args:
            hidden: last hidden states ``[length, hidden]`` of one text.
        """
        length = len(hidden) - 1
        if self.module.get_submodule(self.family.head)._forward_pre_hooks:
            yield slice(0, length), self.head_logits(hidden[None])[0, :-1]
            return
        for start in range(0, length, PIECE):
            piece = slice(start, min(start + PIECE, length))
            yield piece, self.head_logits(hidden[piece])

    def wait(self) -> None:
        """Wait until a GPU has done all work, so that it can be timed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def compute_prefix(self, token_ids: tuple[int, ...]) -> Prefix:
        """Return the Prefix whose keys and values the model computes for ``token_ids`` at positions 0..P-1."""
        if not token_ids:
            return Prefix.empty(self.spec)
        cache = self.run(self.tensor([token_ids]), KeysValues(), head=False, keep_cache=True).past_key_values
        keys, values = (torch.cat(part).float() for part in zip(*keys_values(cache).layers, strict=True))
        return Prefix(token_ids, self.array(keys), self.array(values), self.digest)

    def no_prefix(self) -> Prefix:
        """Return what precedes a text without a prefix: nothing, or a ``<bos>`` that windows move past.

        The model is then the original one. A ``<bos>`` that a search begins with is a prefix, and stays in sight.
        """
        found = self.compute_prefix(self.bare_tokens)
        return replace(found, slides=True) if found.length else found

    @torch.inference_mode()
    def logits(self, ids: IntArray, prefix: Prefix) -> FloatArray:
        """Return logits float32 ``[batch, length, vocab]`` of ``ids`` int64 ``[batch, length]`` behind ``prefix``."""
        return self.array(self.run(self.tensor(ids), self.past(prefix)).logits.float())

    @torch.inference_mode()
    def token_nll(self, ids: IntArray, prefix: Prefix, progress: Progress = silent, task: str = "") -> FloatArray:
        """Return the negative log likelihood (nats) of tokens 1.. of each row behind ``prefix``.

        Args:
            ids: int64 ``[rows, length]``; each row runs alone.
            prefix: the prefix before every row.
            progress, task: where to report the rows done, and as what.

        Returns:
            float32 ``[rows, length - 1]``.
        """
        found = self.zeros(len(ids), ids.shape[1] - 1, dtype=torch.float32)
        tokens = self.tensor(ids)

        def score(number: int, hidden: Tensor) -> None:
            for piece, logits in self.predictions(hidden[0]):
                targets = tokens[number, 1:][piece]
                found[number, piece] = nn.functional.cross_entropy(logits, targets, reduction="none")

        self.sweep(self.batches(ids, None, 1), self.past(prefix), after=score, progress=progress, task=task)
        return self.array(self.reduce(found, "sum"))

    @torch.inference_mode()
    def greedy(
        self, prompt: IntArray, prefix: Prefix, count: int, progress: Progress = silent, task: str = ""
    ) -> tuple[int, ...]:
        """Return the greedy continuation of ``prompt`` int64 ``[1, n]`` behind ``prefix``.

        The whole text is run again for every token, so that no error of a cache can enter. ``progress`` is told the
        number of tokens done, as ``task``.
        """
        past, ids = self.past(prefix), self.tensor(prompt)
        for done in range(1, count + 1):
            ids = torch.cat([ids, self.run(ids, past).logits[:, -1:].argmax(-1)], dim=1)
            progress(task, done, count)
        return tuple(ids[0, prompt.shape[1] :].tolist())
