#include "grouped_gemm_sm80.cuh"

namespace simple_moe::cuda {

void grouped_gemm_f16(const GroupedGemm& p, cudaStream_t stream) {
  launch_best_shape<f16>(p, stream);
}

}  // namespace simple_moe::cuda
