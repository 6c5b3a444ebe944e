import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn

from fasttrain.checkpoint.file import save_checkpoint
from fasttrain.evaluation import ClassFigures, Evaluation, evaluate
from fasttrain.model import build_model
from fasttrain.options import EvaluateOptions
from fasttrain.recipe import Recipe
from fasttrain.runtime import Runtime
from fasttrain.tools.evaluate_checkpoint import evaluate_checkpoint
from tests.helpers import checkpoint_of

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 1, 2, 1, 0])
LOGITS = torch.tensor([[9.0, 0, 0], [0, 3, 0], [0, 5, 0], [0, 0, 1], [4, 0, 0]])

RUNTIME = Runtime(device=torch.device("cpu"))


class Parrot(nn.Module):
    """Returns the logits that it is given as images."""

    def forward(self, images):
        assert not self.training
        return images


def result() -> Evaluation:
    model = Parrot().train()
    loader = [(LOGITS[:3], LABELS[:3]), (LOGITS[3:], LABELS[3:])]  # batches of different size
    evaluation = evaluate(model, loader, RUNTIME)  # type: ignore[arg-type]
    assert model.training
    return evaluation


def test_loss_and_accuracy_weigh_every_image_alike() -> None:
    assert result().accuracy == pytest.approx(3 / 5)
    assert result().loss == pytest.approx(nn.functional.cross_entropy(LOGITS, LABELS).item(), rel=1e-6)


def test_confusion_counts_truth_by_row_and_prediction_by_column() -> None:
    assert result().confusion_KK(3).tolist() == [[2, 0, 0], [0, 1, 1], [0, 1, 0]]


def test_recall_divides_by_the_classs_images_and_precision_by_its_claims() -> None:
    labels_N, predictions_N = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    assert Evaluation(1.0, labels_N, predictions_N, torch.ones(4), torch.ones(4)).per_class(3) == [
        ClassFigures(images=3, recall=2 / 3, precision=1.0, taken_for=1),
        ClassFigures(images=1, recall=1.0, precision=1 / 2, taken_for=None),
        ClassFigures(images=0, recall=None, precision=None, taken_for=None),
    ]


def test_figures_over_many_classes_agree_with_counting_image_by_image() -> None:
    classes, images = 7, 300
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(classes, (images,), generator=generator)
    logits_NK = torch.randn(images, classes, generator=generator) + 2 * nn.functional.one_hot(
        labels_N, classes
    )
    loader = [(logits_NK[:200], labels_N[:200]), (logits_NK[200:], labels_N[200:])]
    found = evaluate(Parrot(), loader, RUNTIME)  # type: ignore[arg-type]
    truths, rows = labels_N.tolist(), logits_NK.tolist()
    ranked = [sorted(range(classes), key=lambda label: -row[label]) for row in rows]
    pairs = [(truth, ranks[0]) for truth, ranks in zip(truths, ranked, strict=True)]
    assert found.top5_accuracy == sum(t in r[:5] for t, r in zip(truths, ranked, strict=True)) / images
    mistakes = Counter(pair for pair in pairs if pair[0] != pair[1])
    listed = found.top_confusions(classes, 10)
    assert [number for *_, number in listed] == [number for _, number in mistakes.most_common(10)]
    assert all(mistakes[truth, prediction] == number for truth, prediction, number in listed)
    f1 = []
    for label in range(classes):
        hits, claimed, there = (
            pairs.count((label, label)),
            sum(p == label for _, p in pairs),
            truths.count(label),
        )
        f1.append(2 / (claimed / hits + there / hits))  # the harmonic mean of hits/claimed and hits/there
    assert found.macro_f1(classes) == pytest.approx(sum(f1) / classes)
    assert found.macro_f1(classes + 3) == pytest.approx(sum(f1) / classes)  # classes that do not occur


def test_misclassified_starts_with_the_most_confident_mistake() -> None:
    assert result().misclassified().tolist() == [2, 3]
    confidence = result().confidences_N
    assert confidence[2] == pytest.approx(LOGITS[2].softmax(0).max().item())


def test_names_of_classes_are_printed_as_they_are(tmp_path, dataset, capsys) -> None:
    classes = ("[red]", "[/b]", *dataset.classes[2:])
    named = dataclasses.replace(dataset, classes=classes)
    recipe = Recipe(width=4)
    save_checkpoint(tmp_path / "last.pt", checkpoint_of(build_model(recipe, 10), recipe, classes))
    evaluate_checkpoint(
        EvaluateOptions(checkpoint=tmp_path / "last.pt", data=named, device="cpu", mistakes=40)
    )
    table = capsys.readouterr().out.split("test image")[0]
    assert "[red]" in table and "[/b]" in table


class Lopsided(nn.Module):
    """Logits are the first two pixels of the first row, so that a mirror image gives others."""

    def forward(self, images):
        return images[:, 0, 0, :2]


def test_views_give_a_second_figure_from_their_mean_logits() -> None:
    rows = torch.tensor(
        [[3.0, 1, 0], [0, 1, 3], [4, 0, 9], [0, 0, 0.5]]
    )  # first two: as is; last two: mirrored
    images, labels = rows[:, None, None, :], torch.tensor([0, 1, 0, 0])
    loader = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    plain = evaluate(Lopsided(), loader, RUNTIME)  # type: ignore[arg-type]
    both = evaluate(Lopsided(), loader, RUNTIME, views="mirror")  # type: ignore[arg-type]
    assert plain.accuracy_views is None and both.accuracy == plain.accuracy
    sums = rows[:, :2] + rows[:, [2, 1]]
    assert both.views_predictions_N.tolist() == sums.argmax(1).tolist() == [0, 0, 0, 0]
    assert (both.accuracy, both.accuracy_views) == (1.0, 0.75)
    assert torch.equal(both.confidences_N, plain.confidences_N) and both.loss == plain.loss


class EveryPixel(nn.Module):
    """Logits that depend on every pixel of an image, differently."""

    def forward(self, images_NCHW):
        weights_KX = torch.sin(torch.arange(5 * images_NCHW[0].numel()).float()).reshape(5, -1)
        return images_NCHW.float().flatten(1) @ weights_KX.T


def test_shifted_views_are_those_of_the_published_trainer() -> None:
    """cifar10-airbench pads by one reflected pixel, crops at both corners, and weighs as here."""
    images = torch.randint(256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8).to(memory_format=torch.channels_last)
    model, labels = EveryPixel(), torch.zeros(50, dtype=torch.int64)

    def mirrored(views):
        return 0.5 * model(views) + 0.5 * model(views.flip(-1))

    padded = torch.nn.functional.pad(images.float(), (1,) * 4, "reflect")
    shifted = [mirrored(padded[:, :, :8, :8]), mirrored(padded[:, :, 2:, 2:])]
    expected = (0.5 * mirrored(images) + 0.5 * torch.stack(shifted).mean(0)).argmax(1)
    found = evaluate(model, [(images, labels)], RUNTIME, views="shifts")  # type: ignore[arg-type]
    assert torch.equal(found.views_predictions_N, expected)
    assert not torch.equal(expected, found.predictions_N)
