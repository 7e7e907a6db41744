"""The order is the authors' permutation and depends on samples consumed alone."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.files.errors import DataError
from megatron_patch.data.order import SampleOrder


def test_it_is_the_authors_permutation() -> None:
    order = SampleOrder(num_segments=4, rows_per_segment=103, global_batch_size=10, seed=11111)
    assert (order.steps_per_segment, order.total_steps) == (10, 40)
    for k in range(4):
        np.random.seed(11111 + k)
        expected = np.random.permutation(103)
        for step in range(10):
            segment, rows = order.batch((k * 10 + step) * 10)
            assert segment == k
            np.testing.assert_array_equal(rows, expected[step * 10 : step * 10 + 10])
    order.close()


def test_any_position_can_be_asked_for_at_once() -> None:
    whole = SampleOrder(5, 31, 6, seed=3)
    batches = {step: whole.batch(step * 6) for step in range(whole.total_steps)}
    for step in np.random.RandomState(1).permutation(whole.total_steps).tolist():
        segment, rows = SampleOrder(5, 31, 6, seed=3).batch(step * 6)
        assert segment == batches[step][0]
        np.testing.assert_array_equal(rows, batches[step][1])


def test_the_published_numbers() -> None:
    order = SampleOrder(num_segments=360, rows_per_segment=1_706_976, global_batch_size=800, seed=11111)
    assert (order.steps_per_segment, order.total_steps) == (2_133, 767_880)


def test_a_position_between_batches_is_refused() -> None:
    order = SampleOrder(2, 30, 8, seed=3)
    with pytest.raises(DataError, match="no multiple of the global batch of 8"):
        order.batch(12)
    with pytest.raises(DataError, match="2 segments of 30 rows give 6 batches"):
        order.batch(48)


def test_fewer_rows_than_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="fewer than one global batch"):
        SampleOrder(2, 7, 8, seed=3)
