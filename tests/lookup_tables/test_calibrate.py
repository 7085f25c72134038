import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from lookup_tables import calibrate as module
from lookup_tables.calibrate import accuracy_of, calibrate, cross_validated
from lookup_tables.table import Calibration


def networks(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of entries, and how many there are."""
    draw = np.random.default_rng(seed)
    sites = draw.integers(4, 12, count)
    return np.array([draw.uniform(5, 60, n).sum() for n in sites]), sites


@given(scale=st.floats(0.5, 2), per_site=st.floats(-2, 4), constant=st.floats(0, 30), seed=st.integers(0, 99))
def test_exact_coefficients_are_recovered(scale: float, per_site: float, constant: float, seed: int) -> None:
    sums, sites = networks(30, seed)
    measured = scale * sums + per_site * sites + constant
    fit = calibrate(sums, sites, measured, least_us=5.0)
    assert fit.scale == pytest.approx(scale, rel=1e-3)
    assert fit.per_site_us == pytest.approx(per_site, abs=0.02)
    assert fit.constant_us == pytest.approx(constant, abs=0.1)


@given(seed=st.integers(0, 200))
def test_fit_is_the_best_of_all_in_relative_error(seed: int) -> None:
    sums, sites = networks(20, seed)
    measured = (1.1 * sums + sites + 5) * np.random.default_rng(seed).normal(1, 0.02, 20)
    fit = calibrate(sums, sites, measured, least_us=5.0)

    def loss(scale: float, per_site: float, constant: float) -> float:
        residual = np.abs((scale * sums + per_site * sites + constant) / measured - 1)
        return float(np.minimum(residual, 0.04).mean())

    found = loss(fit.scale, fit.per_site_us, fit.constant_us)
    assert found <= loss(1.1, 1.0, 5.0) * 1.15  # Huber's loss is not this one


def test_three_disturbed_measurements_do_not_decide() -> None:
    sums, sites = networks(30, 0)
    measured = 1.2 * sums + 6
    disturbed = measured.copy()
    disturbed[:3] *= 2
    fit = calibrate(sums, sites, disturbed, least_us=5.0)
    predicted = fit.scale * sums + fit.per_site_us * sites + fit.constant_us
    np.testing.assert_allclose(predicted, measured, rtol=0.03)


@given(seed=st.integers(0, 200), scale=st.floats(0.2, 3), offset=st.floats(-60, 60), least=st.floats(0.1, 5))
def test_no_entry_makes_a_network_faster_and_no_session_is_below_nothing(
    seed: int, scale: float, offset: float, least: float
) -> None:
    sums, sites = networks(12, seed)
    fit = calibrate(sums, sites, np.maximum(scale * sums + offset * sites, 1.0), least_us=least)
    assert fit.constant_us >= 0
    assert fit.scale * least + fit.per_site_us >= -1e-9


def test_few_networks_give_a_scale_alone() -> None:
    assert calibrate([100.0, 50.0], [4, 3], [120.0, 60.0]) == Calibration(1.2, 0.0, 0.0)


@pytest.mark.parametrize(
    ("sums", "measured"), [([], []), ([0.0], [1.0]), ([1.0], [0.0]), ([1.0], [float("nan")])]
)
def test_nothing_to_calibrate_on_is_refused(sums: list[float], measured: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one whole network, with entries and times above 0"):
        calibrate(sums, [3] * len(sums), measured)


def test_held_out_network_never_enters_its_own_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, sites = networks(12, 3)
    measured = 1.1 * sums + 5
    fitted: list[list[float]] = []

    def recorded(s: list[float], n: list[int], us: list[float], least: float) -> Calibration:
        fitted.append(us)
        return calibrate(s, n, us, least)

    monkeypatch.setattr(module, "calibrate", recorded)
    cross_validated(sums, sites, measured, measured, least_us=5.0)
    assert [set(measured) - set(us) for us in fitted] == [{us} for us in measured]


def test_odd_network_shows_in_the_held_out_error() -> None:
    sums, sites = networks(12, 3)
    odd = 1.1 * sums + 5
    odd[4] *= 1.5
    error = cross_validated(sums, sites, odd, odd, least_us=5.0)
    assert error.interval_high == pytest.approx(0.5, abs=0.02)
    assert error.within_10_percent == pytest.approx(100 * 11 / 12)


def test_figures_are_what_their_names_say() -> None:
    predicted = np.array([100.0, 104.0, 100.0, 230.0])
    measured, repeated = np.array([100.0, 100.0, 108.0, 200.0]), np.array([101.0, 102.0, 108.0, 190.0])
    errors = np.abs(predicted / measured - 1) * 100
    found = accuracy_of(predicted, measured, repeated)
    assert found.mape_percent == pytest.approx(errors.mean())
    assert (found.within_5_percent, found.within_10_percent) == (50.0, 75.0)
    assert found.spearman == pytest.approx(spearmanr(predicted, measured).statistic)
    assert found.noise_floor_percent == pytest.approx(1.5)
    assert (found.interval_low, found.interval_high) == pytest.approx((200 / 230 - 1, 0.08))


def test_interval_covers_new_networks_as_often_as_it_says() -> None:
    inside, claimed = [], []
    for seed in range(30):
        sums, sites = networks(140, seed)
        noise = np.random.default_rng(1000 + seed).standard_t(3, 140) * 0.02
        measured = (1.1 * sums + sites + 5) * (1 + noise)
        known, new = slice(0, 40), slice(40, 140)
        fit = calibrate(sums[known], sites[known], measured[known], least_us=5.0)
        error = cross_validated(sums[known], sites[known], measured[known], measured[known], least_us=5.0)
        ratio = measured[new] / (fit.scale * sums[new] + fit.per_site_us * sites[new] + fit.constant_us) - 1
        inside.append(np.mean((error.interval_low <= ratio) & (ratio <= error.interval_high)))
        claimed.append(error.coverage)
    assert claimed[0] >= 0.95
    # Its standard error over 30 tables is about 0.007.
    assert np.mean(inside) == pytest.approx(np.mean(claimed), abs=0.02)


def test_few_networks_claim_no_more_than_they_can() -> None:
    sums, sites = networks(9, 0)
    error = cross_validated(sums, sites, sums * 1.1, sums * 1.1, least_us=5.0)
    assert error.coverage == pytest.approx(0.8)  # between the extremes of nine
