"""Runs evaluations here or through an executor, and tells each one's outcome, whatever becomes of it."""

from __future__ import annotations

import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self, final

from profilers.space import Architecture

Evaluate = Callable[[Architecture], Mapping[str, float]]
"""What an architecture is worth: metrics by name. Called with a canonical architecture."""


_Task = tuple[int, Architecture]  # the trial's number with it


@final
@dataclass(frozen=True)
class Outcome:
    """What came of one evaluation: metrics, or an error."""

    metrics: Mapping[str, float]
    error: str | None
    seconds: float


@final
class Evaluations:
    """Evaluations in flight.

    Args:
        evaluate: the function.
        executor: runs it elsewhere; a function that makes one; or None: runs it here, in `next`.

    Attributes:
        is_broken: the executor runs nothing any more, and there is no function that makes a new one.
    """

    def __init__(self, evaluate: Evaluate, executor: Executor | Callable[[], Executor] | None) -> None:
        if not (executor is None or isinstance(executor, Executor) or callable(executor)):
            raise TypeError(
                "an executor is a concurrent.futures.Executor or a function that makes one, such as "
                f"ProcessPoolExecutor; how many evaluations run at a time is workers. Got {executor!r}"
            )
        self.is_broken = False
        self._evaluate = evaluate
        self._make = None if executor is None or isinstance(executor, Executor) else executor
        self._executor = executor if isinstance(executor, Executor) else self._made()
        self._futures: dict[Future[Outcome], _Task] = {}
        self._waiting: deque[_Task] = deque()
        # What was in flight when a pool broke: each runs alone then, so that only the guilty one fails.
        self._suspects: deque[_Task] = deque()
        self._is_sorting_out = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for future in self._futures:
            future.cancel()
        if self._make is not None and self._executor is not None:
            self._executor.shutdown(wait=kind is None, cancel_futures=True)

    def submit(self, number: int, architecture: Architecture) -> None:
        """Starts an evaluation, or has it wait for its turn."""
        self._waiting.append((number, architecture))
        if self._executor is not None and not self._is_sorting_out:
            self._send(self._waiting.popleft())

    def next(self) -> tuple[int, Outcome]:
        """Waits for an evaluation to end, and returns its number and outcome.

        Raises:
            TypeError: the function cannot be sent to the executor's workers.
        """
        if self._executor is None:
            number, architecture = self._waiting.popleft()
            return number, evaluated(self._evaluate, architecture)
        while True:
            if not self._futures:
                self._is_sorting_out = bool(self._suspects)
                if self._suspects:
                    self._send(self._suspects.popleft())
                while self._waiting and not self._is_sorting_out:
                    self._send(self._waiting.popleft())
            done, _ = wait(self._futures, return_when=FIRST_COMPLETED)
            found = self._outcome(min(done, key=lambda future: self._futures[future][0]))
            if found is not None:
                return found

    def finished(self) -> list[tuple[int, Outcome]]:
        """What has ended by itself, without waiting: for who is about to stop."""
        done = [future for future in self._futures if future.done() and not future.cancelled()]
        return [(self._futures.pop(f)[0], f.result()) for f in done if f.exception() is None]

    def _send(self, task: _Task) -> None:
        assert self._executor is not None
        try:
            future = self._executor.submit(evaluated, self._evaluate, task[1])
        except BrokenExecutor as error:
            if self._make is None:
                future = Future()
                future.set_exception(error)
            elif self._futures:  # one of them broke it, which they will tell
                self._suspects.append(task)
                return
            else:
                self._executor = self._made()
                assert self._executor is not None
                future = self._executor.submit(evaluated, self._evaluate, task[1])
        self._futures[future] = task

    def _outcome(self, future: Future[Outcome]) -> tuple[int, Outcome] | None:
        """What came of a future; None: the pool broke, and who is to blame is not known yet."""
        error = future.exception()
        if isinstance(error, pickle.PicklingError | AttributeError | TypeError):
            raise TypeError(
                "an evaluation must be a function that the executor can send to its workers, with all that "
                f"it holds: {error}. Define it at the top of a module, and make there what cannot be sent"
            ) from error
        if isinstance(error, BrokenExecutor):
            if self._make is None:
                self.is_broken = True
            else:
                is_guilty = len(self._futures) == 1
                if not is_guilty:
                    self._suspect_all()
                assert self._executor is not None
                self._executor.shutdown(wait=False)
                self._executor = self._made()
                if not is_guilty:
                    return None
        number, _ = self._futures.pop(future)
        if error is not None:
            return number, Outcome({}, f"{type(error).__name__}: {error}", 0.0)
        return number, future.result()

    def _suspect_all(self) -> None:
        """Everything that was in flight runs again, but for what had ended."""
        wait(self._futures)
        broken = [future for future in self._futures if future.exception() is not None]
        self._suspects.extend(self._futures.pop(future) for future in broken)

    def _made(self) -> Executor | None:
        return None if self._make is None else self._make()


def evaluated(evaluate: Evaluate, architecture: Architecture) -> Outcome:
    """Runs one evaluation where it is called, a worker mostly; an error comes back as text."""
    start = time.perf_counter()
    try:
        metrics = {str(name): float(value) for name, value in evaluate(dict(architecture)).items()}
        error = None
    except Exception as raised:
        metrics, error = {}, "".join(traceback.format_exception_only(raised)).strip()
    return Outcome(metrics, error, time.perf_counter() - start)
