"""All pictures of a run on one page."""

from __future__ import annotations

import base64
import html
import shlex
from pathlib import Path

from rcmae.errors import Refused


def page(run: Path) -> str:
    """One HTML document with every picture of a run in it, the newest of a kind first.

    Raises Refused where there is none.
    """
    pictures = sorted((run / "pictures").glob("*.png"), reverse=True)
    if not pictures:
        raise Refused(
            f"{run / 'pictures'} has no pictures; draw some, such as: "
            f"rcmae visualize filters {shlex.quote(str(run))}"
        )
    style = "body{font:14px sans-serif;margin:2em}img{max-width:100%}"
    parts = [
        "<!doctype html><meta charset=utf-8>",
        f"<title>{html.escape(run.name)}</title><style>{style}</style>",
        f"<h1>{html.escape(str(run))}</h1>",
    ]
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.stem)
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">')
    return "\n".join(parts) + "\n"
