"""Parse kernel names: the optimization profile that a kernel serves, and the ONNX nodes it was built from."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_GROUP = re.compile(r"_myl(\d+)_\d+$")


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """Return the ONNX nodes named in the metadata of a kernel."""
    return tuple(_PROFILE.sub("", node) for node in _NODE.findall(metadata))


def kernel_profiles(kernels: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    """Return the optimization profile of each kernel.

    Kernels are numbered in groups, ``_myl<group>_<index>``. Some kernels and tensors of a group are marked ``[profile
    N]``; those of profile 0 never are.

    Args:
        kernels: name of each kernel, and its whole text.
    """
    of_group: dict[str, int] = {}
    for name, text in kernels:
        group, profile = _GROUP.search(name), _PROFILE.search(text)
        if group and profile:
            of_group[group[1]] = max(of_group.get(group[1], 0), int(profile[1]))

    def profile_of(name: str) -> int:
        group, own = _GROUP.search(name), _PROFILE.search(name)
        return of_group.get(group[1], 0) if group else int(own[1]) if own else 0

    return tuple(profile_of(name) for name, _ in kernels)
