"""Physical quantities, grids, reflectivity and rain rate, and the numbers that a network sees.

Everything here is frozen and holds plain numbers only, so that it can be stored in a checkpoint and rebuilt.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from forecast.errors import UserError


@dataclass(frozen=True)
class ZR:
    """Reflectivity factor Z (mm^6 m^-3) from rain rate R (mm/h): Z = a R^b, and dBZ = 10 log10 Z."""

    a: float
    b: float

    def rain_rate(self, dbz: Tensor) -> Tensor:
        """dBZ -> mm/h."""
        return (torch.pow(10.0, dbz / 10) / self.a).pow(1 / self.b)

    def reflectivity(self, rain_rate: Tensor) -> Tensor:
        """mm/h -> dBZ; no rain gives minus infinity."""
        return 10 * torch.log10(self.a * rain_rate.clamp_min(0).pow(self.b))


NO_ECHO = -10.0
"""dBZ; at and below it no relation gives rain."""

Z_R_RELATIONS: Mapping[str, ZR] = {
    "marshall_palmer": ZR(200.0, 1.6),  # Marshall, Langille, Palmer (1947), J. Meteor. 4, 186
    "wsr88d": ZR(
        300.0, 1.4
    ),  # Fulton et al. (1998), Weather and Forecasting 13, 377: convective default of the WSR-88D
    "hko7": ZR(58.53, 1.56),  # Shi et al. (2017), arXiv 1706.03458: the Hong Kong Observatory's
    "dwd": ZR(256.0, 1.42),  # German Weather Service, RADOLAN's standard relation
}


def z_r_relation(name: str) -> ZR:
    """The relation of that name.

    Raises:
        UserError: there is none.
    """
    if name not in Z_R_RELATIONS:
        raise UserError(f"Unknown Z-R relation {name!r}; choose one of {', '.join(Z_R_RELATIONS)}.")
    return Z_R_RELATIONS[name]


@dataclass(frozen=True)
class Quantity:
    """What the numbers of an archive mean, and how they become physical values.

    values = scale * packed + offset, then by `relation` from dBZ to mm/h where one is named (no rain at NO_ECHO). A packed
    number equal to `missing`, and NaN, are invalid. Values below `floor` (no echo, no rain) are set to it.
    """

    name: str
    """CF standard name where there is one."""
    long_name: str
    units: str
    """Of the decoded values: 'dBZ', 'mm/h' or '1'."""
    thresholds: tuple[float, ...]
    """Events for the categorical scores, in `units`: a pixel at or above the threshold is one."""
    floor: float = 0.0
    """The value of "nothing there", in `units`."""
    scale: float = 1.0
    offset: float = 0.0
    missing: float | None = None
    relation: ZR | None = None

    def decode(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Packed numbers of any shape -> (physical values float32, valid bool); invalid pixels hold `floor`."""
        valid = torch.isfinite(packed) if packed.is_floating_point() else torch.ones_like(packed, dtype=torch.bool)
        if self.missing is not None:
            valid = valid & (packed != self.missing)
        values = packed.float() * self.scale + self.offset
        if self.relation is not None:
            values = torch.where(values > NO_ECHO, self.relation.rain_rate(values), 0.0)
        # The comparison is on `values > floor`, so that NaN becomes the floor as well.
        return torch.where(valid & (values > self.floor), values, self.floor), valid

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Quantity":
        relation = stored["relation"]
        return cls(
            **{
                **stored,
                "thresholds": tuple(stored["thresholds"]),
                "relation": None if relation is None else ZR(**relation),
            }
        )


@dataclass(frozen=True)
class Grid:
    """Where the pixels are. Pixel (0, 0) has its centre at `origin`; pixel (i, j) at origin + (i, j) * spacing."""

    size: tuple[int, int]
    """H, W."""
    origin: tuple[float, float] = (0.0, 0.0)
    """y, x in `units`."""
    spacing: tuple[float, float] = (1.0, 1.0)
    """Step in y and in x, signed, in `units`."""
    units: str = "pixel"
    """'m', 'km', 'degrees' or 'pixel'."""
    projection: Mapping[str, Any] = field(default_factory=dict)
    """The CF grid mapping's attributes as they were found; empty where none was given."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Grid":
        pairs = {name: tuple(stored[name]) for name in ("size", "origin", "spacing")}
        return cls(**{**stored, **pairs})


@runtime_checkable
class Transform(Protocol):
    """Physical values <-> the numbers a network sees (about 0 to 1)."""

    def forward(self, values: Tensor) -> Tensor: ...

    def inverse(self, numbers: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """`low` -> 0 and `high` -> 1. The inverse never goes below `low`."""

    low: float = 0.0
    high: float = 1.0

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.low) / (self.high - self.low)

    def inverse(self, numbers: Tensor) -> Tensor:
        return (numbers * (self.high - self.low) + self.low).clamp_min(self.low)


@dataclass(frozen=True)
class Decibel:
    """Rain rate (mm/h) as reflectivity between `low` and `high` dBZ, scaled to 0..1; at `low` and below it is no rain.

    With relation hko7, low -10 and high 60 this is HKO-7's pixel (Shi et al. 2017): (dBZ + 10) / 70.
    """

    relation: str = "marshall_palmer"
    low: float = NO_ECHO
    high: float = 60.0

    def forward(self, values: Tensor) -> Tensor:
        dbz = z_r_relation(self.relation).reflectivity(values)
        return (dbz.clamp(self.low, self.high) - self.low) / (self.high - self.low)

    def inverse(self, numbers: Tensor) -> Tensor:
        dbz = numbers.clamp(max=1.0) * (self.high - self.low) + self.low
        return torch.where(numbers > 0, z_r_relation(self.relation).rain_rate(dbz), 0.0)


@dataclass(frozen=True)
class Log:
    """Rain rate (mm/h) as log(1 + R / scale) / log(1 + high / scale): 0 stays 0 and `high` becomes 1."""

    scale: float = 0.1
    high: float = 100.0

    def forward(self, values: Tensor) -> Tensor:
        return torch.log1p(values / self.scale) / torch.log1p(torch.tensor(self.high / self.scale)).item()

    def inverse(self, numbers: Tensor) -> Tensor:
        ceiling = torch.log1p(torch.tensor(self.high / self.scale)).item()
        return (torch.expm1(numbers.clamp_min(0) * ceiling) * self.scale).clamp(max=10 * self.high)


def default_transform(quantity: Quantity) -> Transform:
    """Frames in [0, 1] as they are, dBZ from its floor to 60, rain rate as reflectivity by its own relation."""
    if quantity.units == "dBZ":
        return Linear(low=quantity.floor, high=60.0)
    if quantity.units == "mm/h":
        names = [name for name, relation in Z_R_RELATIONS.items() if relation == quantity.relation]
        return Decibel(relation=names[0] if names else "marshall_palmer")
    return Linear()


TRANSFORMS: Mapping[str, type] = {"Linear": Linear, "Decibel": Decibel, "Log": Log}


def transform_to_dict(transform: Transform) -> dict[str, Any]:
    """A transform of this module as plain values, its class under "kind"."""
    return {"kind": type(transform).__name__, **vars(transform)}


def transform_from_dict(stored: Mapping[str, Any]) -> Transform:
    """The transform that `transform_to_dict` wrote."""
    arguments = {name: value for name, value in stored.items() if name != "kind"}
    return cast(Transform, TRANSFORMS[stored["kind"]](**arguments))
