"""What chance alone would do: intervals around what was measured, and tests of one model against another.

Of shares of samples (Wilson's interval, McNemar's test) and of means over samples (Student's t). Plain arithmetic on
counts and moments, no torch. Entries: `wilson_interval`, `sign_test`, `mean_interval`, `mean_test`.
"""

import math
from statistics import NormalDist

# The terms of a tail that are left out are together no larger than this part of it.
_NEGLIGIBLE = 1e-18


def wilson_interval(num_correct: int, num_total: int, confidence: float) -> tuple[float, float]:
    """Returns the interval of Wilson (1927) around an accuracy, within [0, 1].

    Unlike the textbook p +- z*sqrt(p(1-p)/n) it holds for few samples and for accuracies near 0 and 1.

    Args:
        num_correct: 0 to num_total.
        num_total: at least 1.
        confidence: in (0, 1), such as 0.95.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_total < 1 or not 0 <= num_correct <= num_total or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"got {num_correct} of {num_total} at confidence {confidence}, "
            f"want 0 <= num_correct <= num_total, num_total >= 1, 0 < confidence < 1"
        )
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    share, rest = num_correct / num_total, (num_total - num_correct) / num_total
    centre = (share + z2 / (2 * num_total)) / (1 + z2 / num_total)
    half = math.sqrt(z2 * (share * rest / num_total + z2 / (4 * num_total**2))) / (1 + z2 / num_total)
    # min and max repair rounding: the accuracy itself always lies inside.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def sign_test(num_better: int, num_worse: int) -> float:
    """Returns how likely so many samples in favour of one model are if both are equally good: McNemar's exact test.

    Of two models that see the same samples only those tell which is better that just one of them gets right
    (McNemar 1947, https://doi.org/10.1007/BF02295996). If both are equally good, each of these is as likely to favour
    one as the other: P(X >= num_better) for X ~ Binomial(num_better + num_worse, 1/2). One-sided.

    Args:
        num_better, num_worse: samples that only the first, or only the second, got right; at least 0.
    """
    total = num_better + num_worse
    if 2 * num_better <= total:  # then the terms left out are the few
        return 1.0 - _tail(num_worse + 1, total)
    return _tail(num_better, total)


def mean_interval(mean: float, spread: float, num_samples: int, confidence: float) -> tuple[float, float]:
    """Returns the interval mean +- t * spread / sqrt(num_samples), Student's t with one degree of freedom less.

    It keeps its confidence for means of many samples, whatever they are like, and about for few that are not too
    skewed. A single sample says nothing of the spread: the caller's guess is taken as if there were two.

    Args:
        mean: of the samples.
        spread: their standard deviation, with num_samples - 1 in the denominator.
        num_samples: at least 1.
        confidence: in (0, 1).

    Raises:
        ValueError: an argument is out of range.
    """
    if num_samples < 1 or not spread >= 0 or not 0.0 < confidence < 1.0:
        raise ValueError(f"got {num_samples} samples, spread {spread}, confidence {confidence}, want 1, 0 and more")
    t = _t_of(NormalDist().inv_cdf(0.5 + confidence / 2), max(1, num_samples - 1))
    half = t * spread / math.sqrt(num_samples)
    return mean - half, mean + half


def mean_test(mean: float, spread: float, num_samples: int) -> float:
    """Returns how likely so large a mean difference is if the true one is zero: Student's paired t-test, one-sided.

    For errors of two models on the same independent samples this is the test of F. X. Diebold and R. S. Mariano,
    "Comparing Predictive Accuracy" (Journal of Business & Economic Statistics 13, 1995, 253-263), with the correction
    for few samples of Harvey, Leybourne and Newbold (International Journal of Forecasting 13, 1997, 281-291): neither
    asks errors to be normal, only that there are enough of them for the mean of the differences to be about so.

    Args:
        mean: of the differences, above 0 in favour of the first model.
        spread: their standard deviation, with num_samples - 1 in the denominator.
        num_samples: below 2 nothing can be told.
    """
    if num_samples < 2:
        return 1.0
    if spread == 0.0:
        return 0.0 if mean > 0.0 else 1.0
    return NormalDist().cdf(-_z_of(mean / spread * math.sqrt(num_samples), num_samples - 1))


def _z_of(t: float, freedom: int) -> float:
    """Returns the normal quantile with the same tail as a quantile of Student's t.

    D. L. Wallace, "Bounds on Normal Approximations to Student's and the Chi-Square Distributions" (Annals of
    Mathematical Statistics 30, 1959, 1121-1130): at 95 % off by 4 % with two degrees of freedom, by half a per cent
    with four and by less than a thousandth from ten on. No table and no library of special functions is needed.
    """
    return math.copysign(_shrink(freedom) * math.sqrt(freedom * math.log1p(t * t / freedom)), t)


def _t_of(z: float, freedom: int) -> float:
    return math.sqrt(freedom * math.expm1((z / _shrink(freedom)) ** 2 / freedom))


def _shrink(freedom: int) -> float:
    return (8 * freedom + 1) / (8 * freedom + 3)


def _tail(first: int, total: int) -> float:
    """Sums the probabilities of `first` and more of `total` tosses, for more than half of them."""
    if first > total:
        return 0.0
    log_term = math.lgamma(total + 1) - math.lgamma(first + 1) - math.lgamma(total - first + 1)
    term = math.exp(log_term - total * math.log(2))
    tail = 0.0
    for number in range(first, total + 1):
        tail += term
        term *= (total - number) / (number + 1)
        if term < tail * _NEGLIGIBLE:
            break
    return min(1.0, tail)
