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
#include <mutex>
#include <sched.h>
#include <thread>
#include <type_traits>
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
constexpr int BLOCK = 4 * ROWS;  // rows that go through a layer at a time: what is made is used while in the cache
typedef float Vec __attribute__((vector_size(4 * W)));
typedef float Loose __attribute__((vector_size(4 * W), aligned(4)));  // anywhere in memory

static inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }

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
#pragma GCC unroll 12
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

// b (k, n) in strips of COLS columns, for `multiply`; with `transposed` b is (n, k).
static void pack(const float* b, bool transposed, int n, int k, float* strip) {
  for (int j = 0; j < n; j += COLS, strip += size_t(COLS) * k) {
    const int columns = std::min(COLS, n - j);
    if (columns < COLS) std::fill(strip, strip + size_t(COLS) * k, 0.0f);
    if (transposed) {
      for (int q = 0; q < columns; ++q)
        for (int p = 0; p < k; ++p) strip[p * COLS + q] = b[size_t(j + q) * k + p];
    } else {
      const auto copy = [&](size_t size) {  // a constant one becomes two loads and stores
        for (int p = 0; p < k; ++p) std::memcpy(strip + p * COLS, b + size_t(p) * n + j, sizeof(float) * size);
      };
      columns == COLS ? copy(COLS) : copy(columns);
    }
  }
}

// c (m, n) = a b, row-major, b (k, n) packed; a as in `tile`.
static void multiply(const float* a, size_t down, size_t along, const float* packed, float* c, int m, int n, int k) {
  for (int j = 0; j < n; j += COLS, packed += size_t(COLS) * k) {
    int i = 0;
    for (; i + ROWS <= m; i += ROWS)
      tile<ROWS>(a + i * down, down, along, packed, k, c + size_t(i) * n + j, n, n - j);
    rest<ROWS - 1>(m - i, a + i * down, down, along, packed, k, c + size_t(i) * n + j, n, n - j);
  }
}

struct Shape {
  int batch, in, layers, ensemble, updates, subset;
  std::vector<int> width;  // of each layer
  bool norm;
  uint32_t dropped;  // hashes below that: to 0; the others times kept
  float kept, lr, b1, b2, eps, tau, epsilon;
};

// f for four rows at once, whose sums need not wait for each other, then one by one.
template <class F>
static inline void by_four(int first, int rows, F f) {
  int r = first;
  for (; r + 4 <= first + rows; r += 4) f(std::integral_constant<int, 4>(), r);
  for (; r < first + rows; ++r) f(std::integral_constant<int, 1>(), r);
}

// The same with what is constant: whether there is a norm, and dropout.
template <class F>
static inline void by_four(const Shape& s, int first, int rows, F f) {
  const auto with = [&](auto norm, auto dropout) {
    by_four(first, rows, [&](auto R, int r) { f(R, decltype(norm)(), decltype(dropout)(), r); });
  };
  const auto one = [&](auto norm) { s.dropped ? with(norm, std::true_type()) : with(norm, std::false_type()); };
  s.norm ? one(std::true_type()) : one(std::false_type());
}

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

// What one thread needs: of each layer what comes out of it and, with a norm, the normalised values and inverse
// deviations; a packed matrix; two matrices (batch, widest).
struct Room {
  std::vector<std::vector<float>> out, normed, inverse;
  std::vector<float> packed, upper, lower;
  explicit Room(const Shape& s) {
    const size_t batch = s.batch, widest = *std::max_element(s.width.begin(), s.width.end());
    for (size_t w : s.width) out.emplace_back(batch * w), normed.emplace_back(batch * w), inverse.emplace_back(batch);
    packed.resize((widest + COLS) * std::max({widest, batch, size_t(s.in)}));
    upper.resize(batch * widest), lower.resize(batch * widest);
  }
};

// A layer behind its product z, R rows of it: bias, dropout, norm, ReLU. `element`: number of the first.
template <int R, bool NORM, bool DROPOUT>
static void finish(const Shape& s, float* const* leaf, const uint32_t* words, uint32_t element, int w,
                   float* __restrict z, float* __restrict n, float* __restrict inverse) {
  const float *bias = leaf[1], *gain = leaf[2], *shift = leaf[3];  // the latter two only with a norm
  float mean[R] = {}, scale[R] = {};
#pragma GCC ivdep
  for (int j = 0; j < w; ++j)
    for (int i = 0; i < R; ++i) {
      float v = z[i * w + j] + bias[j];
      if (DROPOUT) v *= mask(element + i * w + j, words, s.dropped, s.kept);
      mean[i] += v, z[i * w + j] = !NORM && v < 0 ? 0 : v;
    }
  if (!NORM) return;
  for (int i = 0; i < R; ++i) mean[i] /= w;
#pragma GCC ivdep
  for (int j = 0; j < w; ++j)
    for (int i = 0; i < R; ++i) {
      const float v = z[i * w + j] - mean[i];
      scale[i] += v * v;
    }
  for (int i = 0; i < R; ++i) inverse[i] = scale[i] = 1.0f / std::sqrt(scale[i] / w + s.epsilon);
#pragma GCC ivdep
  for (int j = 0; j < w; ++j)
    for (int i = 0; i < R; ++i) {
      const float v = (z[i * w + j] - mean[i]) * scale[i], out = v * gain[j] + shift[j];
      n[i * w + j] = v;
      z[i * w + j] = out < 0 ? 0 : out;  // NaN stays
    }
}

static void forward(Room& room, const Shape& s, const Leaves& p, int per_layer, const float* x, const uint32_t* words,
                    int position, float* q) {
  int in = s.in;
  for (int i = 0; i < s.layers; ++i) {
    const int w = s.width[i];
    float* const* leaf = &p[per_layer * i];
    float *z = room.out[i].data(), *n = room.normed[i].data(), *inverse = room.inverse[i].data();
    pack(leaf[0], false, w, in, room.packed.data());
    for (int first = 0; first < s.batch; first += BLOCK) {
      const int rows = std::min(BLOCK, s.batch - first);
      multiply(x + size_t(first) * in, in, 1, room.packed.data(), z + size_t(first) * w, rows, w, in);
      by_four(s, first, rows, [&](auto R, auto norm, auto dropout, int r) {
        const size_t at = size_t(r) * w;
        const uint32_t element = (uint32_t(position) * s.batch + r) * uint32_t(w);
        finish<R, norm, dropout>(s, leaf, words + 2 * i, element, w, z + at, n + at, inverse + r);
      });
    }
    x = z, in = w;
  }
  const float *kernel = p[per_layer * s.layers], bias = p[per_layer * s.layers + 1][0];
  by_four(0, s.batch, [&](auto R, int r) {
    const float* h = x + size_t(r) * in;
    float sum[R] = {};
    for (int j = 0; j < in; ++j)
      for (int i = 0; i < R; ++i) sum[i] += h[i * in + j] * kernel[j];
    for (int i = 0; i < R; ++i) q[r + i] = sum[i] + bias;
  });
}

// Back through ReLU, norm and dropout of a layer, R rows of it: d, the derivative of what comes out, becomes that of
// the product; gradients are added to.
template <int R, bool NORM, bool DROPOUT>
static void undo(const Shape& s, const float* gain, float* const* grad, const uint32_t* words, uint32_t element, int w,
                 const float* __restrict out, const float* __restrict n, const float* __restrict inverse,
                 float* __restrict d) {
  float *__restrict db = grad[1], *__restrict dgain = grad[2], *__restrict dshift = grad[3];  // as in `finish`
  float mean[R] = {}, part[R] = {}, scale[R];
#pragma GCC ivdep
  for (int j = 0; j < w; ++j) {
    float a = 0, b = 0;
    for (int i = 0; i < R; ++i) {
      float v = out[i * w + j] > 0 ? d[i * w + j] : 0;
      if (NORM) {
        const float y = n[i * w + j];
        a += v, b += v * y;
        v *= gain[j];
        mean[i] += v, part[i] += v * y;
      }
      d[i * w + j] = v;
    }
    if (NORM) dshift[j] += a, dgain[j] += b;
  }
  for (int i = 0; i < R; ++i) mean[i] /= w, part[i] /= w, scale[i] = inverse[i];
#pragma GCC ivdep
  for (int j = 0; j < w; ++j) {
    float a = 0;
    for (int i = 0; i < R; ++i) {
      float v = d[i * w + j];
      if (NORM) v = scale[i] * (v - mean[i] - n[i * w + j] * part[i]);
      if (DROPOUT) v *= mask(element + i * w + j, words, s.dropped, s.kept);
      a += v, d[i * w + j] = v;
    }
    db[j] += a;
  }
}

// Back through the value: R rows of its derivative dq make those of d; dkernel and dbias are added to.
template <int R>
static void begin(const float* kernel, const float* dq, int w, const float* h, float* __restrict d,
                  float* __restrict dkernel, float* dbias) {
  float e[R];
  for (int i = 0; i < R; ++i) *dbias += e[i] = dq[i];
#pragma GCC ivdep
  for (int j = 0; j < w; ++j) {
    float a = 0;
    for (int i = 0; i < R; ++i) a += e[i] * h[i * w + j], d[i * w + j] = e[i] * kernel[j];
    dkernel[j] += a;
  }
}

// Gradients of the loss with derivative dq (batch) into g, after `forward` in the same room.
static void backward(Room& room, const Shape& s, const Leaves& p, const Leaves& g, int per_layer, const float* x,
                     const uint32_t* words, int position, const float* dq) {
  const int last = s.width.back(), value = per_layer * s.layers;
  float *d = room.upper.data(), *below = room.lower.data(), *packed = room.packed.data();
  std::fill(g[value], g[value] + last, 0.0f);
  g[value + 1][0] = 0;
  by_four(0, s.batch, [&](auto R, int r) {
    const size_t at = size_t(r) * last;
    begin<R>(p[value], dq + r, last, room.out.back().data() + at, d + at, g[value], g[value + 1]);
  });
  for (int i = s.layers - 1; i >= 0; --i) {
    const int w = s.width[i], in = i ? s.width[i - 1] : s.in;
    float *const *leaf = &p[per_layer * i], *const *grad = &g[per_layer * i];
    const float *out = room.out[i].data(), *n = room.normed[i].data(), *inverse = room.inverse[i].data();
    for (int l = 1; l < per_layer; ++l) std::fill(grad[l], grad[l] + w, 0.0f);
    if (i) pack(leaf[0], true, in, w, packed);
    for (int first = 0; first < s.batch; first += BLOCK) {
      const int rows = std::min(BLOCK, s.batch - first);
      by_four(s, first, rows, [&](auto R, auto norm, auto dropout, int r) {
        const size_t at = size_t(r) * w;
        const uint32_t element = (uint32_t(position) * s.batch + r) * uint32_t(w);
        undo<R, norm, dropout>(s, leaf[2], grad, words + 2 * i, element, w, out + at, n + at, inverse + r, d + at);
      });
      if (i) multiply(d + size_t(first) * w, w, 1, packed, below + size_t(first) * in, rows, in, w);
    }
    pack(d, false, w, s.batch, packed);
    multiply(i ? room.out[i - 1].data() : x, 1, in, packed, grad[0], in, w, s.batch);
    std::swap(d, below);
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
    const int round = round_;
    if (--left_ == 0) {
      left_ = n_;
      std::lock_guard<std::mutex> lock(mutex_);
      ++round_;
      return all_.notify_all();
    }
    for (int i = 0; i < 20000; ++i)  // some 30 us: to fall asleep and be woken takes longer
      if (round_ != round) return;
    std::unique_lock<std::mutex> lock(mutex_);
    all_.wait(lock, [&] { return round_ != round; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  const int n_;
  std::atomic<int> left_, round_{0};
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
  const int threads = std::min(processors(), s.ensemble);
  std::vector<float> following(size_t(s.subset) * s.batch), losses(s.ensemble), values(s.ensemble);
  Barrier barrier(threads);
  const auto work = [&](int thread) {
    const FlushTiny flush;
    Room room(s);
    std::vector<float> q(s.batch), dq(s.batch), y(s.batch);
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
        forward(room, s, member(1, members.typed_data()[u * s.subset + z]), per_layer, after, target_words, z,
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
        forward(room, s, p, per_layer, batch, online_words, e, q.data());
        double square = 0, sum = 0;
        for (int r = 0; r < s.batch; ++r) {
          const float error = q[r] - y[r];
          dq[r] = 2.0f * error / (float(s.ensemble) * s.batch);
          square += double(error) * error;
          sum += q[r];
        }
        losses[e] = float(square / s.batch), values[e] = float(sum / s.batch);
        backward(room, s, p, g, per_layer, batch, online_words, e, dq.data());
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
                                  .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
                                  .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>().RemainingArgs().RemainingRets()
                                  .Attr<bool>("norm").Attr<uint32_t>("dropped").Attr<float>("kept").Attr<float>("lr")
                                  .Attr<float>("b1").Attr<float>("b2").Attr<float>("eps").Attr<float>("tau")
                                  .Attr<float>("epsilon"));
