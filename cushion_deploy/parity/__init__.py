"""The parity ladder: check, rung by rung, that exported and compiled graphs compute what torch computes."""
