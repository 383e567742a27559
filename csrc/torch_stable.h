// What most files want of torch, which takes longer to read than they do: it is compiled once, and
// included first of all in every .cpp (see setup.py).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
