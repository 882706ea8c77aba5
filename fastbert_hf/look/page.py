"""One HTML file that shows what `look_inside` found: no network, no other file."""

import html
import json
import string
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


class PageTemplate(string.Template):
    """Placeholders are @@{name}: style sheets and scripts have uses for a dollar sign."""

    delimiter = "@@"


def render_page(found: dict[str, Any], model: str, source: str | None = None) -> str:
    """Put what was found, a style sheet and a script into one page.

    Args:
        found: of `routes.look_inside`.
        model: its name, for the title.
        source: what the usage was counted on, in words.

    Returns:
        The page. Text from the model and the files stands in it as data only.
    """
    data = json.dumps({**found, "model": model, "source": source}, ensure_ascii=False, separators=(",", ":"))
    parts = {name: (FOLDER / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    return PageTemplate(parts["html"]).substitute(
        title=html.escape(f"A look inside {model}"),
        style=parts["css"],
        script=parts["js"],
        data=data.replace("<", "\\u003c"),  # so that no text ends the element it stands in
    )
