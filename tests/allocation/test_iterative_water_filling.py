"""Water-filling against its optimality conditions, and the interference game against what is known of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from sharewell.allocation import (
    Asynchronous,
    DecayingStep,
    FixedPoint,
    InterferenceGame,
    NoisyGame,
    Simultaneous,
    StalledUser,
    project,
    reverse_waterfill,
    waterfill,
)


def kkt_residual(p: np.ndarray, n: np.ndarray, power: float, mask: np.ndarray | None) -> float:
    """Greatest violation of the optimality conditions of max sum log(1 + p/n): feasibility, and one water
    level that fits every channel (above the floor of empty ones, below the surface of capped ones)."""
    cap = np.full_like(n, np.inf) if mask is None else mask
    usable = np.isfinite(n)
    assert not p[~usable].any()
    p, n, cap = p[usable], n[usable], cap[usable]
    worst = max(0.0, float((-p).max(initial=0)), float((p - cap).max(initial=0)))
    if cap.sum() <= power:
        return max(worst, float(np.abs(p - cap).max(initial=0)))
    worst = max(worst, abs(float(p.sum()) - power))
    surface = p + n
    partly = (p > 0) & (p < cap)
    lowest_empty = n[(p == 0) & (cap > 0)].min(initial=np.inf)  # level must be at most this
    highest_full = surface[(p >= cap) & (cap > 0)].max(initial=-np.inf)  # and at least this
    if partly.any():
        level = surface[partly]
        worst = max(worst, float(level.max() - level.min()))
        worst = max(worst, float(level.max()) - lowest_empty, highest_full - float(level.min()))
    elif power > 0:
        worst = max(worst, highest_full - lowest_empty)
    return worst


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, float, np.ndarray | None]:
    size = int(rng.choice([1, 2, 3, 7, 33, 64]))
    n = rng.choice(
        [rng.exponential(1, size), rng.lognormal(0, 2, size), np.ones(size), rng.integers(1, 4, size)]
    )
    n = np.array(n, float) + 1e-3
    if rng.random() < 0.3:
        n[rng.random(size) < 0.4] = np.inf  # gain zero
    power = float(rng.choice([0.0, 1e-9, 1.0, 10.0, rng.exponential(5)]))
    mask = None
    if rng.random() < 0.6:
        mask = np.array(rng.choice([rng.exponential(1, size), np.full(size, 0.5), np.zeros(size)]), float)
        mask[rng.random(size) < 0.1] = 0.0
        mask[rng.random(size) < 0.1] = np.inf
    return n, power, mask


def test_waterfill_is_optimal_in_a_thousand_cases():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n, power, mask = random_case(rng)
        p = waterfill(n, power, mask)
        assert kkt_residual(p, n, power, mask) < 1e-10
        usable = np.isfinite(n)
        room = np.inf if mask is None else mask[usable].sum()
        if usable.any():
            assert p.sum() == pytest.approx(min(power, room), rel=1e-12, abs=0)


def test_waterfill_equals_a_general_solver():
    rng = np.random.default_rng(1)
    for _ in range(12):
        n, mask = rng.exponential(1, 6) + 0.05, rng.exponential(1, 6)
        power = 0.6 * float(mask.sum())
        solved = minimize(
            lambda p, n=n: -np.log1p(p / n).sum(),
            np.full(6, power / 6).clip(max=mask),
            jac=lambda p, n=n: -1 / (n + p),
            bounds=[(0, m) for m in mask],
            constraints={"type": "eq", "fun": lambda p, power=power: p.sum() - power},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        p = waterfill(n, power, mask)
        np.testing.assert_allclose(p, solved.x, atol=2e-5)
        assert np.log1p(p / n).sum() >= -solved.fun - 1e-12


def test_a_small_budget_on_a_high_floor_is_not_rounded_away():
    p = waterfill(np.array([1e9, 1e9, 2e9]), 1e-6)
    assert p.tolist() == [5e-7, 5e-7, 0.0]


def test_batches_are_filled_one_by_one():
    rng = np.random.default_rng(2)
    n, power, mask = rng.exponential(1, (3, 4, 9)), rng.exponential(3, (3, 4)), rng.exponential(1, (3, 4, 9))
    for cap in (None, mask):
        p, level = waterfill(n, power, cap, return_level=True)
        for at in np.ndindex(3, 4):
            one, one_level = waterfill(n[at], power[at], None if cap is None else cap[at], return_level=True)
            np.testing.assert_array_equal(p[at], one)
            assert level[at] == one_level


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=60)
def test_it_is_the_projection_of_minus_the_noise_and_never_moves_further(seed: int, masked: bool):
    rng = np.random.default_rng(seed)
    a, b = rng.exponential(1, (2, 12)) + 1e-3
    mask = rng.exponential(1, 12) if masked else None
    power = 0.5 * float(mask.sum()) if mask is not None else 2.0
    p, q = waterfill(a, power, mask), waterfill(b, power, mask)
    assert np.linalg.norm(p - q) <= np.linalg.norm(a - b) + 1e-12
    np.testing.assert_allclose(project(-a, power, mask), p, atol=1e-12)
    for _ in range(5):  # no feasible point is nearer to -a: the angle there is obtuse
        other = waterfill(rng.exponential(1, 12) + 1e-3, power, mask)
        assert (-a - p) @ (other - p) <= 1e-9


def test_torch_fills_alike_and_has_the_right_gradient():
    import torch

    rng = np.random.default_rng(3)
    for _ in range(60):
        n, power, mask = random_case(rng)
        ours = waterfill(n, power, mask)
        theirs = waterfill(torch.tensor(n), power, None if mask is None else torch.tensor(mask))
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-12, atol=1e-14)
    n = torch.tensor(rng.exponential(1, (2, 7)) + 0.05, requires_grad=True)
    power = torch.tensor([1.3, 2.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(rng.exponential(1, (2, 7)) + 0.2, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda n, p: waterfill(n, p, return_level=True), (n, power))
    assert check(lambda n, p, m: waterfill(n, p, m, return_level=True), (n, power, mask))


def test_reverse_waterfilling_spends_the_distortion_at_one_level():
    v = np.array([4.0, 1.0, 0.25, 0.0])
    fill = reverse_waterfill(v, 1.0)
    # Level t with min(t,4) + min(t,1) + min(t,.25) = 1: t = 0.375 above the third, which gives all it has.
    np.testing.assert_allclose(fill.distortion, [0.375, 0.375, 0.25, 0.0], atol=1e-15)
    np.testing.assert_allclose(
        fill.rate, [0.5 * np.log2(4 / 0.375), 0.5 * np.log2(1 / 0.375), 0, 0], atol=1e-12
    )
    assert float(fill.level) == pytest.approx(0.375)
    assert not reverse_waterfill(v, 100.0).rate.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.array([1.0, -1.0]), 1.0), "noise must be positive"),
        ((np.array([1.0, np.nan]), 1.0), "noise must be positive"),
        ((np.array([1.0, 1j]), 1.0), "noise must be real"),
        ((np.array([1.0]), -1.0), "power must be finite and at least 0"),
        ((np.array([1.0]), 1.0, np.array([-0.1])), "mask must be at least 0"),
        ((np.zeros((2, 0)), 1.0), "at least one channel"),
    ],
)
def test_waterfill_names_what_is_wrong(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        waterfill(*arguments)


# --- the game ---


def rayleigh(users: int, carriers: int, rho: float, seed: int) -> InterferenceGame:
    """Exponential power gains, cross gains scaled so that the certificate's radius is ``rho``."""
    rng = np.random.default_rng(seed)
    H = rng.exponential(1, (users, users, carriers))
    noise, power = rng.uniform(0.05, 0.2, (users, carriers)), np.ones(users)
    raw = InterferenceGame(H, noise, power).certificate().rho
    diagonal = np.arange(users)
    direct = H[diagonal, diagonal].copy()
    H *= rho / raw
    H[diagonal, diagonal] = direct
    return InterferenceGame(H, noise, power)


def crossed(gain: float = 2.0) -> InterferenceGame:
    H = np.full((2, 2, 2), gain)
    H[[0, 1], [0, 1]] = 1.0
    return InterferenceGame(H, np.full((2, 2), 0.1), np.ones(2))


BOTH_ON_FIRST = np.array([[1.0, 0.0], [1.0, 0.0]])


def test_two_users_reach_their_closed_form_equilibrium():
    # Gains 1, cross gain a of one on the other on carrier 0 only; both use both carriers, so each has
    # p_q0 - p_q1 = n_q1 - n_q0 - a p_r0, a linear system of two unknowns.
    a, noise = 0.5, np.array([[0.3, 0.4], [0.2, 0.5]])
    H = np.zeros((2, 2, 2))
    H[[0, 1], [0, 1]] = 1.0
    H[0, 1, 0] = H[1, 0, 0] = a
    first = np.linalg.solve([[2, a], [a, 2]], [1 + noise[0, 1] - noise[0, 0], 1 + noise[1, 1] - noise[1, 0]])
    for schedule in ("sequential", "simultaneous"):
        result = InterferenceGame(H, noise, [1, 1]).solve(schedule, tol=1e-13)
        assert result.converged
        np.testing.assert_allclose(result.p, np.stack([first, 1 - first], axis=1), atol=1e-12)


def test_one_carrier_each_is_a_closed_form_without_iterations():
    H = np.zeros((2, 2, 2))
    H[0, 0, 0] = H[1, 1, 1] = 2.0
    H[0, 1] = H[1, 0] = 0.7
    game = InterferenceGame(H, np.full((2, 2), 0.1), [3.0, 4.0])
    result = game.solve(tol=1e-12)
    np.testing.assert_allclose(result.p, [[3, 0], [0, 4]], atol=1e-12)
    np.testing.assert_allclose(game.rates(result.p), np.log2([1 + 2 * 3 / 0.1, 1 + 2 * 4 / 0.1]), rtol=1e-12)
    assert game.certificate().rho == 0


def test_the_known_cycle_is_reported_and_never_promised_away():
    game = crossed()
    certificate = game.certificate()
    assert certificate.rho == pytest.approx(2.0) and not certificate.unique
    assert "simultaneous" not in certificate.guaranteed and "asynchronous" not in certificate.guaranteed
    result = game.solve("simultaneous", start=BOTH_ON_FIRST)
    assert not result.converged and result.cause == "cycle of length 2" and result.error_bound is None
    sweep = FixedPoint(game, "sequential", start=BOTH_ON_FIRST)
    sweep.advance()
    np.testing.assert_allclose(sorted(sweep.p.tolist()), [[0, 1], [1, 0]], atol=1e-15)
    assert sweep.run().converged
    half = game.solve("simultaneous", start=BOTH_ON_FIRST, step=0.5)
    assert half.converged
    np.testing.assert_allclose(half.p, 0.5, atol=1e-8)


def test_three_users_who_chase_each_other_cycle_in_sequence_too():
    # User q hears only user q + 1, three times louder than itself, and leaves the carrier that it is on: of
    # three users on two carriers one always shares with the one it hears. Not symmetric, so no potential.
    H = np.zeros((3, 3, 2))
    for q in range(3):
        H[q, q], H[q, (q + 1) % 3] = 1.0, 3.0
    game = InterferenceGame(H, np.full((3, 2), 0.1), np.ones(3))
    assert game.certificate().guaranteed == ()
    result = game.solve("sequential", start=np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert not result.converged and result.cause.startswith("cycle of length ")
    assert game.solve("sequential", step=0.3, start=np.full((3, 2), 0.5)).converged


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_all_schedules_from_two_starts_agree_where_the_certificate_says_so(rho: float):
    for seed in range(10):
        game = rayleigh(10, 64, rho, seed)
        certificate = game.certificate()
        assert certificate.rho == pytest.approx(rho)
        assert certificate.guaranteed == ("sequential", "simultaneous", "asynchronous")
        rng = np.random.default_rng(100 + seed)
        starts = [np.zeros((10, 64)), waterfill(rng.exponential(1, (10, 64)) + 1e-6, np.ones(10))]
        ends = [
            game.solve(schedule, tol=1e-10, start=start)
            for schedule in ("sequential", "simultaneous", Asynchronous(0.5, 5, seed))
            for start in starts
        ]
        for end in ends:
            assert end.converged and end.error_bound is not None and end.error_bound < 1e-8
            assert np.abs(end.p - ends[0].p).max() < 1e-8
        # Contraction of every simultaneous step, in the norm of the certificate.
        run = FixedPoint(game, "simultaneous", start=starts[1])
        before, last = run.p.copy(), None
        for _ in range(8):
            run.advance()
            move = certificate.norm(run.p - before)
            if last is not None and last > 1e-9:
                assert move <= (rho + 1e-9) * last
            before, last = run.p.copy(), move


def test_flat_channels_contract_as_slowly_as_the_certificate_allows():
    # Direct gains 1 and one cross gain on all carriers: the worst carrier is every carrier, so rho is tight.
    H = np.full((4, 4, 6), 0.3)
    H[range(4), range(4)] = 1.0
    game = InterferenceGame(H, np.linspace(0.1, 0.2, 24).reshape(4, 6), np.ones(4))
    certificate = game.certificate()
    assert certificate.rho == pytest.approx(0.9)
    run = FixedPoint(game, "simultaneous", start=np.tile([0.9, 0.1, 0, 0, 0, 0], (4, 1)))
    factors, last = [], None
    for _ in range(25):
        before = run.p.copy()
        run.advance()
        move = certificate.norm(run.p - before)
        if last:
            factors.append(move / last)
        last = move
    assert max(factors) <= 0.9 + 1e-9 and max(factors) > 0.85
    assert run.run().converged


def test_the_bounds_hold():
    game = rayleigh(8, 32, 0.8, 5)
    certificate = game.certificate()
    exact = game.solve(tol=1e-13).p
    run = FixedPoint(game, "simultaneous", start=np.full((8, 32), 1 / 32))
    start = run.p.copy()
    run.advance()
    promised = certificate.rounds(1e-6, certificate.norm(run.p - start))
    for _ in range(6):
        bound = certificate.error_bound(run.residuals())
        assert bound is not None and certificate.norm(run.p - exact) <= bound + 1e-12
        run.advance()
    assert promised is not None
    end = FixedPoint(game, "simultaneous", start=start, tol=1e-15)
    for _ in range(promised):
        end.advance()
    assert certificate.norm(end.p - exact) <= 1e-6


def test_no_game_with_a_passing_certificate_fails_and_many_without_converge():
    rng = np.random.default_rng(7)
    passing = failing = converged_anyway = 0
    for seed in range(500):
        rho = float(rng.uniform(0.3, 4))
        game = rayleigh(4, 8, rho, seed)
        result = game.solve("simultaneous", tol=1e-8, max_iter=3000)
        if game.certificate().unique:
            passing += 1
            assert result.converged, (seed, rho, result.cause)
        else:
            failing += 1
            converged_anyway += result.converged
    assert passing > 60 and failing > 250
    assert converged_anyway > failing / 2  # sufficient, not necessary


@pytest.mark.parametrize("amplitude", [1e-3, 1e-2, 1e-1])
def test_measurement_errors_stay_under_their_bound(amplitude: float):
    game = rayleigh(6, 16, 0.7, 3)
    certificate, exact = game.certificate(), game.solve(tol=1e-12).p
    bound = certificate.noise_bound(np.full((6, 16), amplitude))
    assert bound is not None
    run = FixedPoint(NoisyGame(game, amplitude, np.random.default_rng(1)), "simultaneous")
    for _ in range(60):
        run.advance()
    worst = 0.0
    for _ in range(200):
        run.advance()
        worst = max(worst, certificate.norm(run.p - exact))
    assert 0 < worst <= bound
    # A decaying step averages the errors out.
    calm = FixedPoint(
        NoisyGame(game, amplitude, np.random.default_rng(2)), "simultaneous", step=DecayingStep()
    )
    for _ in range(1500):
        calm.advance()
    assert certificate.norm(calm.p - exact) < worst / 3


def test_symmetric_interference_lets_sequences_converge_without_a_radius_below_one():
    rng = np.random.default_rng(11)
    for _ in range(15):
        H = rng.exponential(2, (5, 5, 6))
        H = H + H.transpose(1, 0, 2)
        H[np.arange(5), np.arange(5)] = 1.0
        game = InterferenceGame(H, np.full((5, 6), 0.1), np.ones(5))
        certificate = game.certificate()
        assert certificate.rho > 1 and certificate.guaranteed == ("sequential",)
        assert game.solve("sequential", tol=1e-9).converged


def test_carriers_that_nobody_will_use_do_not_fail_a_certificate():
    # Carrier 1 interferes terribly but is so noisy for both that no play of the other makes it worth using.
    H = np.full((2, 2, 2), 0.2)
    H[[0, 1], [0, 1]] = 1.0
    H[0, 1, 1] = H[1, 0, 1] = 50.0
    game = InterferenceGame(H, np.array([[0.1, 9.0], [0.1, 9.0]]), np.ones(2))
    assert game.certificate().rho == pytest.approx(50.0)
    shrunk = game.certificate(shrink=True)
    assert shrunk.rho == pytest.approx(0.2) and shrunk.burn_in >= 1
    for schedule in ("sequential", "simultaneous", "asynchronous"):
        assert game.solve(schedule).converged


@given(st.integers(0, 10**6))
@settings(max_examples=40)
def test_reducible_interference_gets_weights_that_make_a_norm(seed: int):
    rng = np.random.default_rng(seed)
    from sharewell.allocation import certify

    S = np.triu(rng.exponential(1, (5, 5)), 1) * (rng.random((5, 5)) < 0.6)
    S[3:, 3:] = [[0, 0.9], [0.9, 0]]
    certificate = certify(S)
    assert certificate.rho == pytest.approx(0.9)
    assert certificate.weights.min() > 0 and certificate.factor < 1
    assert (S @ certificate.weights <= certificate.factor * certificate.weights + 1e-12).all()


def test_huge_ratios_do_not_overflow():
    H = np.zeros((1, 1, 2)) + 1e200
    game = InterferenceGame(H, np.full((1, 2), 1e-150), [1.0])
    rates = game.rates(game.solve().p)
    assert rates[0] == pytest.approx(2 * (350 * np.log2(10) - 1), rel=1e-9)


def test_a_user_that_never_updates_is_flagged_and_one_that_leaves_is_frozen():
    game = rayleigh(5, 8, 0.5, 1)
    schedule = Asynchronous((0.5, 0.5, 0.0, 0.5, 0.5), max_delay=3, seed=4)
    run = FixedPoint(game, schedule, max_iter=300)
    while run.tick <= 3 + 1 / 0.5:
        assert all(s.player != 2 for s in run.stalled())
        run.advance()
    run.advance()
    assert StalledUser(2, -1) in run.stalled()
    result = run.run()
    assert not result.converged and result.cause == "stalled users: 2"
    run = FixedPoint(game, schedule, max_iter=2000)
    run.run(50)
    run.leave(2, keep="zero")
    result = run.run()
    assert result.converged and not result.p[2].any() and not result.stalled
    # The others are where they would be without it.
    rest = [0, 1, 3, 4]
    smaller = InterferenceGame(game.H[np.ix_(rest, rest)], game.noise[rest], game.power[rest])
    np.testing.assert_allclose(result.p[rest], smaller.solve().p, atol=1e-8)
    last = FixedPoint(game, "sequential")
    last.advance()
    played = last.p[2].copy()
    last.leave(2, keep="last")
    np.testing.assert_array_equal(last.run().p[2], played)


@pytest.mark.parametrize(
    "schedule",
    ["sequential", "simultaneous", Asynchronous(0.4, 4, seed=9), Asynchronous(0.4, 4, seed=9, blocks=4)],
)
def test_a_saved_run_goes_on_to_the_last_bit(schedule, tmp_path):
    game = rayleigh(6, 16, 0.95, 2)
    whole = FixedPoint(game, schedule, tol=1e-11)
    part = FixedPoint(game, schedule, tol=1e-11)
    for _ in range(4):
        part.advance()
    part.save(tmp_path / "run.npz")
    resumed = FixedPoint.load(tmp_path / "run.npz", game)
    a, b = whole.run(), resumed.run()
    assert a.iterations == b.iterations and a.converged
    np.testing.assert_array_equal(a.p, b.p)
    np.testing.assert_array_equal(a.history, b.history)


def test_delayed_views_are_profiles_that_were_really_played():
    class Recorder:
        def __init__(self):
            self.seen = []

        def best_response(self, profile, player):
            self.seen.append(profile.copy())
            return profile[player] + 1.0  # every row of every profile names its own update count

    game = Recorder()
    run = FixedPoint(game, Asynchronous(0.7, 3, seed=1), start=np.zeros((4, 2)))
    played = [run.p.copy()]
    for _ in range(40):
        game.seen.clear()
        run.advance()
        for view in game.seen:
            for other in range(4):
                recent = [p[other].tolist() for p in played[-4:]]
                assert view[other].tolist() in recent
        played.append(run.p.copy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {**g, "H": -g["H"]}, "H must be free of negative values"),
        (lambda g: {**g, "H": g["H"] * np.nan}, "H must be finite"),
        (lambda g: {**g, "H": g["H"] * 1j}, "H must be real"),
        (lambda g: {**g, "H": g["H"][:, :1]}, "H must be .receivers, transmitters, carriers."),
        (lambda g: {**g, "noise": g["noise"] * 0}, "noise must be positive"),
        (lambda g: {**g, "noise": g["noise"][:, :1]}, "noise must be .users, carriers."),
        (lambda g: {**g, "power": -g["power"]}, "power must be free of negative values"),
        (lambda g: {**g, "power": g["power"][:1]}, "power must be .users."),
        (lambda g: {**g, "mask": np.zeros(3)}, "mask must be .users, carriers."),
        (lambda g: {**g, "H": g["H"] * (1 - np.eye(2))[:, :, None]}, "direct gains of user 0 are all zero"),
    ],
)
def test_a_bad_game_names_the_axis(change, message: str):
    game = {"H": np.ones((2, 2, 3)), "noise": np.ones((2, 3)), "power": np.ones(2)}
    with pytest.raises(ValueError, match=message):
        InterferenceGame(**change(game))


def test_a_silent_user_sends_nothing_when_it_is_allowed():
    H = np.ones((2, 2, 3))
    H[0, 0] = 0
    game = InterferenceGame(H, np.ones((2, 3)), np.ones(2), allow_silent=True)
    result = game.solve()
    assert result.converged and not result.p[0].any() and result.p[1].sum() == pytest.approx(1)
    assert game.rates(result.p)[0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.solve("random"), "schedule must be"),
        (lambda g: g.solve(step=0.0), "step must be"),
        (lambda g: g.solve(tol=0.0), "tol must be positive"),
        (lambda g: Asynchronous(0.0), "p_update must be"),
        (lambda g: Asynchronous(0.5, -1), "max_delay must be"),
        (lambda g: g.solve(Simultaneous(), max_iter=0), "max_iter must be"),
        (lambda g: FixedPoint(g).leave(7), "player must be in"),
    ],
)
def test_bad_settings_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(crossed())
