"""Where the trials of a sweep are kept, so that several processes and machines can share them."""

import json
import time
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from forecast.config import first_line
from forecast.errors import UserError
from forecast.provenance import masked_text
from forecast.space import Space

PRUNERS = {
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "none": optuna.pruners.NopPruner,
}


def open_storage(given: str) -> BaseStorage:
    """Optuna's storage: `journal:FILE`, the URL of a database, or the path of an SQLite file."""
    if "://" in given:
        return RDBStorage(given)
    path = Path(given.removeprefix("journal:")).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if given.startswith("journal:"):
        return JournalStorage(JournalFileBackend(str(path)))
    # Others that write at the same time are waited for.
    return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})


def begin(name: str, storage: str, pruner: str, space: Space, metric: str, mode: str) -> optuna.Study:
    """Makes a study, or joins it where it is there already.

    Raises:
        UserError: the study that is there has another space, or its storage cannot be used.
    """
    search = {key: optuna.distributions.distribution_to_json(one) for key, one in space.search.items()}
    mine = json.dumps([metric, mode, space.fixed, search])
    direction = StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE
    for tries_left in (2, 1, 0):
        try:
            study = optuna.create_study(
                storage=open_storage(storage),
                study_name=name,
                direction=direction,
                pruner=PRUNERS[pruner](),
                load_if_exists=True,
            )
            if "space" not in study.user_attrs:
                study.set_user_attr("space", mine)
            break
        except Exception as error:  # each database driver has errors of its own
            # Two that make the same tables at once get in each other's way once.
            if not tries_left:
                cause = masked_text(first_line(error))
                raise UserError(f"The storage {masked_text(storage)} cannot be used: {cause}.") from None
            time.sleep(1)
    if study.user_attrs["space"] != mine:
        raise UserError(f"The study {name} was begun with another space or other overrides; give another --study.")
    return study
