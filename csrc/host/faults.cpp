#include "host/faults.h"

#include "host/atomics.h"
#include "host/masks.h"

namespace ep::host {
namespace {

// `code` is released last; paired with the acquire in read_fault. `count` is kept by its owner.
void publish(Fault* record, const Fault& value) {
    record->op = value.op;
    record->chain = value.chain;
    record->rank = value.rank;
    record->peer = value.peer;
    record->expected = value.expected;
    record->seen = value.seen;
    __atomic_store_n(&record->code, value.code, __ATOMIC_RELEASE);
}

void record_fatal(const Context& context, const Fault& value) {
    if (replace_zero<uint32_t>(&context.faults->claimed, 1)) {
        publish(&context.faults->fatal, value);
    }
}

Fault make_fault(Where where, FaultCode code, int rank, int peer, uint64_t expected,
                 uint64_t seen) {
    return Fault{static_cast<uint32_t>(code),
                 static_cast<uint32_t>(where.op),
                 where.chain,
                 rank,
                 peer,
                 0,
                 expected,
                 seen};
}

}  // namespace

void fail(const Context& context, Where where, FaultCode code, int peer, uint64_t expected,
          uint64_t seen) {
    const int me = context.names.of(context.rank), other = context.names.of(peer);
    record_fatal(context, make_fault(where, code, me, other, expected, seen));
    const uint64_t word = pack_abort(code, me, other);
    const Masks masks(context);
    for (int r = 0; r < context.shape.num_ranks; ++r) {
        if (masks.has(r) && r != context.rank) continue;
        // The first cause stays, but for what a masked rank said, which stops nobody.
        if (replace_zero(context.abort_word(r), word)) continue;
        const uint64_t first = load_relaxed(context.abort_word(r));
        if (first != 0 && masks.has(abort_rank(first))) {
            replace(context.abort_word(r), first, word);
        }
    }
}

bool may_run(const Context& context, Where where) {
    const uint64_t word = load_relaxed(context.abort_word(context.rank));
    if (word == 0) return true;
    if (Masks(context).has(abort_rank(word))) {  // not one of us: the next cause may come
        replace(context.abort_word(context.rank), word, uint64_t{0});
        return true;
    }
    record_fatal(context, make_fault(where, FaultCode::kAborted, abort_rank(word), abort_peer(word),
                                     /*expected=*/0, word >> 32));
    return false;
}

void record_routing(const Context& context, Where where, uint32_t dropped, int64_t first) {
    FaultBoard* board = context.faults;
    __atomic_fetch_add(&board->routing.count, dropped, __ATOMIC_RELAXED);
    if (!replace_zero<uint32_t>(&board->routing_claimed, 1)) return;
    publish(&board->routing, make_fault(where, FaultCode::kRouting, context.rank, /*peer=*/-1,
                                        static_cast<uint64_t>(context.shape.num_experts),
                                        static_cast<uint64_t>(first)));
}

std::optional<Fault> read_fault(const Fault& record) {
    const uint32_t code = __atomic_load_n(&record.code, __ATOMIC_ACQUIRE);
    if (code == 0) return std::nullopt;
    const uint32_t count = __atomic_load_n(&record.count, __ATOMIC_RELAXED);
    return Fault{code,        record.op, record.chain,    record.rank,
                 record.peer, count,     record.expected, record.seen};
}

void clear_faults(FaultBoard* board) {
    for (Fault* record : {&board->fatal, &board->routing}) {
        __atomic_store_n(&record->code, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&record->count, 0, __ATOMIC_RELAXED);
    }
    // Released after the records are empty: who claims next finds them so.
    __atomic_store_n(&board->claimed, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&board->routing_claimed, 0, __ATOMIC_RELEASE);
}

}  // namespace ep::host
