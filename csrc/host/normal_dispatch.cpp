// Layout, notify and dispatch of a CPU rank.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "host/atomics.h"
#include "host/normal_rank.h"

namespace ep::host {
namespace {

using normal::BlockLayout;
using normal::BlockSize;
using normal::Credit;

constexpr Where kNotify{Op::kNormalNotify, 0};
constexpr Where kDispatch{Op::kNormalDispatch, 0};

template <class T>
T* at(uint8_t* block, int64_t offset) {
    return reinterpret_cast<T*>(block + offset);
}

// A peer's numbers index our memory: tokens to each rank [R], then rows per expert [L].
bool plausible(const Context& context, const int32_t* words, int num_ranks, int num_words,
               int source) {
    for (int i = 0; i < num_words; ++i) {
        const int limit = normal::kMaxTokensPerRank * (i < num_ranks ? 1 : kMaxTopk);
        if (words[i] >= 0 && words[i] <= limit) continue;
        fail(context, kNotify, FaultCode::kCount, source, static_cast<uint64_t>(limit),
             static_cast<uint32_t>(words[i]));
        return false;
    }
    return true;
}

}  // namespace

// False: the layout contradicts itself, and peers would wait for, or keep, rows that never come.
bool NormalRank::place_tokens(const NormalLayout& layout, int64_t num_tokens,
                              int32_t* send_position) const {
    const int num_ranks = control_.num_ranks;
    std::vector<int32_t> sent(num_ranks, 0);
    for (int64_t entry = 0; entry < num_tokens * num_ranks; ++entry) {
        const bool goes = layout.is_token_in_rank[entry] != 0;
        send_position[entry] = goes ? sent[entry % num_ranks]++ : -1;
    }
    for (int d = 0; d < num_ranks; ++d) {
        if (sent[d] == layout.tokens_per_rank[d]) continue;
        fail(context_, kNotify, FaultCode::kCount, context_.rank, static_cast<uint64_t>(sent[d]),
             static_cast<uint32_t>(layout.tokens_per_rank[d]));
        return false;
    }
    return true;
}

void NormalRank::layout(const NormalRoutes& routes, int num_tokens, int num_experts,
                        const NormalLayout& into) {
    const int num_ranks = control_.num_ranks, local_experts = num_experts / num_ranks;
    std::fill_n(into.tokens_per_rank, num_ranks, 0);
    std::fill_n(into.tokens_per_expert, num_experts, 0);
    uint32_t dropped = 0;
    int64_t first_bad = 0;
    for (int64_t token = 0; token < num_tokens; ++token) {
        uint8_t* goes = into.is_token_in_rank + token * num_ranks;
        std::fill_n(goes, num_ranks, uint8_t{0});
        for (int k = 0; k < routes.topk; ++k) {
            const int64_t expert = routes.expert(token * routes.topk + k);
            if (expert == -1) continue;
            if (expert < 0 || expert >= num_experts) {
                if (dropped++ == 0) first_bad = expert;
                continue;
            }
            ++into.tokens_per_expert[expert];
            goes[expert / local_experts] = 1;
        }
        for (int r = 0; r < num_ranks; ++r) into.tokens_per_rank[r] += goes[r];
    }
    if (dropped > 0) {
        context_.shape.num_experts = num_experts;  // the record names the limit
        record_routing(context_, kDispatch, dropped, first_bad);
    }
}

void NormalRank::notify(const NormalLayout& layout, int num_tokens, int num_experts, int alignment,
                        const NormalTables& tables, int32_t* recv_counts, int32_t* host_counts) {
    if (!may_run(context_, kNotify)) return;
    const int num_ranks = control_.num_ranks, local_experts = num_experts / num_ranks;
    const int me = context_.rank;
    const uint64_t epoch = state_->notified + 1;
    if (!place_tokens(layout, num_tokens, tables.send_position)) return;
    for (int d = 0; d < num_ranks; ++d) {
        uint8_t* slot = notify_slot(d, epoch, me);
        auto* words = reinterpret_cast<int32_t*>(slot);
        std::copy_n(layout.tokens_per_rank, num_ranks, words);
        std::copy_n(layout.tokens_per_expert + d * local_experts, local_experts, words + num_ranks);
        store_release(tag_of(slot, control_.notify_stride), epoch);  // acquired in wait() below
    }
    std::vector<int32_t> total(num_ranks, 0);
    std::fill_n(recv_counts, local_experts, 0);
    int32_t most_inbox = 0;
    Waiter waiter(context_, kNotify, epoch);
    for (int s = 0; s < num_ranks; ++s) {
        uint8_t* slot = notify_slot(me, epoch, s);
        if (!waiter.wait(tag_of(slot, control_.notify_stride), s)) return;
        const auto* words = reinterpret_cast<const int32_t*>(slot);
        if (!plausible(context_, words, num_ranks, num_ranks + local_experts, s)) return;
        int32_t away = 0;
        for (int d = 0; d < num_ranks; ++d) {
            total[d] += words[d];
            tables.rank_prefix[s * num_ranks + d] = total[d];
            away += d == s ? 0 : words[d];
        }
        most_inbox = std::max(most_inbox, away);
        for (int l = 0; l < local_experts; ++l) recv_counts[l] += words[num_ranks + l];
    }
    for (int l = 0; l < local_experts; ++l) {
        recv_counts[l] = static_cast<int32_t>(round_up(recv_counts[l], alignment));
    }
    state_->notified = epoch;
    if (host_counts == nullptr) return;
    const normal::HostCounts words{local_experts};
    host_counts[words.kTotal] = total[me];
    std::copy_n(recv_counts, local_experts, host_counts + words.kExperts);
    host_counts[words.most_rows()] = *std::max_element(total.begin(), total.end());
    host_counts[words.most_inbox()] = most_inbox;
    // The caller is the host, which has waited for all of it.
    host_counts[words.ready()] = static_cast<int32_t>(epoch);
}

void NormalRank::dispatch(const NormalRows& rows, const NormalRoutes& routes, int num_experts,
                          const NormalTables& tables, int64_t block_offset, int64_t block_rows,
                          BlockSize size) {
    const auto block = BlockLayout::make(block_rows, rows.row_bytes, rows.num_scales, routes.topk);
    require_block(block_offset, block.bytes, "block");
    if (!may_run(context_, kDispatch)) return;
    const int num_ranks = control_.num_ranks, me = context_.rank;
    const uint64_t epoch = state_->dispatched + 1;
    if (size == BlockSize::kAhead) {
        for (int d = 0; d < num_ranks; ++d) {
            if (normal::tokens_to(tables.rank_prefix, num_ranks, d) > block_rows) return;
        }
    }
    if (size == BlockSize::kPadded) {
        const int32_t received = normal::tokens_to(tables.rank_prefix, num_ranks, me);
        pad_block(routes, block, block_offset, received, block_rows);
    }
    publish_credit(control_.dispatch_credit_offset,
                   {block_offset, block_rows, epoch,
                    normal::pack_terms(rows.row_bytes, rows.num_scales, routes.topk, num_experts)});
    Waiter waiter(context_, kDispatch, epoch);
    for (int i = 0; i < num_ranks; ++i) {
        const int d = (me + i) % num_ranks;  // not all to rank 0 first
        const Credit* granted = credit(control_.dispatch_credit_offset, me, d);
        if (!waiter.wait(&granted->epoch, d)) return;
        if (!send_rows(rows, routes, num_experts, tables, d, *granted)) return;
        store_release(done(d, me), normal::done_word(epoch));  // acquired by the destination below
    }
    Waiter arrivals(context_, kDispatch, normal::done_word(epoch));
    for (int s = 0; s < num_ranks; ++s) {
        if (!arrivals.wait(done(me, s), s)) return;
    }
    state_->dispatched = epoch;
}

void NormalRank::pad_block(const NormalRoutes& routes, const BlockLayout& layout, int64_t offset,
                           int64_t first, int64_t rows) const {
    if (first >= rows) return;
    uint8_t* block = data_[context_.rank] + offset;
    const int64_t count = (rows - first) * routes.topk;
    std::fill_n(at<int64_t>(block, layout.topk_idx) + first * routes.topk, count, int64_t{-1});
    std::fill_n(at<float>(block, layout.topk_weights) + first * routes.topk, count, 0.0f);
}

bool NormalRank::send_rows(const NormalRows& rows, const NormalRoutes& routes, int num_experts,
                           const NormalTables& tables, int destination,
                           const Credit& granted) const {
    const int num_ranks = control_.num_ranks, local_experts = num_experts / num_ranks;
    const int topk = routes.topk;
    const int64_t first_expert = static_cast<int64_t>(destination) * local_experts;
    const auto layout = BlockLayout::make(granted.rows, rows.row_bytes, rows.num_scales, topk);
    const uint64_t terms = normal::pack_terms(rows.row_bytes, rows.num_scales, topk, num_experts);
    if (!fits(granted, layout.bytes, terms, kDispatch, destination)) return false;
    uint8_t* block = data_[destination] + granted.offset;
    const int me = context_.rank;
    const int64_t base = normal::tokens_before(tables.rank_prefix, num_ranks, me, destination);
    const int64_t announced =
        base + normal::tokens_between(tables.rank_prefix, num_ranks, me, destination);
    const int64_t end = std::min(announced, granted.rows);  // behind it lie others' rows
    for (int64_t token = 0; token < rows.num_tokens; ++token) {
        const int32_t position = tables.send_position[token * num_ranks + destination];
        if (position < 0) continue;
        const int64_t row = base + position;
        if (row >= end) {
            fail(context_, kDispatch, FaultCode::kCount, destination, static_cast<uint64_t>(end),
                 static_cast<uint64_t>(row) + 1);
            return false;
        }
        std::memcpy(block + layout.x + row * rows.row_bytes, rows.x + token * rows.stride_bytes,
                    static_cast<size_t>(rows.row_bytes));
        uint32_t* scales = at<uint32_t>(block, layout.scales) + row * rows.num_scales;
        for (int g = 0; g < rows.num_scales; ++g) {
            scales[g] = rows.scales[token * rows.scale_stride_token + g * rows.scale_stride_group];
        }
        for (int64_t k = 0; k < topk; ++k) {
            const int64_t from = token * topk + k, to = row * topk + k;
            bool there = true;  // whether the entry names an expert of the destination
            if (routes.topk_idx != nullptr) {
                const int64_t expert = routes.expert(from) - first_expert;
                there = expert >= 0 && expert < local_experts;
                at<int64_t>(block, layout.topk_idx)[to] = there ? expert : -1;
            }
            if (routes.weights != nullptr) {
                at<float>(block, layout.topk_weights)[to] = there ? routes.weights[from] : 0.0f;
            }
        }
        at<int32_t>(block, layout.source_token)[row] =
            rows.source_token == nullptr ? static_cast<int32_t>(token) : rows.source_token[token];
    }
    return true;
}

}  // namespace ep::host
