// Outlook attention on the CPU, forward and backward. cpu.py builds this file and calls the functions at its end.
//
// B images, H x W grid of cells, C = heads * d channels, h x w windows of K x K cells, area = K^2.
//
// A thread takes some heads of one image and walks down the rows of windows. It keeps only the K rows of the grid
// under them, in scratch memory that stays in the near caches, wide (float32 even where tensors are bfloat16) and
// padded. So every row of the grid is read, converted and written once, however many windows share it; the inner
// loops check no bounds; and the order of each sum is fixed: the number of threads changes no bit of the result.
//
// Two layouts make the arithmetic fast:
// - The attention of a row of windows stands [key][window, query]. The softmax over the keys then is a few passes
//   over whole vectors of queries. With the keys side by side each row of K^2 = 9 would need a reduction of its own.
// - The channels of a cell stand side by side. The mixing takes one vector of them at a time: the window's K^2
//   values stay in registers, and each weight is spread over a vector as it is loaded.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

struct Shape {  // the eight numbers that cpu.py passes
    int64_t B, H, W, heads, d, K, stride, padding;
    int64_t h() const { return (H + 2 * padding - K) / stride + 1; }
    int64_t w() const { return (W + 2 * padding - K) / stride + 1; }
};

// ---- Numbers: T in the tensors, Wide<T> in the arithmetic.

struct bfloat16 {
    uint16_t bits;
};
template <class T> using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T> inline T widen(T x) { return x; }
inline float widen(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}
template <class T> inline void narrow(T x, T& y) { y = x; }
inline void narrow(float x, bfloat16& y) {  // to nearest, ties to even; a NaN from bfloat16 has no low bits to carry
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    y.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- Vectors, through the extension that GCC and Clang share: operators act on all lanes.

#if defined __AVX512F__
constexpr int64_t width = 64;  // bytes
#elif defined __AVX__
constexpr int64_t width = 32;
#else
constexpr int64_t width = 16;
#endif
template <class A, int64_t bytes> struct Simd {
    typedef A type __attribute__((vector_size(bytes), may_alias));
};
template <class A> using Vec = typename Simd<A, width>::type;
template <class A> constexpr int64_t lanes = width / sizeof(A);
template <class A> int64_t round_up(int64_t n) { return (n + lanes<A> - 1) / lanes<A> * lanes<A>; }
template <class A> inline Vec<A>& vec(A* x) { return *reinterpret_cast<Vec<A>*>(x); }

template <class A, int64_t bytes = width> inline A total(typename Simd<A, bytes>::type x) {
    if constexpr (bytes == 2 * sizeof(A)) {
        return x[0] + x[1];
    } else if constexpr (bytes == 4 * sizeof(A)) {
        return (x[0] + x[2]) + (x[1] + x[3]);
    } else {
        typename Simd<A, bytes / 2>::type half[2];
        std::memcpy(half, &x, sizeof x);
        return total<A, bytes / 2>(half[0] + half[1]);
    }
}

// exp(x) for x <= 0: 2^n * e^f, |f| <= ln(2) / 2. The polynomial for e^f is fitted to 4e-9 there, so that the error is
// that of rounding, 1e-7. NaN stays NaN. Below -87, where 2^n would leave the range, it is 0.
inline Vec<float> exponential(Vec<float> x) {
    const Vec<float> zero = {};
    const Vec<float> magic = zero + (12582912.0f + 127);  // adding 1.5 * 2^23 rounds: the low bits hold n + 127
    const Vec<float> shifted = x * 1.44269504f + magic;
    const Vec<float> n = shifted - magic;
    const Vec<float> f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; the first product is exact
    Vec<float> y = f * 1.38637808e-3f + 8.36748257e-3f;
    y = y * f + 4.16672379e-2f;
    y = y * f + 1.66665345e-1f;
    y = y * f + 0.5f;
    y = y * f * f + f + 1.0f;
    return x < -87.0f + zero ? zero : y * (Vec<float>)((Vec<int32_t>)shifted << 23);
}
inline Vec<double> exponential(Vec<double> x) {
    for (int64_t i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

template <class A> struct Buffer {  // n zeros that begin at a cache line
    struct alignas(64) Line {
        char bytes[64] = {};
    };
    std::vector<Line> lines;
    explicit Buffer(int64_t n) : lines(n * sizeof(A) / sizeof(Line) + 1) {}
    A* data() { return reinterpret_cast<A*>(lines.data()); }
};

// ---- The operator on `count` heads of one image. K_ and D_ are K and d where the compiler shall know them, else 0.

template <class T, int K_, int D_> struct Heads {
    using A = Wide<T>;
    using V = Vec<A>;
    const Shape& s;
    const int64_t count;
    const int64_t cell = round_up<A>(s.d);                  // numbers from head to head, in scratch memory
    const int64_t length = round_up<A>(s.w() * s.K * s.K);  // queries of a row of windows
    const A scale = 1 / std::sqrt(A(s.d));

    // K rows of the padded grid, [K][W + 2 * padding][count][cell]. Row y lies in slot y % K.
    struct Rows {
        const Heads& of;
        const Shape& s = of.s;
        const int64_t step = of.count * of.cell, row = (s.W + 2 * s.padding) * step;
        int64_t done = 0;  // rows read or written so far
        Buffer<A> memory{s.K * row};

        A* slot(int64_t y) { return memory.data() + y % s.K * row; }

        // act(a number of the grid, its place here), for all of row y; a row of the padding has none.
        template <class U, class Act> void each(U* grid, int64_t y, Act act) {
            const int64_t d = D_ ? D_ : s.d;
            if (y < s.padding || y >= s.H + s.padding) return;
            for (int64_t x = 0; x < s.W; ++x)
                for (int64_t m = 0; m < of.count; ++m) {
                    U* outer = grid + (((y - s.padding) * s.W + x) * s.heads + m) * d;
                    A* inner = slot(y) + (x + s.padding) * step + m * of.cell;
                    for (int64_t i = 0; i < d; ++i) act(outer[i], inner[i]);
                }
        }
        void read(const T* grid, int64_t top) {  // the rows under the windows that begin at `top`
            for (done = std::max(done, top); done < top + s.K; ++done) {
                std::fill_n(slot(done), row, A(0));
                each(grid, done, [](const T& from, A& to) { to = widen(from); });
            }
        }
        void write(T* grid, int64_t top) {  // the rows above `top`, and clear their slots
            for (; done < top; ++done) {
                each(grid, done, [](T& to, const A& from) { narrow(from, to); });
                std::fill_n(slot(done), row, A(0));
            }
        }
        void window(int64_t r, int64_t c, int64_t m, A** cells) {
            const int64_t K = K_ ? K_ : s.K;
            for (int64_t i = 0; i < K; ++i) {
                A* first = slot(r * s.stride + i) + c * s.stride * step + m * of.cell;
                for (int64_t j = 0; j < K; ++j) cells[i * K + j] = first + j * step;
            }
        }
    };

    // weights [key][window, query] = softmax over keys of scale * logits [window, heads, query, key]
    void softmax(const T* logits, A* weights) {
        const int64_t area = K_ ? K_ * K_ : s.K * s.K, next_row = s.w() * s.heads * area * area;
        for (int64_t c = 0; c < s.w(); ++c, logits += s.heads * area * area) {
            // The logits of one head lie in pieces far apart, a pattern no processor foresees: ask for the next row's.
            for (int64_t i = 0; i < area * area; i += 64 / sizeof(T)) __builtin_prefetch(logits + next_row + i);
            for (int64_t q = 0; q < area; ++q)
                for (int64_t k = 0; k < area; ++k) weights[k * length + c * area + q] = widen(logits[q * area + k]);
        }
        for (int64_t i = 0; i < length; i += lanes<A>) {
            auto at = [&](int64_t k) -> V& { return vec(weights + k * length + i); };
            V most = at(0), sum = {};
            for (int64_t k = 1; k < area; ++k) most = at(k) > most ? at(k) : most;
            for (int64_t k = 0; k < area; ++k) sum += at(k) = exponential((at(k) - most) * scale);
            sum = 1 / sum;
            for (int64_t k = 0; k < area; ++k) at(k) *= sum;
        }
    }

    // grad of a logit = scale * weight * (grad of the weight - sum over keys of weight * grad of the weight)
    void softmax_backward(A* weights, A* grads, T* grad_logits) {
        const int64_t area = K_ ? K_ * K_ : s.K * s.K;
        for (int64_t i = 0; i < length; i += lanes<A>) {
            auto weight = [&](int64_t k) -> V& { return vec(weights + k * length + i); };
            auto grad = [&](int64_t k) -> V& { return vec(grads + k * length + i); };
            V sum = {};
            for (int64_t k = 0; k < area; ++k) sum += weight(k) * grad(k);
            for (int64_t k = 0; k < area; ++k) grad(k) = weight(k) * (grad(k) - sum) * scale;
        }
        for (int64_t c = 0; c < s.w(); ++c, grad_logits += s.heads * area * area)
            for (int64_t q = 0; q < area; ++q)
                for (int64_t k = 0; k < area; ++k) narrow(grads[k * length + c * area + q], grad_logits[q * area + k]);
    }

    // out[i] += sum over j of weights[i * across + j * along] * in[j], for the cells of a window
    void mix(const A* weights, int64_t across, int64_t along, A** in, A** out) {
        const int64_t area = K_ ? K_ * K_ : s.K * s.K, cell = round_up<A>(D_ ? D_ : s.d);
        for (int64_t part = 0; part < cell; part += lanes<A>) {
            V held[area];
            for (int64_t j = 0; j < area; ++j) held[j] = vec(in[j] + part);
            for (int64_t i = 0; i < area; ++i) {
                V sum = {};
                for (int64_t j = 0; j < area; ++j) sum += weights[i * across + j * along] * held[j];
                vec(out[i] + part) += sum;
            }
        }
    }

    // products[k * length + q] = grad[q] . value[k], for the cells of a window
    void dot(A** grad, A** value, A* products) {
        const int64_t area = K_ ? K_ * K_ : s.K * s.K, cell = round_up<A>(D_ ? D_ : s.d);
        for (int64_t k = 0; k < area; ++k) {
            A row[area];  // apart from the vectors, so that those of value[k] stay in registers
            for (int64_t q = 0; q < area; ++q) {
                V sum = {};
                for (int64_t part = 0; part < cell; part += lanes<A>) sum += vec(grad[q] + part) * vec(value[k] + part);
                row[q] = total<A>(sum);
            }
            std::copy_n(row, area, products + k * length);
        }
    }

    void forward(const T* value, const T* logits, T* out) {
        const int64_t area = K_ ? K_ * K_ : s.K * s.K;
        Rows values{*this}, sums{*this};
        Buffer<A> weights(area * length);
        A *v[area], *o[area];
        for (int64_t r = 0; r < s.h(); ++r) {
            values.read(value, r * s.stride);
            for (int64_t m = 0; m < count; ++m) {
                softmax(logits + (r * s.w() * s.heads + m) * area * area, weights.data());
                for (int64_t c = 0; c < s.w(); ++c) {
                    values.window(r, c, m, v);
                    sums.window(r, c, m, o);
                    mix(weights.data() + c * area, 1, length, v, o);
                }
            }
            sums.write(out, (r + 1) * s.stride);
        }
        sums.write(out, s.H + 2 * s.padding);
    }

    void backward(const T* grad, const T* value, const T* logits, T* grad_value, T* grad_logits) {
        const int64_t area = K_ ? K_ * K_ : s.K * s.K;
        Rows grads{*this}, values{*this}, sums{*this};
        Buffer<A> weights(area * length), grad_weights(area * length);
        A *g[area], *v[area], *o[area];
        for (int64_t r = 0; r < s.h(); ++r) {
            grads.read(grad, r * s.stride);
            values.read(value, r * s.stride);
            for (int64_t m = 0; m < count; ++m) {
                const int64_t first = (r * s.w() * s.heads + m) * area * area;
                softmax(logits + first, weights.data());
                for (int64_t c = 0; c < s.w(); ++c) {
                    grads.window(r, c, m, g);
                    values.window(r, c, m, v);
                    sums.window(r, c, m, o);
                    mix(weights.data() + c * area, length, 1, g, o);
                    dot(g, v, grad_weights.data() + c * area);
                }
                softmax_backward(weights.data(), grad_weights.data(), grad_logits + first);
            }
            sums.write(grad_value, (r + 1) * s.stride);
        }
        sums.write(grad_value, s.H + 2 * s.padding);
    }
};

// Shares the heads of all images out to the threads: act(heads, where they begin in a grid, where in the logits).
template <class T, int K_, int D_, class Act> void share(const Shape& s, int threads, Act act) {
    const int64_t all = s.B * s.heads, windows = s.h() * s.w(), matrix = s.K * s.K * s.K * s.K;
    const bool worth = all * windows * matrix * s.d > 200000;  // 20 microseconds: what it takes to wake a thread
#pragma omp parallel for num_threads(threads) schedule(static) if (worth)
    for (int64_t thread = 0; thread < threads; ++thread) {
        const int64_t end = all * (thread + 1) / threads;
        for (int64_t i = all * thread / threads; i < end;) {
            const int64_t b = i / s.heads, m = i % s.heads;
            Heads<T, K_, D_> heads{s, std::min(s.heads - m, end - i)};
            act(heads, (b * s.H * s.W * s.heads + m) * s.d, (b * windows * s.heads + m) * matrix);
            i += heads.count;
        }
    }
}
template <class T, class Act> void run(const Shape& s, int threads, Act act) {
    if constexpr (!std::is_same_v<T, double>)
        if (s.K == 3 && s.d == 32) return share<T, 3, 32>(s, threads, act);  // all published models
    share<T, 0, 0>(s, threads, act);
}

}  // namespace

#define EXPORT(T, name)                                                                                                \
    extern "C" void forward_##name(const T* value, const T* logits, T* out, const Shape* s, int threads) {             \
        run<T>(*s, threads, [=](auto& heads, int64_t grid, int64_t window) {                                           \
            heads.forward(value + grid, logits + window, out + grid);                                                  \
        });                                                                                                            \
    }                                                                                                                  \
    extern "C" void backward_##name(const T* grad, const T* value, const T* logits, T* grad_value, T* grad_logits,     \
                                    const Shape* s, int threads) {                                                     \
        run<T>(*s, threads, [=](auto& heads, int64_t grid, int64_t window) {                                           \
            heads.backward(grad + grid, value + grid, logits + window, grad_value + grid, grad_logits + window);       \
        });                                                                                                            \
    }
EXPORT(float, float32)
EXPORT(double, float64)
EXPORT(bfloat16, bfloat16)
