"""The page: its tabs, and what happens when they are used.

    app ------+-> options   the search options of a query
              +-> results   the gallery of an answer, and details of the chosen image
              +-> about     facts about the collection
    all of them -> markup   tables, error messages;   service: does all the work

Two of the tabs end in the same panel of results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr

from clipsys.retrieval import Collection
from clipsys.ui.about import about_tab, title
from clipsys.ui.markup import show_errors
from clipsys.ui.options import search_options
from clipsys.ui.results import results_panel, shown_answer
from clipsys.ui.service import DEFAULT_TEMPLATE, Choices, SearchService

#: What Gradio hands on for an image when it does not process it: a description of the file.
Upload: TypeAlias = dict[str, Any] | None


def build_app(collection: Collection) -> gr.Blocks:
    """Builds the page for an open collection."""
    service = SearchService(collection)
    # Thumbnails are served from where they are, instead of being copied at each answer. This opens
    # the thumbnails' folder and nothing else.
    gr.set_static_paths([service.thumbnails.folder])
    with gr.Blocks(title=f"{collection.path.name} · clipsys", analytics_enabled=False) as blocks:
        gr.Markdown(title(service), elem_id="title")
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Search"):
                _text_tab(service)
            with gr.Tab("By image"):
                _image_tab(service)
            with gr.Tab("Classify"):
                _classify_tab(service)
            with gr.Tab("About") as about:
                about_tab(service, about)
    blocks.queue(default_concurrency_limit=4)
    return blocks


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
    options = search_options(service)
    panel = results_panel(service, options, first=service.browse())

    @show_errors
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
        return shown_answer(answer, f"for “{sought}”" if sought else "")

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
            options = search_options(service)
            button = gr.Button("Search", variant="primary", elem_id="search-image")
    panel = results_panel(service, options)

    @show_errors
    def search(image: Upload, text: str, *options: Any) -> list[Any]:
        path = _uploaded(image)
        answer = service.search(text=text, image=path, choices=Choices(*options))
        words = f" and “{text.strip()}”" if text.strip() else ""
        return shown_answer(answer, f"for your image{words}")

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

    @show_errors
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


def _upload(label: str) -> gr.Image:
    return gr.Image(
        label=label, type="filepath", sources=["upload", "clipboard"], buttons=[], height=300
    )


def _uploaded(image: Upload) -> Path:
    """The path of an uploaded file that has not been opened yet.

    The events that take one have ``preprocess=False``: Gradio would open the file first, so that a
    file that is no image, or a decompression bomb, would fail inside Gradio before our decoder can
    name the fault. Gradio checks in any case that the path is one of its own uploads (a test tries
    another path).
    """
    path = image.get("path") if image else None
    if not path:
        raise gr.Error("Choose an image first.", print_exception=False)
    return Path(str(path))
