"""How good predictions are: shares with their intervals, scores a class, ranking and calibration; numpy only.

Everywhere: N pictures, K classes; `labels` (N,) are true class numbers in [0, K), `probabilities` (N, K) have rows that
sum to 1, and `confusion[i, j]` counts pictures of class i that were predicted as j. N is at least 1, or ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mvcr_cli.records import ClassReport, Interval

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution: two-sided 95 %


def wilson(successes: int, n: int) -> Interval:
    """The share `successes / n` with its 95 % Wilson score interval; with n = 0 nothing is known: 0 within [0, 1].

    Sources:
        Wilson 1927; Brown, Cai and DasGupta 2001 recommend it over the normal interval, which is [1, 1] at n of n.
    """
    if n == 0:
        return Interval(value=0.0, low=0.0, high=1.0, n=0)
    share = successes / n
    shrink = 1 + Z_95**2 / n
    centre = (share + Z_95**2 / (2 * n)) / shrink
    half = Z_95 / shrink * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    low = 0.0 if successes == 0 else centre - half  # exact at the ends, where rounding would leave 1e-17
    high = 1.0 if successes == n else centre + half
    return Interval(value=share, low=low, high=high, n=n)


def confusion_matrix(labels: Integers, predicted: Integers, classes: int) -> npt.NDArray[np.int64]:
    """Shape: (K, K), true classes in rows."""
    pairs = labels.astype(np.int64) * classes + predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes).astype(np.int64)


def class_reports(confusion: Integers, names: Sequence[str]) -> tuple[ClassReport, ...]:
    """Precision, recall and F1 of each class; None where a score would be 0 / 0."""
    hits, true, guessed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return tuple(
        ClassReport(
            label=name,
            n=int(true[k]),
            precision=_ratio(hits[k], guessed[k]),
            recall=_ratio(hits[k], true[k]),
            f1=_ratio(2 * hits[k], true[k] + guessed[k]),
        )
        for k, name in enumerate(names)
    )


def balanced_accuracy(confusion: Integers) -> float:
    """Mean recall of the classes that have pictures."""
    present = _present(confusion)
    return float(np.mean(confusion.diagonal()[present] / confusion.sum(axis=1)[present]))


def macro_f1(confusion: Integers) -> float:
    """Mean F1 of the classes that have pictures; a class that is never predicted counts as 0."""
    present = _present(confusion)
    both = (confusion.sum(axis=1) + confusion.sum(axis=0))[present]
    return float(np.mean(2 * confusion.diagonal()[present] / both))


def topk_right(probabilities: Floats, labels: Integers, k: int) -> int:
    """Number of pictures whose class is among the k most probable; of equal ones the lower number comes first."""
    own = _own(probabilities, labels)[:, None]
    numbers = np.arange(probabilities.shape[1])
    before = (probabilities > own) | ((probabilities == own) & (numbers < labels[:, None]))  # (N, K)
    return int((before.sum(axis=1) < k).sum())


def calibration_error(probabilities: Floats, labels: Integers, bins: int = 15) -> float:
    """Expected calibration error: mean gap between top-1 probability and share right, over bins of equal width.

    Sources:
        Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    _own(probabilities, labels)
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    gaps = np.bincount(np.searchsorted(edges, confidence), weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def auroc(probabilities: Floats, labels: Integers) -> float | None:
    """Area under the ROC curve: of class 1 when there are two classes, else the mean of one class against the rest.

    Returns:
        None when no class has pictures both in it and outside it.
    """
    _own(probabilities, labels)
    classes = (1,) if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    areas = [_area(probabilities[:, k], labels == k) for k in classes]
    defined = [area for area in areas if area is not None]
    return float(np.mean(defined)) if defined else None


def log_loss(probabilities: Floats, labels: Integers) -> float:
    """Mean negative log-likelihood in nats; a probability of 0 counts as the smallest step of its number type."""
    own = _own(probabilities, labels)
    floor = np.finfo(probabilities.dtype).eps
    return float(-np.log(np.maximum(own, floor).astype(np.float64)).mean())


def _area(scores: Floats, positive: npt.NDArray[np.bool_]) -> float | None:
    """Mann-Whitney: the chance that a positive scores above a negative, with ties counted half."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each group of equal scores, from 1
    above = ranks[place][positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def _own(probabilities: Floats, labels: Integers) -> Floats:
    """Shape: (N,), the probability given to the true class of each picture."""
    if len(labels) == 0 or len(labels) != len(probabilities):
        raise ValueError(f"{len(probabilities)} predictions for {len(labels)} labels")
    own: Floats = probabilities[np.arange(len(labels)), labels]
    return own


def _present(confusion: Integers) -> npt.NDArray[np.bool_]:
    present: npt.NDArray[np.bool_] = confusion.sum(axis=1) > 0
    if not present.any():
        raise ValueError("no pictures to score")
    return present


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
