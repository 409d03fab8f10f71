"""Reports: results as plots, Markdown and one self-contained HTML file."""
