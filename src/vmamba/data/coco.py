"""Pictures with objects in them: boxes, classes and masks from COCO's JSON or Pascal VOC's XML, checked when opened."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, Mask

from vmamba.data.images import read_image
from vmamba.data.sources import refuse, repeated
from vmamba.errors import DataError, ImageError, needing
from vmamba.files import shown

_MOST_PIXELS = 100_000_000  # of a picture that could be read


@dataclass(frozen=True)
class ObjectDataset:
    """A data set for detection and instance segmentation, opened and checked.

    Attributes:
        folder: where the pictures lie.
        where: the file it came from, for messages.
        class_names: one a class, in the order of ``category_ids``, which ascend: label 0 is the smallest id.
        category_ids: of each class, its id in the file.
        pictures: COCO's entries: "id", "file_name", "height", "width".
        annotations: of each picture, its annotations as JSON text: a process that was forked shares it.
        has_masks: whether every annotation has a mask.
        some_masks: whether some have one, and some have none.
        maskless: how many have none and which is the first, in words.
        dropped: how many annotations were left out, for which reason.
    """

    folder: str
    where: str
    class_names: list[str]
    category_ids: list[int]
    pictures: list[dict[str, Any]]
    annotations: list[bytes]
    has_masks: bool
    some_masks: bool
    maskless: str
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        """The file of a picture."""
        return os.path.join(self.folder, self.pictures[index]["file_name"])

    def with_objects(self) -> list[int]:
        """The indices of the pictures that show at least one object that is not part of a crowd."""
        return [i for i, text in enumerate(self.annotations) if any(not a["iscrowd"] for a in json.loads(text))]

    def read(self, index: int) -> tuple[Image, dict[str, Tensor]]:
        """One picture with its objects. Crowds, regions of many objects of a class, are left out: they only count
        in the evaluation.

        Returns:
            The picture, uint8 (3, H, W), and "boxes", float32 (n, 4), x and y of two corners in pixels; "labels", int64
            (n,); and, where the data set has them, "masks", uint8 (n, H, W).

        Raises:
            ImageError: the picture cannot be read, or is not of the size that the annotations were made for.
        """
        entry, name = self.pictures[index], self.name(index)
        picture = read_image(name)
        height, width = entry["height"], entry["width"]
        if picture.size != (width, height):
            raise ImageError(f"{shown(name)}: {picture.width}×{picture.height}, but annotated as {width}×{height}")
        objects = [a for a in json.loads(self.annotations[index]) if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        known = {category: label for label, category in enumerate(self.category_ids)}
        target: dict[str, Tensor] = {
            "boxes": BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=(height, width)),
            "labels": torch.tensor([known[a["category_id"]] for a in objects], dtype=torch.int64),
        }
        if self.has_masks:
            masks = [decode_mask(a["segmentation"], height, width) for a in objects]
            target["masks"] = Mask(
                torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width), "uint8"))
            )
        return Image(pil_to_tensor(picture)), target

    def ground_truth(self) -> dict[str, Any]:
        """The data set as COCO's evaluation takes it, crowds included; there an id of 0 would mean "not found"."""
        annotations = [annotation for text in self.annotations for annotation in json.loads(text)]
        return {
            "images": self.pictures,
            "annotations": [annotation | {"id": number} for number, annotation in enumerate(annotations, 1)],
            "categories": [
                {"id": i, "name": name} for i, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's polygons, or run lengths (compressed or not), to a mask, uint8 (height, width) of 0 and 1.

    Raises:
        ValueError: it is not of this size, or damaged.
    """
    with needing("dense", "masks need one more package"):
        from faster_coco_eval.core import mask as rle
    if isinstance(segmentation, dict) and list(segmentation["size"]) != [height, width]:
        raise ValueError(f"run lengths of size {segmentation['size']} in a picture of {height}×{width}")
    try:
        if isinstance(segmentation, list):
            segmentation = rle.merge(rle.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            segmentation = rle.frPyObjects(segmentation, height, width)
        return rle.decode(segmentation)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def encode_masks(masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Masks (n, H, W) as COCO's compressed run lengths, with text that JSON can hold."""
    with needing("dense", "masks need one more package"):
        from faster_coco_eval.core import mask as rle
    runs = rle.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))) if len(masks) else []
    return [{"size": [int(s) for s in run["size"]], "counts": run["counts"].decode()} for run in runs]


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_objects(
    annotations: str | os.PathLike[str], folder: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> ObjectDataset:
    """Open a COCO file, or a folder of Pascal VOC files, and check every annotation.

    Boxes that are empty or lie outside of the picture are dropped, as is the field's custom, those that reach out are
    cut; ``dropped`` counts both. Everything else that is wrong is an error that names file and annotation.

    Args:
        annotations: a ``.json`` file, or a folder with one ``.xml`` file a picture.
        folder: what file names are relative to.
        class_names: the classes there must be, in the order of their labels. By default the file's own, by ascending
            id; of VOC files, those that occur, sorted.

    Raises:
        DataError: listing what is wrong.
    """
    path, root, where = Path(annotations), os.fspath(folder), shown(annotations)
    if path.is_dir():
        data = _from_voc(path, where, class_names)
    else:
        try:
            data = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{where} cannot be read as JSON: {error}") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in parts):
        raise DataError(f"{where} is not a COCO file: it needs the lists {', '.join(parts)}")
    problems: list[str] = []
    categories = _by_id(data["categories"], "category", {"name": str}, problems)
    pictures = _by_id(data["images"], "picture", {"file_name": str, "height": int, "width": int}, problems)
    ids = sorted(categories)
    names = [shown(categories[i]["name"]) for i in ids]
    if reason := repeated(names):
        problems.append(reason)
    if class_names is not None and names != list(class_names):
        problems.append(f"its classes are {', '.join(names)}; expected {', '.join(class_names)}")
    for entry in [*pictures.values()]:
        if not (min(entry["height"], entry["width"]) > 0 and entry["height"] * entry["width"] <= _MOST_PIXELS):
            problems.append(f"picture {entry['id']} ({shown(entry['file_name'])}): no possible height and width")
            del pictures[entry["id"]]
        elif not os.path.isfile(os.path.join(root, entry["file_name"])):
            problems.append(f"picture {entry['id']}: {shown(os.path.join(root, entry['file_name']))}: no such file")
    # Nothing is said about what such pictures show. An id may be of any type that JSON has.
    refused = {repr(entry.get("id")) for entry in data["images"] if isinstance(entry, dict)} - {*map(repr, pictures)}
    fields = {"image_id": int, "category_id": int, "bbox": list}
    known = _by_id(data["annotations"], "annotation", fields, problems, refused)
    dropped: Counter[str] = Counter()
    kept: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in known.values():
        if annotation["image_id"] not in pictures:
            problems.append(f"annotation {annotation['id']}: there is no picture {annotation['image_id']}")
            continue
        picture = pictures[annotation["image_id"]]
        at = f"{shown(picture['file_name'])}, annotation {annotation['id']}"
        if annotation["category_id"] not in categories:
            problems.append(f"{at}: there is no category {annotation['category_id']}")
        elif wrong := _wrong_box(annotation["bbox"]) or _wrong_segmentation(annotation.get("segmentation"), picture):
            problems.append(f"{at}: {wrong}")
        elif (box := _inside(annotation["bbox"], picture, dropped)) is not None:
            area = annotation.get("area")
            kept[annotation["image_id"]].append({
                "id": annotation["id"], "image_id": annotation["image_id"], "category_id": annotation["category_id"],
                "bbox": box, "area": area if _numbers([area]) else box[2] * box[3],
                "iscrowd": int(bool(annotation.get("iscrowd"))), "segmentation": annotation.get("segmentation") or None,
            })  # fmt: skip
    refuse(problems, sum(len(data[part]) for part in parts), "pictures, annotations and categories", where)
    if not pictures or not ids:
        raise DataError(f"{where} has {len(pictures)} pictures and {len(ids)} classes: nothing to learn from")
    order = sorted(pictures)
    objects = [a for i in order for a in kept[i]]
    maskless = [a for a in objects if not a["segmentation"]]
    words = f"{len(maskless)} of {len(objects)} objects have no mask"
    if maskless:
        file = shown(pictures[maskless[0]["image_id"]]["file_name"])
        words += f", the first in {file}, annotation {maskless[0]['id']}"
    return ObjectDataset(
        root, where, names, ids,
        [{key: pictures[i][key] for key in ("id", "file_name", "height", "width")} for i in order],
        [json.dumps(kept[i]).encode() for i in order],
        has_masks=bool(objects) and not maskless, some_masks=0 < len(maskless) < len(objects), maskless=words,
        dropped=dict(dropped),
    )  # fmt: skip


def _by_id(
    entries: list[Any], kind: str, fields: dict[str, type], problems: list[str], refused: Collection[str] = ()
) -> dict[int, dict[str, Any]]:
    """The entries of one of COCO's lists that have all they need, by their ids; those of refused pictures apart."""
    known: dict[int, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        if isinstance(entry, dict) and repr(entry.get("image_id")) in refused:
            continue
        if not isinstance(entry, dict) or "id" not in entry:
            problems.append(f"{kind} number {number} has no id")
        elif type(entry["id"]) is not int:
            problems.append(f"{kind} number {number}: its id {entry['id']!r} is no whole number")
        elif entry["id"] in known:
            problems.append(f"{kind} {entry['id']} occurs twice")
        elif lacking := [name for name, kind_ in fields.items() if not isinstance(entry.get(name), kind_)]:
            problems.append(f"{kind} {entry['id']} has no proper {', '.join(lacking)}")
        else:
            known[entry["id"]] = entry
    return known


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)


def _wrong_box(box: list[Any]) -> str | None:
    return None if len(box) == 4 and _numbers(box) else f"the box {box} is not four numbers"


def _wrong_segmentation(segmentation: Any, picture: dict[str, Any]) -> str | None:
    height, width = picture["height"], picture["width"]
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        most = 2 * max(height, width)  # a polygon costs memory for each pixel of its outline, wherever that lies
        for polygon in segmentation:
            if not _numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                return "a polygon is not three or more pairs of numbers"
            if max(map(abs, polygon)) > most:
                return f"a polygon reaches beyond the picture of {width}×{height}"
        return None
    if not isinstance(segmentation, dict) or "counts" not in segmentation or height * width > _MOST_PIXELS:
        return "the mask is neither polygons nor run lengths"
    if segmentation.get("size") != [height, width]:
        return f"run lengths of size {segmentation.get('size')}; the picture has {[height, width]}"
    try:
        decode_mask(segmentation, height, width)
    except (ValueError, TypeError) as error:
        return f"damaged run lengths: {error}"
    return None


def _inside(box: list[float], picture: dict[str, Any], dropped: Counter[str]) -> list[float] | None:
    """The part of a box (x, y, width, height) that lies in the picture, or None where that is less than a pixel."""
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if box[2] <= 0 or box[3] <= 0:
        dropped["empty boxes"] += 1
        return None
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, picture["width"]), min(bottom, picture["height"])
    if x1 - x0 < 1 or y1 - y0 < 1:
        dropped["boxes outside of the picture" if x1 <= x0 or y1 <= y0 else "boxes of less than a pixel"] += 1
        return None
    if (x0, y0, x1, y1) == (left, top, right, bottom):
        return box
    dropped["boxes cut at the picture's edge"] += 1
    return [x0, y0, x1 - x0, y1 - y0]


def _from_voc(folder: Path, where: str, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Pascal VOC's files as COCO's structure. Objects marked difficult become crowds: they are neither learned nor
    held against a detector. VOC counts pixels from 1 and its boxes hold their last pixel."""
    images: list[dict[str, Any]] = []
    objects: list[tuple[int, str, list[float], bool]] = []
    problems: list[str] = []
    files = sorted(folder.rglob("*.xml"))
    for number, file in enumerate(files, 1):
        try:
            tree = ElementTree.parse(file).getroot()
            width, height = (int(tree.findtext(f"size/{side}", "")) for side in ("width", "height"))
            images.append({
                "id": number, "width": width, "height": height,
                "file_name": tree.findtext("filename") or f"{file.stem}.jpg",
            })  # fmt: skip
            for item in tree.findall("object"):
                x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
                box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
                objects.append((number, item.findtext("name", "").strip(), box, item.findtext("difficult") == "1"))
        except (OSError, ValueError, ElementTree.ParseError) as error:
            problems.append(f"{shown(file)}: {error}")
    names = sorted({name for _, name, _, _ in objects}) if class_names is None else list(class_names)
    index = {name: i for i, name in enumerate(names)}
    problems += [
        f"{shown(files[number - 1])}: there is no class {name!r}; the classes are {', '.join(names)}"
        for number, name, _, _ in objects
        if name not in index
    ]
    refuse(problems, len(files), "files", where)
    return {
        "images": images,
        "categories": [{"id": i, "name": name} for name, i in index.items()],
        "annotations": [
            {"id": i, "image_id": number, "category_id": index[name], "bbox": box, "iscrowd": int(difficult)}
            for i, (number, name, box, difficult) in enumerate(objects, 1)
        ],
    }
