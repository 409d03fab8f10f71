"""The verbs `train` and `export`. Nothing heavy is imported until one runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[
        str, typer.Argument(help="A recipe: a YAML file, or the name of a shipped one.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]…", help="Override settings.")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine; default one per GPU.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")
    ] = False,
) -> None:
    """Train a model through DeepSpeed.

    Also starts under `deepspeed`, `torchrun`, SLURM and MPI, which then decide the number of
    processes.
    """
    from clipsys.config import find_recipe, load_settings
    from clipsys.errors import TrainingError
    from clipsys.files.drive_faults import drive_errors_explained
    from clipsys.training.distributed import environment, launch, rank_errors
    from clipsys.training.recipe import Recipe

    recipe = load_settings(Recipe, find_recipe(config), overrides or [])
    if environment.join_environment(nproc):
        remedy = "make room, then go on with --resume; the checkpoints are kept"
        with (
            rank_errors.reporting(),
            drive_errors_explained(recipe.run_folder, TrainingError, remedy),
        ):
            from clipsys.training.loop import train as run

            run(recipe, resume=resume)
        return
    processes = nproc or recipe.nproc or launch.default_nproc()
    recipe.check_world(processes)
    arguments = ["train", config, *(overrides or []), *(["--resume"] if resume else [])]
    if "--debug" in sys.argv:
        arguments.insert(0, "--debug")
    launch.launch(arguments, processes)
    print(recipe.run_folder / "model")


def export(
    run: Annotated[
        Path,
        typer.Argument(help="What `clipsys train` wrote, or an adapter folder to merge."),
    ],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    step: Annotated[
        int | None, typer.Option(help="The checkpoint of this step; default the newest.")
    ] = None,
    with_heads: Annotated[
        bool,
        typer.Option("--with-heads", help="Write the objective's heads beside the model too."),
    ] = False,
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Write the adapters alone, for their base (model.lora)."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a folder of its kind.")
    ] = False,
) -> None:
    """Write a model folder that clipsys and stock open_clip load."""
    from clipsys.training.export import export_model

    if adapter and with_heads:
        raise typer.BadParameter("give one of --adapter and --with-heads")
    fingerprint = export_model(
        run, out, step=step, with_heads=with_heads, adapter=adapter, overwrite=overwrite
    )
    print(out)
    print(
        f"fingerprint {fingerprint[:16]}; load it with clipsys.load({str(out)!r})", file=sys.stderr
    )
