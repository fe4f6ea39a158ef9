// What row_kernels.cpp offers, for every instruction set, and the arguments. All arrays are float32; a row stride (in
// floats) belongs to every array that is not contiguous. T tokens (rows), S sequences, D width, C chunks, H heads.
#pragma once

#include <cstdint>

namespace dopsd {

template <typename Element> struct Rows {
    Element *data = nullptr;
    std::int64_t stride = 0;
    Element *operator[](std::int64_t row) const { return data + row * stride; }
    explicit operator bool() const { return data != nullptr; }
};
using In = Rows<const float>;
using Out = Rows<float>;

// The packed layout: the sequence of each row, and, where sums over rows are wanted, pieces (first, last + 1, sequence) of
// at most 64 rows of one sequence, in order. Without chunks, work is split into any 64 rows.
struct Layout {
    std::int64_t tokens, sequences, width;
    const std::int32_t *row_sequence;
    const std::int32_t *chunks = nullptr;
    std::int64_t chunk_count = 0;
};

// A per-sequence factor: weight * (1 + modulation), or, gated, weight * tanh(modulation); what is missing counts as 1
// (gated: modulation too). `table` is scratch [S, D] for it.
struct Factor {
    const float *weight = nullptr;
    In modulation;
    bool gated = false;
    float *table = nullptr;
};

// The gradients of a factor, each null where not asked for, and scratch: partial [C, D], sums [S, D].
struct FactorGradient {
    float *weight = nullptr, *modulation = nullptr;
    float *partial = nullptr, *sums = nullptr;
    bool asked() const { return weight || modulation; }
};

struct NormForward {
    Layout layout;
    In x;
    Factor factor;
    float eps;
    float *y, *rstd;
};

struct NormBackward {
    Layout layout;
    In dy, x;
    Factor factor;
    const float *rstd;
    float *dx;
    FactorGradient gradient;
    float *y;  // null: not asked
};

// Without weight: factor.weight stays null. shift may be null.
struct LayerNormForward {
    Layout layout;
    In x;
    Factor factor;
    In shift;
    float eps;
    float *y, *mean, *rstd;
};

struct LayerNormBackward {
    Layout layout;
    In dy, x;
    Factor factor;
    In shift;
    const float *mean, *rstd;
    float *dx;
    FactorGradient scale_gradient, shift_gradient;
    float *y;  // null: not asked
};

struct GatedForward {
    Layout layout;
    In x, h;
    Factor gate, next;
    float eps;
    float *r, *y, *rstd_h, *rstd_r;  // y null: no next norm
};

struct GatedBackward {
    Layout layout;
    In dr, dy, h, r;  // dr and dy may be null
    Factor gate, next;
    const float *rstd_h, *rstd_r;
    float *dx, *dh;
    FactorGradient gate_gradient, next_gradient;
    float *y;  // null: not asked
};

// q or k: `heads` heads in a row of x; without weight no norm, rotation alone. Gradients: dw [Dh] with scratch
// partial [ceil(T / 64), Dh], or null.
struct RopeSide {
    In x;
    const float *weight = nullptr;
    Out y;                            // forward: the result
    In dy;                            // backward: its gradient, and that one's stride from head to head
    std::int64_t dy_head_stride = 0;
    Out dx;
    float *dw = nullptr, *partial = nullptr;
};

struct Rope {
    std::int64_t tokens, heads, head_dim;  // head_dim even, at most kMaxHeadDim
    In cos, sin;
    float eps;
    RopeSide sides[2];
};
constexpr std::int64_t kMaxHeadDim = 1024;

// n elements in one piece each; x_next, x1_s, x1_t null where not asked. `sums`: scratch [ceil(n / kBlock)].
struct Divergence {
    static constexpr std::int64_t kBlock = 512;  // sums in fp32, blocks are added in float64
    std::int64_t n;
    const float *v_s, *v_t, *x;
    float gradient_scale, dt, rest;
    float *mean_square, *grad_v, *x_next, *x1_s, *x1_t;
    double *sums;
};

struct Swiglu {
    std::int64_t tokens, width;
    In gu, ds;
    float *dgu, *s;  // s null in the backward: not asked
};

#define DOPSD_ROW_KERNELS(isa)                              \
    namespace isa {                                         \
    void rmsnorm_modulate_fwd(const NormForward &);         \
    void rmsnorm_modulate_bwd(const NormBackward &);        \
    void layernorm_modulate_fwd(const LayerNormForward &);  \
    void layernorm_modulate_bwd(const LayerNormBackward &); \
    void divergence_step_fwd(const Divergence &);           \
    void gated_residual_norm_fwd(const GatedForward &);     \
    void gated_residual_norm_bwd(const GatedBackward &);    \
    void qk_norm_rope_fwd(const Rope &);                    \
    void qk_norm_rope_bwd(const Rope &);                    \
    void swiglu_fwd(const Swiglu &);                        \
    void swiglu_bwd(const Swiglu &);                        \
    void exp(const float *x, float *y, std::int64_t n);     \
    void tanh(const float *x, float *y, std::int64_t n);    \
    }

DOPSD_ROW_KERNELS(baseline)
DOPSD_ROW_KERNELS(avx2)
DOPSD_ROW_KERNELS(avx512)

}  // namespace dopsd
