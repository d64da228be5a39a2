// Products of bf16 matrices with fp32 sums on the CPU: what stands around oneDNN's kernel for one block. It reads the right
// operand B (K, N) in panels of 64 columns, in a panel two rows interleaved. K is even: who packs fills up with zeros.
#pragma once

#include <cstdint>

namespace ipvrm {

using bf16 = uint16_t;

// PyTorch's at::native::cpublas::brgemm: c (m, n) = a (m, k) b, or += it, of one panel; and brgemm_release, which gives back
// what the calling thread holds of the processor (AMX's tiles).
struct Brgemm {
  void (*multiply)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const bf16* a,
                   const bf16* b, float* c, bool interleaved);
  void (*release)(bool interleaved);
};

// Whether this build has the functions below and the processor, as the operating system lets it, their instructions and
// oneDNN's: AVX-512 with BF16.
bool has_bf16_products();

// Whether processor and operating system have tiles of bf16 (AMX), which oneDNN asks for by itself.
bool has_amx();

// x (rows, cols), bf16 or, with `wide`, fp32 to be rounded, rows `stride` elements apart. B is x, or x.T with `transpose`,
// with zeros up to K terms.
void pack_panels_cpu(const void* x, bool wide, int64_t rows, int64_t cols, int64_t stride, bool transpose, int64_t K,
                     bf16* out, int num_threads);

// tile (rows, cols) rounded to `out` (rows, even cols) and transposed to `out_t` (cols, height), zeros behind; either may be
// null. height is even and at least rows.
void round_tile_cpu(const float* tile, int64_t rows, int64_t cols, bf16* out, bf16* out_t, int64_t height, int num_threads);

// c (M, N) contiguous = a (M, K) B, or += it; a's rows are `lda` apart. A result does not depend on M or N. What the kernel
// throws is thrown.
void multiply_panels_cpu(const Brgemm& brgemm, const bf16* a, int64_t lda, const bf16* panels, int64_t M, int64_t N,
                         int64_t K, float* c, bool add, int num_threads);

}  // namespace ipvrm
