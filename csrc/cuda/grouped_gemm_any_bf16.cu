#include "grouped_gemm_any.cuh"

namespace simple_moe::cuda {

void grouped_gemm_any_bf16(const GroupedGemm& p, cudaStream_t stream) {
  p.b_col_stride == 1 ? launch_any_shape<bf16, false>(p, stream)
                      : launch_any_shape<bf16, true>(p, stream);
}

}  // namespace simple_moe::cuda
