// The kernels of csrc/cuda as launches of the emulator, for one rank and one chain.
#pragma once

// The emulator's names must be known before any device code.
#include "emulator/emulator.h"
//
#include "cuda/begin.cuh"
#include "cuda/combine_halves.cuh"
#include "cuda/dispatch_recv.cuh"
#include "cuda/dispatch_send.cuh"

namespace ep {

template <class Args>
uint64_t begin_as(const View& view, Op op) {
    Args args{};
    args.view = view;
    return begin(args, op);
}

// The kernels' bodies, for one rank (csrc/cuda/dispatch_kernels.cuh and the .cu files).
struct Emulated {
    View view;
    int grid;

    template <bool kQuantise, int kRowVectors>
    void send(const SendInput& in, uint64_t epoch, uint8_t* smem) const {
        const int stretch = std::max(1, (in.num_tokens + grid - 2) / (grid - 1));
        dispatch_send<kQuantise, kRowVectors>(view, in, stretch, epoch, smem);
    }
    template <bool kQuantise>
    void send_as(const SendInput& in, uint64_t epoch, uint8_t* smem) const {
        const int vectors = static_cast<int>(ceil_div(view.input_vectors, kStagingThreads));
        if (vectors <= 1) return send<kQuantise, 1>(in, epoch, smem);
        if (vectors <= 2) return send<kQuantise, 2>(in, epoch, smem);
        return send<kQuantise, 5>(in, epoch, smem);
    }
    void send(const SendInput& in, uint64_t epoch, uint8_t* smem) const {
        if (in.wire == Wire::kFp8) return send_as<true>(in, epoch, smem);
        send_as<false>(in, epoch, smem);
    }
    emulator::Launch launch(std::function<void(uint8_t*)> body) const {
        const int64_t shared = std::max(SendScratch::bytes(view), RecvScratch::bytes(view));
        return {grid, kThreads, shared, std::move(body)};
    }
    emulator::Launch dispatch_send_kernel(SendInput in) const {
        return launch([=, this](uint8_t* smem) {
            const uint64_t epoch = begin_as<DispatchSendArgs>(view, Op::kDispatch);
            send(in, epoch, smem);
        });
    }
    emulator::Launch dispatch_recv_kernel(RecvTarget target) const {
        return launch([=, this](uint8_t* smem) {
            dispatch_recv(view, target, begin_as<DispatchRecvArgs>(view, Op::kDispatch), smem);
        });
    }
    emulator::Launch dispatch_fused_kernel(SendInput in, RecvTarget target) const {
        return launch([=, this](uint8_t* smem) {
            const uint64_t epoch = begin_as<DispatchFusedArgs>(view, Op::kDispatch);
            send(in, epoch, smem);
            __syncthreads();
            dispatch_recv(view, target, epoch, smem);
        });
    }
    template <int kInFlight>
    void combine_fused(const CombineInput& in, const CombineOutput& out, uint64_t epoch) const {
        if (in.late_weights) return combine_fused_with<kInFlight, Weights::kLate>(in, out, epoch);
        combine_fused_with<kInFlight, Weights::kKnown>(in, out, epoch);
    }
    // The kernel without loops wants a CTA for every part of a token; for messages it does not.
    template <int kInFlight, Weights kWeights>
    void combine_fused_with(const CombineInput& in, const CombineOutput& out,
                            uint64_t epoch) const {
        if (out.num_tokens * view.parts <= grid) {
            combine_once<kInFlight, kWeights>(view, in, out, epoch);
        } else {
            combine_both<kInFlight, kWeights>(view, in, out, epoch);
        }
    }
    emulator::Launch combine_send_kernel(CombineInput in) const {
        return launch([=, this](uint8_t*) {
            const uint64_t epoch = begin_as<CombineSendArgs>(view, Op::kCombine);
            if (in.late_weights) return combine_send<Weights::kLate>(view, in, epoch);
            combine_send<Weights::kKnown>(view, in, epoch);
        });
    }
    emulator::Launch combine_recv_kernel(CombineOutput out) const {
        return launch([=, this](uint8_t*) {
            combine_recv<2>(view, out, begin_as<CombineRecvArgs>(view, Op::kCombine));
        });
    }
    emulator::Launch combine_fused_kernel(CombineInput in, CombineOutput out) const {
        return launch([=, this](uint8_t*) {
            const uint64_t epoch = begin_as<CombineFusedArgs>(view, Op::kCombine);
            if (view.num_ranks <= 2) return combine_fused<1>(in, out, epoch);
            combine_fused<2>(in, out, epoch);
        });
    }
};

}  // namespace ep
