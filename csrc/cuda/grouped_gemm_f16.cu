#include "grouped_gemm_sm80.cuh"

namespace simple_moe::cuda {
template void launch_sm80<f16>(const GroupedGemm& p, cudaStream_t stream);
}
