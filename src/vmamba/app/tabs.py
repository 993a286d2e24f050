"""The tabs: what each shows of a visitor's model and picture, and when that has to be drawn anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

import numpy as np
import torch

from vmamba.app import drawing, views
from vmamba.app.session import Session
from vmamba.app.texts import ROUTES, both
from vmamba.explain.activation_maps import maps_of
from vmamba.explain.class_maps import NothingFoundError, class_maps
from vmamba.explain.receptive_field import FLOOR, receptive_field, untrained
from vmamba.explain.scaling import scaling
from vmamba.explain.scans import Scan
from vmamba.explain.stage_maps import stage_maps
from vmamba.ops.routes import PATTERNS, scan_orders


class Tab(NamedTuple):
    """One tab.

    Attributes:
        draw: its HTML.
        key: what that depends on.
    """

    draw: Callable[[Session], str]
    key: Callable[[Session], Any]


def of_picture(session: Session) -> Any:
    """Drawn anew for another model or picture."""
    return session.loaded.choice, session.number


def of_block(session: Session) -> Any:
    """Drawn anew for another model, picture or block."""
    return *of_picture(session), session.name


def of_model(session: Session) -> Any:
    """Drawn anew for another model."""
    return session.loaded.choice


def routes(session: Session) -> tuple[str, str]:
    """What the chosen patch hears along each route; and the map of all routes together, for the style sheet."""
    maps = maps_of(session.recording, session.name, [(session.row, session.column)])
    scan, reach, sizes = maps.scan, maps.reach()[0], maps.routes()[0]
    veiled = sizes.masked_fill(~maps.visited[0], torch.nan).numpy()
    lines, items = [], []
    for k, name in enumerate(scan.route_names):
        order = scan.orders[k]
        path = order[: int(scan.steps[k, session.row * scan.grid[1] + session.column]) + 1].flip(0)
        heard = sizes[k].flatten()[path].cumsum(0)
        shares = (heard / heard[-1].clamp(min=1e-30)).numpy()
        lines.append(
            drawing.Line(route_name(name), drawing.ROUTE_COLOURS[k], range(1, len(shares) + 1), shares.tolist())
        )
        share = float(sizes[k].sum() / sizes.sum().clamp(min=1e-30))
        text = both("route", share=share, reach=float(reach[k]), half=int(np.searchsorted(shares, 0.5)))
        image = views.stack(scan.grid, maps.cell, session.seen.size, heat=views.heat(veiled[k], float(sizes.max())))
        items.append((_titled(scan, k), image, text))
    strength = float(maps.contributions.sum((1, 2, 3)).norm() / maps.skip.sum(1).norm().clamp(min=1e-30))
    say = views.say("routes", stage=session.stage_number + 1, block=session.block + 1, strength=drawing.brief(strength))
    chart = drawing.chart(lines, both("steps_back"), both("heard"), log="x", percent=True)
    panel = views.panel(say, views.cards(items), chart, at_row=session.row, at_column=session.column)
    return panel, f"<style>:root{{--merged:url({views.heat(maps.merged()[0].numpy())})}}</style>"


def memory(session: Session) -> str:
    """How long each patch is remembered in the block that is looked into, and how large a step it chooses."""
    found = session.recording.selectivity(session.name)
    place = found.scan.grid, found.cell, session.seen.size
    steps, delta = found.steps[0], found.delta[0]
    longest, (least, most) = float(steps[steps.isfinite()].max()) if steps.isfinite().any() else 1.0, delta.aminmax()
    remembered, chosen = [], []
    for k in range(len(steps)):
        title, middle = _titled(found.scan, k), float(steps[k].median())
        image = views.stack(*place, heat=views.heat(steps[k].clamp(max=longest).numpy(), longest))
        key = "remembered_by" if math.isfinite(middle) else "remembered_by_all"
        remembered.append((title, image, both(key, middle=middle, kept=float(found.kept[0, k].mean()))))
        image = views.stack(*place, heat=views.heat((delta[k] - least).numpy(), float(most - least)))
        chosen.append((title, image, both("chosen_by", middle=float(delta[k].median()))))
    say = views.say("memory", stage=session.stage_number + 1, block=session.block + 1)
    step = views.say("chosen", least=float(least), most=float(most)) + views.cards(chosen)
    return views.panel(say, step, views.say("remembered"), views.cards(remembered))


def _titled(scan: Scan, k: int) -> str:
    """The name of a route behind an arrow in the direction of its first step."""
    first, second = (divmod(place, scan.grid[1]) for place in (scan.orders[k].tolist() * 2)[:2])
    return views.arrow(first, second, drawing.ROUTE_COLOURS[k]) + route_name(scan.route_names[k])


def route_name(name: str) -> str:
    """A route's name as HTML: that of a usual one in both languages."""
    return both(ROUTES[name]) if name in ROUTES else escape(name)


def prediction(session: Session) -> str:
    """What the network says of the picture, in its own task's way."""
    predictor: Any = session.loaded.predictor
    with session.loaded.lock, torch.inference_mode():
        if session.loaded.choice.task == "classification":
            confidences = session.loaded.model(session.recording.seen.images)[0].float().softmax(0)
            best = predictor.best(confidences, _CLASSES)
            pairs = [(found.name, found.confidence) for found in best]
            return views.panel(views.say("prediction"), views.classes(pairs))
        find = predictor.segment if session.loaded.choice.task == "segmentation" else predictor.detect
        found = find(session.picture)
    height, width = session.recording.seen.drawn()
    say = views.say("prediction_dense", width=width, height=height)
    return views.panel(say, views.wide(found.overlay(), session.loaded.choice.task))


def stages(session: Session) -> str:
    """What each stage puts out."""
    with session.loaded.lock:
        found = stage_maps(session.loaded.model, session.recording.seen)
    colours, strong = [], []
    for number, rgb, length, cell in zip(found.numbers(), found.colours(), found.energy(), found.cells, strict=True):
        title = both("stage", stage=number["stage"])
        channels, rows, columns = number["shape"]
        place = (rows, columns), cell, session.seen.size
        image = views.picture(drawing.png((rgb.movedim(0, 2) * 255).round().byte().numpy()), *place)
        colours.append((title, image, both("stage_of", rows=rows, columns=columns, channels=channels)))
        image = views.stack(*place, "still", views.heat((length[0] - length[0].min()).numpy()))
        strong.append((title, image, both("edges", edges=number["edges"])))
    parts = views.say("components"), views.cards(colours), views.say("energy"), views.cards(strong)
    return views.panel(views.say("stages"), *parts)


def classes(session: Session) -> str:
    """Which places of each stage spoke for what the network answers."""
    predictor: Any = session.loaded.predictor
    targets: list[int | None] = [None]
    with session.loaded.lock:
        if session.loaded.choice.task == "classification":
            with torch.inference_mode():
                logits = session.loaded.model(session.recording.seen.images)[0]
            targets = [*logits.topk(min(2, len(logits))).indices.tolist()]
        names = predictor.class_names
        try:
            found = [class_maps(session.loaded.model, session.recording.seen, t, class_names=names) for t in targets]
        except NothingFoundError:
            return views.panel(views.say("nothing_found"))
    parts = []
    for one in found:
        items = []
        outline = None if one.regions is None else drawing.png(drawing.outline_rgba(one.regions[0].numpy()))
        for stage, cam, cell in zip(one.stages, one.grad_cam, one.cells, strict=True):
            rows, columns = cam.shape[1:]
            place = (rows, columns), cell, session.seen.size
            image = views.stack(*place, "still", views.heat(cam[0].numpy()), outline=outline)
            text = both("grid" if cam.any() else "nothing_for", rows=rows, columns=columns)
            items.append((both("stage", stage=stage), image, text))
        parts += [views.say("class", name=one.targets[0], score=float(one.scores[0])), views.cards(items)]
    outlined = [] if found[0].regions is None else [views.say("outlined")]
    return views.panel(views.say("classes"), *outlined, *parts)


def field(session: Session) -> str:
    """How far the middle of the stage's map hears, before and after training."""
    model, images = session.loaded.model, session.recording.seen.images
    with session.loaded.lock:
        found = {"field_now": receptive_field(model, images, session.stage_number)}
        if session.loaded.choice.origin != "untrained":
            found = {"field_before": receptive_field(untrained(model), images, session.stage_number)} | found
    items, lines = [], []
    for (key, one), colour in zip(found.items(), drawing.ROUTE_COLOURS[1::-1][-len(found) :], strict=True):
        shares = one.contributions / one.contributions.max()
        heat = drawing.heat_rgba(1 - np.log10(np.maximum(shares, FLOOR)) / math.log10(FLOOR), power=1)
        image = views.picture(drawing.png(heat[..., :3]), shares.shape, (1, 1), session.seen.size)
        half, most = one.side(0.5), one.side(0.9)
        items.append((both(key), image, both("field_of", half=half, most=most, area=one.area(0.9))))
        lines.append(drawing.Line(both(key), colour, *(values.tolist() for values in one.within())))
    chart = drawing.chart(lines, both("field_side"), both("field_share"), percent=True)
    return views.panel(views.say("field", stage=session.stage_number + 1), views.cards(items), chart)


def cost(session: Session) -> str:
    """What the network costs as pictures grow, beside one with attention."""
    model: Any = session.loaded.model
    name = session.loaded.choice.name
    name = name if len(name) <= _LONGEST else f"…\u2060{name[1 - _LONGEST :]}"  # the end of a path says most
    network = model if session.loaded.choice.task == "classification" else model.backbone
    with session.loaded.lock:
        found = scaling({name: network, _RIVAL: _RIVAL}, _SIDES, rounds=3, memory=False)
    lines, rows = [], []
    for one, colour in zip(found, drawing.ROUTE_COLOURS, strict=False):
        for key in ("flops", "seconds"):
            values = [getattr(each, key) for each in one.costs]
            if key == "flops":
                lines.append(drawing.Line(escape(one.name), colour, [each.size**2 for each in one.costs], values))
            rows.append((escape(one.name), both(key), *map(drawing.brief, values), f"{one.exponents[key]:.2f}"))
    head = ("", "", *(f"{side}²" for side in _SIDES), both("exponent"))
    chart = drawing.chart(lines, both("pixels"), both("flops"), log="xy", dots=True)
    return views.panel(views.say("scaling"), views.table(head, rows), chart)


def order(session: Session) -> str:
    """The order in which each pattern visits the grid, drawn as it goes."""
    own = session.recording.scan(session.name).pattern
    parts = [views.say("order", pattern=own)]
    for pattern in sorted(PATTERNS, key=lambda name: name != own):
        paths = scan_orders(pattern, _GRID, _GRID).tolist()
        items = [
            ("", views.walk([divmod(place, _GRID) for place in path], _GRID, colour), "")
            for path, colour in zip(paths, drawing.ROUTE_COLOURS, strict=True)
        ]
        parts += [f"<h3>{escape(pattern)}</h3>", views.cards(items)]
    return views.panel(*parts)


_CLASSES = 6  # the most likely, whose probabilities are shown
_RIVAL, _SIDES = "deit_tiny_patch16_224", (64, 128, 256, 384)
_LONGEST = 26  # letters of a name in a table
_GRID = 8  # rows and columns on which patterns are drawn

TABS = {
    "routes": Tab(lambda session: routes(session)[0], lambda session: None),
    "memory": Tab(memory, of_block),
    "stages": Tab(stages, of_picture),
    "classes": Tab(classes, of_picture),
    "prediction": Tab(prediction, of_picture),
    "field": Tab(field, lambda session: (*of_picture(session), session.stage_number)),
    "scaling": Tab(cost, of_model),
    "order": Tab(order, lambda session: session.recording.scan(session.name).pattern),
}
