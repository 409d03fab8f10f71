"""The verb `demo`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("demo-output"),
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="Serve the app at the end.")] = True,
    port: Annotated[int, typer.Option(help="Of the app.")] = 7860,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of corpus and training.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete OUT and start over.")] = False,
) -> None:
    """Go the whole way on a drawn sample corpus: shards, training, index, figures, app."""
    import shutil

    from clipsys.cli import load_verb
    from clipsys.demo.pipeline import Demo
    from clipsys.errors import ClipsysError

    if ui:
        from clipsys.processes.ports import bind

        bind("127.0.0.1", port).close()  # before minutes of work, not after them
    if fresh and out.is_dir():
        if not (out / "corpus").is_dir() and any(out.iterdir()):
            raise ClipsysError(f"{out}: not a demo folder, so --fresh does not delete it")
        shutil.rmtree(out)
    pipeline = Demo(out, seed=seed)
    report = pipeline.run()
    from clipsys.demo.figures import print_report

    print_report(report, out)
    if ui:
        load_verb("ui")(out / "collection", port=port)
