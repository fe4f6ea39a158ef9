// The row operations behind dopsd_kernels/native_ops.py, compiled once per instruction set. Equations: the op's Python
// module. Work is split into pieces of fixed size whose results do not depend on which thread makes them; sums over rows
// are made per piece and then added in order.
#include "row_kernels.hpp"

#include <math.h>

#include "simd.hpp"

namespace dopsd::DOPSD_ISA {

namespace {

constexpr std::int64_t kPiece = 64;

// Below this many floats waking threads costs more than the work.
constexpr std::int64_t kParallelFrom = 1 << 14;

std::int64_t pieces(std::int64_t rows) { return (rows + kPiece - 1) / kPiece; }

float reciprocal_root(float sum_of_squares, std::int64_t width, float eps) {
    return 1.0f / sqrtf(sum_of_squares / static_cast<float>(width) + eps);
}

float sum_of_squares(const float *x, std::int64_t n) {
    return reduce(n, [=](auto i, auto tag, Vec sum) {
        const Vec a = load(x + i, tag);
        return fma(a, a, sum);
    });
}

void clear(float *p, std::int64_t n) { std::memset(p, 0, static_cast<std::size_t>(n) * sizeof(float)); }

void add(float *sum, const float *x, std::int64_t n) {
    columns(n, [=](auto i, auto tag) { store(sum + i, load(sum + i, tag) + load(x + i, tag), tag); });
}

// f(first row, one past the last, index of the piece), in parallel.
template <typename F> void for_pieces(const Layout &layout, F f) {
    [[maybe_unused]] const bool parallel = layout.tokens * layout.width >= kParallelFrom;
    const std::int64_t count = layout.chunks ? layout.chunk_count : pieces(layout.tokens);
#pragma omp parallel for schedule(static) if (parallel)
    for (std::int64_t c = 0; c < count; ++c) {
        if (layout.chunks) {
            f(layout.chunks[3 * c], layout.chunks[3 * c + 1], c);
        } else {
            const std::int64_t first = c * kPiece;
            f(first, first + kPiece < layout.tokens ? first + kPiece : layout.tokens, c);
        }
    }
}

// The factor as rows by sequence: one row for all (stride 0) without modulation.
In make_factor(const Factor &factor, const Layout &layout) {
    const std::int64_t width = layout.width;
    if (!factor.modulation && factor.weight) return {factor.weight, 0};
    const std::int64_t rows = factor.modulation ? layout.sequences : 1;
    for (std::int64_t s = 0; s < rows; ++s)
        columns(width, [&](auto i, auto tag) {
            Vec f = 1.0f;
            if (factor.modulation) {
                const Vec m = load(factor.modulation[s] + i, tag);
                f = factor.gated ? tanh(m) : m + 1.0f;
            }
            if (factor.weight) f = f * load(factor.weight + i, tag);
            store(factor.table + s * width + i, f, tag);
        });
    return {factor.table, factor.modulation ? width : 0};
}

// From partial[c] = sum over the rows of chunk c of dy * xhat to the gradients of the factor's weight and modulation.
void finish(const Layout &layout, const Factor &factor, const FactorGradient &gradient) {
    if (!gradient.asked()) return;
    const std::int64_t width = layout.width, sequences = factor.modulation ? layout.sequences : 1;
    clear(gradient.sums, sequences * width);
    for (std::int64_t c = 0; c < layout.chunk_count; ++c) {
        float *sums = gradient.sums + (factor.modulation ? layout.chunks[3 * c + 2] : 0) * width;
        add(sums, gradient.partial + c * width, width);
    }
    if (gradient.weight) clear(gradient.weight, width);
    for (std::int64_t s = 0; s < sequences; ++s)
        columns(width, [&](auto i, auto tag) {
            const Vec sum = load(gradient.sums + s * width + i, tag);
            Vec f = 1.0f, slope = 1.0f;
            if (factor.modulation) {
                const Vec m = load(factor.modulation[s] + i, tag);
                f = factor.gated ? tanh(m) : m + 1.0f;
                if (factor.gated) slope = Vec(1.0f) - f * f;
            }
            if (gradient.weight) store(gradient.weight + i, fma(sum, f, load(gradient.weight + i, tag)), tag);
            if (gradient.modulation) {
                if (factor.weight) slope = slope * load(factor.weight + i, tag);
                store(gradient.modulation + s * width + i, sum * slope, tag);
            }
        });
}

}  // namespace

void rmsnorm_modulate_fwd(const NormForward &a) {
    const std::int64_t width = a.layout.width;
    const In factor = make_factor(a.factor, a.layout);
    for_pieces(a.layout, [&](std::int64_t first, std::int64_t last, std::int64_t) {
        for (std::int64_t t = first; t < last; ++t) {
            const float *x = a.x[t], *f = factor[a.layout.row_sequence[t]];
            float *y = a.y + t * width;
            const float rstd = reciprocal_root(sum_of_squares(x, width), width, a.eps);
            a.rstd[t] = rstd;
            columns(width, [=](auto i, auto tag) { store(y + i, load(x + i, tag) * rstd * load(f + i, tag), tag); });
        }
    });
}

void rmsnorm_modulate_bwd(const NormBackward &a) {
    const std::int64_t width = a.layout.width;
    const In factor = make_factor(a.factor, a.layout);
    for_pieces(a.layout, [&](std::int64_t first, std::int64_t last, std::int64_t c) {
        float *partial = a.gradient.asked() ? a.gradient.partial + c * width : nullptr;
        if (partial) clear(partial, width);
        for (std::int64_t t = first; t < last; ++t) {
            const float *dy = a.dy[t], *x = a.x[t], *f = factor[a.layout.row_sequence[t]];
            float *dx = a.dx + t * width, *y = a.y ? a.y + t * width : nullptr;
            const Vec rstd = a.rstd[t];
            const float dot = reduce(width, [=](auto i, auto tag, Vec sum) {
                const Vec d = load(dy + i, tag), hat = load(x + i, tag) * rstd;
                if (partial) store(partial + i, fma(d, hat, load(partial + i, tag)), tag);
                return fma(d * load(f + i, tag), hat, sum);
            });
            const Vec mean = dot / static_cast<float>(width);
            columns(width, [=](auto i, auto tag) {
                const Vec hat = load(x + i, tag) * rstd, factor_i = load(f + i, tag);
                store(dx + i, rstd * (load(dy + i, tag) * factor_i - hat * mean), tag);
                if (y) store(y + i, hat * factor_i, tag);
            });
        }
    });
    finish(a.layout, a.factor, a.gradient);
}

void layernorm_modulate_fwd(const LayerNormForward &a) {
    const std::int64_t width = a.layout.width;
    const In factor = make_factor(a.factor, a.layout);
    for_pieces(a.layout, [&](std::int64_t first, std::int64_t last, std::int64_t) {
        for (std::int64_t t = first; t < last; ++t) {
            const std::int32_t s = a.layout.row_sequence[t];
            const float *x = a.x[t], *f = factor[s], *shift = a.shift ? a.shift[s] : nullptr;
            float *y = a.y + t * width;
            const float center = reduce(width, [=](auto i, auto tag, Vec sum) { return sum + load(x + i, tag); }) /
                                 static_cast<float>(width);
            columns(width, [=](auto i, auto tag) { store(y + i, load(x + i, tag) - center, tag); });
            const float rstd = reciprocal_root(sum_of_squares(y, width), width, a.eps);
            a.mean[t] = center;
            a.rstd[t] = rstd;
            columns(width, [=](auto i, auto tag) {
                const Vec value = load(y + i, tag) * rstd * load(f + i, tag);
                store(y + i, shift ? value + load(shift + i, tag) : value, tag);
            });
        }
    });
}

void layernorm_modulate_bwd(const LayerNormBackward &a) {
    const std::int64_t width = a.layout.width;
    const In factor = make_factor(a.factor, a.layout);
    for_pieces(a.layout, [&](std::int64_t first, std::int64_t last, std::int64_t c) {
        float *by_scale = a.scale_gradient.asked() ? a.scale_gradient.partial + c * width : nullptr;
        float *by_shift = a.shift_gradient.asked() ? a.shift_gradient.partial + c * width : nullptr;
        if (by_scale) clear(by_scale, width);
        if (by_shift) clear(by_shift, width);
        for (std::int64_t t = first; t < last; ++t) {
            const std::int32_t s = a.layout.row_sequence[t];
            const float *dy = a.dy[t], *x = a.x[t], *f = factor[s], *shift = a.shift ? a.shift[s] : nullptr;
            float *dx = a.dx + t * width, *y = a.y ? a.y + t * width : nullptr;
            const Vec rstd = a.rstd[t], center = a.mean[t];
            Vec total;
            const float dot = reduce(width, [&](auto i, auto tag, Vec sum) {
                const Vec d = load(dy + i, tag), hat = (load(x + i, tag) - center) * rstd, g = d * load(f + i, tag);
                if (by_scale) store(by_scale + i, fma(d, hat, load(by_scale + i, tag)), tag);
                if (by_shift) store(by_shift + i, load(by_shift + i, tag) + d, tag);
                total = total + g;
                return fma(g, hat, sum);
            });
            const Vec inner = dot / static_cast<float>(width), mean = sum(total) / static_cast<float>(width);
            columns(width, [=](auto i, auto tag) {
                const Vec hat = (load(x + i, tag) - center) * rstd, f_i = load(f + i, tag);
                store(dx + i, rstd * (load(dy + i, tag) * f_i - mean - hat * inner), tag);
                if (y) store(y + i, shift ? hat * f_i + load(shift + i, tag) : hat * f_i, tag);
            });
        }
    });
    finish(a.layout, a.factor, a.scale_gradient);
    finish(a.layout, Factor{nullptr, a.shift}, a.shift_gradient);
}

void divergence_step_fwd(const Divergence &a) {
    const std::int64_t blocks = (a.n + Divergence::kBlock - 1) / Divergence::kBlock;
    [[maybe_unused]] const bool parallel = a.n >= kParallelFrom;
#pragma omp parallel for schedule(static) if (parallel)
    for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t first = b * Divergence::kBlock;
        const std::int64_t n = a.n - first < Divergence::kBlock ? a.n - first : Divergence::kBlock;
        const float *v_s = a.v_s + first, *v_t = a.v_t + first, *x = a.x + first;
        float *grad_v = a.grad_v + first;
        a.sums[b] = reduce(n, [&](auto i, auto tag, Vec sum) {
            const Vec s = load(v_s + i, tag), t = load(v_t + i, tag), difference = s - t;
            store(grad_v + i, difference * a.gradient_scale, tag);
            if (a.x_next) store(a.x_next + first + i, fma(s, a.dt, load(x + i, tag)), tag);
            if (a.x1_s) {
                store(a.x1_s + first + i, fma(s, a.rest, load(x + i, tag)), tag);
                store(a.x1_t + first + i, fma(t, a.rest, load(x + i, tag)), tag);
            }
            return fma(difference, difference, sum);
        });
    }
    double total = 0.0;
    for (std::int64_t b = 0; b < blocks; ++b) total += a.sums[b];
    *a.mean_square = static_cast<float>(total / static_cast<double>(a.n > 0 ? a.n : 1));
}

void gated_residual_norm_fwd(const GatedForward &a) {
    const std::int64_t width = a.layout.width;
    const In gate = make_factor(a.gate, a.layout), next = a.y ? make_factor(a.next, a.layout) : In{};
    for_pieces(a.layout, [&](std::int64_t first, std::int64_t last, std::int64_t) {
        for (std::int64_t t = first; t < last; ++t) {
            const std::int32_t s = a.layout.row_sequence[t];
            const float *x = a.x[t], *h = a.h[t], *g = gate[s];
            float *r = a.r + t * width;
            const Vec rstd_h = a.rstd_h[t] = reciprocal_root(sum_of_squares(h, width), width, a.eps);
            const float squares = reduce(width, [=](auto i, auto tag, Vec sum) {
                const Vec value = fma(load(h + i, tag) * rstd_h, load(g + i, tag), load(x + i, tag));
                store(r + i, value, tag);
                return fma(value, value, sum);
            });
            if (!a.y) continue;
            float *y = a.y + t * width;
            const float *f = next[s];
            const Vec rstd_r = a.rstd_r[t] = reciprocal_root(squares, width, a.eps);
            columns(width, [=](auto i, auto tag) { store(y + i, load(r + i, tag) * rstd_r * load(f + i, tag), tag); });
        }
    });
}

void gated_residual_norm_bwd(const GatedBackward &a) {
    const std::int64_t width = a.layout.width;
    const bool has_next = a.dy || a.y;
    const In gate = make_factor(a.gate, a.layout), next = has_next ? make_factor(a.next, a.layout) : In{};
    for_pieces(a.layout, [&](std::int64_t first, std::int64_t last, std::int64_t c) {
        float *partial_h = a.gate_gradient.asked() ? a.gate_gradient.partial + c * width : nullptr;
        float *partial_r = a.next_gradient.asked() ? a.next_gradient.partial + c * width : nullptr;
        if (partial_h) clear(partial_h, width);
        if (partial_r) clear(partial_r, width);
        for (std::int64_t t = first; t < last; ++t) {
            const std::int32_t s = a.layout.row_sequence[t];
            const float *h = a.h[t], *r = a.r[t], *g = gate[s], *f = next[s];
            const float *dr = a.dr ? a.dr[t] : nullptr, *dy = a.dy ? a.dy[t] : nullptr;
            float *dx = a.dx + t * width, *dh = a.dh + t * width, *y = a.y ? a.y + t * width : nullptr;
            const Vec rstd_h = a.rstd_h[t], rstd_r = has_next ? a.rstd_r[t] : 0.0f;
            Vec mean_r = 0.0f;
            if (dy)
                mean_r = reduce(width, [=](auto i, auto tag, Vec sum) {
                    const Vec d = load(dy + i, tag), hat = load(r + i, tag) * rstd_r;
                    if (partial_r) store(partial_r + i, fma(d, hat, load(partial_r + i, tag)), tag);
                    return fma(d * load(f + i, tag), hat, sum);
                }) / static_cast<float>(width);
            const Vec mean_h = reduce(width, [=](auto i, auto tag, Vec sum) {
                Vec d = dr ? load(dr + i, tag) : Vec(0.0f);
                if (has_next) {
                    const Vec hat = load(r + i, tag) * rstd_r, f_i = load(f + i, tag);
                    if (dy) d = fma(rstd_r, load(dy + i, tag) * f_i - hat * mean_r, d);
                    if (y) store(y + i, hat * f_i, tag);
                }
                store(dx + i, d, tag);
                const Vec hat_h = load(h + i, tag) * rstd_h;
                if (partial_h) store(partial_h + i, fma(d, hat_h, load(partial_h + i, tag)), tag);
                return fma(d * load(g + i, tag), hat_h, sum);
            }) / static_cast<float>(width);
            columns(width, [=](auto i, auto tag) {
                const Vec hat_h = load(h + i, tag) * rstd_h;
                store(dh + i, rstd_h * (load(dx + i, tag) * load(g + i, tag) - hat_h * mean_h), tag);
            });
        }
    });
    finish(a.layout, a.gate, a.gate_gradient);
    finish(a.layout, a.next, a.next_gradient);
}

namespace {

// For pairs (a, b) and the row's angles, rotate gives (a cos - b sin, b cos + a sin); with `sign` -1 it turns back.
struct Rotation {
    float cos[kMaxHeadDim + Vec::width], sin[kMaxHeadDim + Vec::width];

    void set(const Rope &a, std::int64_t t, float sign) {
        alignas(64) static constexpr float kSigns[] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
        const Vec signs = load(kSigns, Whole{}) * sign;
        const float *c = a.cos[t], *s = a.sin[t];
        columns(a.head_dim, [=, this](auto i, auto tag) {
            store(cos + i, load_twice(c + i / 2, tag), Whole{});
            store(sin + i, load_twice(s + i / 2, tag) * signs, Whole{});
        });
    }
    Vec operator()(Vec v, std::int64_t i) const {
        return fma(v, load(cos + i, Whole{}), swap_pairs(v) * load(sin + i, Whole{}));
    }
};

void rope_heads(const Rope &a, const RopeSide &side, const Rotation &rotate, std::int64_t t) {
    const std::int64_t width = a.head_dim;
    const float *weight = side.weight;
    for (std::int64_t head = 0; head < a.heads; ++head) {
        const float *x = side.x[t] + head * width;
        float *y = side.y[t] + head * width;
        if (!weight) {
            columns(width, [&](auto i, auto tag) { store(y + i, rotate(load(x + i, tag), i), tag); });
            continue;
        }
        const Vec rstd = reciprocal_root(sum_of_squares(x, width), width, a.eps);
        columns(width, [&](auto i, auto tag) {
            store(y + i, rotate(load(x + i, tag) * rstd * load(weight + i, tag), i), tag);
        });
    }
}

// The gradient of rope_heads for row t; adds to dw, which is padded to whole vectors.
void rope_heads_back(const Rope &a, const RopeSide &side, const Rotation &rotate_back, std::int64_t t, float *dw) {
    float gradient[kMaxHeadDim + Vec::width];
    const std::int64_t width = a.head_dim;
    const float *weight = side.weight;
    for (std::int64_t head = 0; head < a.heads; ++head) {
        const float *x = side.x[t] + head * width, *dy = side.dy[t] + head * side.dy_head_stride;
        float *dx = side.dx[t] + head * width;
        if (!weight) {
            columns(width, [&](auto i, auto tag) { store(dx + i, rotate_back(load(dy + i, tag), i), tag); });
            continue;
        }
        Vec squares, dot;
        columns(width, [&](auto i, auto tag) {
            const Vec g = rotate_back(load(dy + i, tag), i), v = load(x + i, tag);
            store(gradient + i, g, Whole{});
            squares = fma(v, v, squares);
            dot = fma(g * load(weight + i, tag), v, dot);
        });
        const float scale = reciprocal_root(sum(squares), width, a.eps);
        const Vec rstd = scale, mean = sum(dot) * scale / static_cast<float>(width);
        columns(width, [&](auto i, auto tag) {
            const Vec hat = load(x + i, tag) * rstd, g = load(gradient + i, Whole{});
            if (dw) store(dw + i, fma(g, hat, load(dw + i, Whole{})), Whole{});
            store(dx + i, rstd * (g * load(weight + i, tag) - hat * mean), tag);
        });
    }
}

}  // namespace

void qk_norm_rope_fwd(const Rope &a) {
    for_pieces({a.tokens, 0, 2 * a.heads * a.head_dim, nullptr}, [&](std::int64_t first, std::int64_t last, std::int64_t) {
        Rotation rotate;
        for (std::int64_t t = first; t < last; ++t) {
            rotate.set(a, t, 1.0f);
            for (const RopeSide &side : a.sides) rope_heads(a, side, rotate, t);
        }
    });
}

void qk_norm_rope_bwd(const Rope &a) {
    const std::int64_t width = a.head_dim, padded = width + Vec::width;
    // Sums of about 32 terms at a time: a sum of heads * 64 terms one after the other would round too often.
    const std::int64_t group = a.heads < 32 ? 32 / a.heads : 1;
    for_pieces({a.tokens, 0, 2 * a.heads * width, nullptr}, [&](std::int64_t first, std::int64_t last, std::int64_t c) {
        Rotation rotate_back;
        float dw[2][kMaxHeadDim + Vec::width];
        for (const RopeSide &side : a.sides)
            if (side.dw) clear(side.partial + c * width, width);
        for (std::int64_t t = first; t < last; t += group) {
            for (float *sums : dw) clear(sums, padded);
            for (std::int64_t row = t; row < last && row < t + group; ++row) {
                rotate_back.set(a, row, -1.0f);
                for (int i = 0; i < 2; ++i)
                    rope_heads_back(a, a.sides[i], rotate_back, row, a.sides[i].dw ? dw[i] : nullptr);
            }
            for (int i = 0; i < 2; ++i)
                if (a.sides[i].dw) add(a.sides[i].partial + c * width, dw[i], width);
        }
    });
    for (const RopeSide &side : a.sides) {
        if (!side.dw) continue;
        clear(side.dw, width);
        for (std::int64_t c = 0; c < pieces(a.tokens); ++c) add(side.dw, side.partial + c * width, width);
    }
}

void swiglu_fwd(const Swiglu &a) {
    const std::int64_t width = a.width;
    for_pieces({a.tokens, 0, width, nullptr}, [&](std::int64_t first, std::int64_t last, std::int64_t) {
        for (std::int64_t t = first; t < last; ++t) {
            const float *g = a.gu[t], *u = g + width;
            float *s = a.s + t * width;
            columns(width, [=](auto i, auto tag) {
                const Vec gate = load(g + i, tag);
                store(s + i, gate / (exp(Vec(0.0f) - gate) + 1.0f) * load(u + i, tag), tag);
            });
        }
    });
}

void swiglu_bwd(const Swiglu &a) {
    const std::int64_t width = a.width;
    for_pieces({a.tokens, 0, width, nullptr}, [&](std::int64_t first, std::int64_t last, std::int64_t) {
        for (std::int64_t t = first; t < last; ++t) {
            const float *g = a.gu[t], *u = g + width, *ds = a.ds[t];
            float *dg = a.dgu + t * 2 * width, *du = dg + width, *s = a.s ? a.s + t * width : nullptr;
            columns(width, [=](auto i, auto tag) {
                const Vec gate = load(g + i, tag), up = load(u + i, tag), d = load(ds + i, tag);
                const Vec e = exp(Vec(0.0f) - gate), sigma = Vec(1.0f) / (e + 1.0f), silu = gate * sigma;
                // 1 - sigma = e * sigma, without its cancellation
                store(dg + i, d * up * sigma * fma(gate, e * sigma, 1.0f), tag);
                store(du + i, d * silu, tag);
                if (s) store(s + i, silu * up, tag);
            });
        }
    });
}

void exp(const float *x, float *y, std::int64_t n) {
    columns(n, [=](auto i, auto tag) { store(y + i, exp(load(x + i, tag)), tag); });
}

void tanh(const float *x, float *y, std::int64_t n) {
    columns(n, [=](auto i, auto tag) { store(y + i, tanh(load(x + i, tag)), tag); });
}

}  // namespace dopsd::DOPSD_ISA
