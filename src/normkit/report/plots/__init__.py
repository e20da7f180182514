"""One file per family of figures; each takes the summary and returns ``document.Figure`` objects."""
