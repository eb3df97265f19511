"""Rotations against matrices that NumPy makes from the definitions, and their own defining laws."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from quant.quantizers.hadamard import Rotation, hartley, paley, random_hadamard

WIDTHS = [1, 2, 3, 4, 12, 20, 25, 28, 32, 36, 40, 60, 64, 80, 96, 100, 128, 256, 576, 1280, 1536]


def dense(rotation: Rotation) -> np.ndarray:
    return rotation.rotate_columns(torch.eye(rotation.width)).numpy()


def sylvester(order: int) -> np.ndarray:
    """Sylvester's construction, as QuaRot gives it in section 2."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return matrix


@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotation_is_orthogonal_and_spreads_every_coordinate(width):
    q = dense(random_hadamard(width, "seed"))
    assert np.abs(q @ q.T - np.eye(width)).max() < 1e-12
    # A Hadamard matrix spreads evenly; the transform in its place by a root of two at most.
    assert np.abs(q).max() * width**0.5 < 2**0.5 + 1e-12


@pytest.mark.parametrize("width", [1, 2, 12, 20, 28, 64, 80, 96, 128, 576, 1280, 2048, 3072])
def test_widths_of_released_models_have_hadamard_matrices(width):
    rows = torch.eye(width)[[0, width // 2, width - 1]]
    spread = random_hadamard(width, "seed").rotate_columns(rows) * width**0.5
    torch.testing.assert_close(spread.abs(), torch.ones_like(spread), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [2, 16, 64, 512])
def test_a_power_of_two_is_sylvesters_matrix_behind_signs(width):
    rotation = random_hadamard(width, "seed")
    expected = rotation.signs.numpy()[:, None] * sylvester(width) / width**0.5
    np.testing.assert_allclose(dense(rotation), expected, rtol=0, atol=1e-14)
    assert set(rotation.signs.tolist()) == {1.0, -1.0}


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 60, 72, 76, 84])
def test_paleys_matrices_are_hadamard_matrices(order):
    matrix = paley(order).numpy()
    assert set(np.unique(matrix)) == {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [2, 6, 16, 40, 52, 92])
def test_orders_that_paley_gives_nothing_for(order):
    with pytest.raises(ValueError, match=f"no Paley matrix of order {order}"):
        paley(order)


@pytest.mark.parametrize("order", [1, 3, 5, 25, 49])
def test_the_hartley_transform_is_the_real_and_imaginary_part_of_fouriers(order):
    fourier = np.fft.fft(np.eye(order)) / order**0.5
    np.testing.assert_allclose(hartley(order), fourier.real - fourier.imag, atol=1e-12)


def test_columns_and_rows_are_products_with_the_matrix():
    rotation = random_hadamard(12, "seed", blocks=3)
    q, draw = dense(rotation), np.random.default_rng(0)
    for block in range(3):  # and nothing mixes over blocks
        rest = np.delete(q[12 * block : 12 * block + 12], slice(12 * block, 12 * block + 12), 1)
        assert not rest.any()
    weight = draw.standard_normal((5, 36))
    np.testing.assert_allclose(
        rotation.rotate_columns(torch.from_numpy(weight)), weight @ q, atol=1e-12
    )
    np.testing.assert_allclose(
        rotation.rotate_rows(torch.from_numpy(weight.T)), q.T @ weight.T, atol=1e-12
    )
    part = rotation.part(12, 36)
    np.testing.assert_array_equal(dense(part), q[12:, 12:])


def test_query_heads_of_a_group_share_a_block():
    rotation = random_hadamard(4, "seed", blocks=2)
    blocks = [dense(rotation.part(0, 4)), dense(rotation.part(4, 8))]
    repeated = dense(rotation.repeated(3))
    for head in range(6):
        at = slice(4 * head, 4 * head + 4)
        np.testing.assert_array_equal(repeated[at, at], blocks[head // 3])
    assert np.count_nonzero(repeated) == 6 * 16


def test_a_seed_decides_every_sign():
    first, again = (random_hadamard(64, "a", blocks=2) for _ in range(2))
    assert torch.equal(first.signs, again.signs)
    # Of SHAKE256, so no other machine or version of torch draws others.
    assert first.signs[:8].tolist() == [
        1.0 - 2 * (byte % 2) for byte in hashlib.shake_256(b"a").digest(8)
    ]
    assert not torch.equal(first.signs, random_hadamard(64, "b", blocks=2).signs)
    assert not torch.equal(first.signs[:64], first.signs[64:])


def test_a_wide_column_no_longer_sets_the_scale():
    """What rotations are for: the largest of a row, over its root mean square."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).double()
    weight[:, 3] *= 20

    def peak(rows: torch.Tensor) -> float:
        return float((rows.abs().amax(1) / rows.square().mean(1).sqrt()).mean())

    rotated = random_hadamard(256, "seed").rotate_columns(weight)
    assert peak(rotated) < 0.5 * peak(weight)
