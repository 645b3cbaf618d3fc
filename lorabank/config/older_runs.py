"""Run folders of an older lorabank: settings that have moved since are read as what they are now, so that finished work loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabank.config.aliases import MOVED
from lorabank.config.tasks import SECTION_OF, TASK_SECTIONS

_WORDS = {"skip": "drop", "refuse": "stop"}
_RENAMED = {"speech": "long_audio", "diffusion": "no_caption"}
"""Section to a setting whose words have changed."""


def brought_up_to_date(tree: Mapping[Any, object]) -> dict[Any, object]:
    """The tree of a run folder's config.yaml, which names the settings of every section, those of other tasks too.

    What the run's own task did with bad rows becomes `data.bad_rows`; what others would have done never mattered, so their
    sections are left out.
    """
    own = SECTION_OF.get(str(tree.get("task")))
    found = {key: value for key, value in tree.items() if key not in TASK_SECTIONS or key == own}
    for section, name in MOVED:
        given = found.get(section)
        if not isinstance(given, Mapping) or name not in given:
            continue
        found[section] = {key: value for key, value in given.items() if key != name}
        data = found.get("data")
        if section == own and isinstance(data, Mapping) and "bad_rows" not in data:
            word = str(given[name])
            found["data"] = {**data, "bad_rows": _WORDS.get(word, word)}
    for section, name in _RENAMED.items():
        given = found.get(section)
        if isinstance(given, Mapping) and given.get(name) in _WORDS:
            found[section] = {**given, name: _WORDS[str(given[name])]}
    return found
