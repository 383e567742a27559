#include "grouped_gemm.cuh"

namespace simple_moe::cuda {

void grouped_gemm_bf16(const GroupedGemm& p, cudaStream_t stream) {
  grouped_gemm_mma<bf16, false>(p, stream);
}

}  // namespace simple_moe::cuda
