// The kernels of csrc/cuda as launches of the emulator, for one rank and one chain.
#pragma once

// The emulator's names must be known before any device code.
#include "emulator/emulator.h"
//
#include "cuda/combine_fp8.cuh"
#include "cuda/combine_halves.cuh"
#include "cuda/dispatch_rounds.cuh"
#include "cuda/dispatch_teams.cuh"
#include "cuda/grids.h"

namespace ep {

// The kernels' bodies, for one rank (csrc/cuda/dispatch_kernels.cuh and the .cu files).
struct Emulated {
    View view;
    int grid;  // at least three
    bool many = false;  // the dispatch kernels for many tokens
    int senders = 0;  // CTAs that only send, where such a kernel does both; 0: all do both
    bool few = false;  // the combine kernels for few units
    bool streamed = false;  // or for so many that their rows leave the cache
    int part_bits = 0;  // of the dispatch kernels for few

    template <class Args>
    Turn begin_as(Op op) const {
        Args args{};
        args.view = view;
        return begin(args, op);
    }
    int send_ctas() const { return std::max(1, (grid - 1) / 3); }  // of a combine

    template <bool kQuantise>
    void send_as(const SendInput& in, const Turn& turn, SendScratch scratch) const {
        const int stretch = stretch_of(in.num_tokens, grid - 1);
        if (view.input_vectors <= 2 * kRowThreads) {
            return dispatch_send<kQuantise, 1>(view, in, stretch, turn, scratch);
        }
        dispatch_send<kQuantise, 3>(view, in, stretch, turn, scratch);
    }
    void send(const SendInput& in, const Turn& turn, SendScratch scratch) const {
        if (in.wire == Wire::kFp8) return send_as<true>(in, turn, scratch);
        send_as<false>(in, turn, scratch);
    }
    void send(const SendInput& in, const Turn& turn, const RoundScratch& scratch, int ctas) const {
        const int stretch = stretch_of(in.num_tokens, ctas);
        if (in.wire == Wire::kFp8) {
            return dispatch_send_rounds<true>(view, in, stretch, turn, scratch);
        }
        dispatch_send_rounds<false>(view, in, stretch, turn, scratch);
    }
    int recv_room() const { return many ? WarpScratch::kRoom : view.message_room(); }
    int send_bytes() const { return many ? RoundScratch::bytes(view) : SendScratch::bytes(view); }
    // One thread of a dispatch: null pointers for the half that another kernel does.
    void dispatch(uint8_t* smem, const SendInput* in, const RecvTarget* target) const {
        const RoundScratch round = RoundScratch::carve(smem, view);
        const SendScratch sent = SendScratch::carve(smem, view);
        const RecvScratch received =
            RecvScratch::carve(smem + (in != nullptr ? send_bytes() : 0), view, recv_room());
        if (in != nullptr && many) prepare_rounds(view, round);
        if (in != nullptr && !many) prepare_send(view, sent);
        if (target != nullptr) prepare_recv(view, received);
        __syncthreads();
        const Turn turn = begin_as<DispatchFusedArgs>(Op::kDispatch);
        const bool part = in != nullptr && target != nullptr && senders > 0;
        if (in != nullptr && many) send(*in, turn, round, part ? senders : grid - 1);
        if (in != nullptr && !many) send(*in, turn, sent);
        if (target == nullptr) return;
        if (many) return dispatch_recv_teams(view, *target, turn, received, part ? 1 + senders : 1);
        dispatch_recv(view, *target, turn, received, part_bits);
    }
    emulator::Launch launch(std::function<void(uint8_t*)> body) const {
        const int64_t shared = send_bytes() + RecvScratch::bytes(view, recv_room());
        return {grid, kThreads, shared, std::move(body)};
    }
    emulator::Launch launch_combine(std::function<void(uint8_t*)> body) const {
        return {grid, kCombineThreads, 0, std::move(body)};
    }
    emulator::Launch dispatch_send_kernel(SendInput in) const {
        return launch([=, this](uint8_t* smem) { dispatch(smem, &in, nullptr); });
    }
    emulator::Launch dispatch_recv_kernel(RecvTarget target) const {
        return launch([=, this](uint8_t* smem) { dispatch(smem, nullptr, &target); });
    }
    emulator::Launch dispatch_fused_kernel(SendInput in, RecvTarget target) const {
        return launch([=, this](uint8_t* smem) { dispatch(smem, &in, &target); });
    }
    // Calls `step` with how the sums of a combine travel.
    template <class Step>
    void as(Wire wire, bool late_weights, Step step) const {
        if (wire == Wire::kFp8) return step(Fp8Sums{});
        if (few) return step(Bf16HalfSums{});
        if (streamed && !late_weights) return step(Bf16StreamedSums{});
        step(Bf16Sums{});
    }
    template <class Sums, Weights kWeights>
    void combine_send_as(const CombineInput& in, const Turn& turn) const {
        OwnTable<kWeights> table;
        table.ask(view, in);
        combine_send<Sums, kWeights>(view, in, turn, table, first_of_send<Sums>(view, in));
    }
    emulator::Launch combine_send_kernel(CombineInput in) const {
        return launch_combine([=, this](uint8_t*) {
            const Turn turn = begin_as<CombineSendArgs>(Op::kCombine);
            as(in.wire, in.late_weights, [&]<class Sums>(Sums) {
                if (in.late_weights) {
                    combine_send_as<Sums, Weights::kLate>(in, turn);
                } else {
                    combine_send_as<Sums, Weights::kKnown>(in, turn);
                }
            });
        });
    }
    emulator::Launch combine_recv_kernel(CombineOutput out) const {
        return launch_combine([=, this](uint8_t*) {
            const Turn turn = begin_as<CombineRecvArgs>(Op::kCombine);
            as(out.wire, false, [&]<class Sums>(Sums) { combine_recv<Sums>(view, out, turn); });
        });
    }
    template <class Sums, Weights kWeights>
    void combine_fused_as(const CombineInput& in, const CombineOutput& out,
                          const Turn& turn) const {
        OwnTable<kWeights> table;
        table.ask(view, in);
        const int send = send_ctas();
        const FirstItem first = first_of_both<Sums>(view, in, send);
        combine_both<Sums, kWeights>(view, in, out, send, turn, table, first);
    }
    emulator::Launch combine_fused_kernel(CombineInput in, CombineOutput out) const {
        return launch_combine([=, this](uint8_t*) {
            const Turn turn = begin_as<CombineFusedArgs>(Op::kCombine);
            as(in.wire, in.late_weights, [&]<class Sums>(Sums) {
                if (in.late_weights) {
                    combine_fused_as<Sums, Weights::kLate>(in, out, turn);
                } else {
                    combine_fused_as<Sums, Weights::kKnown>(in, out, turn);
                }
            });
        });
    }
};

}  // namespace ep
