"""Theme and style sheet. System fonts only: the app must look the same without a network."""

from __future__ import annotations

import gradio as gr

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
_MONOSPACED = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """A quiet theme: one accent colour, flat surfaces, thin lines."""
    made: gr.themes.Base = gr.themes.Default(
        primary_hue=gr.themes.colors.indigo,
        secondary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=_FONT,
        font_mono=_MONOSPACED,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_shadow="none",
        block_label_background_fill="*background_fill_primary",
        block_label_border_width="0px",
        block_label_text_color="*neutral_500",
        block_title_text_color="*neutral_500",
        block_title_text_weight="500",
        input_background_fill="white",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
    )
    return made


CSS = """
/* Full width up to a limit, whatever the tab holds: Gradio's container shrinks to its content. */
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important; }
.gradio-container .app {
  box-sizing: border-box; width: 100%; padding: 1rem clamp(0.75rem, 3vw, 2rem) !important;
}
#title h1 { font-size: 1.35rem; margin: 0; letter-spacing: -0.01em; }
#title p { margin: 0.1rem 0 0; color: var(--body-text-color-subdued); }

/* The query line: the button is as high as the text field and never wraps. */
.query { align-items: stretch; flex-wrap: nowrap !important; gap: 0.5rem; }
.query button { flex: 0 0 auto !important; min-width: 6.5rem !important; }
.query textarea, .query input {
  font-size: 1.05rem !important; border: 1px solid var(--input-border-color) !important;
}
.chips { min-width: 0; }
.chips .gallery { flex-wrap: nowrap; overflow-x: auto; scrollbar-width: none; }
.chips button {
  border-radius: 999px !important; font-size: 0.875rem; white-space: nowrap; flex: 0 0 auto;
}
.status p { color: var(--body-text-color-subdued); margin: 0.25rem 0; }

/* A message says what went wrong; Gradio's red badge on each output besides says no more. */
.wrap:has(> span.error) { display: none !important; }

/* Results: as many square columns as fit. */
.results { background: transparent; }
.results .grid-wrap { overflow: visible !important; max-height: none !important; padding: 3px; }
.results .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)) !important;
  grid-template-rows: none !important; gap: 0.75rem !important;
}
.results .thumbnail-item {
  border: 0 !important; border-radius: var(--radius-lg) !important; box-shadow: none !important;
  aspect-ratio: 1 / 1; width: 100%; background: var(--neutral-100); overflow: hidden;
}
.dark .results .thumbnail-item { background: var(--neutral-800); }
.results .thumbnail-item:hover { outline: 3px solid var(--primary-300); }
.results .thumbnail-item.selected { outline: 3px solid var(--primary-600); }
.results .caption-label {
  left: 0.35rem; bottom: 0.35rem; max-width: calc(100% - 0.7rem); border: 0 !important;
  background: rgba(15, 23, 42, 0.72) !important; color: white !important; opacity: 1 !important;
  border-radius: var(--radius-md) !important; padding: 0.1rem 0.45rem !important;
  font-size: 0.78rem !important; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
}

.details { position: sticky; top: 0.75rem; align-self: flex-start; }
.details img { border-radius: var(--radius-lg); max-height: 340px; object-fit: contain; }
.details .icon-button-wrapper { display: none !important; }
.details .image-container { background: transparent; }

.captions p:first-child { font-weight: 600; }
.captions p { margin: 0.15rem 0; }

/* Facts: a plain list of two columns, without a grid of lines. */
table.facts { width: 100%; border-collapse: collapse; border: 0 !important; margin: 0.5rem 0; }
table.facts tr { border: 0 !important; }
table.facts tr + tr { border-top: 1px solid var(--border-color-primary) !important; }
table.facts td {
  border: 0 !important; padding: 0.4rem 0.75rem 0.4rem 0 !important; font-size: 0.9rem;
  vertical-align: top; overflow-wrap: anywhere; text-align: left;
}
table.facts td:first-child {
  color: var(--body-text-color-subdued); white-space: nowrap; width: 1%;
  padding-right: 1.25rem !important;
}
.about { max-width: 46rem; }

@media (max-width: 640px) {
  .found { flex-direction: column-reverse; }   /* the chosen picture above the grid */
  .details { position: static; }
  .results .grid-container {
    grid-template-columns: repeat(2, 1fr) !important; gap: 0.5rem !important;
  }
  .query button { min-width: 5rem !important; }
}
"""
