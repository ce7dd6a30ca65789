"""Prefix tuning (Eq. 11): train keys and values of a prefix, and optionally static scales; the model is frozen.

L = L_pred + lambda * L_q (``tuning_loss.py``), with straight-through rounding and scales that are constant in L_q
(METHOD section 4). Three differences from the paper:

- By default the model is not quantized while it is tuned, and L_pred is what the prefix changes in its predictions.
- L_q of a window is divided by its value behind the untuned prefix, so that lambda means the same for every model, and
  so that no window rules the others: one whose outlier is beyond the scales can have 400,000 times their error. The
  rounded values in it are constants, because the straight-through gradient of ||X - q(X)||^2 is zero.
- Through the quantized model, the static scales can be trained along with the prefix (learned step size: Esser et al.,
  2020), by L_pred alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import quantized_sites
from cushion_deploy.modeling.teacher import BEGIN
from cushion_deploy.prefix.trace import TuningState, TuningTrace
from cushion_deploy.prefix.tuning_loss import TuningLoss
from cushion_deploy.recipe import Tuning
from cushion_deploy.store import replace_file

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60
"""Wall time between two checkpoints, from which a killed tuning resumes."""
WARM_UP = 10
"""Steps in which the cosine schedule reaches the learning rate, or a tenth of all steps if that is less."""


@dataclass(frozen=True)
class Judged:
    """A state on the held-out text.

    Attributes:
        prediction, error: L_pred, and L_q relative to the untuned prefix.
        whole, later: the mean divergence or cross-entropy, in nats per token: of all predictions, and of those from
            position 16 on, NaN if there are none.
    """

    prediction: float
    error: float
    whole: float
    later: float


@dataclass
class PrefixTuning:
    """One tuning and the state that its steps share.

    Attributes:
        model: the model; the smoothing of ``quantization`` is folded in if it is not yet.
        quantization: prefix and scales to start from, with smoothing and scheme.
        train, held_out: windows int64 ``[windows, window]`` without common text.
        config: loss, lambda, learning rate, schedule, epochs, batch, clipping.
        seed: seed of the order of the windows.
        scratch: folder for the checkpoint; None for no checkpoints.
        progress: where to report progress.
        prefix, scales: those of ``quantization``.
        sites: the Sites that are quantized.
        loss: the loss of ``parameters``.
        parameters: what is trained: ``keys``, ``values``, ``log_scales``.

    Raises:
        UsageError: the prefix is empty, the scheme is not deployable, or there are no scales.
    """

    model: TorchRunner
    quantization: Quantization
    train: IntArray
    held_out: IntArray
    config: Tuning
    seed: int = 0
    scratch: Path | None = None
    progress: Progress = silent
    parameters: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        scheme, scales = self.quantization.scheme, self.quantization.scales
        self.prefix = self.quantization.prefix
        if not self.prefix.length:
            raise UsageError("there is no prefix to tune", hint="search one first, or leave tuning out")
        if not scheme.deployable:
            raise UsageError(
                f"tuning needs a deployable scheme, and {scheme.name} is not one: {scheme.why_not_deployable}",
                hint="tune for w8a8; other schemes can be evaluated behind the tuned prefix",
            )
        if scales is None:
            raise UsageError("tuning needs static scales to start from", hint="run `cushion-deploy calibrate` first")
        self.scales, self.model = scales, self.model.folded(self.quantization.smoothing)
        self.sites = quantized_sites(self.model, scheme)
        known = scales.of(self.sites)
        steps = np.array(list(known.values()), dtype=np.float32)
        self.parameters = {
            "keys": nn.Parameter(self.model.tensor(self.prefix.keys).clone()),
            "values": nn.Parameter(self.model.tensor(self.prefix.values).clone()),
            # As logarithms, so that an update is relative and a scale stays positive.
            "log_scales": nn.Parameter(self.model.tensor(steps).log()),
        }
        self.parameters["log_scales"].requires_grad_(self.config.trains_scales)
        parts = self.sites, scheme.activation_bits, self.prefix.kept, self.config, self.parameters
        self.loss = TuningLoss(self.model, *parts)
        self.steps = math.ceil(len(self.train) / self.config.batch) * self.config.epochs
        self._units: dict[bytes, Tensor] = {}
        self.base_rates = [self.config.learning_rate, self.config.scale_learning_rate]
        groups = [
            {"params": [self.parameters["keys"], self.parameters["values"]], "lr": self.base_rates[0]},
            {"params": [self.parameters["log_scales"]], "lr": self.base_rates[1]},
        ]
        self.optimizer = torch.optim.Adam(groups)

    def run(self) -> tuple[Prefix, ActivationScales, TuningTrace]:
        """Return prefix and scales of the best state on the held-out text, which may be the start, and the trace."""
        trace = TuningTrace(loss=self.config.loss, scales_tuned=self.config.trains_scales, steps=self.steps)
        best, first = self._snapshot(), 0
        with self.loss.ready(np.concatenate([self.train, self.held_out]), self.progress):
            self._measure_untuned()
            resumed = self._resume(trace)
            if resumed is None:
                trace.states.append(self._state(0, self._judge(), math.nan, math.nan))
            else:
                best, first = resumed
            saved = begin = time.monotonic()
            earlier = trace.seconds
            for step in range(first, self.steps):
                prediction, error, stepped = self._step(step)
                trace.skipped += not stepped
                done = step + 1
                if done % self.config.judge_every == 0 or done == self.steps:
                    trace.states.append(self._state(done, self._judge(), prediction, error))
                    if trace.best is trace.states[-1]:
                        best = self._snapshot()
                trace.seconds = earlier + time.monotonic() - begin
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self._save(trace, best, done)
                    saved = time.monotonic()
                note = (
                    f"{self.config.loss} {prediction:.4f}, error {error:.3f}, "
                    f"held-out {trace.states[-1].words} (untuned {trace.states[0].words})"
                )
                self.progress("tuning the prefix", done, self.steps, note)
        return *self._result(best), trace

    def _step(self, step: int) -> tuple[float, float, bool]:
        """Take one optimizer step; return L_pred and L_q of its windows, and whether the parameters were updated."""
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * self._schedule(step)
        rows = self._rows(step)
        self.optimizer.zero_grad(set_to_none=True)
        prediction = error = 0.0
        for start in range(0, len(rows), self.rows_per_pass):
            ids = self.train[rows[start : start + self.rows_per_pass]]
            share = len(ids) / len(rows)
            losses = self.loss.of(ids)
            relative = self._relative(losses.error, ids)
            total = losses.prediction + self.config.error_weight * relative
            (total * share).backward()  # type: ignore[no-untyped-call]
            prediction += share * float(losses.prediction.detach())
            error += share * float(relative.detach())
        trained = [p for p in self.parameters.values() if p.requires_grad]
        finite = bool(torch.isfinite(nn.utils.clip_grad_norm_(trained, self.config.clip)))
        if finite:
            self.optimizer.step()
        return prediction, error, finite

    @property
    def rows_per_pass(self) -> int:
        """Windows in a forward and backward pass: ``config.microbatch``, or as many as the device is best used with."""
        # A GPU is idle with a few windows; a processor is not, and a streamed model is read anew in every pass.
        whole = self.model.device.type != "cpu" or bool(self.model.placed.streamed_layers)
        return self.config.microbatch or (self.config.batch if whole else 1)

    @torch.no_grad()
    def _measure_untuned(self) -> None:
        """Measure L_q of every window behind the untuned prefix."""
        windows = np.concatenate([self.train, self.held_out])
        for start in range(0, len(windows), self.rows_per_pass):
            ids = windows[start : start + self.rows_per_pass]
            for row, error in zip(ids, self.loss.of(ids).error, strict=True):
                self._units[row.tobytes()] = torch.where(error > 0, error, torch.ones_like(error))
            self.progress("measuring the untuned prefix", start + len(ids), len(windows))

    def _relative(self, error: Tensor, ids: IntArray) -> Tensor:
        """Return the mean of L_q of windows, each relative to the untuned prefix."""
        return (error / torch.stack([self._units[row.tobytes()] for row in ids])).mean()

    @torch.no_grad()
    def _judge(self) -> Judged:
        """Return the losses on the held-out text."""
        prediction = error = 0.0
        tokens = []
        for start in range(0, len(self.held_out), self.rows_per_pass):
            ids = self.held_out[start : start + self.rows_per_pass]
            losses, share = self.loss.of(ids), len(ids) / len(self.held_out)
            prediction += share * float(losses.prediction)
            error += share * float(self._relative(losses.error, ids))
            tokens.append(self.model.array(losses.tokens))
        found = np.concatenate(tokens).astype(np.float64)
        later = found[:, BEGIN:]
        return Judged(prediction, error, float(found.mean()), float(later.mean()) if later.size else math.nan)

    def _state(self, step: int, judged: Judged, prediction: float, error: float) -> TuningState:
        """Return the state after ``step`` steps, whose last one had the losses ``prediction`` and ``error``."""
        # Through the quantized model L_pred itself rises with the error; a model without quantization is not hurt.
        barrier = 0.0 if self.config.quantized else self.config.error_weight * judged.error
        parts = prediction, error, judged.whole, judged.later, judged.error
        return TuningState.after(step, judged.prediction + barrier, *parts)

    def _schedule(self, step: int) -> float:
        if self.config.schedule == "constant":
            return 1.0
        rise = min(1.0, (step + 1) / max(1, min(WARM_UP, self.steps // 10)))
        return rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def _rows(self, step: int) -> IntArray:
        """Return the indices of a step's windows; each epoch uses every window once, in a new order."""
        per_epoch = self.steps // self.config.epochs
        epoch, number = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch, 3]).permutation(len(self.train))
        return order[number * self.config.batch : (number + 1) * self.config.batch]

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def _result(self, best: dict[str, Tensor]) -> tuple[Prefix, ActivationScales]:
        keys, values = self.model.array(best["keys"]), self.model.array(best["values"])
        prefix = Prefix(self.prefix.token_ids, keys, values, self.prefix.model_digest)
        if not self.config.trains_scales:
            return prefix, self.scales.moved(self.scales.scales, prefix)
        found = zip(self.sites, best["log_scales"].exp().tolist(), strict=True)
        return prefix, self.scales.moved({**self.scales.scales, **dict(found)}, prefix)

    def _identity(self) -> str:
        """Return a digest that a checkpoint must match; the scratch folder is specific to everything else."""
        h = hashlib.sha256(self.config.model_dump_json().encode())
        for part in (self.prefix.digest, self.scales.digest, self.quantization.scheme.digest, str(self.seed)):
            h.update(part.encode())
        h.update(np.ascontiguousarray(self.train).data)
        h.update(np.ascontiguousarray(self.held_out).data)
        return h.hexdigest()

    def _save(self, trace: TuningTrace, best: dict[str, Tensor], step: int) -> None:
        if self.scratch is None:
            return
        tensors = {f"now.{name}": t for name, t in self._snapshot().items()}
        tensors |= {f"best.{name}": t for name, t in best.items()}
        for name, parameter in self.parameters.items():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{moment}"] = value
        facts = {"identity": self._identity(), "step": step, "trace": trace.to_json()}
        data = save({k: self.model.array(v) for k, v in tensors.items()}, metadata={"tuning": json.dumps(facts)})
        replace_file(self.scratch / "tuning.safetensors", data)

    def _resume(self, trace: TuningTrace) -> tuple[dict[str, Tensor], int] | None:
        """Restore a checkpoint of the same tuning; return the best state and the steps done, or None."""
        file = self.scratch / "tuning.safetensors" if self.scratch else None
        if file is None or not file.is_file():
            return None
        try:
            restored = self._read(file.read_bytes())
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as e:
            logger.warning("the checkpoint %s is damaged, so the tuning begins again: %s", file, e)
            return None
        if restored is None:
            return None
        tensors, earlier, step = restored
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"now.{name}"])
                moments = {k.rsplit(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"adam.{name}.")}
                if moments:
                    self.optimizer.state[parameter] = moments
        trace.states, trace.seconds, trace.skipped = earlier.states, earlier.seconds, earlier.skipped
        return {name: tensors[f"best.{name}"] for name in self.parameters}, step

    def _read(self, raw: bytes) -> tuple[dict[str, Tensor], TuningTrace, int] | None:
        """Return the tensors, trace and steps of a checkpoint; None if it is of another tuning.

        Raises:
            ValueError, KeyError, TypeError, SafetensorError: it is damaged.
        """
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        facts = json.loads(header["__metadata__"]["tuning"])
        if facts["identity"] != self._identity():
            return None
        tensors = {name: self.model.tensor(value.copy()) for name, value in load(raw).items()}
        for name, parameter in self.parameters.items():
            for kind in ("now", "best"):
                if tensors[f"{kind}.{name}"].shape != parameter.shape:
                    raise ValueError(f"{kind}.{name} is {list(tensors[f'{kind}.{name}'].shape)}")
        return tensors, TuningTrace.from_json(facts["trace"]), int(facts["step"])
