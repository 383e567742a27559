#include "grouped_gemm_sm90.cuh"

namespace simple_moe::cuda {
template void launch_sm90<f16>(const GroupedGemm& p, cudaStream_t stream);
}
