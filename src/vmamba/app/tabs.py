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
from vmamba.explain.scans import Scan


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
        image = views.stack(scan.grid, session.seen.size, heat=views.heat(veiled[k], float(sizes.max())))
        items.append((_titled(scan, k), image, text))
    strength = float(maps.contributions.sum((1, 2, 3)).norm() / maps.skip.sum(1).norm().clamp(min=1e-30))
    say = views.say("routes", stage=session.stage + 1, block=session.block + 1, strength=strength)
    chart = drawing.chart(lines, both("steps_back"), both("heard"), log="x", percent=True)
    panel = views.panel(say, views.cards(items), chart, at_row=session.row, at_column=session.column)
    return panel, f"<style>:root{{--merged:url({views.heat(maps.merged()[0].numpy())})}}</style>"


def memory(session: Session) -> str:
    """How long each patch is remembered in the block that is looked into, and how large a step it chooses."""
    found = session.recording.selectivity(session.name)
    size, steps, delta = session.seen.size, found.steps[0], found.delta[0]
    longest, (least, most) = float(steps[steps.isfinite()].max()) if steps.isfinite().any() else 1.0, delta.aminmax()
    remembered, chosen = [], []
    for k in range(len(steps)):
        title, middle = _titled(found.scan, k), float(steps[k].median())
        image = views.stack(found.scan.grid, size, heat=views.heat(steps[k].clamp(max=longest).numpy(), longest))
        key = "remembered_by" if math.isfinite(middle) else "remembered_by_all"
        remembered.append((title, image, both(key, middle=middle, kept=float(found.kept[0, k].mean()))))
        image = views.stack(found.scan.grid, size, heat=views.heat((delta[k] - least).numpy(), float(most - least)))
        chosen.append((title, image, both("chosen_by", middle=float(delta[k].median()))))
    say = views.say("memory", stage=session.stage + 1, block=session.block + 1)
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
            best = (
                session.loaded.model(session.recording.seen.images)[0]
                .float()
                .softmax(0)
                .topk(min(6, predictor.num_classes))
            )
            names = [predictor.class_names[index] for index in best.indices.tolist()]
            bars = views.classes(list(zip(names, best.values.tolist(), strict=True)))
            return views.panel(views.say("prediction"), bars)
        find = predictor.segment if session.loaded.choice.task == "segmentation" else predictor.detect
        found = find(session.picture)
    return views.panel(views.say("prediction"), views.wide(found.overlay(), session.loaded.choice.task))


TABS = {
    "routes": Tab(lambda session: routes(session)[0], lambda session: None),
    "memory": Tab(memory, of_block),
    "prediction": Tab(prediction, of_picture),
}
