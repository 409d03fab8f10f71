"""The heading of the page, and the tab with the facts about the collection and its failures."""

from __future__ import annotations

import html

import gradio as gr

from clipsys.ui.markup import two_columns
from clipsys.ui.service import SearchService

_MAX_FAILURES = 200


def title(service: SearchService) -> str:
    """The heading: name of the collection, number of images, model."""
    info = service.info()
    name = html.escape(info.path.name)
    return f"# {name}\n{info.num_items:,} images · {html.escape(info.model_name)}"


def about_tab(service: SearchService, tab: gr.Tab) -> None:
    """Fills the tab with the facts, which are read again whenever the tab is opened."""
    facts = gr.Markdown(_facts(service), elem_classes="about")
    tab.select(
        lambda: _facts(service),
        outputs=facts,
        api_visibility="private",
        show_progress="hidden",
    )


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
    return two_columns(rows.items()) + _failures(service, info.num_failures)


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
    return heading + two_columns((failure.reason, failure.message) for failure in failures)
