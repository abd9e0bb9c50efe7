#include "host/nodes.h"

#include <algorithm>
#include <vector>

namespace ep::host {
namespace {

using nodes::Place;
using nodes::Stretch;
using nodes::Tables;

void write_prefixes(const Place& p, const Tables& t) {
    const int ranks = p.ranks_per_node;
    for (int d = 0; d < ranks; ++d) {
        int32_t sum = 0;
        for (int l = 0; l < ranks; ++l) {
            sum += nodes::sent_on_before(p, t, p.num_nodes, l, d);
            t.node_prefix[l * ranks + d] = sum;
        }
        for (int l = 0; l < ranks; ++l) t.reach[l * ranks + d] = l < p.local ? 0 : sum;
    }
}

void place_rows(const Place& p, const Tables& t) {
    const int ranks = p.ranks_per_node;
    std::vector<int32_t> sent(ranks, 0);
    int node = 0;
    for (int64_t row = 0; row < t.rail_rows; ++row) {
        while (node + 1 < p.num_nodes && row >= nodes::rail_end(p, t, node)) ++node;
        for (int d = 0; d < ranks; ++d) {
            const bool goes = t.goes[row * ranks + d] != 0;
            const int32_t position = goes ? sent[d]++ : -1;
            t.position[row * ranks + d] = position;
            t.target[row * ranks + d] = goes ? position + nodes::shift(p, t, node, d) : -1;
        }
    }
}

void write_order(const Place& p, const Tables& t) {
    std::vector<Stretch> stretches;
    int32_t end = 0;
    for (int l = 0; l < p.ranks_per_node; ++l) {
        for (int n = 0; n < p.num_nodes; ++n) {
            end += nodes::tokens_to(p, t, n, l, p.local);
            stretches.push_back({end, nodes::first_row(p, t, n, l, p.local)});
        }
    }
    for (int32_t i = 0; i < t.num_rows; ++i) {
        t.order[i] = nodes::row_at(stretches.data(), static_cast<int>(stretches.size()), i);
    }
}

}  // namespace

void by_node(const Place& place, const nodes::ByNode& b) {
    const int ranks = place.num_ranks();
    std::fill_n(b.tokens_per_node, place.num_nodes, 0);
    for (int64_t token = 0; token < b.num_tokens; ++token) {
        const uint8_t* goes = b.is_token_in_rank + token * ranks;
        for (int n = 0; n < place.num_nodes; ++n) {
            const uint8_t* first = goes + n * place.ranks_per_node;
            const bool any = std::any_of(first, first + place.ranks_per_node,
                                         [](uint8_t one) { return one != 0; });
            b.is_token_in_node[token * place.num_nodes + n] = any;
            b.tokens_per_node[n] += any;
        }
        for (int r = 0; b.named != nullptr && r < ranks; ++r) {
            b.named[token * ranks + r] = goes[r] != 0 ? r : -1;
        }
    }
}

void node_tables(const Place& place, const Tables& tables) {
    write_prefixes(place, tables);
    place_rows(place, tables);
    write_order(place, tables);
}

}  // namespace ep::host
