// A rank that dispatches and combines on its chains, and checks every row and sum.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>

#include "group.h"
#include "host/faults.h"
#include "plain.h"

namespace threads {

using plain::Step;

constexpr int kSets = 2;  // of receive tensors, on each chain

// What is in flight on a chain: numbers of sets, -1: nothing.
struct Chain {
    std::vector<Tensors> sets;
    int receiving = -1, combining = -1;
    uint64_t dispatched = 0, combined = 0;
};

class Rank {
  public:
    Rank(Group* group, int rank) : group_(group), s_(group->shape), rank_(rank), chains_(kChains) {
        for (Chain& chain : chains_) chain.sets.assign(kSets, Tensors(s_));
    }

    // One of the legal operations; every rank draws the same one.
    void advance(std::mt19937_64* random) {
        const int number = static_cast<int>((*random)() % kChains);
        const int set = static_cast<int>((*random)() % kSets);
        Chain& chain = chains_[number];
        const Tensors& tensors = chain.sets[set];
        switch ((*random)() % 4) {
            case 0:
                if (chain.receiving < 0 && chain.combining != set) dispatch_send(number, set);
                return;
            case 1:
                if (chain.receiving >= 0) dispatch_recv(number);
                return;
            case 2:
                if (chain.combining < 0 && tensors.valid) combine_send(number, set);
                return;
            default:
                if (chain.combining >= 0) combine_recv(number);
        }
    }
    void finish() {
        for (int number = 0; number < kChains; ++number) {
            if (chains_[number].receiving >= 0) dispatch_recv(number);
            if (chains_[number].combining >= 0) combine_recv(number);
        }
    }

    void dispatch_send(int number, int set) {
        Chain& chain = chains_[number];
        Tensors& t = chain.sets[set];
        const Step step{number, chain.dispatched + 1};
        t.call = plain::make_call(s_, group_->format, step);
        t.inputs.clear();
        for (int r = 0; r < kRanks; ++r) t.inputs.push_back(plain::make_input(s_, step, r));
        t.arrived = plain::arrivals(s_, t.inputs, rank_);
        t.valid = false;
        dropped_ += plain::count_dropped(s_, t.inputs[rank_]);
        self().dispatch_send(number, t.send(s_, rank_));
        chain.receiving = set;
    }

    void dispatch_recv(int number) {
        Chain& chain = chains_[number];
        Tensors& t = chain.sets[std::exchange(chain.receiving, -1)];
        std::memset(t.x.data(), kPoison, t.x.size());
        std::fill(t.topk_idx.begin(), t.topk_idx.end(), -9);
        const std::vector<int32_t> before = t.cumulative;
        self().dispatch_recv(number, t.target(s_, group_->format));
        if (group_->format == Format::kCompact) {
            check_messages(t);
        } else {
            check_rows(t);
        }
        for (size_t x = 0; x < before.size(); ++x) {
            CHECK(t.cumulative[x] == before[x] + t.recv_count[x]);
        }
        t.valid = true;
        CHECK(self().read_state(number).dispatched == ++chain.dispatched);
    }

    void combine_send(int number, int set) {
        Chain& chain = chains_[number];
        Tensors& t = chain.sets[set];
        const Step step{number, chain.combined + 1};
        std::memset(t.y.data(), 0xff, t.y.size() * sizeof(uint16_t));  // NaN where nothing belongs
        for (const Placed& p : placed(t)) {
            for (int i = 0; i < s_.hidden; ++i) {
                t.y[p.row * s_.hidden + i] = plain::answer(step, p.source, p.token, p.expert, i);
            }
        }
        const Input& mine = t.inputs[rank_];
        t.late = plain::late_weights(s_, step, rank_, mine.rows);
        self().combine_send(number, {.y = t.y.data(),
                                     .row_stride = s_.hidden,
                                     .late_weights = t.call.late,
                                     .weights = t.call.late ? t.late.data() : nullptr,
                                     .num_tokens = mine.rows,
                                     .routing = t.routing(s_)});
        chain.combining = set;
    }

    void combine_recv(int number) {
        Chain& chain = chains_[number];
        Tensors& t = chain.sets[std::exchange(chain.combining, -1)];
        const Step step{number, chain.combined + 1};
        const Input& mine = t.inputs[rank_];
        std::memset(t.out.data(), kPoison, t.out.size() * sizeof(uint16_t));
        self().combine_recv(number, {.late_weights = t.call.late,
                                     .out = t.out.data(),
                                     .num_tokens = mine.rows,
                                     .num_valid = &mine.valid,
                                     .wait_ns = t.wait_ns.data(),
                                     .routing = t.routing(s_)});
        const bool compact = group_->format == Format::kCompact;
        const std::vector<float>& weights = t.call.late ? t.late : mine.weights;
        for (int token = 0; token < mine.rows; ++token) {
            for (int i = 0; i < s_.hidden; ++i) {
                const uint16_t want = token < mine.valid ? plain::combined(s_, step, compact, mine,
                                                                           weights, rank_, token, i)
                                                         : uint16_t{0};
                CHECK(t.out[int64_t{token} * s_.hidden + i] == want);
            }
        }
        CHECK(self().read_state(number).combined == ++chain.combined);
    }

    uint64_t dispatched(int number) const { return chains_[number].dispatched; }

    void check_faults() {
        const ep::FaultBoard& board = group_->faults[rank_];
        CHECK(!ep::host::read_fault(board.fatal));
        const auto routing = ep::host::read_fault(board.routing);
        CHECK(routing && routing->count == dropped_ && routing->rank == rank_);
    }

  private:
    // A row of the receive's output and whose it is; expert -1 - rank for a compact row.
    struct Placed {
        int64_t row;
        int source, token, expert;
    };

    ep::host::HostRank& self() { return *group_->ranks[rank_]; }
    int first_expert() const { return rank_ * s_.num_local_experts(); }

    std::vector<Placed> placed(const Tensors& t) const {
        std::vector<Placed> list;
        if (group_->format == Format::kCompact) {
            for (size_t i = 0; i < t.arrived.size(); ++i) {
                list.push_back(
                    {static_cast<int64_t>(i), t.arrived[i].source, t.arrived[i].token, -1 - rank_});
            }
            return list;
        }
        int64_t offset = 0;
        for (int x = 0; x < s_.num_local_experts(); ++x) {
            const bool batched = group_->format == Format::kBatched;
            int64_t row = batched ? int64_t{x} * s_.max_messages() : offset;
            const int64_t first = row;
            for (const plain::Arrival& a : t.arrived) {
                for (const int expert : a.kept) {
                    if (expert != first_expert() + x) continue;
                    list.push_back({row++, a.source, a.token, expert});
                }
            }
            if (batched) check_ranges(t, x);
            if (!batched) CHECK(t.expert_offset[x] == offset);
            CHECK(t.recv_count[x] == row - first);
            offset += (row - first + kAlignment - 1) / kAlignment * kAlignment;
        }
        if (group_->format == Format::kContiguous) {
            CHECK(t.expert_offset[s_.num_local_experts()] == offset);
        }
        return list;
    }

    // Where each source's rows of local expert x are.
    void check_ranges(const Tensors& t, int x) const {
        std::vector<int64_t> count(kRanks);
        for (const plain::Arrival& a : t.arrived) {
            for (const int expert : a.kept) count[a.source] += expert == first_expert() + x;
        }
        int64_t first = 0;
        for (int source = 0; source < kRanks; ++source) {
            CHECK(t.layout_range[x * kRanks + source] == ((first << 32) | count[source]));
            first += count[source];
        }
    }

    void check_rows(const Tensors& t) {
        check_num_messages(t);
        const int64_t width = s_.row_bytes(t.call.wire);
        std::vector<bool> written(t.x.size() / width);
        for (const Placed& p : placed(t)) {
            check_row(t, p.row, p.source, p.token);
            if (group_->format == Format::kBatched) CHECK(t.source_token[p.row] == p.token);
            written[p.row] = true;
        }
        const std::vector<uint8_t> untouched(width, kPoison);
        for (size_t row = 0; row < written.size(); ++row) {
            if (written[row]) continue;
            CHECK(std::memcmp(t.x.data() + row * width, untouched.data(), width) == 0);
        }
    }

    void check_messages(const Tensors& t) {
        check_num_messages(t);
        for (size_t i = 0; i < t.arrived.size(); ++i) {
            const plain::Arrival& a = t.arrived[i];
            check_row(t, i, a.source, a.token);
            for (int k = 0; k < s_.topk; ++k) {
                const bool mine = a.kept[k] >= 0 && s_.owner_of(a.kept[k]) == rank_;
                const float weight = t.inputs[a.source].weights[a.token * s_.topk + k];
                CHECK(t.topk_idx[i * s_.topk + k] == (mine ? a.kept[k] - first_expert() : -1));
                CHECK(t.topk_weights[i * s_.topk + k] == (mine ? weight : 0.0f));
            }
        }
        for (size_t i = t.arrived.size() * s_.topk; i < t.topk_idx.size(); ++i) {
            CHECK(t.topk_idx[i] == -1);
        }
    }

    void check_num_messages(const Tensors& t) {
        std::vector<int32_t> want(kRanks);
        for (const plain::Arrival& a : t.arrived) ++want[a.source];
        CHECK(t.num_messages == want);
    }

    void check_row(const Tensors& t, int64_t row, int source, int token) {
        const plain::Row want = plain::wire_row(s_, t.call, t.inputs[source], token);
        const int64_t width = s_.row_bytes(t.call.wire);
        CHECK(static_cast<int64_t>(want.bytes.size()) == width);
        CHECK(std::memcmp(want.bytes.data(), t.x.data() + row * width, width) == 0);
        for (int g = 0; g < s_.num_scales(t.call.wire); ++g) {
            CHECK(t.scale(s_, group_->format, row, g) == want.scales[g]);
        }
    }

    Group* group_;
    const Shape& s_;
    int rank_;
    uint32_t dropped_ = 0;
    std::vector<Chain> chains_;
};

}  // namespace threads
