// NVSHMEM's host API: one world per process, its symmetric heap, and addresses of peers' heaps.
//
// Most of the project uses the host library alone: its kernels take the peer addresses that
// peer_address() gives. Kernels that put over a network are in nvshmem_puts.cu. The library is
// entered through nvshmemx_hostlib_init_attr, which returns its status; nvshmemx_init_attr ends the
// process instead. Calls that wait for peers release the GIL.
#include <cuda_runtime_api.h>
#include <nvshmem_host.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings_wire.h"
#include "nvshmem_puts.h"

namespace py = pybind11;

namespace {

[[noreturn]] void fail(const std::string& what, const std::string& remedy) {
    throw std::runtime_error(what + "; " + remedy);
}

void check_nvshmem(int status, const char* call, const char* remedy) {
    if (status != 0) fail(std::string(call) + " returned " + std::to_string(status), remedy);
}

bool is_initialized() {
    const int status = nvshmemx_init_status();
    return status >= NVSHMEM_STATUS_IS_INITIALIZED && status < NVSHMEM_STATUS_INVALID;
}

// NVSHMEM ends the process when its heap is used before init, so every such call comes through
// here.
void require_initialized(const char* call) {
    if (is_initialized()) return;
    fail(std::string(call) + " needs NVSHMEM initialized (init_status is " +
             std::to_string(nvshmemx_init_status()) + ", needed " +
             std::to_string(NVSHMEM_STATUS_IS_INITIALIZED) + " or more)",
         "call init() on every rank first");
}

py::bytes get_unique_id() {
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    check_nvshmem(nvshmemx_get_uniqueid(&id), "nvshmemx_get_uniqueid",
                  "set NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME to a network interface that is up, or "
                  "NVSHMEM_DEBUG=INFO to see why");
    return py::bytes(reinterpret_cast<const char*>(&id), sizeof(id));
}

// Collective. All ranks pass the id that one of them got from get_unique_id().
void init(int rank, int num_ranks, const std::string& unique_id, int device) {
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    if (unique_id.size() != sizeof(id)) {
        fail("unique id has " + std::to_string(unique_id.size()) + " bytes, needed " +
                 std::to_string(sizeof(id)),
             "pass what get_unique_id() returned on rank 0");
    }
    if (num_ranks < 1 || rank < 0 || rank >= num_ranks) {
        fail("rank " + std::to_string(rank) + " of " + std::to_string(num_ranks) +
                 " is out of range",
             "pass 0 <= rank < num_ranks");
    }
    std::memcpy(&id, unique_id.data(), sizeof(id));
    py::gil_scoped_release unlocked;
    const cudaError_t cuda =
        cudaSetDevice(device);  // before init: NVSHMEM takes the current device
    if (cuda != cudaSuccess) {
        fail("cudaSetDevice(" + std::to_string(device) + ") returned " + std::to_string(cuda) +
                 " (" + cudaGetErrorString(cuda) + ")",
             "choose a device that `ep-runtime doctor` lists");
    }
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    check_nvshmem(nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &id, &attributes),
                  "nvshmemx_set_attr_uniqueid_args", "pass the same num_ranks on every rank");
    check_nvshmem(nvshmemx_hostlib_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes),
                  "nvshmemx_hostlib_init_attr",
                  "set NVSHMEM_DEBUG=INFO to see why, or EP_MEMORY=ipc to do without NVSHMEM");
}

// Collective over all ranks of the world, which pass the same size.
std::uintptr_t allocate(std::size_t num_bytes) {
    require_initialized("malloc");
    if (num_bytes == 0) fail("malloc(0) has no address", "ask for at least 1 byte");
    py::gil_scoped_release unlocked;
    void* p = nvshmem_malloc(num_bytes);
    if (p == nullptr) {
        fail("nvshmem_malloc(" + std::to_string(num_bytes) + ") returned no memory",
             "free GPU memory, lower max_tokens, or set a smaller power of two as "
             "NVSHMEM_CUMEM_GRANULARITY (bytes the heap grows by)");
    }
    return reinterpret_cast<std::uintptr_t>(p);
}

// Collective, like allocate().
void release(std::uintptr_t address) {
    require_initialized("free");
    py::gil_scoped_release unlocked;
    nvshmem_free(reinterpret_cast<void*>(address));
}

// 0 when this GPU cannot address the peer's memory (no NVLink or PCIe path between them).
std::uintptr_t peer_address(std::uintptr_t address, int peer) {
    require_initialized("peer_address");
    const int num_ranks = nvshmem_n_pes();
    if (peer < 0 || peer >= num_ranks) {
        fail("peer " + std::to_string(peer) + " is not one of the " + std::to_string(num_ranks) +
                 " ranks",
             "pass 0 <= peer < num_ranks");
    }
    return reinterpret_cast<std::uintptr_t>(
        nvshmem_ptr(reinterpret_cast<const void*>(address), peer));
}

void barrier_all() {
    require_initialized("barrier_all");
    py::gil_scoped_release unlocked;
    nvshmem_barrier_all();
}

void check_cuda(int error, const char* what) {
    if (error == 0) return;
    const auto code = static_cast<cudaError_t>(error);
    fail(std::string(what) + " returned " + std::to_string(error) + " (" +
             cudaGetErrorString(code) + ")",
         "look for an earlier CUDA error of this process");
}

// Behind init(), with the same arguments: this module's own kernels may put from now on.
// Collective.
void attach_kernels(int rank, int num_ranks, const std::string& unique_id) {
    require_initialized("attach_kernels");
    if (unique_id.size() != sizeof(nvshmemx_uniqueid_t)) {
        fail("unique id has " + std::to_string(unique_id.size()) + " bytes",
             "pass what get_unique_id() returned on rank 0");
    }
    py::gil_scoped_release unlocked;
    const int status = ep::nvshmem_attach(rank, num_ranks, unique_id.data());
    if (status < 0) check_cuda(-status, "loading the kernels that put");
    check_nvshmem(status, "nvshmemi_init_thread",
                  "install the nvidia-nvshmem-cu13 that this module was built against (see "
                  "built_against), or a newer one");
}

// Collective. Does nothing when NVSHMEM was never initialized here, so that it can be called twice.
void finalize() {
    if (!is_initialized()) return;
    py::gil_scoped_release unlocked;
    nvshmemx_hostlib_finalize();
}

std::tuple<int, int, int> version() {
    int major = 0, minor = 0, patch = 0;
    nvshmemx_vendor_get_version_info(&major, &minor, &patch);
    return {major, minor, patch};
}

}  // namespace

PYBIND11_MODULE(_nvshmem, m) {
    m.doc() = "NVSHMEM: world, symmetric heap, peer addresses; puts between nodes.";
    m.def("get_unique_id", &get_unique_id);
    m.def("init", &init, py::arg("rank"), py::arg("num_ranks"), py::arg("unique_id"),
          py::arg("device"));
    m.def("malloc", &allocate, py::arg("num_bytes"));
    m.def("free", &release, py::arg("address"));
    m.def("peer_address", &peer_address, py::arg("address"), py::arg("peer"));
    m.def("barrier_all", &barrier_all);
    m.def("attach_kernels", &attach_kernels, py::arg("rank"), py::arg("num_ranks"),
          py::arg("unique_id"));
    m.def(
        "announce",
        [](int num_nodes, int ranks_per_node, int rank, int max_experts, int64_t max_tokens,
           int64_t max_hidden, int max_topk, std::uintptr_t mine, std::uintptr_t counters,
           std::uintptr_t abort, std::uintptr_t per_rank, std::uintptr_t per_node,
           std::uintptr_t per_expert, int num_experts, std::uintptr_t stream) {
            const auto region = ep::wire_region(num_nodes, ranks_per_node, rank, max_experts,
                                                max_tokens, max_hidden, max_topk);
            check_cuda(ep::nvshmem_announce(
                           region, ep::wire_message(per_rank, per_node, per_expert, num_experts),
                           mine, counters, abort, stream),
                       "launching nvshmem_announce_kernel");
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "put",
        [](int num_nodes, int ranks_per_node, int rank, int max_experts, int64_t max_tokens,
           int64_t max_hidden, int max_topk, std::uintptr_t mine, std::uintptr_t counters,
           std::uintptr_t abort, bool home, std::uintptr_t rail_prefix, int64_t row_bytes,
           int num_scales, int topk, bool has_idx, bool has_weights, int64_t block_rows,
           int num_sms, std::uintptr_t stream) {
            const auto region = ep::wire_region(num_nodes, ranks_per_node, rank, max_experts,
                                                max_tokens, max_hidden, max_topk);
            check_cuda(ep::nvshmem_put(region,
                                       ep::wire_transfer(home, rail_prefix, row_bytes, num_scales,
                                                         topk, has_idx, has_weights, block_rows),
                                       mine, counters, abort, num_sms, stream),
                       "launching nvshmem_put_kernel");
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("finalize", &finalize);
    m.def("version", &version);
    m.def("init_status", [] { return nvshmemx_init_status(); });
    m.attr("built_against") = py::make_tuple(
        NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION);
}
