#include <cstring>
#include <stdexcept>
#include <vector>

#include "host/atomics.h"
#include "host/faults.h"
#include "host/host_rank.h"
#include "host/row_math.h"
#include "host/waiter.h"

namespace ep::host {
namespace {

// The epoch a combine works at, or 0 if there is nothing to combine (a recorded fault).
uint64_t combine_epoch(const Context& context, Where where, const ChainState& state) {
    if (state.combined != state.dispatched) return state.dispatched;
    fail(context, where, FaultCode::kSequence, /*peer=*/-1, state.combined + 1, state.dispatched);
    return 0;
}

// The weighted sum of one message's rows, in k order.
void reduce_message(const Context& context, const RowRef* refs, const uint16_t* y, int64_t y_stride,
                    std::vector<float>* sum) {
    sum->assign(context.shape.hidden, 0.0f);
    for (int k = 0; k < context.shape.topk && refs[k].row >= 0; ++k) {
        const uint16_t* row = y + refs[k].row * y_stride;
        row_math().multiply_add(refs[k].weight, row, context.shape.hidden, sum->data());
    }
}

// The sum of what the ranks sent back for one token, in rank order. False: a wait failed.
bool reduce_token(const Context& context, int chain, int token, Waiter* waiter,
                  std::vector<float>* sum) {
    sum->assign(context.shape.hidden, 0.0f);
    const int32_t* slots = context.sent_slots(chain, token);
    for (int d = 0; d < context.shape.num_ranks; ++d) {
        if (slots[d] < 0) continue;
        uint8_t* slot = context.combine_at(context.rank, chain, d, slots[d]);
        if (!waiter->wait(tag_of(slot, context.layout.combine_stride), d)) return false;
        row_math().add(reinterpret_cast<const uint16_t*>(slot), context.shape.hidden, sum->data());
    }
    return true;
}

}  // namespace

void HostRank::combine_send(int chain, const uint16_t* y, int64_t y_stride) {
    require_chain(chain);
    if (y == nullptr) throw std::invalid_argument("y must not be null");
    if (y_stride < 0) throw std::invalid_argument("y_stride must not be negative");
    const Where where{Op::kCombine, chain};
    if (!may_run(context_, where)) return;
    const uint64_t epoch = combine_epoch(context_, where, read_state(chain));
    if (epoch == 0) return;

    const Shape& shape = context_.shape;
    std::vector<float> sum;
    uint64_t messages = 0;
    for (int source = 0; source < shape.num_ranks; ++source) {
        const int32_t received = context_.received(chain)[source];
        for (int i = 0; i < received; ++i) {
            reduce_message(context_, context_.refs(chain, source, i), y, y_stride, &sum);
            uint8_t* slot = context_.combine_at(source, chain, context_.rank, i);
            row_math().round(sum.data(), shape.hidden, reinterpret_cast<uint16_t*>(slot));
            store_release(tag_of(slot, context_.layout.combine_stride), epoch);
        }
        messages += static_cast<uint64_t>(received);
    }
    context_.stats(chain)->bytes_combined += messages * sizeof(uint16_t) * shape.hidden;
}

void HostRank::combine_recv(int chain, uint16_t* out, int32_t num_tokens,
                            const int32_t* num_valid) {
    require_chain(chain);
    require_tokens(num_tokens);
    if (num_tokens > 0 && out == nullptr) throw std::invalid_argument("out must not be null");
    const Where where{Op::kCombine, chain};
    if (!may_run(context_, where)) return;
    const uint64_t epoch = combine_epoch(context_, where, read_state(chain));
    if (epoch == 0) return;

    const int64_t hidden = context_.shape.hidden;
    const int32_t valid = valid_tokens(num_tokens, num_valid);
    Waiter waiter(context_, where, epoch);
    std::vector<float> sum;
    for (int token = 0; token < valid; ++token) {
        if (!reduce_token(context_, chain, token, &waiter, &sum)) return;
        row_math().round(sum.data(), context_.shape.hidden, out + token * hidden);
    }
    if (valid < num_tokens) {
        std::memset(out + valid * hidden, 0, sizeof(uint16_t) * (num_tokens - valid) * hidden);
    }
    store_relaxed(&context_.state(chain)->combined, epoch);
}

}  // namespace ep::host
