// Products of 16-bit matrices in float32, where instructions of this CPU make them faster than
// torch's matmul of converted operands. (torch's matmul of the operands as they are would round
// every sum to 16 bits.)
#pragma once

#include "common.h"

namespace simple_moe::cpu {

// Whether dot_products has such instructions for this dtype and so many rows of `a`.
bool dot_products_pay(DType dtype, int64_t rows);

// out = a @ b.T: float32 from two of one 16-bit dtype, both with contiguous columns.
void dot_products(const Matrix& out, const Matrix& a, const Matrix& b);

}  // namespace simple_moe::cpu
