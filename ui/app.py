"""The page: tabs, inputs, results, and what happens between them.

Two of the tabs end in the same panel of results (`ResultsPanel`): a gallery, and beside it the
chosen picture with what is known of it. All work is done by `SearchService`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

import gradio as gr

from clipsys.errors import ClipsysError
from clipsys.printing import printable
from clipsys.retrieval import Collection, Item
from clipsys.retrieval.storage.sorting import SORT_COLUMNS
from clipsys.ui.service import DEFAULT_TEMPLATE, MAX_HITS, Answer, Card, Choices, SearchService

#: What Gradio hands on for an image when it does not process it: a description of the file.
Upload: TypeAlias = dict[str, Any] | None

P = ParamSpec("P")
R = TypeVar("R")

_DEFAULT_HITS = 24
_MAX_FAILURES = 200
#: With more metadata keys than this, the list of them can be typed into.
_MANY_KEYS = 12
# On a phone the details stand above the grid: bring them into view.
_SHOW_DETAILS = (
    "() => { document.querySelector('.details:not(.hide)')?.scrollIntoView({block: 'nearest'}) }"
)


@dataclass(frozen=True)
class ResultsPanel:
    """The components that show an answer."""

    status: gr.Markdown
    gallery: gr.Gallery
    details: gr.Column
    picture: gr.Image
    facts: gr.Markdown
    similar: gr.Button
    cards: gr.State
    chosen: gr.State

    @property
    def outputs(self) -> list[Any]:
        """What a search fills in."""
        return [self.status, self.gallery, self.details, self.cards, self.chosen]


def build_app(collection: Collection) -> gr.Blocks:
    """Builds the page for an open collection."""
    service = SearchService(collection)
    # Thumbnails are served from where they are, instead of being copied at each answer. This opens
    # the thumbnails' folder and nothing else.
    gr.set_static_paths([service.thumbnails.folder])
    with gr.Blocks(title=f"{collection.path.name} · clipsys", analytics_enabled=False) as blocks:
        gr.Markdown(_title(service), elem_id="title")
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Search"):
                _text_tab(service)
            with gr.Tab("By image"):
                _image_tab(service)
            with gr.Tab("Classify"):
                _classify_tab(service)
            with gr.Tab("About") as about:
                _about_tab(service, about)
    blocks.queue(default_concurrency_limit=4)
    return blocks


def _title(service: SearchService) -> str:
    info = service.info()
    name = html.escape(info.path.name)
    return f"# {name}\n{info.num_items:,} images · {html.escape(info.model_name)}"


# ---- tabs --------------------------------------------------------------------------------------


def _text_tab(service: SearchService) -> None:
    with gr.Row(elem_classes="query"):
        text = gr.Textbox(
            value="",
            placeholder="What are you looking for?  a dog + beach - snow",
            show_label=False,
            container=False,
            autofocus=True,
            max_lines=1,
            scale=1,
            elem_id="query-text",
        )
        button = gr.Button("Search", variant="primary", elem_id="search-text")
    examples = gr.Dataset(
        components=[text],
        samples=[[example] for example in service.examples()],
        show_label=False,
        elem_classes="chips",
    )
    options = _options(service)
    panel = _results_panel(service, options, first=service.browse())

    @_friendly
    def search(
        text: str,
        k: int,
        negative: str,
        where: str,
        words: str = "",
        relevant_only: bool = False,
        diverse: bool = False,
        sort: str = "",
        descending: bool = False,
    ) -> list[Any]:
        choices = Choices(k, negative, where, words, relevant_only, diverse, sort or "", descending)
        answer = service.search(text=text, choices=choices)
        sought = text.strip() or words.strip() or where.strip()
        return _shown(answer, f"for “{sought}”" if sought else "")

    inputs = [text, *options]
    gr.on(
        [text.submit, button.click],
        search,
        inputs,
        panel.outputs,
        api_name="search",
        show_progress_on=[panel.gallery],
    )
    examples.click(
        lambda sample: sample[0], examples, text, api_visibility="private", show_progress="hidden"
    ).then(search, inputs, panel.outputs, api_visibility="private")


def _image_tab(service: SearchService) -> None:
    with gr.Row(equal_height=False):
        image = _upload("An image to look for")
        with gr.Column():
            text = gr.Textbox(
                value="",
                label="And in words (optional)",
                placeholder="the same, but at night",
                max_lines=1,
                elem_id="image-text",
            )
            options = _options(service)
            button = gr.Button("Search", variant="primary", elem_id="search-image")
    panel = _results_panel(service, options)

    @_friendly
    def search(image: Upload, text: str, *options: Any) -> list[Any]:
        path = _uploaded(image)
        answer = service.search(text=text, image=path, choices=Choices(*options))
        words = f" and “{text.strip()}”" if text.strip() else ""
        return _shown(answer, f"for your image{words}")

    inputs = [image, text, *options]
    gr.on(
        [button.click, text.submit, image.upload],
        search,
        inputs,
        panel.outputs,
        preprocess=False,
        api_name="search_by_image",
        show_progress_on=[panel.gallery],
    )


def _classify_tab(service: SearchService) -> None:
    with gr.Row(equal_height=False):
        image = _upload("An image to classify")
        with gr.Column():
            labels = gr.Textbox(
                value=service.label_examples(),
                label="Labels, separated by commas",
                lines=2,
                elem_id="labels",
            )
            template = gr.Textbox(
                value=DEFAULT_TEMPLATE,
                label="Sentence around each label",
                max_lines=1,
            )
            button = gr.Button("Classify", variant="primary", elem_id="classify")
            result = gr.Label(label="Probability", num_top_classes=8, elem_id="probabilities")

    @_friendly
    def classify(image: Upload, labels: str, template: str) -> dict[str, float]:
        return service.classify(_uploaded(image), labels, template)

    gr.on(
        [button.click, image.upload],
        classify,
        [image, labels, template],
        result,
        preprocess=False,
        api_name="classify",
        show_progress_on=[result],
    )


def _about_tab(service: SearchService, tab: gr.Tab) -> None:
    facts = gr.Markdown(_facts(service), elem_classes="about")
    tab.select(
        lambda: _facts(service),
        outputs=facts,
        api_visibility="private",
        show_progress="hidden",
    )


def _upload(label: str) -> gr.Image:
    return gr.Image(
        label=label, type="filepath", sources=["upload", "clipboard"], buttons=[], height=300
    )


def _uploaded(image: Upload) -> Path:
    """The path of an uploaded file, which nobody has opened yet.

    The events that take one say ``preprocess=False``: Gradio would open it first, so that a file
    that is no image, or a bomb, would fail inside Gradio before our decoder can say what is wrong
    with it. That the path is one of its own uploads Gradio checks in any case (a test tries).
    """
    path = image.get("path") if image else None
    if not path:
        raise gr.Error("Choose an image first.", print_exception=False)
    return Path(str(path))


def _options(service: SearchService) -> list[Any]:
    """Components for the fields of `Choices`, in their order."""
    keys = service.metadata_keys
    with gr.Accordion("Options", open=False):
        k = gr.Slider(1, MAX_HITS, value=_DEFAULT_HITS, step=1, label="Number of images")
        with gr.Row():
            negative = gr.Textbox(
                value="",
                label="Not like",
                placeholder="snow",
                info="What the images should be unlike",
                max_lines=1,
            )
            where = gr.Textbox(
                value="",
                label="Filter",
                placeholder=f"{keys[0]}=…" if keys else "year>=2020; colour=red",
                info=f"Metadata: {', '.join(keys[:8])}" if keys else "There is no metadata here",
                elem_classes="filter",
                max_lines=1,
            )
            words = gr.Textbox(
                value="",
                label="Words",
                placeholder='dog -brown "on the beach"',
                info="Of captions and file names; -word must not occur",
                max_lines=1,
                elem_classes="caption-words",
            )
        with gr.Row():
            relevant_only = gr.Checkbox(False, label="Relevant only", elem_classes="relevant-only")
            diverse = gr.Checkbox(False, label="Fold near-duplicates", elem_classes="diverse")
            sort = gr.Dropdown(
                [("Best first", ""), *((key, key) for key in [*keys, *SORT_COLUMNS])],
                value="",
                label="Order",
                filterable=len(keys) > _MANY_KEYS,
                elem_classes="sort",
            )
            descending = gr.Checkbox(False, label="Descending", elem_classes="descending")
    return [k, negative, where, words, relevant_only, diverse, sort, descending]


# ---- results -----------------------------------------------------------------------------------


def _results_panel(
    service: SearchService, options: list[Any], *, first: Sequence[Card] = ()
) -> ResultsPanel:
    greeting = "A look around" if first else ""
    status = gr.Markdown(greeting, elem_classes="status", min_height=32)
    with gr.Row(elem_classes="found", equal_height=False):
        gallery = gr.Gallery(
            value=[(str(card.thumbnail), _label(card)) for card in first],
            show_label=False,
            container=False,
            allow_preview=False,
            object_fit="cover",
            buttons=[],
            interactive=False,
            elem_classes="results",
            scale=3,
            visible=bool(first),
        )
        with gr.Column(visible=False, scale=1, min_width=280, elem_classes="details") as details:
            picture = gr.Image(
                show_label=False, container=False, interactive=False, buttons=[], type="filepath"
            )
            similar = gr.Button("More like this", size="sm", elem_classes="similar")
            facts = gr.Markdown(elem_classes="hit-facts")
    panel = ResultsPanel(
        status, gallery, details, picture, facts, similar, gr.State(list(first)), gr.State(None)
    )

    def choose(cards: list[Card], event: gr.SelectData) -> list[Any]:
        card = cards[event.index]
        return [gr.update(visible=True), card.thumbnail, _item_facts(card), card.item.id]

    gallery.select(
        choose,
        [panel.cards],
        [details, picture, facts, panel.chosen],
        api_visibility="private",
        show_progress="hidden",
    ).then(None, js=_SHOW_DETAILS)

    @_friendly
    def more_like(item: int, *options: Any) -> list[Any]:
        answer = service.search(item=item, choices=Choices(*options))
        return _shown(answer, f"like “{_name(service.collection.item(item))}”")

    similar.click(
        more_like,
        [panel.chosen, *options],
        panel.outputs,
        api_visibility="private",
        show_progress_on=[gallery],
    )
    return panel


def _shown(answer: Answer, sought: str) -> list[Any]:
    """Values for `ResultsPanel.outputs`; closes the details of the previous answer.

    ``sought`` follows the number of images: ``for “a dog”``.
    """
    note = html.escape(printable(answer.note)) if answer.note else ""
    if answer.cards:
        number = f"{len(answer.cards)} image{'s' if len(answer.cards) != 1 else ''}"
        status = f"{number} {html.escape(sought)}".rstrip() + f" · {answer.seconds * 1000:.0f} ms"
        status += f" · {note}" if note else ""
    else:
        status = f"Nothing {html.escape(sought)}".rstrip() + f": {note or 'no image has it'}"
    return [status, _pictures(answer.cards), gr.update(visible=False), list(answer.cards), None]


def _pictures(cards: Sequence[Card]) -> gr.Gallery:
    pictures = [(str(card.thumbnail), _label(card)) for card in cards]
    return gr.Gallery(value=pictures, selected_index=None, visible=bool(cards))


def _label(card: Card) -> str:
    name = _name(card.item)
    if card.hit is None or card.hit.score is None:
        return name
    more = f" · and {len(card.hit.duplicates)} like it" if card.hit.duplicates else ""
    return f"{card.hit.score:.3f} · {name}{more}"


def _name(item: Item) -> str:
    return item.caption or Path(item.uri.rpartition("#")[2] or item.uri).name


def _item_facts(card: Card) -> str:
    item = card.item
    rows: dict[str, str] = {}
    if card.hit is not None and card.hit.score is not None:
        rows["score"] = f"{card.hit.score:.4f}"
    if card.hit is not None and card.hit.relevance is not None:
        by_chance = 10.0**-card.hit.relevance
        rows["relevance"] = f"{card.hit.relevance:+.1f}"
        rows["by chance"] = f"{by_chance:.2g} unrelated images would score as high"
    rows |= {str(key): _as_text(value) for key, value in item.metadata.items()}
    rows |= {"file": item.uri, "id": str(item.id)}
    captions = "".join(f"<p>{html.escape(caption)}</p>" for caption in item.captions)
    return f"<div class='captions'>{captions}</div>{_two_columns(rows.items())}"


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _facts(service: SearchService) -> str:
    info = service.info()
    index = _index_facts(service, info.num_indexed)
    rows = {
        "Images": f"{info.num_items:,}",
        "Model": info.model_name,
        "Model from": info.model,
        "Fingerprint": info.fingerprint[:16],
        "Vectors": f"{info.dim} numbers each",
        "Index": index,
        "Folder": str(info.path),
        "Size": f"{info.size_bytes / 1e6:,.1f} MB",
        "Made": info.created_at,
    }
    return _two_columns(rows.items()) + _failures(service, info.num_failures)


def _index_facts(service: SearchService, num_indexed: int) -> str:
    index = service.collection.index
    if index is None:
        return "none yet; every image is compared"
    effort = index.effort
    recall = (
        "exact"
        if effort is None
        else "recall@10 "
        + ", ".join(f"{value:.3f} ({kind} queries)" for kind, value in effort.recall.items())
    )
    return (
        f"{index.kind}, {recall}, generation {index.generation}, covers {num_indexed:,} images; "
        "newer ones are searched beside it"
    )


def _failures(service: SearchService, number: int) -> str:
    if number == 0:
        return ""
    failures = service.failures(_MAX_FAILURES)
    shown = f", the first {len(failures)}" if len(failures) < number else ""
    heading = f"<h3>Files that could not be used ({number:,}{shown})</h3>"
    return heading + _two_columns((failure.reason, failure.message) for failure in failures)


def _two_columns(rows: Iterable[tuple[str, str]]) -> str:
    # Captions, metadata and names come from files: nothing in them may become markup.
    cells = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in rows
    )
    return f"<table class='facts'>{cells}</table>"


def _friendly(function: Callable[P, R]) -> Callable[P, R]:
    """Shows a `ClipsysError` as one line on the page; anything else is a bug and is logged."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ClipsysError as error:
            # The page shows messages as HTML.
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return wrapped
