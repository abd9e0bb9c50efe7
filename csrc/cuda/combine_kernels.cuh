// Combine kernels of one way for sums to travel.
#pragma once

#include "cuda/begin.cuh"
#include "cuda/combine_halves.cuh"

namespace ep {

template <class Sums, Weights kWeights>
__global__ void __launch_bounds__(kCombineThreads, kCombineCtas)
    combine_send_kernel(const __grid_constant__ CombineSendArgs a) {
    OwnTable<kWeights> table;
    FirstItem first;
    const auto ask = [&] {
        table.ask(a.view, a.in);
        first = first_of_send<Sums>(a.view, a.in);
    };
    const Turn turn = begin(a, Op::kCombine, [] {}, ask);
    combine_send<Sums, kWeights>(a.view, a.in, turn, table, first);
}

template <class Sums>
__global__ void __launch_bounds__(kCombineThreads, kCombineCtas)
    combine_recv_kernel(const __grid_constant__ CombineRecvArgs a) {
    combine_recv<Sums>(a.view, a.out, begin(a, Op::kCombine));
}

template <class Sums, Weights kWeights>
__global__ void __launch_bounds__(kCombineThreads, kCombineCtas)
    combine_fused_kernel(const __grid_constant__ CombineFusedArgs a) {
    OwnTable<kWeights> table;
    FirstItem first;
    const auto ask = [&] {
        table.ask(a.view, a.in);
        first = first_of_both<Sums>(a.view, a.in, a.send_ctas);
    };
    const Turn turn = begin(a, Op::kCombine, [] {}, ask);
    combine_both<Sums, kWeights>(a.view, a.in, a.out, a.send_ctas, turn, table, first);
}

template <class Sums>
CombineKernels combine_kernels_of(bool late_weights) {
    constexpr Weights kKnown = Weights::kKnown, kLate = Weights::kLate;
    const auto recv = combine_recv_kernel<Sums>;
    if (late_weights) {
        return {combine_send_kernel<Sums, kLate>, recv, combine_fused_kernel<Sums, kLate>};
    }
    return {combine_send_kernel<Sums, kKnown>, recv, combine_fused_kernel<Sums, kKnown>};
}

}  // namespace ep
