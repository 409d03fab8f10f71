"""Losses against momentum keys, banks and queues: loops in float64, lightly, hard inputs, ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import NTXentLoss
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses import (
    PairKeys,
    PairQueue,
    bank_log_normaliser,
    bank_nce,
    bank_softmax,
    bank_updated,
    enqueued,
    info_nce,
    moco,
    moco_v3,
    queued_info_nce,
)
from tests.ranks import run_ranks
from tests.training.losses.test_two_views import _with_gradients

_SCALE = torch.tensor(7.0, dtype=torch.float64)


def _unit(rows: int, seed: int, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)


def naive_moco_v3(query: torch.Tensor, key: torch.Tensor, temperature: Any) -> torch.Tensor:
    """One query after the other."""
    losses = []
    for number, one in enumerate(query):
        logits = torch.stack([one @ other for other in key]) / temperature
        losses.append(torch.logsumexp(logits, 0) - logits[number])
    factor = temperature.detach() if isinstance(temperature, torch.Tensor) else temperature
    return torch.stack(losses).mean() * 2 * factor


def naive_bank_softmax(
    features: torch.Tensor, bank: torch.Tensor, samples: torch.Tensor, temperature: Any
) -> torch.Tensor:
    """One sample after the other."""
    losses = []
    for one, sample in zip(features, samples, strict=True):
        logits = torch.stack([one @ entry for entry in bank]) / temperature
        losses.append(torch.logsumexp(logits, 0) - logits[sample])
    return torch.stack(losses).mean()


def naive_normaliser(
    features: torch.Tensor, bank: torch.Tensor, noise: torch.Tensor, temperature: Any
) -> torch.Tensor:
    """Equation 7 for each row, and the mean over rows."""
    values = []
    for one, entries in zip(features, noise, strict=True):
        total = sum((bank[entry] @ one / temperature).exp() for entry in entries)
        values.append(len(bank) / len(entries) * total)
    return torch.stack(values).mean().detach()


def naive_bank_nce(
    features: torch.Tensor,
    bank: torch.Tensor,
    samples: torch.Tensor,
    noise: torch.Tensor,
    normaliser: Any,
    temperature: Any,
) -> torch.Tensor:
    """Equations 4 to 6, in probabilities."""
    losses = []
    for one, sample, entries in zip(features, samples, noise, strict=True):

        def is_data(entry: Any, one: torch.Tensor = one, m: int = len(entries)) -> torch.Tensor:
            probability = (bank[entry] @ one / temperature).exp() / normaliser
            return probability / (probability + m / len(bank))

        loss = -is_data(sample).log()
        for entry in entries:
            loss = loss - (1 - is_data(entry)).log()
        losses.append(loss)
    return torch.stack(losses).mean()


def naive_bank_updated(
    bank: torch.Tensor, features: torch.Tensor, samples: torch.Tensor, momentum: float
) -> torch.Tensor:
    """One row after the other, each from the bank as it was."""
    result = bank.clone()
    for one, sample in zip(features.detach(), samples, strict=True):
        result[sample] = F.normalize(momentum * bank[sample] + (1 - momentum) * one, dim=0)
    return result


def naive_queued_info_nce(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: Any,
    queue: PairQueue,
    groups: torch.Tensor,
    keys: PairKeys | None = None,
    *,
    ignore: bool = False,
) -> torch.Tensor:
    """One query after the other, over an explicit list of keys."""
    key_image, key_text = (image, text) if keys is None else keys
    every_id = [int(one) for one in (*groups, *queue.groups_K)]
    losses = []
    for query, key, more in ((image, key_text, queue.text_KD), (text, key_image, queue.image_KD)):
        every_key = [*key, *more]
        for number, one in enumerate(query):
            same = [n for n, other in enumerate(every_id) if other == every_id[number]]
            met = [n for n in range(len(every_key)) if n == number or not (ignore and n in same)]
            logits = {n: scale * (one @ every_key[n]) for n in met}
            positives = [number] if ignore else same
            matched = torch.stack([logits[n] for n in positives]).mean()
            losses.append(torch.logsumexp(torch.stack(list(logits.values())), 0) - matched)
    return torch.stack(losses).mean()


def _agree(ours: Any, naive: Any, *tensors: torch.Tensor) -> None:
    value, gradients = _with_gradients(ours, *tensors)
    expected, wanted = _with_gradients(naive, *tensors)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-12)


_TEMPERATURE = torch.tensor(0.3, dtype=torch.float64)


@pytest.fixture(params=[2, 1 << 20])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("memory_bank", "momentum_keys", "queued_pairs"):
        place = f"clipsys.training.losses.{module}.auto_tile_size"
        monkeypatch.setattr(place, lambda *_: request.param)


@pytest.mark.usefixtures("_tiles")
def test_moco_v3_and_its_gradients_are_those_of_a_loop() -> None:
    key = _unit(7, 2)
    for temperature in (_TEMPERATURE, torch.tensor(1.0, dtype=torch.float64)):
        _agree(
            lambda q, t: moco_v3(q, key, t),
            lambda q, t: naive_moco_v3(q, key, t),
            _unit(7, 1),
            temperature,
        )


@pytest.mark.usefixtures("_tiles")
def test_bank_losses_and_their_gradients_are_those_of_loops() -> None:
    bank, samples = _unit(11, 3), torch.tensor([4, 0, 10, 4, 7])
    noise = torch.randint(11, (5, 6), generator=torch.Generator().manual_seed(1))
    features = _unit(5, 4)
    _agree(
        lambda f, t: bank_softmax(f, bank, samples, t),
        lambda f, t: naive_bank_softmax(f, bank, samples, t),
        features,
        _TEMPERATURE,
    )
    normaliser = naive_normaliser(features, bank, noise, 0.3)
    found = bank_log_normaliser(features, bank, noise, 0.3)
    torch.testing.assert_close(found.exp(), normaliser, rtol=1e-12, atol=0)
    _agree(
        lambda f, t: bank_nce(f, bank, samples, noise, found, t),
        lambda f, t: naive_bank_nce(f, bank, samples, noise, normaliser, t),
        features,
        _TEMPERATURE,
    )


def test_nce_with_much_noise_has_the_gradient_of_the_softmax() -> None:
    # Gutmann and Hyvärinen 2010: as m grows, and with the right Z, that of maximum likelihood.
    bank, features, samples = _unit(11, 3), _unit(1, 4), torch.tensor([4])
    noise = torch.arange(11).repeat(20_000)[None]
    log_z = torch.logsumexp(features @ bank.T / 0.3, 1)[0]
    _, (estimate,) = _with_gradients(
        lambda f: bank_nce(f, bank, samples, noise, log_z, 0.3), features
    )
    _, (exact,) = _with_gradients(lambda f: bank_softmax(f, bank, samples, 0.3), features)
    torch.testing.assert_close(estimate, exact, rtol=1e-3, atol=1e-4)


def test_the_bank_takes_the_last_row_of_a_sample_and_leaves_others_alone() -> None:
    bank, features = _unit(6, 1), _unit(4, 2)
    before, samples = bank.clone(), torch.tensor([2, 5, 2, 0])
    after = bank_updated(bank, features, samples, 0.25)
    torch.testing.assert_close(after, naive_bank_updated(bank, features, samples, 0.25))
    torch.testing.assert_close(after[2], F.normalize(0.25 * bank[2] + 0.75 * features[2], dim=0))
    assert torch.equal(after[[1, 3, 4]], before[[1, 3, 4]]) and torch.equal(bank, before)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("with_keys", [False, True])
def test_queued_info_nce_and_its_gradients_are_those_of_a_loop(
    ignore: bool, with_keys: bool
) -> None:
    # Samples 3 and 8 are in the queue too, and sample 3 twice in the batch.
    groups, queue = torch.tensor([3, 1, 8, 3]), torch.tensor([8, 2, 3, 5, 3, 9])
    pairs = PairQueue(_unit(6, 5), _unit(6, 6), queue)
    keys = PairKeys(_unit(4, 7), _unit(4, 8)) if with_keys else None
    _agree(
        lambda a, b, s: queued_info_nce(a, b, s, pairs, groups, keys, ignore_groups=ignore),
        lambda a, b, s: naive_queued_info_nce(a, b, s, pairs, groups, keys, ignore=ignore),
        _unit(4, 1),
        _unit(4, 2),
        _SCALE,
    )


def test_an_empty_queue_leaves_info_nce() -> None:
    groups = torch.tensor([3, 1, 8, 3])
    empty = PairQueue(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    _agree(
        lambda a, b, s: queued_info_nce(a, b, s, empty, groups),
        lambda a, b, s: info_nce(a, b, s, groups=groups),
        _unit(4, 1),
        _unit(4, 2),
        _SCALE,
    )


@pytest.mark.parametrize("size", [12, 10])
def test_moco_is_that_of_lightly_until_the_batch_does_not_divide_its_queue(size: int) -> None:
    # lightly's queue is float32, and takes no keys from an evaluation.
    theirs = NTXentLoss(0.2, memory_bank_size=(size, 5))
    queries, keys = (_unit(12, seed).float() for seed in (3, 4))
    theirs(queries, keys)  # draws its queue
    ours = theirs.memory_bank.bank.clone()
    for start in (0, 4, 8):
        rows = slice(start, start + 4)
        expected = theirs(queries[rows].clone().requires_grad_(), keys[rows])
        torch.testing.assert_close(moco(queries[rows], keys[rows], ours, 0.2), expected)
        ours = enqueued(ours, keys[rows])
    torch.testing.assert_close(ours, keys[-size:])
    # Of a batch that passes the end of its queue lightly (1.6.0) drops the rest.
    lacking = torch.cdist(ours, theirs.memory_bank.bank).amin(dim=1) > 1e-3
    assert lacking.tolist() == [False] * 8 + [size == 10] * (size - 8)


_EQUAL = F.normalize(torch.ones(8, 5), dim=-1)
_HARD = {
    "all features equal": (_EQUAL, _EQUAL, torch.arange(8)),
    "one class": (_EQUAL, _EQUAL + 1e-6, torch.zeros(8, dtype=torch.int64)),
    "unnormalised": (1e3 * torch.randn(8, 5), 1e3 * torch.randn(8, 5), torch.arange(8)),
    "zeros": (torch.zeros(8, 5), torch.zeros(8, 5), torch.arange(8)),
    "opposite": (torch.eye(8), -torch.eye(8), torch.arange(8)),
}


@pytest.mark.parametrize("case", _HARD)
def test_hard_inputs_at_a_low_temperature_stay_finite(case: str) -> None:
    features, others, groups = _HARD[case]
    noise = torch.arange(8).repeat(8, 1)
    log_z = bank_log_normaliser(features, others, noise, 0.01)
    queue = PairQueue(others, features, groups)
    for loss in (
        lambda a: moco_v3(a, others, 0.01),
        lambda a: bank_softmax(a, others, torch.arange(8), 0.01),
        lambda a: bank_nce(a, others, torch.arange(8), noise, log_z, 0.01),
        lambda a: queued_info_nce(a, others, torch.tensor(100.0), queue, groups),
        lambda a: queued_info_nce(
            a, others, torch.tensor(100.0), queue, groups, ignore_groups=True
        ),
    ):
        value, (gradient,) = _with_gradients(loss, features)
        assert bool(torch.isfinite(value)) and bool(torch.isfinite(gradient).all())
    bank = bank_updated(others, -others, torch.arange(8), 0.5)  # the average is zero
    assert bool(torch.isfinite(bank).all())


def test_losses_multiply_outside_of_autocast() -> None:
    features, bank = _unit(6, 1).float(), _unit(6, 2).float()
    noise = torch.arange(6).repeat(6, 1)
    for loss in (
        lambda a: moco_v3(a, bank),
        lambda a: bank_softmax(a, bank, torch.arange(6)),
        lambda a: bank_nce(a, bank, torch.arange(6), noise, 3.0),
    ):
        plain = _with_gradients(loss, features)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(_with_gradients(loss, features), plain, rtol=0, atol=0)


def _on_rank(rank: int, world_size: int) -> Any:
    rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    bank, samples = _unit(9, 3), torch.arange(12) % 7
    noise = torch.randint(9, (12, 4), generator=torch.Generator().manual_seed(1))
    image, text, key = (_unit(12, seed)[rows] for seed in (1, 2, 3))
    log_z = bank_log_normaliser(image, bank, noise[rows], 0.3)
    queue = PairQueue(_unit(5, 5), _unit(5, 6), torch.arange(5))
    losses = (
        lambda a, b: moco_v3(a, key) + 0 * b.sum(),
        lambda a, b: bank_softmax(a, bank, samples[rows], 0.3) + 0 * b.sum(),
        lambda a, b: bank_nce(a, bank, samples[rows], noise[rows], log_z, 0.3) + 0 * b.sum(),
        lambda a, b: queued_info_nce(a, b, _SCALE, queue, samples[rows]),
        lambda a, b: queued_info_nce(a, b, _SCALE, queue, samples[rows], PairKeys(key, key)),
    )
    found = [_with_gradients(loss, image, text) for loss in losses]
    state = bank_updated(bank, image, samples[rows], 0.5)
    return (
        [float(value) for value, _ in found],
        [[one.numpy() for one in gradients] for _, gradients in found],
        (log_z.numpy(), state.numpy()),
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_losses_the_gradients_and_the_bank_of_one(world_size: int) -> None:
    values, gradients, (log_z, bank) = _on_rank(0, 1)
    shares = run_ranks(_on_rank, world_size)
    np.testing.assert_allclose(np.mean([share[0] for share in shares], axis=0), values, rtol=1e-12)
    for loss, expected in enumerate(gradients):
        for number, one in enumerate(expected):
            # Averaged over ranks by DDP, hence so many times as large here.
            actual = np.concatenate([share[1][loss][number] for share in shares]) / world_size
            np.testing.assert_allclose(actual, one, atol=1e-14)
    for share in shares:
        np.testing.assert_allclose(share[2][0], log_z, rtol=1e-14)
        np.testing.assert_array_equal(share[2][0], shares[0][2][0])
        np.testing.assert_array_equal(share[2][1], bank)


def test_what_does_not_fit_is_named() -> None:
    four, bank, noise = _unit(4, 1), _unit(9, 2), torch.zeros(4, 2, dtype=torch.int64)
    samples = torch.tensor([0, 1, 9, 2])
    with pytest.raises(ConfigError, match=r"moco_v3: queries \(4, 5\) and keys \(3, 5\)"):
        moco_v3(four, four[:3])
    with pytest.raises(ConfigError, match="sample 9 has no entry in a bank of 9"):
        bank_softmax(four, bank, samples)
    with pytest.raises(ConfigError, match=r"bank_nce: samples \(3,\); expected \(4,\)"):
        bank_nce(four, bank, samples[:3], noise, 0.0)
    with pytest.raises(ConfigError, match=r"bank_nce: noise \(3, 2\) for 4 rows"):
        bank_nce(four, bank, samples % 9, noise[:3], 0.0)
    with pytest.raises(
        ConfigError, match=r"bank_updated: features \(4, 3\) and a bank of \(9, 5\)"
    ):
        bank_updated(bank, four[:, :3], samples)
    queue = PairQueue(bank, bank[:8], torch.arange(9))
    with pytest.raises(ConfigError, match=r"the queue's texts have shape \(8, 5\)"):
        queued_info_nce(four, four, _SCALE, queue, samples)
    with pytest.raises(ConfigError, match=r"groups has shape \(3,\); expected \(4,\)"):
        queued_info_nce(four, four, _SCALE, PairQueue(bank, bank, torch.arange(9)), samples[:3])


def test_at_a_low_temperature_the_normaliser_itself_would_not_fit_float32() -> None:
    log_z = bank_log_normaliser(_EQUAL, _EQUAL, torch.arange(8).repeat(8, 1), 0.01)
    assert float(log_z) == pytest.approx(100 + math.log(8), rel=1e-6)
    assert torch.isinf(log_z.float().exp())
