"""Reports: results as tables, plots, Markdown and one self-contained HTML file.

tables              the table on a terminal
plots               plots of results and comparisons, as PNG
sheets              contact sheets: pictures with the words that belong to them
mistakes            the worst mistakes and nearest neighbours, as contact sheets
contents            what a report shows, in whatever form
html, markdown      the page and the document
writing             the folder, whole or not at all
"""
