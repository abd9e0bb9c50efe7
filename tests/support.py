"""Random inputs, and what it means that a result is right. Shared by tests of every backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_runtime import EpConfig, reference
from ep_runtime.reference import Combined, Expected, RankInput

SEED: int | None = None  # a number repeats a failed test's inputs; None: fresh ones every time
POISON_BYTE = 0xFF  # NaN as fp8, bf16 and f32; -1 as an integer
POISON_INT = -77


@dataclass
class Snapshot:
    """A Received, copied to the CPU."""

    x: torch.Tensor
    scales: torch.Tensor | None
    recv_count: torch.Tensor
    expert_offset: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_messages: torch.Tensor
    source_token: torch.Tensor | None
    layout_range: torch.Tensor | None


def new_rng() -> torch.Generator:
    """Fresh random inputs; a failing test's output shows the seed."""
    rng = torch.Generator()
    seed = rng.seed() if SEED is None else SEED
    print(f"inputs: support.SEED = {seed}")
    return rng.manual_seed(seed)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: [..., bytes of the last dimension]."""
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def poison(tensor: torch.Tensor | None, *, as_bytes: bool = False) -> None:
    """Overwrite with what no operation leaves behind. as_bytes: integers too become POISON_BYTE."""
    if tensor is None:
        return
    if tensor.dtype in (torch.int32, torch.int64) and not as_bytes:
        tensor.fill_(POISON_INT)
        return
    if tensor.stride(-1) != 1:  # column-major scales
        tensor = tensor.transpose(-1, -2)
    tensor.view(torch.uint8).fill_(POISON_BYTE)


def random_config(
    rng: torch.Generator, num_ranks: int, hidden: int, topk: int, **more: object
) -> EpConfig:
    """A configuration whose experts outnumber topk, over `num_ranks` ranks."""
    experts = -(-max(topk, num_ranks) // num_ranks) + _below(rng, 4)
    values = {"num_experts": experts * num_ranks, "topk": topk, "hidden": hidden, "max_tokens": 24}
    return EpConfig(**{**values, **more})  # type: ignore[arg-type]


def _below(rng: torch.Generator, end: int) -> int:
    return int(torch.randint(end, (), generator=rng))


def random_counts(rng: torch.Generator, num_ranks: int, most: int) -> list[int]:
    """Tokens per rank: uneven, with an empty and a full rank more often than chance has it."""
    choices = [0, most, 1, _below(rng, most + 1), _below(rng, most + 1)]
    return [choices[_below(rng, len(choices))] for _ in range(num_ranks)]


def random_rows(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """bf16 rows over many magnitudes, some channels zero."""
    rows = torch.randn(shape, generator=rng)
    if shape[0]:
        rows *= torch.exp2(torch.randint(-12, 8, (*shape[:-1], 1), generator=rng).float())
        rows[torch.rand(shape, generator=rng) < 0.05] = 0.0
    return rows.bfloat16()


def random_routes(rng: torch.Generator, config: EpConfig, rows: int) -> torch.Tensor:
    """[rows, K] int64: distinct experts per token, some entries -1, some tokens without any."""
    scores = torch.rand((rows, config.num_experts), generator=rng)
    idx = scores.argsort(dim=1)[:, : config.topk].contiguous()
    idx[torch.rand(idx.shape, generator=rng) < 0.15] = -1
    idx[torch.rand((rows,), generator=rng) < 0.1] = -1
    return idx


def random_input(
    rng: torch.Generator, config: EpConfig, rows: int, *, num_tokens: int | None = None
) -> RankInput:
    """What one rank dispatches. Routes are int32 or int64 by chance."""
    idx = random_routes(rng, config, rows)
    if _below(rng, 2):
        idx = idx.int()
    weights = torch.rand((rows, config.topk), generator=rng) * 2 - 0.5
    if config.dispatch_format != "opaque":
        return RankInput(random_rows(rng, rows, config.hidden), idx, weights, num_tokens)
    x = torch.randint(256, (rows, config.opaque_row_bytes), generator=rng, dtype=torch.uint8)
    words, scales = config.opaque_scale_words, None
    if words:
        scales = torch.randint(-(2**31), 2**31, (rows, words), generator=rng, dtype=torch.int32)
    return RankInput(x, idx, weights, num_tokens, scales)


def random_inputs(
    rng: torch.Generator, config: EpConfig, num_ranks: int, *, padded: bool = False
) -> list[RankInput]:
    """What every rank dispatches. padded: by chance fewer rows are real than the tensors have."""
    inputs = []
    for rows in random_counts(rng, num_ranks, config.max_tokens):
        real = _below(rng, rows + 3) if padded and _below(rng, 2) else None
        inputs.append(random_input(rng, config, rows, num_tokens=real))
    return inputs


def random_outputs(
    rng: torch.Generator, expected: list[Expected], hidden: int | None = None
) -> list[torch.Tensor]:
    """Expert results in the shape of x: random where a row is defined, else NaN.

    hidden: their channels, where rows of x are opaque bytes.
    """
    outputs = []
    for one in expected:
        y = random_rows(rng, *one.x.shape[:-1], one.x.shape[-1] if hidden is None else hidden)
        y[~one.valid] = float("nan")
        outputs.append(y)
    return outputs


def check_received(got: list[Snapshot], expected: list[Expected]) -> None:
    """Every rank received exactly the expected bits, and nothing was written beside them."""
    for rank, (mine, right) in enumerate(zip(got, expected, strict=True)):
        where = f"rank {rank}"
        for name in ("num_messages", "recv_count", "expert_offset", "topk_idx", "layout_range"):
            value, wanted = getattr(mine, name), getattr(right, name)
            assert (value is None) == (wanted is None), f"{where}: {name}"
            if wanted is not None:
                assert torch.equal(value, wanted), f"{where}: {name} {value} != {wanted}"
        assert mine.x.dtype == right.x.dtype
        _check_rows(f"{where}: x", mine.x, right.x, right.valid)
        assert (mine.scales is None) == (right.scales is None)
        if mine.scales is not None and right.scales is not None:
            assert mine.scales.dtype == right.scales.dtype
            _check_rows(f"{where}: scales", mine.scales, right.scales, right.valid)
        assert (mine.source_token is None) == (right.source_token is None)
        if mine.source_token is not None and right.source_token is not None:
            tokens, wanted = mine.source_token[..., None], right.source_token[..., None]
            _check_rows(f"{where}: source_token", tokens, wanted, right.valid)
        if mine.topk_weights is not None and right.topk_weights is not None:
            _check_bits(f"{where}: weights", mine.topk_weights, right.topk_weights, right.valid)


def _check_bits(
    what: str, got: torch.Tensor, wanted: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    bits, right = raw(got), raw(wanted)
    assert bits.shape == right.shape, what
    wrong = (bits != right).any(-1) & valid
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {int(valid.sum())} rows differ"
    return bits


def _check_rows(what: str, got: torch.Tensor, wanted: torch.Tensor, valid: torch.Tensor) -> None:
    bits = _check_bits(what, got, wanted, valid)
    stray = (bits != POISON_BYTE).any(-1) & ~valid
    assert not stray.any(), f"{what}: {int(stray.sum())} rows were written that nobody sent"


def check_combined(
    got: list[torch.Tensor],
    config: EpConfig,
    inputs: list[RankInput],
    outputs: list[torch.Tensor],
) -> None:
    """Every rank's result lies within BF16 rounding of FP64, and an ulp of the fixed order."""
    exact = reference.combine(config, inputs, outputs)
    ordered = reference.combine_in_order(config, inputs, outputs)
    for rank, (mine, right, same) in enumerate(zip(got, exact, ordered, strict=True)):
        _check_close(rank, mine, right)
        apart = ulps_apart(mine, same)
        assert apart.numel() == 0 or int(apart.max()) <= 1, f"rank {rank}: {int(apart.max())} ulps"
        # Twice-rounded emulation of fma is right nearly always; more would be another order.
        assert int((apart > 0).sum()) <= max(4, mine.numel() // 1000), f"rank {rank}"


def _check_close(rank: int, got: torch.Tensor, right: Combined) -> None:
    error = (got.double() - right.exact).abs()
    wrong = ~(error <= right.bound)
    assert not wrong.any(), (
        f"rank {rank}: {int(wrong.sum())} of {wrong.numel()} values off by up to"
        f" {float((error / right.bound).nan_to_num(float('inf')).max()):.3g} bounds"
    )


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many BF16 numbers lie between, elementwise."""
    return (_rank_of(a) - _rank_of(b)).abs()


def _rank_of(x: torch.Tensor) -> torch.Tensor:
    bits = x.bfloat16().contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
