"""The renderer of all benchmarks: results as a page, for the terminal too, and curves as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Layout = Mapping[str, tuple[str, str]]  # by a table's name: its title, and the headers of its columns with ";" between

# By header: a row's key, a format, and what the number is multiplied by. Any other header is a key, shown as it is.
COLUMNS = {
    "ms": ("seconds", ",.2f", 1e3),
    "µs": ("seconds", ",.1f", 1e6),
    "images/s": ("images_per_second", ",.1f", 1),
    "peak memory, MB": ("peak_mb", ",.0f", 1),
    "MB": ("bytes", ",.1f", 1e-6),
    "TB/s": ("rate", ".2f", 1e-12),
    "share": ("share", ".2f", 1),
    "backward, µs": ("backward_seconds", ",.1f", 1e6),
    "backward MB": ("backward_bytes", ",.1f", 1e-6),
    "backward TB/s": ("backward_rate", ".2f", 1e-12),
    "backward share": ("backward_share", ".2f", 1),
    "backbone, ms": ("backbone_seconds", ",.0f", 1e3),
    "heads, ms": ("heads_seconds", ",.0f", 1e3),
    "share of heads": ("share", ".2f", 1),
    "floor, ms": ("floor_seconds", ",.2f", 1e3),
    "least GB": ("bytes", ",.2f", 1e-9),
    "calls": ("calls", ".0f", 1),
    "value": ("value", ",.2f", 1),
    "ratio": ("ratio", ".3f", 1),
    "distance": ("distance", ".1e", 1),
    "allowed": ("allowed", ".0e", 1),
    "parameters, M": ("params", ".2f", 1e-6),
    "accuracy, %": ("accuracy", ".2f", 1e2),
    "± points": ("spread", ".2f", 1e2),
    "mIoU, %": ("mIoU", ".2f", 1e2),
    "mAcc, %": ("mAcc", ".2f", 1e2),
    "box AP, %": ("AP", ".2f", 1e2),
    "box AP50, %": ("AP50", ".2f", 1e2),
    "epochs": ("epochs", ".1f", 1),
}
COLOURS = {
    "VMamba": "#0072B2", "Swin": "#E69F00", "ConvNeXt": "#009E73", "ViT": "#CC79A7", "DeiT": "#CC79A7",
    "ResNet": "#7F7F7F", "products": "#BBBBBB", "cross": "#0072B2", "unidirectional": "#E69F00",
    "bidirectional": "#009E73", "diagonal": "#D55E00", "hilbert": "#CC79A7", "spiral": "#7F7F7F",
}  # fmt: skip


def sentence(environment: Mapping[str, Any]) -> str:
    """Machine, versions and day in one line, for pages and pictures."""
    names, beside = ["vmamba", "torch", "timm"], f"{environment['threads']} threads"
    if "driver" in environment:
        names, beside = [*names, "triton"], f"driver {environment['driver']}, CUDA {environment['cuda']}"
    versions = ", ".join(f"{name} {environment[name]}" for name in names)
    return f"{environment['device']}, {beside}, {versions}, {environment['date']}"


def page(title: str, program: str, results: Mapping[str, Any], layout: Layout) -> str:
    """Everything that was found, as Markdown whose columns are aligned."""
    lines = [f"# {title}", "", f"{sentence(results['environment'])}. Written by `python benchmarks/{program}`."]
    notes = [*results["notes"], *other_days(results, layout)]
    lines += ["", " ".join(f"{note}." for note in notes)] * bool(notes)
    if results["figures"]:
        lines += ["", *table(("figure", "measured", "wanted", "note"), map(figure_cells, results["figures"]))]
    for section, reason in results["skipped"].items():
        lines += ["", f"The section `{section}` is incomplete: {reason}."]
    for name, (heading, headers) in layout.items():
        if rows := results["tables"].get(name):
            lines += ["", f"## {heading}", "", *columns(rows, headers.split(";"))]
    return "\n".join(lines) + "\n"


def other_days(results: Mapping[str, Any], layout: Layout) -> list[str]:
    """What is not of the day that the page begins with, in a sentence for each day."""
    dates, today = results.get("dates", {}), results["environment"]["date"]
    found: dict[str, list[str]] = {}
    for name, (heading, _) in layout.items():
        if results["tables"].get(name) and (day := dates.get(name, today)) != today:
            found.setdefault(day, []).append(f"“{heading}”")
    return [f"Of {day}: {', '.join(headings)}" for day, headings in sorted(found.items())]


def figure_cells(record: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Name, measured, wanted and note."""
    measured = "–" if record["value"] is None else f"{record['value']:.2f}"
    wanted = f"{'≥' if record['more'] else '≤'} {record['bound']:g}"
    missed = record["value"] is not None and not record["met"]
    return record["name"], measured, wanted + "  not met" * missed, record.get("note", "")


def columns(rows: Sequence[Row], headers: Sequence[str]) -> list[str]:
    """A table. Columns that no row has a value for are left out; an error stands in the last one."""
    known = [(header, *COLUMNS.get(header, (header, "", 1))) for header in headers]
    known = [column for column in known if any(row.get(column[1]) is not None for row in rows)]
    errors = ["error"] * any("error" in row for row in rows)

    def cell(value: Any, form: str, factor: float) -> str:
        return "–" if value is None else format(value * factor if form else value, form)

    cells = (
        [*(cell(row.get(key), form, factor) for _, key, form, factor in known), *(row.get(key, "") for key in errors)]
        for row in rows
    )
    return table([*(column[0] for column in known), *errors], cells)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [[text.replace("|", "\\|") for text in line] for line in (headers, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True))} |" for line in lines]


def curves(
    path: Path,
    title: str,
    across: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    foot: str = "",
    logarithmic: bool = True,
) -> None:
    """Draw panels side by side: by the label of the vertical axis, and by the name of a curve, its points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    size = (2.5 + 4 * len(panels), 4.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (label, found) in zip(axes[0], panels.items(), strict=True):
        for name, points in found.items():
            width = 2.6 if name.startswith("VMamba") else 1.6
            axis.plot(*zip(*points, strict=True), lw=width, color=_colour(name), marker="o" * logarithmic, label=name)
        axis.set(xlabel=across, ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        if logarithmic:
            axis.set(xscale="log", yscale="log")
            ticks = sorted({x for points in found.values() for x, _ in points})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.minorticks_off()
            axis.legend(fontsize=8)
        else:
            last = {name: points[-1] for name, points in found.items()}
            right, bottom = max(x for x, _ in last.values()), min(y for _, y in last.values()) - 8
            axis.set(xlim=(0, 1.22 * right), ylim=(max(bottom, 0), None))
            bottom, top = axis.get_ylim()
            at = top
            for name, (x, y) in sorted(last.items(), key=lambda item: -item[1][1]):
                at = min(y, at - 0.045 * (top - bottom))  # below the label before
                axis.text(x + 0.015 * right, at, f"{name}  {y:.1f}", va="center", color=_colour(name))
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(textwrap.fill(foot, int(17 * size[0])), fontsize=7, color="#666666")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _colour(name: str) -> str:
    return next(colour for kind, colour in COLOURS.items() if name.startswith(kind))
