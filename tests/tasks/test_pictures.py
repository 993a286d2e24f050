import numpy as np
import pytest
import torch

from vmamba.tasks import pictures
from vmamba.tasks.task import LOSS, Score

ACCURACY = Score("top1", "accuracy")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figures that were saved."""
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    return figures


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_learning_curve_plots_what_there_is(drawn, tmp_path):
    history = [{"epoch": e, "train_loss": 1 / e, "val_loss": 2 / e, "val_top1": 0.1 * e} for e in (1, 2)]
    history += [{"epoch": 3, "train_loss": 0.3}]
    pictures.learning_curve(history, (LOSS, ACCURACY, Score("top5", "x")), ACCURACY, tmp_path / "a.png")
    loss, accuracy = drawn[0].axes
    assert drawn[0].get_suptitle() == "3 epochs, best validation accuracy 20.00% in epoch 2"
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[1, 1], [2, 0.5], [3, 0.3]], [[1, 2], [2, 1]]]
    assert [line.get_label() for line in accuracy.lines] == ["validation"]


def test_learning_curve_of_a_score_that_is_better_when_lower(drawn, tmp_path):
    error = Score("error", "colour error", higher_is_better=False, percent=False)
    history = [{"epoch": e, "train_loss": 1.0, "val_error": v} for e, v in ((1, 0.5), (2, 0.25), (3, float("nan")))]
    pictures.learning_curve(history, (LOSS, error), error, tmp_path / "a.png")
    assert drawn[0].get_suptitle() == "3 epochs, best validation colour error 0.2500 in epoch 2"
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["loss", "colour error"]
    assert [line.get_label() for line in drawn[0].axes[1].lines] == ["validation"]


def test_confusion_matrix_shows_shares_of_each_true_class(drawn, tmp_path):
    matrix = np.array([[8, 2, 0], [0, 5, 0], [1, 1, 2]])
    pictures.confusion_matrix(matrix, ["a", "b", "c"], tmp_path / "a.png")
    assert drawn[0].get_suptitle() == "78.95% of 19 images right"
    assert texts(drawn[0]) == ["80", "20", "100", "25", "25", "50"]
    many = np.eye(50, dtype=np.int64) * 3
    many[4, 7] = 2
    pictures.confusion_matrix(many, [f"class {i}" for i in range(50)], tmp_path / "b.png")
    assert texts(drawn[1]) == ["   2  class 4 → class 7"]


def test_predictions_mark_right_and_wrong(drawn, tmp_path):
    image = np.zeros((4, 4, 1), dtype=np.uint8)
    right, wrong = pictures.Sample(image, "cat", "cat", 0.9), pictures.Sample(image, "cat", "dog", 0.75)
    pictures.predictions([right, wrong], [wrong], tmp_path / "a.png")
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_title()]
    assert titles == ["✓ cat\n90%", "✗ dog\n75%", "✗ dog\n75%"]
    assert [text for text in texts(drawn[0]) if text] == ["is cat", "is cat"]
    assert drawn[0].subfigs[0].get_suptitle() == "Images taken at random: 1 of 2 right"


def test_any_class_name_can_be_drawn(tmp_path):
    names = ["caf\udce9\ud800", "$x^$", "price: 5$", "n" * 60]
    labels = [label for name in names for label in [pictures._named(name, 24)]]
    assert labels == [r"caf\xe9\ud800", r"\$x^\$", r"price: 5\$", "n" * 23 + "…"]
    pictures.confusion_matrix(np.eye(4, dtype=np.int64), names, tmp_path / "a.png")
    sample = pictures.Sample(np.zeros((4, 4, 3), dtype=np.uint8), names[0], names[1], 0.5)
    pictures.predictions([sample], [sample], tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.png"))


def test_gallery_keeps_a_random_sample_and_the_worst_mistakes():
    gallery = pictures.Gallery(6, every=1, names=["a", "b"], random_ones=2, most=2)
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 0, 1, 1])
    gallery.add(images[:3], labels[:3], predicted[:3], torch.tensor([0.9, 0.6, 0.8]))
    gallery.add(images[3:], labels[3:], predicted[3:], torch.tensor([0.7, 0.9, 0.9]))
    assert [(m.image.item(), m.true, m.predicted) for m in gallery.mistakes] == [(2, "a", "b"), (3, "b", "a")]
    expected = sorted(torch.randperm(6, generator=torch.Generator().manual_seed(0))[:2].tolist())
    assert [sample.image.item() for sample in gallery.chosen] == expected


def test_pictures_are_written_as_png(tmp_path):
    pictures.learning_curve([{"epoch": 1, "train_loss": 1.0}], (LOSS, ACCURACY), ACCURACY, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
