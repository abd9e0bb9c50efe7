#include <cstring>
#include <stdexcept>
#include <vector>

#include "host/atomics.h"
#include "host/faults.h"
#include "host/host_rank.h"
#include "host/row_math.h"

namespace ep::host {
namespace {

int64_t raw_expert(const SendInput& input, int64_t index) {
    return input.idx_bytes == 4 ? static_cast<const int32_t*>(input.topk_idx)[index]
                                : static_cast<const int64_t*>(input.topk_idx)[index];
}

// Which entries are sent, where they go, and what every receiver will be told.
struct Routing {
    std::vector<Entry> entries;          // [valid tokens][K]
    std::vector<uint32_t> num_messages;  // [R]
    std::vector<uint32_t> num_rows;      // [E]
    uint32_t dropped = 0;
    int64_t first_dropped = 0;
};

void route_token(const Context& context, const SendInput& input, int token, int32_t* slots,
                 Routing* routing) {
    const Shape& shape = context.shape;
    Entry* entries = routing->entries.data() + static_cast<int64_t>(token) * shape.topk;
    for (int k = 0; k < shape.topk; ++k) {
        const int64_t index = static_cast<int64_t>(token) * shape.topk + k;
        const int expert = input.expert(index);
        entries[k] = {-1, 0, input.weights[index]};
        if (expert == -1) continue;
        bool valid = expert >= 0 && expert < shape.num_experts;
        for (int earlier = 0; valid && earlier < k; ++earlier) {
            valid = entries[earlier].expert != expert;
        }
        if (!valid) {
            if (routing->dropped++ == 0) routing->first_dropped = raw_expert(input, index);
            continue;
        }
        entries[k].expert = expert;
        entries[k].position = static_cast<int32_t>(routing->num_rows[expert]++);
        const int owner = shape.owner_of(expert);
        if (slots[owner] < 0) slots[owner] = static_cast<int32_t>(routing->num_messages[owner]++);
    }
}

// Also fills sent_slots, which the combine of this epoch reads.
Routing route(const Context& context, int chain, const SendInput& input, int32_t num_valid) {
    const Shape& shape = context.shape;
    Routing routing;
    routing.entries.resize(static_cast<size_t>(num_valid) * shape.topk);
    routing.num_messages.resize(shape.num_ranks);
    routing.num_rows.resize(shape.num_experts);
    for (int token = 0; token < input.num_tokens; ++token) {
        int32_t* slots = context.sent_slots(chain, token);
        for (int d = 0; d < shape.num_ranks; ++d) slots[d] = -1;
        if (token < num_valid) route_token(context, input, token, slots, &routing);
    }
    return routing;
}

void send_counts(const Context& context, int chain, uint64_t epoch, const Routing& routing) {
    const Shape& shape = context.shape;
    const CountsLayout& layout = context.layout.counts;
    const int local_experts = shape.num_local_experts();
    std::vector<uint32_t> words(layout.words);
    for (int d = 0; d < shape.num_ranks; ++d) {
        words[0] = routing.num_messages[d];
        for (int x = 0; x < local_experts; ++x) {
            words[2 + x] = routing.num_rows[d * local_experts + x];
        }
        uint8_t* slot = context.counts_at(d, chain, epoch, context.rank);
        std::memcpy(slot, words.data(), layout.bytes);
        store_release(tag_of(slot, layout.stride), epoch);
    }
}

// The same bytes go to every receiver of the token.
void write_message(const Context& context, const SendInput& input, int token, const Entry* entries,
                   uint8_t* message) {
    const Shape& shape = context.shape;
    const MessageLayout& layout = context.layout.message;
    const uint16_t* row = input.x + token * input.row_stride;
    if (shape.wire == Wire::kFp8) {
        float* scales = reinterpret_cast<float*>(message + layout.scales);
        row_math().quantise(row, shape.hidden, message + layout.row, scales);
    } else {
        std::memcpy(message + layout.row, row, shape.row_bytes());
    }
    const MessageHeader header{token, shape.topk};
    std::memcpy(message + layout.header, &header, sizeof(header));
    std::memcpy(message + layout.entries, entries, sizeof(Entry) * shape.topk);
}

void send_rows(const Context& context, int chain, uint64_t epoch, const SendInput& input,
               int32_t num_valid, const Routing& routing) {
    const Shape& shape = context.shape;
    const MessageLayout& layout = context.layout.message;
    std::vector<uint64_t> message(layout.bytes / sizeof(uint64_t));
    uint8_t* bytes = reinterpret_cast<uint8_t*>(message.data());
    for (int token = 0; token < num_valid; ++token) {
        const int32_t* slots = context.sent_slots(chain, token);
        bool written = false;
        for (int d = 0; d < shape.num_ranks; ++d) {
            if (slots[d] < 0) continue;
            if (!written) {
                const int64_t first = static_cast<int64_t>(token) * shape.topk;
                write_message(context, input, token, routing.entries.data() + first, bytes);
                written = true;
            }
            uint8_t* slot = context.dispatch_at(d, chain, context.rank, slots[d]);
            std::memcpy(slot, bytes, layout.bytes);
            store_release(tag_of(slot, layout.stride), epoch);
        }
    }
}

}  // namespace

void HostRank::dispatch_send(int chain, const SendInput& input) {
    require_chain(chain);
    require_tokens(input.num_tokens);
    if (input.idx_bytes != 4 && input.idx_bytes != 8) {
        throw std::invalid_argument("idx_bytes must be 4 or 8");
    }
    if (input.row_stride < 0) throw std::invalid_argument("x_stride must not be negative");
    if (input.num_tokens > 0 &&
        (input.x == nullptr || input.topk_idx == nullptr || input.weights == nullptr)) {
        throw std::invalid_argument("x, topk_idx and weights must not be null");
    }
    const Where where{Op::kDispatch, chain};
    if (!may_run(context_, where)) return;
    const ChainState state = read_state(chain);
    if (state.dispatched != state.combined) {
        fail(context_, where, FaultCode::kSequence, /*peer=*/-1, state.combined, state.dispatched);
        return;
    }
    const uint64_t epoch = state.combined + 1;
    const int32_t num_valid = valid_tokens(input.num_tokens, input.num_valid);
    const Routing routing = route(context_, chain, input, num_valid);
    if (routing.dropped > 0) {
        record_routing(context_, where, routing.dropped, routing.first_dropped);
    }
    send_counts(context_, chain, epoch, routing);
    send_rows(context_, chain, epoch, input, num_valid, routing);

    uint64_t messages = 0;
    for (const uint32_t n : routing.num_messages) messages += n;
    StepStats* stats = context_.stats(chain);
    stats->messages_sent += messages;
    stats->bytes_dispatched += messages * static_cast<uint64_t>(context_.layout.message.bytes);
}

}  // namespace ep::host
