#include "grouped_gemm_any.cuh"

template void simple_moe::cuda::launch_any<float>(const simple_moe::GroupedGemm& p,
                                                  cudaStream_t stream);
