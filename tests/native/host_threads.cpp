// Four ranks as threads over heaps of one process: random routes on two chains, dispatches and
// combines in any order, every row and every sum checked against a plain recomputation. Meant to
// run under a sanitizer.
//
//   host_threads FORMAT WIRE STEPS     (FORMAT 0..2, WIRE 0..2 as in ep/shape.h)
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "rank.h"

namespace {

using ep::Format;
using ep::Shape;
using threads::Group;
using threads::kChains;
using threads::kRanks;
using threads::Rank;
using threads::Tensors;

// Operations in an order that all ranks share: they must agree on it, or one waits in chain 0 for a
// rank that waits in chain 1 for it.
void walk(Rank* rank, int index, int steps) {
    std::mt19937_64 shared(steps), own(index);
    for (int i = 0; i < 8 * steps; ++i) {
        if (own() % 128 == 0) usleep(own() % 500);  // ranks drift apart
        rank->advance(&shared);
    }
    rank->finish();
}

void run_rank(Group* group, int index, int steps) {
    Rank rank(group, index);
    walk(&rank, index, steps);
    rank.check_faults();

    // Rank 2 stays away: everyone else ends, blaming it, and after a reset all goes on.
    group->meet();
    ep::host::HostRank& self = *group->ranks[index];
    self.set_time_budget(50'000'000u);
    Tensors t(group->shape);
    t.call.wire = group->shape.wire;
    t.inputs.resize(kRanks);
    if (index != 2) self.dispatch_send(0, t.send(group->shape, index));
    group->meet();
    if (index != 2) {
        self.dispatch_recv(0, t.target(group->shape, group->format));
        const auto fault = ep::host::read_fault(group->faults[index].fatal);
        CHECK(fault && fault->peer == 2);
        CHECK(self.read_state(0).dispatched == rank.dispatched(0));
    }
    group->meet();
    self.reset();
    ep::host::clear_faults(&group->faults[index]);
    self.set_time_budget(60'000'000'000u);
    group->meet();
    Rank again(group, index);
    walk(&again, index, 5);
    CHECK(!ep::host::read_fault(group->faults[index].fatal));
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 4);
    const auto wire = static_cast<ep::Wire>(std::atoi(argv[2]));
    const bool opaque = wire == ep::Wire::kOpaque;
    const Shape shape{kRanks, 8, 3, 128, 5, kChains, wire, opaque ? 176 : 0, opaque ? 3 : 0};
    Group group(shape, static_cast<Format>(std::atoi(argv[1])));
    std::vector<std::thread> threads;
    for (int r = 0; r < kRanks; ++r) threads.emplace_back(run_rank, &group, r, std::atoi(argv[3]));
    for (std::thread& thread : threads) thread.join();
    std::puts("all rows and sums are right");
}
