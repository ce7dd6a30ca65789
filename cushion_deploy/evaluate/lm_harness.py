"""The lm-eval model ``cushion``, which runs lm-eval tasks on a bundle or on any other decoder session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.batches import BATCH, score_requests
from cushion_deploy.evaluate.encoding import Encoding
from cushion_deploy.evaluate.scorer import Scorer
from cushion_deploy.evaluate.zeroshot import missing_lm_eval
from cushion_deploy.runtime.generate import generate
from cushion_deploy.runtime.sampling import SamplingParams
from cushion_deploy.runtime.text import load

try:
    # Imported before our model is registered, because lm-eval registers its own models only in an empty registry.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as e:
    if e.name is None or e.name.partition(".")[0] != "lm_eval":
        raise
    raise missing_lm_eval() from e

NEW_TOKENS = 256
"""Maximum generated tokens if the task does not specify it, as in lm-eval's own models."""
Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as text, then the ids of each."""


class ScorerLM(TemplateLM):  # type: ignore[misc]
    """An lm-eval model on top of a :class:`Scorer`; requests run in batches, and shared contexts run once.

    Args:
        scorer: computes log likelihoods.
        encoding: converts text to ids.
        progress: receives the number of finished requests.
        name: name of the task in progress reports.
        batch: contexts that run together.
    """

    def __init__(
        self,
        scorer: Scorer,
        encoding: Encoding,
        progress: Progress = silent,
        name: str = "zero-shot tasks",
        batch: int = BATCH,
    ) -> None:
        """Take over the scorer's session."""
        super().__init__()
        self.scorer, self.encoding, self.batch = scorer, encoding, batch
        self.progress, self.name = progress, name

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return self.encoding.eos_token_ids[0] if self.encoding.eos_token_ids else self.encoding.first_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token used as an empty context."""
        return self.encoding.first_token_id

    @property
    def max_length(self) -> int:
        """Number of tokens that fit into the context, not counting the prefix."""
        return self.scorer.limit

    @property
    def max_gen_toks(self) -> int:
        """Maximum generated tokens if the task does not specify it."""
        return NEW_TOKENS

    @property
    def batch_size(self) -> int:
        """Number of contexts that run at once."""
        return self.batch

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval caches requests."""
        return f"cushion-{self.encoding.keep_bos}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the model's chat template; None if it is not requested or does not exist."""
        found = self.encoding.chat_template
        return found.source if found and chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a prompt; raises UsageError if the model has no chat template."""
        if self.encoding.chat_template is None:
            raise UsageError("the model has no chat template", hint="leave the chat template out")
        return self.encoding.chat_template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, with the model's special tokens unless ``add_special_tokens`` is False."""
        if add_special_tokens is False:
            return [int(i) for i in self.encoding.plain(string)]
        return self.encoding.prompt(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log probability and greediness of each continuation; see lm-eval."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        found = score_requests(self.scorer, pairs, self.batch, self.progress, self.name)
        for (text, _, _), score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, score)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log probability of each whole text, split into windows as in lm-eval."""
        totals = []
        for done, (text,) in enumerate((request.args for request in requests), 1):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            totals.append(sum(self.scorer.loglikelihood(*make_disjoint_window(window))[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
            self.progress(self.name, done, len(requests))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the continuation of each context up to a stop string, greedy unless the task samples."""
        found = []
        for done, (context, settings) in enumerate((request.args for request in requests), 1):
            found.append(self._generate(context, settings))
            self.cache_hook.add_partial("generate_until", (context, settings), found[-1])
            self.progress(self.name, done, len(requests))
        return found

    def _generate(self, context: str, settings: Mapping[str, Any]) -> str:
        until = settings.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        count = int(settings.get("max_gen_toks", NEW_TOKENS))
        if count >= self.max_length:
            raise UsageError(
                f"the task generates {count} tokens, but the context of the model holds only {self.max_length}",
                hint="use a smaller max_gen_toks",
            )
        ids = self.tok_encode(context)[-(self.max_length - count) :] or [self.prefix_token_id]
        params = SamplingParams()
        if settings.get("do_sample"):
            params = SamplingParams(
                temperature=float(settings.get("temperature", 1.0)),
                top_k=int(settings.get("top_k", 0)),
                top_p=float(settings.get("top_p", 1.0)),
                seed=0,
            )
        events = generate(
            self.scorer.session,
            self.encoding.tokenizer,
            ids,
            params,
            count,
            stop_ids=self.encoding.eos_token_ids,
            stop_strings=[s for s in stop if s],
        )
        text = "".join(event.text for event in events)
        self.scorer.reset()
        return text


@register_model("cushion")
class CushionLM(ScorerLM):
    """A bundle on its engine: ``--model cushion --model_args bundle=OUT``.

    Args:
        bundle: folder of the bundle; every file is verified first.
        engine: engine to run on.
        threads: threads of the engine; None for one per core.
        batch_size: contexts that run together; a plan of TensorRT takes as many rows as it was compiled for.
        max_batch_size, device: accepted because lm-eval passes them to every model, and ignored.

    Raises:
        UsageError: the folder does not exist.
        UntrustedArtifact: the bundle is corrupt.
    """

    def __init__(
        self,
        bundle: str | None = None,
        engine: str = "onnxruntime",
        threads: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Verify the bundle and load it."""
        if bundle is None:
            raise UsageError("no bundle was given", hint="add --model_args bundle=OUT")
        generator = load(Path(bundle), engine, threads)
        # A plan may take one row at a time; that is its default.
        usual = BATCH if engine == "onnxruntime" else 1
        batch = int(str(batch_size)) if str(batch_size).isdecimal() else usual
        super().__init__(Scorer(generator.session), Encoding.of_bundle(generator.bundle), batch=batch)


def main() -> None:
    """Run lm-eval's command line with the model ``cushion`` registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
