#include "grouped_gemm_sm90.cuh"

template void simple_moe::cuda::launch_sm90<simple_moe::bf16>(const simple_moe::GroupedGemm& p,
                                                              cudaStream_t stream);
