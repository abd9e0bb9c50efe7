// Groups that span nodes: rank n * G + l is rank l of node n, of N nodes with G ranks each.
//
// Two smaller groups do the work. The *rail* of a rank joins the ranks with its l on all nodes: a
// token goes once to the rail's rank on each node that has one of its experts. The *node* joins the
// ranks of one node: there the rail's rows are sent on, straight to the place that a dispatch over
// the whole group gives them, and their results are added up before they go back.
#pragma once

#include "ep/normal.h"

namespace ep::nodes {

struct Place {
    int32_t num_nodes;
    int32_t ranks_per_node;
    int32_t node;  // of this rank
    int32_t local;  // its number there

    EP_HD int num_ranks() const { return num_nodes * ranks_per_node; }
    EP_HD int rank_of(int n, int l) const { return n * ranks_per_node + l; }
};

// Where this rank's tokens go, node by node.
struct ByNode {
    const uint8_t* is_token_in_rank;  // bool [T, R]
    int32_t num_tokens;
    uint8_t* is_token_in_node;  // bool [T, N]
    int32_t* tokens_per_node;  // [N]
    int32_t* named;  // [T, R]: the rank's number where the token goes there, else -1; or nullptr
};

// What this rank's part in the node needs, worked out of the counts that all ranks know.
struct Tables {
    const int32_t* rank_prefix;  // [R, R], of the whole group
    const int32_t* rail_prefix;  // [N, N], of the rail
    const uint8_t* goes;  // bool [rail_rows, G]: which ranks of the node a rail row goes to
    int32_t rail_rows;  // that this rank got from its rail; more than were sent go nowhere
    int32_t num_rows;  // that this rank received in the end

    // The node as a group whose ranks each send the rows of their rail: by node, then token.
    int32_t* node_prefix;  // [G, G]
    int32_t* position;  // [rail_rows, G] the row's index among those to that rank, or -1

    // As a dispatch of the node takes it: every rank's rows begin at 0, and positions are rows of
    // the whole group's order.
    int32_t* reach;  // [G, G] inclusive: nothing before this rank, everything behind it
    int32_t* target;  // [rail_rows, G]

    int32_t* order;  // [num_rows]: received rows by rank of the node that sent them, node, token
};

// Tokens from rank l of node n to rank d of this node.
EP_HD int32_t tokens_to(const Place& p, const Tables& t, int n, int l, int d) {
    return normal::tokens_between(t.rank_prefix, p.num_ranks(), p.rank_of(n, l),
                                  p.rank_of(p.node, d));
}
// Row of the first of them.
EP_HD int32_t first_row(const Place& p, const Tables& t, int n, int l, int d) {
    return normal::tokens_before(t.rank_prefix, p.num_ranks(), p.rank_of(n, l),
                                 p.rank_of(p.node, d));
}
// Tokens that rank l of this node sends on to rank d of it, from nodes below n.
EP_HD int32_t sent_on_before(const Place& p, const Tables& t, int n, int l, int d) {
    int32_t sum = 0;
    for (int m = 0; m < n; ++m) sum += tokens_to(p, t, m, l, d);
    return sum;
}
// From a position among this rank's rows to d, if they come of node n, to a row there.
EP_HD int32_t shift(const Place& p, const Tables& t, int n, int d) {
    return first_row(p, t, n, p.local, d) - sent_on_before(p, t, n, p.local, d);
}
// Rail rows from nodes 0 .. n.
EP_HD int32_t rail_end(const Place& p, const Tables& t, int n) {
    return t.rail_prefix[n * p.num_nodes + p.node];
}

// A stretch of received rows, of one rank of the node and one node of origin. Stretch l * N + n of
// the order is rows from `row` on, and ends before `end` in it.
struct Stretch {
    int32_t end;
    int32_t row;
};

// Where index i of the order lies; i itself behind the last row that was sent.
EP_HD int32_t row_at(const Stretch* stretches, int count, int32_t i) {
    int32_t begin = 0;
    for (int j = 0; j < count; ++j) {
        if (i < stretches[j].end) return stretches[j].row + i - begin;
        begin = stretches[j].end;
    }
    return i;
}

}  // namespace ep::nodes
