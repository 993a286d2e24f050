import os

from vmamba.files import shown


def test_any_name_can_be_shown():
    assert shown(os.fsdecode(b"caf\xe9/\xff\x80.png")) == r"caf\xe9/\xff\x80.png"
    assert shown("two\nlines \x1b[31m\x7f") == r"two\x0alines \x1b[31m\x7f"
    for name in ("café 貓.png", "Screenshot 9.41\u202fAM.png", r"C:\xe9.png"):
        assert shown(name) == name
