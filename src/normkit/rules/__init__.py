"""Rules of diagnosis: one file each, pure functions from readings to findings. This is the menu."""
