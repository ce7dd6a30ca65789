"""The rule sites-exactly refuses a Site without Q, and a Q that belongs to no Site."""

from __future__ import annotations

from small_graph import HEAD, QKV, broken_lines, whole

from cushion_deploy.core.sites import Site

RULE = "sites-exactly"


def test_a_site_without_q_and_a_q_without_site_are_both_reported() -> None:
    other = Site("layers.0.mlp.down")
    unexpected, missing = broken_lines(whole(), {QKV, other})
    assert unexpected.startswith(f"[{RULE}] {HEAD}/Q: quantizes to 'head.codes'")
    assert missing.startswith(f"[{RULE}] Site {other}: has no QuantizeLinear")
