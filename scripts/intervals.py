"""How sure a mean is, and a difference of two, by the bootstrap of scipy.

The rows are drawn with replacement, for all systems alike: what is compared is always the same
articles (paired). It tells the uncertainty that comes from the choice of articles, and no other.
"""

RESAMPLES = 9_999
CONFIDENCE = 0.95
SEED = 0
BATCH_ROWS = 1 << 21  # rows drawn at a time, whatever their number: bounds memory at some 100 MB


class Bootstrap:
    """Means of the same rows, drawn again and again.

    Args:
        columns: array of shape [figures, rows], two rows at the least.
    """

    def __init__(self, columns):
        import numpy
        from scipy.stats import bootstrap

        num_rows = columns.shape[1]

        def means(drawn, axis):
            """Return the means of all columns over drawn rows: [batch, rows] to [figures, batch].

            How often each row was drawn is counted once, for all columns.
            """
            offsets = num_rows * numpy.arange(len(drawn))[:, None]
            counts = numpy.bincount((drawn + offsets).ravel(), minlength=drawn.size)
            return columns @ counts.reshape(drawn.shape).T.astype(float) / num_rows

        result = bootstrap(
            (numpy.arange(num_rows),),
            means,
            n_resamples=RESAMPLES,
            batch=max(1, BATCH_ROWS // num_rows),
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=SEED,
        )
        self.num_rows, self.means = num_rows, columns.mean(axis=1)
        self.drawn_means = result.bootstrap_distribution  # [figures, RESAMPLES]
        self.intervals = numpy.stack(result.confidence_interval, axis=1)  # [figures, 2]

    def compare(self, figure: int, other: int) -> dict:
        """Return the difference of two means, its interval and a two-sided p-value.

        p is how often a difference at least as large comes up when there is none: the drawn
        differences are moved to lie around 0 (Efron and Tibshirani 1993, chapter 16). It is no less
        than how often as many rows would all point the same way by chance: of a few, resampling
        draws too little.
        """
        import numpy

        difference = self.means[figure] - self.means[other]
        drawn = self.drawn_means[figure] - self.drawn_means[other]
        # Rounding must not tell a difference from itself.
        as_large = numpy.abs(drawn - difference) >= abs(difference) - 1e-12
        tail = (1 - CONFIDENCE) / 2
        return {
            "difference": float(difference),
            "interval": numpy.quantile(drawn, [tail, 1 - tail]).tolist(),
            "p": max((1 + int(as_large.sum())) / (1 + RESAMPLES), 2.0 ** (1 - self.num_rows)),
        }
