#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "ep/fp8.h"
#include "host/atomics.h"
#include "host/faults.h"
#include "host/host_rank.h"
#include "host/masks.h"
#include "host/waiter.h"

namespace ep::host {
namespace {

void require_target(const Shape& shape, const RecvTarget& target) {
    const auto require = [](bool holds, const char* what) {
        if (!holds) throw std::invalid_argument(what);
    };
    require(target.x != nullptr, "RecvTarget.x must not be null");
    require(target.num_rows > 0, "RecvTarget.num_rows must be positive");
    require(target.recv_count != nullptr, "RecvTarget.recv_count must not be null");
    require(target.num_messages != nullptr, "RecvTarget.num_messages must not be null");
    require(shape.num_scales(target.wire) == 0 || target.scales.words != nullptr,
            "RecvTarget.scales must not be null where rows come with scales");
    require(target.routing.refs != nullptr, "RecvTarget.routing must not be null");
    require(target.format != Format::kContiguous ||
                (target.expert_offset != nullptr && target.alignment >= 1),
            "a contiguous RecvTarget needs expert_offset and an alignment of at least 1");
    require(target.format != Format::kCompact ||
                (target.topk_idx != nullptr && target.topk_weights != nullptr),
            "a compact RecvTarget needs topk_idx and topk_weights");
}

// One dispatch receive. Peers' words are checked before they index anything.
class Receive {
  public:
    Receive(const Context& context, int chain, const RecvTarget& target, uint64_t epoch)
        : context_(context),
          chain_(chain),
          target_(target),
          epoch_(epoch),
          where_{Op::kDispatch, chain},
          masks_(context),
          waiter_(context, where_, epoch),
          layout_(MessageLayout::make(context.shape, target.wire)),
          local_experts_(context.shape.num_local_experts()),
          words_(context.layout.counts.words),
          counts_(static_cast<size_t>(context.shape.num_ranks) * words_),
          next_row_(local_experts_) {}

    // False: a fault is recorded; the epoch must not advance.
    bool run() {
        for (int s = 0; s < context_.shape.num_ranks; ++s) {
            if (!read_counts(s)) return false;
        }
        write_counts();
        for (int s = 0; s < context_.shape.num_ranks; ++s) {
            if (!read_rows(s)) return false;
        }
        if (target_.format == Format::kCompact) end_compact();
        write_stats();
        return true;
    }

  private:
    uint32_t num_messages(int source) const {
        return counts_[source * words_ + CountsLayout::kMessages];
    }
    uint32_t num_rows(int source, int x) const {
        return counts_[source * words_ + CountsLayout::kRows + x];
    }

    bool bad_count(int source, uint64_t limit, uint64_t seen) {
        fail(context_, where_, FaultCode::kCount, source, limit, seen);
        return false;
    }

    // A masked source sends nothing: its counts stay zero.
    bool read_counts(int source) {
        if (masks_.has(source)) {
            context_.stats(chain_)->wait_ns[source] = 0;
            return true;
        }
        const CountsLayout& layout = context_.layout.counts;
        uint8_t* slot = context_.counts_at(context_.rank, chain_, epoch_, source);
        const bool arrived = waiter_.wait(tag_of(slot, layout.stride), source);
        blocked_ns_ = waiter_.take_blocked_ns();
        context_.stats(chain_)->wait_ns[source] = blocked_ns_;
        if (target_.wait_ns != nullptr) target_.wait_ns[source] += blocked_ns_;
        if (!arrived) return false;
        std::memcpy(counts_.data() + source * words_, slot, layout.bytes);

        const uint32_t terms = counts_[source * words_ + CountsLayout::kTerms];
        const uint32_t mask = masks_.digest();
        const RowTerms needed = target_.rows();
        if (!suits(terms, mask, needed)) {
            fail(context_, where_, FaultCode::kTerms, source, dispatch_terms(mask, needed),
                 unmix_terms(terms, mask, needed));
            return false;
        }
        const Shape& shape = context_.shape;
        const uint64_t messages = num_messages(source);
        if (messages > static_cast<uint64_t>(shape.max_tokens)) {
            return bad_count(source, shape.max_tokens, messages);
        }
        uint64_t rows = 0;
        for (int x = 0; x < local_experts_; ++x) {
            // A message holds an expert at most once.
            if (num_rows(source, x) > messages)
                return bad_count(source, messages, num_rows(source, x));
            rows += num_rows(source, x);
        }
        const uint64_t most = messages * static_cast<uint64_t>(shape.topk);
        return rows <= most || bad_count(source, most, rows);
    }

    // Also sets next_row_ to each expert's first row.
    void write_counts() {
        const int ranks = context_.shape.num_ranks;
        *target_.routing.dispatched = epoch_;
        for (int s = 0; s < ranks; ++s) {
            target_.num_messages[s] = static_cast<int32_t>(num_messages(s));
            target_.routing.received[s] = static_cast<int32_t>(num_messages(s));
        }
        int64_t offset = 0;
        for (int x = 0; x < local_experts_; ++x) {
            int64_t count = 0;
            for (int s = 0; s < ranks; ++s) {
                if (target_.layout_range != nullptr) {
                    target_.layout_range[x * ranks + s] = (count << 32) | num_rows(s, x);
                }
                count += num_rows(s, x);
            }
            target_.recv_count[x] = static_cast<int32_t>(count);
            if (target_.cumulative_count != nullptr) {
                target_.cumulative_count[x] += static_cast<int32_t>(count);
            }
            rows_received_ += static_cast<uint64_t>(count);
            if (target_.format == Format::kContiguous) {
                target_.expert_offset[x] = static_cast<int32_t>(offset);
                next_row_[x] = offset;
                offset += round_up(count, target_.alignment);
            } else {
                next_row_[x] = static_cast<int64_t>(x) * context_.shape.max_messages();
            }
        }
        if (target_.format == Format::kContiguous) {
            target_.expert_offset[local_experts_] = static_cast<int32_t>(offset);
        }
    }

    bool read_rows(int source) {
        const int messages = static_cast<int>(num_messages(source));
        bool good = true;
        for (int slot = 0; good && slot < messages; ++slot) good = read_message(source, slot);
        blocked_ns_ = waiter_.take_blocked_ns();
        context_.stats(chain_)->wait_ns[source] += blocked_ns_;
        if (target_.wait_ns != nullptr) target_.wait_ns[source] += blocked_ns_;
        for (int x = 0; x < local_experts_; ++x) next_row_[x] += num_rows(source, x);
        return good;
    }

    bool read_message(int source, int slot) {
        uint8_t* message = context_.dispatch_at(context_.rank, chain_, epoch_, source, slot);
        if (!waiter_.wait(tag_of(message, context_.layout.message_stride), source)) return false;
        Entry entries[kMaxTopk];
        std::memcpy(entries, message + layout_.entries, sizeof(Entry) * context_.shape.topk);
        const int64_t index = int64_t{source} * context_.shape.max_tokens + slot;
        RowRef* refs = target_.routing.refs + index * context_.shape.topk;
        return target_.format == Format::kCompact ? place_message(message, entries, refs)
                                                  : place_rows(source, message, entries, refs);
    }

    // The local number of an entry's expert, or -1.
    int local_expert(const Entry& entry) const {
        const int64_t x =
            static_cast<int64_t>(entry.expert) - int64_t{context_.rank} * local_experts_;
        return entry.expert >= 0 && x >= 0 && x < local_experts_ ? static_cast<int>(x) : -1;
    }

    // Batched and contiguous: one row for each of our experts.
    bool place_rows(int source, const uint8_t* message, const Entry* entries, RowRef* refs) {
        int used = 0;
        for (int k = 0; k < context_.shape.topk; ++k) {
            const int x = local_expert(entries[k]);
            if (x < 0) continue;
            const int32_t position = entries[k].position;
            if (position < 0 || static_cast<uint32_t>(position) >= num_rows(source, x)) {
                return bad_count(source, num_rows(source, x), static_cast<uint64_t>(position));
            }
            const int64_t row = next_row_[x] + position;
            copy_row(message, row, x);
            if (target_.source_token != nullptr) {
                std::memcpy(&target_.source_token[row],
                            message + layout_.header + offsetof(MessageHeader, token),
                            sizeof(int32_t));
            }
            refs[used++] = {static_cast<int32_t>(row), entries[k].weight};
        }
        if (used < context_.shape.topk) refs[used] = {-1, 0.0f};
        return true;
    }

    // Compact: one row for the message, and who of us wants it.
    bool place_message(const uint8_t* message, const Entry* entries, RowRef* refs) {
        const int topk = context_.shape.topk;
        const int64_t row = next_message_++;
        copy_row(message, row, 0);
        for (int k = 0; k < topk; ++k) {
            const int x = local_expert(entries[k]);
            target_.topk_idx[row * topk + k] = x;
            target_.topk_weights[row * topk + k] = x < 0 ? 0.0f : entries[k].weight;
        }
        refs[0] = {static_cast<int32_t>(row), 1.0f};
        if (topk > 1) refs[1] = {-1, 0.0f};
        return true;
    }

    // `x`: the local expert of the row.
    void copy_row(const uint8_t* message, int64_t row, int x) {
        const Shape& shape = context_.shape;
        const int64_t bytes = shape.row_bytes(target_.wire);
        std::memcpy(target_.x + row * bytes, message + layout_.row, bytes);
        const int num_scales = shape.num_scales(target_.wire);
        if (num_scales == 0) return;
        const ScaleTarget& to = target_.scales;
        const bool batched = target_.format == Format::kBatched;
        const int64_t within = batched ? row - int64_t{x} * shape.max_messages() : row;
        uint32_t* words =
            to.words + (batched ? int64_t{x} * to.expert_stride : 0) + within * to.row_stride;
        std::vector<uint32_t>& scales = scales_;
        scales.resize(static_cast<size_t>(num_scales));
        std::memcpy(scales.data(), message + layout_.scales, sizeof(uint32_t) * scales.size());
        const int num_words = to.ue8m0 ? static_cast<int>(ceil_div(num_scales, 4)) : num_scales;
        for (int i = 0; i < num_words; ++i) {
            words[int64_t{i} * to.group_stride] = to.ue8m0 ? packed_exponents(i) : scales[i];
        }
    }

    uint32_t packed_exponents(int word) const {
        uint32_t packed = 0;
        for (size_t j = 0; j < 4 && 4 * word + j < scales_.size(); ++j) {
            packed |= ue8m0(scales_[4 * word + j]) << (8 * j);
        }
        return packed;
    }

    void end_compact() {
        const int64_t topk = context_.shape.topk;
        const int64_t end = context_.shape.max_messages() * topk;
        for (int64_t i = next_message_ * topk; i < end; ++i) target_.topk_idx[i] = -1;
    }

    void write_stats() {
        StepStats* stats = context_.stats(chain_);
        for (int s = 0; s < context_.shape.num_ranks; ++s) {
            stats->messages_received += num_messages(s);
        }
        stats->rows_received += rows_received_;
    }

    const Context& context_;
    int chain_;
    const RecvTarget& target_;
    uint64_t epoch_;
    Where where_;
    Masks masks_;
    Waiter waiter_;
    MessageLayout layout_;
    int local_experts_;
    int64_t words_;                  // of one counts message
    std::vector<uint32_t> counts_;  // [R][words]: copies, so that what was checked is what is used
    std::vector<int64_t> next_row_;  // [L]: first row of the current source
    std::vector<uint32_t> scales_;  // of the row being placed
    int64_t next_message_ = 0;
    uint64_t blocked_ns_ = 0;
    uint64_t rows_received_ = 0;
};

}  // namespace

void HostRank::dispatch_recv(int chain, const RecvTarget& target) {
    require_chain(chain);
    require_target(context_.shape, target);
    require_wire(target.wire);
    if (!may_run(context_, {Op::kDispatch, chain})) return;
    const uint64_t epoch = read_state(chain).dispatched + 1;
    if (Receive(context_, chain, target, epoch).run()) {
        store_relaxed(&context_.state(chain)->dispatched, epoch);
    }
}

}  // namespace ep::host
