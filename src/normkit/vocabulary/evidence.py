"""Evidence: readings, arranged for who asks by module, by quantity, or over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from normkit.vocabulary.reading import Reading

Value = float | str | tuple[str, ...]


class Evidence:
    """All that was read of one model or run. Rules and strategies see nothing else."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self.readings = tuple(readings)
        self._series: dict[str, dict[str, list[Reading]]] = {}
        for reading in self.readings:
            self._series.setdefault(reading.quantity, {}).setdefault(reading.module, []).append(reading)

    def __contains__(self, quantity: object) -> bool:
        return quantity in self._series

    @property
    def quantities(self) -> frozenset[str]:
        """The names of all that was read."""
        return frozenset(self._series)

    def modules(self, quantity: str) -> tuple[str, ...]:
        """The places where the quantity was read, in the order of the readings."""
        return tuple(self._series.get(quantity, ()))

    def series(self, quantity: str, module: str = "") -> tuple[Reading, ...]:
        """Every reading of the quantity at that place, in their order; empty: none."""
        return tuple(self._series.get(quantity, {}).get(module, ()))

    def of(self, quantity: str) -> Iterator[Reading]:
        """Every reading of the quantity, wherever."""
        for module in self.modules(quantity):
            yield from self.series(quantity, module)

    def latest(self, quantity: str, module: str = "") -> Value | None:
        """The last value; ``None``: it was not read there."""
        readings = self._series.get(quantity, {}).get(module)
        return readings[-1].value if readings else None

    def number(self, quantity: str, module: str = "") -> float | None:
        """The last value, where it is a number; ``None``: it was not read there."""
        value = self.latest(quantity, module)
        return None if value is None or isinstance(value, (str, tuple)) else float(value)

    def word(self, quantity: str, module: str = "") -> str:
        """The last value, where it is a word; empty: it was not read there."""
        value = self.latest(quantity, module)
        return value if isinstance(value, str) else ""

    def names(self, quantity: str, module: str = "") -> tuple[str, ...]:
        """The last value, where it is names; empty: it was not read there."""
        value = self.latest(quantity, module)
        return value if isinstance(value, tuple) else ()

    def numbers(self, quantity: str) -> Iterator[tuple[str, float]]:
        """Place and last value, wherever the quantity is a number."""
        for module in self.modules(quantity):
            value = self.number(quantity, module)
            if value is not None:
                yield module, value
