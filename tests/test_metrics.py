"""Every score against scikit-learn on random data, and the laws that hold without it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from mvcr_cli.engine import metrics


def scored(n: int, classes: int, seed: int, *, ties: bool = False, dtype: type = np.float64):
    """Random probabilities (N, K) that lean towards random labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    if ties:
        logits = np.round(logits)
    shares = np.exp(logits)
    return (shares / shares.sum(axis=1, keepdims=True)).astype(dtype), labels


CASES = [(50, 2, 0), (400, 2, 1), (60, 3, 2), (500, 10, 3), (300, 40, 4)]


@pytest.mark.parametrize(("n", "classes", "seed"), CASES)
def test_confusion_and_class_scores_are_those_of_scikit_learn(n, classes, seed):
    probabilities, labels = scored(n, classes, seed)
    predicted = probabilities.argmax(axis=1)
    confusion = metrics.confusion_matrix(labels, predicted, classes)
    everything = list(range(classes))
    np.testing.assert_array_equal(confusion, reference.confusion_matrix(labels, predicted, labels=everything))
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, predicted, labels=everything, zero_division=np.nan
    )
    reports = metrics.class_reports(confusion, [f"class {k}" for k in everything])
    assert [report.n for report in reports] == support.tolist()
    for mine, theirs in zip(reports, zip(precision, recall, f1, strict=True), strict=True):
        for a, b in zip((mine.precision, mine.recall, mine.f1), theirs, strict=True):
            assert (a is None and math.isnan(b)) or a == pytest.approx(b, abs=1e-12)
    assert metrics.balanced_accuracy(confusion) == pytest.approx(reference.balanced_accuracy_score(labels, predicted))
    present = np.unique(labels)
    macro = reference.f1_score(labels, predicted, labels=present, average="macro", zero_division=0)
    assert metrics.macro_f1(confusion) == pytest.approx(macro)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("n", "classes", "seed"), CASES)
def test_probability_scores_are_those_of_scikit_learn(n, classes, seed, dtype):
    probabilities, labels = scored(n, classes, seed, dtype=dtype)
    everything = list(range(classes))
    loss = reference.log_loss(labels, probabilities, labels=everything)
    assert metrics.log_loss(probabilities, labels) == pytest.approx(loss, rel=1e-5)
    for k in (1, 2, 5):
        if k < classes and classes > 2:
            theirs = reference.top_k_accuracy_score(labels, probabilities, k=k, labels=everything)
            assert metrics.topk_right(probabilities, labels, k) / n == pytest.approx(theirs)
    assert metrics.topk_right(probabilities, labels, classes) == n


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "classes", "seed"), CASES)
def test_auroc_is_that_of_scikit_learn(n, classes, seed, ties):
    probabilities, labels = scored(n, classes, seed, ties=ties)
    if classes == 2:
        theirs = reference.roc_auc_score(labels, probabilities[:, 1])
    else:
        present = np.unique(labels)
        theirs = np.mean([reference.roc_auc_score(labels == k, probabilities[:, k]) for k in present])
    assert metrics.auroc(probabilities, labels) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize(("n", "classes", "seed"), CASES)
def test_calibration_error_is_the_weighted_gap_of_the_calibration_curve(n, classes, seed, bins):
    probabilities, labels = scored(n, classes, seed, ties=seed % 2 == 0)
    confidence = probabilities.max(axis=1)
    correct = (probabilities.argmax(axis=1) == labels).astype(int)
    accuracy, mean = calibration_curve(correct, confidence, n_bins=bins)
    places = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    counts = np.bincount(places, minlength=bins)
    expected = (np.abs(accuracy - mean) * counts[counts > 0]).sum() / n
    assert metrics.calibration_error(probabilities, labels, bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_a_sure_network_is_its_error_rate():
    labels = np.array([0, 1, 2, 0])
    sure = np.eye(3)[[0, 1, 1, 0]]
    assert metrics.calibration_error(sure, labels) == pytest.approx(0.25)
    assert metrics.calibration_error(np.eye(3)[labels], labels) == 0.0


def test_an_absent_class_counts_for_nothing():
    labels, predicted = np.array([0, 0, 2, 2]), np.array([0, 2, 2, 2])
    confusion = metrics.confusion_matrix(labels, predicted, 4)
    assert metrics.balanced_accuracy(confusion) == pytest.approx(0.75)
    assert metrics.macro_f1(confusion) == pytest.approx((2 / 3 + 4 / 5) / 2)
    reports = metrics.class_reports(confusion, "abcd")
    assert (reports[1].n, reports[1].precision, reports[1].recall, reports[1].f1) == (0, None, None, None)


def test_a_class_that_is_predicted_but_absent_has_a_precision_and_no_recall():
    report = metrics.class_reports(metrics.confusion_matrix(np.array([0, 0]), np.array([0, 1]), 2), "ab")[1]
    assert (report.precision, report.recall, report.f1) == (0.0, None, 0.0)


def test_a_class_that_is_never_predicted_has_a_recall_and_no_precision():
    report = metrics.class_reports(metrics.confusion_matrix(np.array([0, 1]), np.array([0, 0]), 2), "ab")[1]
    assert (report.precision, report.recall, report.f1) == (None, 0.0, 0.0)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_one_class_only_has_no_auroc(classes):
    probabilities, _ = scored(20, classes, 0)
    assert metrics.auroc(probabilities, np.zeros(20, dtype=np.int64)) is None


def test_auroc_of_ties_is_a_coin_and_of_order_is_certain():
    labels = np.array([0, 1, 0, 1])
    assert metrics.auroc(np.full((4, 2), 0.5), labels) == 0.5
    right = np.eye(2)[labels]
    assert metrics.auroc(right, labels) == 1.0
    assert metrics.auroc(right[:, ::-1], labels) == 0.0


def test_top_1_is_argmax_also_among_ties():
    probabilities, labels = scored(500, 5, 7, ties=True)
    probabilities[:50] = 0.2
    right = np.sum(probabilities.argmax(axis=1) == labels)
    assert metrics.topk_right(probabilities, labels, 1) == right
    series = [metrics.topk_right(probabilities, labels, k) for k in range(7)]
    assert series[0] == 0
    assert series[5] == series[6] == 500
    assert series == sorted(series)


def test_log_loss_stays_finite_where_the_network_was_sure_and_wrong():
    probabilities, labels = np.eye(2), np.array([1, 1])
    theirs = reference.log_loss(labels, probabilities, labels=[0, 1])
    assert metrics.log_loss(probabilities, labels) == pytest.approx(theirs)
    assert metrics.log_loss(np.full((3, 4), 0.25), np.array([0, 1, 3])) == pytest.approx(math.log(4))


@pytest.mark.parametrize("n", [1, 2, 10, 500, 100_000])
def test_wilson_ends_solve_the_score_equation(n):
    for successes in sorted({0, 1, n // 3, n - 1, n}):
        interval = metrics.wilson(successes, n)
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        assert interval.low < interval.high
        for end in (interval.low, interval.high):
            gap = (successes / n - end) ** 2 - metrics.Z_95**2 * end * (1 - end) / n
            assert gap == pytest.approx(0, abs=1e-12)


def test_wilson_known_values_symmetry_and_nothing():
    interval = metrics.wilson(81, 263)  # Newcombe 1998, table I
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    a, b = metrics.wilson(3, 17), metrics.wilson(14, 17)
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low))
    nothing = metrics.wilson(0, 0)
    assert (nothing.low, nothing.high, nothing.n) == (0.0, 1.0, 0)


def test_nothing_to_score_is_refused_and_not_nan():
    empty, labels = np.zeros((0, 3)), np.zeros(0, dtype=np.int64)
    for score in (metrics.auroc, metrics.log_loss, metrics.calibration_error):
        with pytest.raises(ValueError, match="0 predictions"):
            score(empty, labels)
    for score in (metrics.balanced_accuracy, metrics.macro_f1):
        with pytest.raises(ValueError, match="no pictures"):
            score(np.zeros((3, 3), dtype=np.int64))


def test_scores_are_plain_numbers():
    probabilities, labels = scored(30, 3, 0, dtype=np.float32)
    confusion = metrics.confusion_matrix(labels, probabilities.argmax(axis=1), 3)
    values = [report.f1 for report in metrics.class_reports(confusion, "abc")]
    values += [metrics.balanced_accuracy(confusion), metrics.macro_f1(confusion), metrics.auroc(probabilities, labels)]
    values += [metrics.log_loss(probabilities, labels), metrics.calibration_error(probabilities, labels)]
    assert json.dumps(values)
    assert all(type(value) is float for value in values)
