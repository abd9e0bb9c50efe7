// Four ranks as threads over heaps of one process: random routes on two chains, every row and every
// sum checked against a plain recomputation. Meant to run under a sanitizer.
//
//   host_threads FORMAT WIRE STEPS     (FORMAT 0..2, WIRE 0..1 as in ep/shape.h)
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "group.h"
#include "host/faults.h"
#include "plain.h"

namespace {

using ep::Format;
using ep::Shape;
using plain::Input;
using plain::Step;
using threads::Group;
using threads::kAlignment;
using threads::kChains;
using threads::kPoison;
using threads::kRanks;
using threads::Tensors;

class Rank {
  public:
    Rank(Group* group, int rank) : group_(group), s_(group->shape), rank_(rank) {
        for (int c = 0; c < kChains; ++c) tensors_.emplace_back(s_);
    }

    void dispatch_send(Step step) {
        Tensors& t = tensors_[step.chain];
        t.inputs.clear();
        for (int r = 0; r < kRanks; ++r) t.inputs.push_back(plain::make_input(s_, step, r));
        t.arrived = plain::arrivals(s_, t.inputs, rank_);
        const Input& mine = t.inputs[rank_];
        dropped_ += plain::count_dropped(s_, mine);
        self().dispatch_send(step.chain, {mine.x.data(), s_.hidden, mine.topk_idx.data(), 8,
                                          mine.weights.data(), mine.rows, &mine.valid});
    }

    void dispatch_recv(Step step) {
        Tensors& t = tensors_[step.chain];
        std::memset(t.x.data(), kPoison, t.x.size());
        std::fill(t.topk_idx.begin(), t.topk_idx.end(), -9);
        self().dispatch_recv(step.chain, t.target(group_->format));
        if (group_->format == Format::kCompact) {
            check_messages(t);
        } else {
            check_rows(t);
        }
    }

    void combine_send(Step step) {
        Tensors& t = tensors_[step.chain];
        std::memset(t.y.data(), 0xff, t.y.size() * sizeof(uint16_t));  // NaN where nothing belongs
        for (const Placed& p : placed(t)) {
            for (int i = 0; i < s_.hidden; ++i) {
                t.y[p.row * s_.hidden + i] = plain::answer(step, p.source, p.token, p.expert, i);
            }
        }
        self().combine_send(step.chain, t.y.data(), s_.hidden);
    }

    void combine_recv(Step step) {
        Tensors& t = tensors_[step.chain];
        const Input& mine = t.inputs[rank_];
        std::memset(t.out.data(), kPoison, t.out.size() * sizeof(uint16_t));
        self().combine_recv(step.chain, t.out.data(), mine.rows, &mine.valid);
        for (int token = 0; token < mine.rows; ++token) {
            for (int i = 0; i < s_.hidden; ++i) {
                const uint16_t want =
                    token < mine.valid
                        ? plain::combined(s_, step, group_->format == Format::kCompact, mine, rank_,
                                          token, i)
                        : uint16_t{0};
                CHECK(t.out[int64_t{token} * s_.hidden + i] == want);
            }
        }
        const ep::ChainState state = self().read_state(step.chain);
        CHECK(state.dispatched == step.epoch && state.combined == step.epoch);
    }

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
            if (!batched) CHECK(t.expert_offset[x] == offset);
            CHECK(t.recv_count[x] == row - first);
            offset += (row - first + kAlignment - 1) / kAlignment * kAlignment;
        }
        if (group_->format == Format::kContiguous) {
            CHECK(t.expert_offset[s_.num_local_experts()] == offset);
        }
        return list;
    }

    void check_rows(const Tensors& t) {
        check_num_messages(t);
        std::vector<bool> written(t.x.size() / s_.row_bytes());
        for (const Placed& p : placed(t)) {
            check_row(t, p.row, p.source, p.token);
            written[p.row] = true;
        }
        const std::vector<uint8_t> untouched(s_.row_bytes(), kPoison);
        for (size_t row = 0; row < written.size(); ++row) {
            if (written[row]) continue;
            const uint8_t* bytes = t.x.data() + row * s_.row_bytes();
            CHECK(std::memcmp(bytes, untouched.data(), untouched.size()) == 0);
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
        std::vector<float> scales;
        const uint16_t* x = t.inputs[source].x.data() + int64_t{token} * s_.hidden;
        const std::vector<uint8_t> bytes = plain::wire_row(s_, x, &scales);
        CHECK(std::memcmp(bytes.data(), t.x.data() + row * s_.row_bytes(), bytes.size()) == 0);
        for (int i = 0; i < s_.num_scales(); ++i) {
            CHECK(t.scales[row * s_.num_scales() + i] == scales[i]);
        }
    }

    Group* group_;
    const Shape& s_;
    int rank_;
    uint32_t dropped_ = 0;
    std::vector<Tensors> tensors_;
};

// The operations of a step, chains woven together in an order that all ranks share: they must
// agree on it, or one waits in chain 0 for a rank that waits in chain 1 for it.
void run_step(Rank* rank, uint64_t epoch) {
    using Operation = void (Rank::*)(Step);
    constexpr Operation kOrder[] = {&Rank::dispatch_send, &Rank::dispatch_recv, &Rank::combine_send,
                                    &Rank::combine_recv};
    std::mt19937_64 random(epoch);
    int next[kChains] = {};
    for (int done = 0; done < 4 * kChains; ++done) {
        int chain = static_cast<int>(random() % kChains);
        if (next[chain] == 4) chain = 1 - chain;
        (rank->*kOrder[next[chain]++])({chain, epoch});
    }
}

void run_rank(Group* group, int index, int steps) {
    Rank rank(group, index);
    std::mt19937_64 random(index);
    for (int epoch = 1; epoch <= steps; ++epoch) {
        if (random() % 16 == 0) usleep(random() % 500);  // ranks drift apart
        run_step(&rank, epoch);
    }
    rank.check_faults();

    // Rank 2 stays away: everyone else ends, blaming it, and after a reset all goes on.
    group->meet();
    ep::host::HostRank& self = *group->ranks[index];
    self.set_time_budget(50'000'000u);
    Tensors t(group->shape);
    if (index != 2) self.dispatch_send(0, {nullptr, 0, nullptr, 8, nullptr, 0, nullptr});
    group->meet();
    if (index != 2) {
        self.dispatch_recv(0, t.target(group->format));
        const auto fault = ep::host::read_fault(group->faults[index].fatal);
        CHECK(fault && fault->peer == 2);
        CHECK(self.read_state(0).dispatched == static_cast<uint64_t>(steps));
    }
    group->meet();
    self.reset();
    ep::host::clear_faults(&group->faults[index]);
    self.set_time_budget(60'000'000'000u);
    group->meet();
    Rank again(group, index);
    for (int epoch = 1; epoch <= 5; ++epoch) run_step(&again, epoch);
    CHECK(!ep::host::read_fault(group->faults[index].fatal));
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 4);
    const Shape shape{kRanks, 8, 3, 128, 5, kChains, static_cast<ep::Wire>(std::atoi(argv[2]))};
    Group group(shape, static_cast<Format>(std::atoi(argv[1])));
    std::vector<std::thread> threads;
    for (int r = 0; r < kRanks; ++r) threads.emplace_back(run_rank, &group, r, std::atoi(argv[3]));
    for (std::thread& thread : threads) thread.join();
    std::puts("all rows and sums are right");
}
