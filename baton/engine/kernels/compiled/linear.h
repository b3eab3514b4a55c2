// The one product of this folder: rows times a panel of NR columns.
//
// An output element is a single chain of fused multiply-adds over k = 0, 1, 2, ... and is never
// split or reordered, whichever number of rows is taken at once and wherever k is cut into
// blocks (a block starts from the partial sum of the last). So a row's product is bitwise the
// same alone, among any neighbours and at any place.
#pragma once

#include "simd.h"

namespace baton {

constexpr int NR = 2 * VL;
#if defined(__AVX512F__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif

struct Pair {
  vf low, high;
};

inline Pair load_pair(const float* row) { return {load(row), load(row + VL)}; }
inline Pair load_pair(const f16* row) { return {load(row), load(row + VL)}; }

// Packed so that one load and two cheap operations give both vectors: each 32 bit word has
// column j in its low and column j + VL in its high half.
inline Pair load_pair(const bf16* row) {
  vu words;
  std::memcpy(&words, row, sizeof words);
  return {(vf)(words << 16), (vf)(words & 0xffff0000u)};
}

// Memory that will be read soon: `bytes_per_row` of it are asked for at each step over k.
struct Ahead {
  const char* at = nullptr;
  int64_t bytes_per_row = 0;
};

// acc[r][panel] (+)= sum over k of a[r][k] * panels[panel][k]. Panels lie panel_stride apart,
// rows of a panel NR apart. c: partial sums [rows, P * NR], read when `resume` is set.
template <int ROWS, int P, typename W, bool AHEAD = false>
inline __attribute__((always_inline)) void micro(const float* a, int64_t lda, const W* b,
                                                 int64_t panel_stride, int64_t ldb, int64_t depth,
                                                 float* c, int64_t ldc, bool resume,
                                                 Ahead ahead = {}) {
  vf acc[ROWS][P][2];
  for (int r = 0; r < ROWS; ++r) {
    for (int p = 0; p < P; ++p) {
      float* at = c + r * ldc + p * NR;
      acc[r][p][0] = resume ? load(at) : vf{};
      acc[r][p][1] = resume ? load(at + VL) : vf{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (AHEAD) __builtin_prefetch(ahead.at + k * ahead.bytes_per_row, 0, 2);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Pair w = load_pair(b + p * panel_stride + k * ldb);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const vf x = splat(a[r * lda + k]);
        acc[r][p][0] += x * w.low;
        acc[r][p][1] += x * w.high;
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int p = 0; p < P; ++p) {
      float* at = c + r * ldc + p * NR;
      store(at, acc[r][p][0]);
      store(at + VL, acc[r][p][1]);
    }
  }
}

template <int ROWS, int P, typename W, bool AHEAD = false>
void micro_call(const float* a, int64_t lda, const W* b, int64_t panel_stride, int64_t ldb,
                int64_t depth, float* c, int64_t ldc, bool resume, Ahead ahead = {}) {
  micro<ROWS, P, W, AHEAD>(a, lda, b, panel_stride, ldb, depth, c, ldc, resume, ahead);
}

// num_rows <= MR rows times one panel.
template <typename W, bool AHEAD = false>
inline void micro_rows(int num_rows, const float* a, int64_t lda, const W* b, int64_t ldb,
                       int64_t depth, float* c, int64_t ldc, bool resume, Ahead ahead = {}) {
  switch (num_rows) {
#define BATON_CASE(R) \
  case R:             \
    return micro_call<R, 1, W, AHEAD>(a, lda, b, 0, ldb, depth, c, ldc, resume, ahead);
    BATON_CASE(1)
    BATON_CASE(2)
    BATON_CASE(3)
    BATON_CASE(4)
    BATON_CASE(5)
    BATON_CASE(6)
#if defined(__AVX512F__)
    BATON_CASE(7)
    BATON_CASE(8)
    BATON_CASE(9)
    BATON_CASE(10)
    BATON_CASE(11)
    BATON_CASE(12)
#endif
#undef BATON_CASE
  }
}

// Rows of the next tile, when `left` rows are cut into as few and as equal tiles as possible.
inline int tile_rows(int64_t left) {
  const int64_t tiles = (left + MR - 1) / MR;
  return int((left + tiles - 1) / tiles);
}

// Any number of rows times contiguous panels, panel_stride apart; sums of panel p at c + p * NR.
// Few rows take several panels at once, which hides the adders' latency.
inline void product(int64_t rows, const float* a, int64_t lda, const float* b,
                    int64_t panel_stride, int64_t depth, float* c, int64_t ldc, int64_t panels,
                    bool resume) {
  for (int64_t r = 0; r < rows;) {
    const int count = tile_rows(rows - r);
    const float* a_tile = a + r * lda;
    float* c_tile = c + r * ldc;
    int64_t p = 0;
    if (count == 1) {
      for (; p + 4 <= panels; p += 4) {
        micro_call<1, 4, float>(a_tile, lda, b + p * panel_stride, panel_stride, NR, depth,
                                c_tile + p * NR, ldc, resume);
      }
    } else if (count <= 3) {
      for (; p + 2 <= panels; p += 2) {
        const float* panel = b + p * panel_stride;
        if (count == 2) {
          micro_call<2, 2, float>(a_tile, lda, panel, panel_stride, NR, depth, c_tile + p * NR,
                                  ldc, resume);
        } else {
          micro_call<3, 2, float>(a_tile, lda, panel, panel_stride, NR, depth, c_tile + p * NR,
                                  ldc, resume);
        }
      }
    }
    for (; p < panels; ++p) {
      micro_rows<float>(count, a_tile, lda, b + p * panel_stride, NR, depth, c_tile + p * NR, ldc,
                        resume);
    }
    r += count;
  }
}

}  // namespace baton
