"""The report of a run: one HTML file that needs nothing else, runs nothing and fetches nothing.

Every string that comes from a file goes through `shown`, and the page forbids scripts and requests by its policy.
"""

from __future__ import annotations

from pathlib import Path

from mvcr_cli.paths import write_whole
from mvcr_cli.report import figures, sections
from mvcr_cli.report.run_files import RunFiles, read_run
from mvcr_cli.report.svg import shown
from mvcr_cli.report.theme import CSS

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · mvcr report</title>
<style>{css}</style>
</head>
<body>
<main>
<header>
<p class="over">mvcr report</p>
<h1><bdi>{name}</bdi></h1>
<p class="lead">{lead}</p>
</header>
{body}
<footer>Made by mvcr {version}. This file is complete: it can be sent, archived and printed.</footer>
</main>
</body>
</html>
"""


def write_report(run: Path) -> Path:
    """Write `report.html` into the run folder from the run's own records.

    Returns:
        The file. Parts whose records are missing are replaced by a sentence.

    Raises:
        InputMissing: there is no config.json.
        CheckpointError: a record is not what mvcr writes.
    """
    path = run / "report.html"
    write_whole(path, _page(read_run(run)))
    return path


def _page(run: RunFiles) -> str:
    parts = (
        sections.result(run),
        sections.data(run),
        figures.curves(run),
        figures.mistakes(run),
        figures.classes(run),
        sections.usage(run),
        sections.settings(run),
    )
    return PAGE.format(
        policy=POLICY,
        css=CSS,
        name=shown(run.name),
        lead=sections.lead(run),
        body="\n".join(part for part in parts if part),
        version=shown(run.version),
    )
