import pytest
from tasks.small import make_images


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_images(tmp_path / "images")
