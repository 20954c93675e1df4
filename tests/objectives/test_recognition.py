"""What is optimised is the smoothed cross-entropy; what is validated, the plain one, and top-1."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from vislora.objectives.recognition import Recognition

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.5, 0.3], [1.0, 3.0, 0.0]])
LABELS = torch.tensor([0, 2, 1])


def log_likelihoods() -> torch.Tensor:
    """log softmax, written out, [N, K]."""
    return (LOGITS.double().exp() / LOGITS.double().exp().sum(1, keepdim=True)).log()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_of_a_sample_is_its_smoothed_cross_entropy(smoothing):
    losses = Recognition(smoothing).losses(nn.Identity(), (LOGITS, LABELS))
    likely = log_likelihoods()
    wanted = -(1 - smoothing) * likely[range(3), LABELS] - smoothing * likely.mean(1)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=0)


def test_validation_is_of_the_plain_loss_of_all_samples_and_of_their_first_classes():
    batches = [(LOGITS[:2], LABELS[:2], torch.arange(2)), (LOGITS[2:], LABELS[2:], torch.arange(2, 3))]
    found = Recognition(0.3).validate(nn.Identity(), batches, Accelerator(cpu=True))
    assert found["val_loss"] == pytest.approx(-log_likelihoods()[range(3), LABELS].mean().item(), rel=1e-6)
    assert found["val_top1"] == pytest.approx(2 / 3)
