"""What the two flavours of TensorRT do differently: targets and versions."""

from __future__ import annotations

import pytest

from cushion_deploy.engines.tensorrt.flavours import RTX, STANDARD
from cushion_deploy.errors import MissingDependency, UsageError

GPU = "sm87 Orin"


def test_standard_tensorrt_builds_for_the_device_here() -> None:
    assert STANDARD.choose_targets((), [GPU]) == ("sm87",)
    assert STANDARD.choose_targets(("SM87",), [GPU, "sm86 another"]) == ("sm87",)
    with pytest.raises(UsageError, match="builds only for the device here, sm87 Orin, not for sm86") as caught:
        STANDARD.choose_targets(("sm86",), [GPU])
    assert "tensorrt-rtx" in caught.value.hint


def test_targets_are_ordered_and_unique() -> None:
    assert RTX.choose_targets(["SM121", "sm86", "sm80", "sm86"], ()) == ("sm80", "sm86", "sm121")
    assert RTX.choose_targets([], ()) == RTX.default_targets


@pytest.mark.parametrize("version", ["10.3.0", "10.13.2.6", "11.0.0.99"])
def test_versions_with_strong_typing_are_taken(version: str) -> None:
    STANDARD.require_version(version)


@pytest.mark.parametrize("version", ["10.2.0.19", "9.9"])
def test_versions_before_it_are_refused(version: str) -> None:
    with pytest.raises(MissingDependency, match=f"TensorRT {version} is older than 10.3"):
        STANDARD.require_version(version)
