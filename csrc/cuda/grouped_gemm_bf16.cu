#include "grouped_gemm_sm80.cuh"

template void simple_moe::cuda::launch_sm80<simple_moe::bf16>(const simple_moe::GroupedGemm& p,
                                                              cudaStream_t stream);
