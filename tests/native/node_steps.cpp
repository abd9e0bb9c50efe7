// by_node of the CUDA kernels, emulated, beside the host's: same inputs, same tables.
//
//   node_steps NODES RANKS_PER_NODE TOKENS SEED
#include "checks.h"
// The emulator's names must be known before any device code.
#include "emulator/emulator.h"
//
#include "cuda/nodes_steps.cuh"
#include "host/nodes.h"

#include <random>

using namespace ep;

namespace {

struct Result {
    std::vector<uint8_t> goes;
    std::vector<int32_t> per_node, named;

    Result(const nodes::Place& p, int tokens)
        : goes(static_cast<size_t>(tokens) * p.num_nodes, 0xab),
          per_node(p.num_nodes, 0),
          named(static_cast<size_t>(tokens) * p.num_ranks(), -77) {}
    nodes::ByNode target(const std::vector<uint8_t>& in_rank, int tokens, bool with_names) {
        return {in_rank.data(), tokens, goes.data(), per_node.data(),
                with_names ? named.data() : nullptr};
    }
    bool operator==(const Result&) const = default;
};

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 5);
    const nodes::Place place{std::atoi(argv[1]), std::atoi(argv[2]), 0, 0};
    const int tokens = std::atoi(argv[3]);
    std::mt19937 random(static_cast<unsigned>(std::atoll(argv[4])));
    for (const bool with_names : {false, true}) {
        std::vector<uint8_t> in_rank(static_cast<size_t>(tokens) * place.num_ranks());
        for (uint8_t& one : in_rank) one = random() % 3 == 0;
        Result host(place, tokens), device(place, tokens);
        host::by_node(place, host.target(in_rank, tokens, with_names));
        const nodes::ByNodeArgs args{place, device.target(in_rank, tokens, with_names)};
        const int ctas = (tokens + nodes::kByNodeThreads - 1) / nodes::kByNodeThreads;
        emulator::run({{ctas, nodes::kByNodeThreads, 0, [&](uint8_t*) { nodes::by_node(args); }}},
                      random);
        CHECK(host == device);
    }
    std::puts("the kernel and the host agree");
}
