"""What a check of the set-up found."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """What was looked at: `verdict` is one of the above, `remedy` says what to do, and `where` is the folder or file,
    if there is one."""

    verdict: str
    what: str
    remedy: str = ""
    where: str = ""
