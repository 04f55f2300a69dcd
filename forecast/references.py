"""The forecasters that are scored beside a model over the same windows, and what spares them work that was done before."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import xarray as xr
from torch import Tensor

from forecast import config, memory
from forecast.batch import Forecast, Frames
from forecast.errors import UserError
from forecast.forecaster import Forecaster, Prepared
from forecast.sections import Sections

NOT_DEALT = ("batch_size", "workers")
"""Arguments of a datamodule that do not change what is in a split."""


@dataclass(frozen=True)
class Reference:
    """A forecaster to compare with."""

    name: str
    forecaster: Forecaster
    slow: bool = False
    """It forecasts the subsample of the test windows only."""
    key: str | None = None
    """Under which its counts are kept in `forecast.memory`; None keeps them nowhere."""


def references_of(plain: Mapping[str, Any], data: Any, terms: Mapping[str, Any]) -> list[Reference]:
    """The references that a configuration asks for, and those that only its data can offer; not the model itself.

    Args:
        plain: the configuration in plain containers.
        data: its `datamodules.frames.FrameData`, set up.
        terms: what is scored, in plain values: all that counts hang on beside the references.

    Raises:
        UserError: two have one name.
    """
    made: dict[str, Reference] = {}
    for place, model in plain["references"].items():
        name = model["name"]
        if name in made:
            raise UserError(f"references.{place} is the second one of the name {name}; set references.{place}.name.")
        if name != plain["model"]["name"]:
            forecaster = config.build_baseline(model["baseline"], data)
            own = {"baseline": model["baseline"], "slow": model["slow"], "past": data.past}
            if isinstance(forecaster, Prepared):
                dealt = {key: value for key, value in plain["data"].items() if key not in NOT_DEALT}
                own |= {"training": dealt, "fingerprint": data.fingerprint}
            made[name] = Reference(name, forecaster, model["slow"], memory.key({**terms, **own}))
    offered = {name: forecaster for name, forecaster in data.references().items() if name != plain["model"]["name"]}
    return [*made.values(), *(Reference(name, forecaster) for name, forecaster in offered.items())]


class References:
    """References in a test.

    Args:
        each: in the order in which they are shown.
        history: gives windows of the training split, for those that must see them.
    """

    def __init__(self, each: Sequence[Reference], history: Callable[[], Iterable[Frames]]) -> None:
        self.each = tuple(each)
        self.history = history
        self.recalled: frozenset[str] = frozenset()
        """Those that need not forecast, since their counts are known."""

    def recall(self, sections: Sections) -> list[str]:
        """Adds what is known of references to the counts, on the one process that calls this, and names them."""
        names = []
        for reference in self.each:
            counts = None if reference.key is None else memory.recall(reference.key)
            with suppress(KeyError, ValueError):  # kept by a test without subsample: this one needs more
                if counts is not None:
                    sections.restore(reference.name, counts)
                    names.append(reference.name)
        return names

    def keep(self, sections: Sections, found: Mapping[str, xr.Dataset]) -> None:
        """Keeps what was counted in this test, of all its windows; `found` is from `sections.datasets`."""
        for reference in self.each:
            if reference.key is not None and reference.name not in self.recalled:
                memory.keep(reference.key, sections.counts(reference.name, found))

    def prepare(self) -> None:
        """Shows the training split to those that must see it before they forecast, unless they need not forecast."""
        for reference in self.each:
            if isinstance(reference.forecaster, Prepared) and reference.name not in self.recalled:
                reference.forecaster.prepare(self.history())

    def forecasts(self, frames: Frames, listed: Tensor, members: int) -> Iterator[tuple[str, Forecast, Frames, Tensor]]:
        """The forecasts of those that are not recalled, by name, each with the windows that it is of.

        Args:
            frames: a batch.
            listed: B bool on the CPU, which of its windows are in the subsample: what slow references forecast.
            members: of the ensembles that are asked for; 0 for none.

        Yields:
            name, forecast, the windows, and which of these are in the subsample.
        """
        part = Frames(*(field[listed] for field in frames))
        for reference in self.each:
            given, chosen = (part, listed[listed]) if reference.slow else (frames, listed)
            if reference.name not in self.recalled and len(given.block):
                yield reference.name, predicted(reference.forecaster, given, members), given, chosen


def predicted(forecaster: Forecaster, frames: Frames, members: int = 0) -> Forecast:
    """What a forecaster makes of a batch: as many frames as came."""
    steps = frames.truth.shape[1]
    return forecaster.predict(frames.past, frames.known, steps, static=frames.static, time=frames.time, members=members)
