#include "grouped_gemm_any.cuh"

namespace simple_moe::cuda {
template void launch_any<f16>(const GroupedGemm& p, cudaStream_t stream);
}
