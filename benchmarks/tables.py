"""Print the tables of README.md and docs/, and draw their pictures, from the files under benchmarks/results/.

    python -m benchmarks.tables          # write them
    python -m benchmarks.tables --check  # fail if a page says anything else

Each table stands once, between two marker comments; nothing between them is written by hand.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import paper_model
from benchmarks.committed import RESULTS, ROOT
from benchmarks.pictures import draw_all
from benchmarks.table_accuracy import (
    ablations_table,
    airbench_table,
    final_table,
    presets_table,
    published_table,
    quality_table,
    runs_table,
)
from benchmarks.table_speed import (
    designs_table,
    folder_table,
    ladder_table,
    layers_table,
    loader_table,
    reliability_table,
    scaling_table,
    start_table,
    step_table,
    trace_table,
    ways_table,
)

TABLES: dict[str, Callable[[Path], str]] = {
    "presets": presets_table,
    "runs": lambda results: runs_table(results, current=True),
    "superseded runs": lambda results: runs_table(results, current=False),
    "final": final_table,
    "ablations": ablations_table,
    "quality": quality_table,
    "published": published_table,
    "airbench": airbench_table,
    "ways": ways_table,
    "layers": layers_table,
    "trace": trace_table,
    "step": step_table,
    "ladder": ladder_table,
    "loader": loader_table,
    "designs": designs_table,
    "folder": folder_table,
    "scaling": scaling_table,
    "start": start_table,
    "paper model": lambda _: paper_model.table(),
    "reliability": reliability_table,
}

END = "<!-- end of table -->"
MARKED = re.compile(rf"<!-- table: (.*?) -->.*?{re.escape(END)}", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")


def pages() -> list[Path]:
    """The README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str, page: Path, results: Path = RESULTS) -> str:
    """The page's text with every table in it printed anew."""

    def printed(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise ValueError(f"{page.name}: no table is called {name!r}; there are {', '.join(TABLES)}")
        table = LINK.sub(lambda link: f"]({_from_page(link[1], page)})", TABLES[name](results))
        return f"<!-- table: {name} -->\n\n{table}\n\n{END}"

    return MARKED.sub(printed, text)


def _from_page(target: str, page: Path) -> str:
    """A link from the repository's root, as tables give it, as one from the page's folder."""
    return Path(os.path.relpath(ROOT / target, page.parent)).as_posix()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print the tables of README.md and docs/ from benchmarks/results/."""

    check: bool = False
    """Change nothing; exit with status 1 if a page disagrees with the files."""


def main(options: Options) -> int:
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    stale = {page: new for page, text in texts.items() if (new := render(text, page)) != text}
    if options.check:
        for page in stale:
            print(f"{page.name} disagrees with benchmarks/results: run make tables", file=sys.stderr)
        return int(bool(stale))
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8")
    draw_all(RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
