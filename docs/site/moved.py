"""Pages that have moved: a page at the old address leads to the new one, with or without scripts.

`extra.moved` of mkdocs.yml has the addresses. A new address that the site does not have fails a strict build.
"""

import logging
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

LOG = logging.getLogger("mkdocs.moved")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Moved</title>
<meta http-equiv="refresh" content="0; url={new}">
<link rel="canonical" href="{new}">
<p>This page has moved to <a href="{new}">{new}</a>.</p>
"""


def on_post_build(config: MkDocsConfig) -> None:
    site = Path(config.site_dir)
    for old, new in config.extra["moved"].items():
        page, _, anchor = new.partition("#")
        there = site / page
        if not there.is_file() or (anchor and f'id="{anchor}"' not in there.read_text(encoding="utf-8")):
            LOG.warning("mkdocs.yml moves %s to %s, which is not in the site", old, new)
        if (site / old).exists():
            LOG.warning("mkdocs.yml moves %s, which is in the site", old)
            continue
        (site / old).write_text(PAGE.format(new=new), encoding="utf-8")
