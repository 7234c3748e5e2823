"""The page of `concat-ensemble app`, made with Gradio.

A Space on the Hub runs a copy of this file without the package, so it imports nothing of the package.

Names of classes and members come from strangers' files: `escape` writes them as text wherever they are shown.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

SHOWN_CLASSES = 5
MAX_UPLOAD = "200mb"
# A character that means something in HTML, or in the templates that Gradio makes of the text of `gr.HTML`.
TEMPLATE_SIGNS = {ord(sign): f"&#{ord(sign)};" for sign in "$`\\{}"}
CSS = """
.ce-head, .ce-cards { --ce-quiet: color-mix(in srgb, var(--body-text-color) 68%, transparent); }
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.ce-head h1 { font-size: 1.5rem; font-weight: 650; margin: .25rem 0 .25rem; overflow-wrap: anywhere; }
.ce-head p { margin: .15rem 0; color: var(--ce-quiet); overflow-wrap: anywhere; }
.ce-cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.ce-card { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: 1rem;
  background: var(--block-background-fill); min-width: 0; }
.ce-card.ce-first { grid-column: 1 / -1; border-color: var(--color-accent); }
.ce-card h2 { font-size: 1rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
.ce-card .ce-detail { color: var(--ce-quiet); font-size: .8125rem; margin: 0; overflow-wrap: anywhere; }
.ce-classes { list-style: none; margin: .75rem 0 0; padding: 0; }
.ce-classes li { display: grid; grid-template-columns: minmax(0, 1fr) auto; column-gap: .75rem; padding: .2rem 0;
  font-size: .9375rem; margin: 0; }
.ce-classes .ce-name { overflow-wrap: anywhere; }
.ce-classes .ce-share { font-variant-numeric: tabular-nums; color: var(--ce-quiet); }
.ce-classes .ce-bar { grid-column: 1 / -1; height: .375rem; border-radius: 1rem; margin-top: .2rem;
  background: var(--border-color-primary); overflow: hidden; }
.ce-classes .ce-bar span { display: block; height: 100%; background: var(--color-accent); opacity: .55; }
.ce-classes li:first-child { font-weight: 650; }
.ce-classes li:first-child .ce-share { color: inherit; }
.ce-classes li:first-child .ce-bar span { opacity: 1; }
.ce-card h3 { font-size: .8125rem; font-weight: 600; margin: 1rem 0 .4rem; color: var(--ce-quiet); }
.ce-nearest { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem;
  grid-template-columns: repeat(5, minmax(0, 1fr)); }
.ce-nearest li { margin: 0; font-size: .75rem; line-height: 1.3; min-width: 0; overflow-wrap: anywhere; }
.ce-nearest img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: var(--radius-sm); margin: 0 0 .2rem;
  background: var(--border-color-primary); }
.ce-nearest .ce-cosine { color: var(--ce-quiet); font-variant-numeric: tabular-nums; }
.ce-first .ce-nearest { max-width: 34rem; }
.ce-hint { color: var(--body-text-color); border: 1px dashed var(--border-color-primary); padding: 1rem;
  border-radius: var(--radius-lg); }
.ce-error { border: 1px solid var(--error-border-color); background: var(--error-background-fill);
  color: var(--error-text-color); border-radius: var(--radius-lg); padding: 1rem; overflow-wrap: anywhere; }
.ce-report { width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); background: #fff;
  border-radius: var(--radius-lg); }
"""


class Neighbor(NamedTuple):
    """A training image that is near to the image of the question."""

    label: str
    cosine: float
    image: str | None  # a data URI; None if the image cannot be read


class Opinion(NamedTuple):
    """What the ensemble, or one of its members alone, says of an image."""

    name: str
    detail: str
    classes: list[tuple[str, float]]  # names with probabilities, the most probable first
    neighbors: list[Neighbor] = []  # noqa: RUF012 (a tuple's default, which nobody changes)


def build_page(
    answer: Callable[[str], Sequence[Opinion]], *, title: str, notes: Sequence[str] = (), report: str | None = None
) -> Any:
    """A `gradio.Blocks` on which an image is dropped and opinions are read.

    Args:
        answer: Called with the path of an image; the ensemble's opinion comes first. ValueError for an image that
            cannot be read; its message is shown.
        title, notes: The heading, and sentences below it.
        report: An HTML page of results, for a tab of its own.
    """
    import gradio as gr

    def respond(path: str | None) -> tuple[str, Any]:
        if path is None:
            return HINT, None
        try:
            opinions = answer(path)
        except ValueError as error:
            return f'<p class="ce-error" role="alert">{escape(error)}</p>', {"error": str(error)}
        return render_opinions(opinions), [to_json(opinion) for opinion in opinions]

    def show_image() -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                photo = _photo(gr)
            with gr.Column(scale=5, min_width=280):
                shown = gr.HTML(HINT)
        numbers = gr.JSON(visible=False, label="opinions")
        photo.change(respond, photo, [shown, numbers], api_name="predict", show_progress="minimal")

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.HTML(_render_head(title, notes))
        if report is None:
            show_image()
        else:
            with gr.Tab("An image"):
                show_image()
            with gr.Tab("Results"):
                gr.HTML(_render_report(report))
    return page


def page_settings() -> dict[str, Any]:
    """Arguments of `launch` and `mount_gradio_app`: fonts of the system, so that none is loaded from elsewhere."""
    import gradio as gr

    fonts = gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")
    mono = gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")
    return {
        "theme": gr.themes.Default(font=fonts, font_mono=mono),
        "css": CSS,
        "max_file_size": MAX_UPLOAD,
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
    }


def escape(text: object) -> str:
    """Text for HTML, without what could control the direction of the text around it."""
    shown = "".join(sign if sign.isprintable() else " " for sign in str(text))
    return html.escape(shown).translate(TEMPLATE_SIGNS)


def render_opinions(opinions: Sequence[Opinion]) -> str:
    """A card for each opinion."""
    cards = [_render_card(opinion, is_first=number == 0) for number, opinion in enumerate(opinions)]
    return f'<div class="ce-cards">{"".join(cards)}</div>'


def to_json(opinion: Opinion) -> dict[str, Any]:
    """An opinion for programs: classes as in transformers' pipelines."""
    return {
        "name": opinion.name,
        "detail": opinion.detail,
        "classes": [{"label": label, "score": score} for label, score in opinion.classes],
        "nearest": [{"label": each.label, "cosine": each.cosine} for each in opinion.neighbors],
    }


HINT = '<p class="ce-hint">Drop a photograph on the left or above, or click there to choose one.</p>'


def _render_head(title: str, notes: Sequence[str]) -> str:
    return f'<div class="ce-head"><h1>{escape(title)}</h1>{"".join(f"<p>{escape(note)}</p>" for note in notes)}</div>'


def _render_card(opinion: Opinion, *, is_first: bool) -> str:
    rows = "".join(_render_class(*pair) for pair in opinion.classes[:SHOWN_CLASSES])
    nearest = "".join(map(_render_neighbor, opinion.neighbors))
    parts = [f"<h2>{escape(opinion.name)}</h2>", f'<p class="ce-detail">{escape(opinion.detail)}</p>']
    parts += [f'<ol class="ce-classes">{rows}</ol>'] if rows else []
    parts += [f'<h3>Nearest training images</h3><ul class="ce-nearest">{nearest}</ul>'] if nearest else []
    return f'<section class="ce-card{" ce-first" * is_first}">{"".join(parts)}</section>'


def _render_class(name: str, share: float) -> str:
    bar = f'<span class="ce-bar"><span style="width: {100 * share:.1f}%"></span></span>'
    shown = f"{100 * share:.1f}%"
    return f'<li><span class="ce-name">{escape(name)}</span><span class="ce-share">{shown}</span>{bar}</li>'


def _render_neighbor(neighbor: Neighbor) -> str:
    image = f'<img src="{neighbor.image}" alt="">' if neighbor.image else ""
    cosine = f'<span class="ce-cosine" title="cosine of the features">{neighbor.cosine:.2f}</span>'
    return f"<li>{image}{escape(neighbor.label)} {cosine}</li>"


def _render_report(report: str) -> str:
    """The page in a frame of its own, in which only its own script runs and which reaches nothing of this page."""
    source = html.escape(report).translate(TEMPLATE_SIGNS)
    return f'<iframe class="ce-report" title="Results" sandbox="allow-scripts" srcdoc="{source}"></iframe>'


def _photo(gr: Any) -> Any:
    """The place for an image. Its file is handed over as it was uploaded: Gradio would decode it first, without the
    bounds of the ensemble's own image processor. (A subclass would have Gradio write a .pyi beside this file.)"""
    photo = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=320)
    photo.preprocess = lambda payload: None if payload is None else payload.path
    return photo
