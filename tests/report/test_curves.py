"""The curves of a run."""

import numpy as np
import pytest

from vislora.report.curves import draw_curves


def rows(steps):
    found = [{"step": step, "epoch": step / 50, "loss": 1.0 + (-1) ** step * 0.5, "lr": step * 1e-3} for step in steps]
    return [*found, {"step": 50, "val_loss": 0.7}, {"step": 100, "val_loss": 0.4}]


def test_a_long_runs_loss_is_drawn_with_its_mean_and_its_validations():
    figures = draw_curves(rows(range(1, 101)))
    assert [*figures] == ["loss", "lr"]
    raw, mean, validation = figures["loss"].axes[0].lines
    assert raw.get_xydata() == pytest.approx(np.array([(s, 1.5 - s % 2) for s in range(1, 101)]))
    assert mean.get_xdata() == pytest.approx(np.arange(1, 101))
    window = np.arange(100)[:, None] + np.arange(-2, 2)  # of four values, two of each
    wanted = [np.mean([1.5 - (i + 1) % 2 for i in own if 0 <= i < 100]) for own in window]
    assert mean.get_ydata() == pytest.approx(np.array(wanted))
    assert validation.get_xydata() == pytest.approx(np.array([(50, 0.7), (100, 0.4)]))
    labels = [text.get_text() for text in figures["loss"].axes[0].get_legend().get_texts()]
    assert labels == ["training, mean of 4 steps", "validation"]
    (rate,) = figures["lr"].axes[0].lines  # which has no noise to see through
    assert rate.get_ydata() == pytest.approx(np.arange(1, 101) * 1e-3)


def test_each_step_of_a_short_run_is_marked():
    training, _ = draw_curves(rows(range(1, 41)))["loss"].axes[0].lines
    assert training.get_marker() == "o"
    assert training.get_ydata() == pytest.approx(np.array([1.5 - s % 2 for s in range(1, 41)]))
