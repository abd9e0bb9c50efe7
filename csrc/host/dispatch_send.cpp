#include <cstring>
#include <stdexcept>
#include <vector>

#include "ep/fp8.h"
#include "host/atomics.h"
#include "host/faults.h"
#include "host/host_rank.h"
#include "host/masks.h"
#include "host/row_math.h"

namespace ep::host {
namespace {

int64_t raw_expert(const SendInput& input, int64_t index) {
    return input.idx_bytes == 4 ? static_cast<const int32_t*>(input.topk_idx)[index]
                                : static_cast<const int64_t*>(input.topk_idx)[index];
}

// Which entries are sent, where they go, and what every receiver will be told.
struct Choices {
    std::vector<Entry> entries;          // [valid tokens][K]
    std::vector<uint32_t> num_messages;  // [R]
    std::vector<uint32_t> num_rows;      // [E]
    uint32_t dropped = 0;
    int64_t first_dropped = 0;
};

int32_t* slots_of(const Context& context, const SendInput& input, int token) {
    return input.routing.sent + static_cast<int64_t>(token) * context.shape.num_ranks;
}

void route_token(const Context& context, const Masks& masks, const SendInput& input, int token,
                 int32_t* slots, Choices* routing) {
    const Shape& shape = context.shape;
    Entry* entries = routing->entries.data() + static_cast<int64_t>(token) * shape.topk;
    for (int k = 0; k < shape.topk; ++k) {
        const int64_t index = static_cast<int64_t>(token) * shape.topk + k;
        const int expert = input.expert(index);
        // Where the weights come with the combine: which entry it is, by which it finds them.
        const float weight = input.weights == nullptr ? bits_to_float(static_cast<uint32_t>(index))
                                                      : input.weights[index];
        entries[k] = {-1, 0, weight};
        if (expert == -1) continue;
        bool valid = expert >= 0 && expert < shape.num_experts;
        if (valid && masks.has(shape.owner_of(expert))) continue;
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

// Also fills the handle's slots, which its combines read.
Choices route(const Context& context, const Masks& masks, const SendInput& input,
              int32_t num_valid) {
    const Shape& shape = context.shape;
    Choices routing;
    routing.entries.resize(static_cast<size_t>(num_valid) * shape.topk);
    routing.num_messages.resize(shape.num_ranks);
    routing.num_rows.resize(shape.num_experts);
    for (int token = 0; token < input.num_tokens; ++token) {
        int32_t* slots = slots_of(context, input, token);
        for (int d = 0; d < shape.num_ranks; ++d) slots[d] = -1;
        if (token < num_valid) route_token(context, masks, input, token, slots, &routing);
    }
    return routing;
}

void send_counts(const Context& context, const Masks& masks, int chain, uint64_t epoch,
                 RowTerms rows, const Choices& routing) {
    const Shape& shape = context.shape;
    const CountsLayout& layout = context.layout.counts;
    const int local_experts = shape.num_local_experts();
    std::vector<uint32_t> words(layout.words);
    words[CountsLayout::kTerms] = mix_terms(masks.digest(), rows);
    for (int d = 0; d < shape.num_ranks; ++d) {
        if (masks.has(d)) continue;
        words[CountsLayout::kMessages] = routing.num_messages[d];
        for (int x = 0; x < local_experts; ++x) {
            words[CountsLayout::kRows + x] = routing.num_rows[d * local_experts + x];
        }
        uint8_t* slot = context.counts_at(d, chain, epoch, context.rank);
        std::memcpy(slot, words.data(), layout.bytes);
        store_release(tag_of(slot, layout.stride), epoch);
    }
}

// The same bytes go to every receiver of the token.
void write_message(const Context& context, const MessageLayout& layout, const SendInput& input,
                   int token, const Entry* entries, uint8_t* message) {
    const Shape& shape = context.shape;
    const uint8_t* row = input.x + token * input.row_stride;
    if (input.wire == Wire::kFp8) {
        float* scales = reinterpret_cast<float*>(message + layout.scales);
        row_math().quantise(reinterpret_cast<const uint16_t*>(row), shape.hidden,
                            message + layout.row, scales, input.round_scale);
    } else {
        std::memcpy(message + layout.row, row, shape.row_bytes(input.wire));
        const uint32_t* from = input.scales + token * input.scale_row_stride;
        auto* to = reinterpret_cast<uint32_t*>(message + layout.scales);
        for (int g = 0; g < shape.num_scales(input.wire); ++g) {
            to[g] = from[g * input.scale_group_stride];
        }
    }
    const MessageHeader header{token, shape.topk};
    std::memcpy(message + layout.header, &header, sizeof(header));
    std::memcpy(message + layout.entries, entries, sizeof(Entry) * shape.topk);
}

void send_rows(const Context& context, int chain, uint64_t epoch, const SendInput& input,
               int32_t num_valid, const Choices& routing) {
    const Shape& shape = context.shape;
    const MessageLayout layout = MessageLayout::make(shape, input.wire);
    std::vector<uint64_t> message(layout.bytes / sizeof(uint64_t));
    uint8_t* bytes = reinterpret_cast<uint8_t*>(message.data());
    for (int token = 0; token < num_valid; ++token) {
        const int32_t* slots = slots_of(context, input, token);
        bool written = false;
        for (int d = 0; d < shape.num_ranks; ++d) {
            if (slots[d] < 0) continue;
            if (!written) {
                const int64_t first = static_cast<int64_t>(token) * shape.topk;
                write_message(context, layout, input, token, routing.entries.data() + first, bytes);
                written = true;
            }
            uint8_t* slot = context.dispatch_at(d, chain, epoch, context.rank, slots[d]);
            std::memcpy(slot, bytes, layout.bytes);
            store_release(tag_of(slot, context.layout.message_stride), epoch);
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
    require_wire(input.wire);
    if (input.row_stride < 0) throw std::invalid_argument("x_stride must not be negative");
    if (input.num_tokens > 0 && (input.x == nullptr || input.topk_idx == nullptr)) {
        throw std::invalid_argument("x and topk_idx must not be null");
    }
    if (input.num_tokens > 0 && input.wire == Wire::kOpaque && input.scales == nullptr &&
        context_.shape.opaque_scales > 0) {
        throw std::invalid_argument("scales must not be null: the shape has opaque scales");
    }
    const Where where{Op::kDispatch, chain};
    if (!may_run(context_, where)) return;
    const uint64_t epoch = read_state(chain).dispatched + 1;
    const int32_t num_valid = valid_tokens(input.num_tokens, input.num_valid);
    const Masks masks(context_);
    const Choices routing = route(context_, masks, input, num_valid);
    if (routing.dropped > 0) {
        record_routing(context_, where, routing.dropped, routing.first_dropped);
    }
    send_counts(context_, masks, chain, epoch, input.rows(), routing);
    send_rows(context_, chain, epoch, input, num_valid, routing);

    uint64_t messages = 0;
    for (const uint32_t n : routing.num_messages) messages += n;
    StepStats* stats = context_.stats(chain);
    stats->messages_sent += messages;
    const MessageLayout layout = MessageLayout::make(context_.shape, input.wire);
    stats->bytes_dispatched += messages * static_cast<uint64_t>(layout.bytes);
}

}  // namespace ep::host
