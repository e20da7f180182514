"""One file per host; each imports its host when it is used, and not before."""
