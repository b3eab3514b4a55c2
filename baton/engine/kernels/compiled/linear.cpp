// y = x W^T (+ bias) (+ residual), or gate(x W_g^T) * (x W_u^T), on packed weights.
//
// x: [rows, depth] float32. W: panels of NR output columns, each [depth, NR] and contiguous, in
// float32, bfloat16 or float16. Threads share the panels: no two write the same element.
#include <algorithm>

#include "linear.h"
#include "threads.h"

namespace baton {
namespace {

enum Gate { NO_GATE = 0, SILU = 1, GELU_TANH = 2 };

constexpr int64_t DEPTH_BLOCK = 384;             // a panel's block of it stays in L1
constexpr int64_t ROW_BLOCK_BYTES = 192 * 1024;  // rows kept in L2 while panels pass by
constexpr int MAX_ROW_BLOCK = 240;
constexpr int64_t MOST_ROWS_FETCHING_AHEAD = 48;  // beyond, weights are not what is waited for
constexpr int64_t CHUNKS_PER_THREAD = 4;

struct Product {
  const float* x;
  int64_t rows, depth, columns;
  const float* bias;
  const float* residual;
  float* y;
  int gate;
};

inline vf gated(int gate, vf g, vf u) { return (gate == SILU ? silu(g) : gelu_tanh(g)) * u; }

inline void store_some(float* p, vf v, int count) {
  if (count >= VL) {
    store(p, v);
  } else {
    for (int i = 0; i < count; ++i) p[i] = v[i];
  }
}

inline vf load_some(const float* p, int count) {
  if (count >= VL) return load(p);
  vf v = {};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

// Write `rows` finished rows of one panel. sums: [rows, lds].
inline void finish(const Product& job, int64_t panel, int64_t first, int64_t rows,
                   const float* sums, int64_t lds) {
  const int64_t width = job.gate == NO_GATE ? NR : VL;
  const int64_t total = job.gate == NO_GATE ? job.columns : job.columns / 2;
  const int64_t column = panel * width;
  const int count = int(std::min(width, total - column));
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = sums + r * lds;
    float* to = job.y + (first + r) * total + column;
    if (job.gate != NO_GATE) {
      vf g = load(from), u = load(from + VL);
      if (job.bias) {
        g += load_some(job.bias + column, count);
        u += load_some(job.bias + total + column, count);
      }
      store_some(to, gated(job.gate, g, u), count);
      continue;
    }
    for (int half = 0; half < 2; ++half) {
      const int left = count - half * VL;
      if (left <= 0) break;
      vf v = load(from + half * VL);
      if (job.bias) v += load_some(job.bias + column + half * VL, left);
      if (job.residual) v += load_some(job.residual + (first + r) * total + column + half * VL, left);
      store_some(to + half * VL, v, left);
    }
  }
}

// Few rows: the weights pass once, so several panels go together to hide the adders' latency.
template <int ROWS, int P, typename W>
void few_rows(const Product& job, const W* w, int64_t begin, int64_t end) {
  const int64_t stride = job.depth * NR;
  float sums[ROWS * P * NR];
  int64_t panel = begin;
  for (; panel + P <= end; panel += P) {
    micro<ROWS, P, W>(job.x, job.depth, w + panel * stride, stride, NR, job.depth, sums, P * NR,
                      false);
    for (int p = 0; p < P; ++p) finish(job, panel + p, 0, ROWS, sums + p * NR, P * NR);
  }
  for (; panel < end; ++panel) {
    micro<ROWS, 1, W>(job.x, job.depth, w + panel * stride, stride, NR, job.depth, sums, NR,
                      false);
    finish(job, panel, 0, ROWS, sums, NR);
  }
}

template <typename W, bool AHEAD>
void many_rows(const Product& job, const W* w, int64_t begin, int64_t end) {
  const int64_t stride = job.depth * NR;
  const int64_t depth_blocks = (job.depth + DEPTH_BLOCK - 1) / DEPTH_BLOCK;
  const int64_t depth_block = (job.depth + depth_blocks - 1) / depth_blocks;
  int64_t row_block = ROW_BLOCK_BYTES / (4 * job.depth) / MR * MR;
  row_block = std::clamp<int64_t>(row_block, 4 * MR, MAX_ROW_BLOCK);
  alignas(64) float sums[MAX_ROW_BLOCK * NR];
  for (int64_t first = 0; first < job.rows; first += row_block) {
    const int64_t rows = std::min(row_block, job.rows - first);
    const int64_t tiles = (rows + MR - 1) / MR;
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t k = 0; k < job.depth; k += depth_block) {
        const int64_t depth = std::min(depth_block, job.depth - k);
        const W* block = w + panel * stride + k * NR;
        // While the tiles of a few rows go over this block, the next panel's is fetched.
        const int64_t row_bytes = NR * sizeof(W) / tiles;
        Ahead ahead{reinterpret_cast<const char*>(block + stride), row_bytes};
        for (int64_t r = 0; r < rows;) {
          const int count = tile_rows(rows - r);
          const float* x = job.x + (first + r) * job.depth + k;
          if (AHEAD) {
            micro_rows<W, true>(count, x, job.depth, block, NR, depth, sums + r * NR, NR, k > 0,
                                ahead);
            ahead.at += depth * row_bytes;
          } else {
            micro_rows<W>(count, x, job.depth, block, NR, depth, sums + r * NR, NR, k > 0);
          }
          r += count;
        }
      }
      finish(job, panel, first, rows, sums, NR);
    }
  }
}

template <typename W>
void some_panels(const Product& job, const W* w, int64_t begin, int64_t end) {
  switch (job.rows) {
    case 1:
      return few_rows<1, 4, W>(job, w, begin, end);
    case 2:
      return few_rows<2, 2, W>(job, w, begin, end);
    case 3:
      return few_rows<3, 2, W>(job, w, begin, end);
    default:
      return job.rows <= MOST_ROWS_FETCHING_AHEAD ? many_rows<W, true>(job, w, begin, end)
                                                  : many_rows<W, false>(job, w, begin, end);
  }
}

template <typename W>
void multiply(const Product& job, const W* w, int threads) {
  const int64_t panels = (job.columns + NR - 1) / NR;
  const int64_t chunks = threads == 1 ? 1 : std::min<int64_t>(panels, CHUNKS_PER_THREAD * threads);
  parallel(threads, chunks, [&](int64_t chunk) {
    some_panels<W>(job, w, panels * chunk / chunks, panels * (chunk + 1) / chunks);
  });
}

}  // namespace
}  // namespace baton

extern "C" {

int64_t baton_vector_width() { return baton::VL; }

// weight_type: 0 float32, 1 bfloat16, 2 float16. gate: 0 none, 1 silu, 2 gelu (tanh).
void baton_linear(const float* x, int64_t rows, int64_t depth, const void* weights,
                  int64_t weight_type, int64_t columns, const float* bias, const float* residual,
                  int64_t gate, float* y, int64_t threads) {
  const baton::Product job{x, rows, depth, columns, bias, residual, y, int(gate)};
  if (weight_type == 0) {
    baton::multiply(job, static_cast<const float*>(weights), int(threads));
  } else if (weight_type == 1) {
    baton::multiply(job, static_cast<const baton::bf16*>(weights), int(threads));
  } else {
    baton::multiply(job, static_cast<const baton::f16*>(weights), int(threads));
  }
}
}
