// Between nodes that do not map each other's memory: puts into a region that every rank has.
//
// A put copies bytes from a rank's region to the same or another place of a peer's, then sets a
// signal word there to the epoch. Nothing else crosses. The kernels of a rail (ep/nodes.h) do not
// know of it: they work on a loopback, whose other ranks are this rank's own memory. A dispatch
// writes what goes to node n into a *mirror* of n, which is put to where n expects it; a combine
// finds in its inbox what was put there. Before that, the words of the peers that it waits for are
// set here, on their behalf (`grants`), since the signals said that they may be.
//
// Credits are not needed: every operation begins with messages of all ranks to all ranks, and who
// sent the message of an operation is done with those before.
#pragma once

#include "ep/nodes.h"

namespace ep::wire {

using nodes::Place;

inline constexpr int kChannels = 8;  // parts of what goes to one node, put by different CTAs

// What goes out for a row, each an array at the other side; home goes kRows and kWeights alone.
enum Piece : int { kRows, kWeights, kScales, kTopkIdx, kTokens, kOutPieces, kHomePieces = kScales };
enum class Way : int32_t { kOut = 0, kHome = 1 };

// This rank's counts of what it has seen whole; each operation works at one more.
struct Counters {
    uint64_t exchanged;
    uint64_t crossed;
    uint64_t returned;
};

// A rank's region, in bytes from its start: words and messages, then the data heap of its rail.
struct Region {
    Place place;
    int32_t max_experts;
    int64_t max_tokens;
    int64_t message_signals;  // [2][R] uint64
    int64_t row_signals[2];  // by way: [N][kChannels][kOutPieces] uint64
    int64_t message_stride;
    int64_t messages;  // [2][R]: int32 tokens to each rank [R], to each node [N], to experts [E]
    int64_t outgoing;  // this rank's message
    int64_t data;
    // In the data heap:
    int64_t inbox;
    int64_t mirrors;  // [N] blocks of max_tokens rows
    int64_t mirror_bytes;
    int64_t partial;  // BF16 [V, H]: what this rank's node made of its rail's rows, by node, token
    int64_t partial_weights;
    int64_t data_bytes;

    static Region make(const Place& place, int max_experts, int64_t max_tokens, int64_t max_hidden,
                       int max_topk) {
        Region r{};
        const int64_t ranks = place.num_ranks(), nodes = place.num_nodes;
        r.place = place;
        r.max_experts = max_experts;
        r.max_tokens = max_tokens;
        r.message_signals = 0;
        r.row_signals[0] = r.message_signals + round_up(2 * 8 * ranks, normal::kLine);
        r.row_signals[1] = r.row_signals[0] + 8 * nodes * kChannels * kOutPieces;
        r.message_stride = round_up(4 * (ranks + nodes + max_experts), normal::kLine);
        r.messages = round_up(r.row_signals[1] + 8 * nodes * kChannels * kOutPieces, normal::kLine);
        r.outgoing = r.messages + 2 * ranks * r.message_stride;
        r.data = r.outgoing + r.message_stride;
        const int64_t rows = nodes * max_tokens;
        const auto bytes = [&](int64_t some) {
            return normal::BlockLayout::make(some, 2 * max_hidden, 0, max_topk).bytes;
        };
        r.inbox = bytes(rows);
        r.mirrors =
            r.inbox + normal::InboxLayout::make(rows - max_tokens, max_hidden, max_topk).bytes;
        r.mirror_bytes = bytes(max_tokens);
        r.partial = r.mirrors + nodes * r.mirror_bytes;
        r.partial_weights = r.partial + round_up(rows * 2 * max_hidden, normal::kLine);
        r.data_bytes = r.partial_weights + round_up(rows * 4 * max_topk, normal::kLine);
        return r;
    }

    EP_HD int64_t bytes() const { return data + data_bytes; }
    EP_HD int64_t message_signal(uint64_t epoch, int source) const {
        return message_signals + 8 * (static_cast<int64_t>(epoch & 1) * place.num_ranks() + source);
    }
    EP_HD int64_t message(uint64_t epoch, int source) const {
        const int64_t slot = static_cast<int64_t>(epoch & 1) * place.num_ranks() + source;
        return messages + slot * message_stride;
    }
    EP_HD int64_t row_signal(Way way, int source_node, int channel, int piece) const {
        const int64_t index = (source_node * kChannels + channel) * kOutPieces + piece;
        return row_signals[static_cast<int>(way)] + 8 * index;
    }
    EP_HD int64_t mirror(int node) const { return mirrors + node * mirror_bytes; }
    EP_HD int32_t words(int num_experts) const {
        return place.num_ranks() + place.num_nodes + num_experts;
    }
};

// A rank's counts, as it tells them to all; without experts it only says that it is there.
struct Message {
    const int32_t* tokens_per_rank;  // [R]
    const int32_t* tokens_per_node;  // [N]
    const int32_t* tokens_per_expert;  // [E]
    int32_t num_experts;

    EP_HD int32_t word(const Place& p, int i) const {
        if (i < p.num_ranks()) return tokens_per_rank[i];
        i -= p.num_ranks();
        return i < p.num_nodes ? tokens_per_node[i] : tokens_per_expert[i - p.num_nodes];
    }
};

// Rows of one operation that go to other nodes.
struct Transfer {
    Way way;
    const int32_t* rail_prefix;  // [N, N]
    int64_t row_bytes;
    int32_t num_scales;
    int32_t topk;
    bool has_idx;  // kOut: else what lies there is not sent
    bool has_weights;
    int64_t block_rows;  // kOut: of every rail block; 0: as many as arrive there
};

// One put. Offsets from the starts of regions.
struct Put {
    int64_t from;
    int64_t to;
    int64_t bytes;
    int64_t signal;
};

EP_HD int pieces_of(Way way) { return way == Way::kOut ? kOutPieces : kHomePieces; }

// Row i of what node `source` sent over this rail comes home to row `i + ...` of its inbox.
EP_HD int64_t home_row(const Place& p, const int32_t* rail_prefix, int source, int from) {
    int64_t row = 0;
    for (int n = 0; n < from; ++n) {
        if (n != source) row += normal::tokens_between(rail_prefix, p.num_nodes, source, n);
    }
    return row;
}

// A channel's rows among `count`.
EP_HD int64_t channel_begin(int64_t count, int channel) { return count * channel / kChannels; }

EP_HD Put put_out(const Region& r, const Transfer& t, int node, int channel, int piece) {
    const int nodes = r.place.num_nodes, me = r.place.node;
    const int64_t count = normal::tokens_between(t.rail_prefix, nodes, me, node);
    const int64_t first = normal::tokens_before(t.rail_prefix, nodes, me, node);
    const int64_t arriving = t.rail_prefix[(nodes - 1) * nodes + node];
    const int64_t begin = channel_begin(count, channel), end = channel_begin(count, channel + 1);
    const auto mirror = normal::BlockLayout::make(r.max_tokens, t.row_bytes, t.num_scales, t.topk);
    const auto block = normal::BlockLayout::make(t.block_rows != 0 ? t.block_rows : arriving,
                                                 t.row_bytes, t.num_scales, t.topk);
    int64_t here = mirror.x, there = block.x, width = t.row_bytes;
    if (piece == kWeights) {
        here = mirror.topk_weights, there = block.topk_weights,
        width = t.has_weights ? 4 * t.topk : 0;
    } else if (piece == kScales) {
        here = mirror.scales, there = block.scales, width = 4 * t.num_scales;
    } else if (piece == kTopkIdx) {
        here = mirror.topk_idx, there = block.topk_idx, width = t.has_idx ? 8 * t.topk : 0;
    } else if (piece == kTokens) {
        here = mirror.source_token, there = block.source_token, width = 4;
    }
    return {r.data + r.mirror(node) + here + begin * width,
            r.data + there + (first + begin) * width, (end - begin) * width,
            r.row_signal(t.way, me, channel, piece)};
}

EP_HD Put put_home(const Region& r, const Transfer& t, int node, int channel, int piece) {
    const int nodes = r.place.num_nodes, me = r.place.node;
    const int64_t count = normal::tokens_between(t.rail_prefix, nodes, node, me);
    const int64_t first = normal::tokens_before(t.rail_prefix, nodes, node, me);
    const int64_t begin = channel_begin(count, channel), end = channel_begin(count, channel + 1);
    const auto inbox = normal::InboxLayout::make(home_row(r.place, t.rail_prefix, node, nodes),
                                                 t.row_bytes / 2, t.topk);
    const int64_t to = home_row(r.place, t.rail_prefix, node, me) + begin;
    const bool rows = piece == kRows;
    const int64_t width = rows ? t.row_bytes : t.has_weights ? 4 * t.topk : 0;
    return {r.data + (rows ? r.partial : r.partial_weights) + (first + begin) * width,
            r.data + r.inbox + (rows ? 0 : inbox.topk_weights) + to * width, (end - begin) * width,
            r.row_signal(t.way, me, channel, piece)};
}

EP_HD Put put_of(const Region& r, const Transfer& t, int node, int channel, int piece) {
    return t.way == Way::kOut ? put_out(r, t, node, channel, piece)
                              : put_home(r, t, node, channel, piece);
}

// Tables of the loopback rail: between two ranks, one of them this one, as many tokens as in truth;
// what this rank sends to another node begins at its mirror's start.
struct Tables {
    const int32_t* rail_prefix;  // [N, N]
    int32_t num_tokens;
    int32_t* out_prefix;  // [N, N]
    int32_t* home_prefix;  // [N, N]
    int32_t* home_order;  // [T] of this rank's own rows among partial sums
};

EP_HD int32_t out_entry(const Place& p, const int32_t* rail_prefix, int s, int d) {
    if (d == p.node) return rail_prefix[s * p.num_nodes + d];
    return s < p.node ? 0 : normal::tokens_between(rail_prefix, p.num_nodes, p.node, d);
}
EP_HD int32_t home_entry(const Place& p, const int32_t* rail_prefix, int s, int d) {
    return s < p.node ? 0 : normal::tokens_between(rail_prefix, p.num_nodes, p.node, d);
}

// A rail's rank sends from 0 to max_tokens tokens to each node: puts rely on it.
EP_HD bool plausible(const Region& r, const int32_t* rail_prefix, int s, int d) {
    const int64_t count = static_cast<int64_t>(rail_prefix[s * r.place.num_nodes + d]) -
                          normal::tokens_before(rail_prefix, r.place.num_nodes, s, d);
    return count >= 0 && count <= r.max_tokens;
}

}  // namespace ep::wire
