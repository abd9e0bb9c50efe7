// Normal operations of four ranks as threads: random routes, every row and every sum checked
// against a plain recomputation. Meant to run under a sanitizer.
//
//   normal_threads STEPS
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <thread>

#include "checks.h"
#include "ep/fp8.h"
#include "host/faults.h"
#include "host/normal_rank.h"

namespace {

using ep::host::NormalRank;
using ep::normal::BlockLayout;
using ep::normal::BlockSize;

constexpr int kRanks = 4;
constexpr int kExperts = 12;
constexpr int kLocal = kExperts / kRanks;
constexpr int kTopk = 3;
constexpr int kHidden = 24;  // row strides and offsets that are no multiple of a line
constexpr int kScales = 5;
constexpr int kMostTokens = 9;
constexpr int kMostRows = kRanks * kMostTokens;
constexpr int kRowBytes = 2 * kHidden;
constexpr int64_t kDataBytes = 1 << 16;
constexpr uint64_t kPatientNs = 60'000'000'000u;

// What one rank sends in one step: every rank can work out every rank's.
struct Input {
    int num_tokens;
    std::vector<uint16_t> x;
    std::vector<uint32_t> scales;  // [kScales, T]: groups apart
    std::vector<int64_t> topk_idx;
    std::vector<float> weights;

    Input(int rank, int step) {
        std::mt19937 random(static_cast<unsigned>(1000 * step + rank));
        num_tokens = static_cast<int>(random() % (kMostTokens + 1));
        for (int i = 0; i < num_tokens * kHidden; ++i) {
            x.push_back(ep::float_to_bf16(static_cast<float>(random() % 4096) / 64 - 32));
        }
        for (int i = 0; i < num_tokens * kScales; ++i) scales.push_back(random());
        for (int i = 0; i < num_tokens * kTopk; ++i) {
            const auto expert = static_cast<int64_t>(random() % (kExperts + 3)) - 2;
            topk_idx.push_back(expert);  // -2, -1 and kExperts name none
            weights.push_back(static_cast<float>(random() % 512) / 128);
        }
    }
    bool goes(int token, int rank) const {
        const auto* idx = topk_idx.data() + token * kTopk;
        return std::any_of(idx, idx + kTopk,
                           [&](int64_t e) { return e >= 0 && e < kExperts && e / kLocal == rank; });
    }
};

struct Arrival {
    int source, token;
};

std::vector<Arrival> arrivals(const std::vector<Input>& inputs, int rank) {
    std::vector<Arrival> list;
    for (int s = 0; s < kRanks; ++s) {
        for (int t = 0; t < inputs[s].num_tokens; ++t) {
            if (inputs[s].goes(t, rank)) list.push_back({s, t});
        }
    }
    return list;
}

// What rank `rank` answers for a token, BF16.
uint16_t answer(int step, int rank, int source, int token, int i) {
    const int value = (step * 31 + rank * 17 + source * 7 + token * 3 + i) % 200 - 100;
    return ep::float_to_bf16(static_cast<float>(value) / 8);
}
float weight_answer(int rank, int source, int token, int k) {
    return static_cast<float>(rank * 64 + source * 16 + token + 4 * k) / 16;
}

struct Group {
    std::vector<Memory> control, data, local;
    std::vector<ep::FaultBoard> faults{kRanks};
    std::vector<NormalRank> ranks;
    pthread_barrier_t barrier;

    Group() {
        std::vector<uintptr_t> controls, datas;
        for (int r = 0; r < kRanks; ++r) {
            control.push_back(zeroed(ep::normal::ControlLayout::make(kRanks, kExperts).bytes));
            data.push_back(zeroed(kDataBytes));
            local.push_back(zeroed(sizeof(ep::normal::State)));
            controls.push_back(reinterpret_cast<uintptr_t>(control[r].get()));
            datas.push_back(reinterpret_cast<uintptr_t>(data[r].get()));
        }
        for (int r = 0; r < kRanks; ++r) {
            ranks.emplace_back(kRanks, r, kExperts, controls, datas, kDataBytes,
                               reinterpret_cast<uintptr_t>(local[r].get()),
                               reinterpret_cast<uintptr_t>(&faults[r]));
            ranks[r].set_time_budget(kPatientNs);
        }
        pthread_barrier_init(&barrier, nullptr, kRanks);
    }
    void meet() { pthread_barrier_wait(&barrier); }
};

class Rank {
  public:
    Rank(Group* group, int rank) : group_(group), rank_(rank), self_(group->ranks[rank]) {}

    void run(int step) {
        inputs_.clear();
        for (int r = 0; r < kRanks; ++r) inputs_.emplace_back(r, step);
        arrived_ = arrivals(inputs_, rank_);
        route();
        // Blocks of varying place and size, always the same on all ranks or on none.
        const bool exact = step % 2 == 0;
        const int64_t rows = exact ? static_cast<int64_t>(arrived_.size()) : kMostRows;
        const int64_t offset = ep::normal::kLine * (step % 5 + rank_);
        send(rows, offset, exact);
        check_block(rows, offset, exact);
        combine(step);
    }

    void route() {
        Input& mine = inputs_[rank_];
        const ep::NormalRoutes routes{mine.topk_idx.data(), 8, nullptr, kTopk};
        const ep::NormalLayout layout{per_rank_, per_expert_, goes_};
        std::fill_n(goes_, sizeof(goes_), uint8_t{7});
        self_.layout(routes, mine.num_tokens, kExperts, layout);
        self_.notify(layout, mine.num_tokens, kExperts, 4, {prefix_, position_}, counts_, words_);
        const int32_t total = prefix_[(kRanks - 1) * kRanks + rank_];
        CHECK(total == static_cast<int32_t>(arrived_.size()) && words_[0] == total);
        int32_t rows[kLocal] = {};
        for (const Arrival& a : arrived_) {
            for (int k = 0; k < kTopk; ++k) {
                const int64_t e = inputs_[a.source].topk_idx[a.token * kTopk + k];
                if (e >= 0 && e < kExperts && e / kLocal == rank_) ++rows[e % kLocal];
            }
        }
        for (int l = 0; l < kLocal; ++l) {
            CHECK(counts_[l] == (rows[l] + 3) / 4 * 4 && words_[1 + l] == counts_[l]);
        }
    }

    void send(int64_t rows, int64_t offset, bool exact) {
        Input& mine = inputs_[rank_];
        // Nobody writes here before this rank's credit says so.
        std::memset(heap() + offset, 0xab, layout(rows).bytes);
        self_.dispatch({reinterpret_cast<const uint8_t*>(mine.x.data()), kRowBytes, kRowBytes,
                        mine.scales.data(), 1, mine.num_tokens, kScales, mine.num_tokens},
                       {mine.topk_idx.data(), 8, mine.weights.data(), kTopk}, kExperts,
                       {prefix_, position_}, offset, rows,
                       exact ? BlockSize::kExact : BlockSize::kPadded);
    }

    void check_block(int64_t rows, int64_t offset, bool exact) {
        const BlockLayout at = layout(rows);
        const uint8_t* block = heap() + offset;
        const auto* scales = reinterpret_cast<const uint32_t*>(block + at.scales);
        const auto* idx = reinterpret_cast<const int64_t*>(block + at.topk_idx);
        const auto* weights = reinterpret_cast<const float*>(block + at.topk_weights);
        const auto* tokens = reinterpret_cast<const int32_t*>(block + at.source_token);
        for (size_t i = 0; i < arrived_.size(); ++i) {
            const Arrival& a = arrived_[i];
            const Input& in = inputs_[a.source];
            CHECK(std::memcmp(block + at.x + i * kRowBytes, in.x.data() + a.token * kHidden,
                              kRowBytes) == 0);
            CHECK(tokens[i] == a.token);
            for (int g = 0; g < kScales; ++g) {
                CHECK(scales[i * kScales + g] == in.scales[g * in.num_tokens + a.token]);
            }
            for (int k = 0; k < kTopk; ++k) {
                const int64_t e = in.topk_idx[a.token * kTopk + k];
                const bool here = e >= 0 && e < kExperts && e / kLocal == rank_;
                CHECK(idx[i * kTopk + k] == (here ? e % kLocal : -1));
                CHECK(weights[i * kTopk + k] == (here ? in.weights[a.token * kTopk + k] : 0.0f));
            }
        }
        for (int64_t i = static_cast<int64_t>(arrived_.size()) * kTopk; i < rows * kTopk; ++i) {
            CHECK(!exact && idx[i] == -1 && weights[i] == 0.0f);
        }
    }

    void combine(int step) {
        std::vector<uint16_t> y(arrived_.size() * kHidden);
        std::vector<float> w(arrived_.size() * kTopk);
        for (size_t i = 0; i < arrived_.size(); ++i) {
            const auto [s, t] = arrived_[i];
            for (int c = 0; c < kHidden; ++c) y[i * kHidden + c] = answer(step, rank_, s, t, c);
            for (int k = 0; k < kTopk; ++k) w[i * kTopk + k] = weight_answer(rank_, s, t, k);
        }
        const Input& mine = inputs_[rank_];
        const bool biased = step % 3 == 0;
        std::vector<uint16_t> out(kMostTokens * kHidden, 0xabab);
        std::vector<float> sums(kMostTokens * kTopk, -7.0f);
        // The inbox lies over the block: combine only begins once that is no longer read.
        self_.combine({reinterpret_cast<const uint8_t*>(y.data()),
                       kRowBytes,
                       kHidden,
                       w.data(),
                       kTopk,
                       {biased ? mine.x.data() : nullptr, nullptr},
                       mine.num_tokens,
                       ep::normal::kLine * (step % 3),
                       out.data(),
                       sums.data()},
                      {prefix_, position_});
        for (int t = 0; t < mine.num_tokens; ++t) {
            for (int c = 0; c < kHidden; ++c) {
                double sum = biased ? ep::bf16_to_float(mine.x[t * kHidden + c]) : 0.0;
                for (int d = 0; d < kRanks; ++d) {
                    if (mine.goes(t, d)) sum += ep::bf16_to_float(answer(step, d, rank_, t, c));
                }
                // Small multiples of 2^-6: the FP32 sum is exact in any order.
                CHECK(out[t * kHidden + c] == ep::float_to_bf16(static_cast<float>(sum)));
            }
            for (int k = 0; k < kTopk; ++k) {
                float sum = 0.0f;
                for (int d = 0; d < kRanks; ++d) {
                    if (mine.goes(t, d)) sum += weight_answer(d, rank_, t, k);
                }
                CHECK(sums[t * kTopk + k] == sum);
            }
        }
        for (size_t i = mine.num_tokens * kHidden; i < out.size(); ++i) CHECK(out[i] == 0xabab);
    }

    // Epochs do not move in an operation that failed; the fault names who is to blame.
    void expect_fault(ep::FaultCode code, int by, int peer) {
        const auto fault = ep::host::read_fault(group_->faults[rank_].fatal);
        CHECK(fault.has_value() && fault->peer == peer);
        const auto found = static_cast<ep::FaultCode>(fault->code);
        CHECK(found == code || (found == ep::FaultCode::kAborted && (by < 0 || fault->rank == by)));
    }
    void recover() {
        group_->meet();
        self_.reset();
        ep::host::clear_faults(&group_->faults[rank_]);
        self_.set_time_budget(kPatientNs);
        group_->meet();
    }

    int32_t* position() { return position_; }
    int32_t* announced() { return per_rank_; }
    int num_tokens() const { return inputs_[rank_].num_tokens; }
    void notify_again() {
        self_.notify({per_rank_, per_expert_, goes_}, num_tokens(), kExperts, 4,
                     {prefix_, position_}, counts_, words_);
    }

  private:
    uint8_t* heap() { return group_->data[rank_].get(); }
    static BlockLayout layout(int64_t rows) {
        return BlockLayout::make(rows, kRowBytes, kScales, kTopk);
    }

    Group* group_;
    int rank_;
    NormalRank& self_;
    std::vector<Input> inputs_;
    std::vector<Arrival> arrived_;
    int32_t per_rank_[kRanks], per_expert_[kExperts], prefix_[kRanks * kRanks];
    int32_t position_[kMostTokens * kRanks], counts_[kLocal], words_[4 + kLocal];
    uint8_t goes_[kMostTokens * kRanks];
};

// Everyone but `index` 2 comes: all blame rank 2, in notify and in what follows it.
void check_absent(Group* group, Rank* rank, int index) {
    group->meet();
    NormalRank& self = group->ranks[index];
    const uint64_t before = self.state().notified;
    self.set_time_budget(50'000'000u);
    if (index != 2) {
        rank->notify_again();
        rank->expect_fault(ep::FaultCode::kTimeout, -1, 2);
        CHECK(self.state().notified == before);
    }
    rank->recover();
}

// Rank 1 announces one token more than its table sends.
void check_contradiction(Group* group, Rank* rank, int index) {
    if (index == 1) ++rank->announced()[3];
    rank->notify_again();
    rank->expect_fault(ep::FaultCode::kCount, 1, 1);
    (void)group;
    rank->recover();
}

// Rank 3's positions point behind what it announced, at rows of other ranks.
void check_wrong_position(Group* group, Rank* rank, int index) {
    rank->run(4);
    group->meet();
    if (index == 3) {
        for (int i = 0; i < rank->num_tokens() * kRanks; ++i) {
            if (rank->position()[i] >= 0) rank->position()[i] += kMostTokens;
        }
    }
    rank->send(kMostRows, 0, false);
    const auto fault = ep::host::read_fault(group->faults[index].fatal);
    CHECK(fault.has_value());
    if (index == 3) CHECK(fault->code == static_cast<uint32_t>(ep::FaultCode::kCount));
    rank->recover();
}

// A credit that points out of the heap is refused by who would write there.
void check_damaged_credit(Group* group, Rank* rank, int index) {
    rank->run(4);
    group->meet();
    NormalRank& self = group->ranks[index];
    self.set_time_budget(200'000'000u);
    const auto control = ep::normal::ControlLayout::make(kRanks, kExperts);
    if (index == 0) {
        // In rank 0's heap, rank 1's word for the next epoch, with an offset of its own.
        auto* credit = reinterpret_cast<ep::normal::Credit*>(
            group->control[0].get() + control.dispatch_credit_offset + ep::normal::kLine);
        *credit = {kDataBytes - 64, kMostRows, self.state().dispatched + 1, 0};
    }
    group->meet();
    if (index != 1) rank->send(kMostRows, 0, false);
    group->meet();
    const auto fault = ep::host::read_fault(group->faults[index].fatal);
    if (index != 1) CHECK(fault.has_value() && fault->peer == 1);
    if (index == 0) CHECK(fault->code == static_cast<uint32_t>(ep::FaultCode::kCount));
    rank->recover();
}

void run_rank(Group* group, int index, int steps) {
    Rank rank(group, index);
    std::mt19937_64 random(index);
    for (int step = 1; step <= steps; ++step) {
        if (random() % 16 == 0) usleep(random() % 500);  // ranks drift apart
        rank.run(step);
    }
    CHECK(!ep::host::read_fault(group->faults[index].fatal));
    CHECK(group->ranks[index].state().dispatched == static_cast<uint64_t>(steps));
    check_absent(group, &rank, index);
    check_contradiction(group, &rank, index);
    check_wrong_position(group, &rank, index);
    check_damaged_credit(group, &rank, index);
    for (int step = 1; step <= 5; ++step) rank.run(step);
    CHECK(!ep::host::read_fault(group->faults[index].fatal));
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 2);
    Group group;
    std::vector<std::thread> threads;
    for (int r = 0; r < kRanks; ++r) threads.emplace_back(run_rank, &group, r, std::atoi(argv[1]));
    for (std::thread& thread : threads) thread.join();
    std::puts("all rows and sums are right");
}
