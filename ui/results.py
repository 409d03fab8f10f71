"""The panel of results: a gallery, and beside it the chosen image with what is known of it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from clipsys.printing import printable
from clipsys.retrieval import Item
from clipsys.ui.markup import show_errors, two_columns
from clipsys.ui.service import Answer, Card, Choices, SearchService

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


def results_panel(
    service: SearchService, options: list[Any], *, first: Sequence[Card] = ()
) -> ResultsPanel:
    """Makes the panel of a tab.

    Args:
        service: answers "More like this".
        options: components of `search_options`, which hold for that search too.
        first: images that are shown before the first search.
    """
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

    @show_errors
    def more_like(item: int, *options: Any) -> list[Any]:
        answer = service.search(item=item, choices=Choices(*options))
        return shown_answer(answer, f"like “{_name(service.collection.item(item))}”")

    similar.click(
        more_like,
        [panel.chosen, *options],
        panel.outputs,
        api_visibility="private",
        show_progress_on=[gallery],
    )
    return panel


def shown_answer(answer: Answer, sought: str) -> list[Any]:
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
    return f"<div class='captions'>{captions}</div>{two_columns(rows.items())}"


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
