"""Seeds of a search: the tokens that a prefix begins with because the recipe says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cushion_deploy.errors import UsageError
from cushion_deploy.recipe import Search


def seed_ids(config: Search, bos_token_id: int | None, encode: Callable[[str], Sequence[int]]) -> tuple[int, ...]:
    """Return the token ids of ``search.seed_tokens``.

    Args:
        config: the section of the recipe.
        bos_token_id: what the seed ``<bos>`` means; None if the tokenizer has no such token.
        encode: returns the token ids of text, without special tokens.

    Raises:
        UsageError: the tokenizer has no ``<bos>``, or the seeds are longer than the longest prefix.
    """
    ids: list[int] = []
    for text in config.seed_tokens:
        if text == "<bos>" and bos_token_id is None:
            raise UsageError("the seed is <bos>, which the tokenizer does not have", hint="choose another seed")
        ids += [bos_token_id] if text == "<bos>" and bos_token_id is not None else map(int, encode(text))
    if len(ids) > config.max_length:
        raise UsageError(
            f"the seeds are {len(ids)} tokens, more than search.max_length = {config.max_length}",
            hint="give fewer seeds or a longer prefix",
        )
    return tuple(ids)
