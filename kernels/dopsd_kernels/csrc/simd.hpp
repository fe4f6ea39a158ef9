// One vector of floats for the instruction set that this file is compiled for, and exp, sigmoid and tanh on it.
// For *_kernels.cpp only (see isa.hpp). Loops over n floats: `columns` and `reduce` below.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(DOPSD_ISA_avx512) || defined(DOPSD_ISA_avx2)
#include <immintrin.h>
#endif

namespace dopsd::DOPSD_ISA {

// Tags of load and store: a whole vector, or its first n floats. The others load as 0 and are not stored.
struct Whole {};

#if defined(DOPSD_ISA_avx512)

struct Vec {
    static constexpr std::int64_t width = 16;
    __m512 v;
    Vec() : v(_mm512_setzero_ps()) {}
    Vec(__m512 x) : v(x) {}
    Vec(float x) : v(_mm512_set1_ps(x)) {}
};
struct Part {
    __mmask16 lanes;
    __mmask8 half;
    explicit Part(std::int64_t n)
        : lanes(static_cast<__mmask16>((1u << n) - 1u)), half(static_cast<__mmask8>((1u << (n / 2)) - 1u)) {}
};

inline Vec load(const float *p, Whole) { return _mm512_loadu_ps(p); }
inline Vec load(const float *p, Part part) { return _mm512_maskz_loadu_ps(part.lanes, p); }
inline void store(float *p, Vec a, Whole) { _mm512_storeu_ps(p, a.v); }
inline void store(float *p, Vec a, Part part) { _mm512_mask_storeu_ps(p, part.lanes, a.v); }
inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec magnitude(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec with_sign(Vec a, Vec sign) { return _mm512_or_ps(a.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f))); }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v);
}
inline Vec swap_pairs(Vec a) { return _mm512_permute_ps(a.v, 0xB1); }
inline Vec power_of_two(Vec magic) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(magic.v), _mm512_set1_epi32(127)), 23));
}
inline Vec twice(__m256 a) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(a));
}
inline Vec load_twice(const float *p, Whole) { return twice(_mm256_loadu_ps(p)); }
inline Vec load_twice(const float *p, Part part) { return twice(_mm256_maskz_loadu_ps(part.half, p)); }
inline float sum(Vec a) {
    const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

#elif defined(DOPSD_ISA_avx2)

struct Vec {
    static constexpr std::int64_t width = 8;
    __m256 v;
    Vec() : v(_mm256_setzero_ps()) {}
    Vec(__m256 x) : v(x) {}
    Vec(float x) : v(_mm256_set1_ps(x)) {}
};
alignas(32) constexpr int kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
struct Part {
    __m256i lanes;
    __m128i half;
    explicit Part(std::int64_t n)
        : lanes(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(kFirst + 8 - n))),
          half(_mm_loadu_si128(reinterpret_cast<const __m128i *>(kFirst + 8 - n / 2))) {}
};

inline Vec load(const float *p, Whole) { return _mm256_loadu_ps(p); }
inline Vec load(const float *p, Part part) { return _mm256_maskload_ps(p, part.lanes); }
inline void store(float *p, Vec a, Whole) { _mm256_storeu_ps(p, a.v); }
inline void store(float *p, Vec a, Part part) { _mm256_maskstore_ps(p, part.lanes, a.v); }
inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec magnitude(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline Vec with_sign(Vec a, Vec sign) { return _mm256_or_ps(a.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f))); }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
inline Vec swap_pairs(Vec a) { return _mm256_permute_ps(a.v, 0xB1); }
inline Vec power_of_two(Vec magic) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(magic.v), _mm256_set1_epi32(127)), 23));
}
inline Vec twice(__m128 a) {
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(a), _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
inline Vec load_twice(const float *p, Whole) { return twice(_mm_loadu_ps(p)); }
inline Vec load_twice(const float *p, Part part) { return twice(_mm_maskload_ps(p, part.half)); }
inline float sum(Vec a) {
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

#else  // Any processor: loops over four floats, which compilers turn into vector instructions.

struct Vec {
    static constexpr std::int64_t width = 4;
    float v[4];
    Vec() : v{} {}
    Vec(float x) : v{x, x, x, x} {}
    template <typename F> explicit Vec(F lane) {
        for (int i = 0; i < 4; ++i) v[i] = lane(i);
    }
};
struct Part {
    std::int64_t n;
    explicit Part(std::int64_t count) : n(count) {}
};

inline Vec load(const float *p, Whole) {
    Vec a;
    std::memcpy(a.v, p, sizeof a.v);
    return a;
}
inline Vec load(const float *p, Part part) {
    return Vec([=](int i) { return i < part.n ? p[i] : 0.0f; });
}
inline void store(float *p, Vec a, Whole) { std::memcpy(p, a.v, sizeof a.v); }
inline void store(float *p, Vec a, Part part) {
    for (int i = 0; i < part.n; ++i) p[i] = a.v[i];
}
inline Vec operator+(Vec a, Vec b) {
    return Vec([=](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
    return Vec([=](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
    return Vec([=](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
    return Vec([=](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // two roundings: a call of std::fma would be slow
inline Vec min(Vec a, Vec b) {
    return Vec([=](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec max(Vec a, Vec b) {
    return Vec([=](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec magnitude(Vec a) {
    return Vec([=](int i) { return a.v[i] < 0.0f ? -a.v[i] : a.v[i]; });
}
inline Vec with_sign(Vec a, Vec sign) {
    return Vec([=](int i) { return sign.v[i] < 0.0f ? -a.v[i] : a.v[i]; });
}
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return Vec([=](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}
inline Vec swap_pairs(Vec a) {
    return Vec([=](int i) { return a.v[i ^ 1]; });
}
inline Vec power_of_two(Vec magic) {
    std::uint32_t bits[4];
    std::memcpy(bits, magic.v, sizeof bits);
    for (std::uint32_t &b : bits) b = (b + 127u) << 23;
    Vec a;
    std::memcpy(a.v, bits, sizeof bits);
    return a;
}
inline Vec load_twice(const float *p, Whole) {
    return Vec([=](int i) { return p[i / 2]; });
}
inline Vec load_twice(const float *p, Part part) {
    return Vec([=](int i) { return i < part.n ? p[i / 2] : 0.0f; });
}
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

#endif

// load_twice(p): p[0], p[0], p[1], p[1], ... (n even)     swap_pairs: a1, a0, a3, a2, ...
// min and max return their second argument where either is NaN.
// power_of_two(1.5 * 2^23 + n) = 2^n for whole n in -126..127.

// f(i, Whole or Part) for the vectors at i = 0, width, 2 * width, ... of n floats.
template <typename F> inline void columns(std::int64_t n, F f) {
    std::int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) f(i, Whole{});
    if (i < n) f(i, Part(n - i));
}

// The sum over n floats of what f(i, Whole or Part, partial sum) adds to its partial sum: four of these in turn, so that
// one addition need not wait for the last. Its rounding depends on n only.
template <typename F> inline float reduce(std::int64_t n, F f) {
    constexpr std::int64_t w = Vec::width;
    Vec a, b, c, d;
    std::int64_t i = 0;
    for (; i + 4 * w <= n; i += 4 * w) {
        a = f(i, Whole{}, a);
        b = f(i + w, Whole{}, b);
        c = f(i + 2 * w, Whole{}, c);
        d = f(i + 3 * w, Whole{}, d);
    }
    for (; i + w <= n; i += w) a = f(i, Whole{}, a);
    if (i < n) b = f(i, Part(n - i), b);
    return sum((a + b) + (c + d));
}

// exp to 2 units in the last place for x in -87.3..88.3, and exp of the nearer bound beyond them; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2. The polynomial (a weighted minimax fit, relative error 3e-9) gives exp(r).
inline Vec exp(Vec x) {
    x = min(Vec(88.3f), max(Vec(-87.3f), x));
    const Vec magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Vec shifted = fma(x, 1.44269504f, magic), n = shifted - magic;
    // ln 2 in two parts, the first with so few bits that n times it is exact.
    const Vec r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));
    Vec p = fma(r, 0.00138144672f, 0.00836878084f);
    p = fma(p, r, 0.0416683927f);
    p = fma(p, r, 0.166665196f);
    p = fma(p, r, 0.49999994f);
    return fma(fma(p, r, 1.0f), r, 1.0f) * power_of_two(shifted);
}

// tanh to 3 units in the last place: an odd polynomial (a minimax fit, relative error 4e-9) up to 0.625, then by exp.
inline Vec tanh(Vec x) {
    const Vec a = magnitude(x), z = x * x;
    Vec p = fma(z, -0.0057170447f, 0.0206505861f);
    p = fma(p, z, -0.0537434965f);
    p = fma(p, z, 0.133314908f);
    p = fma(p, z, -0.333332837f);
    const Vec large = Vec(1.0f) - Vec(2.0f) / (exp(a + a) + 1.0f);
    return where_less(a, 0.625f, fma(p * z, x, x), with_sign(large, x));
}

}  // namespace dopsd::DOPSD_ISA
