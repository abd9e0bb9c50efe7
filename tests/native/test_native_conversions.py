"""BF16 and FP8 conversions are bit for bit torch's, in the scalar and in the vectorised code."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from native_build import HERE, build, host_sources
from torch import Tensor

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("conversions") / "libconversions.so"
    sources = [HERE / "conversions.cpp", *host_sources("row_math")]
    return ctypes.CDLL(str(build(Path(target), sources, "-O3", "-shared", "-fPIC")))


def address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def all_bf16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def random_bits(n: int) -> Tensor:
    return (
        torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    )


def fp8_ties_and_neighbours() -> Tensor:
    """Every e4m3 value, every midpoint between two, and the floats beside them, both signs."""
    values = torch.arange(0, 0x7F, dtype=torch.uint8).view(FP8).float()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    near = [points, points.nextafter(torch.tensor(torch.inf)), points.nextafter(torch.tensor(0.0))]
    return torch.cat([*near, *(-p for p in near)])


def to_fp8(lib: ctypes.CDLL, floats: Tensor) -> Tensor:
    out = torch.full((floats.numel(),), 0x55, dtype=torch.uint8)
    lib.floats_to_fp8(address(floats), floats.numel(), address(out))
    return out


def torch_fp8(floats: Tensor) -> Tensor:
    """Saturating: torch itself makes NaN of what lies beyond 448; clamp leaves NaN alone."""
    return floats.clamp(-448.0, 448.0).to(FP8).view(torch.uint8)


@pytest.mark.parametrize(
    "floats",
    [
        pytest.param(all_bf16().float(), id="every-bf16"),
        pytest.param(fp8_ties_and_neighbours(), id="ties"),
        pytest.param(torch.tensor([0.0, -0.0, 447.9, 448.0, 464.0, -465.0, 1e30]), id="edges"),
    ],
)
def test_float_to_fp8_is_torchs(lib: ctypes.CDLL, floats: Tensor) -> None:
    floats = floats[~floats.isnan()].contiguous()
    assert torch.equal(to_fp8(lib, floats), torch_fp8(floats))


def test_float_to_fp8_of_random_floats_is_torchs(lib: ctypes.CDLL) -> None:
    exponents = torch.randint(-14, 12, (200_000,))
    floats = torch.ldexp(torch.randn(200_000), exponents)
    assert torch.equal(to_fp8(lib, floats), torch_fp8(floats))
    floats = random_bits(200_000)
    floats = floats[~floats.isnan()].contiguous()
    assert torch.equal(to_fp8(lib, floats), torch_fp8(floats))


def test_nan_becomes_fp8_nan(lib: ctypes.CDLL) -> None:
    nans = all_bf16().float()
    nans = nans[nans.isnan()].contiguous()
    assert nans.numel() == 254
    assert bool((to_fp8(lib, nans) & 0x7F == 0x7F).all())


def test_bf16_to_float_is_torchs_for_every_bf16(lib: ctypes.CDLL) -> None:
    bf16 = all_bf16()
    out = torch.full((bf16.numel(),), 7.0)
    lib.bf16_to_floats(address(bf16), bf16.numel(), address(out))
    assert torch.equal(out.view(torch.int32), bf16.float().view(torch.int32))


def test_float_to_bf16_is_torchs(lib: ctypes.CDLL) -> None:
    every = all_bf16().float()
    ties = (every.view(torch.int32) | 0x8000).view(torch.float32)
    beside = [(ties.view(torch.int32) + step).view(torch.float32) for step in (-1, 1)]
    floats = torch.cat([every, ties, *beside, random_bits(200_000)]).contiguous()
    for rounded in (to_bf16(lib, floats), round_row(lib, floats, 0), round_row(lib, floats, 1)):
        nan = floats.isnan()
        assert torch.equal(rounded.isnan(), nan)
        want = floats.to(torch.bfloat16)
        assert torch.equal(rounded.view(torch.int16)[~nan], want.view(torch.int16)[~nan])


def to_bf16(lib: ctypes.CDLL, floats: Tensor) -> Tensor:
    out = torch.full((floats.numel(),), 7.0, dtype=torch.bfloat16)
    lib.floats_to_bf16(address(floats), floats.numel(), address(out))
    return out


def round_row(lib: ctypes.CDLL, floats: Tensor, portable: int) -> Tensor:
    out = torch.full((floats.numel(),), 7.0, dtype=torch.bfloat16)
    lib.round_row(portable, address(floats), floats.numel(), address(out))
    return out


def rows_to_quantise() -> Tensor:
    """BF16 [groups, 128]: all sizes, zeros, groups below the least scale, infinities and NaNs."""
    sizes = torch.ldexp(torch.ones(1500), torch.randint(-40, 40, (1500,)))
    rows = (torch.randn(1500, 128) * sizes[:, None]).to(torch.bfloat16)
    special = torch.randn(6, 128).to(torch.bfloat16)
    special[0] = 0.0
    special[1] = -0.0
    special[2] *= 1e-7
    special[3, 5] = torch.inf
    special[4, 127] = torch.nan
    special[5] = torch.tensor([torch.nan, -torch.inf], dtype=torch.bfloat16).repeat(64)
    return torch.cat([rows, all_bf16().view(-1, 128), special])


@pytest.mark.parametrize("off_by", [-2, -1, 0, 1, 2])
def test_quotients_of_a_group_are_divisions_for_every_bf16(lib: ctypes.CDLL, off_by: int) -> None:
    """What CUDA kernels do instead of dividing, with reciprocals that are some units wrong."""
    amax = torch.cat([all_bf16().float(), torch.tensor([1e-4])])
    amax = amax[(amax >= 1e-4) & (amax <= 1e37)].contiguous()
    assert amax.numel() == 17440  # all but the least and the largest
    reciprocal = (torch.ones_like(amax) / amax).view(torch.int32).add(off_by).view(torch.float32)
    scale, inverse = torch.full_like(amax, 7.0), torch.full_like(amax, 7.0)
    lib.group_quotients(
        address(amax), address(reciprocal), amax.numel(), address(scale), address(inverse)
    )
    most = torch.full_like(amax, 448.0)
    assert torch.equal(scale, amax / most)
    assert torch.equal(inverse, most / amax)


@pytest.mark.parametrize("portable", [0, 1], ids=["fastest", "portable"])
def test_quantised_rows_are_torchs(lib: ctypes.CDLL, portable: int) -> None:
    rows = rows_to_quantise()
    values = torch.full(rows.shape, 0x55, dtype=torch.uint8)
    scales = torch.full((rows.shape[0],), 7.0)
    lib.quantise(portable, address(rows), rows.numel(), address(values), address(scales))

    wide = rows.float()
    # NaN has no size. Both divisions round once: `448 / tensor` would be a rounded reciprocal.
    amax = torch.where(wide.isnan(), 0.0, wide.abs()).amax(1).clamp(min=1e-4)
    most = torch.full_like(amax, 448.0)
    scaled = wide * (most / amax)[:, None]
    nan = scaled.isnan()
    assert torch.equal(values[~nan], torch_fp8(scaled)[~nan])
    assert bool((values[nan] & 0x7F == 0x7F).all())
    assert torch.equal(scales, amax / most)


@pytest.mark.parametrize("portable", [0, 1], ids=["fastest", "portable"])
def test_sums_travel_as_torchs_fp8(lib: ctypes.CDLL, portable: int) -> None:
    """Of any size: no group is too small for its scale but those below 1e-30."""
    sizes = torch.ldexp(torch.ones(1500), torch.randint(-110, 110, (1500,)))
    sums = torch.cat([torch.randn(1500, 128) * sizes[:, None], rows_to_quantise().float()])
    values = torch.full(sums.shape, 0x55, dtype=torch.uint8)
    scales = torch.full((sums.shape[0],), 7.0)
    lib.quantise_sum(portable, address(sums), sums.numel(), address(values), address(scales))
    amax = torch.where(sums.isnan(), 0.0, sums.abs()).amax(1).clamp(min=1e-30)
    most = torch.full_like(amax, 448.0)
    scaled = sums * (most / amax)[:, None]
    nan = scaled.isnan()
    assert torch.equal(values[~nan], torch_fp8(scaled)[~nan])
    assert bool((values[nan] & 0x7F == 0x7F).all())
    assert torch.equal(scales, amax / most)


@pytest.mark.parametrize("portable", [0, 1], ids=["fastest", "portable"])
def test_every_fp8_value_is_added_times_its_scale(lib: ctypes.CDLL, portable: int) -> None:
    values = torch.arange(256, dtype=torch.uint8)
    scales = torch.tensor([0.5, 4.0])
    start = torch.randint(-64, 64, (256,)).float()
    added = start.clone()
    lib.add_fp8(portable, address(values), address(scales), 256, address(added))
    exact = start + values.view(FP8).float() * scales.repeat_interleave(128)
    nan = exact.isnan()
    assert int(nan.sum()) == 2
    assert torch.equal(added.isnan(), nan)
    assert torch.equal(added[~nan], exact[~nan])


@pytest.mark.parametrize("portable", [0, 1], ids=["fastest", "portable"])
def test_sums_are_rounded_once(lib: ctypes.CDLL, portable: int) -> None:
    n = 4096 + 3  # vector loops have a rest
    row = (torch.rand(n) * 2 - 1).to(torch.bfloat16)
    row += row.sign()
    start = torch.randn(n).sign() * (torch.rand(n) + 0.5)
    added = start.clone()
    lib.add(portable, address(row), n, address(added))
    assert torch.equal(added, start + row.float())

    # Its last bit is set: products are longer than a float32 for certain.
    weight = ((torch.rand(()) + 0.5).view(torch.int32) | 1).view(torch.float32)
    fused = start.clone()
    lib.multiply_add(portable, ctypes.c_float(float(weight)), address(row), n, address(fused))
    # Sizes are so alike that float64 holds the sum exactly; rounding the product first is wrong.
    exact = start.double() + weight.double() * row.double()
    assert torch.equal(fused, exact.float())
    assert not torch.equal(fused, start + weight * row.float())
