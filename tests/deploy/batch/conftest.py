"""What the tests of jobs over many images share."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.registry import create_model

pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")

FAKES = Path(__file__).parent / "fakes"


def picture(seed: int, size: tuple[int, int] = (40, 36), format: str = "PNG") -> bytes:
    """A file of noise, another one for each seed."""
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


def tar_of(members: Iterable[tuple[str, bytes]], path: Path, **options: Any) -> Path:
    """A .tar file."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of 24 pictures, a .tar file of 40 and a file that is none, and nothing else."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep").mkdir()
    for index in range(24):
        (folder / ("deep" if index % 2 else ".") / f"{index:02}.png").write_bytes(picture(index))
    (folder / "bad.jpg").write_bytes(b"no picture at all")
    tar_of(((f"shard/{index:03}.png", picture(100 + index)) for index in range(40)), folder / "shard.tar")
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    """The file of a classifier of five classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = create_model("vmamba_femto_s2", num_classes=5)
    save_checkpoint(model, path, metadata={"class_names": ["ash", "beech", "cedar", "elm", "树"]})
    return str(path)


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """What is behind s3://bucket."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("FAKE_S3", str(tmp_path / "s3"))
    folder = tmp_path / "s3" / "bucket"
    folder.mkdir(parents=True)
    return folder


def files_in(folder: os.PathLike[str] | str) -> set[str]:
    """The files of a folder and of those in it, by their paths inside."""
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
