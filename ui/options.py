"""The search options below each query: one component for each field of `Choices`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from clipsys.retrieval.storage.sorting import SORT_COLUMNS
from clipsys.ui.service import MAX_HITS, SearchService

_DEFAULT_HITS = 24
#: With more metadata keys than this, the list of them can be typed into.
_MANY_KEYS = 12


def search_options(service: SearchService) -> list[Any]:
    """Makes a component for each field of `Choices`, in their order."""
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
