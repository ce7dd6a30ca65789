"""The weights of a module: on which device they are, what is folded into them, and which of them are quantized.

A model exists once. Folding and quantization replace its weights one tensor at a time, and what was replaced is read
from the checkpoint again; a second copy would double the memory. Layers that do not fit on the device have no weights
between passes: each is read from the checkpoint when it is its turn, folded and quantized on the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from accelerate.utils import compute_module_sizes, set_module_tensor_to_device
from torch import Tensor, nn

from cushion_deploy.core.host import return_freed_memory
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UsageError
from cushion_deploy.families import Family
from cushion_deploy.families.folding import FoldedWeights
from cushion_deploy.modeling.checkpoint import Checkpoint
from cushion_deploy.modeling.fakequant import fake_quantize_weight
from cushion_deploy.modeling.input_rotations import InputRotations
from cushion_deploy.modeling.streamed_layer import StreamedLayer
from cushion_deploy.modeling.weight_state import WeightFormat, WeightState

ROWS = 64
"""Rows of a weight that are folded at once: what is computed of them, in float64 if they are rotated, stays small."""


class PlacedWeights(Mapping[str, Tensor]):
    """The tensors of a module by name, as they are in use now; reading one computes it from the checkpoint.

    Attributes:
        device: where the module runs.
        dtype: floating-point type of weights and activations.
        state: what is folded and quantized.
    """

    def __init__(
        self,
        module: Any,
        checkpoint: Checkpoint,
        family: Family,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Describe a module whose weights are those of the checkpoint; see :meth:`stream` and :meth:`load`."""
        self._module, self._checkpoint, self._family, self._spec = module, checkpoint, family, spec
        self.device, self.dtype = device, dtype
        self.state = WeightState()
        self._streamed: dict[nn.Module, StreamedLayer] = {}
        self._unloaded = False
        self._rotations = InputRotations(module, family, spec)
        self._original_embedding: weakref.ref[nn.Parameter] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor in the current state, on the device."""
        return self.read(name, self.state)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all tensors."""
        return iter(self._checkpoint.names())

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._checkpoint.names())

    def __contains__(self, name: object) -> bool:
        """Return whether the checkpoint has a tensor of this name, without reading it."""
        return name in self._checkpoint.names()

    def read(self, name: str, state: WeightState) -> Tensor:
        """Return a tensor as it is in some state, on the device; the module is not changed."""
        stored = self._stored_name(name)
        weight_format = state.quantized.get(name)
        changed = weight_format is not None or stored in state.touched
        if state.folded is not None and stored in state.touched:
            found = self._folded(stored, state.folded)
        else:
            found = self._checkpoint.tensor(stored, self.device, torch.float32 if changed else self.dtype)
        if weight_format is not None:
            # Quantization sees the weight as the module would hold it. One name for all, so that each copy is freed.
            found = found.to(self.dtype)
            found = found.float()
            found = fake_quantize_weight(found, weight_format.label, weight_format.bits, weight_format.group)
        return found.to(self.dtype)

    def _folded(self, stored: str, folded: FoldedWeights) -> Tensor:
        """Return a folded tensor of the checkpoint, float32 on the device."""
        # mps has no float64, in which rotations are computed.
        place = torch.device("cpu") if self.device.type == "mps" else self.device
        tensor = self._checkpoint.tensor(stored, place, torch.float32)
        found, fold = torch.empty_like(tensor), folded.fold(stored)
        # In pieces, because a rotation is computed in float64.
        for start in range(0, len(tensor), ROWS):
            rows = slice(start, min(start + ROWS, len(tensor)))
            found[rows] = fold.apply(tensor[rows], rows, lambda array: torch.as_tensor(array, device=place))
        return found.to(self.device)

    def state_with(self, smoothing: Smoothing | None) -> WeightState:
        """Return the state with a smoothing folded in and nothing quantized.

        Raises:
            UsageError: the smoothing was measured on another model.
        """
        if smoothing is None:
            return WeightState()
        if self.state.has(smoothing):
            return replace(self.state, quantized={})
        return WeightState(smoothing, FoldedWeights(self._checkpoint, self._family, self._spec, smoothing))

    def use(self, smoothing: Smoothing | None) -> None:
        """Make the module run with a smoothing folded in.

        Raises:
            UsageError: weights are quantized with another smoothing folded in.
        """
        if self._unloaded:
            self._enter(WeightState())
            self.load()
        if self.state.has(smoothing):
            return
        if self.state.quantized:
            raise UsageError(
                "the weights are quantized with another smoothing folded in", hint="leave the simulation first"
            )
        before = self.state.touched
        self._enter(self.state_with(smoothing))
        self._replace(before | self.state.touched)

    @contextmanager
    def quantized(self, smoothing: Smoothing | None, formats: Mapping[str, WeightFormat]) -> Iterator[None]:
        """Run with some weights replaced by their dequantized codes, and a smoothing folded in; restored on exit.

        Raises:
            UsageError: a weight contains NaN or infinity.
        """
        self.use(smoothing)
        before = self.state
        self.state = replace(before, quantized={**before.quantized, **formats})
        try:
            self._replace(formats.keys())
            yield
        finally:
            self.state = before
            self._replace(formats.keys())

    def plan(self, memory: int) -> list[str]:
        """Return the paths of the layers that do not fit into ``memory`` bytes, the last ones of the model.

        What is not a layer is always on the device, and room for one streamed layer is kept free.
        """
        sizes = compute_module_sizes(self._module, dtype=self.dtype)
        paths = [self._family.layer(i) for i in range(self._spec.num_layers)]
        largest = max(sizes[path] for path in paths)
        room = memory - (sizes[""] - sizes[self._family.layers])
        if room >= sizes[self._family.layers]:
            return []
        room -= largest
        kept = 0
        while kept < len(paths) and room >= sizes[paths[kept]]:
            room -= sizes[paths[kept]]
            kept += 1
        return paths[kept:]

    def stream(self, layer: nn.Module, path: str) -> None:
        """Read the weights of a layer whenever it runs; ``path`` is its path in the module."""
        self._streamed[layer] = hook = StreamedLayer(self, f"{path}.", self.device)
        add_hook_to_module(layer, hook)

    @torch.inference_mode(False)
    def load(self, progress: Progress = silent) -> None:
        """Read the weights of all that is not streamed from the checkpoint, and move what it does not have."""
        streamed = [hook.path for hook in self._streamed.values()]
        names = [name for name in self._module.state_dict() if not name.startswith(tuple(streamed))]
        for done, name in enumerate(names, 1):
            if name in self:
                set_module_tensor_to_device(self._module, name, self.device, value=self[name])
            progress("loading weights", done, len(names))
        # Buffers that no checkpoint has, such as rotary frequencies.
        for name, buffer in list(self._module.named_buffers()):
            if buffer.device != self.device:
                set_module_tensor_to_device(self._module, name, self.device)
        self._module.tie_weights()
        self._module.requires_grad_(False)
        self._unloaded = False
        return_freed_memory()

    def unload(self) -> None:
        """Free the weights until the module runs again.

        Raises:
            UsageError: weights are quantized.
        """
        if self.state.quantized:
            raise UsageError("quantized weights cannot be unloaded", hint="leave the simulation first")
        for name, _ in list(self._module.named_parameters()):
            set_module_tensor_to_device(self._module, name, "meta")
        self._module.tie_weights()
        self._unloaded = True
        return_freed_memory()

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """Run on the CPU within the context.

        Raises:
            UsageError: weights are quantized.
        """
        home = self.device
        self._move(torch.device("cpu"))
        try:
            yield
        finally:
            self._move(home)

    @torch.inference_mode(False)
    def _move(self, device: torch.device) -> None:
        self.unload()
        self.device = device
        self._enter(self.state)
        for hook in self._streamed.values():
            hook.execution_device = device
        self.load()

    @property
    def streamed_layers(self) -> int:
        """Number of layers whose weights are not kept on the device."""
        return len(self._streamed)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that are kept on the device."""
        return sum(p.numel() * p.element_size() for p in self._module.parameters() if not p.is_meta)

    @contextmanager
    def held(self, layer: nn.Module) -> Iterator[None]:
        """Keep the weights of a layer on the device within the context."""
        hook = self._streamed.get(layer)
        if hook is None:
            yield
            return
        with hook.held(layer):
            yield

    def _enter(self, state: WeightState) -> None:
        """Change the state, and rotate the inputs of linears as its smoothing says."""
        self.state = state
        self._rotations.follow(state.smoothing, self.device, self.dtype)

    def _stored_name(self, name: str) -> str:
        """Return the name in the checkpoint: that of the embedding for a tied head."""
        if name == f"{self._family.head}.weight" and (self._spec.tied_head or name not in self._checkpoint.names()):
            return f"{self._family.embedding}.weight"
        return name

    def _embedding(self, current: nn.Parameter) -> nn.Parameter:
        """Return the embedding as it is in the current state; ``current`` is the one of the state before.

        Not in place: a teacher keeps the original embedding as its head. While a teacher does, that one is used again,
        because memory would otherwise hold it twice from then on.
        """
        name = f"{self._family.embedding}.weight"
        if name in self.state.quantized:
            self._original_embedding = weakref.ref(current)
        elif self._original_embedding is not None:
            original, self._original_embedding = self._original_embedding(), None
            if original is not None:
                return original
        return nn.Parameter(self[name], requires_grad=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _replace(self, names: Set[str]) -> None:
        """Replace tensors of the module by what they are in the current state.

        Never in inference mode, whatever the caller is in: tuning takes gradients through these weights.
        """
        embedding, head = f"{self._family.embedding}.weight", f"{self._family.head}.weight"
        if embedding in names and self._stored_name(head) == embedding:
            names = {*names, head}
        # The embedding first, because a tied head becomes what it is then.
        for name in sorted(names, key=lambda name: (name != embedding, name)):
            path, _, attribute = name.rpartition(".")
            owner = self._module.get_submodule(path)
            if getattr(owner, attribute).is_meta:
                continue
            if name not in self.state.quantized and self._stored_name(name) != name:
                tied: nn.Parameter = self._module.get_parameter(self._stored_name(name))
                setattr(owner, attribute, tied)
                continue
            if name == embedding:
                setattr(owner, attribute, self._embedding(getattr(owner, attribute)))
            elif name == head:
                # Not in place: a tied head is the embedding, and a teacher keeps the original head.
                setattr(owner, attribute, nn.Parameter(self[name], requires_grad=False))
            else:
                # In place, because memory that is freed between others is not returned to the system.
                getattr(owner, attribute).copy_(self[name])
        return_freed_memory()
