"""The page: what is on it, what happens when something is chosen, and how it is served."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vmamba.app import drawing, views
from vmamba.app.models import Catalogue
from vmamba.app.session import RefusedError, Session, kept_picture, received_picture
from vmamba.app.tabs import TABS, routes
from vmamba.app.texts import Language, both, plain
from vmamba.errors import CheckpointError, RecipeError, needing
from vmamba.tasks.runs import report

with needing("explore", "the page needs one more package"):
    import gradio as gr
    from starlette.middleware import Middleware

    from vmamba.app.guard import Guard

_HERE = Path(__file__).parent
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "PingFang SC", "Noto Sans CJK SC", "sans-serif"]
_VISITORS = 32  # whose choices are kept at a time
_IDLE = 1800  # seconds after which they are forgotten
_MOST_EXAMPLES = 24


class Page:
    """The page with its models and examples; `blocks` is Gradio's side of it.

    Args:
        catalogue: the models to choose from.
        examples: picture files to choose from; those that cannot be read are left out.
    """

    def __init__(self, catalogue: Catalogue, examples: Sequence[str | Path] = ()) -> None:
        self.catalogue = catalogue
        self.examples = dict(filter(None, map(_readable, examples[:_MOST_EXAMPLES])))
        self.blocks = self._build()

    def _build(self) -> gr.Blocks:
        listen = (_HERE / "page.js").read_text()
        part = functools.partial(gr.HTML, js_on_load=listen, apply_default_css=False)
        thumbs = [(name, drawing.photograph(image, 92)) for name, image in self.examples.items()]
        with gr.Blocks(title="VMamba", analytics_enabled=False) as blocks:
            session = gr.State(None, time_to_live=_IDLE)
            active, drawn = gr.State(next(iter(TABS))), gr.State({}, time_to_live=_IDLE)
            top = part(views.header())
            with gr.Row():
                with gr.Column(scale=4, min_width=320):
                    model = gr.Dropdown(
                        self.catalogue.labels("en"),
                        value=self.catalogue.first,
                        label=plain("model", "en"),
                        filterable=False,
                    )
                    canvas, light = part(), part(visible="hidden")
                    picker = part(views.picker(thumbs))
                with gr.Column(scale=7, min_width=320):
                    network = part()
                    with gr.Tabs():
                        tabs = {name: gr.Tab(plain(f"tab_{name}", "en"), id=name) for name in TABS}
                        panels = {}
                        for name, tab in tabs.items():
                            with tab:
                                panels[name] = part()

            # One after another, for each begins with the session that the last has left.
            choose = functools.partial(_on, trigger_mode="always_last", concurrency_id="choices")
            whole = [session, canvas, network]
            redraw = {
                "fn": _told(self.redraw),
                "inputs": [session, active, drawn],
                "outputs": [*panels.values(), light, drawn],
            }
            redraw |= {"concurrency_id": "tabs"}

            start = _on(blocks.load, self.start, [session], whole)
            start.then(**redraw)
            choose(model.input, self.choose_model, [session, model], whole).then(**redraw)
            for event in (picker.select, picker.upload):
                choose(event, self.choose_picture, [session, model], whole).then(**redraw)
            choose(network.select, self.choose_block, [session], whole).then(**redraw)
            for each in (canvas, *panels.values()):
                choose(
                    each.select,
                    self.choose_patch,
                    [session],
                    [session, panels["routes"], light],
                    show_progress="hidden",
                )
            for name, tab in tabs.items():
                tab.select(functools.partial(str, name), None, active, api_visibility="private").then(**redraw)
            _on(top.select, self.choose_language, [], [model, *tabs.values()], show_progress="hidden")
        return blocks

    # --- What happens when something is chosen; each returns what the page shows next ---------------------------------

    def start(self, session: Session | None) -> tuple[Any, ...]:
        """The first model, with the first example."""
        if not self.examples:
            raise RefusedError("nobody")
        return _shown(Session.begin(self._load(self.catalogue.first), next(iter(self.examples.values()))))

    def choose_model(self, session: Session | None, key: object) -> tuple[Any, ...]:
        """Another model for the same picture."""
        return _shown(_begun(session).with_model(self._load(key)))

    def choose_picture(self, session: Session | None, key: object, event: gr.EventData) -> tuple[Any, ...]:
        """An example, or a picture that was sent in; the first one, for the model of that name."""
        sent = event._data if isinstance(event._data, dict) else {}
        if "example" in sent:
            place = str(sent["example"])
            if not place.isdecimal() or int(place) >= len(self.examples):
                raise RefusedError("no_data")
            picture = list(self.examples.values())[int(place)]
        else:
            picture = received_picture(sent)
        if session is None:
            return _shown(Session.begin(self._load(key), picture))
        return _shown(session.with_picture(picture))

    def choose_block(self, session: Session | None, event: gr.EventData) -> tuple[Any, ...]:
        """Another block of the network."""
        sent = event._data or {}
        return _shown(_begun(session).with_block(sent.get("stage"), sent.get("block")))

    def choose_patch(self, session: Session | None, event: gr.EventData) -> tuple[Any, ...]:
        """Another patch: only the routes change."""
        sent = event._data or {}
        session = _begun(session).with_patch(sent.get("row"), sent.get("column"))
        panel, light = routes(session)
        return session, panel, light

    def choose_language(self, event: gr.EventData) -> tuple[Any, ...]:
        """The labels of Gradio's own parts in another language; the rest of the page holds both."""
        language: Language = "zh" if (event._data or {}).get("language") == "zh" else "en"
        model = gr.Dropdown(self.catalogue.labels(language), label=plain("model", language))
        return model, *(gr.Tab(plain(f"tab_{name}", language)) for name in TABS)

    def redraw(self, session: Session | None, active: str, drawn: dict[str, Any]) -> tuple[Any, ...]:
        """The tab that is open, unless it shows what it should already, and the map over the picture."""
        panels = dict.fromkeys(TABS, gr.skip())
        if session is None:  # the browser tells of the first tab before there is anything to show
            if drawn:  # but something was shown: the session has ended
                raise RefusedError("nobody")
            return *panels.values(), gr.skip(), drawn
        panels["routes"], light = routes(session)
        if active in TABS and (tab := TABS[active]) and drawn.get(active) != (key := tab.key(session)):
            panels[active], drawn = tab.draw(session), drawn | {active: key}
        return *panels.values(), light, drawn

    def _load(self, key: object) -> Any:
        try:
            return self.catalogue.load(key)
        except KeyError:
            raise RefusedError("no_model") from None
        except (CheckpointError, ImportError, OSError) as error:
            raise RefusedError("bad_model", error) from error


def _shown(session: Session) -> tuple[Any, ...]:
    """The session, the picture and the network."""
    beware = views.beware() if session.loaded.choice.origin == "untrained" else ""
    depths = list(map(len, session.stages))
    network = views.network(session.stage_numbers, depths, session.grids, session.stage, session.block)
    return session, views.canvas(session.seen, session.grid, session.cell), beware + network


def _begun(session: Session | None) -> Session:
    if session is None:
        raise RefusedError("nobody")
    return session


def _readable(path: str | Path) -> tuple[str, Any] | None:
    try:
        return Path(path).stem.replace("_", " "), kept_picture(Path(path), str(path))
    except RefusedError:
        return None


def _on(event: Any, function: Callable[..., Any], inputs: list[Any], outputs: list[Any], **options: Any) -> Any:
    return event(_told(function), inputs, outputs, api_visibility="private", **options)


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what goes wrong told to the visitor in a few words, and to the terminal at length."""

    @functools.wraps(function)
    def handler(*args: Any) -> Any:
        try:
            return function(*args)
        except RefusedError as refusal:
            raise _told_error(both(refusal.key, **refusal.values), refusal.reason) from refusal
        except (CheckpointError, ImportError, RecipeError) as error:
            raise _told_error(both("cannot"), str(error)) from error
        except Exception as error:
            traceback.print_exc()
            raise _told_error(both("failed")) from error

    return handler


def _told_error(message: str, reason: str = "") -> gr.Error:
    """What the visitor reads: HTML, and below it plain text."""
    more = f"<br><small>{escape(reason)}</small>" if reason else ""
    return gr.Error(message + more, title="VMamba", print_exception=False)


def serve(page: Page, host: str = "127.0.0.1", port: int | None = None, opens: bool = False, block: bool = True) -> str:
    """Serve the page until the process ends; without `block`, until `page.blocks.close()`.

    Args:
        page: what to serve.
        host: address to listen on; "0.0.0.0" lets in all who reach this machine.
        port: None for the first free one from 7860 on.
        opens: whether to open the page in the browser, where there is a screen.
        block: whether to wait here for the end.

    Returns:
        The page's address.

    Raises:
        RecipeError: nothing can listen there.
    """
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", font=_FONTS, font_mono=["ui-monospace", "monospace"]
    )
    has_screen = sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    try:
        _, address, _ = page.blocks.queue(max_size=64).launch(
            server_name=host, server_port=port, inbrowser=opens and has_screen, prevent_thread_lock=True, quiet=True,
            share=False, footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False,
            mcp_server=False, allowed_paths=[], blocked_paths=[Path.cwd().anchor], state_session_capacity=_VISITORS,
            app_kwargs={"middleware": [Middleware(Guard)], "docs_url": None, "redoc_url": None, "openapi_url": None},
            theme=theme, head=f"<style>{(_HERE / 'page.css').read_text()}</style>",
        )  # fmt: skip
    except OSError as error:
        raise RecipeError(f"nothing can listen on port {port or 'from 7860 on'} of {host}: {error}") from error
    report(f"the page is at {address} (Ctrl+C ends it)")
    if block:
        page.blocks.block_thread()
    return str(address)
