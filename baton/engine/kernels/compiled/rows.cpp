// What happens to rows between two products: the norm, and Q, K, V on their way to attention.
#include <algorithm>
#include <cmath>

#include "simd.h"
#include "threads.h"

namespace baton {
namespace {

// y = x / rms(x) * weight (+ residual), one row. y may be x.
inline void norm_row(const float* x, const float* weight, float eps, int64_t width,
                     const float* residual, float* y) {
  vf squares = {};
  int64_t i = 0;
  for (; i + VL <= width; i += VL) {
    const vf v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < width; ++i) total += x[i] * x[i];
  const float inverse = 1.0f / std::sqrt(total / float(width) + eps);
  for (i = 0; i + VL <= width; i += VL) {
    vf v = load(x + i) * inverse * load(weight + i);
    if (residual) v += load(residual + i);
    store(y + i, v);
  }
  for (; i < width; ++i) {
    float v = x[i] * inverse * weight[i];
    if (residual) v += residual[i];
    y[i] = v;
  }
}

// Element i is turned against element i + half, for i below half; the rest stays.
inline void turn(float* head, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + VL <= half; i += VL) {
    const vf a = load(head + i), b = load(head + half + i);
    const vf c = load(cos + i), s = load(sin + i);
    store(head + i, a * c - b * s);
    store(head + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

struct Heads {
  float* qkv;  // [rows, heads + 2 * kv_heads, dim]
  int64_t heads, kv_heads, dim, half;
  const float* cos;  // [rows, half]
  const float* sin;
  const float* q_norm;  // [dim] each, or null
  const float* k_norm;
  float eps;
  void* keys;  // [slots, kv_heads, dim]
  void* values;
  const int64_t* slots;  // [rows]; -1: not stored
};

template <typename T>
void place_row(const Heads& job, int64_t row) {
  float* head = job.qkv + row * (job.heads + 2 * job.kv_heads) * job.dim;
  const float* cos = job.cos + row * job.half;
  const float* sin = job.sin + row * job.half;
  for (int64_t h = 0; h < job.heads + job.kv_heads; ++h, head += job.dim) {
    const float* weight = h < job.heads ? job.q_norm : job.k_norm;
    if (weight) norm_row(head, weight, job.eps, job.dim, nullptr, head);
    turn(head, cos, sin, job.half);
  }
  if (job.slots[row] < 0) return;
  const int64_t width = job.kv_heads * job.dim;
  T* key = static_cast<T*>(job.keys) + job.slots[row] * width;
  T* value = static_cast<T*>(job.values) + job.slots[row] * width;
  for (int64_t i = 0; i < width; ++i) from_float(head[i - width], key + i);
  for (int64_t i = 0; i < width; ++i) from_float(head[i], value + i);
}

constexpr int64_t ROWS_PER_CHUNK = 16;

template <typename Function>
void for_rows(int64_t rows, int64_t threads, Function&& function) {
  parallel(int(threads), (rows + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK, [&](int64_t chunk) {
    const int64_t end = std::min(rows, (chunk + 1) * ROWS_PER_CHUNK);
    for (int64_t row = chunk * ROWS_PER_CHUNK; row < end; ++row) function(row);
  });
}

template <typename T>
void place(const Heads& job, int64_t rows, int64_t threads) {
  for_rows(rows, threads, [&](int64_t row) { place_row<T>(job, row); });
}

}  // namespace
}  // namespace baton

extern "C" {

void baton_rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t width,
                    const float* residual, float* y, int64_t threads) {
  baton::for_rows(rows, threads, [&](int64_t row) {
    baton::norm_row(x + row * width, weight, eps, width,
                    residual ? residual + row * width : nullptr, y + row * width);
  });
}

// Norm (where given) and rotate Q and K in place; store K and V at their slots.
void baton_place_heads(float* qkv, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                       int64_t half, const float* cos, const float* sin, const float* q_norm,
                       const float* k_norm, float eps, void* keys, void* values, int64_t kv_type,
                       const int64_t* slots, int64_t threads) {
  const baton::Heads job{qkv,    heads,  kv_heads, dim,  half,   cos,  sin,
                         q_norm, k_norm, eps,      keys, values, slots};
  if (kv_type == 0) {
    baton::place<float>(job, rows, threads);
  } else if (kv_type == 1) {
    baton::place<baton::bf16>(job, rows, threads);
  } else {
    baton::place<baton::f16>(job, rows, threads);
  }
}
}
