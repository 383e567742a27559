// Empty: emulator.h, included by force, has all of CUDA that the kernels use.
