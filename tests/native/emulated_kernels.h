// The kernels of csrc/cuda as launches of the emulator, for one rank and one chain.
#pragma once

// The emulator's names must be known before any device code.
#include "emulator/emulator.h"
//
#include "cuda/begin.cuh"
#include "cuda/combine.cuh"
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

    template <Wire kWire, int kRowVectors>
    void send(const SendInput& in, uint64_t epoch, uint8_t* smem) const {
        const int stretch = std::max(1, (in.num_tokens + grid - 2) / (grid - 1));
        dispatch_send<kWire, kRowVectors>(view, in, stretch, epoch, smem);
    }
    void send(const SendInput& in, uint64_t epoch, uint8_t* smem) const {
        const bool fp8 = view.num_scales > 0;
        const int vectors = static_cast<int>(ceil_div(view.hidden / 8, kStagingThreads));
        if (vectors <= 1)
            return fp8 ? send<Wire::kFp8, 1>(in, epoch, smem)
                       : send<Wire::kBf16, 1>(in, epoch, smem);
        if (vectors <= 2)
            return fp8 ? send<Wire::kFp8, 2>(in, epoch, smem)
                       : send<Wire::kBf16, 2>(in, epoch, smem);
        return fp8 ? send<Wire::kFp8, 5>(in, epoch, smem) : send<Wire::kBf16, 5>(in, epoch, smem);
    }
    emulator::Launch launch(std::function<void(uint8_t*)> body) const {
        const int64_t shared = std::max(SendScratch::bytes(view), RecvScratch::bytes(view));
        return {grid, kThreads, shared, std::move(body)};
    }
    emulator::Launch dispatch_send_kernel(SendInput in) const {
        return launch([=, this](uint8_t* smem) {
            const uint64_t epoch = begin_as<DispatchSendArgs>(view, Op::kDispatch);
            if (reports()) check_dispatch_order(view);
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
            if (reports()) check_dispatch_order(view);
            send(in, epoch, smem);
            __syncthreads();
            dispatch_recv(view, target, epoch, smem);
        });
    }
    emulator::Launch combine_send_kernel(CombineInput in) const {
        return launch([=, this](uint8_t*) {
            const uint64_t epoch = begin_as<CombineSendArgs>(view, Op::kCombine);
            if (reports()) check_combine_order(view);
            combine_send(view, in, epoch);
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
            if (reports()) check_combine_order(view);
            combine_both<2>(view, in, out, epoch);
        });
    }
};

}  // namespace ep
