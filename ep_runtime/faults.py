"""From a fault record to the exception that says what to do."""

from __future__ import annotations

from ep_runtime.errors import (
    DesyncError,
    EpError,
    PeerTimeout,
    RoutingFault,
)
from ep_runtime.native import _C

_OP = {_C.OP_DISPATCH: "dispatch", _C.OP_COMBINE: "combine"}
_NORMAL_OP = {
    _C.OP_NORMAL_NOTIFY: "the notify of a normal dispatch",
    _C.OP_NORMAL_DISPATCH: "a normal dispatch",
    _C.OP_NORMAL_COMBINE: "a normal combine",
}
_AFTER = (
    "results since then are undefined and operations do nothing: call reset() on every rank, or"
    " end the group"
)


def fatal_error(fault: _C.Fault, budget_s: float) -> EpError:
    """The error of a fatal record. `budget_s`: the time budget that this rank runs under."""
    where = _where(fault)
    if fault.code == _C.FAULT_TIMEOUT:
        return PeerTimeout(
            f"rank {fault.peer} did not arrive at {where}: rank {fault.rank} waited for epoch"
            f" {fault.expected} and saw {fault.seen} for longer than the time budget of"
            f" {budget_s:g} s; look at rank {fault.peer}'s log (if it is well, it issued other"
            f" operations than rank {fault.rank}); {_AFTER}",
            rank=fault.rank,
            peer=fault.peer,
        )
    if fault.code == _C.FAULT_ABORTED:
        return _told(fault, where)
    if fault.code == _C.FAULT_DESYNC:
        return DesyncError(
            f"rank {fault.peer} is ahead of rank {fault.rank} at {where}: epoch {fault.seen} where"
            f" {fault.expected} was due; every rank must issue (or replay) the same sequence of"
            f" operations on a chain; {_AFTER}"
        )
    if fault.code == _C.FAULT_COUNT:
        return _count_error(fault, where)
    if fault.code == _C.FAULT_TERMS and fault.op in _NORMAL_OP:
        return DesyncError(
            f"rank {fault.peer} works at {where} with {_normal_terms(fault.seen)}, rank"
            f" {fault.rank} with {_normal_terms(fault.expected)}: give every rank rows of the same"
            " width and format, the same K (topk_weights on all ranks or none in a combine) and"
            f" number of experts, also one without tokens; {_AFTER}"
        )
    if fault.code == _C.FAULT_TERMS:
        return DesyncError(
            f"rank {fault.peer} works at {where} with {_terms(fault, fault.seen)}, rank"
            f" {fault.rank} with {_terms(fault, fault.expected)}: give every rank the same mask,"
            " formats, way of passing topk_weights (with the dispatch, or with the combine) and, in"
            f" a combine, the handle of the same dispatch; {_AFTER}"
        )
    return DesyncError(f"unknown fault code {fault.code} at {where}; {_AFTER}")


def _count_error(fault: _C.Fault, where: str) -> DesyncError:
    """More than there is room for: announced by the peer, or (a normal dispatch) meant for it."""
    if fault.op == _C.OP_NORMAL_DISPATCH:
        return DesyncError(
            f"rank {fault.rank} has more for rank {fault.peer} in {where} than it may write there:"
            f" {fault.seen} where at most {fault.expected} fit. With num_worst_tokens: pass a"
            " larger one on every rank (the number of ranks times the most tokens of any rank"
            " always suffices). Else ranks used different handles, a heap is damaged or a build"
            f" differs; {_AFTER}"
        )
    cause = "its heap is damaged or its build differs"
    if fault.op == _C.OP_NORMAL_NOTIFY:
        cause = f"the layout it passed is not that of its tokens, {cause}"
    return DesyncError(
        f"rank {fault.peer} announced {fault.seen} at {where} where at most {fault.expected}"
        f" fit: {cause}; {_AFTER}"
    )


def _terms(fault: _C.Fault, word: int) -> str:
    """What ranks agree on, as csrc/ep/state.h packs it: the mask's digest (of up to 32 ranks the
    mask itself), how rows travel, and of a combine whether it brings weights and its dispatch."""
    mask, wire = word & 0xFFFFFFFF, word >> 32 & 0xFF
    rounded, late, dispatched = word >> 40 & 1, word >> 41 & 1, word >> 48
    names = {_C.WIRE_BF16: "bf16", _C.WIRE_FP8: "fp8", _C.WIRE_OPAQUE: "opaque"}
    rows = f"rank mask {mask:#x} and {names.get(wire, 'unknown')} rows"
    if fault.op == _C.OP_COMBINE:
        of = f", of dispatch {dispatched}"  # its low 16 bits
        return f"{rows}{' that bring weights' if late else ''}{of}"
    return f"{rows} with power-of-two scales" if rounded else rows


def _normal_terms(word: int) -> str:
    """As csrc/ep/normal.h packs them."""
    width, scales = (word >> 1 & 0x7FFF) * 16, word >> 16 & 0xFFFF
    topk, experts = word >> 32 & 0xFF, word >> 40 & 0xFFFF
    of_experts = f", {experts} experts" if experts else ""
    return f"rows of {width} bytes and {scales} scales, K={topk}{of_experts}"


def _where(fault: _C.Fault) -> str:
    if fault.op in _NORMAL_OP:
        return _NORMAL_OP[fault.op]
    return f"{_OP.get(fault.op, 'operation')} on chain {fault.chain}"


def _told(fault: _C.Fault, where: str) -> EpError:
    """Another rank ended the group; `seen` holds its own fault's code."""
    if fault.seen == _C.FAULT_TIMEOUT:
        return PeerTimeout(
            f"rank {fault.rank} gave up waiting for rank {fault.peer} and told this rank, which"
            f" left {where}; look at rank {fault.peer}'s log; {_AFTER}",
            rank=fault.rank,
            peer=fault.peer,
        )
    cause = {
        _C.FAULT_DESYNC: f"found rank {fault.peer} ahead of it",
        _C.FAULT_COUNT: f"found more than there is room for, from or for rank {fault.peer}"
        if fault.op in _NORMAL_OP
        else f"got impossible counts from rank {fault.peer}",
        _C.FAULT_TERMS: f"found rank {fault.peer} with another rank mask, format or handle, or its"
        " weights elsewhere",
    }.get(fault.seen, f"failed with code {fault.seen}")
    return DesyncError(
        f"rank {fault.rank} {cause} and told this rank, which left {where}; look at rank"
        f" {fault.rank}'s error; {_AFTER}"
    )


def routing_error(fault: _C.Fault, dropped: int) -> RoutingFault:
    """The error of a routing record: `dropped` entries were treated as no expert since the last."""
    return RoutingFault(
        f"{dropped} entries of topk_idx were out of range or named an expert twice in one token"
        f" ({_where(fault)}, for example {_signed(fault.seen)}); experts are 0 .."
        f" {fault.expected - 1}, -1 means none; those entries were treated as no expert and the"
        " group works on: correct the router and call again (this call launched nothing)"
    )


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
