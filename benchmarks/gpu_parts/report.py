"""From the tables of benchmarks/gpu.py to figures beside their bounds, a page and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import sentence
from measuring import Figure, figure_cells, markdown_table

from gpu_parts.yardsticks import CONVNEXT_T, DEIT_S, MINE, RELEASED, SWIN_T, NotMeasuredError

Row = dict[str, Any]
Tables = Mapping[str, list[Row]]

FOUR = (MINE, SWIN_T, CONVNEXT_T, DEIT_S)


# --- figures ---------------------------------------------------------------------------------------------------------


def find(rows: Sequence[Row], key: str, **wanted: object) -> Row:
    """The row with the smallest `key` among those with the wanted fields.

    Raises:
        NotMeasuredError: there is none; the message is the rows' own error, if they have one.
    """
    rows = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    measured = [row for row in rows if row.get(key) is not None]
    if measured:
        return min(measured, key=lambda row: row[key])
    raise NotMeasuredError(next((row["error"] for row in rows if "error" in row), "no run has measured it"))


def figures(tables: Tables, size: int, batch: int, large: Sequence[int]) -> list[Figure]:
    """What is wanted of the backend.

    Args:
        tables: as benchmarks/gpu.py fills them.
        size, batch: of the images in inference and training.
        large: the sides of large images, ascending; for the last of them DeiT-S is compared as well.
    """
    found: list[Figure] = []

    def add(name: str, bound: float, compute: Callable[[], tuple[float, str]], more: bool = False) -> None:
        try:
            value, note = compute()
            found.append(Figure(name, value, bound, more, note))
        except NotMeasuredError as reason:
            found.append(Figure(name, None, bound, more, f"not measured: {reason}"))

    def compare(table: str, other: str, key: str, **wanted: object) -> tuple[float, str]:
        """Ours over theirs, each in the mode that suits it better."""
        ours = find(tables.get(table, []), key, model=MINE, **wanted)
        theirs = find(tables.get(table, []), key, model=other, **wanted)
        modes = ours["mode"] if ours["mode"] == theirs["mode"] else f"{ours['mode']}; {other} {theirs['mode']}"
        return ours[key] / theirs[key], modes

    def speed(table: str, other: str, at: int) -> tuple[float, str]:
        slower, modes = compare(table, other, "seconds", size=at)
        return 1 / slower, modes

    passes = {"inference": (2.0, 1.2, 1.0), "training": (2.0, 1.0, 0.9)}
    for table, bounds in passes.items():
        name = "training step" if table == "training" else table
        for other, bound in zip((RELEASED, SWIN_T, CONVNEXT_T), bounds, strict=True):
            what = f"{name}, {size}², batch {batch}: images/s, ours / {other.removeprefix(MINE + ', ')}"
            add(what, bound, lambda table=table, other=other: speed(table, other, size), more=True)
    for side in large:
        what = f"inference, {side}²: images/s, ours / Swin-T"
        add(what, 1.2, lambda side=side: speed("resolution", SWIN_T, side), more=True)
    if large:
        what = f"inference, {large[-1]}²: images/s, ours / DeiT-S"
        add(what, 4.0, lambda: speed("resolution", DEIT_S, large[-1]), more=True)
        add(f"time a pixel, ours, {large[-1]}² / {size}²", 1.2, lambda: _growth(tables, size, large[-1]))

    def bandwidth() -> tuple[float, str]:
        rows = [row for row in tables.get("operators", []) if row["scan"] == "operator"]
        largest = max((row["batch"] for row in rows), default=0)
        row = find(rows[:2], "seconds", batch=largest)
        return row["share"], f"{row['grid']}² × {row['channels']}, batch {row['batch']}, {row['timed']}"

    add("scan, stage 1: bytes of u, projections and y a second / copy rate", 0.40, bandwidth, more=True)
    what = f"peak training memory, {size}², batch {batch}: ours / Swin-T"
    add(what, 1.0, lambda: compare("training", SWIN_T, "peak_mb", size=size))
    add(f"latency, batch 1, {size}²: ours / Swin-T, same mode", 1.0, lambda: _latency(tables))
    return found


def _growth(tables: Tables, size: int, large: int) -> tuple[float, str]:
    rows = [*tables.get("inference", []), *tables.get("resolution", [])]
    far = find(rows, "seconds", model=MINE, size=large)
    near = find(rows, "seconds", model=MINE, size=size, mode=far["mode"])
    seconds = [row["seconds"] / row["batch"] / row["size"] ** 2 for row in (far, near)]
    return seconds[0] / seconds[1], far["mode"]


def _latency(tables: Tables) -> tuple[float, str]:
    """In the mode that suits Swin-T best."""
    rows = [row for row in tables.get("latency", []) if row["mode"] != "eager"]
    theirs = find(rows, "seconds", model=SWIN_T)
    ours = find(rows, "seconds", model=MINE, mode=theirs["mode"])
    return ours["seconds"] / theirs["seconds"], theirs["mode"]


# --- the page --------------------------------------------------------------------------------------------------------

# Column headers with a row's key, a format, and what the number is multiplied by.
Column = tuple[str, str, str, float]
_MODEL: tuple[Column, ...] = (("model", "model", "", 1), ("mode", "mode", "", 1), ("batch", "batch", "d", 1))
_SPEED: tuple[Column, ...] = (
    ("ms", "seconds", ",.2f", 1e3),
    ("images/s", "images_per_second", ",.0f", 1),
    ("peak memory, MB", "peak_mb", ",.0f", 1),
)
PAGE: dict[str, tuple[str, tuple[Column, ...]]] = {
    "checks": (
        "Scans against the definition in float64: ‖difference‖ / ‖reference‖ of the result and the six gradients",
        (
            ("scan", "scan", "", 1),
            ("B×H×W×D", "shape", "", 1),
            ("dtype", "dtype", "", 1),
            ("worst", "worst", "", 1),
            ("distance", "distance", ".1e", 1),
            ("allowed", "allowed", ".0e", 1),
        ),
    ),
    "rates": ("Rates of the card", (("what", "what", "", 1), ("measured", "value", ",.2f", 1))),
    "inference": ("Inference", (*_MODEL, *_SPEED)),
    "training": ("Training step, forward and backward", (*_MODEL, *_SPEED)),
    "latency": ("Latency of one image", (*_MODEL[:2], ("ms", "seconds", ".3f", 1e3))),
    "resolution": ("Inference by the side of the image", (("side", "size", "d", 1), *_MODEL, *_SPEED)),
    "operators": (
        "SS2D's operator with its projections; “operator” is ours without them, with the bytes that it must move and "
        "their rate as a share of the copy rate",
        (
            ("scan", "scan", "", 1),
            ("grid", "grid", "d", 1),
            ("channels", "channels", "d", 1),
            ("batch", "batch", "d", 1),
            ("forward, µs", "seconds", ",.1f", 1e6),
            ("MB", "bytes", ",.1f", 1e-6),
            ("TB/s", "rate", ".2f", 1e-12),
            ("share", "share", ".2f", 1),
            ("backward, µs", "backward_seconds", ",.1f", 1e6),
            ("MB", "backward_bytes", ",.1f", 1e-6),
            ("TB/s", "backward_rate", ".2f", 1e-12),
            ("share", "backward_share", ".2f", 1),
            ("timed", "timed", "", 1),
        ),
    ),
    "profile": (
        "Where the card's time goes in our model, and the least bytes: what layers take, give and weigh, two a number",
        (
            ("pass", "pass", "", 1),
            ("mode", "mode", "", 1),
            ("kind", "kind", "", 1),
            ("ms", "seconds", ",.2f", 1e3),
            ("least GB", "bytes", ",.2f", 1e-9),
            ("at the copy rate, ms", "floor_seconds", ",.2f", 1e3),
        ),
    ),
    "kernels": (
        "The longest kernels, ours",
        (
            ("pass", "pass", "", 1),
            ("mode", "mode", "", 1),
            ("kernel", "kernel", "", 1),
            ("kind", "kind", "", 1),
            ("calls", "calls", ".0f", 1),
            ("ms", "seconds", ",.3f", 1e3),
        ),
    ),
    "tuning": (
        "Configurations of the scan's kernels, fastest first",
        (
            ("pass", "pass", "", 1),
            ("grid", "grid", "d", 1),
            ("channels", "channels", "d", 1),
            ("configuration", "configuration", "", 1),
            ("µs", "seconds", ",.1f", 1e6),
        ),
    ),
}


def markdown(results: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = ["# VMamba on a GPU", "", sentence(results["environment"]) + "; written by `python benchmarks/gpu.py`.", ""]
    lines += [f"{text}." for text in results["notes"]]
    lines += ["", *markdown_table(("figure", "measured", "wanted", "mode"), map(_figure_row, results["figures"]))]
    for section, reason in results["skipped"].items():
        lines += ["", f"The section `{section}` is incomplete: {reason}."]
    for name, (title, columns) in PAGE.items():
        if rows := results["tables"].get(name):
            lines += ["", f"## {title}", "", *_rows(rows, columns)]
    if best := configuration_table(results["tables"].get("tuning", [])):
        lines += [
            "",
            "The best of them, as a table for `vmamba/ops/backends/triton/configurations.py`:",
            "",
            "```python",
        ]
        lines += [*best, "```"]
    return "\n".join(lines) + "\n"


def _figure_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    return (*figure_cells(record), record.get("note", ""))


def _rows(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Columns that no row has a value for are left out; an error stands in the last one."""
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    has_errors = any("error" in row for row in rows)

    def cell(row: Row, column: Column) -> str:
        _, key, form, factor = column
        value = row.get(key)
        if value is None:
            return "–"
        return format(value * factor if factor != 1 else value, form)

    cells = ([*(cell(row, column) for column in columns), *([row.get("error", "")] * has_errors)] for row in rows)
    return markdown_table([*(column[0] for column in columns), *([""] * has_errors)], cells)


def configuration_table(rows: Sequence[Row]) -> list[str]:
    """The fastest configurations of the Triton kernels by the number of positions, as Python."""
    lines = []
    for grid in sorted({row["grid"] for row in rows}):
        try:
            best = [
                find(rows, "seconds", grid=grid, **{"pass": name})["configuration"] for name in ("scan", "gradient")
            ]
        except NotMeasuredError:
            continue
        lines.append(f"({grid**2}, Configurations(scan={best[0]}, gradient={best[1]})),")
    return lines


# --- the plot --------------------------------------------------------------------------------------------------------


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Throughput and peak memory of an image against its side, not compiled: so are all sizes measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = results["tables"].get("resolution", [])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = sorted({row["size"] for row in rows})
    for axis, key, label in zip(
        axes, ("images_per_second", "peak_mb"), ("images a second", "peak memory an image, MB"), strict=True
    ):
        for name in FOUR:
            points = []
            for size in sizes:
                try:
                    row = find(rows, "seconds", model=name, size=size, mode="eager")
                    points.append((size, row[key] / (row["batch"] if key == "peak_mb" else 1)))
                except (NotMeasuredError, KeyError):
                    continue
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xlabel="side of the image, pixels", ylabel=label, xscale="log", yscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{sentence(results['environment'])}; bfloat16, eager", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
