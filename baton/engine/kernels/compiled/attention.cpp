// Attention over paged KV, for prompts' chunks and decoding rows alike.
//
// One unit of work is some KV heads of some query rows of one sequence. It walks the keys in tiles
// of TILE positions counted from position 0 of the sequence, with a running maximum and sum per
// query (online softmax). Scores, sums and products are single chains in key order within a
// tile, and tiles follow each other in order, so a query's result depends on its own position
// and keys alone: bitwise the same for any chunking, any batch and any block size.
#include <algorithm>
#include <limits>
#include <vector>

#include "linear.h"
#include "threads.h"

namespace baton {
namespace {

constexpr int TILE = 64;          // keys; a multiple of NR
constexpr int MAX_QUERIES = 72;   // query rows x grouped heads of one KV head, where groups allow

constexpr int DIRECT_QUERIES = 4;  // up to so many read values in place

static_assert(TILE % NR == 0, "scores are computed NR keys at a time");

struct Job {
  const float* q;  // [rows, heads, dim], rows q_stride apart
  int64_t q_stride;
  const void* keys;  // [blocks, block_size, kv_heads, dim]
  const void* values;
  int64_t block_size, kv_heads, group, dim;
  const int32_t* block_tables;  // [sequences, table_width]
  int64_t table_width;
  const int32_t* cu_rows;        // [sequences + 1]: first row of each sequence
  const int32_t* context_lens;   // [sequences]: positions up to the sequence's last row
  float scale, soft_cap;         // soft_cap 0: none
  int64_t window;                // 0: none
  float* out;                    // [rows, heads * dim]
};

struct Unit {
  int32_t sequence, first_row, num_rows, head_begin, head_end;  // KV heads
};

struct Scratch {
  std::vector<float> queries, transposed, values, scores, sums, scores_max, scores_sum;
};

// One row longer than the panel: panels a multiple of 4 KiB apart would fall on the same lines.
inline int64_t panel_stride(int64_t depth) { return (depth + 1) * NR; }

inline int64_t rounded(int64_t n) { return (n + NR - 1) / NR * NR; }

template <typename T>
inline void prefetch(const T* row, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(row + d, 0, 2);
}

// A row of values into its place in the panels [width / NR, TILE, NR].
template <typename T>
inline void copy_row(const T* from, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + NR <= dim; d += NR, to += panel_stride(TILE)) {
    store(to, load(from + d));
    store(to + VL, load(from + d + VL));
  }
  for (int64_t i = 0; d + i < dim; ++i) to[i] = to_float(from[d + i]);
}

// VL rows become VL columns, by log2(VL) perfect shuffles of rows i and i + VL / 2.
inline void transpose_square(vf* rows) {
  vi low, high;
  for (int i = 0; i < VL / 2; ++i) {
    low[2 * i] = i;
    low[2 * i + 1] = VL + i;
    high[2 * i] = VL / 2 + i;
    high[2 * i + 1] = VL + VL / 2 + i;
  }
  vf other[VL];
  for (int width = 1; width < VL; width *= 2) {
    for (int i = 0; i < VL / 2; ++i) {
      other[2 * i] = __builtin_shuffle(rows[i], rows[i + VL / 2], low);
      other[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + VL / 2], high);
    }
    for (int i = 0; i < VL; ++i) rows[i] = other[i];
  }
}

// Keys [from, to) of a tile as columns of the panels [TILE / NR, dim, NR].
template <typename T>
void transpose(const T* const* keys, int64_t from, int64_t to, int64_t dim, float* out) {
  for (int64_t j = from; j < to;) {
    float* at = out + j / NR * panel_stride(dim) + j % NR;
    if (j % VL != 0 || j + VL > to) {
      for (int64_t d = 0; d < dim; ++d) at[d * NR] = to_float(keys[j][d]);
      ++j;
      continue;
    }
    int64_t d = 0;
    for (; d + VL <= dim; d += VL) {
      vf rows[VL];
      for (int i = 0; i < VL; ++i) rows[i] = load(keys[j + i] + d);
      transpose_square(rows);
      for (int i = 0; i < VL; ++i) store(at + (d + i) * NR, rows[i]);
    }
    for (; d < dim; ++d) {
      for (int i = 0; i < VL; ++i) at[d * NR + i] = to_float(keys[j + i][d]);
    }
    j += VL;
  }
}

// sums[d] += weights[j] * values[j][d] for j in order, straight from the cache: what the product
// does, without the copy that pays only for several queries.
template <typename T>
inline void add_values(const float* weights, const T* const* values, int64_t from, int64_t to,
                       int64_t dim, float* sums) {
  constexpr int WIDE = 4;
  int64_t d = 0;
  for (; d + WIDE * VL <= dim; d += WIDE * VL) {
    vf acc[WIDE];
    for (int w = 0; w < WIDE; ++w) acc[w] = load(sums + d + w * VL);
    for (int64_t j = from; j < to; ++j) {
      const vf p = splat(weights[j]);
      for (int w = 0; w < WIDE; ++w) acc[w] += p * load(values[j] + d + w * VL);
    }
    for (int w = 0; w < WIDE; ++w) store(sums + d + w * VL, acc[w]);
  }
  for (; d < dim; ++d) {
    for (int64_t j = from; j < to; ++j) {
      sums[d] = multiply_add(weights[j], to_float(values[j][d]), sums[d]);
    }
  }
}

// Running softmax of one query over a tile: scores become weights, `sums` is scaled along.
// Keys outside [low, high] are not visible.
inline void weigh(float* scores, int64_t low, int64_t high, float soft_cap, float* running_max,
                  float* running_sum, float* sums, int64_t width) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  if (soft_cap > 0) {
    for (int j = 0; j < TILE; j += VL) {
      store(scores + j, tanh(load(scores + j) / soft_cap) * soft_cap);
    }
  }
  for (int64_t j = 0; j < std::min<int64_t>(low, TILE); ++j) scores[j] = none;
  for (int64_t j = std::max<int64_t>(0, high + 1); j < TILE; ++j) scores[j] = none;
  vf most = load(scores);
  for (int j = VL; j < TILE; j += VL) most = max(most, load(scores + j));
  const float before = *running_max;
  const float now = std::max(before, max(most));
  if (now == none) {
    std::fill(scores, scores + TILE, 0.0f);
    return;
  }
  vf total = {};
  for (int j = 0; j < TILE; j += VL) {
    const vf x = load(scores + j);
    const vf e = x == splat(none) ? vf{} : exp(x - now);
    store(scores + j, e);
    total += e;
  }
  if (now != before) {
    const float shrink = before == none ? 0.0f : exp(splat(before - now))[0];
    *running_sum *= shrink;
    for (int64_t d = 0; d < width; d += VL) store(sums + d, load(sums + d) * shrink);
    *running_max = now;
  }
  *running_sum += sum(total);
}

// The queries of a KV head are (row, grouped head) pairs: index row * group + head.
template <typename T>
void run(const Job& job, const Unit& unit, Scratch& s) {
  const int64_t dim = job.dim, width = rounded(dim), group = job.group;
  const int64_t count = int64_t(unit.num_rows) * group;
  const int64_t num_heads = unit.head_end - unit.head_begin;
  const int64_t row_stride = job.kv_heads * dim;
  const int64_t chunk_rows = job.cu_rows[unit.sequence + 1] - job.cu_rows[unit.sequence];
  const int64_t chunk_start = job.context_lens[unit.sequence] - chunk_rows;
  const int64_t first_position = chunk_start + unit.first_row;
  const int64_t last_position = first_position + unit.num_rows - 1;
  const int32_t* table = job.block_tables + unit.sequence * job.table_width;
  const int64_t base_row = job.cu_rows[unit.sequence] + unit.first_row;
  const bool copies_values = count > DIRECT_QUERIES;

  s.queries.resize(num_heads * count * dim);
  s.transposed.resize(TILE / NR * panel_stride(dim));
  s.values.resize(width / NR * panel_stride(TILE));
  s.scores.resize(count * TILE);
  s.sums.assign(num_heads * count * width, 0.0f);
  s.scores_max.assign(num_heads * count, -std::numeric_limits<float>::infinity());
  s.scores_sum.assign(num_heads * count, 0.0f);
  if (width != dim) std::fill(s.values.begin(), s.values.end(), 0.0f);

  for (int64_t head = 0; head < num_heads; ++head) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query_head = (unit.head_begin + head) * group + i % group;
      const float* from = job.q + (base_row + i / group) * job.q_stride + query_head * dim;
      float* to = &s.queries[(head * count + i) * dim];
      for (int64_t d = 0; d < dim; ++d) to[d] = from[d] * job.scale;
    }
  }

  const int64_t first_key = job.window ? std::max<int64_t>(0, first_position - job.window + 1) : 0;
  for (int64_t tile = first_key / TILE * TILE; tile <= last_position; tile += TILE) {
    const int64_t from = std::max(first_key, tile) - tile;
    const int64_t to = std::min<int64_t>(TILE, last_position + 1 - tile);
    const int64_t num_panels = (to + NR - 1) / NR;
    int64_t offsets[TILE];
    int64_t block = (tile + from) / job.block_size, place = (tile + from) % job.block_size;
    for (int64_t j = from; j < to; ++j) {
      offsets[j] = (int64_t(table[block]) * job.block_size + place) * row_stride;
      if (++place == job.block_size) {
        place = 0;
        ++block;
      }
    }
    // The next tile is fetched while this one is computed: caches do not guess block tables.
    const int64_t ahead = std::min<int64_t>(TILE, last_position + 1 - tile - TILE);
    for (int64_t j = 0; j < ahead; ++j) {
      const int64_t at = (int64_t(table[block]) * job.block_size + place) * row_stride +
                         unit.head_begin * dim;
      prefetch(static_cast<const T*>(job.keys) + at, num_heads * dim);
      prefetch(static_cast<const T*>(job.values) + at, num_heads * dim);
      if (++place == job.block_size) {
        place = 0;
        ++block;
      }
    }
    for (int64_t head = 0; head < num_heads; ++head) {
      const int64_t first = (unit.head_begin + head) * dim;
      const T *keys[TILE], *values[TILE];
      for (int64_t j = from; j < to; ++j) {
        keys[j] = static_cast<const T*>(job.keys) + offsets[j] + first;
        values[j] = static_cast<const T*>(job.values) + offsets[j] + first;
      }
      // Slots outside [from, to) may hold anything, even NaN: they are never read.
      if (from > 0 || to < TILE) std::fill(s.transposed.begin(), s.transposed.end(), 0.0f);
      transpose<T>(keys, from, to, dim, s.transposed.data());
      product(count, &s.queries[head * count * dim], dim, s.transposed.data(), panel_stride(dim),
              dim, s.scores.data(), TILE, num_panels, false);
      float* sums = &s.sums[head * count * width];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = first_position + i / group;
        const int64_t low = job.window ? std::max<int64_t>(0, position - job.window + 1 - tile) : 0;
        const int64_t high = std::min<int64_t>(TILE - 1, position - tile);
        const int64_t query = head * count + i;
        weigh(&s.scores[i * TILE], low, high, job.soft_cap, &s.scores_max[query],
              &s.scores_sum[query], sums + i * width, width);
      }
      if (copies_values) {
        for (int64_t j = from; j < to; ++j) copy_row(values[j], dim, &s.values[j * NR]);
        product(count, &s.scores[from], TILE, &s.values[from * NR], panel_stride(TILE), to - from,
                sums, width, width / NR, true);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          add_values(&s.scores[i * TILE], values, from, to, dim, sums + i * width);
        }
      }
    }
  }

  const int64_t out_stride = job.kv_heads * group * dim;
  for (int64_t head = 0; head < num_heads; ++head) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query_head = (unit.head_begin + head) * group + i % group;
      float* to = job.out + (base_row + i / group) * out_stride + query_head * dim;
      const float inverse = 1.0f / s.scores_sum[head * count + i];
      const float* sums = &s.sums[(head * count + i) * width];
      for (int64_t d = 0; d < dim; ++d) to[d] = sums[d] * inverse;
    }
  }
}

// A prompt's rows go one KV head at a time. A decoding row takes all heads at once where there
// are rows enough for the threads: then it reads each of its blocks from end to end.
// Longest units come first, so that no thread starts a long one when the others are done.
std::vector<Unit> cut(const Job& job, int64_t sequences, int threads) {
  std::vector<Unit> units;
  const int32_t most_rows = std::max<int32_t>(1, MAX_QUERIES / int32_t(job.group));
  const int32_t kv_heads = int32_t(job.kv_heads);
  for (int32_t s = 0; s < sequences; ++s) {
    const int32_t rows = job.cu_rows[s + 1] - job.cu_rows[s];
    const bool together = rows == 1 && sequences >= 4 * threads;
    const int32_t heads = together || threads == 1 ? kv_heads : 1;
    for (int32_t head = 0; head < kv_heads; head += heads) {
      for (int32_t row = 0; row < rows; row += most_rows) {
        units.push_back({s, row, std::min(most_rows, rows - row), head, head + heads});
      }
    }
  }
  const auto work = [&](const Unit& u) {
    const int64_t rows = job.cu_rows[u.sequence + 1] - job.cu_rows[u.sequence];
    return (job.context_lens[u.sequence] - rows + u.first_row + u.num_rows) * u.num_rows *
           (u.head_end - u.head_begin);
  };
  std::stable_sort(units.begin(), units.end(),
                   [&](const Unit& a, const Unit& b) { return work(a) > work(b); });
  return units;
}

template <typename T>
void attend(const Job& job, int64_t sequences, int threads) {
  const std::vector<Unit> units = cut(job, sequences, threads);
  parallel(threads, int64_t(units.size()), [&](int64_t i) {
    static thread_local Scratch scratch;
    run<T>(job, units[i], scratch);
  });
}

}  // namespace
}  // namespace baton

extern "C" {

// kv_type: 0 float32, 1 bfloat16, 2 float16. window 0 and soft_cap 0 mean none.
void baton_attention(const float* q, int64_t q_stride, const void* keys, const void* values,
                     int64_t kv_type, int64_t block_size, int64_t kv_heads, int64_t group,
                     int64_t dim, const int32_t* block_tables, int64_t table_width,
                     const int32_t* cu_rows, const int32_t* context_lens, int64_t sequences,
                     float scale, int64_t window, float soft_cap, float* out, int64_t threads) {
  const baton::Job job{q,        q_stride, keys,         values,      block_size,
                       kv_heads, group,    dim,          block_tables, table_width,
                       cu_rows,  context_lens, scale,    soft_cap,    window,
                       out};
  if (kv_type == 0) {
    baton::attend<float>(job, sequences, int(threads));
  } else if (kv_type == 1) {
    baton::attend<baton::bf16>(job, sequences, int(threads));
  } else {
    baton::attend<baton::f16>(job, sequences, int(threads));
  }
}
}
