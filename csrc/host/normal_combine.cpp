// Combine of a CPU rank.
#include <algorithm>
#include <cstring>

#include "host/atomics.h"
#include "host/normal_rank.h"
#include "host/row_math.h"

namespace ep::host {
namespace {

using normal::InboxLayout;

constexpr Where kCombine{Op::kNormalCombine, 0};

}  // namespace

// The first of `from`'s rows in `source`'s inbox: behind those of lower ranks.
int64_t NormalRank::inbox_row(const int32_t* rank_prefix, int source, int from) const {
    int64_t row = 0;
    for (int r = 0; r < from; ++r) {
        if (r != source) row += normal::tokens_between(rank_prefix, control_.num_ranks, source, r);
    }
    return row;
}

void NormalRank::combine(const NormalCombine& work, const NormalTables& tables) {
    const int num_ranks = control_.num_ranks, me = context_.rank;
    if (!may_run(context_, kCombine)) return;
    const int64_t rows = inbox_row(tables.rank_prefix, me, num_ranks);
    require_block(work.inbox_offset, InboxLayout::make(rows, work.hidden, work.topk).bytes,
                  "inbox");
    const uint64_t epoch = state_->combined + 1;
    publish_credit(control_.combine_credit_offset, {work.inbox_offset, rows, epoch, work.terms()});
    Waiter waiter(context_, kCombine, epoch);
    for (int i = 1; i < num_ranks; ++i) {
        const int s = (me + i) % num_ranks;
        const normal::Credit* granted = credit(control_.combine_credit_offset, me, s);
        if (!waiter.wait(&granted->epoch, s)) return;
        if (!send_back(work, tables.rank_prefix, s, *granted)) return;
        store_release(chunks(s, me), epoch);  // acquired by the source below
    }
    for (int d = 0; d < num_ranks; ++d) {
        if (d != me && !waiter.wait(chunks(me, d), d)) return;
    }
    reduce(work, tables);
    state_->combined = epoch;
}

bool NormalRank::send_back(const NormalCombine& work, const int32_t* rank_prefix, int source,
                           const normal::Credit& granted) const {
    const int num_ranks = control_.num_ranks, me = context_.rank;
    const int64_t count = normal::tokens_between(rank_prefix, num_ranks, source, me);
    const int64_t from = normal::tokens_before(rank_prefix, num_ranks, source, me);
    const int64_t to = inbox_row(rank_prefix, source, me);
    const int64_t row_bytes = 2LL * work.hidden;
    const auto layout =
        InboxLayout::make(inbox_row(rank_prefix, source, num_ranks), work.hidden, work.topk);
    if (!fits(granted, layout.bytes, work.terms(), kCombine, source)) return false;
    uint8_t* inbox = data_[source] + granted.offset;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = work.row(from + i);
        std::memcpy(inbox + (to + i) * row_bytes, work.x + row * work.stride_bytes,
                    static_cast<size_t>(row_bytes));
        if (work.topk_weights != nullptr) {
            std::copy_n(
                work.topk_weights + row * work.topk, work.topk,
                reinterpret_cast<float*>(inbox + layout.topk_weights) + (to + i) * work.topk);
        }
    }
    return true;
}

void NormalRank::reduce(const NormalCombine& work, const NormalTables& tables) const {
    const int num_ranks = control_.num_ranks, me = context_.rank, hidden = work.hidden;
    const int64_t own = normal::tokens_before(tables.rank_prefix, num_ranks, me, me);
    const uint8_t* inbox = data_[me] + work.inbox_offset;
    const auto layout =
        InboxLayout::make(inbox_row(tables.rank_prefix, me, num_ranks), hidden, work.topk);
    const auto* inbox_weights = reinterpret_cast<const float*>(inbox + layout.topk_weights);
    std::vector<int64_t> first(num_ranks);
    for (int d = 0; d < num_ranks; ++d) first[d] = inbox_row(tables.rank_prefix, me, d);
    std::vector<float> sum(hidden), weights(work.topk);
    for (int64_t token = 0; token < work.num_tokens; ++token) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        std::fill(weights.begin(), weights.end(), 0.0f);
        for (const uint16_t* bias : work.bias) {
            if (bias != nullptr) row_math().add(bias + token * hidden, hidden, sum.data());
        }
        for (int d = 0; d < num_ranks; ++d) {
            const int32_t position = tables.send_position[token * num_ranks + d];
            if (position < 0) continue;
            const int64_t row = d == me ? work.row(own + position) : first[d] + position;
            const uint8_t* values =
                d == me ? work.x + row * work.stride_bytes : inbox + row * 2LL * hidden;
            row_math().add(reinterpret_cast<const uint16_t*>(values), hidden, sum.data());
            if (work.out_weights == nullptr) continue;
            const float* given = (d == me ? work.topk_weights : inbox_weights) + row * work.topk;
            for (int k = 0; k < work.topk; ++k) weights[k] += given[k];
        }
        row_math().round(sum.data(), hidden, work.out + token * hidden);
        if (work.out_weights != nullptr) {
            std::copy(weights.begin(), weights.end(), work.out_weights + token * work.topk);
        }
    }
}

}  // namespace ep::host
