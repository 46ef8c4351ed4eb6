"""`render-data`: scenes at hand, checks, camera poses from photographs or video, standard scenes from the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from prismfield.cli import run_cli
from prismfield.datasets.poses import PosesConfig


def main() -> None:
    """Entry point of `render-data`."""
    run_cli(_main)


def _main() -> int:
    commands: dict[str, Callable[..., int]] = {
        "list": list_scenes,
        "check": check,
        "poses": poses,
        "download": download,
    }
    description = "Scenes: which are at hand, whether they are in order, camera poses for your own images, standard ones from the network."
    code: int = tyro.extras.subcommand_cli_from_dict(commands, prog="render-data", description=description)
    return code


def list_scenes() -> int:
    """Bundled scenes, those under $PRISMFIELD_DATA, and those that can be downloaded."""
    from rich.console import Console

    from prismfield.datasets.download import SCENES
    from prismfield.datasets.scenes import BUNDLED, known_scenes

    console = Console(highlight=False, soft_wrap=True)
    known = known_scenes()
    data = os.environ.get("PRISMFIELD_DATA")
    console.print("[bold]bundled[/]        " + (", ".join(name for name in known if name in BUNDLED) or "none"))
    own = [name for name in known if name not in BUNDLED]
    console.print(
        f"[bold]at hand[/]        {', '.join(own) or 'none'}  [dim]($PRISMFIELD_DATA: {data or 'not set'})[/]"
    )
    groups: dict[str, list[str]] = {}
    for name in SCENES:
        groups.setdefault(name.partition("/")[0], []).append(name.partition("/")[2])
    console.print("[bold]downloadable[/]   with render-data download NAME")
    for group, names in groups.items():
        console.print(f"  {group}/ {', '.join(names)}")
        console.print(f"  [dim]{SCENES[f'{group}/{names[0]}'].about}[/]")
    return 0


def check(
    path: Positional[str],
    out: Path | None = None,
    eval_every_nth: int | None = None,
    poses: bool = True,
) -> int:
    """Look a scene over: images, cameras, points, duplicates, blur, poses; draw its cameras.

    Args:
        path: Folder, transforms.json, or the name of a scene.
        out: Where the picture of the cameras goes. Default: SCENE_cameras.png here.
        eval_every_nth: Every n-th image is a test view, 0 for none. Default: the files' own split, else every 8th.
        poses: Match a few pairs of images and compare with the poses.
    """
    from prismfield.datasets.check import check_scene

    return check_scene(path, out=out, eval_every_nth=eval_every_nth, match_pairs=poses)


def poses(config: Annotated[PosesConfig, tyro.conf.arg(name="")]) -> int:
    """Find the cameras of a folder of photographs or of a video (structure from motion, with pycolmap)."""
    from prismfield.datasets.poses import find_poses

    return find_poses(config)


def download(
    name: Positional[str], out: Path | None = None, archive: str | None = None, overwrite: bool = False
) -> int:
    """Fetch a standard scene from its published address; an interrupted download goes on where it stopped.

    Args:
        name: GROUP/SCENE, as `render-data list` shows them.
        out: Folder to put GROUP/SCENE in. Default: $PRISMFIELD_DATA, else ./data.
        archive: Zip archive to take it from instead: a file fetched by hand, or another address.
        overwrite: Fetch again what is there.
    """
    from prismfield.datasets.download import SCENES, download

    folder = download(name, out, archive, overwrite)
    print(f"{SCENES[name].about}\nnext: render-data check {folder}\n      render-train --scene {folder}")
    return 0


if __name__ == "__main__":
    main()
