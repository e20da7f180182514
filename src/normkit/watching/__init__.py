"""Watching a training run: one line before the loop, and the run is bit for bit what it would have been."""

from normkit.watching.beginning import watch
from normkit.watching.run import report_of_run
from normkit.watching.watcher import Watch

__all__ = ["Watch", "report_of_run", "watch"]
