"""What every rule about scales demands of their values: finite, positive (a scale of 0 is refused), not subnormal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TINY = float(np.finfo(np.float32).tiny)
"""The smallest normal float32; engines flush smaller numbers to zero."""


def unusable(scales: npt.NDArray[np.generic]) -> str | None:
    """Return what is wrong with the values of a scale, or None."""
    values = scales.astype(np.float64)
    if not np.isfinite(values).all():
        return "a scale that is NaN or infinite"
    if (values <= 0).any():
        return f"a scale of {float(values.min())}, which is not positive"
    if (values < TINY).any():
        return f"a subnormal scale of {float(values.min()):.3g}"
    return None
