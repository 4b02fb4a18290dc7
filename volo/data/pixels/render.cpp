// Applies a Plan to the pixels of one image, with Pillow's arithmetic. render.py builds and calls this file.
//
// Pillow applies each step to the whole image and allocates a new one for it. Here a step computes only the box that
// the following steps read, in place if possible, and the four channels of a pixel are one vector: R, G, B and an
// undefined byte, as the decoder writes them. Every rounding is Pillow's, so that both give the same bytes: floats
// where Pillow has floats, no fused multiply-add (-ffp-contract=off), 22-bit fixed point in the resize. Canvases are
// W x H pixels; boxes are half open.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

struct Box {
    int64_t x0, y0, x1, y1;
};

enum Kind : int64_t { AUTO_CONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, BRIGHTNESS, CONTRAST, COLOR,
                      SHARPNESS, AFFINE };

struct Op {  // as render.py packs it
    int64_t kind, cubic;
    double args[6];
};

struct Job {  // as render.py packs it
    int64_t width, height;             // of the image
    int64_t ops_first;                 // flips and operations come before the resize, on the canvas of the image
    int64_t hflip, vflip, num_ops;
    Box crop;                          // box of the canvas that is resized
    int64_t resized_w, resized_h;      // size that it is resized to
    int64_t left, top, out_w, out_h;   // the output, a window of the resized box; black outside it
    int64_t cubic, tall_first;         // resampling; whether the vertical pass may come first
    int64_t fill[3];                   // colour of areas that a geometric operation uncovers
};

typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));

// Conversions between four or eight bytes and integers. GCC does not vectorise them by itself.
#ifdef __AVX2__
inline i32x4 load(const uint8_t* p) { return i32x4(_mm_cvtepu8_epi32(_mm_loadu_si32(p))); }
inline i32x8 load_two(const uint8_t* p) { return i32x8(_mm256_cvtepu8_epi32(_mm_loadu_si64(p))); }
inline f64x4 wide(i32x4 v) { return f64x4(_mm256_cvtepi32_pd(__m128i(v))); }
inline void store(i32x4 v, uint8_t* p) {  // clips to 0 ... 255
    const __m128i words = _mm_packus_epi32(__m128i(v), __m128i(v));
    _mm_storeu_si32(p, _mm_packus_epi16(words, words));
}
inline void store_two(i32x8 v, uint8_t* p) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(__m256i(v)), _mm256_extracti128_si256(__m256i(v), 1));
    _mm_storeu_si64(p, _mm_packus_epi16(words, words));
}
#else
template <class V> inline V clamp(V v) {
    const V top = V{} + 255;
    v = v < 0 ? V{} : v;
    return v > top ? top : v;
}
typedef uint8_t u8x4 __attribute__((vector_size(4)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));
template <class Bytes, class V> inline V read(const uint8_t* p) {
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, V);
}
template <class Bytes, class V> inline void write(V v, uint8_t* p) {
    const Bytes bytes = __builtin_convertvector(clamp(v), Bytes);
    std::memcpy(p, &bytes, sizeof bytes);
}
inline i32x4 load(const uint8_t* p) { return read<u8x4, i32x4>(p); }
inline i32x8 load_two(const uint8_t* p) { return read<u8x8, i32x8>(p); }
inline f64x4 wide(i32x4 v) { return __builtin_convertvector(v, f64x4); }
inline void store(i32x4 v, uint8_t* p) { write<u8x4>(v, p); }  // clips to 0 ... 255
inline void store_two(i32x8 v, uint8_t* p) { write<u8x8>(v, p); }
#endif

// A box of the pixels of a canvas: (x, y) is at data + (y - y0) * stride + 4 * (x - x0).
struct Image {
    uint8_t* data;
    int64_t stride, width, height, x0, y0;
    uint8_t* at(int64_t x, int64_t y) const { return data + (y - y0) * stride + 4 * (x - x0); }
};

// Scratch memory that is kept from image to image, because new pages cost more than most steps. That of huge images is
// freed: every worker would keep it for ever. Code may read a few bytes past the last pixel.
struct Scratch {
    static constexpr size_t most_kept = size_t(64) << 20;
    std::vector<uint8_t> bytes;
    uint8_t* of(int64_t size) {
        if (int64_t(bytes.size()) < size + 64) bytes.resize(size + size / 4 + 64);
        return bytes.data();
    }
    Image image(Box box, int64_t width, int64_t height) {
        const int64_t stride = 4 * (box.x1 - box.x0);
        return {of(stride * (box.y1 - box.y0)), stride, width, height, box.x0, box.y0};
    }
    void end_of_use() {
        if (bytes.size() > most_kept) std::vector<uint8_t>().swap(bytes);
    }
};

// ---- Colours

using Table = uint8_t[256];
using Counts = int64_t[3][256];

inline uint8_t clip8(double v) { return v <= 0 ? 0 : v >= 255 ? 255 : uint8_t(v); }
inline float blend(int from, int to, float alpha) { return float(from) + alpha * float(to - from); }

void count(const Image& image, Counts& counts) {  // over the whole canvas
    int32_t some[2][3][256] = {};                 // two sets, because neighbours often have the same value
    for (int64_t y = 0; y < image.height; ++y) {
        const uint8_t* p = image.at(0, y);
        for (int64_t x = 0; x < image.width; ++x, p += 4)
            for (int c = 0; c < 3; ++c) ++some[x & 1][c][p[c]];
    }
    for (int c = 0; c < 3; ++c)
        for (int v = 0; v < 256; ++v) counts[c][v] = int64_t(some[0][c][v]) + some[1][c][v];
}

void extremes(const Image& image, uint8_t (&low)[3], uint8_t (&high)[3]) {  // over the whole canvas
    u8x32 least = u8x32{} + 255, most = {};                                   // of eight adjacent pixels
    for (int64_t y = 0; y < image.height; ++y) {
        const uint8_t* p = image.at(0, y);
        // The last eight pixels of a row overlap the ones before. Narrower images are read byte by byte.
        for (int64_t x = 0; image.width >= 8 && x < image.width; x += 8) {
            u8x32 pixels;
            std::memcpy(&pixels, p + 4 * std::min(x, image.width - 8), sizeof pixels);
            least = pixels < least ? pixels : least;
            most = pixels > most ? pixels : most;
        }
        for (int64_t i = 0; image.width < 8 && i < 4 * image.width; ++i) {
            least[i] = std::min<uint8_t>(least[i], p[i]);
            most[i] = std::max<uint8_t>(most[i], p[i]);
        }
    }
    for (int c = 0; c < 3; ++c) low[c] = least[c], high[c] = most[c];
    for (int i = 0; i < 32; ++i) {
        if (i % 4 == 3) continue;
        low[i % 4] = std::min<uint8_t>(low[i % 4], least[i]);
        high[i % 4] = std::max<uint8_t>(high[i % 4], most[i]);
    }
}

void stretch(int low, int high, Table& table) {
    const double scale = high > low ? 255.0 / (high - low) : 1.0, offset = high > low ? -low * scale : 0.0;
    for (int v = 0; v < 256; ++v) table[v] = clip8(v * scale + offset);
}

void equalize(const int64_t* counts, Table& table) {
    int64_t total = 0, last = 0, values = 0;
    for (int v = 0; v < 256; ++v) {
        total += counts[v];
        if (counts[v]) last = counts[v], ++values;
    }
    const int64_t step = values > 1 ? (total - last) / 255 : 0;
    int64_t below = step / 2;
    for (int v = 0; v < 256; ++v) {
        table[v] = step ? uint8_t(std::min<int64_t>(below / step, 255)) : uint8_t(v);
        below += counts[v];
    }
}

inline uint32_t grey(uint32_t r, uint32_t g, uint32_t b) { return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; }

int mean_grey(const Image& image) {  // over the whole canvas
    int64_t sum = 0;
    for (int64_t y = 0; y < image.height; ++y) {
        const uint8_t* p = image.at(0, y);
        uint32_t row = 0;
        for (int64_t x = 0; x < image.width; ++x) row += grey(p[4 * x], p[4 * x + 1], p[4 * x + 2]);
        sum += row;
    }
    return int(double(sum) / double(image.width * image.height) + 0.5);
}

// Fills one lookup table per channel, for operations that map each value on its own.
void fill_tables(const Op& op, const Image& image, Table (&tables)[3]) {
    if (op.kind == AUTO_CONTRAST) {
        uint8_t low[3], high[3];
        extremes(image, low, high);
        for (int c = 0; c < 3; ++c) stretch(low[c], high[c], tables[c]);
        return;
    }
    if (op.kind == EQUALIZE) {
        Counts counts;
        count(image, counts);
        for (int c = 0; c < 3; ++c) equalize(counts[c], tables[c]);
        return;
    }
    const int from = op.kind == CONTRAST ? mean_grey(image) : 0;
    const double arg = op.args[0];
    for (int v = 0; v < 256; ++v) {
        int to = v;
        switch (op.kind) {
            case INVERT: to = 255 - v; break;
            case POSTERIZE: to = v & ~((1 << std::clamp(8 - int(arg), 0, 8)) - 1); break;
            case SOLARIZE: to = v < arg ? v : 255 - v; break;
            case SOLARIZE_ADD: to = v < 128 ? std::min(255, v + int(arg)) : v; break;
            default: to = clip8(blend(from, v, float(arg)));  // BRIGHTNESS, CONTRAST
        }
        for (auto& table : tables) table[v] = uint8_t(to);
    }
}

void look_up(const Image& image, Box box, const Table (&tables)[3]) {
    uint32_t shifted[3][256];  // a pixel is read and written as one number
    for (int c = 0; c < 3; ++c)
        for (int v = 0; v < 256; ++v) shifted[c][v] = uint32_t(tables[c][v]) << 8 * c;
    for (int64_t y = box.y0; y < box.y1; ++y) {
        uint8_t* p = image.at(box.x0, y);
        for (int64_t x = box.x0; x < box.x1; ++x, p += 4) {
            const uint32_t to = shifted[0][p[0]] | shifted[1][p[1]] | shifted[2][p[2]];
            std::memcpy(p, &to, sizeof to);
        }
    }
}

void color(const Image& image, Box box, float alpha) {
    for (int64_t y = box.y0; y < box.y1; ++y) {
        uint8_t* row = image.at(box.x0, y);
        for (int64_t x = 0; x < box.x1 - box.x0; ++x) {
            uint32_t pixel;
            std::memcpy(&pixel, row + 4 * x, sizeof pixel);
            const int r = pixel & 255, g = pixel >> 8 & 255, b = pixel >> 16 & 255, l = grey(r, g, b);
            const auto mixed = [&](int v) { return uint32_t(std::min(std::max(blend(l, v, alpha), 0.f), 255.f)); };
            pixel = mixed(r) | mixed(g) << 8 | mixed(b) << 16;
            std::memcpy(row + 4 * x, &pixel, sizeof pixel);
        }
    }
}

// Blends with the weighted mean of 3 x 3 pixels; the centre has weight 5. The edge of the canvas does not change.
void sharpen(const Image& in, const Image& out, Box box, float alpha) {
    for (int64_t y = box.y0; y < box.y1; ++y) {
        std::memcpy(out.at(box.x0, y), in.at(box.x0, y), 4 * (box.x1 - box.x0));
        const int64_t x0 = std::max<int64_t>(box.x0, 1), x1 = std::min(box.x1, in.width - 1);
        if (y == 0 || y == in.height - 1 || x0 >= x1) continue;
        const uint8_t *a = in.at(x0, y - 1), *b = in.at(x0, y), *c = in.at(x0, y + 1);
        uint8_t* __restrict to = out.at(x0, y);
        for (int64_t i = 0; i < 4 * (x1 - x0); ++i) {
            const int around = a[i - 4] + a[i] + a[i + 4] + b[i - 4] + b[i + 4] + c[i - 4] + c[i] + c[i + 4];
            const int smooth = uint32_t((around + 5 * b[i] + 6) * 5042) >> 16;  // / 13, to nearest
            to[i] = uint8_t(int(std::min(std::max(blend(smooth, b[i], alpha), 0.f), 255.f)));
        }
    }
}

// ---- Geometry

// Interpolates between b and c of four neighbours: linearly, or with the cubic of Pillow's transforms. Sums are
// computed in integers, which is exact.
template <bool cubic> inline f64x4 between(const uint8_t* p, int64_t a, int64_t c, int64_t d, double t) {
    const i32x4 pb = load(p), pc = load(p + c);
    if constexpr (!cubic) return wide(pb) + wide(pc - pb) * t;
    const i32x4 pa = load(p + a), pd = load(p + d);
    return wide(pb) + t * (wide(pc - pa) + t * (wide(2 * (pa - pb) + pc - pd) + t * wide(pb - pa - pc + pd)));
}
inline f64x4 between(f64x4 a, f64x4 b, f64x4 c, f64x4 d, double t) {
    return b + t * ((c - a) + t * (2.0 * (a - b) + c - d + t * (b - a - c + d)));
}

// pa ... pd: the same column of four rows; a, c, d: offsets of the neighbouring columns, in bytes.
template <bool cubic, bool across, bool down>
inline f64x4 mixed(const uint8_t* pa, const uint8_t* pb, const uint8_t* pc, const uint8_t* pd, int64_t a, int64_t c,
                   int64_t d, double dx, double dy) {
    const auto row = [&](const uint8_t* p) {
        if constexpr (across) return between<cubic>(p, a, c, d, dx);
        else return wide(load(p));
    };
    if constexpr (!down) return row(pb);
    else if constexpr (!cubic) return row(pb) + (row(pc) - row(pb)) * dy;
    else return between(row(pa), row(pb), row(pc), row(pd), dy);
}

// One coordinate of the source points of a row of pixels: the cell before each, and the distance from its centre.
struct Points {
    std::vector<double> place, part;
    std::vector<int32_t> cell;
    void locate(const double* m, int64_t x0, int64_t y, int64_t n) {
        place.resize(n), part.resize(n), cell.resize(n);
        double *__restrict place_ = place.data(), *__restrict part_ = part.data();
        int32_t* __restrict cell_ = cell.data();
        const double py = y + 0.5, a = m[0], b = m[1], c = m[2];
        int32_t i = 0;
#ifdef __AVX2__
        const __m256d half = _mm256_set1_pd(0.5), steep = _mm256_set1_pd(a), row = _mm256_set1_pd(b * py);
        for (; i + 4 <= int32_t(n); i += 4) {
            const __m128i at_x = _mm_add_epi32(_mm_set1_epi32(int32_t(x0) + i), _mm_setr_epi32(0, 1, 2, 3));
            const __m256d px = _mm256_add_pd(_mm256_cvtepi32_pd(at_x), half);
            const __m256d at = _mm256_add_pd(_mm256_add_pd(_mm256_mul_pd(steep, px), row), _mm256_set1_pd(c));
            const __m256d behind = _mm256_sub_pd(at, half), low = _mm256_floor_pd(behind);
            _mm256_storeu_pd(place_ + i, at);
            _mm256_storeu_pd(part_ + i, _mm256_sub_pd(behind, low));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(cell_ + i), _mm256_cvttpd_epi32(low));
        }
#endif
        for (; i < int32_t(n); ++i) {
            const double px = (int32_t(x0) + i) + 0.5, at = a * px + b * py + c, low = std::floor(at - 0.5);
            place_[i] = at;
            part_[i] = at - 0.5 - low;
            cell_[i] = int32_t(low);
        }
    }
};

// across, down: whether to interpolate between columns, between rows. Rotation needs both, shear and translation one.
template <bool cubic, bool across, bool down>
void warp(const Image in, const Image out, const Box box, const double* m, const uint8_t* fill) {
    static thread_local Points kept_columns, kept_rows;
    Points &columns = kept_columns, &rows = kept_rows;
    const int64_t W = in.width, H = in.height, n = box.x1 - box.x0;
    const auto inner = [](int64_t cell, int64_t size) { return cell >= 1 && cell + 2 < size; };
    for (int64_t y = box.y0; y < box.y1; ++y) {
        if (across) columns.locate(m, box.x0, y, n);
        if (down) rows.locate(m + 3, box.x0, y, n);
        uint8_t* to = out.at(box.x0, y);
        // Plain pointers, because the compiler must assume that storing a pixel changes the vectors.
        const double *sx = columns.place.data(), *sy = rows.place.data();
        const double *part_x = columns.part.data(), *part_y = rows.part.data();
        const int32_t *cell_x = columns.cell.data(), *cell_y = rows.cell.data();
        const auto at = [&](int64_t i) {
            const int64_t column = across ? cell_x[i] : box.x0 + i, row = down ? cell_y[i] : y;
            const uint8_t* p = in.at(column, row);
            const int64_t step = in.stride;
            return mixed<cubic, across, down>(p - step, p, p + step, p + 2 * step, -4, 4, 8, across ? part_x[i] : 0,
                                              down ? part_y[i] : 0);
        };
        const auto whole = [&](int64_t i) {  // the point and all of its neighbours are inside the image
            return (!across || inner(cell_x[i], W)) && (!down || inner(cell_y[i], H));
        };
        // Coordinates are monotonic along a row, even in their last bit, so all points between two such are such.
        int64_t first = 0, end = n;
        while (first < n && !whole(first)) ++first;
        while (end > first && !whole(end - 1)) --end;
        for (int64_t i = first; i < end; ++i) store(__builtin_convertvector(at(i), i32x4), to + 4 * i);
        for (int64_t i = 0; i < n; ++i, to += 4) {
            if (i == first && first < end) {
                to += 4 * (end - first);
                i = end;
                if (i == n) break;
            }
            if ((across && !(sx[i] >= 0 && sx[i] < W)) || (down && !(sy[i] >= 0 && sy[i] < H))) {
                std::memcpy(to, fill, 4);
                continue;
            }
            const int64_t column = across ? cell_x[i] : box.x0 + i, row = down ? cell_y[i] : y;
            const double dx = across ? part_x[i] : 0, dy = down ? part_y[i] : 0;
            // Coordinates beyond the edge are clamped to it.
            const auto x = [&](int k) { return 4 * (std::min(std::max<int64_t>(column + k, 0), W - 1) - in.x0); };
            const auto p = [&](int k) { return in.at(in.x0, std::min(std::max<int64_t>(row + k, 0), H - 1)) + x(0); };
            const f64x4 v =
                mixed<cubic, across, down>(p(-1), p(0), p(1), p(2), x(-1) - x(0), x(1) - x(0), x(2) - x(0), dx, dy);
            store(__builtin_convertvector(v, i32x4), to);
        }
    }
}

inline bool is_across(const Op& op) { return op.args[0] != 1 || op.args[1] != 0 || op.args[2] != 0; }
inline bool is_down(const Op& op) { return op.args[3] != 0 || op.args[4] != 1 || op.args[5] != 0; }

void warp(const Op& op, const Image& in, const Image& out, Box box, const int64_t* rgb) {
    const uint8_t fill[4] = {uint8_t(rgb[0]), uint8_t(rgb[1]), uint8_t(rgb[2]), 0};
    const auto run = op.cubic ? (is_across(op) ? is_down(op) ? warp<true, true, true> : warp<true, true, false>
                                               : warp<true, false, true>)
                              : (is_across(op) ? is_down(op) ? warp<false, true, true> : warp<false, true, false>
                                               : warp<false, false, true>);
    run(in, out, box, op.args, fill);
}

// Returns the box of its canvas that an operation reads to compute `box`.
Box needs(const Op& op, Box box, int64_t W, int64_t H) {
    const auto within = [](double v, int64_t most) { return int64_t(std::min(std::max(v, 0.0), double(most))); };
    switch (op.kind) {
        case AUTO_CONTRAST: case EQUALIZE: case CONTRAST: return {0, 0, W, H};
        case SHARPNESS:
            return {std::max<int64_t>(box.x0 - 1, 0), std::max<int64_t>(box.y0 - 1, 0), std::min(box.x1 + 1, W),
                    std::min(box.y1 + 1, H)};
        case AFFINE: break;
        default: return box;
    }
    double low[2] = {1e9, 1e9}, high[2] = {-1e9, -1e9};
    for (const int64_t x : {box.x0, box.x1})
        for (const int64_t y : {box.y0, box.y1})
            for (int axis = 0; axis < 2; ++axis) {
                const double* m = op.args + 3 * axis;
                const double at = m[0] * x + m[1] * y + m[2];
                low[axis] = std::min(low[axis], at);
                high[axis] = std::max(high[axis], at);
            }
    return {within(low[0] - 3, W - 1), within(low[1] - 3, H - 1), within(high[0] + 3, W - 1) + 1,
            within(high[1] + 3, H - 1) + 1};
}

// Mirrors the image; only `box`, in the coordinates after mirroring, has to be valid.
void flip(Image& image, Box box, bool across, bool down) {
    if (down) {
        image.data = image.at(image.x0, image.height - 1);
        image.stride = -image.stride;
        image.y0 = 0;
    }
    if (!across) return;
    const int64_t n = box.x1 - box.x0;
    static thread_local std::vector<uint32_t> mirrored;
    mirrored.resize(n);
    image.data += 4 * (image.width - box.x1 - image.x0);  // the column that becomes box.x0
    image.x0 = box.x0;
    for (int64_t y = box.y0; y < box.y1; ++y) {
        uint32_t* row = reinterpret_cast<uint32_t*>(image.at(box.x0, y));
        for (int64_t i = 0; i < n; ++i) mirrored[i] = row[n - 1 - i];
        std::memcpy(row, mirrored.data(), 4 * n);
    }
}

// ---- Resize: two passes with an 8-bit image between them, usually the horizontal one first

constexpr int bits = 32 - 8 - 2;

struct Axis {  // for each pixel of the output along one axis: the input pixels that it depends on, and their weights
    std::vector<int64_t> first;
    std::vector<int32_t> weights;  // `taps` per output pixel, an even number
    std::vector<int32_t> spread;   // each weight four times, for four channels
    int64_t taps;
};

inline double kernel(double x, bool cubic) {
    x = std::abs(x);
    if (!cubic) return x < 1 ? 1 - x : 0;
    constexpr double a = -0.5;
    return x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

struct Filter {  // from `in` pixels along one axis to `out` pixels
    int64_t in;
    double scale, stretched, support;
    Filter(int64_t in, int64_t out, bool cubic)
        : in(in), scale(double(in) / out), stretched(std::max(scale, 1.0)), support((cubic ? 2.0 : 1.0) * stretched) {}
    double centre(int64_t o) const { return (o + 0.5) * scale; }
    int64_t low(int64_t o) const { return std::max<int64_t>(int64_t(centre(o) - support + 0.5), 0); }
    int64_t end(int64_t o) const { return std::min(int64_t(centre(o) + support + 0.5), in); }
};

void prepare(Axis& axis, int64_t in, int64_t out, int64_t begin, int64_t end, bool cubic) {
    const Filter filter(in, out, cubic);
    const double shrink = 1.0 / filter.stretched;
    const int64_t most = 2 * int64_t(std::ceil(filter.support)) + 1;
    axis.taps = most + most % 2;
    axis.first.assign(end - begin, 0);
    axis.weights.assign((end - begin) * axis.taps, 0);
    std::vector<double> exact(most);
    int64_t used = 1;
    for (int64_t o = begin; o < end; ++o) {
        const double centre = filter.centre(o);
        const int64_t low = filter.low(o), count = filter.end(o) - low;
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += exact[i] = kernel((i + low - centre + 0.5) * shrink, cubic);
        int32_t* weights = &axis.weights[(o - begin) * axis.taps];
        for (int64_t i = 0; i < count; ++i) {
            const double w = sum != 0 ? exact[i] / sum : exact[i];
            weights[i] = int32_t((w < 0 ? -0.5 : 0.5) + w * (1 << bits));
            if (weights[i]) used = std::max(used, i + 1);
        }
        axis.first[o - begin] = low;
    }
    // Pillow reserves more taps than are used: those that are 0 for every pixel are dropped. At the far edge, where
    // there are fewer input pixels, the taps move back into the image.
    const int64_t kept = used + used % 2;
    for (int64_t o = 0; o < end - begin; ++o) {
        int32_t *from = &axis.weights[o * axis.taps], *to = &axis.weights[o * kept];
        std::copy_n(from, kept, to);
        const int64_t beyond = std::min(std::max<int64_t>(axis.first[o] + kept - in, 0), axis.first[o]);
        axis.first[o] -= beyond;
        std::copy_backward(to, to + kept - beyond, to + kept);
        std::fill_n(to, beyond, 0);
    }
    axis.taps = kept;
    axis.spread.resize((end - begin) * kept * 4);
    for (size_t i = 0; i < axis.spread.size(); ++i) axis.spread[i] = axis.weights[i / 4];
}

template <int rows>
void resize_rows(const Axis& axis, const uint8_t* in, int64_t stride, uint8_t* out, int64_t step) {
    const int64_t count = axis.first.size(), taps = axis.taps;
    const int32_t* w = axis.spread.data();
    for (int64_t o = 0; o < count; ++o) {
        const uint8_t* p = in + 4 * axis.first[o];
        i32x8 sums[rows] = {};
        for (int64_t i = 0; i < taps; i += 2, w += 8) {
            i32x8 weight;
            std::memcpy(&weight, w, sizeof weight);
            for (int r = 0; r < rows; ++r) sums[r] += weight * load_two(p + r * stride + 4 * i);
        }
        for (int r = 0; r < rows; ++r) {
            i32x4 half[2];
            std::memcpy(half, &sums[r], sizeof half);
            store((half[0] + half[1] + (1 << (bits - 1))) >> bits, out + r * step + 4 * o);
        }
    }
}

void resize_across(const Axis& axis, int64_t rows, const uint8_t* in, int64_t stride, uint8_t* out, int64_t step) {
    int64_t y = 0;
    for (; y + 4 <= rows; y += 4) resize_rows<4>(axis, in + y * stride, stride, out + y * step, step);
    for (; y < rows; ++y) resize_rows<1>(axis, in + y * stride, stride, out + y * step, step);
}

constexpr int block = 32;  // bytes that resize_down computes at once
inline int64_t whole(int64_t bytes) { return (bytes + block - 1) / block * block; }

// Reads and writes whole blocks. `rows` is the number of input rows that may be read.
void resize_down(const Axis& axis, int64_t rows, const uint8_t* in, int64_t stride, uint8_t* out, int64_t step,
                 int64_t bytes) {
    constexpr int vectors = block / 8;
    const int64_t count = axis.first.size();
    for (int64_t o = 0; o < count; ++o) {
        const int32_t* w = &axis.weights[o * axis.taps];
        const int64_t taps = std::min(axis.taps, rows - axis.first[o]);
        for (int64_t i = 0; i < bytes; i += block) {
            const uint8_t* p = in + axis.first[o] * stride + i;
            i32x8 sums[vectors];
            for (auto& sum : sums) sum = i32x8{} + (1 << (bits - 1));
            for (int64_t t = 0; t < taps; ++t, p += stride)
                for (int v = 0; v < vectors; ++v) sums[v] += w[t] * load_two(p + 8 * v);
            for (int v = 0; v < vectors; ++v) store_two(sums[v] >> bits, out + o * step + i + 8 * v);
        }
    }
}

// Returns the box of the resized image that is part of the output.
Box shown(const Job& job) {
    return {std::max<int64_t>(job.left, 0), std::max<int64_t>(job.top, 0),
            std::min(job.left + job.out_w, job.resized_w), std::min(job.top + job.out_h, job.resized_h)};
}

// Resizes job.crop of `in`, horizontally first; with `tall_first`, vertically first if the height shrinks by more than
// twice as many pixels as the width.
Image resize(const Image& in, const Job& job, Scratch& between, Scratch& result) {
    const auto [x0, y0, x1, y1] = shown(job);
    const Image out = result.image({0, 0, job.out_w, job.out_h}, job.out_w, job.out_h);
    if (x1 - x0 < job.out_w || y1 - y0 < job.out_h) std::memset(out.data, 0, out.stride * job.out_h);
    if (x0 >= x1 || y0 >= y1) return out;

    static thread_local Axis across, down;
    const int64_t W = job.crop.x1 - job.crop.x0, H = job.crop.y1 - job.crop.y0, columns = x1 - x0, lines = y1 - y0;
    prepare(across, W, job.resized_w, x0, x1, job.cubic);
    prepare(down, H, job.resized_h, y0, y1, job.cubic);
    // The part of the crop that is read; `first` never decreases. An even number of taps may include one of weight 0.
    const int64_t left = across.first.front(), right = std::min(across.first.back() + across.taps, W);
    const int64_t top = down.first.front(), bottom = std::min(down.first.back() + down.taps, H);
    const uint8_t* from = in.at(job.crop.x0 + left, job.crop.y0 + top);
    uint8_t* to = out.at(x0 - job.left, y0 - job.top);
    for (auto& first : across.first) first -= left;
    for (auto& first : down.first) first -= top;

    if (job.tall_first && H > job.resized_h && H - job.resized_h > 2 * (W - job.resized_w)) {
        const int64_t stride = whole(4 * (right - left));
        uint8_t* middle = between.of(stride * lines);
        resize_down(down, bottom - top, from, in.stride, middle, stride, stride);
        resize_across(across, lines, middle, stride, to, out.stride);
    } else {
        const int64_t stride = whole(4 * columns);
        uint8_t* middle = between.of(stride * (bottom - top));
        resize_across(across, bottom - top, from, in.stride, middle, stride);
        static thread_local Scratch padded;
        uint8_t* rows = padded.of(stride * lines);
        resize_down(down, bottom - top, middle, stride, rows, stride, stride);
        for (int64_t y = 0; y < lines; ++y) std::memcpy(to + y * out.stride, rows + y * stride, 4 * columns);
    }
    return out;
}

void planes(const Image& image, uint8_t* out) {
    const int64_t area = image.width * image.height;
    for (int64_t y = 0; y < image.height; ++y) {
        const uint8_t* p = image.at(0, y);
        uint8_t* to = out + y * image.width;
        int64_t x = 0;
#ifdef __AVX2__
        const __m256i by_channel = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        for (; x + 8 <= image.width; x += 8) {
            const __m256i pixels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 4 * x));
            const __m256i fours = _mm256_shuffle_epi8(pixels, by_channel);
            const __m256i eights = _mm256_permutevar8x32_epi32(fours, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            const __m128i red_green = _mm256_castsi256_si128(eights);
            _mm_storeu_si64(to + x, red_green);
            _mm_storeu_si64(to + x + area, _mm_unpackhi_epi64(red_green, red_green));
            _mm_storeu_si64(to + x + 2 * area, _mm256_extracti128_si256(eights, 1));
        }
#endif
        for (; x < image.width; ++x) {
            to[x] = p[4 * x];
            to[x + area] = p[4 * x + 1];
            to[x + 2 * area] = p[4 * x + 2];
        }
    }
}

// Computes the boxes of the canvas: boxes[i] is the input of operation i, and the last one is the output of all.
void find_boxes(const Job& job, const Op* ops, std::vector<Box>& boxes) {
    const int64_t W = job.ops_first ? job.width : job.out_w, H = job.ops_first ? job.height : job.out_h;
    boxes.assign(job.num_ops + 1, job.ops_first ? job.crop : Box{0, 0, W, H});
    for (int64_t i = job.num_ops; i-- > 0;) boxes[i] = needs(ops[i], boxes[i + 1], W, H);
}

}  // namespace

// Writes the box of the image that `render` reads, as x0, y0, x1, y1. Pixels with a weight of 0 need not be in it.
extern "C" void box_needed(const Job* given, const Op* ops, int64_t* box) {
    const Job& job = *given;
    Box from = {0, 0, 1, 1};  // for an output outside the image
    if (job.ops_first) {
        std::vector<Box> boxes;
        find_boxes(job, ops, boxes);
        from = boxes[0];
        if (job.hflip) from = {job.width - from.x1, from.y0, job.width - from.x0, from.y1};
        if (job.vflip) from = {from.x0, job.height - from.y1, from.x1, job.height - from.y0};
    } else {
        const Box seen = shown(job), &crop = job.crop;
        if (seen.x0 < seen.x1 && seen.y0 < seen.y1) {
            const Filter across(crop.x1 - crop.x0, job.resized_w, job.cubic);
            const Filter down(crop.y1 - crop.y0, job.resized_h, job.cubic);
            from = {crop.x0 + across.low(seen.x0), crop.y0 + down.low(seen.y0), crop.x0 + across.end(seen.x1 - 1),
                    crop.y0 + down.end(seen.y1 - 1)};
        }
    }
    box[0] = from.x0, box[1] = from.y0, box[2] = from.x1, box[3] = from.y1;
}

// Writes uint8 [3, out_h, out_w] to `out`. Overwrites `pixels`, RGBX [height, width], of which only the box that is
// needed has to be decoded, and may read 64 bytes after it.
extern "C" void render(uint8_t* pixels, const Job* given, const Op* ops, uint8_t* out) {
    static thread_local Scratch between, result, scratch[2];
    static thread_local std::vector<Box> boxes;
    const Job& job = *given;
    Image image = {pixels, 4 * job.width, job.width, job.height, 0, 0};
    if (!job.ops_first) image = resize(image, job, between, result);

    find_boxes(job, ops, boxes);
    flip(image, boxes[0], job.hflip, job.vflip);
    int which = 0;
    for (int64_t i = 0; i < job.num_ops; ++i) {
        const Op& op = ops[i];
        const Box box = boxes[i + 1];
        if (op.kind == AFFINE || op.kind == SHARPNESS) {
            which = 1 - which;  // its input may be in the other one
            Image made = scratch[which].image(box, image.width, image.height);
            if (op.kind == AFFINE) warp(op, image, made, box, job.fill);
            else sharpen(image, made, box, float(op.args[0]));
            image = made;
        } else if (op.kind == COLOR) {
            color(image, box, float(op.args[0]));
        } else {
            Table tables[3];
            fill_tables(op, image, tables);
            look_up(image, box, tables);
        }
    }
    if (job.ops_first) image = resize(image, job, between, result);
    planes(image, out);
    for (Scratch* used : {&between, &result, &scratch[0], &scratch[1]}) used->end_of_use();
}
