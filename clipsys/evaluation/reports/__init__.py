"""Reports: results as tables, plots, Markdown and one self-contained HTML file.

tables                tables of figures, and how a terminal shows them
canvas                what every plot is drawn on
plots                 plots of results and comparisons, as PNG
classification_plots  those of a classification
sheets                contact sheets: pictures with the words that belong to them
mistakes              the worst mistakes and nearest neighbours, as contact sheets
contents              what a report shows, in whatever form
web_page              the page
markdown_page         the document
writing               the folder, whole or not at all
"""
