#include "grouped_gemm_any.cuh"

template void simple_moe::cuda::launch_any<simple_moe::f16>(const simple_moe::GroupedGemm& p,
                                                            cudaStream_t stream);
