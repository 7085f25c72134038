from __future__ import annotations

import json

import numpy as np
import pytest

from hwnas.trials import Objectives, Trial, Trials
from hwnas.trials.results import nondominated


def trials(*points: tuple[float, float] | None) -> tuple[Trial, ...]:
    return tuple(
        Trial(number, {"op": number}, {}, error="ValueError: no")
        if point is None
        else Trial(number, {"op": number}, {"accuracy": point[0], "latency": point[1]})
        for number, point in enumerate(points)
    )


BOTH = Objectives({"accuracy": "max", "latency": "min"})


def test_best_and_top_k_are_by_the_direction_of_the_objective() -> None:
    found = Trials(trials((0.7, 3.0), None, (0.9, 5.0), (0.8, 1.0)), Objectives({"accuracy": "max"}), False)
    assert found.best.number == 2
    assert [trial.number for trial in found.top_k(2)] == [2, 3]
    assert [trial.number for trial in found.top_k(9)] == [2, 3, 0]
    least = Trials(found.trials, Objectives({"latency": "min"}), False)
    assert least.best.number == 3


def test_front_holds_what_nothing_beats_and_equals_of_it() -> None:
    points = [(0.9, 5.0), (0.8, 1.0), None, (0.7, 1.0), (0.9, 6.0), (0.8, 1.0), (0.1, 0.5)]
    found = Trials(trials(*points), BOTH, False)
    assert [trial.number for trial in found.pareto_front()] == [0, 1, 5, 6]


def test_nondominated_equals_the_definition() -> None:
    points = [tuple(point) for point in np.random.default_rng(0).integers(0, 6, (60, 3)).tolist()]
    expected = [
        i
        for i, p in enumerate(points)
        if not any(all(a <= b for a, b in zip(q, p, strict=True)) and q != p for q in points)
    ]
    assert nondominated(points) == expected


def test_several_objectives_have_no_best_but_one_by_name() -> None:
    found = Trials(trials((0.9, 5.0), (0.8, 1.0)), BOTH, False)
    with pytest.raises(ValueError, match=r"name one.*pareto_front"):
        found.best
    assert found.top_k(1, by="latency")[0].number == 1
    with pytest.raises(ValueError, match="got 'size'"):
        found.top_k(1, by="size")
    with pytest.raises(ValueError, match="at least 1"):
        found.top_k(0)


def test_search_in_which_all_failed_says_why() -> None:
    with pytest.raises(ValueError, match=r"none of the 2 trials came to an end.*ValueError: no"):
        Trials(trials(None, None), BOTH, False).pareto_front()


@pytest.mark.parametrize("directions", [{}, {"accuracy": "maximize"}])
def test_objectives_without_sense_are_refused(directions: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="at least one metric with the direction 'max' or 'min'"):
        Objectives(directions)  # type: ignore[arg-type]


@pytest.mark.parametrize("metrics", [{}, {"accuracy": float("nan")}, {"accuracy": float("inf")}])
def test_objective_that_is_no_number_is_an_error(metrics: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a finite number for each of"):
        Objectives({"accuracy": "max"}).losses(metrics)


def test_trial_comes_back_from_json() -> None:
    trial = Trial(3, {"op": "conv", "edges": (0, 2), "width": 8}, {"accuracy": 0.1 + 0.2}, seconds=1.5)
    back = Trial.from_json(json.loads(json.dumps(trial.to_json())))
    assert back == trial
    assert back.seconds == 1.5


def test_objectives_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(TypeError, match=r"such as \{'accuracy': 'max'\}; got 'accuracy'"):
        Objectives("accuracy")  # type: ignore[arg-type]  # on purpose
