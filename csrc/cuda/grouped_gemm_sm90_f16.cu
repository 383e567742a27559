#include "grouped_gemm_sm90.cuh"

namespace simple_moe::cuda {

void grouped_gemm_sm90_f16(const GroupedGemm& p, cudaStream_t stream) {
  launch_sm90<f16>(p, stream);
}

}  // namespace simple_moe::cuda
