"""Prove that what was exported and compiled computes what was evaluated, rung by rung."""
