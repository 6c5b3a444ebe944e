"""Rendering of pages: templates filled in with everything escaped, and written atomically."""

import base64
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fasttrain.report import plots
from fasttrain.system.files import write_atomically


@dataclass(frozen=True)
class Missing:
    """The stand-in for a section's content; says in a sentence why there is none."""

    reason: str


def render(template: str, **content: Any) -> str:
    """Fill in one of the templates; everything in `content` is escaped. Returns the HTML.

    A page runs no script but one from the templates' folder, which its policy names by a hash.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    pages = Environment(
        loader=PackageLoader("fasttrain.report"),
        autoescape=True,  # names of classes and recipes come from files and can be anything
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["as"] = lambda value, form: "unknown" if value is None else format(value, form)
    pages.filters["plain"] = _plain
    pages.filters["duration"] = _duration
    pages.filters["script"] = lambda name: Markup(_script(name))
    pages.filters["hash"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    pages.filters["dashes"] = lambda series: " ".join(f"{2 * part:g}" for part in plots.dashes(series))
    pages.tests["missing"] = lambda value: isinstance(value, Missing)
    return pages.get_template(template).render(light=plots.LIGHT, dark=plots.DARK, **content)


def _duration(seconds: float) -> str:
    """Format a number of seconds as a person would say it, from 10 minutes on in minutes or hours."""
    if seconds < 600:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _script(name: str) -> str:
    return (files("fasttrain.report") / "templates" / name).read_text(encoding="utf-8")


ABSENT = {"compile": "off", "cuda": "none", "cudnn": "none", "dali": "not installed"}
"""What a null in machine.json means, if it does not mean that the value could not be found out."""


def _plain(value: object, key: str = "") -> str:
    """Format a setting as a person would write it: 0.208333 and not 0.20833333333333334."""
    if value is None:
        return ABSENT.get(key, "unknown")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill in a template and write it atomically. Raises UserError if it cannot be written."""
    text = render(template, **content)
    write_atomically(path, lambda file: file.write(text.encode()))
