"""What sources are found to hold, and what is read of them, whatever has become of them."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from vmamba.deploy.batch import places
from vmamba.deploy.batch.sources import Item, Segment, _row_item, extents_of, find, images_of
from vmamba.errors import BatchError, ImageError

from .conftest import picture, tar_of


def items(extents, column=None) -> list[Item]:
    return [item for extent in extents for item in images_of(extent.segment, column)]


def pixels(item: Item) -> np.ndarray:
    return np.asarray(item.read(3))


def original(seed: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture(seed))))


def test_a_folder_gives_its_pictures_and_what_is_in_its_shards(pictures):
    found = items(find([str(pictures)]))
    names = [item.name.removeprefix(f"{pictures}/") for item in found]
    evens, odds = [f"{i:02}.png" for i in range(0, 24, 2)], [f"deep/{i:02}.png" for i in range(1, 24, 2)]
    assert names == [*evens, "bad.jpg", *odds, *(f"shard.tar/shard/{i:03}.png" for i in range(40))]
    assert np.array_equal(pixels(found[names.index("deep/07.png")]), original(7))
    assert np.array_equal(pixels(found[names.index("shard.tar/shard/031.png")]), original(131))
    with pytest.raises(ImageError, match=r"bad\.jpg: not an image"):
        found[names.index("bad.jpg")].read(3)


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a").mkdir()
    tar_of([("x.png", picture(0))], tmp_path / "a" / "x.tar")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "folder.tar").mkdir()
    assert [item.name for item in items(find([str(tmp_path)]))] == [f"{tmp_path}/a/x.tar/x.png"]


def test_patterns_files_and_repeats(pictures):
    assert len(items(find([f"{pictures}/*.png", f"{pictures}/0?.png", f"file://{pictures}/02.png"]))) == 12
    assert len(items(find([f"{pictures}/**/*.png"]))) == 24
    assert len(items(find([f"{pictures}/*.tar"]))) == 40


def test_what_is_not_there_is_named(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BatchError) as error:
        find([str(pictures), f"{tmp_path}/nothing", f"{tmp_path}/*.jpg", f"{tmp_path}/empty"])
    lines = str(error.value).splitlines()
    assert [line.removeprefix(f"{tmp_path}/").split(":")[0] for line in lines] == ["nothing", "*.jpg", "empty"]


# --- .tar


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_any_stretch_of_a_tar_file_is_read_from_its_middle(format, tmp_path):
    long = "x" * 99 + "/" + "y" * 120 if format != tarfile.USTAR_FORMAT else "x" * 99 + "/" + "y" * 50
    members = [(f"{long if i % 3 == 0 else 'short'}/{i}{'.png' if i % 5 else '.txt'}", picture(i)) for i in range(20)]
    path = tar_of(members, tmp_path / "a.tar", format=format)
    (extent,) = extents_of(str(path), None)
    names = [f"{path}/{name}" for name, _ in members if name.endswith(".png")]
    assert len(extent) == len(names) == 16
    for first, count in ((0, 16), (0, 1), (5, 7), (15, 1)):
        part = list(images_of(extent.part(first, count)))
        assert [item.name for item in part] == names[first : first + count]
        assert np.array_equal(pixels(part[-1]), original(int(part[-1].name.rsplit("/", 1)[1][:-4])))


def test_a_damaged_tar_file_gives_what_comes_before_the_damage_and_says_so(pictures, tmp_path):
    content = bytearray((pictures / "shard.tar").read_bytes())
    whole = extents_of(str(pictures / "shard.tar"), None)[0]
    content[whole.starts[10] : whole.starts[10] + 512] = b"?" * 512
    (tmp_path / "damaged.tar").write_bytes(content)
    (tmp_path / "cut.tar").write_bytes(content[: whole.starts[4] - 100])
    (tmp_path / "none.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    found = items(find([str(tmp_path)]))
    errors = [str(item.content) for item in found if isinstance(item.content, ImageError)]
    assert [item.name.removeprefix(f"{tmp_path}/") for item in found].count("damaged.tar") == 1
    assert len(found) - len(errors) in (13, 14)  # of the last in cut.tar a part is there
    assert [error.removeprefix(f"{tmp_path}/").split()[0] for error in errors] == ["cut.tar", "damaged.tar", "none.tar"]


def test_a_shard_that_has_changed_still_gives_as_many_rows_as_were_planned(tmp_path):
    path = tar_of(((f"{i}.png", picture(i)) for i in range(6)), tmp_path / "a.tar")
    (extent,) = extents_of(str(path), None)
    tar_of(((f"{i}.png", picture(i)) for i in range(3)), path)
    found = list(images_of(extent.segment))
    assert [isinstance(item.content, ImageError) for item in found] == [False] * 3 + [True] * 3
    assert len({item.name for item in found}) == 6
    path.unlink()
    found = list(images_of(extent.part(2, 3)))
    assert [str(item.content).endswith("no such file or directory") for item in found] == [True] * 3


def test_an_absurdly_large_member_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vmamba.deploy.batch.sources._MOST_BYTES", 10_000)
    path = tar_of([("a.png", picture(0)), ("b.png", bytes(10_001)), ("c.png", picture(1))], tmp_path / "a.tar")
    found = items(extents_of(str(path), None))
    assert "10,001 bytes" in str(found[1].content)
    assert np.array_equal(pixels(found[2]), original(1))


# --- Parquet


def test_bytes_in_parquet_from_any_row_on(tmp_path):
    path = str(tmp_path / "a.parquet")
    table = pa.table({"label": range(50), "picture": [picture(i) for i in range(49)] + [None]})
    pq.write_table(table, path, row_group_size=20)
    (extent,) = find([path])
    for first, count in ((0, 50), (19, 2), (33, 10), (49, 1)):
        part = list(images_of(extent.part(first, count)))
        assert [item.name for item in part] == [f"{path}#{row}" for row in range(first, first + count)]
        assert first == 49 or np.array_equal(pixels(part[0]), original(first))
    assert "no image in this row" in str(part[0].content)
    pq.write_table(pa.table({"path": [f"{row}.png" for row in range(10_000)]}), path)
    (extent,) = find([path])
    assert [item.name for item in images_of(extent.part(8190, 3))] == [
        f"{tmp_path}/{row}.png" for row in (8190, 8191, 8192)
    ]


def test_paths_in_parquet_are_relative_to_it_and_lead_nowhere_else(pictures, tmp_path):
    path = pictures / "list.parquet"
    paths = [
        "02.png",
        str(pictures / "04.png"),
        "gone.png",
        "http://127.0.0.1/x.png",
        "simplecache::s3://b/x.png",
        None,
    ]
    try:
        pq.write_table(pa.table({"path": paths, "text": ["x"] * 6}), path)
        found = items(find([str(path)]))
    finally:
        path.unlink()
    assert np.array_equal(pixels(found[0]), original(2))
    assert np.array_equal(pixels(found[1]), original(4))
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        found[2].read(3)
    with pytest.raises(ImageError, match=r"http://.*: paths in a Parquet file may not be addresses of this kind"):
        found[3].read(3)
    with pytest.raises(ImageError, match=r"/simplecache::s3://b/x\.png: no such file"):  # a file of that name
        found[4].read(3)
    with pytest.raises(ImageError, match="no image in this row"):
        found[5].read(3)


def test_parquet_from_elsewhere_names_no_files_of_this_machine():
    for path in ("/home/me/private.jpg", "file:///home/me/private.jpg"):
        with pytest.raises(ImageError, match=r"private.jpg: a Parquet file elsewhere may not name files of this"):
            _row_item("s3://bucket/list.parquet", 0, path).read(3)
    for value in ("a/b.jpg", "s3://bucket/a/b.jpg"):
        assert _row_item("s3://bucket/list.parquet", 0, value).name == "s3://bucket/a/b.jpg"


def test_hugging_face_images_and_columns_by_name(tmp_path, pictures):
    images = pa.array(
        [{"bytes": picture(3), "path": "x.png"}, {"bytes": None, "path": str(pictures / "06.png")}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": images, "thumbnail": [b"1", b"2"], "n": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(BatchError, match=r"image or thumbnail could hold the images; name the column with --column"):
        find([str(tmp_path)])
    with pytest.raises(BatchError, match=r"no column 'n' of bytes or paths; its columns are image .*n \(int64\)"):
        find([str(tmp_path)], "n")
    found = items(find([str(tmp_path)], "image"), "image")
    assert [np.array_equal(pixels(item), original(seed)) for item, seed in zip(found, (3, 6), strict=True)] == [
        True
    ] * 2


def test_results_of_such_jobs_are_no_sources(pictures, tmp_path):
    (tmp_path / "results" / "_job").mkdir(parents=True)
    for name in ("results/part-00000000.parquet", "results/_job/plan.parquet"):
        pq.write_table(pa.table({"file": ["x.png"]}), tmp_path / name)
    for name in ("a.png", "results/b.png"):
        (tmp_path / name).write_bytes(picture(0))
    assert [item.name for item in items(find([str(tmp_path)]))] == [f"{tmp_path}/a.png", f"{tmp_path}/results/b.png"]


def test_parquet_files_without_images_are_left_out_of_folders_only(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture(0))
    for name in ("b", "c"):
        pq.write_table(pa.table({"n": [1, 2]}), tmp_path / f"{name}.parquet")
    for source in (tmp_path, tmp_path / "*"):
        assert [item.name for item in items(find([str(source)]))] == [f"{tmp_path}/a.png"]
        told = capsys.readouterr().err
        assert told.startswith(f"A Parquet file is left out. {tmp_path}/b.parquet: no column holds images;")
        assert told.endswith("Its columns are n (int64). So are 1 more.\n")
    with pytest.raises(BatchError, match=r"c\.parquet: no column holds images"):
        find([str(tmp_path), f"{tmp_path}/c.parquet"])
    (tmp_path / "a.png").unlink()
    with pytest.raises(BatchError, match=r"b\.parquet: no column holds images.*\n.*c\.parquet: no column"):
        find([str(tmp_path)])


# --- addresses


@pytest.fixture
def memory():
    MemoryFileSystem.store.clear()
    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()


def test_addresses(memory, pictures):
    memory.makedirs("/data/deep")
    memory.pipe_file("/data/one.png", picture(1))
    memory.pipe_file("/data/deep/two.jpg", picture(2))
    memory.pipe_file("/data/deep/notes.txt", b"no picture")
    memory.pipe_file("/data/shard.tar", (pictures / "shard.tar").read_bytes())
    table = io.BytesIO()
    pq.write_table(pa.table({"path": ["one.png", "memory://data/deep/two.jpg", "gone.png"]}), table)
    memory.pipe_file("/data/list.parquet", table.getvalue())
    found = items(find(["memory://data"]))
    listed = ["one.png", "deep/two.jpg", "gone.png"]
    shard = [f"shard.tar/shard/{i:03}.png" for i in range(40)]
    names = [item.name.removeprefix("memory://").lstrip("/").removeprefix("data/") for item in found]
    assert names == ["deep/two.jpg", *listed, "one.png", *shard]
    for place, seed in ((0, 2), (1, 1), (2, 2), (4, 1), (44, 139)):
        assert np.array_equal(pixels(found[place]), original(seed))
    with pytest.raises(ImageError, match=r"gone\.png: no such file$"):
        found[3].read(3)
    assert len(items(find(["memory://data/*.png"]))) == 1
    with pytest.raises(BatchError, match="memory://nothing cannot be looked at: no such file"):
        find(["memory://nothing"])


def test_s3_through_the_package_that_fsspec_names(bucket, pictures):
    (bucket / "deep").mkdir()
    (bucket / "deep" / "a.png").write_bytes(picture(5))
    (bucket / "shard.tar").write_bytes((pictures / "shard.tar").read_bytes())
    found = items(find(["s3://bucket"]))
    assert [item.name for item in found[:2]] == ["s3://bucket/deep/a.png", "s3://bucket/shard.tar/shard/000.png"]
    assert np.array_equal(pixels(found[0]), original(5))
    assert np.array_equal(pixels(found[0].fetched()), original(5))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(ImportError, match=r'addresses of gs:// need one more package: pip install "vmamba\[gcs\]"'):
        find(["gs://bucket/x"])
    with pytest.raises(BatchError, match="there are no addresses of nonsense://"):
        find(["nonsense://bucket/x"])


def test_writing_and_removing(memory, tmp_path):
    for folder in (str(tmp_path / "x"), "memory://x"):
        assert places.names_in(folder) == []
        places.make_folder(folder)
        places.write(places.join(folder, "a"), b"one")
        places.write(places.join(folder, "a"), b"two")
        assert places.read(places.join(folder, "a")) == b"two"
        assert places.names_in(folder) == ["a"]
        assert places.exists(places.join(folder, "a"))
        for _ in range(2):
            places.remove(places.join(folder, "a"))
        assert not places.exists(places.join(folder, "a"))
        with pytest.raises(FileNotFoundError):
            places.read(places.join(folder, "a"))


def test_a_bad_segment_says_why():
    (item,) = images_of(Segment("bad", "a.tar", error="a.tar: no such file or directory"))
    with pytest.raises(ImageError, match=r"a\.tar: no such file"):
        item.read(3)
