#include "cuda/normal_rank.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device_guard.h"
#include "cuda/error.h"

namespace ep {
namespace {

using normal::BlockLayout;
using normal::State;

constexpr uint64_t kDefaultBudgetNs = 60'000'000'000;
constexpr int kNotifyTokens = 256;  // of a CTA, until there are kMostNotifyCtas
constexpr int kMostNotifyCtas = 32;
constexpr int kMostLayoutCtas = 64;
constexpr size_t kMostArgumentBytes = 4096;
// Of a token in what dispatch and layout take: over rails, rows without topk_idx name their ranks
// there (ep/nodes.h). A combine has a lane for each entry and takes kMaxTopk.
constexpr int kMostEntries = kMaxRanks;
static_assert(kMostEntries >= kMaxTopk);

[[noreturn]] void reject(const std::string& what) { throw std::invalid_argument(what); }

void require(bool good, const char* what, int64_t value, const char* limit) {
    if (!good) reject(std::string(what) + " is " + std::to_string(value) + "; it must be " + limit);
}

void require_aligned(std::uintptr_t address, std::uintptr_t alignment, const std::string& what) {
    if (address == 0) reject(what + " is a null address");
    if (address % alignment != 0) {
        reject(what + " must be " + std::to_string(alignment) + "-byte aligned");
    }
}

void require_vectors(const void* address, const char* what) {
    const auto value = reinterpret_cast<std::uintptr_t>(address);
    if (value % normal::kRowMultiple != 0) {
        reject(std::string(what) + " must be 16-byte aligned: rows are moved as 16-byte vectors");
    }
}

void check_rows(int64_t row_bytes, const void* x, int64_t stride_bytes) {
    require(row_bytes >= 16 && row_bytes <= normal::kMaxRowBytes && row_bytes % 16 == 0,
            "row_bytes", row_bytes, "a multiple of 16 up to 32768");
    require_vectors(x, "x");
    require(stride_bytes % 16 == 0, "the stride of x in bytes", stride_bytes, "a multiple of 16");
}

struct Launch {
    int grid;
    int threads;
    int scratch_bytes;
    StreamHandle stream;
    bool early;  // may start while the kernel before it still runs, and wait there
};

template <class Args>
void launch(void (*kernel)(Args), const Launch& how, const Args& args) {
    static_assert(sizeof(Args) <= kMostArgumentBytes);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(how.grid));
    config.blockDim = dim3(static_cast<unsigned>(how.threads));
    config.dynamicSmemBytes = static_cast<size_t>(how.scratch_bytes);
    config.stream = reinterpret_cast<cudaStream_t>(how.stream);
    config.attrs = &attribute;
    config.numAttrs = how.early ? 1 : 0;
    EP_CUDA(cudaLaunchKernelEx(&config, kernel, args));
}

// Whether a peer's heap lies on this GPU: then several ranks share its SMs.
bool on_device(std::uintptr_t heap, int device) {
    cudaPointerAttributes found{};
    EP_CUDA(cudaPointerGetAttributes(&found, reinterpret_cast<const void*>(heap)));
    return found.device == device;
}

// Loads a kernel and lets it have the shared memory it needs.
template <class Args>
void prepare(void (*kernel)(Args), int scratch_bytes) {
    const auto* address = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes loaded{};
    EP_CUDA(cudaFuncGetAttributes(&loaded, address));
    EP_CUDA(
        cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, scratch_bytes));
}

}  // namespace

CudaNormal::CudaNormal(int num_ranks, int rank, int max_experts,
                       const std::vector<std::uintptr_t>& control,
                       const std::vector<std::uintptr_t>& data, int64_t data_bytes,
                       std::uintptr_t local, std::uintptr_t fault, int device,
                       const normal::Part& part)
    : data_bytes_(data_bytes), max_experts_(max_experts), device_(device) {
    require(num_ranks >= 1 && num_ranks <= kMaxRanks, "num_ranks", num_ranks, "in 1..72");
    require(rank >= 0 && rank < num_ranks, "rank", rank, "in 0..num_ranks - 1");
    require(max_experts >= num_ranks && max_experts <= kMaxExperts, "max_experts", max_experts,
            "in num_ranks..1024");
    if (control.size() != static_cast<size_t>(num_ranks) || data.size() != control.size()) {
        reject("give one control heap and one data heap for each of " + std::to_string(num_ranks) +
               " ranks");
    }
    for (size_t r = 0; r < control.size(); ++r) {
        require_aligned(control[r], kLineBytes, "control heap of rank " + std::to_string(r));
        require_aligned(data[r], kLineBytes, "data heap of rank " + std::to_string(r));
    }
    require_aligned(local, alignof(State), "local memory");
    require_aligned(fault, alignof(FaultBoard), "fault memory");
    group_ = normal::Group::make(num_ranks, rank, max_experts, control.data(), data.data(),
                                 data_bytes, local, fault, part);
    const DeviceGuard guard(device_);
    EP_CUDA(cudaDeviceGetAttribute(&sm_count_, cudaDevAttrMultiProcessorCount, device_));
    // A kernel that waits for its predecessor holds SMs that the other ranks of this GPU may need.
    for (int r = 0; r < num_ranks; ++r) {
        if (r != rank && on_device(data[r], device_)) starts_early_ = false;
    }
    // The limits belong to the device, not to this rank: other groups may have more ranks.
    prepare(normal::layout_kernel_ptr(), normal::layout_scratch_bytes(kMaxRanks, kMaxExperts));
    prepare(normal::notify_kernel_ptr(),
            normal::notify_scratch_bytes(kMaxRanks, kMaxExperts / kMaxRanks));
    prepare(normal::dispatch_kernel_ptr(), normal::dispatch_scratch_bytes(kMaxRanks));
    prepare(normal::combine_kernel_ptr(), normal::combine_scratch_bytes(kMaxRanks));
    if (read_state().budget_ns == 0) set_time_budget(kDefaultBudgetNs);
}

void CudaNormal::check_experts(int num_experts, int num_tokens) const {
    require(num_experts >= 1 && num_experts <= max_experts_, "num_experts", num_experts,
            "in 1..max_experts");
    require(num_experts % group_.num_ranks() == 0, "num_experts", num_experts,
            "a multiple of num_ranks");
    require(num_tokens >= 0 && num_tokens <= normal::kMaxTokensPerRank, "num_tokens", num_tokens,
            "in 0..1048576");
}

void CudaNormal::check_block(int64_t offset, int64_t bytes, const char* what) const {
    if (offset < 0 || offset % normal::kLine != 0 || offset + bytes > data_bytes_) {
        reject(std::string(what) + " of " + std::to_string(bytes) + " bytes at " +
               std::to_string(offset) + " is not in the data heap of " +
               std::to_string(data_bytes_) + " bytes, or not 128-byte aligned");
    }
}

int CudaNormal::grid_for(int num_sms) const {
    require(num_sms >= 1, "num_sms", num_sms, "at least 1");
    return std::min(num_sms, sm_count_);
}

FastDiv CudaNormal::by_local_experts(int num_experts) const {
    return FastDiv::by(static_cast<uint32_t>(num_experts / group_.num_ranks()));
}

void CudaNormal::layout(const NormalRoutes& routes, int num_tokens, int num_experts,
                        const NormalLayout& into, StreamHandle stream) const {
    check_experts(num_experts, num_tokens);
    require(routes.topk >= 1 && routes.topk <= kMostEntries, "topk", routes.topk, "in 1..72");
    const DeviceGuard guard(device_);
    const int64_t ctas = std::max<int64_t>(1, ceil_div(num_tokens, normal::kCountThreads));
    normal::LayoutArgs args{.routes = routes,
                            .num_tokens = num_tokens,
                            .by_local_experts = by_local_experts(num_experts),
                            .into = into,
                            .group = group_};
    args.group.waits.num_experts = num_experts;
    launch(normal::layout_kernel_ptr(),
           {static_cast<int>(std::min<int64_t>(ctas, kMostLayoutCtas)), normal::kCountThreads,
            normal::layout_scratch_bytes(group_.num_ranks(), num_experts), stream, starts_early_},
           args);
}

void CudaNormal::notify(const NormalLayout& layout, int num_tokens, int num_experts, int alignment,
                        const NormalTables& tables, int32_t* recv_counts, int32_t* host_counts,
                        StreamHandle stream) const {
    check_experts(num_experts, num_tokens);
    require(alignment >= 1, "alignment", alignment, "at least 1");
    const DeviceGuard guard(device_);
    const int num_ranks = group_.num_ranks(), local_experts = num_experts / num_ranks;
    const int placing =
        static_cast<int>(std::min<int64_t>(ceil_div(num_tokens, kNotifyTokens), kMostNotifyCtas));
    launch(normal::notify_kernel_ptr(),
           {1 + placing, normal::kCountThreads,
            normal::notify_scratch_bytes(num_ranks, local_experts), stream, starts_early_},
           normal::NotifyArgs{
               .layout = layout,
               .num_tokens = num_tokens,
               .stretch = static_cast<int32_t>(ceil_div(num_tokens, std::max(1, placing))),
               .local_experts = local_experts,
               .alignment = alignment,
               .tables = tables,
               .recv_counts = recv_counts,
               .host_counts = host_counts,
               .group = group_});
}

void CudaNormal::dispatch(const NormalRows& rows, const NormalRoutes& routes, int num_experts,
                          const NormalTables& tables, int64_t block_offset, int64_t block_rows,
                          normal::BlockSize size, int num_sms, StreamHandle stream) const {
    check_experts(num_experts, rows.num_tokens);
    check_rows(rows.row_bytes, rows.x, rows.stride_bytes);
    require(routes.topk >= 0 && routes.topk <= kMostEntries, "topk", routes.topk, "in 0..72");
    require(rows.num_scales >= 0, "num_scales", rows.num_scales, "0 or more");
    require(block_rows >= 0, "block_rows", block_rows, "0 or more");
    const auto block = BlockLayout::make(block_rows, rows.row_bytes, rows.num_scales, routes.topk);
    check_block(block_offset, block.bytes, "block");
    const int grid = grid_for(num_sms);
    const DeviceGuard guard(device_);
    launch(normal::dispatch_kernel_ptr(),
           {grid, normal::kDispatchThreads, normal::dispatch_scratch_bytes(group_.num_ranks()),
            stream, starts_early_},
           normal::DispatchArgs{
               .rows = rows,
               .routes = routes,
               .tables = tables,
               .pieces = normal::Pieces::make(rows.row_bytes, normal::kDispatchBytes),
               .scales = normal::ScaleUnits::make(rows),
               .by_topk = FastDiv::by(static_cast<uint32_t>(std::max(1, routes.topk))),
               .local_experts = num_experts / group_.num_ranks(),
               .block_offset = block_offset,
               .block_rows = block_rows,
               .size = size,
               .group = group_});
}

void CudaNormal::combine(const NormalCombine& work, const NormalTables& tables, int num_sms,
                         StreamHandle stream) const {
    const int64_t row_bytes = 2LL * work.hidden;
    check_rows(row_bytes, work.x, work.stride_bytes);
    require(work.topk >= 0 && work.topk <= kMaxTopk, "topk", work.topk, "in 0..32");
    check_experts(group_.num_ranks(), work.num_tokens);
    require_vectors(work.out, "out");
    for (const uint16_t* bias : work.bias) require_vectors(bias, "bias");
    // How much of it the rows take is known on the device alone.
    check_block(work.inbox_offset, 0, "inbox");
    const int grid = grid_for(num_sms);
    const DeviceGuard guard(device_);
    launch(normal::combine_kernel_ptr(),
           {grid, normal::kCombineThreads, normal::combine_scratch_bytes(group_.num_ranks()),
            stream, starts_early_},
           normal::CombineArgs::make(work, tables, grid, group_));
}

void CudaNormal::set_time_budget(uint64_t nanoseconds) const {
    require(nanoseconds != 0, "the time budget", 0, "at least 1 ns");
    const DeviceGuard guard(device_);
    EP_CUDA(cudaMemcpy(&group_.state->budget_ns, &nanoseconds, sizeof(nanoseconds),
                       cudaMemcpyHostToDevice));
}

State CudaNormal::read_state() const {
    const DeviceGuard guard(device_);
    State state{};
    EP_CUDA(cudaDeviceSynchronize());
    EP_CUDA(cudaMemcpy(&state, group_.state, sizeof(state), cudaMemcpyDeviceToHost));
    return state;
}

void CudaNormal::reset() const {
    const DeviceGuard guard(device_);
    State state{};
    state.budget_ns = read_state().budget_ns;
    EP_CUDA(
        cudaMemset(group_.waits.peer[group_.rank()], 0, static_cast<size_t>(group_.control.bytes)));
    EP_CUDA(cudaMemcpy(group_.state, &state, sizeof(state), cudaMemcpyHostToDevice));
    EP_CUDA(cudaDeviceSynchronize());
}

}  // namespace ep
