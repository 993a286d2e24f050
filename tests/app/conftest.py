from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vmamba
from vmamba.models.checkpoints import save_checkpoint

pytest.importorskip("gradio", reason="the page's tests need gradio: pip install 'vmamba[explore]'")

KWARGS = {"depths": [1, 2, 1], "dims": [8, 12, 16]}
CLASSES = ["red <b>", "green", "blue"]


@pytest.fixture(scope="session")
def desk(tmp_path_factory) -> Path:
    """A folder with two runs, of which one cannot be read, and two pictures beside a file that is none."""
    desk = tmp_path_factory.mktemp("desk")
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_femto_s2", num_classes=3, **KWARGS)
    (desk / "runs/demo").mkdir(parents=True)
    metadata = {"class_names": CLASSES, "img_size": [32, 32], "model_kwargs": KWARGS, "crop_pct": 1.0}
    save_checkpoint(model, desk / "runs/demo/model.safetensors", metadata)
    (desk / "runs/broken").mkdir()
    (desk / "runs/broken/model.safetensors").write_bytes(b"no model")
    (desk / "pictures").mkdir()
    draws = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = draws.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(desk / f"pictures/{name}.png")
    (desk / "pictures/not_one.png").write_bytes(b"no picture")
    (desk / "secret.txt").write_text("the secret of this machine")
    return desk


@pytest.fixture(scope="session")
def page(desk):
    from vmamba.app.models import Catalogue
    from vmamba.app.page import Page

    return Page(Catalogue(runs=desk / "runs"), sorted((desk / "pictures").iterdir()))


@pytest.fixture(scope="session")
def address(page) -> Iterator[str]:
    """Where the page is served."""
    from vmamba.app.page import serve

    yield serve(page, port=free_port(), block=False).rstrip("/")
    page.blocks.close(verbose=False)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
