"""The files of a run, compared with the hashes that its stages and checkpoints recorded."""

from __future__ import annotations

import os

from sftmix.common.files import MANIFEST, read_json, sha256_file, verify_directory
from sftmix.pipeline.stages import ALL
from sftmix.tools.verify.certificate import Finding, listed
from sftmix.tools.verify.window import Window


def check_files(window: Window) -> list[Finding]:
    """Compare every output of the finished stages, and every checkpoint of the window's stage."""
    findings, count, whole = [], 0, []
    for stage in ALL:
        manifest = window.run / stage / MANIFEST
        if not manifest.exists():
            continue
        whole.append(stage)
        for name, expected in read_json(manifest, files=dict)["files"].items():
            file, count = window.run / stage / name, count + 1
            found = sha256_file(file) if file.is_file() else "no file"
            if found != expected:
                where = os.path.normpath(f"{stage}/{name}")
                blocks = (not file.is_file() or file.suffix == ".parquet") and not name.startswith("model/")
                findings.append(Finding("files", False, where, False, expected, found, blocks))
    for step in window.kept:
        problem = verify_directory(window.checkpoint(step))
        if problem is not None:
            blocks = step in (window.start, window.end, window.last)
            findings.append(Finding("files", False, f"{window.checkpoint(step)}: {problem}", False, blocks=blocks))
    if not findings:
        of = f"{count} outputs of {listed(whole)}, by their hashes" if whole else "no stage is finished"
        kept = f"{len(window.kept)} checkpoints of {window.stage}" if window.kept else "no checkpoint is kept"
        findings.append(Finding("files", True, f"{of}; {kept}"))
    if not window.place.is_dir():
        gone = f"checkpoints of {window.stage}: it was adopted from {window.place}, which is gone"
        findings.append(Finding("files", None, gone))
    return findings
