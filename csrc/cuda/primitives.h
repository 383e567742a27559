// The CUDA primitives' launchers, one per operator of the same name. All run on `stream` of the
// current device, allocate nothing and never wait for the device.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace simple_moe::cuda {

// Whether topk_route needs TopkRoute::keys, and how long SortByExpert::counts must be.
bool topk_route_needs_keys(const TopkRoute& p);
int64_t sort_by_expert_counts(int64_t slots, int64_t experts);

// The row tiles that are best for a layer's two products of so many rows and columns, by wgmma or
// not, and how the second's k, which is first_n, is split, if it may be; all but the data, an array
// of one more than `most`.
RowTiles plan_row_tiles(int64_t rows, int64_t experts, int64_t first_n, int64_t second_n,
                        bool may_split, bool wgmma);

// Whether so much between a layer's kernels should be kept in L2 (GroupedGemm::keep_out).
bool l2_keeps(int64_t bytes);

void topk_route(const TopkRoute& p, cudaStream_t stream);
void sort_by_expert(const SortByExpert& p, cudaStream_t stream);
void row_tiles(const GroupedGemm& p, cudaStream_t stream);        // p.row_tiles of p.expert_offsets
void zero_other_rows(const GroupedGemm& p, cudaStream_t stream);  // that belong to no expert
void grouped_gemm(const GroupedGemm& p, cudaStream_t stream);
// Whether both operands are of 16 bits and in whole vectors, which splitting k asks for.
bool reads_whole_vectors(const GroupedGemm& p);
// Few tokens' slots by themselves: a product that takes no sort, where suited.
bool grouped_gemv_suits(const GroupedGemm& p);
void grouped_gemv(const GroupedGemm& p, cudaStream_t stream);
// grouped_gemm by wgmma, in builds with code for sm_90a and where has_sm90().
bool has_sm90();
void grouped_gemm_sm90(const GroupedGemm& p, cudaStream_t stream);
void grouped_gemm_wgrad(const GroupedGemmWgrad& p, cudaStream_t stream);
void combine(const Combine& p, cudaStream_t stream);

// grouped_gemm by torch's own matmul: reads the offsets on the host.
void cublas_grouped_gemm(const GroupedGemm& p, cudaStream_t stream);
// out = activation(h1 + bias) over the rows of one expert: the cublas backend's epilogue.
void grouped_gemm_epilogue(const GroupedGemm& p, const float* product, int64_t first_row,
                           int64_t rows, int64_t expert, cudaStream_t stream);

}  // namespace simple_moe::cuda
