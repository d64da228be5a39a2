// What every launcher of a CUDA kernel needs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ipvrm {

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

// One block for every `items` of `count`; a launch takes 2^31 - 1 of them, and a count cut to 32 bits would be a smaller one.
inline unsigned grid(const char* op, int64_t count, int64_t items = 1) {
  const int64_t blocks = count / items + (count % items != 0);
  if (blocks > 0x7fffffff)
    throw std::runtime_error(std::string(op) + ": a launch must have at most 2147483647 blocks, got " +
                             std::to_string(blocks) + "; pass fewer at a time");
  return static_cast<unsigned>(blocks);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": launch failed: " + cudaGetErrorString(error));
}

}  // namespace ipvrm
