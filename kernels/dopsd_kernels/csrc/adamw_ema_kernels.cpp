// AdamW + EMA of one block of elements, compiled once per instruction set.
//
// The moments and the average round as torch's CPU kernels (lerp, mul, addcmul) of the same instruction set do; theta may
// differ by what MKL's square root does.
#include "adamw_ema.hpp"

#include "simd.hpp"

#if defined(__GNUC__) || defined(__clang__) || defined(_MSC_VER)
#define RESTRICT __restrict
#else
#define RESTRICT
#endif

#if !defined(DOPSD_ISA_avx512) && !defined(DOPSD_ISA_avx2)
#include <math.h>
#endif

namespace dopsd::DOPSD_ISA {

namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;

#if defined(DOPSD_ISA_avx512)
inline Vec square_root(Vec a) { return _mm512_sqrt_ps(a.v); }
#elif defined(DOPSD_ISA_avx2)
inline Vec square_root(Vec a) { return _mm256_sqrt_ps(a.v); }
#else
inline Vec square_root(Vec a) {
    return Vec([=](int i) { return sqrtf(a.v[i]); });
}
#endif

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

// Rounds to nearest, ties to even, as torch does.
inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(is_nan(bits) ? 0x7fc0u : rounded);
}

void to_bf16(const float *RESTRICT from, uint16_t *RESTRICT to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}

// The same, past the caches where the instruction set can: without being read first, memory takes half the traffic.
void stream_bf16(const float *RESTRICT from, uint16_t *RESTRICT to, int64_t n) {
#if defined(DOPSD_ISA_avx512) || defined(DOPSD_ISA_avx2)
    if (n % 16 == 0 && reinterpret_cast<std::uintptr_t>(to) % 32 == 0) {
        alignas(32) uint16_t here[kAdamwEmaBlock];
        to_bf16(from, here, n);
        for (int64_t i = 0; i < n; i += 16)
            _mm256_stream_si256(reinterpret_cast<__m256i *>(to + i),
                                _mm256_load_si256(reinterpret_cast<const __m256i *>(here + i)));
        return;
    }
#endif
    to_bf16(from, to, n);
}

void from_bf16(const uint16_t *RESTRICT from, float *RESTRICT to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_of(static_cast<uint32_t>(from[i]) << 16);
}

// The float with these halves: high is the nearest bfloat16, low the signed distance to it in units in the last place.
void join(const uint16_t *RESTRICT high, const uint16_t *RESTRICT low, float *RESTRICT to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const auto distance = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(low[i])));
        to[i] = float_of((static_cast<uint32_t>(high[i]) << 16) + distance);
    }
}

// The inverse of join, bit for bit but for the payload of a NaN; of two equally near bfloat16 the one away from 0.
void split(const float *RESTRICT from, uint16_t *RESTRICT high, uint16_t *RESTRICT low, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t found = bits_of(from[i]);
        const uint32_t bits = is_nan(found) ? 0x7fc00000u : found;
        high[i] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
        low[i] = static_cast<uint16_t>(bits);
    }
}

// start + weight * (end - start), from the nearer side: torch's lerp.
struct Lerp {
    explicit Lerp(float w) : from_start(w < 0.5f), weight(from_start ? w : w - 1.0f) {}
    Vec operator()(Vec start, Vec end) const { return fma(weight, end - start, from_start ? start : end); }
    bool from_start;
    Vec weight;
};

void adamw(const AdamwEma &a, float *theta, const float *grad, float *exp_avg, float *exp_avg_sq, int64_t n) {
    const Lerp toward_grad(a.take_grad);
    const Vec scale = a.grad_scale, shrink = a.shrink, keep = a.keep_square, take = a.take_square, root = a.root, eps = a.eps;
    const Vec minus_step = a.minus_step;
    columns(n, [&](int64_t i, auto part) {
        const Vec g = load(grad + i, part) * scale;
        const Vec m = toward_grad(load(exp_avg + i, part), g);
        const Vec v = fma(take * g, g, keep * load(exp_avg_sq + i, part));
        const Vec denominator = square_root(v) * root + eps;
        store(theta + i, load(theta + i, part) * shrink + minus_step * m / denominator, part);
        store(exp_avg + i, m, part);
        store(exp_avg_sq + i, v, part);
    });
}

void average(float *ema, const float *theta, float take, int64_t n) {
    const Lerp toward_theta(take);
    columns(n, [&](int64_t i, auto part) { store(ema + i, toward_theta(load(ema + i, part), load(theta + i, part)), part); });
}

}  // namespace

void adamw_ema_block(const AdamwEma &a, int64_t begin, int64_t end) {
    alignas(64) float theta_here[kAdamwEmaBlock], grad_here[kAdamwEmaBlock], ema_here[kAdamwEmaBlock];
    const int64_t n = end - begin;
    const auto copy = a.stream ? stream_bf16 : static_cast<decltype(&stream_bf16)>(to_bf16);

    float *theta = a.theta ? a.theta + begin : theta_here;
    if (a.theta_low) join(a.theta_high + begin, a.theta_low + begin, theta, n);
    const float *grad = a.grad ? a.grad + begin : grad_here;
    if (a.grad_bf16) from_bf16(a.grad_bf16 + begin, grad_here, n);

    adamw(a, theta, grad, a.exp_avg + begin, a.exp_avg_sq + begin, n);

    if (a.theta_low) split(theta, a.theta_high + begin, a.theta_low + begin, n);
    if (a.student) copy(theta, a.student + begin, n);
    if (a.student_fp32) std::memcpy(a.student_fp32 + begin, theta, static_cast<std::size_t>(n) * sizeof(float));
    if (!a.ema && !a.ema_low) return;

    float *ema = a.ema ? a.ema + begin : ema_here;
    if (a.ema_low) join(a.ema_high + begin, a.ema_low + begin, ema, n);
    average(ema, theta, a.take_theta, n);
    if (a.ema_low) split(ema, a.ema_high + begin, a.ema_low + begin, n);
    if (a.teacher) copy(ema, a.teacher + begin, n);
    if (a.teacher_fp32) std::memcpy(a.teacher_fp32 + begin, ema, static_cast<std::size_t>(n) * sizeof(float));
}

}  // namespace dopsd::DOPSD_ISA
