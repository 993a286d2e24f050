"""Every kind of file that a real folder may hold, read as a person would see it or refused with its reason."""

import io
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmamba.data.images import find_images, read_image
from vmamba.errors import ImageError


def _png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _saved(tmp_path, image: Image.Image, name: str, **options) -> str:
    path = tmp_path / name
    image.save(path, **options)
    return str(path)


def _pixels(path: str, in_chans: int = 3) -> np.ndarray:
    image = read_image(path, in_chans)
    assert image.mode == ("RGB" if in_chans == 3 else "L")
    return np.asarray(image)


def test_rgb_and_grey_are_read_unchanged(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = _saved(tmp_path, Image.fromarray(rgb), "a.png")
    assert np.array_equal(_pixels(path), rgb)
    grey = _saved(tmp_path, Image.fromarray(rgb[..., 0]), "g.png")
    assert np.array_equal(_pixels(grey, 1), rgb[..., 0])
    assert np.array_equal(_pixels(grey), np.repeat(rgb[..., :1], 3, 2))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        assert _pixels(_saved(tmp_path, Image.fromarray(values), name), 1).tolist() == [[0, 1, 128, 255]]
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    assert _pixels(str(tmp_path / "a.pgm"), 1).tolist() == [[0, 1, 128, 255]]
    (tmp_path / "big.tif").write_bytes(_tiff_big_endian(values))
    assert _pixels(str(tmp_path / "big.tif"), 1).tolist() == [[0, 1, 128, 255]]


def _tiff_big_endian(values: np.ndarray) -> bytes:
    height, width = values.shape
    tags = [
        (256, width),
        (257, height),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, values.nbytes),
    ]
    data = values.astype(">u2").tobytes()
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    return b"MM\x00*" + struct.pack(">I", 8 + len(data)) + data + struct.pack(">H", len(tags)) + entries + bytes(4)


def test_float_grey_is_zero_to_one_and_anything_else_is_refused(tmp_path):
    path = _saved(tmp_path, Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "a.tif")
    assert _pixels(path, 1).tolist() == [[0, 128, 255]]
    for bad in ([[0.0, 300.0]], [[0.0, float("nan")]]):
        with pytest.raises(ImageError, match=r"float pixels"):
            read_image(_saved(tmp_path, Image.fromarray(np.array(bad, dtype=np.float32)), "b.tif"))
    with pytest.raises(ImageError, match=r"no defined white"):
        read_image(_saved(tmp_path, Image.fromarray(np.array([[0, 1 << 20]], dtype=np.int32)), "c.tif"))


def test_transparent_pixels_are_laid_over_white(tmp_path):
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    assert _pixels(_saved(tmp_path, Image.fromarray(rgba), "a.png")).tolist() == [[[200, 0, 0], [255] * 3, [127] * 3]]
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], dtype=np.uint8), "LA")
    assert _pixels(_saved(tmp_path, grey, "la.png"), 1).tolist() == [[10, 255]]


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert _pixels(_saved(tmp_path, image, "p.png")).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert _pixels(_saved(tmp_path, image, "t.png", transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def _png_of(values: np.ndarray, depth: int, transparent: tuple[int, ...]) -> bytes:
    """A grey (H, W, 1) or RGB (H, W, 3) PNG of any bit depth with one colour that is transparent."""
    height, width, channels = values.shape
    rows = b""
    for row in values:
        bits = "".join(f"{value:0{depth}b}" for value in row.flat)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, channels - 1, 0, 0, 0)),
        (b"tRNS", struct.pack(f">{channels}H", *transparent)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""),
    ]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("depth", "grey", "transparent", "expected"),
    [
        (1, [0, 1], 0, [255, 255]),
        (2, [0, 1, 2, 3], 1, [0, 255, 170, 255]),
        (4, [0, 2, 3, 15], 2, [0, 255, 51, 255]),
        (8, [0, 2, 3, 255], 2, [0, 255, 3, 255]),
        (16, [0, 256, 257, 258, 65279, 65535], 257, [0, 1, 255, 1, 254, 255]),
    ],
)
def test_a_transparent_grey_of_every_bit_depth(depth, grey, transparent, expected):
    file = io.BytesIO(_png_of(np.array(grey)[None, :, None], depth, (transparent,)))
    assert np.asarray(read_image(file, 1)).tolist() == [expected]
    assert np.asarray(read_image(file, 3)).tolist() == [[[value] * 3 for value in expected]]


def test_a_transparent_colour_counts_all_of_its_bits(tmp_path):
    colours = np.array([[[1000, 2000, 3000], [1000, 2000, 3001], [999, 2000, 3000], [65535, 0, 0]]])
    path = tmp_path / "a.png"
    path.write_bytes(_png_of(colours, 16, (1000, 2000, 3000)))
    assert _pixels(str(path)).tolist() == [[[255, 255, 255], [3, 7, 11], [3, 7, 11], [255, 0, 0]]]
    path.write_bytes(_png_of(colours // 256, 8, (3, 7, 11)))
    assert _pixels(str(path)).tolist() == [[[255, 255, 255], [255, 255, 255], [255, 255, 255], [255, 0, 0]]]


def test_cmyk_and_bilevel(tmp_path):
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(_pixels(_saved(tmp_path, cmyk, "c.jpg", quality=100)).astype(int) - [255, 0, 0]).max() <= 4
    bilevel = Image.fromarray(np.array([[True, False]]))
    assert _pixels(_saved(tmp_path, bilevel, "b.png"), 1).tolist() == [[255, 0]]


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        path = _saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        red, green, blue = _pixels(path)[2, 2].tolist()
        assert red > 240, name
        assert max(green, blue) < 10, name


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (5, 9)), (6, (0, 5)), (8, (9, 0))])
def test_exif_orientation_is_applied(tmp_path, orientation, corner):
    image = Image.new("L", (10, 6))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = _pixels(_saved(tmp_path, image, "a.png", exif=exif), 1)
    assert np.argwhere(pixels == 255).tolist() == [list(corner)]


def test_a_picture_is_upright_whatever_else_its_exif_says(tmp_path):
    """A resolution that is text, which Pillow could not write again."""
    other = struct.pack("<HHI4s", 282, 2, 2, b"7\0\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 2, 0x112, 3, 1, 6) + other + bytes(4)
    path = _saved(tmp_path, Image.new("RGB", (40, 24), "red"), "a.jpg", exif=exif)
    assert read_image(path).size == (24, 40)


def test_links_that_cannot_be_followed_are_images_that_cannot_be_read(tmp_path):
    _saved(tmp_path, Image.new("RGB", (4, 4)), "a.png")
    (tmp_path / "b.png").symlink_to("b.png")
    (tmp_path / "notes").symlink_to("notes")
    found, problems = find_images([tmp_path])
    assert ([os.path.basename(path) for path in found], problems) == (["a.png", "b.png"], [])
    with pytest.raises(ImageError, match=r"b\.png"):
        read_image(found[1])


def test_damaged_exif_does_not_hide_the_picture(tmp_path):
    path = _saved(
        tmp_path, Image.new("RGB", (4, 4), "red"), "a.png", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff garbage"
    )
    assert _pixels(path)[0, 0].tolist() == [255, 0, 0]


def test_unusable_files_are_named_with_their_reason(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    files = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"hello, I am not an image", "not an image"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "head.jpg": (jpeg[:4], "not an image|truncated"),
        "bomb.png": (_png(50_000, 50_000), "decompression bomb"),
        "large.png": (_png(10_000, 10_000), "decompression bomb"),
        "hollow.png": (_png(20, 20), "truncated"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
    }
    for name, (content, reason) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ImageError, match=f"(?s){name}: .*({reason})"):
            read_image(path)
        with pytest.raises(ImageError, match=f"(?s){name}: .*({reason})"), open(path, "rb") as file:
            read_image(file)
    with pytest.raises(ImageError, match=r"missing.png: no such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match=r"s a directory"):
        read_image(tmp_path)
    with pytest.raises(ValueError, match=r"in_chans is 4"):
        read_image(tmp_path / "empty.jpg", in_chans=4)


def test_an_image_beyond_the_callers_limit_is_refused_before_it_is_decoded():
    with pytest.raises(ImageError, match=r"a\.png: 3000×2000 pixels, more than the 5,999,999 taken here"):
        read_image(io.BytesIO(_png(3000, 2000)), name="a.png", most_pixels=5_999_999)
    with pytest.raises(ImageError, match=r"truncated|damaged|broken"):  # decoding, then, finds that nothing is there
        read_image(io.BytesIO(_png(3000, 2000)), name="a.png", most_pixels=6_000_000)


def test_find_images_takes_files_folders_and_patterns(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.png", "sub/c.webp", "[x].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "bare").mkdir()

    def found(*paths):
        files, problems = find_images([tmp_path / path for path in paths])
        return [file.removeprefix(f"{tmp_path}/") for file in files], [p.removeprefix(f"{tmp_path}/") for p in problems]

    assert found(".") == (["[x].png", "a.PNG", "b.jpg", "sub/c.webp"], [])
    assert found("notes.txt", "b.jpg", "*.jpg") == (["notes.txt", "b.jpg"], [])
    assert found("[x].png") == (["[x].png"], [])
    assert found("**/*.webp") == (["sub/c.webp"], [])
    files, problems = found("bare", "nothing", "*.gif", "b.jpg")
    assert files == ["b.jpg"]
    assert [p.split(":")[0] for p in problems] == ["bare", "nothing", "*.gif"]


def test_what_a_pattern_finds_is_judged_as_in_a_folder(tmp_path):
    for name in ("a.png", "Thumbs.db", "sub/b.png", "sub/._b.png", "@eaDir/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    expected = [str(tmp_path / "a.png"), str(tmp_path / "sub/b.png")]
    assert find_images([tmp_path / "*"]) == find_images([tmp_path]) == (expected, [])
    assert find_images([tmp_path / "Thumbs.db"])[0] == [str(tmp_path / "Thumbs.db")]


def test_hostile_pictures_are_refused_in_time_and_in_little_memory():
    script = Path(__file__).parents[1] / "hostile_pictures.py"
    done = subprocess.run([sys.executable, script, "--number", "64"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64 pictures" in done.stdout
    assert "; 0 failures" in done.stdout


def _scans(number: int) -> bytes:
    """A progressive JPEG of 25 million pixels whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.new("L", (5000, 5000), 77).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * number + b"\xff\xd9"


def test_decoding_ends_and_the_rest_of_the_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vmamba.data.images._SECONDS", 0.5)
    (tmp_path / "a.jpg").write_bytes(_scans(3000))
    for name in ("b.jpg", "c.png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    files, problems = find_images([tmp_path])
    assert not problems
    start = time.process_time()
    with pytest.raises(ImageError, match=r"a.jpg: decoding it takes more than 0.5 seconds of processor time"):
        read_image(files[0])
    assert time.process_time() - start < 10
    assert [read_image(file).size for file in files[1:]] == [(4, 4), (4, 4)]


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.png"))
    for path in (tmp_path / "fifo.png", tmp_path / "s.png", "/dev/zero", "/dev/random", "/dev/null"):
        with pytest.raises(ImageError, match=f"^{path}: not a file but a FIFO, a socket or a device"):
            read_image(path)
    for path in ("/proc/self/mem", "/proc/self/environ", "/proc/kmsg"):
        with pytest.raises(ImageError, match=f"^{path}: the file is empty"):
            read_image(path)


def test_damaged_metadata_says_nothing(tmp_path, recwarn):
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 500) + struct.pack("<HHII", 256, 5, 1000, 9) * 500
    _saved(tmp_path, Image.new("RGB", (4, 4), "red"), "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (4, 4)
    assert not recwarn.list


def test_a_tiff_of_a_million_strips_is_refused(tmp_path):
    entries = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1), (279, 8)]
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    start = 14 + 12 * 9
    directory = struct.pack("<IH", 8, 9) + packed[:72] + struct.pack("<HHII", 273, 4, 1_000_000, start) + packed[72:]
    (tmp_path / "a.tif").write_bytes(b"II*\0" + directory + bytes(4) + struct.pack("<I", 8) * 1_000_000)
    with pytest.raises(ImageError, match=r"a.tif: a TIFF of 1000000 strips or tiles"):
        read_image(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes(b"II*\0" + directory[:20])
    with pytest.raises(ImageError, match=r"a.tif: truncated or damaged"):
        read_image(tmp_path / "a.tif")


def test_a_jpeg_2000_of_countless_tiles_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "JPEG2000", no_jp2=True)
    data = buffer.getvalue()
    place = data.index(b"\xff\x51") + 6
    sizes = struct.pack(">8I", 65535, 7, 0, 0, 1, 7, 0, 0)
    (tmp_path / "a.jp2").write_bytes(data[:place] + sizes + data[place + 32 :])
    with pytest.raises(ImageError, match=r"a.jp2: a JPEG 2000 of 65535 tiles"):
        read_image(tmp_path / "a.jp2")
