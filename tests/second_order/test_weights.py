from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import PassError
from graphprune.second_order import weights as second_order
from graphprune.second_order.weights import (
    adapt,
    chosen,
    damped,
    damped_inverse,
    error_bound,
    live_inputs,
    obs_order_static,
    obs_prune_exact,
    obs_prune_static,
    obs_trace,
    output_error,
    refit,
    woodbury_inverse,
)


def _case(rows: int = 7, f: int = 12, n: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, moments and samples of correlated inputs, as behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    samples = (draw(n, f) @ draw(f, f)).relu()
    return draw(rows, f), samples.T @ samples / n, samples


def _brute_force(weight: Tensor, samples: Tensor, mask: Tensor) -> Tensor:
    """Solve the least squares problem of every row on the samples themselves."""
    result = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        if kept.any():
            wanted = samples @ weight[row]
            result[row, kept] = torch.linalg.lstsq(samples[:, kept], wanted[:, None]).solution[:, 0]
    return result


def test_cholesky_and_the_papers_recursion_agree() -> None:
    _, gram, samples = _case()
    for alpha in (1e2, 1e4, 1e6):
        mean = float(gram.diagonal().mean())
        by_cholesky = damped_inverse(gram, 1 / (alpha * mean))
        torch.testing.assert_close(woodbury_inverse(samples, alpha), by_cholesky, rtol=1e-6, atol=0)
    eye = torch.eye(len(gram), dtype=gram.dtype)
    torch.testing.assert_close(damped_inverse(gram, 0.0) @ gram, eye, rtol=0, atol=1e-9)


def test_dead_inputs_meet_no_other_and_their_weights_cost_nothing() -> None:
    weight, _, samples = _case()
    samples[:, [2, 5]] = 0
    gram = samples.T @ samples / len(samples)
    inverse = damped_inverse(gram, 0.01)
    live = live_inputs(gram)
    assert live.logical_not().nonzero().flatten().tolist() == [2, 5]
    assert inverse.isfinite().all()
    assert inverse[2].count_nonzero() == 1
    sensitivity = obs_order_static(weight, inverse, live)
    assert (sensitivity[:, [2, 5]] == 0).all()
    assert (sensitivity[:, live] > 0).all()
    mask = chosen(sensitivity, keep=7 * 10)
    assert torch.equal(mask, live.expand(7, -1))
    assert output_error(obs_prune_static(weight, inverse, mask, sensitivity) - weight, gram) < 1e-20
    assert not damped_inverse(torch.zeros(3, 3), 0.01).isnan().any()


def test_duplicate_inputs_need_damping() -> None:
    weight, _, samples = _case(n=12)
    samples[:, 3] = samples[:, 4]
    gram = samples.T @ samples / len(samples)
    with pytest.raises(PassError, match=r"12 inputs are singular .* larger damping, such as 0.01"):
        damped_inverse(gram, 0.0)
    assert damped_inverse(gram, 0.01).isfinite().all()
    # One of two equal inputs goes at no error, because the other takes over.
    moments = damped(gram, 1e-9)
    errors, _ = obs_trace(weight, moments)
    assert (errors.min(1).values < 1e-6 * output_error(weight, gram)).all()


def test_one_step_is_the_least_squares_update() -> None:
    weight, gram, samples = _case()
    inverse = damped_inverse(gram, 0.0)
    sensitivity = obs_order_static(weight, inverse)
    mask = chosen(sensitivity, keep=weight.numel() - 1)
    expected = _brute_force(weight, samples, mask)
    static = obs_prune_static(weight, inverse, mask, sensitivity)
    torch.testing.assert_close(static, expected)
    # The error of the step is twice the paper's sensitivity.
    error = output_error(expected - weight, gram)
    assert error == pytest.approx(2 * float(sensitivity[~mask]))


@pytest.mark.parametrize("keep", [70, 40, 10, 0])
def test_exact_and_refit_equal_least_squares_by_brute_force(keep: int) -> None:
    weight, gram, samples = _case()
    pruned = obs_prune_exact(weight, gram, keep=keep)
    assert int(pruned.count_nonzero()) == keep
    torch.testing.assert_close(pruned, _brute_force(weight, samples, pruned != 0))
    mask = chosen(weight.abs(), keep=keep)
    torch.testing.assert_close(refit(weight, gram, mask), _brute_force(weight, samples, mask))


def test_traces_are_the_true_errors() -> None:
    weight, gram, samples = _case(rows=3)
    errors, turns = obs_trace(weight, gram)
    assert torch.equal(turns.sort(1).values, torch.arange(12).expand(3, -1))
    for row in range(3):
        order = turns[row].argsort()
        removed = torch.zeros(12, dtype=torch.bool)
        total = highest = 0.0
        for column in order.tolist():
            options = []
            for other in (~removed).nonzero().flatten().tolist():
                mask = ~removed
                mask[other] = False
                fitted = _brute_force(weight[row : row + 1], samples, mask[None])
                options.append((output_error(fitted - weight[row : row + 1], gram), other))
            assert min(options)[1] == column  # the least of all that are left
            step, total = min(options)[0] - total, min(options)[0]
            highest = max(highest, step)
            assert float(errors[row, column]) == pytest.approx(highest, rel=1e-6)
            removed[column] = True


def test_wide_rows_lose_several_weights_at_once_and_are_still_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, gram, samples = _case(rows=4, f=40)
    one_by_one = obs_prune_exact(weight, gram, keep=32)
    monkeypatch.setattr(second_order, "STEPS", 8)
    monkeypatch.setattr(second_order, "_CELLS", 2 * 40 * 40)
    several = obs_prune_exact(weight, gram, keep=32)
    torch.testing.assert_close(several, _brute_force(weight, samples, several != 0))
    best = output_error(one_by_one - weight, gram)
    assert output_error(several - weight, gram) < 1.2 * best


def test_what_is_zero_stays_zero_and_is_not_counted_again() -> None:
    weight, gram, samples = _case()
    weight[:, ::3] = 0
    weight[2] = 0
    pruned = obs_prune_exact(weight, gram, keep=20)
    assert int(pruned.count_nonzero()) == 20
    assert (pruned[weight == 0] == 0).all()
    torch.testing.assert_close(pruned, _brute_force(weight, samples, pruned != 0))


def test_fixed_columns_stay() -> None:
    weight, gram, _ = _case()
    weight[:, -1] = 1e-6
    pruned = obs_prune_exact(weight, gram, keep=0, fixed=1)
    assert (pruned[:, :-1] == 0).all()
    assert (pruned[:, -1] != 0).all()
    mask = chosen(obs_order_static(weight, damped_inverse(gram)), keep=5, fixed=1)
    assert mask[:, -1].all()
    assert int(mask.sum()) == 5 + 7


def test_tolerance_bounds_the_sensitivity_of_what_goes() -> None:
    weight, gram, _ = _case()
    sensitivity = obs_order_static(weight, damped_inverse(gram, 0.0))
    tolerance = float(sensitivity.sqrt().median())
    mask = chosen(sensitivity, tolerance=tolerance)
    assert (sensitivity[~mask].sqrt() <= tolerance).all()
    assert (sensitivity[mask].sqrt() > tolerance).all()
    few, many = (obs_prune_exact(weight, gram, tolerance=t).count_nonzero() for t in (1.0, 0.1))
    assert few < many


@pytest.mark.parametrize("seed", range(3))
def test_exact_beats_static_beats_magnitude(seed: int) -> None:
    weight, gram, _ = _case(rows=32, f=64, n=2000, seed=seed)
    keep = weight.numel() // 2
    inverse = damped_inverse(gram, 1e-6)
    sensitivity = obs_order_static(weight, inverse)
    mask = chosen(sensitivity, keep=keep)
    by_magnitude = weight * chosen(weight.abs(), keep=keep)
    static = obs_prune_static(weight, inverse, mask, sensitivity)
    exact = obs_prune_exact(weight, gram, keep=keep)
    fitted = refit(weight, gram, mask)
    errors = [output_error(w - weight, gram) for w in (exact, fitted, static, by_magnitude)]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[2] < 0.8 * errors[3]


def test_adapt_makes_up_for_changed_inputs() -> None:
    weight, _, dense = _case()
    generator = torch.Generator().manual_seed(5)
    mix = torch.eye(12, dtype=torch.float64)
    mix += 0.2 * torch.randn(12, 12, generator=generator, dtype=torch.float64)
    samples = dense @ mix
    gram, cross = samples.T @ samples / len(dense), dense.T @ samples / len(dense)
    adapted = adapt(weight, gram, cross, 1e-9)
    torch.testing.assert_close(samples @ adapted.T, dense @ weight.T, rtol=1e-4, atol=1e-4)
    unchanged = adapt(weight, gram, gram, 0.01)
    torch.testing.assert_close(unchanged, weight)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_the_bound_holds_on_random_networks(seed: int, keep: float) -> None:
    torch.manual_seed(seed)
    sizes = torch.randint(4, 20, (5,)).tolist()
    layers = [nn.Linear(a, b).double() for a, b in itertools.pairwise(sizes)]
    x = torch.randn(200, sizes[0]).double()
    with torch.no_grad():
        dense = pruned = x
        errors, gains = [], []
        for number, layer in enumerate(layers):
            rows = torch.cat([dense, torch.ones(len(x), 1)], 1)
            weight = torch.cat([layer.weight, layer.bias[:, None]], 1)
            gram = rows.T @ rows / len(x)
            count = int(keep * layer.weight.numel())
            new = obs_prune_exact(weight, damped(gram, 0.01), keep=count, fixed=1)
            errors.append(output_error(new - weight, gram))
            gains.append(float(new[:, :-1].norm()))
            dense = layer(dense)
            pruned = pruned @ new[:, :-1].T + new[:, -1]
            measured = math.sqrt(float((dense - pruned).square().sum()) / len(x))
            assert measured <= error_bound(errors, gains) * (1 + 1e-9)
            assert number or measured == pytest.approx(error_bound(errors, gains))
            dense, pruned = dense.relu(), pruned.relu()


def test_errors() -> None:
    sensitivity = torch.rand(2, 3)
    with pytest.raises(PassError, match="either keep or tolerance, found keep=None tolerance=None"):
        chosen(sensitivity)
    with pytest.raises(PassError, match="expected to keep 0 to 4 weights of a layer, found 5"):
        chosen(sensitivity, keep=5, fixed=1)
