// The CPU primitives, one per operator of the same name.
#pragma once

#include "params.h"

namespace simple_moe::cpu {

void topk_route(const TopkRoute& p);
void sort_by_expert(const SortByExpert& p);
void grouped_gemm(const GroupedGemm& p);
void grouped_gemm_wgrad(const GroupedGemmWgrad& p);
void combine(const Combine& p);

}  // namespace simple_moe::cpu
