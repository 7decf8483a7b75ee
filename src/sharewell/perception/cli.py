"""``sharewell tad``: the detector and the features of videos; ``sharewell detect``."""

from __future__ import annotations

from .tad.cli import app
from .video.cli import demo, detect, extract, labels

app.command()(extract)
app.command()(labels)
app.command()(demo)

__all__ = ["app", "detect"]
