"""What a recipe, its texts and the model must agree on, checked before anything is searched or calibrated."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.calib.packing import require_window
from cushion_deploy.core.graph_form import require_blocks
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.perplexity import require_tokens
from cushion_deploy.prefix.seeds import seed_ids
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import read_text_files
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run
from cushion_deploy.stages.sensitivity import WINDOW, check_keep_float, is_automatic
from cushion_deploy.stages.windows import Cut, default_window, longest_prefix, require_positions

LARGEST_TENSOR = 2**31 - 1
"""Elements of a tensor in TensorRT."""
SHORTEST_PARITY = 2
"""Tokens of text that the parity ladder needs: one to be fed at once, and one to be decoded."""


def require_calibratable(pipeline: Pipeline, run: Run) -> None:
    """Check what every command needs that searches or calibrates: settings, then the calibration text.

    Raises:
        UsageError: see :func:`require_settings` and :func:`require_calibration_text`.
    """
    require_settings(pipeline, run)
    require_calibration_text(pipeline, run)


def require_settings(pipeline: Pipeline, run: Run) -> None:
    """Check the settings of a recipe against this machine and the model, which is loaded if no run has described it.

    Raises:
        UsageError: the device is not there, or a setting does not fit the model.
    """
    recipe = pipeline.recipe
    if recipe.compute.device not in ("auto", "cpu"):
        # A finished stage needs no device, and torch takes seconds to import.
        from cushion_deploy.modeling.devices import resolve_device

        resolve_device(recipe.compute.device, run.processes)
    files = run.get(pipeline.files)
    text = read_text_files(files.folder)
    require_recipe_fits(recipe, files.spec)
    check_keep_float(files.spec, pipeline.scheme, recipe.export.keep_float)
    if longest_prefix(recipe):
        seed_ids(recipe.search, text.bos_token_id, lambda seed: _tokens(text.tokenizer, seed))


def require_calibration_text(pipeline: Pipeline, run: Run) -> None:
    """Check that the calibration text is long enough for every setting; it may be sampled from the model here.

    Raises:
        UsageError: it is too short; the setting is named.
    """
    files = run.get(pipeline.files)
    tokenizer = read_text_files(files.folder).tokenizer
    _require_calibration_text(pipeline.recipe, files.spec, tokenizer, run.get(pipeline.text))


def require_evaluable(pipeline: Pipeline, run: Run, texts: Sequence[str | None]) -> None:
    """Check that texts are long enough for the windows of the recipe.

    Args:
        pipeline: the pipeline of the recipe.
        run: the work folder.
        texts: as in ``evaluation.data``.

    Raises:
        UsageError: a text cannot be read, is too short, or its windows do not fit the model's positions.
    """
    files = run.get(pipeline.files)
    tokenizer = read_text_files(files.folder).tokenizer
    for data in texts:
        corpus = run.get(pipeline.corpus(data, "evaluation"))
        window = Cut.of(pipeline.recipe, data).window_in(files.spec.max_positions, files.spec.smallest_window)
        require_positions("evaluation.window", window, longest_prefix(pipeline.recipe), files.spec)
        require_tokens(len(_tokens(tokenizer, corpus.text)), window, corpus.name)


def require_comparable(pipeline: Pipeline, run: Run) -> None:
    """Check the text of the parity ladder.

    Raises:
        UsageError: it cannot be read, is too short, or does not fit the model's positions.
    """
    recipe, settings = pipeline.recipe, pipeline.recipe.parity
    tokens = settings.tokens + settings.decode_tokens
    spec = run.get(pipeline.files).spec
    require_positions("parity.tokens + parity.decode_tokens", tokens, longest_prefix(recipe), spec)
    corpus = run.get(pipeline.corpus(recipe.parity.data or recipe.evaluation.data, "evaluation"))
    tokenizer = read_text_files(run.get(pipeline.files).folder).tokenizer
    if (count := len(_tokens(tokenizer, corpus.text))) < SHORTEST_PARITY:
        raise UsageError(
            f"{corpus.name} holds {count} token, and the parity ladder needs {SHORTEST_PARITY}",
            hint="give a longer text with parity.data",
        )


def require_recipe_fits(recipe: Recipe, spec: ModelSpec) -> None:
    """Check that texts fit the model's positions, the embedding its blocks, and the limits of plans TensorRT.

    Raises:
        UsageError: something does not fit; the message names the setting.
    """
    prefix = longest_prefix(recipe)
    needed = {
        "search.text_tokens": recipe.search.text_tokens if prefix else 0,
        "tuning.window": recipe.tuning.window if recipe.tuning.enabled else 0,
        "calibration.window": recipe.calibration.window or 0,
    }
    for setting, tokens in needed.items():
        require_positions(setting, tokens, prefix, spec)
    if recipe.export.embedding == "int8":
        require_blocks(spec)
    _require_plan_limits(recipe, spec)


def _require_plan_limits(recipe: Recipe, spec: ModelSpec) -> None:
    """Check that TensorRT can number the positions of a batch at the limits of the profiles."""
    plans = recipe.tensorrt
    context = min(plans.max_context, spec.max_positions)
    if plans.max_batch * context > LARGEST_TENSOR:
        raise UsageError(
            f"tensorrt.max_batch is {plans.max_batch}: with {context} positions each, the attention mask would have "
            f"more than the {LARGEST_TENSOR} elements that TensorRT can number",
            hint="set tensorrt.max_batch to the prompts that run at once on the device, such as 1 or 8",
        )


def _require_calibration_text(recipe: Recipe, spec: ModelSpec, tokenizer: Tokenizer, corpus: Corpus) -> None:
    found, prefix = len(_tokens(tokenizer, corpus.text)), longest_prefix(recipe)
    # Documents are packed one by one; the blank lines between them do not count.
    encoded = tokenizer.encode_batch(list(corpus.documents), add_special_tokens=False)
    total = sum(len(document.ids) for document in encoded)
    require_window(total, recipe.calibration.window or default_window(spec), corpus.name)
    needed = {
        "search.text_tokens": recipe.search.text_tokens if prefix else 0,
        "two windows of tuning.window": 2 * recipe.tuning.window if recipe.tuning.enabled and prefix else 0,
        "a window of export.keep_float=auto:N": min(WINDOW, spec.max_positions - prefix)
        if any(map(is_automatic, recipe.export.keep_float))
        else 0,
    }
    for setting, tokens in needed.items():
        if found < tokens:
            raise UsageError(
                f"the calibration text {corpus.name} holds {found} tokens, fewer than {setting} = {tokens}",
                hint="give more text with --calib-data, or change the setting",
            )


def _tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
