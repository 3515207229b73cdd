"""A search over points of a space that Optuna proposes, whose trials survive a kill and may be shared by workers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from exporter.compress.step import Journal
from exporter.errors import BackendMissingError, RecipeError

Sampler = Literal["tpe", "random"]
Value = float | int | str
Point = dict[str, Value]

STARTUP = 10  # trials drawn at random before TPE begins to model
ATTEMPTS, PAUSE = 5, 0.2  # to open a storage that another worker is creating at this moment; seconds between


@dataclass(frozen=True)
class Space:
    """What is searched.

    Args:
        named: Values to choose from, without an order, by name.
        ranged: Lowest and highest number by name.
        default: The point that is tried first; a best one is never worse.
    """

    named: dict[str, tuple[Value, ...]]
    ranged: dict[str, tuple[float, float]]
    default: Point


@dataclass(frozen=True)
class Trial:
    """A point and its loss."""

    number: int
    point: Point
    loss: float


def require_optuna(what: str) -> None:
    """Tell of a missing Optuna before the work.

    Raises:
        BackendMissingError: it is not installed.
    """
    if find_spec("optuna") is None:
        raise BackendMissingError(what, "optuna", "search")


def minimise(
    objective: Callable[[Point], float],
    space: Space,
    trials: int,
    sampler: Sampler,
    seed: int,
    study: Any,
    journal: Journal,
) -> tuple[Trial, ...]:
    """Try points until there are `trials` of them, those of earlier runs and other workers counted.

    The sampler of a trial is seeded by `seed` and the number of trials before it, so that a run that goes on after a
    kill tries what it would have tried.

    Args:
        objective: Its loss, in nats; infinite where a point is no good.
        space: What is searched.
        trials: At least 1; the first is the space's default.
        sampler: `tpe`, or `random`, which is what TPE has to beat.
        seed: Of the sampler.
        study: An open study, see `opened`.
        journal: Told the fraction done.

    Returns:
        All trials, by number.
    """
    import optuna

    done = finished(study)
    while len(done) < trials or not _has(done, space.default):  # another worker may have taken it up, and died
        if not _has(done, space.default) and not _is_waiting(study):
            study.enqueue_trial(space.default)
        study.sampler = _sampler(optuna, sampler, seed, len(done))
        trial = study.ask()
        point = _drawn(trial, space)
        study.tell(trial, objective(point))
        done = finished(study)
        journal.report(min(1.0, len(done) / trials))
    return done


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of the least loss, of equal ones the first."""
    return min(trials, key=lambda trial: (trial.loss, trial.number))


def improvements(trials: Sequence[Trial]) -> Iterator[Trial]:
    """The trials that were the best so far when they were done."""
    least = float("inf")
    for trial in trials:
        if trial.loss < least:
            least = trial.loss
            yield trial


def finished(study: Any) -> tuple[Trial, ...]:
    """The trials of a study that came to an end, by number."""
    import optuna

    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return tuple(Trial(trial.number, dict(trial.params), float(trial.value)) for trial in done)


def _has(trials: Sequence[Trial], point: Point) -> bool:
    return any(trial.point == point for trial in trials)


def _is_waiting(study: Any) -> bool:
    """Whether a run that was killed left the default in the queue."""
    import optuna

    return bool(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))


@contextmanager
def opened(storage: str | None, identity: Any, journal: Journal) -> Iterator[Any]:
    """The study of one model, text and config: in a storage that workers share, in the journal's scratch, or in memory.

    Args:
        storage: An Optuna storage URL, or None.
        identity: JSON-like; studies of another identity in the same storage are left alone.
        journal: Its scratch is used where no storage is given.

    Raises:
        RecipeError: the storage cannot be opened.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study on stderr
    name = "pocket-" + hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    url = storage or _scratch_url(journal.scratch)
    backend = optuna.storages.InMemoryStorage() if url is None else _storage(optuna, url)
    try:
        yield optuna.create_study(storage=backend, study_name=name, load_if_exists=True, direction="minimize")
    finally:
        backend.remove_session()


def _scratch_url(scratch: Path | None) -> str | None:
    return None if scratch is None else f"sqlite:///{scratch / 'search.db'}"


def _storage(optuna: Any, url: str, attempts: int = ATTEMPTS) -> Any:
    """A database; tried again where another worker creates the same tables at this moment."""
    try:
        return optuna.storages.RDBStorage(url)
    except Exception as error:  # of Optuna, SQLAlchemy or a missing driver: they share no base
        if attempts > 1:
            time.sleep(PAUSE)
            return _storage(optuna, url, attempts - 1)
        kind = url.partition(":")[0]  # the rest may hold a password
        raise RecipeError(
            f"the {kind} storage of trials cannot be opened: {' '.join(str(error).split())[:200]}; give an Optuna "
            "storage URL such as sqlite:///search.db, or leave storage out"
        ) from None


def _sampler(optuna: Any, kind: Sampler, seed: int, done: int) -> Any:
    own = int.from_bytes(hashlib.sha256(f"{seed} {done}".encode()).digest()[:4], "big")
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=own)
    return optuna.samplers.TPESampler(seed=own, n_startup_trials=STARTUP)


def _drawn(trial: Any, space: Space) -> Point:
    named = {name: trial.suggest_categorical(name, values) for name, values in space.named.items()}
    return named | {name: trial.suggest_float(name, *ends) for name, ends in space.ranged.items()}
