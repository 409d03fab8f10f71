"""The app: search a collection by text or by image, and classify images, in a browser.

    commands     ``clipsys ui``
    server       serves on one port; nothing else than the app is reachable
    app          the page: its tabs, and what happens when they are used
    options, results, about
                 parts of the page: search options, the gallery of an answer, facts
    markup       tables and error messages of the page
    service      what the page asks for, without a page: searches, classification, facts
    thumbnails   small copies of the images, the only image files that the server gives out
    style        theme and style sheet

Importing this package imports none of them, and so not Gradio.
"""
