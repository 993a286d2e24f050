import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vmamba.files import json_bytes, shown, why_unwritable


def test_any_name_can_be_shown():
    assert shown(os.fsdecode(b"caf\xe9/\xff\x80.png")) == r"caf\xe9/\xff\x80.png"
    assert shown("two\nlines \x1b[31m\x7f") == r"two\x0alines \x1b[31m\x7f"
    for name in ("café 貓.png", "Screenshot 9.41\u202fAM.png", r"C:\xe9.png"):
        assert shown(name) == name


def test_any_value_and_name_is_json():
    value = {"name": os.fsdecode(b"caf\xe9"), "树": (1, [math.nan, {"deep": -math.inf}]), "share": 0.5}
    text = json_bytes(value).decode()
    assert "树" in text
    expected = {"name": "caf\udce9", "树": [1, [None, {"deep": None}]], "share": 0.5}
    assert json.loads(text, parse_constant=pytest.fail) == expected


@pytest.mark.skipif(os.name != "posix", reason="such files are Unix's")
def test_no_file_takes_the_place_of_what_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("pipe", "to_pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for path in ("pipe", "to_pipe", "socket", tmp_path / "pipe", "/dev/null"):
        assert why_unwritable(path) == (
            f"{path} is no file but a device, pipe or socket, whose place a file would take; name a file, or leave the"
            " option out"
        )
    Path("file").write_text("text")
    os.symlink("file", "to_file")
    os.symlink("none", "to_nothing")
    assert [why_unwritable(path) for path in ("file", "to_file", "to_nothing", "new")] == [None] * 4


@pytest.mark.skipif(not Path("/dev/stdout").is_symlink(), reason="there are no links to what is open")
def test_what_a_command_prints_to_is_no_file_even_where_it_leads_to_one(tmp_path):
    code = (
        "from vmamba.files import why_unwritable as why; print(why('/dev/stdout'), why('/proc/self/fd/1'), sep='\\n')"
    )
    with (tmp_path / "printed").open("wb") as printed:
        subprocess.run([sys.executable, "-c", code], stdout=printed, check=True)
    told = (tmp_path / "printed").read_text().splitlines()
    assert [line.partition(",")[0] for line in told] == [
        "/dev/stdout is no file but a device", "/proc/self/fd/1 is no file but a device",
    ]  # fmt: skip
