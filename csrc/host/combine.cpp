#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "ep/fp8.h"
#include "host/atomics.h"
#include "host/faults.h"
#include "host/host_rank.h"
#include "host/masks.h"
#include "host/row_math.h"
#include "host/waiter.h"

namespace ep::host {
namespace {

// The weighted sum of one message's rows, in k order. `late`: its source's table of weights, where
// they came with the combine. (What a peer says of an entry stays within the table.)
void reduce_message(const Context& context, const RowRef* refs, const CombineInput& in,
                    const float* late, std::vector<float>* sum) {
    const auto entries = static_cast<uint32_t>(context.shape.max_tokens * context.shape.topk);
    sum->assign(context.shape.hidden, 0.0f);
    for (int k = 0; k < context.shape.topk && refs[k].row >= 0; ++k) {
        const uint16_t* row = in.y + refs[k].row * in.row_stride;
        const uint32_t entry = std::min(float_to_bits(refs[k].weight), entries - 1);
        const float weight = late == nullptr ? refs[k].weight : late[entry];
        row_math().multiply_add(weight, row, context.shape.hidden, sum->data());
    }
}

// A sum into its slot, as it travels (SumLayout in ep/layout.h).
void write_sum(const Context& context, Wire wire, const std::vector<float>& sum, uint8_t* slot) {
    const int hidden = context.shape.hidden;
    if (wire == Wire::kFp8) {
        row_math().quantise_sum(sum.data(), hidden, slot, reinterpret_cast<float*>(slot + hidden));
    } else {
        row_math().round(sum.data(), hidden, reinterpret_cast<uint16_t*>(slot));
    }
}

void add_sum(const Context& context, Wire wire, const uint8_t* slot, std::vector<float>* sum) {
    const int hidden = context.shape.hidden;
    if (wire == Wire::kFp8) {
        const auto* scales = reinterpret_cast<const float*>(slot + hidden);
        row_math().add_fp8(slot, scales, hidden, sum->data());
    } else {
        row_math().add(reinterpret_cast<const uint16_t*>(slot), hidden, sum->data());
    }
}

// Every rank's table of weights, for every rank; then the word that says that this one is in the
// combine, and has finished its last but one.
void announce(const Context& context, const Masks& masks, int chain, const CombineInput& in,
              uint64_t epoch) {
    for (int d = 0; d < context.shape.num_ranks; ++d) {
        if (masks.has(d)) continue;
        if (in.late_weights) {
            uint8_t* slot = context.weights_at(d, chain, context.rank);
            const size_t count = static_cast<size_t>(in.num_tokens) * context.shape.topk;
            if (count > 0) std::memcpy(slot, in.weights, sizeof(float) * count);
            store_release(tag_of(slot, context.layout.weights_stride), epoch);
        }
        uint8_t* ready = context.ready_at(d, chain, epoch, context.rank);
        const uint64_t terms =
            combine_terms(masks.digest(), in.wire, in.late_weights, *in.routing.dispatched);
        std::memcpy(ready, &terms, sizeof(terms));
        store_release(tag_of(ready, kLineBytes), epoch);
    }
}

// Waits for rank r's word that it is in this combine, under the same terms.
bool await_ready(const Context& context, Where where, const Masks& masks, const CombineOutput& out,
                 uint64_t epoch, int r, Waiter* waiter) {
    const uint8_t* line = context.ready_at(context.rank, where.chain, epoch, r);
    if (!waiter->wait(tag_of(line, kLineBytes), r)) return false;
    const uint64_t ours =
        combine_terms(masks.digest(), out.wire, out.late_weights, *out.routing.dispatched);
    uint64_t theirs = 0;
    std::memcpy(&theirs, line, sizeof(theirs));
    if (theirs != ours) fail(context, where, FaultCode::kTerms, r, ours, theirs);
    return theirs == ours;
}

// The sum of what the ranks sent back for one token, in rank order. False: a wait failed.
bool reduce_token(const Context& context, const Masks& masks, Wire wire, int chain, uint64_t epoch,
                  const int32_t* slots, Waiter* waiter, std::vector<float>* sum) {
    sum->assign(context.shape.hidden, 0.0f);
    for (int d = 0; d < context.shape.num_ranks; ++d) {
        if (slots[d] < 0 || masks.has(d)) continue;
        uint8_t* slot = context.combine_at(context.rank, chain, epoch, d, slots[d]);
        if (!waiter->wait(tag_of(slot, context.layout.combine_stride), d)) return false;
        add_sum(context, wire, slot, sum);
    }
    return true;
}

}  // namespace

void HostRank::combine_send(int chain, const CombineInput& in) {
    require_chain(chain);
    require_tokens(in.num_tokens);
    require_combine(in.wire);
    if (in.y == nullptr) throw std::invalid_argument("y must not be null");
    if (in.row_stride < 0) throw std::invalid_argument("y_stride must not be negative");
    if (in.late_weights && in.weights == nullptr && in.num_tokens > 0) {
        throw std::invalid_argument("weights must not be null: the dispatch had none");
    }
    const Where where{Op::kCombine, chain};
    if (!may_run(context_, where)) return;
    const uint64_t epoch = read_state(chain).combined + 1;
    const Masks masks(context_);
    announce(context_, masks, chain, in, epoch);

    const Shape& shape = context_.shape;
    Waiter waiter(context_, where, epoch);
    std::vector<float> sum;
    uint64_t messages = 0;
    for (int source = 0; source < shape.num_ranks; ++source) {
        const int32_t received = masks.has(source) ? 0 : in.routing.received[source];
        uint8_t* table = context_.weights_at(context_.rank, chain, source);
        const auto* late = in.late_weights ? reinterpret_cast<const float*>(table) : nullptr;
        if (in.late_weights && received > 0 &&
            !waiter.wait(tag_of(table, context_.layout.weights_stride), source)) {
            return;
        }
        for (int i = 0; i < received; ++i) {
            const int64_t index = int64_t{source} * shape.max_tokens + i;
            reduce_message(context_, in.routing.refs + index * shape.topk, in, late, &sum);
            uint8_t* slot = context_.combine_at(source, chain, epoch, context_.rank, i);
            write_sum(context_, in.wire, sum, slot);
            store_release(tag_of(slot, context_.layout.combine_stride), epoch);
        }
        messages += static_cast<uint64_t>(received);
    }
    context_.stats(chain)->bytes_combined +=
        messages * static_cast<uint64_t>(SumLayout::make(shape, in.wire).bytes);
}

void HostRank::combine_recv(int chain, const CombineOutput& out) {
    require_chain(chain);
    require_tokens(out.num_tokens);
    require_combine(out.wire);
    if (out.num_tokens > 0 && out.out == nullptr) {
        throw std::invalid_argument("out must not be null");
    }
    const Where where{Op::kCombine, chain};
    if (!may_run(context_, where)) return;
    const uint64_t epoch = read_state(chain).combined + 1;

    const Shape& shape = context_.shape;
    const int64_t hidden = shape.hidden;
    const int32_t valid = valid_tokens(out.num_tokens, out.num_valid);
    Waiter waiter(context_, where, epoch);
    const Masks masks(context_);
    for (int r = 0; r < shape.num_ranks; ++r) {
        if (masks.has(r)) continue;
        const bool ready = await_ready(context_, where, masks, out, epoch, r, &waiter);
        const uint64_t blocked_ns = waiter.take_blocked_ns();
        if (out.wait_ns != nullptr) out.wait_ns[r] += blocked_ns;
        if (!ready) return;
    }
    std::vector<float> sum;
    for (int token = 0; token < valid; ++token) {
        const int32_t* slots = out.routing.sent + int64_t{token} * shape.num_ranks;
        if (!reduce_token(context_, masks, out.wire, chain, epoch, slots, &waiter, &sum)) return;
        row_math().round(sum.data(), shape.hidden, out.out + token * hidden);
    }
    if (valid < out.num_tokens) {
        std::memset(out.out + valid * hidden, 0,
                    sizeof(uint16_t) * (out.num_tokens - valid) * hidden);
    }
    store_relaxed(&context_.state(chain)->combined, epoch);
}

}  // namespace ep::host
