#include "host/wire.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "host/atomics.h"

namespace ep::host {
namespace {

constexpr Where kNotify{Op::kNormalNotify, 0};

Where where_of(wire::Way way) {
    return {way == wire::Way::kOut ? Op::kNormalDispatch : Op::kNormalCombine, 0};
}

}  // namespace

HostWire::HostWire(NormalRank& whole, NormalRank& rail, const wire::Region& region,
                   const std::vector<uintptr_t>& regions, uintptr_t counters)
    : whole_(whole),
      rail_(rail),
      region_(region),
      counters_(reinterpret_cast<wire::Counters*>(counters)) {
    const auto ranks = static_cast<size_t>(region.place.num_ranks());
    if (regions.size() != ranks) throw std::invalid_argument("give a region for every rank");
    for (uintptr_t one : regions) regions_.push_back(reinterpret_cast<uint8_t*>(one));
    mine_ = regions_[region.place.rank_of(region.place.node, region.place.local)];
}

uint64_t* HostWire::signal(int64_t offset) const {
    return reinterpret_cast<uint64_t*>(mine_ + offset);
}

void HostWire::put_one(int rank, const wire::Put& put, uint64_t epoch) const {
    uint8_t* there = regions_[static_cast<size_t>(rank)];
    std::memcpy(there + put.to, mine_ + put.from, static_cast<size_t>(put.bytes));
    // Acquired by that rank's waits below.
    store_release(reinterpret_cast<uint64_t*>(there + put.signal), epoch);
}

void HostWire::announce(const wire::Message& message) {
    if (!may_run(whole_.context_, kNotify)) return;
    const wire::Region& r = region_;
    const uint64_t epoch = counters_->exchanged + 1;
    const int me = whole_.context_.rank;
    const int words = message.num_experts == 0 ? 0 : r.words(message.num_experts);
    auto* outgoing = reinterpret_cast<int32_t*>(mine_ + r.outgoing);
    for (int i = 0; i < words; ++i) outgoing[i] = message.word(r.place, i);
    for (int d = 0; d < r.place.num_ranks(); ++d) {
        put_one(d, {r.outgoing, r.message(epoch, me), 4LL * words, r.message_signal(epoch, me)},
                epoch);
    }
}

void HostWire::await_messages(int num_experts) {
    if (!may_run(whole_.context_, kNotify)) return;
    const uint64_t epoch = counters_->exchanged + 1;
    Waiter waiter(whole_.context_, kNotify, epoch);
    for (int s = 0; s < region_.place.num_ranks(); ++s) {
        if (!waiter.wait(signal(region_.message_signal(epoch, s)), s)) return;
    }
    if (num_experts != 0) deliver(num_experts, epoch);
    grant_out();
    counters_->exchanged = epoch;
}

// As if every source had sent its notify of the whole group, and those of the rail that of the
// rail.
void HostWire::deliver(int num_experts, uint64_t epoch) {
    const wire::Place& p = region_.place;
    const int local_experts = num_experts / p.num_ranks(), me = whole_.context_.rank;
    for (int s = 0; s < p.num_ranks(); ++s) {
        const auto* words = reinterpret_cast<const int32_t*>(mine_ + region_.message(epoch, s));
        const int32_t* per_node = words + p.num_ranks();
        const int32_t* experts = per_node + p.num_nodes;
        write_message(whole_, s, words, p.num_ranks(), experts + me * local_experts, local_experts);
        if (s % p.ranks_per_node != p.local) continue;
        write_message(rail_, s / p.ranks_per_node, per_node, p.num_nodes,
                      experts + p.node * (num_experts / p.num_nodes), num_experts / p.num_nodes);
    }
}

void HostWire::write_message(NormalRank& rank, int source, const int32_t* counts, int num_counts,
                             const int32_t* experts, int num_experts) const {
    const uint64_t epoch = rank.state_->notified + 1;
    uint8_t* slot = rank.notify_slot(rank.context_.rank, epoch, source);
    auto* words = reinterpret_cast<int32_t*>(slot);
    std::copy_n(counts, num_counts, words);
    std::copy_n(experts, num_experts, words + num_counts);
    store_release(tag_of(slot, rank.control_.notify_stride), epoch);  // acquired by its notify
}

// The rail's next dispatch writes to mirrors, and waits for nobody.
void HostWire::grant_out() {
    const int me = rail_.context_.rank;
    const uint64_t epoch = rail_.state_->dispatched + 1;
    for (int n = 0; n < region_.place.num_nodes; ++n) {
        if (n == me) continue;
        normal::Credit* line = rail_.credit(rail_.control_.dispatch_credit_offset, me, n);
        line->offset = region_.mirror(n);
        line->rows = region_.max_tokens;
        store_release(&line->epoch, epoch);
        store_release(rail_.done(me, n), normal::done_word(epoch));
    }
}

// The rail's next combine finds all rows in its inbox, and sends none.
void HostWire::grant_home() {
    const int me = rail_.context_.rank;
    const uint64_t epoch = rail_.state_->combined + 1;
    for (int n = 0; n < region_.place.num_nodes; ++n) {
        if (n == me) continue;
        normal::Credit* line = rail_.credit(rail_.control_.combine_credit_offset, me, n);
        line->offset = region_.inbox;
        line->rows = 0;
        store_release(&line->epoch, epoch);
        store_release(rail_.chunks(me, n), epoch);
    }
}

void HostWire::tables(const wire::Tables& t) {
    const wire::Place& p = region_.place;
    for (int s = 0; s < p.num_nodes; ++s) {
        for (int d = 0; d < p.num_nodes; ++d) {
            if (!wire::plausible(region_, t.rail_prefix, s, d)) {
                fail(rail_.context_, kNotify, FaultCode::kCount, s,
                     static_cast<uint64_t>(region_.max_tokens),
                     static_cast<uint32_t>(t.rail_prefix[s * p.num_nodes + d]));
                return;
            }
            t.out_prefix[s * p.num_nodes + d] = wire::out_entry(p, t.rail_prefix, s, d);
            t.home_prefix[s * p.num_nodes + d] = wire::home_entry(p, t.rail_prefix, s, d);
        }
    }
    const int32_t first = normal::tokens_before(t.rail_prefix, p.num_nodes, p.node, p.node);
    for (int32_t i = 0; i < t.num_tokens; ++i) t.home_order[i] = first + i;
}

void HostWire::put(const wire::Transfer& transfer) {
    if (!may_run(rail_.context_, where_of(transfer.way))) return;
    const wire::Place& p = region_.place;
    const bool out = transfer.way == wire::Way::kOut;
    const uint64_t epoch = (out ? counters_->crossed : counters_->returned) + 1;
    for (int i = 1; i < p.num_nodes; ++i) {
        const int node = (p.node + i) % p.num_nodes;
        for (int channel = 0; channel < wire::kChannels; ++channel) {
            for (int piece = 0; piece < wire::pieces_of(transfer.way); ++piece) {
                put_one(p.rank_of(node, p.local),
                        wire::put_of(region_, transfer, node, channel, piece), epoch);
            }
        }
    }
}

void HostWire::await_rows(wire::Way way) {
    if (!may_run(rail_.context_, where_of(way))) return;
    uint64_t& counter = way == wire::Way::kOut ? counters_->crossed : counters_->returned;
    const uint64_t epoch = counter + 1;
    Waiter waiter(rail_.context_, where_of(way), epoch);
    for (int n = 0; n < region_.place.num_nodes; ++n) {
        if (n == region_.place.node) continue;
        for (int channel = 0; channel < wire::kChannels; ++channel) {
            for (int piece = 0; piece < wire::pieces_of(way); ++piece) {
                if (!waiter.wait(signal(region_.row_signal(way, n, channel, piece)), n)) return;
            }
        }
    }
    if (way == wire::Way::kHome) grant_home();
    counter = epoch;
}

void HostWire::reset() {
    std::memset(mine_, 0, static_cast<size_t>(region_.messages));  // the signals
    *counters_ = {};
}

}  // namespace ep::host
