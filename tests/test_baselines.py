"""The linear probe against scikit-learn, and the base model under an adapter's head."""

import copy

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression

from vislora.baselines import fit_probe, logistic_regression, without_update
from vislora.lora import Adapters, LoraSettings
from vislora.models.vit import preprocessing
from vislora.recognizer import Recognizer
from vislora.targets.timm import find_targets


def blobs(n=120, d=6, k=3):
    labels = torch.randint(k, (n,))
    return torch.randn(n, d, dtype=torch.float64) + 1.5 * torch.eye(k, d, dtype=torch.float64)[labels], labels


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_logistic_regression_is_scikit_learns(penalty):
    x, labels = blobs()
    weight, bias = logistic_regression(x, labels, 3, penalty)
    theirs = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), labels.numpy())
    mine = (x @ weight.T + bias).softmax(1)
    np.testing.assert_allclose(mine, theirs.predict_proba(x.numpy()), atol=1e-6)


def test_a_probe_depends_on_neither_scale_nor_offset_of_the_features_and_finds_what_there_is():
    x, labels = blobs(400)
    weight, bias = fit_probe(x, labels, 3)
    again, other = fit_probe(x * 50 + 1000, labels, 3)
    mine, theirs = x.float() @ weight.T + bias, (x * 50 + 1000).float() @ again.T + other
    torch.testing.assert_close(mine.softmax(1), theirs.softmax(1), atol=1e-3, rtol=0)
    fresh, truth = blobs(1000)
    best = (fresh @ torch.eye(3, 6, dtype=torch.float64).T).argmax(1)  # the rule that can't be beaten
    accuracy = ((fresh.float() @ weight.T + bias).argmax(1) == truth).float().mean()
    assert accuracy > (best == truth).float().mean() - 0.03


def test_a_probe_is_held_back_where_the_features_say_nothing():
    noise, labels = torch.randn(45, 12, dtype=torch.float64), torch.arange(45) % 3
    weight, _ = fit_probe(noise, labels, 3)
    x = (noise - noise.mean(0)) / noise.std(0)
    theirs = LogisticRegression(C=1 / (1.0 * 45), tol=1e-10).fit(x.numpy(), labels.numpy())  # the strongest penalty
    np.testing.assert_allclose(weight.double() * noise.std(0), theirs.coef_, atol=1e-5)


def test_a_class_without_images_is_never_predicted():
    x, labels = blobs()
    weight, bias = fit_probe(x, 2 * labels, 6)
    logits = x.float() @ weight.T + bias
    assert set(logits.argmax(1).tolist()) == {0, 2, 4}
    assert logits.softmax(1)[:, 1::2].max() < 1e-12
    torch.testing.assert_close(logits[:, ::2], x.float() @ fit_probe(x, labels, 3)[0].T + fit_probe(x, labels, 3)[1])


@pytest.mark.parametrize(
    "settings", [LoraSettings(2, 4), LoraSettings(2, 4, dora=True), LoraSettings(2, 4, bias="all")]
)
def test_without_its_update_the_model_is_the_base_under_the_adapters_head(settings):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3)
    base, images = copy.deepcopy(model.eval()), torch.randn(2, 3, 32, 32)
    untouched, adapters = model(images).detach(), Adapters(model)
    adapters.add("it", find_targets(model, ["q", "v"]), settings, trained=["head", "blocks.1.norm1"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    recognizer = Recognizer(model, preprocessing(model), ("a", "b", "c"), {}, adapters)
    base.head.load_state_dict(model.head.state_dict())
    with torch.no_grad():
        adapted = model(images)
        with without_update(recognizer):
            torch.testing.assert_close(model(images), base(images))
        assert torch.equal(model(images), adapted)
        adapters.remove("it")
        assert torch.equal(model(images), untouched)
    assert not torch.allclose(adapted, base(images), atol=1e-2)
