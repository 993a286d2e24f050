import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from tasks.toy import Toy, toy_recipe
from timm.utils import ModelEmaV3

from vmamba.errors import RecipeError
from vmamba.tasks.progress import Progress
from vmamba.tasks.task import LOSS, Means, Score, class_table, rounded


class OneDevice:
    """Lightning's strategy of a single process."""

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        return tensor


def test_scores_rank_and_show_their_values():
    accuracy = Score("top1", "accuracy")
    assert [accuracy.text(0.25), LOSS.text(0.25)] == ["25.00%", "0.2500"]
    assert sorted([0.2, math.nan, 0.9], key=accuracy.rank)[1:] == [0.2, 0.9]
    assert sorted([0.2, math.nan, 0.9], key=LOSS.rank)[1:] == [0.9, 0.2]


def test_tables_of_classes_are_aligned_whatever_the_names():
    rows = {"a": {"objects": 12, "AP": 0.5}, "bc": {"objects": 0, "AP": None}}
    assert class_table(rows, ("objects", "box AP")) == [
        "class    objects     box AP",
        "a             12     50.00%",
        "bc             0          –",
    ]
    assert [rounded(value) for value in (1 / 3, 0.0, math.nan, -1.0)] == [0.33333, 0.0, None, None]


def test_time_left_is_in_hours_where_it_is_long(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 3600.0)
    progress = Progress(None)
    progress.began, progress.skipped, progress.step, progress.steps = 0.0, 0, 1, 11
    assert progress._left() == "about 10 h left"


def test_means_are_sums_over_counts():
    means = Means(torch.device("cpu"))
    assert means.compute(OneDevice()) == {}
    means.add("loss", torch.tensor(3.0), 2)
    means.add("loss", torch.tensor(1.0), 2)
    means.add("none", 0, 0)
    assert means.local("loss") == 1.0
    assert means.compute(OneDevice()) == {"loss": 1.0, "none": 0.0}


class Rates(L.Callback):
    """The learning rate of each update, and the largest gradient after each batch."""

    def __init__(self):
        self.rates, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.gradients.append(max(float(p.grad.abs().max()) for p in pl_module.model.parameters()))


def fitted(optim=(), callbacks=(), **arguments):
    """What Lightning's own trainer makes of the toy: six batches an epoch."""
    recorded = Rates()
    task = Toy.from_recipe(toy_recipe("", **{"warmup_lr": 0.0, "min_lr": 0.0, "ema_decay": 0.0, **dict(optim)}))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        **{"enable_checkpointing": False} | arguments, callbacks=[recorded, *callbacks],
    )  # fmt: skip
    trainer.fit(task)
    return recorded, trainer


@pytest.mark.parametrize(
    ("arguments", "updates", "warmup"),
    [
        ({"max_epochs": 4}, 24, 6),
        ({"max_epochs": 4, "limit_train_batches": 3}, 12, 3),
        ({"max_epochs": 4, "limit_train_batches": 0.5}, 12, 3),
        ({"max_epochs": 4, "accumulate_grad_batches": 2}, 12, 3),
        ({"max_epochs": 4, "max_steps": 15}, 15, 6),
        ({"max_steps": 15}, 15, 6),
        ({"max_epochs": 4, "callbacks": [GradientAccumulationScheduler({0: 1, 2: 3})]}, 16, 6),
        ({"fast_dev_run": 2}, 2, 0),
    ],
)
def test_the_schedule_is_as_long_as_lightnings_trainer_trains(arguments, updates, warmup):
    rates = fitted({"schedule": "poly"}, **arguments)[0].rates
    left = updates - warmup
    expected = [0.05 * n / warmup for n in range(warmup)] + [0.05 * (1 - n / left) for n in range(left)]
    assert rates == pytest.approx(expected)


def test_results_are_there_for_callbacks_that_watch_them(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_error")
    stop = EarlyStopping("train_loss", patience=1, mode="max", check_on_train_epoch_end=True)
    _, trainer = fitted(callbacks=[best, stop], max_epochs=9, enable_checkpointing=True)
    assert trainer.current_epoch == 2  # the loss falls
    assert best.best_model_score == pytest.approx(trainer.lightning_module.found["error"], rel=0.5)
    assert {"val_error", "train_loss", "train_square"} <= trainer.callback_metrics.keys()


def test_gradients_are_clipped_by_norm_or_by_value():
    for algorithm in ("norm", "value"):
        recorded, _ = fitted(max_epochs=2, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
        largest = max(recorded.gradients)
        assert largest == pytest.approx(1e-3) if algorithm == "value" else largest < 0.99e-3


def test_every_step_of_every_epoch_draws_its_own_numbers_and_the_same_again(monkeypatch):
    drawn = []
    loss = Toy.loss
    monkeypatch.setattr(Toy, "loss", lambda self, batch: drawn.append(float(torch.rand(()))) or loss(self, batch))
    for _ in range(2):
        fitted(max_epochs=2)
    assert len(drawn) == 24
    assert len(set(drawn)) == 12
    assert drawn[:12] == drawn[12:]


def test_weights_are_averaged_once_an_update(monkeypatch):
    steps = []
    update = ModelEmaV3.update

    def counted(self, model, step=None):
        steps.append(step)
        return update(self, model, step=step)

    monkeypatch.setattr(ModelEmaV3, "update", counted)
    fitted({"ema_decay": 0.5}, max_epochs=2, accumulate_grad_batches=2)
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_same_batches_over_and_over_are_refused():
    with pytest.raises(RecipeError, match=r"overfit_batches asks for the same batches in each epoch"):
        fitted(max_epochs=2, overfit_batches=2)
