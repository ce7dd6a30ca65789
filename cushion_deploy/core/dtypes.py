"""Floating-point types of graphs and caches, and the array types of signatures."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

IntArray = npt.NDArray[np.int64]

Dtype = Literal["float32", "float16", "bfloat16"]

CacheDtype = Literal["float32", "float16", "bfloat16", "int8"]
