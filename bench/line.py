"""One line of the bench: a measured value, the floor it is held against, and what is aimed at."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """`ratio` is value over floor; where there is no floor, `aim` speaks of the value itself."""

    name: str
    value: float
    unit: str
    floor: float | None
    aim: str
    """`>= 0.90` of the ratio, or `< 5` of the value."""

    @property
    def ratio(self) -> float | None:
        return None if self.floor is None else self.value / self.floor

    @property
    def met(self) -> bool:
        sign, bound = self.aim.split()
        measured = self.value if self.ratio is None else self.ratio
        return {">=": measured >= float(bound), "<=": measured <= float(bound), "<": measured < float(bound)}[sign]
