"""The page, by Gradio, and its server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ..errors import SteerError
from ..evaluation.methods import methods
from ..models.embedded import NAMES
from . import views
from .options import Options
from .session import Ended, Moment, Session
from .shelf import Shelf

FIRST = {
    "emoji": ("a red heart", "clip-emoji"),
    "digits": ("", "digit:3"),
    "digits-flow": ("", "digit:3"),
    "letters": ("", "letters:e"),
}
"""For each embedded model, the prompt and the reward that the page begins with."""
_REWARDS = ("clip-emoji", "digit:3", "digit:even", "letters:e", "ink", "symmetry", "saturation", "sharpness", "jpeg")


def gradio() -> Any:
    """The module gradio, told to send nothing anywhere.

    Raises:
        SteerError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported, and later
    try:
        import gradio
    except ImportError as error:
        raise SteerError(
            f"the playground needs the package gradio, which cannot be imported ({error}); install it with: "
            "pip install 'steer-diffusion[play]'"
        ) from error
    return gradio


def launch(model: str, *, host: str = "127.0.0.1", port: int = 7860, browser: bool = True, device: str = "cpu") -> Any:
    """Serves the page in threads, and returns gradio's Blocks, whose `local_url` is its address; `close()` ends it.

    Args:
        model: what the page begins with.
        host: address to listen on. Whoever reaches the page can open models and rewards of this machine.
        port: to listen on.
        browser: whether to open the page in one.
        device: of the models.

    Raises:
        SteerError: gradio is not installed.
        OSError: the port is taken.
    """
    gr, page = gradio(), build(model, Shelf(device))
    page.queue(default_concurrency_limit=None)  # visitors wait for their turn at the model, and not for a run's end
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Base(**fonts).set(block_info_text_color="*neutral_600"),  # fonts of the system: none is fetched
        css=views.STYLE,
    )
    return page


def build(model: str, shelf: Shelf) -> Any:
    """The page as gradio's Blocks."""
    gr = gradio()
    prompt, reward = FIRST.get(model, ("", ""))
    with gr.Blocks(title="steer playground", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        session = gr.State(None, delete_callback=lambda session: session and session.close())
        gr.Markdown("# steer playground")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                models = list(dict.fromkeys([model, *NAMES]))
                form = [
                    gr.Dropdown(models, value=model, allow_custom_value=True, label="Model", elem_id="model"),
                    gr.Textbox(
                        prompt, label="Prompt", elem_id="prompt", info="Of models that take one, such as emoji."
                    ),
                    gr.Textbox("", label="Label", elem_id="label", info="Of digits: 0 to 9; empty for any."),
                    gr.Dropdown(
                        list(_REWARDS), value=reward, allow_custom_value=True, label="Reward", elem_id="reward"
                    ),
                    gr.Dropdown(list(methods()), value="smc", label="Method", elem_id="method"),
                    gr.Number(2000, precision=0, label="Budget", elem_id="budget", info="Network rows to spend."),
                    gr.Textbox("auto", label="Temperature", elem_id="temperature", info="A positive number, or auto."),
                    gr.Number(0, precision=0, label="Seed", elem_id="seed"),
                ]
                with gr.Row():
                    run = gr.Button("Run", variant="primary", interactive=False, elem_id="run", min_width=100)
                    stop = gr.Button("Stop and keep", interactive=False, elem_id="stop", min_width=100)
            with gr.Column(scale=2, min_width=300):
                status = gr.HTML(elem_id="status")
                pictures = gr.HTML(elem_id="samples")
                with gr.Accordion("Genealogy of the particles"):
                    drawn = gr.HTML(elem_id="lineage")
                with gr.Row():
                    report = gr.DownloadButton("Report", interactive=False, elem_id="report", min_width=100)
                    archive = gr.DownloadButton("Saved run (zip)", interactive=False, elem_id="archive", min_width=100)
                with gr.Accordion("The same run as Python, and as a command"):
                    python = gr.Code(language="python", lines=1, label="Python", interactive=False, elem_id="python")
                    command = gr.Code(
                        language="shell",
                        max_lines=6,
                        lines=1,
                        label="Command",
                        interactive=False,
                        wrap_lines=True,
                        elem_id="command",
                    )
        shown = [status, pictures, drawn, python, command, report, archive, run, stop]
        page.load(lambda: (Session(shelf), gr.update(interactive=True)), None, [session, run], show_progress="hidden")
        form[0].input(_first, form[0], [form[1], form[3]], show_progress="hidden")

        def running(own: Session, *values: Any) -> Iterator[tuple[Any, ...]]:
            yield from _running(gr, own, *values)

        run.click(running, [session, *form], shown, show_progress="hidden", api_visibility="private")
        stop.click(lambda own: own.stop(), session, None, show_progress="hidden", api_visibility="private")
    return page


def _first(model: str) -> tuple[str, str]:
    """Prompt and reward to begin with, when another model is chosen."""
    return FIRST.get(model, ("", ""))


def _running(gr: Any, session: Session, *values: Any) -> Iterator[tuple[Any, ...]]:
    """What the page shows of a run, moment by moment: status, samples, genealogy, code, files, buttons."""
    same, off, on = gr.skip(), gr.update(interactive=False), gr.update(interactive=True)
    try:
        options = Options.read(*values, device=session.shelf.device)
        text = (options.python(), options.command())
        yield (views.waiting(), "", "", *text, off, off, off, on)
        for seen in session.run(options):
            if isinstance(seen, Moment):
                parts = (views.status(seen), views.samples(seen.samples), views.lineage(seen.lineage))
                yield (*parts, *[same] * 6)
            else:
                yield (*_end(gr, seen), on, off)
    except SteerError as error:
        yield (views.error(str(error)), *[same] * 6, on, off)


def _end(gr: Any, seen: Ended) -> tuple[Any, ...]:
    """Status, samples, genealogy, code and files of a run that is over."""
    if seen.result is None:
        return (views.status(seen), "", "", *[gr.skip()] * 4)
    files = [gr.update(value=str(path), interactive=True) for path in (seen.report, seen.archive)]
    parts = (views.status(seen), views.samples(seen.samples), views.lineage(seen.lineage))
    return (*parts, gr.skip(), gr.skip(), *files)
