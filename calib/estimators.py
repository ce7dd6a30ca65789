"""Range estimators: from a histogram of magnitudes to the threshold that the largest code represents."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cushion_deploy.core.fakequant import qmax
from cushion_deploy.core.scales import Estimator
from cushion_deploy.errors import UsageError

BINS = 8192
Counts = npt.NDArray[np.int64]


@dataclass
class MagnitudeHistogram:
    """Histogram of absolute values on [0, limit]; the limit doubles until it covers all values.

    Doubling merges bins in pairs, so the result does not depend on the order of the batches; only a value that was
    exactly the limit, which is in the last bin then, counts one bin lower than it would later.

    Attributes:
        limit: upper edge, a power of two; 0 before the first batch.
        counts: int64 ``[BINS]``.
        amax: largest magnitude seen, exact.
        low, high: smallest and largest value seen, exact, and at most and at least 0.
    """

    limit: float = 0.0
    amax: float = 0.0
    counts: Counts = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    low: float = 0.0
    high: float = 0.0

    def cover(self, amax: float) -> None:
        """Double the limit until it is at least ``amax`` (finite, positive); call it before :meth:`add`."""
        needed = float(2.0 ** np.ceil(np.log2(amax)))
        if self.limit == 0.0:
            self.limit = needed
        while self.limit < needed:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2, dtype=np.int64)])
            self.limit *= 2
        self.amax = max(self.amax, amax)

    def widen(self, low: float, high: float) -> None:
        """Extend the signed range to the smallest and the largest value of one batch."""
        self.low, self.high = min(self.low, low), max(self.high, high)

    def add(self, counts: Counts) -> None:
        """Add the counts of one batch, int64 ``[BINS]`` over [0, limit]."""
        self.counts = self.counts + counts

    @property
    def centers(self) -> npt.NDArray[np.float64]:
        """Bin centers, float64 ``[BINS]``."""
        return np.asarray((np.arange(BINS) + 0.5) * (self.limit / BINS), dtype=np.float64)


@dataclass(frozen=True)
class RangeEstimator:
    """Chooses the range of a static scale from a histogram.

    Attributes:
        name: ``max`` is the maximum (not a moving average); ``percentile`` is the smallest bin edge that covers that
            share of the magnitudes; ``mse`` is the threshold that minimizes the mean squared quantization error of
            rounding and clipping together.
        percentile: share of the magnitudes that ``percentile`` covers, 0 to 100.
    """

    name: Estimator
    percentile: float = 100.0

    def threshold(self, histogram: MagnitudeHistogram, bits: int = 8) -> float:
        """Return the magnitude that the largest symmetric code represents."""
        if self.name == "max":
            return histogram.amax
        if self.name == "percentile":
            cumulative = np.cumsum(histogram.counts)
            index = int(np.searchsorted(cumulative, cumulative[-1] * (self.percentile / 100)))
            return min(histogram.amax, (index + 1) * histogram.limit / BINS)
        return _least_squares(histogram, bits)

    def signed_range(self, histogram: MagnitudeHistogram) -> tuple[float, float]:
        """Return the smallest and the largest value that asymmetric codes represent; the range includes zero.

        Raises:
            UsageError: the estimator is not ``max``; the others need signed values, and the histogram has magnitudes.
        """
        if self.name != "max":
            raise UsageError(
                f"estimator {self.name} has no asymmetric form: the histogram has magnitudes, not signed values",
                hint="choose the estimator max, or symmetric activations",
            )
        return histogram.low, histogram.high


def _least_squares(histogram: MagnitudeHistogram, bits: int) -> float:
    """Return the best threshold: a scan from the maximum to 1/64 of it in steps of 2 %, then a finer one."""
    used = histogram.counts > 0
    x, weight = histogram.centers[used], histogram.counts[used].astype(np.float64)

    def error(t: float) -> float:
        step = t / qmax(bits)
        codes = np.minimum(np.rint(x / step), qmax(bits))
        return float(weight @ (x - codes * step) ** 2)

    coarse = histogram.amax * np.geomspace(1.0, 1 / 64, 210)
    best = min(coarse, key=error)
    fine = np.minimum(best * np.linspace(0.98, 1.02, 17), histogram.amax)
    return float(min(fine, key=error))
