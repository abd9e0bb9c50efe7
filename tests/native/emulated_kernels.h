// The kernels of csrc/cuda as launches of the emulator, for one rank and one chain.
#pragma once

// The emulator's names must be known before any device code.
#include "emulator/emulator.h"
//
#include "cuda/combine_fp8.cuh"
#include "cuda/combine_halves.cuh"
#include "cuda/dispatch_recv.cuh"
#include "cuda/dispatch_send.cuh"

namespace ep {

// The kernels' bodies, for one rank (csrc/cuda/dispatch_kernels.cuh and the .cu files).
struct Emulated {
    View view;
    int grid;  // at least three

    template <class Args>
    Turn begin_as(Op op) const {
        Args args{};
        args.view = view;
        return begin(args, op);
    }
    int send_ctas() const { return std::max(1, (grid - 1) / 3); }  // of a combine

    template <bool kQuantise, int kRowVectors>
    void send(const SendInput& in, const Turn& turn, SendScratch scratch) const {
        const int stretch = std::max(1, (in.num_tokens + grid - 2) / (grid - 1));
        dispatch_send<kQuantise, kRowVectors>(view, in, stretch, turn, scratch);
    }
    template <bool kQuantise>
    void send_as(const SendInput& in, const Turn& turn, SendScratch scratch) const {
        const int vectors = static_cast<int>(ceil_div(view.input_vectors, kStagingThreads));
        if (vectors <= 1) return send<kQuantise, 1>(in, turn, scratch);
        if (vectors <= 2) return send<kQuantise, 2>(in, turn, scratch);
        return send<kQuantise, 5>(in, turn, scratch);
    }
    void send(const SendInput& in, const Turn& turn, SendScratch scratch) const {
        if (in.wire == Wire::kFp8) return send_as<true>(in, turn, scratch);
        send_as<false>(in, turn, scratch);
    }
    emulator::Launch launch(std::function<void(uint8_t*)> body) const {
        const int64_t shared = SendScratch::bytes(view) + RecvScratch::bytes(view);
        return {grid, kThreads, shared, std::move(body)};
    }
    emulator::Launch launch_combine(std::function<void(uint8_t*)> body) const {
        return {grid, kCombineThreads, 0, std::move(body)};
    }
    emulator::Launch dispatch_send_kernel(SendInput in) const {
        return launch([=, this](uint8_t* smem) {
            const SendScratch scratch = SendScratch::carve(smem, view);
            prepare_send(view, scratch);
            send(in, begin_as<DispatchSendArgs>(Op::kDispatch), scratch);
        });
    }
    emulator::Launch dispatch_recv_kernel(RecvTarget target) const {
        return launch([=, this](uint8_t* smem) {
            const RecvScratch scratch = RecvScratch::carve(smem, view);
            prepare_recv(view, scratch);
            dispatch_recv(view, target, begin_as<DispatchRecvArgs>(Op::kDispatch), scratch);
        });
    }
    emulator::Launch dispatch_fused_kernel(SendInput in, RecvTarget target) const {
        return launch([=, this](uint8_t* smem) {
            const SendScratch sent = SendScratch::carve(smem, view);
            const RecvScratch received = RecvScratch::carve(smem + SendScratch::bytes(view), view);
            prepare_send(view, sent);
            prepare_recv(view, received);
            const Turn turn = begin_as<DispatchFusedArgs>(Op::kDispatch);
            send(in, turn, sent);
            dispatch_recv(view, target, turn, received);
        });
    }
    // Calls `step` with how the sums of a combine travel.
    template <class Step>
    static void as(Wire wire, Step step) {
        if (wire == Wire::kFp8) return step(Fp8Sums{});
        step(Bf16Sums{});
    }
    emulator::Launch combine_send_kernel(CombineInput in) const {
        return launch_combine([=, this](uint8_t*) {
            const Turn turn = begin_as<CombineSendArgs>(Op::kCombine);
            as(in.wire, [&]<class Sums>(Sums) {
                if (in.late_weights) {
                    combine_send<Sums, Weights::kLate>(view, in, turn);
                } else {
                    combine_send<Sums, Weights::kKnown>(view, in, turn);
                }
            });
        });
    }
    emulator::Launch combine_recv_kernel(CombineOutput out) const {
        return launch_combine([=, this](uint8_t*) {
            const Turn turn = begin_as<CombineRecvArgs>(Op::kCombine);
            as(out.wire, [&]<class Sums>(Sums) { combine_recv<Sums>(view, out, turn); });
        });
    }
    template <class Sums>
    void combine_fused(const CombineInput& in, const CombineOutput& out, const Turn& turn) const {
        const int send = send_ctas();
        if (in.late_weights) {
            combine_both<Sums, Weights::kLate>(view, in, out, send, turn);
        } else {
            combine_both<Sums, Weights::kKnown>(view, in, out, send, turn);
        }
    }
    emulator::Launch combine_fused_kernel(CombineInput in, CombineOutput out) const {
        return launch_combine([=, this](uint8_t*) {
            const Turn turn = begin_as<CombineFusedArgs>(Op::kCombine);
            as(in.wire, [&]<class Sums>(Sums) { combine_fused<Sums>(in, out, turn); });
        });
    }
};

}  // namespace ep
