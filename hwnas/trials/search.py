"""The search: asks a method what to try, has it evaluated, writes it down, tells the method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path

import torch

from hwnas.sampling import Filters, as_filters
from hwnas.space import ModelSpace
from hwnas.trials.candidates import Candidates
from hwnas.trials.evaluations import Evaluate, Evaluations, Outcome
from hwnas.trials.journal import Journal, described_filters, described_space, digest_of
from hwnas.trials.method import Method, Problem, Proposals
from hwnas.trials.results import Direction, Objectives, Trial, Trials
from profilers.profile import Profiler
from profilers.space import Architecture


def search(
    space: ModelSpace,
    evaluate: Evaluate,
    method: Method,
    objectives: Mapping[str, Direction],
    *,
    trials: int | None,
    filters: Filters = None,
    costs: Mapping[str, Profiler] | None = None,
    seed: int = 0,
    executor: Executor | Callable[[], Executor] | None = None,
    workers: int = 1,
    journal: str | Path | None = None,
    report: Callable[[Trial], None] | None = None,
) -> Trials:
    """Tries architectures one by one, or several at a time, and tells which were the best.

    Filters are kept to by construction: nothing outside of them is ever evaluated, and no network is
    evaluated twice. An evaluation that raises, or returns no finite number for an objective, is a failed
    trial with its error; the search goes on.

    **Several workers.** Any `concurrent.futures.Executor` serves, as long as ``evaluate`` can be sent to its
    workers::

        with ProcessPoolExecutor(4) as pool:
            search(..., executor=pool, workers=4)  # this machine
        search(..., executor=lambda: ProcessPoolExecutor(4), workers=4)  # a pool that breaks is replaced
        search(..., executor=distributed.Client(address).get_executor(), workers=32)  # Dask
        with mpi4py.futures.MPIPoolExecutor() as pool:
            search(..., executor=pool, workers=63)  # MPI

    Ray has no such executor. A thread for each evaluation in flight, which waits for Ray, is one::

        remote = ray.remote(evaluate)
        with ThreadPoolExecutor(16) as threads:
            search(space, lambda a: ray.get(remote.remote(a)), ..., executor=threads, workers=16)

    A process that dies takes its whole pool with it. Where ``executor`` is a function that makes pools, a
    new one is made, what was in flight runs again one at a time, and only what breaks a pool on its own is a
    failed trial. Where it is a pool, all that was in flight is recorded as failed, and the search stops with
    an error; the same call goes on where it stopped.

    **Killed and resumed.** With a ``journal`` each finished trial is on disk before the next one is chosen.
    The same call then goes on where a killed one was: finished trials are neither evaluated again nor lost.
    The method is asked and told again all that it was, so with one worker the outcome is that of a search
    that was never killed. More trials than before make a search longer.

    Args:
        space: whose architectures are tried.
        evaluate: returns the metrics of a canonical architecture by name.
        method: chooses what to try.
        objectives: for each metric that counts, ``"max"`` or ``"min"``.
        trials: how many, failed ones and those of the journal included; None: all that there are.
        filters: ranges of cost that all have to be kept to.
        costs: metrics that are not evaluated but looked up, by name. They may be objectives.
        seed: of all that is random in the method.
        executor: runs the evaluations; a function that makes one; None: this process does.
        workers: evaluations in flight at a time.
        journal: a file for the finished trials; None: nothing is kept.
        report: told every trial that finishes in this run.

    Raises:
        ValueError: no architecture is within all filters, a number is out of its range, or the journal
            belongs to another search.
        TypeError: ``evaluate`` cannot be sent to the executor's workers.
        RuntimeError: the executor broke and cannot be replaced.

    Warns:
        UserWarning: a trial failed; or fewer trials were made than were asked for, since there are no more
            architectures.

    >>> from hwnas import LayerChoice
    >>> from hwnas.trials import RandomSearch
    >>> layers = [torch.nn.Linear(4, 4), torch.nn.Identity()]
    >>> space = ModelSpace(torch.nn.Sequential(*(LayerChoice(layers, label=f"op{i}") for i in range(3))))
    >>> def skips(architecture): return {"skips": sum(architecture.values())}
    >>> search(space, skips, RandomSearch(), {"skips": "max"}, trials=8).best.metrics
    {'skips': 3.0}
    """
    if trials is not None and not (isinstance(trials, int) and trials >= 1):
        raise ValueError(
            f"trials must be at least 1 and a whole number, or None for all that there are; got {trials}"
        )
    if workers < 1 or (workers > 1 and executor is None):
        raise ValueError(
            f"workers are evaluations in flight: at least 1, and 1 without an executor; got {workers}"
        )
    if not isinstance(space, ModelSpace) or not isinstance(method, Method):
        raise TypeError(
            "a search is of a ModelSpace, by a method such as RandomSearch(); got "
            f"{_kind(space)} and {_kind(method)}"
        )
    within = as_filters(filters)
    aims = Objectives(objectives)
    costs = dict(costs or {})
    for profiler in costs.values():
        space.check_cost(profiler.cost)
    generator = torch.Generator().manual_seed(seed)
    candidates = Candidates(space, within, generator)
    facts = {
        "space": described_space(space),
        **method.settings(),
        "objectives": aims.directions,
        "filters": described_filters(within),
        "costs": {name: digest_of(profiler.cost) for name, profiler in costs.items()},
        "seed": seed,
    }
    book = None if journal is None else Journal(journal, facts)
    # Finished in an earlier run, in the order in which they did. They are chosen and told once more.
    earlier = {trial.number: trial for trial in book.trials} if book is not None else {}

    def written(number: int, outcome: Outcome) -> Trial:
        trial = _trial(number, pending[number], outcome, aims, costs)
        if book is not None:
            book.add(trial)
        return trial

    proposals = method.start(Problem(candidates, aims, generator))
    pending: dict[int, Architecture] = {}
    told: list[Trial] = []
    asked = 0
    is_exhausted = False
    with Evaluations(evaluate, executor) as running:
        while True:
            while len(pending) < workers and asked != trials and not is_exhausted and not running.is_broken:
                architecture = _choose(proposals, asked, earlier, candidates)
                if architecture is None:
                    is_exhausted = True
                    break
                if asked not in earlier:
                    _check(architecture, candidates, method)
                    running.submit(asked, architecture)
                candidates.take(architecture)
                pending[asked] = architecture
                asked += 1
            if not pending:
                break
            trial = next((found for found in earlier.values() if found.number in pending), None)
            if trial is not None:
                del earlier[trial.number]
            else:
                try:
                    trial = written(*running.next())
                    if trial.is_failed:
                        warnings.warn(f"trial {trial.number} failed with {trial.error}", stacklevel=2)
                    if report is not None:
                        report(trial)
                except BaseException:  # an interrupt, most of all: what has finished is not lost
                    for number, outcome in running.finished():
                        written(number, outcome)
                    raise
            del pending[trial.number]
            proposals.tell(trial)
            told.append(trial)
        if running.is_broken:
            raise RuntimeError(
                f"a worker died and the executor runs nothing any more; {len(told)} trials are finished, the "
                "last of them failed by it. Where there is a journal, the same call goes on. With "
                "executor=lambda: ProcessPoolExecutor(...) in place of a pool, a broken one is replaced"
            )
    if is_exhausted:
        # Left where the journal was written with another number of workers.
        told += [trial for trial in earlier.values() if trials is None or trial.number < trials]
        if trials is not None:
            warnings.warn(
                f"there are no more than {len(told)} architectures within the filters; "
                f"{trials} trials were asked for",
                stacklevel=2,
            )
    return Trials(tuple(sorted(told, key=lambda trial: trial.number)), aims, is_exhausted)


def _kind(thing: object) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def _choose(
    proposals: Proposals, number: int, earlier: Mapping[int, Trial], candidates: Candidates
) -> Architecture | None:
    """What is tried next: what the journal says, else what the method does."""
    proposed = proposals.ask()
    if number in earlier:
        return earlier[number].architecture
    # With another number of workers than before, the method may come upon what the journal has later.
    while proposed is not None and any(proposed == trial.architecture for trial in earlier.values()):
        candidates.take(proposed)
        proposed = proposals.ask()
    return proposed


def _check(architecture: Architecture, candidates: Candidates, method: Method) -> None:
    wrong = (
        "is not canonical"
        if candidates.space.canonical(architecture) != architecture
        else "was proposed before"
        if not candidates.is_new(architecture)
        else "is outside of the filters"
        if not candidates.is_within(architecture)
        else None
    )
    if wrong is not None:
        raise RuntimeError(
            f"{type(method).__name__} proposed an architecture that {wrong}: {architecture}. A method takes "
            "what it proposes from problem.candidates"
        )


def _trial(
    number: int,
    architecture: Architecture,
    outcome: Outcome,
    objectives: Objectives,
    costs: Mapping[str, Profiler],
) -> Trial:
    """A finished trial; failed, where a metric is missing or no number."""
    metrics = dict(outcome.metrics)
    error = outcome.error
    if error is None:
        twice = [name for name in costs if name in metrics]
        metrics |= {name: profiler.profile(architecture) for name, profiler in costs.items()}
        try:
            objectives.losses(metrics)
            if twice:
                raise ValueError(f"{twice} are looked up as costs, and evaluated too; give them other names")
        except ValueError as raised:
            metrics, error = {}, f"ValueError: {raised}"
    return Trial(number, architecture, metrics, error, outcome.seconds)
