// The critic half of an RLPD or DroQ update on a CPU, in one call: for each mini-batch the target, and for each
// member of the ensemble forward, backward, Adam and the target's average, while its data lie in the cache.
// XLA does the same in some 40 passes over memory, with slower products. Equations and order: rlpd.py; tests
// hold the two against each other. Members are spread over the processors this process may use.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <sched.h>
#include <thread>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 12;  // floats of a vector; rows of a tile, so that it stays in the registers
#elif defined(__AVX__)
constexpr int W = 8, ROWS = 6;
#else
constexpr int W = 4, ROWS = 6;
#endif
constexpr int COLS = 2 * W;  // columns of a tile
typedef float Vec __attribute__((vector_size(4 * W)));
typedef float Loose __attribute__((vector_size(4 * W), aligned(4)));  // anywhere in memory

static inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }

// What one thread needs for a while: room for a packed matrix, and for the activations of one member.
struct Room {
  std::vector<float> packed, activations;
  float* pack(size_t n) {
    if (packed.size() < n) packed.resize(n);
    return packed.data();
  }
};

// c (m, n) = a b with the tile a (R rows), b packed in strips of COLS columns; row i of a is at a + i * down,
// its element k at + k * along.
template <int R>
static inline void tile(const float* a, size_t down, size_t along, const float* b, int depth, float* c, size_t width,
                        int columns) {
  Vec low[R] = {}, high[R] = {};
  for (int k = 0; k < depth; ++k) {
    const Vec x = load(b + k * COLS), y = load(b + k * COLS + W);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const float s = a[i * down + k * along];
      low[i] += s * x;
      high[i] += s * y;
    }
  }
  for (int i = 0; i < R; ++i) {
    float* row = c + i * width;
    if (columns >= COLS) {
      store(row, low[i]);
      store(row + W, high[i]);
    } else {
      float whole[COLS];
      store(whole, low[i]);
      store(whole + W, high[i]);
      std::memcpy(row, whole, sizeof(float) * columns);
    }
  }
}

template <int R>
static void rest(int rows, const float* a, size_t down, size_t along, const float* b, int depth, float* c,
                 size_t width, int columns) {
  if constexpr (R > 0) {
    if (rows == R) return tile<R>(a, down, along, b, depth, c, width, columns);
    rest<R - 1>(rows, a, down, along, b, depth, c, width, columns);
  }
}

// c (m, n) = op(a) op(b), row-major; op transposes where asked: a is then (k, m), b (n, k).
static void product(Room& room, const float* a, bool ta, const float* b, bool tb, float* c, int m, int n, int k) {
  const int strips = (n + COLS - 1) / COLS;
  float* packed = room.pack(size_t(strips) * COLS * k);
  for (int j = 0; j < strips; ++j) {
    const int columns = std::min(COLS, n - j * COLS);
    float* strip = packed + size_t(j) * COLS * k;
    for (int p = 0; p < k; ++p, strip += COLS) {
      for (int q = 0; q < columns; ++q) strip[q] = tb ? b[size_t(j * COLS + q) * k + p] : b[size_t(p) * n + j * COLS + q];
      for (int q = columns; q < COLS; ++q) strip[q] = 0;
    }
  }
  const size_t down = ta ? 1 : k, along = ta ? m : 1;
  for (int j = 0; j < strips; ++j) {
    const float* strip = packed + size_t(j) * COLS * k;
    const int columns = n - j * COLS;
    int i = 0;
    for (; i + ROWS <= m; i += ROWS)
      tile<ROWS>(a + i * down, down, along, strip, k, c + size_t(i) * n + j * COLS, n, columns);
    rest<ROWS - 1>(m - i, a + i * down, down, along, strip, k, c + size_t(i) * n + j * COLS, n, columns);
  }
}

struct Shape {
  int batch, in, layers, ensemble, updates, subset;
  std::vector<int> width;  // of each layer
  bool norm;
  uint32_t dropped;  // hashes below that: to 0; the others times kept
  float kept, lr, b1, b2, eps, tau, epsilon;
};

// As networks.dropout_mask.
static inline float mask(uint32_t element, const uint32_t* words, uint32_t threshold, float scale) {
  uint32_t x = element * 0x9E3779B9u + words[0];
  x = ((x ^ (x >> 16)) * 0x7FEB352Du) ^ words[1];
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  x ^= x >> 16;
  return x >= threshold ? scale : 0.0f;
}

// The parameters of one member, or their gradients: leaf l of layer i is leaf[4 * i + l] (kernel, bias, scale,
// bias of the norm), then the kernel and the bias of the value.
using Leaves = std::vector<float*>;

// One member's activations: input of each layer and, with a norm, the normalised values and inverse deviations.
struct Tape {
  std::vector<float*> out, normed, inverse;
};

static Tape lay_out(Room& room, const Shape& s) {
  size_t total = 0;
  for (int w : s.width) total += size_t(s.batch) * (2 * w + 1);
  if (room.activations.size() < total) room.activations.resize(total);
  Tape tape;
  float* at = room.activations.data();
  for (int w : s.width) {
    tape.out.push_back(at), at += size_t(s.batch) * w;
    tape.normed.push_back(at), at += size_t(s.batch) * w;
    tape.inverse.push_back(at), at += s.batch;
  }
  return tape;
}

static void forward(Room& room, const Shape& s, const Leaves& p, int per_layer, const float* x, const uint32_t* words,
                    int position, const Tape& tape, float* q) {
  int in = s.in;
  for (int i = 0; i < s.layers; ++i) {
    const int w = s.width[i];
    const float *bias = p[per_layer * i + 1], *gain = s.norm ? p[per_layer * i + 2] : nullptr,
                *shift = s.norm ? p[per_layer * i + 3] : nullptr;
    product(room, x, false, p[per_layer * i], false, tape.out[i], s.batch, w, in);
    for (int r = 0; r < s.batch; ++r) {
      float *z = tape.out[i] + size_t(r) * w, *n = tape.normed[i] + size_t(r) * w;
      for (int j = 0; j < w; ++j) z[j] += bias[j];
      if (s.dropped) {
        const uint32_t first = (uint32_t(position) * s.batch + r) * uint32_t(w);
        for (int j = 0; j < w; ++j) z[j] *= mask(first + j, words + 2 * i, s.dropped, s.kept);
      }
      if (s.norm) {
        float sum = 0, square = 0;
        for (int j = 0; j < w; ++j) sum += z[j];
        const float mean = sum / w;
        for (int j = 0; j < w; ++j) z[j] -= mean;
        for (int j = 0; j < w; ++j) square += z[j] * z[j];
        const float inverse = 1.0f / std::sqrt(square / w + s.epsilon);
        tape.inverse[i][r] = inverse;
        for (int j = 0; j < w; ++j) {
          n[j] = z[j] * inverse;
          z[j] = n[j] * gain[j] + shift[j];
        }
      }
      for (int j = 0; j < w; ++j) z[j] = z[j] < 0 ? 0 : z[j];  // NaN stays
    }
    x = tape.out[i], in = w;
  }
  const float *kernel = p[per_layer * s.layers], bias = p[per_layer * s.layers + 1][0];
  for (int r = 0; r < s.batch; ++r) {
    const float* h = x + size_t(r) * in;
    float sum = 0;
    for (int j = 0; j < in; ++j) sum += h[j] * kernel[j];
    q[r] = sum + bias;
  }
}

// Gradients of the loss with derivative dq (batch) into g; work holds two (batch, widest) matrices.
static void backward(Room& room, const Shape& s, const Leaves& p, const Leaves& g, int per_layer, const float* x,
                     const uint32_t* words, int position, const Tape& tape, const float* dq, float* work) {
  const int last = s.width.back(), widest = *std::max_element(s.width.begin(), s.width.end());
  float *dz = work, *dh = work + size_t(s.batch) * widest;
  const float* kernel = p[per_layer * s.layers];
  float *dkernel = g[per_layer * s.layers], *dbias = g[per_layer * s.layers + 1];
  std::fill(dkernel, dkernel + last, 0.0f);
  dbias[0] = 0;
  for (int r = 0; r < s.batch; ++r) {
    const float* h = tape.out.back() + size_t(r) * last;
    float* d = dh + size_t(r) * last;
    for (int j = 0; j < last; ++j) dkernel[j] += dq[r] * h[j];
    for (int j = 0; j < last; ++j) d[j] = dq[r] * kernel[j];
    dbias[0] += dq[r];
  }
  for (int i = s.layers - 1; i >= 0; --i) {
    const int w = s.width[i], in = i ? s.width[i - 1] : s.in;
    float* db = g[per_layer * i + 1];
    float *dgain = s.norm ? g[per_layer * i + 2] : nullptr, *dshift = s.norm ? g[per_layer * i + 3] : nullptr;
    const float* gain = s.norm ? p[per_layer * i + 2] : nullptr;
    std::fill(db, db + w, 0.0f);
    if (s.norm) std::fill(dgain, dgain + w, 0.0f), std::fill(dshift, dshift + w, 0.0f);
    for (int r = 0; r < s.batch; ++r) {
      const float *out = tape.out[i] + size_t(r) * w, *n = tape.normed[i] + size_t(r) * w, *up = dh + size_t(r) * w;
      float* d = dz + size_t(r) * w;
      for (int j = 0; j < w; ++j) d[j] = out[j] > 0 ? up[j] : 0;
      if (s.norm) {
        for (int j = 0; j < w; ++j) dshift[j] += d[j];
        for (int j = 0; j < w; ++j) dgain[j] += d[j] * n[j];
        float sum = 0, along = 0;
        for (int j = 0; j < w; ++j) d[j] *= gain[j];
        for (int j = 0; j < w; ++j) sum += d[j];
        for (int j = 0; j < w; ++j) along += d[j] * n[j];
        const float mean = sum / w, part = along / w, inverse = tape.inverse[i][r];
        for (int j = 0; j < w; ++j) d[j] = inverse * (d[j] - mean - n[j] * part);
      }
      if (s.dropped) {
        const uint32_t first = (uint32_t(position) * s.batch + r) * uint32_t(w);
        for (int j = 0; j < w; ++j) d[j] *= mask(first + j, words + 2 * i, s.dropped, s.kept);
      }
      for (int j = 0; j < w; ++j) db[j] += d[j];
    }
    product(room, i ? tape.out[i - 1] : x, true, dz, false, g[per_layer * i], in, w, s.batch);
    if (i) product(room, dz, false, p[per_layer * i], true, dh, s.batch, in, w);
  }
}

// Adam (Kingma & Ba 2015) and the target's average, in one pass.
static void descend(const Shape& s, float* p, const float* g, float* m, float* v, float* target, size_t n, int count) {
  const float first = float(1.0 / (1.0 - std::pow(double(s.b1), count))), b1 = s.b1, b2 = s.b2, lr = s.lr;
  const float second = float(1.0 / (1.0 - std::pow(double(s.b2), count))), eps = s.eps, tau = s.tau;
  for (size_t i = 0; i < n; ++i) {
    m[i] = b1 * m[i] + (1 - b1) * g[i];
    v[i] = b2 * v[i] + (1 - b2) * g[i] * g[i];
    p[i] -= lr * (m[i] * first) / (std::sqrt(v[i] * second) + eps);
    target[i] = tau * p[i] + (1 - tau) * target[i];
  }
}

// While it lives, numbers below 1e-38 are 0, as in XLA: the moments of units that are off decay to there,
// where arithmetic is a hundred times as slow.
struct FlushTiny {
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();
  FlushTiny() { _mm_setcsr(before | 0x8040); }
  ~FlushTiny() { _mm_setcsr(before); }
#endif
};

// All threads wait for the last.
class Barrier {
 public:
  explicit Barrier(int n) : n_(n), left_(n) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (--left_ == 0) {
      left_ = n_, ++round_;
      all_.notify_all();
      return;
    }
    all_.wait(lock, [&] { return round_ != round; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int n_, left_, round_ = 0;
};

static int processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) ? 1 : std::max(1, CPU_COUNT(&set));
}

using F32 = ffi::Buffer<ffi::F32>;

static ffi::Error Update(F32 x, F32 next, F32 reward, F32 discount, F32 bonus, ffi::Buffer<ffi::S32> members,
                         ffi::Buffer<ffi::U32> words, ffi::Buffer<ffi::S32> count, ffi::RemainingArgs given,
                         ffi::RemainingRets made, bool norm, uint32_t dropped, float kept, float lr, float b1, float b2,
                         float eps, float tau, float epsilon) {
  const auto dims = x.dimensions();
  Shape s{int(dims[1]), int(dims[2]), 0, 0, int(dims[0]), int(members.dimensions()[1]), {}, norm,
          dropped, kept, lr, b1, b2, eps, tau, epsilon};
  const int per_layer = norm ? 4 : 2, leaves = int(given.size()) / 4;  // parameters, target, both moments
  s.layers = (leaves - 2) / per_layer;
  std::vector<size_t> size;  // of each leaf, one member
  for (int i = 0; i < leaves; ++i) {
    const auto leaf = *given.get<F32>(i);
    s.ensemble = int(leaf.dimensions()[0]);
    size.push_back(leaf.element_count() / s.ensemble);
    if (i % per_layer == 1 && i < s.layers * per_layer) s.width.push_back(int(size.back()));
  }
  float *loss = (*made.get<F32>(0))->typed_data(), *value = (*made.get<F32>(1))->typed_data();
  std::vector<float*> all;  // parameters, target and moments, all members, in the results
  for (int i = 0; i < 4 * leaves; ++i) {
    const auto from = *given.get<F32>(i);
    float* to = (*made.get<F32>(2 + i))->typed_data();
    if (to != from.typed_data()) std::memcpy(to, from.typed_data(), from.size_bytes());
    all.push_back(to);
  }
  const auto member = [&](int kind, int e) {
    Leaves out;
    for (int i = 0; i < leaves; ++i) out.push_back(all[kind * leaves + i] + size[i] * e);
    return out;
  };
  const int threads = std::min(processors(), s.ensemble), widest = *std::max_element(s.width.begin(), s.width.end());
  std::vector<float> following(size_t(s.subset) * s.batch), losses(s.ensemble), values(s.ensemble);
  Barrier barrier(threads);
  const auto work = [&](int thread) {
    const FlushTiny flush;
    Room room;
    const Tape tape = lay_out(room, s);
    std::vector<float> q(s.batch), dq(s.batch), y(s.batch), scratch(size_t(2) * s.batch * widest);
    std::vector<std::vector<float>> grads;
    Leaves g;
    for (size_t n : size) grads.emplace_back(n);
    for (auto& leaf : grads) g.push_back(leaf.data());
    for (int u = 0; u < s.updates; ++u) {
      const float *batch = x.typed_data() + size_t(u) * s.batch * s.in,
                  *after = next.typed_data() + size_t(u) * s.batch * s.in;
      const uint32_t *target_words = words.typed_data() + size_t(u) * 4 * s.layers,
                     *online_words = target_words + 2 * s.layers;
      for (int z = thread; z < s.subset; z += threads)
        forward(room, s, member(1, members.typed_data()[u * s.subset + z]), per_layer, after, target_words, z, tape,
                following.data() + size_t(z) * s.batch);
      barrier.wait();
      for (int r = 0; r < s.batch; ++r) {
        float least = following[r];
        for (int z = 1; z < s.subset; ++z) {
          const float other = following[size_t(z) * s.batch + r];
          least = other < least || std::isnan(other) ? other : least;
        }
        const size_t at = size_t(u) * s.batch + r;
        y[r] = reward.typed_data()[at] + discount.typed_data()[at] * (least + bonus.typed_data()[at]);
      }
      for (int e = thread; e < s.ensemble; e += threads) {
        const Leaves p = member(0, e), target = member(1, e), m = member(2, e), v = member(3, e);
        forward(room, s, p, per_layer, batch, online_words, e, tape, q.data());
        double square = 0, sum = 0;
        for (int r = 0; r < s.batch; ++r) {
          const float error = q[r] - y[r];
          dq[r] = 2.0f * error / (float(s.ensemble) * s.batch);
          square += double(error) * error;
          sum += q[r];
        }
        losses[e] = float(square / s.batch), values[e] = float(sum / s.batch);
        backward(room, s, p, g, per_layer, batch, online_words, e, tape, dq.data(), scratch.data());
        for (int i = 0; i < leaves; ++i)
          descend(s, p[i], g[i], m[i], v[i], target[i], size[i], count.typed_data()[0] + u + 1);
      }
      barrier.wait();
      if (thread == 0) {
        loss[u] = value[u] = 0;
        for (int e = 0; e < s.ensemble; ++e) loss[u] += losses[e] / s.ensemble, value[u] += values[e] / s.ensemble;
      }
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& thread : others) thread.join();
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(tether_update, Update,
                              ffi::Ffi::Bind()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("norm")
                                  .Attr<uint32_t>("dropped")
                                  .Attr<float>("kept")
                                  .Attr<float>("lr")
                                  .Attr<float>("b1")
                                  .Attr<float>("b2")
                                  .Attr<float>("eps")
                                  .Attr<float>("tau")
                                  .Attr<float>("epsilon"));
