// The work around oneDNN's bf16 kernel (bf16_cpu.h): packing, rounding and blocking. Everything here moves 16 x 16 pairs of
// bf16 at a time, a pair being 32 bits wide and a line of 16 of them a cache line.

#include "bf16_cpu.h"

#include <algorithm>
#include <cstring>
#include <exception>

#if defined(__clang__)
#define IPVRM_KNOWS_BF16 (__clang_major__ >= 9)
#elif defined(__GNUC__)
#define IPVRM_KNOWS_BF16 (__GNUC__ >= 10)
#else
#define IPVRM_KNOWS_BF16 0
#endif
#if defined(__x86_64__) && IPVRM_KNOWS_BF16
#include <cpuid.h>
#ifndef __clang__  // GCC bug 105593: its own intrinsics start from a variable that is not set
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define IPVRM_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define IPVRM_HAS_BF16 1
#endif

namespace ipvrm {
namespace {

constexpr int64_t kPanel = 64;  // columns
constexpr int64_t kRows = 64;   // of a block
// Terms of a block's sums, which are added up: one chain of 1,024 is twice as far off, and 256 take 3 % more time. What a
// block reads of A and B stays in L2.
constexpr int64_t kTerms = 512;
constexpr int64_t kSmall = 32768;                // elements to move, below which a thread team costs more than it saves
constexpr int64_t kFewTerms = int64_t{1} << 20;  // the same of multiply-adds

int64_t even(int64_t n) { return n + (n & 1); }
int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#ifdef IPVRM_HAS_BF16

// A processor's features: bits of cpuid's leaf 7.
struct Leaf7 {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Leaf7(unsigned sub) {
    if (!__get_cpuid_count(7, sub, &eax, &ebx, &ecx, &edx)) eax = ebx = ecx = edx = 0;
  }
};

// Whether the operating system keeps these registers (bits of XCR0).
bool keeps(unsigned registers) {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & (1u << 27))) return false;  // OSXSAVE
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & registers) == registers;
}

constexpr unsigned kOfAvx512 = 0xE6, kOfAmx = 0x60000;

// 16 pairs from each of 16 rows to the pairs of each of 16 columns.
IPVRM_BF16 inline void transpose_pairs(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xDD);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xDD);
  }
}

// The lowest `count` bits, at most 32.
inline uint32_t lowest(int64_t count) { return count >= 32 ? 0xFFFFFFFFu : count <= 0 ? 0u : (1u << count) - 1u; }

// 32 bf16 from `x`, of which `count` exist; zeros behind.
IPVRM_BF16 inline __m512i load32(const bf16* x, int64_t count) { return _mm512_maskz_loadu_epi16(lowest(count), x); }
IPVRM_BF16 inline __m512i load32(const float* x, int64_t count) {
  const uint32_t mask = lowest(count);
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), mask >> 16 ? x + 16 : x);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// (first[j], second[j]) for 16 columns
IPVRM_BF16 inline __m512i pair(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// 16 columns of B = x.T, which are rows of x.
template <typename T>
IPVRM_BF16 void pack_columns(const T* x, int64_t row0, int64_t rows, int64_t cols, int64_t stride, int64_t pairs,
                             bf16* out) {
  const int64_t there = std::min<int64_t>(16, rows - row0);
  uint32_t* panel = reinterpret_cast<uint32_t*>(out) + row0 / kPanel * kPanel * pairs + row0 % kPanel;
  for (int64_t first = 0; first < pairs; first += 16) {
    const int64_t terms = cols - 2 * first;
    __m512i r[16];
    for (int64_t i = 0; i < 16; ++i) {
      r[i] = i < there && terms > 0 ? load32(x + (row0 + i) * stride + 2 * first, terms) : _mm512_setzero_si512();
    }
    transpose_pairs(r);
    const int64_t count = std::min<int64_t>(16, pairs - first);
    for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(panel + (first + i) * kPanel, r[i]);
  }
}

// Two rows of B = x.
template <typename T>
IPVRM_BF16 void pack_two_rows(const T* x, int64_t p, int64_t rows, int64_t cols, int64_t stride, int64_t pairs, bf16* out) {
  const bool has_first = 2 * p < rows, has_second = 2 * p + 1 < rows;
  const T* row = x + (has_first ? 2 * p * stride : 0);
  for (int64_t j = 0; j < up(cols, kPanel); j += 32) {
    const int64_t count = cols - j;
    const __m512i first = count > 0 && has_first ? load32(row + j, count) : _mm512_setzero_si512();
    const __m512i second = count > 0 && has_second ? load32(row + stride + j, count) : _mm512_setzero_si512();
    uint32_t* at = reinterpret_cast<uint32_t*>(out) + (j / kPanel * pairs + p) * kPanel + j % kPanel;
    _mm512_storeu_si512(at, pair(_mm512_castsi512_si256(first), _mm512_castsi512_si256(second)));
    _mm512_storeu_si512(at + 16, pair(_mm512_extracti64x4_epi64(first, 1), _mm512_extracti64x4_epi64(second, 1)));
  }
}

template <typename T>
void pack(const T* x, int64_t rows, int64_t cols, int64_t stride, bool transpose, int64_t K, bf16* out, int num_threads) {
  const int64_t pairs = K / 2, parts = transpose ? up(rows, kPanel) / 16 : pairs;
#pragma omp parallel for schedule(static) num_threads(rows* cols < kSmall ? 1 : num_threads)
  for (int64_t part = 0; part < parts; ++part) {
    if (transpose) {
      pack_columns(x, 16 * part, rows, cols, stride, pairs, out);
    } else {
      pack_two_rows(x, part, rows, cols, stride, pairs, out);
    }
  }
}

IPVRM_BF16 void round_band(const float* tile, int64_t row0, int64_t rows, int64_t cols, bf16* out, bf16* out_t,
                           int64_t height) {
  const int64_t wide = even(cols), there = std::min<int64_t>(32, rows - row0);
  for (int64_t j = 0; j < wide; j += 16) {
    const __mmask16 mask = static_cast<__mmask16>(lowest(std::min<int64_t>(cols - j, 16)));
    const __mmask16 stored = static_cast<__mmask16>(lowest(std::min<int64_t>(wide - j, 16)));
    __m256i rounded[32];
    for (int64_t i = 0; i < 32; ++i) {
      if (i >= there) {
        rounded[i] = _mm256_setzero_si256();
        continue;
      }
      rounded[i] = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, tile + (row0 + i) * cols + j));
      if (out) _mm256_mask_storeu_epi16(out + (row0 + i) * wide + j, stored, rounded[i]);
    }
    if (!out_t) continue;
    __m512i r[16];
    for (int64_t i = 0; i < 16; ++i) r[i] = pair(rounded[2 * i], rounded[2 * i + 1]);
    transpose_pairs(r);
    const __mmask32 column = lowest(height - row0);
    const int64_t count = std::min<int64_t>(16, cols - j);
    for (int64_t i = 0; i < count; ++i) _mm512_mask_storeu_epi16(out_t + (j + i) * height + row0, column, r[i]);
  }
}

#endif

// c (m, n) of one panel; the kernel writes whole panels, so one that sticks out goes through a block of its own.
void multiply_block(const Brgemm& brgemm, const bf16* a, int64_t lda, const bf16* panel, int64_t m, int64_t n, int64_t K,
                    float* c, int64_t ldc, bool add) {
  alignas(64) float block[kRows * kPanel];
  float* to = c;
  int64_t ld = ldc;
  if (n < kPanel) {
    to = block;
    ld = kPanel;
    std::memset(block, 0, sizeof block);
    for (int64_t i = 0; add && i < m; ++i) std::copy_n(c + i * ldc, n, block + i * kPanel);
  }
  for (int64_t k = 0; k < K; k += kTerms) {
    brgemm.multiply(m, kPanel, std::min(kTerms, K - k), lda, kPanel, ld, add || k > 0, a + k, panel + k * kPanel, to, true);
  }
  for (int64_t i = 0; n < kPanel && i < m; ++i) std::copy_n(block + i * kPanel, n, c + i * ldc);
}

}  // namespace

#ifdef IPVRM_HAS_BF16

bool has_bf16_products() {
  constexpr unsigned kFoundation = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;  // with which oneDNN's come
  constexpr unsigned kAll = kFoundation | kDq | kBw | kVl;
  return keeps(kOfAvx512) && (Leaf7(0).ebx & kAll) == kAll && (Leaf7(1).eax & (1u << 5));
}

bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return keeps(kOfAmx) && (Leaf7(0).edx & kBf16) && (Leaf7(0).edx & kTile);
}

void pack_panels_cpu(const void* x, bool wide, int64_t rows, int64_t cols, int64_t stride, bool transpose, int64_t K,
                     bf16* out, int num_threads) {
  if (wide) {
    pack(static_cast<const float*>(x), rows, cols, stride, transpose, K, out, num_threads);
  } else {
    pack(static_cast<const bf16*>(x), rows, cols, stride, transpose, K, out, num_threads);
  }
}

void round_tile_cpu(const float* tile, int64_t rows, int64_t cols, bf16* out, bf16* out_t, int64_t height,
                    int num_threads) {
  const int64_t last = out_t ? height : rows;
#pragma omp parallel for schedule(static) num_threads(rows* cols < kSmall ? 1 : num_threads)
  for (int64_t row0 = 0; row0 < last; row0 += 32) round_band(tile, row0, rows, cols, out, out_t, height);
}

#else

bool has_bf16_products() { return false; }
bool has_amx() { return false; }
void pack_panels_cpu(const void*, bool, int64_t, int64_t, int64_t, bool, int64_t, bf16*, int) {}
void round_tile_cpu(const float*, int64_t, int64_t, bf16*, bf16*, int64_t, int) {}

#endif

void multiply_panels_cpu(const Brgemm& brgemm, const bf16* a, int64_t lda, const bf16* panels, int64_t M, int64_t N,
                         int64_t K, float* c, bool add, int num_threads) {
  if (K == 0 && !add) std::fill_n(c, M * N, 0.0f);
  if (K == 0) return;
  const int64_t num_panels = up(N, kPanel) / kPanel, num_blocks = up(M, kRows) / kRows;
  std::exception_ptr thrown;
#pragma omp parallel num_threads(M * N * K < kFewTerms ? 1 : num_threads)
  {
    std::exception_ptr of_thread;  // no exception may leave a loop's body or the region
#pragma omp for schedule(static)
    for (int64_t task = 0; task < num_blocks * num_panels; ++task) {
      const int64_t row0 = task / num_panels * kRows, col0 = task % num_panels * kPanel;
      const int64_t last = std::min(row0 + kRows, M), n = std::min(kPanel, N - col0);
      try {
        int64_t m = kRows;  // few heights, since oneDNN makes and keeps a kernel for each
        for (int64_t row = row0; row < last; row += m) {
          while (m > last - row) m /= 2;
          multiply_block(brgemm, a + row * lda, lda, panels + col0 * K, m, n, K, c + row * N + col0, N, add);
        }
      } catch (...) {
        of_thread = std::current_exception();
      }
    }
    try {
      brgemm.release(true);
    } catch (...) {
      of_thread = std::current_exception();
    }
#pragma omp critical(ipvrm_thrown)
    if (of_thread) thrown = of_thread;
  }
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace ipvrm
