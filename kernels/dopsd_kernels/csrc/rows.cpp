// The Python face of row_kernels.cpp. Arguments are addresses and strides as integers, 0 for what is missing: reading a
// tensor through DLPack costs more than a kernel at the nano model's sizes. native_ops.py is the only caller.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>

#include "isa.hpp"
#include "row_kernels.hpp"

namespace nb = nanobind;

namespace {

using namespace dopsd;
using Address = std::uintptr_t;
using Int = std::int64_t;

template <typename Element = float> Element *at(Address address) { return reinterpret_cast<Element *>(address); }
In rows(Address address, Int stride) { return {at<const float>(address), stride}; }

// Uninitialised memory for the length of a call.
struct Scratch {
    std::unique_ptr<float[]> memory;
    float *take(Int floats) {
        memory.reset(new float[static_cast<std::size_t>(floats)]);
        return memory.get();
    }
};

Layout layout(Int tokens, Int width, Int sequences, Address row_sequence) {
    return {tokens, sequences, width, at<const std::int32_t>(row_sequence)};
}

Int factor_rows(const Layout &l, const Factor &f) { return f.modulation ? l.sequences : 1; }

void give_table(const Layout &l, Factor &f, Scratch &scratch) { f.table = scratch.take(factor_rows(l, f) * l.width); }

// Only a call that makes sums over rows reads the chunks: any other may pass none.
void give_chunks(Layout &l, Address chunks, Int chunk_count) {
    if (!chunk_count && l.tokens)
        throw nb::value_error("chunks is empty: gradients of weights and modulations need Sequences.chunks");
    l.chunks = at<const std::int32_t>(chunks);
    l.chunk_count = chunk_count;
}

void give_sums(const Layout &l, const Factor &f, FactorGradient &g, Scratch &scratch) {
    if (!g.asked()) return;
    g.partial = scratch.take((l.chunk_count + factor_rows(l, f)) * l.width);
    g.sums = g.partial + l.chunk_count * l.width;
}

void rmsnorm_modulate_fwd(Int tokens, Int width, Int sequences, Address row_sequence, Address x, Int x_stride, Address weight,
                          Address scale, Int scale_stride, float eps, Address y, Address rstd) {
    const nb::gil_scoped_release unlocked;
    NormForward a{layout(tokens, width, sequences, row_sequence), rows(x, x_stride),
                  {at(weight), rows(scale, scale_stride)}, eps, at(y), at(rstd)};
    Scratch table;
    give_table(a.layout, a.factor, table);
    DOPSD_SELECT(rmsnorm_modulate_fwd)(a);
}

void rmsnorm_modulate_bwd(Int tokens, Int width, Int sequences, Address row_sequence, Address chunks, Int chunk_count,
                          Address dy, Int dy_stride, Address x, Int x_stride, Address weight, Address scale, Int scale_stride,
                          Address rstd, Address dx, Address dweight, Address dscale, Address y) {
    NormBackward a{layout(tokens, width, sequences, row_sequence), rows(dy, dy_stride),
                   rows(x, x_stride), {at(weight), rows(scale, scale_stride)}, at(rstd), at(dx),
                   {at(dweight), at(dscale)}, at(y)};
    Scratch table, sums;
    give_table(a.layout, a.factor, table);
    if (a.gradient.asked()) give_chunks(a.layout, chunks, chunk_count);
    give_sums(a.layout, a.factor, a.gradient, sums);
    const nb::gil_scoped_release unlocked;
    DOPSD_SELECT(rmsnorm_modulate_bwd)(a);
}

void layernorm_modulate_fwd(Int tokens, Int width, Int sequences, Address row_sequence, Address x, Int x_stride,
                            Address scale, Int scale_stride, Address shift, Int shift_stride, float eps, Address y,
                            Address mean, Address rstd) {
    const nb::gil_scoped_release unlocked;
    LayerNormForward a{layout(tokens, width, sequences, row_sequence), rows(x, x_stride),
                       {nullptr, rows(scale, scale_stride)}, rows(shift, shift_stride), eps, at(y), at(mean), at(rstd)};
    Scratch table;
    give_table(a.layout, a.factor, table);
    DOPSD_SELECT(layernorm_modulate_fwd)(a);
}

void layernorm_modulate_bwd(Int tokens, Int width, Int sequences, Address row_sequence, Address chunks, Int chunk_count,
                            Address dy, Int dy_stride, Address x, Int x_stride, Address scale, Int scale_stride, Address shift,
                            Int shift_stride, Address mean, Address rstd, Address dx, Address dscale, Address dshift,
                            Address y) {
    LayerNormBackward a{layout(tokens, width, sequences, row_sequence), rows(dy, dy_stride), rows(x, x_stride),
                        {nullptr, rows(scale, scale_stride)}, rows(shift, shift_stride), at(mean), at(rstd), at(dx),
                        {nullptr, at(dscale)}, {nullptr, at(dshift)}, at(y)};
    Scratch table, scale_sums, shift_sums;
    give_table(a.layout, a.factor, table);
    if (a.scale_gradient.asked() || a.shift_gradient.asked()) give_chunks(a.layout, chunks, chunk_count);
    give_sums(a.layout, a.factor, a.scale_gradient, scale_sums);
    give_sums(a.layout, {nullptr, a.shift}, a.shift_gradient, shift_sums);
    const nb::gil_scoped_release unlocked;
    DOPSD_SELECT(layernorm_modulate_bwd)(a);
}

void divergence_step_fwd(Int n, Address v_s, Address v_t, Address x, float gradient_scale, float dt, float rest,
                         Address mean_square, Address grad_v, Address x_next, Address x1_s, Address x1_t) {
    const nb::gil_scoped_release unlocked;
    const std::unique_ptr<double[]> sums(new double[static_cast<std::size_t>(n / Divergence::kBlock + 1)]);
    DOPSD_SELECT(divergence_step_fwd)({n, at(v_s), at(v_t), at(x), gradient_scale, dt, rest, at(mean_square), at(grad_v),
                                       at(x_next), at(x1_s), at(x1_t), sums.get()});
}

void gated_residual_norm_fwd(Int tokens, Int width, Int sequences, Address row_sequence, Address x, Int x_stride, Address h,
                             Int h_stride, Address weight, Address gate, Int gate_stride, Address next_weight,
                             Address next_scale, Int next_stride, float eps, Address r, Address y, Address rstd_h,
                             Address rstd_r) {
    const nb::gil_scoped_release unlocked;
    GatedForward a{layout(tokens, width, sequences, row_sequence), rows(x, x_stride), rows(h, h_stride),
                   {at(weight), rows(gate, gate_stride), true}, {at(next_weight), rows(next_scale, next_stride)}, eps,
                   at(r), at(y), at(rstd_h), at(rstd_r)};
    Scratch gate_table, next_table;
    give_table(a.layout, a.gate, gate_table);
    give_table(a.layout, a.next, next_table);
    DOPSD_SELECT(gated_residual_norm_fwd)(a);
}

void gated_residual_norm_bwd(Int tokens, Int width, Int sequences, Address row_sequence, Address chunks, Int chunk_count,
                             Address dr, Int dr_stride, Address dy, Int dy_stride, Address h, Int h_stride, Address r,
                             Int r_stride, Address weight, Address gate, Int gate_stride, Address next_weight,
                             Address next_scale, Int next_stride, Address rstd_h, Address rstd_r, Address dx, Address dh,
                             Address dweight, Address dgate, Address dnext_weight, Address dnext_scale, Address y) {
    GatedBackward a{layout(tokens, width, sequences, row_sequence), rows(dr, dr_stride),
                    rows(dy, dy_stride), rows(h, h_stride), rows(r, r_stride),
                    {at(weight), rows(gate, gate_stride), true}, {at(next_weight), rows(next_scale, next_stride)},
                    at(rstd_h), at(rstd_r), at(dx), at(dh), {at(dweight), at(dgate)}, {at(dnext_weight), at(dnext_scale)},
                    at(y)};
    Scratch gate_table, next_table, gate_sums, next_sums;
    give_table(a.layout, a.gate, gate_table);
    give_table(a.layout, a.next, next_table);
    if (a.gate_gradient.asked() || a.next_gradient.asked()) give_chunks(a.layout, chunks, chunk_count);
    give_sums(a.layout, a.gate, a.gate_gradient, gate_sums);
    give_sums(a.layout, a.next, a.next_gradient, next_sums);
    const nb::gil_scoped_release unlocked;
    DOPSD_SELECT(gated_residual_norm_bwd)(a);
}

void check_head_dim(Int head_dim) {
    if (head_dim > kMaxHeadDim) throw nb::value_error("qk_norm_rope: head dimension over 1024: use the torch backend");
}

void qk_norm_rope_fwd(Int tokens, Int heads, Int head_dim, Address qkv, Int qkv_stride, Address q_weight, Address k_weight,
                      Address cos, Int cos_stride, Address sin, Int sin_stride, float eps, Address q, Address k) {
    check_head_dim(head_dim);
    const nb::gil_scoped_release unlocked;
    const Int width = heads * head_dim;
    const In qs = rows(qkv, qkv_stride);
    Rope a{tokens, heads, head_dim, rows(cos, cos_stride), rows(sin, sin_stride), eps, {}};
    a.sides[0] = {.x = qs, .weight = at(q_weight), .y = {at(q), width}};
    a.sides[1] = {.x = {qs.data + width, qs.stride}, .weight = at(k_weight), .y = {at(k), width}};
    DOPSD_SELECT(qk_norm_rope_fwd)(a);
}

void qk_norm_rope_bwd(Int tokens, Int heads, Int head_dim, Address dq, Int dq_stride, Int dq_head_stride, Address dk,
                      Int dk_stride, Int dk_head_stride, Address qkv, Int qkv_stride, Address q_weight, Address k_weight,
                      Address cos, Int cos_stride, Address sin, Int sin_stride, float eps, Address dqk, Address dq_weight,
                      Address dk_weight) {
    check_head_dim(head_dim);
    const nb::gil_scoped_release unlocked;
    const Int width = heads * head_dim, piece_floats = (tokens / 64 + 1) * head_dim;
    const In qs = rows(qkv, qkv_stride);
    Scratch scratch;
    float *partial = dq_weight ? scratch.take(2 * piece_floats) : nullptr;
    Rope a{tokens, heads, head_dim, rows(cos, cos_stride), rows(sin, sin_stride), eps, {}};
    a.sides[0] = {.x = qs, .weight = at(q_weight), .dy = rows(dq, dq_stride), .dy_head_stride = dq_head_stride,
                  .dx = {at(dqk), 2 * width}, .dw = at(dq_weight), .partial = partial};
    a.sides[1] = {.x = {qs.data + width, qs.stride}, .weight = at(k_weight), .dy = rows(dk, dk_stride),
                  .dy_head_stride = dk_head_stride, .dx = {at(dqk) + width, 2 * width}, .dw = at(dk_weight),
                  .partial = partial ? partial + piece_floats : nullptr};
    DOPSD_SELECT(qk_norm_rope_bwd)(a);
}

void swiglu_fwd(Int tokens, Int width, Address gu, Int gu_stride, Address s) {
    const nb::gil_scoped_release unlocked;
    DOPSD_SELECT(swiglu_fwd)({tokens, width, rows(gu, gu_stride), {}, nullptr, at(s)});
}

void swiglu_bwd(Int tokens, Int width, Address ds, Int ds_stride, Address gu, Int gu_stride, Address dgu, Address s) {
    const nb::gil_scoped_release unlocked;
    DOPSD_SELECT(swiglu_bwd)({tokens, width, rows(gu, gu_stride), rows(ds, ds_stride), at(dgu), at(s)});
}

}  // namespace

void register_rows(nb::module_ &m) {
    m.def("rmsnorm_modulate_fwd", &rmsnorm_modulate_fwd);
    m.def("rmsnorm_modulate_bwd", &rmsnorm_modulate_bwd);
    m.def("layernorm_modulate_fwd", &layernorm_modulate_fwd);
    m.def("layernorm_modulate_bwd", &layernorm_modulate_bwd);
    m.def("divergence_step_fwd", &divergence_step_fwd);
    m.def("gated_residual_norm_fwd", &gated_residual_norm_fwd);
    m.def("gated_residual_norm_bwd", &gated_residual_norm_bwd);
    m.def("qk_norm_rope_fwd", &qk_norm_rope_fwd);
    m.def("qk_norm_rope_bwd", &qk_norm_rope_bwd);
    m.def("swiglu_fwd", &swiglu_fwd);
    m.def("swiglu_bwd", &swiglu_bwd);
    const auto elementwise = [&m](const char *name, auto select, const char *doc) {
        m.def(name, [select](Address x, Address y, Int n) { select()(at<const float>(x), at(y), n); }, doc);
    };
    elementwise("exp", [] { return DOPSD_SELECT(exp); }, "y = exp(x), n floats at two addresses; for the tests.");
    elementwise("tanh", [] { return DOPSD_SELECT(tanh); }, "y = tanh(x), n floats at two addresses; for the tests.");
}
