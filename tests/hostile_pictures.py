"""Pictures that attack whoever reads them, made from a seed, and a trial of `read_image` on each in its own process.

    python tests/hostile_pictures.py --number 4000 --seed 1

Every reading must end within 10 seconds of processor time and 300 MB, three times the file's size and 28 bytes a pixel,
without a signal, without an exception but `ImageError`, without a word on stderr (libtiff's aside). Prints what failed
and the extremes.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import struct
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from vmamba.data.images import read_image
from vmamba.errors import ImageError

SECONDS, MEGABYTES, BYTES_A_PIXEL = 10, 300, 28
SIDES = (1, 7, 300, 2000, 9400, 65535, 1 << 31)  # 9400² is just below Pillow's limit
EXTREMES = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(rng: random.Random, mode: str, side: int) -> Image.Image:
    small = Image.frombytes(mode, (8, 8), rng.randbytes(64 * len(Image.new(mode, (1, 1)).tobytes())))
    return small.resize((side, side))


def packed_zeros(length: int) -> bytes:
    """zlib data that grow a thousandfold."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(min(1 << 20, length - i))) for i in range(0, length, 1 << 20)]
    return b"".join(parts) + packer.flush()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, interlace: int, extra: bytes, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png_size(rng: random.Random) -> bytes:
    """A size that lies, or pixels that are a bomb."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    depth, colour = rng.choice([(1, 0), (2, 0), (16, 0), (8, 2), (16, 2), (8, 3), (16, 4), (8, 6), (16, 6)])
    key = {0: 2, 2: 6, 3: 256}.get(colour, 0)
    extra = chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    extra += chunk(b"tRNS", bytes(key)) if key and rng.random() < 0.5 else b""
    full = min((width * 8 + 1) * height, 100_000_000)
    length = rng.choice([0, 100, full // 8, full])
    return png(
        width & 0x7FFFFFFF, height & 0x7FFFFFFF, depth, colour, rng.choice([0, 0, 1]), extra, packed_zeros(length)
    )


def png_chunks(rng: random.Random) -> bytes:
    """Chunks by the hundred thousand, and compressed text and profiles that grow without bounds."""
    kinds = {
        b"zTXt": b"x\0\0" + packed_zeros(rng.choice([1000, 1 << 27])), b"prVt": b"", b"tEXt": b"x\0y",
        b"iTXt": b"x\0\1\0\0\0" + packed_zeros(rng.choice([1000, 1 << 27])), b"eXIf": ifd(rng), b"fdAT": bytes(9),
        b"iCCP": b"x\0\0" + packed_zeros(rng.choice([1000, 1 << 27])), b"acTL": struct.pack(">II", 1 << 31, 0),
        b"tRNS": rng.randbytes(6), b"IDAT": b"", b"fcTL": rng.randbytes(26),
    }  # fmt: skip
    kind = rng.choice(list(kinds))
    some = chunk(kind, kinds[kind]) * rng.choice([1, 2, max(1, min(100_000, 2_000_000 // (len(kinds[kind]) + 12)))])
    return png(8, 8, 8, 2, 0, some, zlib.compress(bytes(200)))


def ifd(rng: random.Random) -> bytes:
    """A directory of TIFF or EXIF whose many entries share the same large data, or point anywhere."""
    number, size = rng.choice([1, 12, 3000]), rng.choice([10, 100_000, 1_000_000])
    base = [(256, 8), (257, 8), (258, 8), (259, rng.choice([1, 5, 7, 8, 32773, 50000])), (262, 1), (277, 1), (274, 6)]
    entries = [(tag, 4, 1, value) for tag, value in base if rng.random() < 0.95]
    entries += [(273, 4, 1, 8), (279, 4, 1, 64), (278, 4, 1, rng.choice([8, 1, *EXTREMES]))]
    start = 14 + 12 * (len(entries) + number)
    for i in range(number):
        kind = rng.randrange(14)
        count = size // (1, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4)[kind]
        place = start if rng.random() < 0.9 else rng.choice(EXTREMES)
        entries.append(
            (rng.choice([i + 300, 40000 + i, 273, 324, 347]), kind, rng.choice([count, count, *EXTREMES]), place)
        )
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    following = rng.choice([0, 8, start])
    return (
        b"II*\0"
        + struct.pack("<IH", 8, len(entries))
        + packed
        + struct.pack("<I", following)
        + rng.randbytes(10) * (size // 10)
    )


def tiff_strips(rng: random.Random) -> bytes:
    """Strips or tiles without number, or of sizes that lie."""
    width, height, strips = rng.choice(SIDES), rng.choice(SIDES), rng.choice([1, 9400, 150_000, 1_000_000])
    body = packed_zeros(rng.choice([100, 10_000_000]))
    where, count = rng.choice([(273, 279), (324, 325)])
    shape = (
        [(278, rng.choice(SIDES))]
        if where == 273
        else [(322, rng.choice((16, *SIDES))), (323, rng.choice((16, *SIDES)))]
    )
    single = [(256, width), (257, height), (258, rng.choice([1, 8, 16, 64])), (259, rng.choice([1, 8, 32773, 5])),
              (262, rng.choice([1, 2, 5, 6])), (277, rng.choice([1, 3, 4, 60000])), *shape]  # fmt: skip
    start = 14 + 12 * (len(single) + 2)
    entries = [(tag, 4, 1, value & 0xFFFFFFFF) for tag, value in single]
    entries += [
        (where, 4, strips, start if strips > 1 else start + 4),
        (count, 4, strips, start if strips > 1 else len(body)),
    ]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + struct.pack("<I", start) * strips + body


def jpeg_scans(rng: random.Random) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    side = rng.choice([64, 1000, 5000])
    data = saved(noise(rng, rng.choice(["L", "RGB", "CMYK"]), side), "JPEG", progressive=True, quality=20)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * rng.choice([1, 100, 3000]) + b"\xff\xd9"


def jpeg_segments(rng: random.Random) -> bytes:
    """Segments by the thousand: comments, profiles, EXIF, MPF, tables; fill bytes; sizes that lie."""
    data = bytearray(saved(noise(rng, "RGB", 16), "JPEG"))
    bodies = [
        b"Exif\0\0" + ifd(rng), b"ICC_PROFILE\0\1\xff", b"MPF\0" + ifd(rng), b"", b"Adobe\0d\0\0\0\0\1",
        b"http://ns.adobe.com/xap/1.0/\0", b"Photoshop 3.0\x008BIM\4\4\0\0\xff\xff\xff\xff",
    ]  # fmt: skip
    body = rng.choice(bodies)[:65000]
    segment = bytes([0xFF, rng.choice([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xDB, 0xC4])]) + struct.pack(
        ">H", len(body) + 2
    )
    many = (segment + body) * max(1, rng.choice([1, 100, 2_000_000]) // (len(body) + 4))
    if rng.random() < 0.3:
        place = data.index(b"\xff\xc0")
        data[place + 5 : place + 9] = struct.pack(">HH", *(rng.choice(SIDES) & 0xFFFF for _ in "ab"))
    return bytes(data[:2] + many + b"\xff" * rng.choice([0, 0, 1_000_000]) + data[2:])


def gif(rng: random.Random) -> bytes:
    """Comments and extensions by the thousand, many frames, sizes that lie."""
    frames = [noise(rng, "P", 30) for _ in range(rng.choice([1, 3]))]
    data = bytearray(saved(frames[0], "GIF", save_all=True, append_images=frames[1:] * rng.choice([1, 100])))
    if rng.random() < 0.5:
        data[6:10] = struct.pack("<HH", *(rng.choice(SIDES) & 0xFFFF for _ in "ab"))
    place = data.index(b",")
    if rng.random() < 0.3:
        data[place + 1 : place + 9] = struct.pack("<HHHH", *(rng.choice(SIDES) & 0xFFFF for _ in "abcd"))
    many = rng.choice(
        [b"", b"!\xfe\1a\0", b"!\xfe\xff" + b"a" * 255 + b"\0", b"!\1\1a\0", b"\0", b"!\xff\x0bNETSCAPE2.0\0"]
    )
    return bytes(data[:place] + many * rng.choice([1, 1_000_000 // (len(many) + 1)]) + data[place:])


def webp_avif(rng: random.Random) -> bytes:
    """A canvas or item of another size than its pixels."""
    if rng.random() < 0.5:
        frames = [noise(rng, "RGBA", 32) for _ in range(rng.choice([2, 30]))]
        data = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
        place = data.index(b"VP8X") + 12
        data[place : place + 6] = b"".join(struct.pack("<I", rng.choice([7, 300, 9399, 16383]))[:3] for _ in "ab")
    else:
        data = bytearray(saved(noise(rng, "RGB", rng.choice([16, 500])), "AVIF", speed=10))
        place = data.index(b"ispe") + 8
        data[place : place + 8] = struct.pack(">II", *(rng.choice(SIDES) for _ in "ab"))
    return bytes(data)


def jpeg_2000(rng: random.Random) -> bytes:
    """A size, tiles and components that the codestream does not hold."""
    data = bytearray(saved(noise(rng, rng.choice(["L", "RGB"]), 64), "JPEG2000", no_jp2=True))
    place = data.index(b"\xff\x51") + 6
    data[place : place + 8] = struct.pack(">II", *(rng.choice(SIDES) for _ in "ab"))
    if rng.random() < 0.6:
        data[place + 16 : place + 24] = struct.pack(">II", *(rng.choice(SIDES) for _ in "ab"))
    if rng.random() < 0.2:
        data[place + 32 : place + 34] = struct.pack(">H", rng.choice([0, 5, 16384, 65535]))
    return bytes(data)


def bmp(rng: random.Random) -> bytes:
    """Run lengths that jump or never end, palettes and sizes that lie."""
    bits, form = rng.choice([(1, 0), (4, 2), (8, 1), (8, 0), (16, 3), (24, 0), (32, 3)])
    run = rng.choice([b"\xff\1", b"\1\1", b"\0\2\xff\xff", b"\0\2\0\0", b"\0\0", b"\0\xff" + bytes(255)])
    data = run * rng.choice([1, 1000, 1_000_000 // len(run)])
    sides = [rng.choice(SIDES) % (1 << 31) * rng.choice([1, 1, -1]) for _ in "ab"]
    colours = rng.choice([0, 256, *EXTREMES])
    header = struct.pack("<IiiHHIIiiII", 40, *sides, 1, bits, form, len(data), 0, 0, colours, 0)
    return (
        b"BM"
        + struct.pack("<IHHI", len(data) + 1078, 0, 0, rng.choice([1078, *EXTREMES]))
        + header
        + bytes(1024)
        + data
    )


def pnm(rng: random.Random) -> bytes:
    """Plain numbers, odd scales, comments and blanks, which Pillow reads in Python."""
    kind = rng.choice([b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF", b"P7"])
    sides = b" %d %d " % (rng.choice(SIDES), rng.choice(SIDES))
    scale = (
        b""
        if kind in (b"P1", b"P4")
        else rng.choice([b"255", b"100", b"65535", b"1", b"0", b"-1.0", b"99999999"]) + b"\n"
    )
    body = rng.choice([b"7 ", b"1", b"#a\n", b" ", b"7", bytes(1), b"65535 "]) * rng.choice([100, 1_000_000])
    return kind + rng.choice([b"", b"\n#" + b"a" * 500_000 + b"\n", b" " * 500_000]) + sides + scale + body


def mutated(rng: random.Random) -> bytes:
    """A sound picture of any format with damage anywhere."""
    sound = [
        ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "I;16", {}), ("JPEG", "RGB", {}), ("GIF", "P", {}),
        ("JPEG", "CMYK", {"progressive": True}), ("WEBP", "RGBA", {}), ("WEBP", "RGB", {"lossless": True}),
        ("BMP", "P", {}), ("PPM", "RGB", {}), ("JPEG2000", "RGB", {}), ("AVIF", "RGB", {"speed": 10}),
        ("JPEG2000", "L", {"no_jp2": True, "tile_size": (16, 16)}),
    ]  # fmt: skip
    packings = [
        ("RGB", None), ("RGB", "jpeg"), ("L", "tiff_lzw"), ("RGBA", "tiff_adobe_deflate"), ("1", "group4"),
        ("1", "group3"), ("L", "packbits"), ("L", "zstd"), ("F", "lzma"), ("CMYK", "tiff_lzw"),
    ]  # fmt: skip
    sound += [("TIFF", mode, {"compression": packing}) for mode, packing in packings]
    form, mode, options = rng.choice(sound)
    image = noise(rng, "L" if mode in ("I;16", "1", "F") else mode, rng.choice([9, 64, 300]))
    data = bytearray(saved(image.convert(mode), form, **options))
    for _ in range(rng.choice([1, 3, 20])):
        place = min(rng.randrange(len(data)), rng.choice([40, 400, len(data)]))
        damage = rng.randrange(6)
        if damage == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif damage == 1:
            data[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(EXTREMES))
        elif damage == 2:
            data[place : place + 2] = rng.randbytes(2)
        elif damage == 3:
            del data[place : place + rng.randrange(1, 50)]
        elif damage == 4:
            data[place:place] = data[place : place + rng.randrange(1, 200)] * rng.choice([1, 1, 100])
        else:
            del data[max(place, 20) :]
        data = data or bytearray(b"\0")
    return bytes(data)


MAKERS: list[Callable[[random.Random], bytes]] = [
    png_size, png_chunks, ifd, tiff_strips, jpeg_scans, jpeg_segments, gif, webp_avif, jpeg_2000, bmp, pnm,
    mutated, mutated, mutated, mutated, mutated,
]  # fmt: skip


def attempt(path: Path, output: int) -> None:
    """In a child: read the picture and tell what became of it, and how many pixels it claims to have."""
    resource.setrlimit(resource.RLIMIT_CPU, (3 * SECONDS, 3 * SECONDS + 1))
    outcome, pixels = "read", 0
    try:
        image = read_image(path)
        pixels = image.width * image.height
    except ImageError as error:
        outcome = "refused" if str(error).startswith(f"{path}: ") and "\n" not in str(error) else f"unclear: {error}"
    except BaseException as error:
        outcome = f"raw {type(error).__name__}: {error}"
    os.write(output, f"{outcome[:500]}\0{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\0{pixels}".encode())
    if outcome != "read":  # what was refused while it was decoded may have used what its size allows
        warnings.simplefilter("ignore")
        with Image.open(path) as header:
            os.write(output, f"\0{min(header.width * header.height, Image.MAX_IMAGE_PIXELS or 0)}".encode())


def trial(path: Path) -> tuple[str, float, float, float]:
    """What became of a picture, processor seconds, megabytes of growth, and megabytes allowed."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as words:
        child = os.fork()
        if not child:
            os.dup2(words.fileno(), 1)
            os.dup2(words.fileno(), 2)
            try:
                attempt(path, writer)
            finally:
                os._exit(0)
        os.close(writer)
        _, status, usage = os.wait4(child, 0)
        with open(reader, "rb") as answer:
            outcome, *numbers = answer.read().decode(errors="replace").split("\0")
        words.seek(0)
        said = words.read(200)
    if os.WIFSIGNALED(status) and not numbers:
        return f"signal {os.WTERMSIG(status)}", usage.ru_utime + usage.ru_stime, 0, 0
    peak, pixels = int(numbers[0]), max(map(int, numbers[1:]))
    allowed = MEGABYTES + (3 * path.stat().st_size + BYTES_A_PIXEL * pixels) / 1e6
    if said and path.read_bytes()[:2] not in (b"II", b"MM"):  # libtiff cannot be told to be silent
        outcome = f"said {said!r}"
    return outcome, usage.ru_utime + usage.ru_stime, peak * 1024 / 1e6, allowed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the pictures that failed")
    options = parser.parse_args()
    Image.preinit()
    Image.init()
    outcomes: Counter[str] = Counter()
    failures, slowest, largest = 0, (0.0, ""), (0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder, "sound.png")
        sound.write_bytes(saved(Image.new("RGB", (8, 8)), "PNG"))
        read_image(sound)
        base = trial(sound)[2]
        for i in range(options.number):
            maker = MAKERS[i % len(MAKERS)]
            path = Path(folder, f"{maker.__name__}-{options.seed}-{i}")
            path.write_bytes(maker(random.Random(f"{options.seed} {i}")))
            outcome, seconds, peak, allowed = trial(path)
            growth = peak - base
            outcomes[outcome if outcome in ("read", "refused") else "failed"] += 1
            slowest, largest = max(slowest, (seconds, path.name)), max(largest, (growth / max(allowed, 1), path.name))
            if outcome not in ("read", "refused") or seconds > SECONDS or growth > allowed:
                failures += 1
                print(f"{path.name}: {outcome}; {seconds:.1f} s, {growth:.0f} of {allowed:.0f} MB allowed", flush=True)
                if options.keep:
                    options.keep.mkdir(exist_ok=True)
                    path.rename(options.keep / path.name)
                    continue
            path.unlink()
    print(
        f"{options.number} pictures: {dict(outcomes)}; {failures} failures; slowest {slowest[0]:.1f} s ({slowest[1]}); "
        f"largest {100 * largest[0]:.0f} % of the memory allowed ({largest[1]})"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
