"""Takes README's picture: ``python docs/screenshot.py COLLECTION "QUERY"`` (needs chromium)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from clipsys.training.distributed.launch import free_port

OUT = Path(__file__).resolve().parent / "images" / "app.png"


def main(collection: str, query: str) -> None:
    """Serves the collection, searches and saves what a person sees."""
    port = free_port()
    command = [sys.executable, "-m", "clipsys", "ui", collection, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        server.stdout.readline()  # the address, once it is being served
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1180, "height": 820})
            page.goto(f"http://127.0.0.1:{port}")
            field = page.locator("#query-text input")
            field.fill(query)
            field.press("Enter")
            page.get_by_text(f"for “{query}”").wait_for()
            page.wait_for_timeout(1500)
            page.screenshot(path=OUT)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
