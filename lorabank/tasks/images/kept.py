"""What an adapter's own folder says of how the pictures that it knows were made."""

from __future__ import annotations

from lorabank.formats.task_settings import PICTURE_SETTINGS
from lorabank.tasks.kept import Kept

KEPT = Kept(section="images", names=PICTURE_SETTINGS["images"], optional={"image_size": int}, way_out="")
