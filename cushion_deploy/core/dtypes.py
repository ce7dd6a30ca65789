"""Floating-point types of graphs and caches, and the array types of signatures."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

IntArray = npt.NDArray[np.int64]

Dtype = Literal["float32", "float16", "bfloat16"]

PlanDtype = Literal["auto", "float32", "float16", "bfloat16"]
"""Type of a plan as it is asked for; ``auto`` chooses it from the largest values of the graph."""

CacheDtype = Literal["float32", "float16", "bfloat16", "int8"]
