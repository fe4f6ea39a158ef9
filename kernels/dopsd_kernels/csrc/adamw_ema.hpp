// The arrays and numbers of one AdamW + EMA update; see adamw_ema.cpp for what it computes.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace dopsd {

// A null pointer: not asked for. Exactly one of (theta) and (theta_high, theta_low) is given, one of the two gradients, at
// most one of (ema) and (ema_high, ema_low), of (student) and (student_fp32), of (teacher) and (teacher_fp32). `_high`, `_low`: the halves of a float, as `split` in adamw_ema_kernels.cpp
// makes them; `_high`, like every other uint16_t here, is a bfloat16.
struct AdamwEma {
    float *theta = nullptr;
    std::uint16_t *theta_high = nullptr, *theta_low = nullptr;
    const float *grad = nullptr;
    const std::uint16_t *grad_bf16 = nullptr;
    float *exp_avg = nullptr, *exp_avg_sq = nullptr;
    float *ema = nullptr;
    std::uint16_t *ema_high = nullptr, *ema_low = nullptr;
    std::uint16_t *student = nullptr, *teacher = nullptr;
    float *student_fp32 = nullptr, *teacher_fp32 = nullptr;
    bool stream = false;  // writes student and teacher past the caches; the thread must then end with a store fence

    float grad_scale;   // of every gradient as it is read
    float shrink;       // 1 - lr * weight_decay
    float take_grad;    // 1 - beta1
    float keep_square;  // beta2
    float take_square;  // 1 - beta2
    float root;         // 1 / sqrt(1 - beta2^step)
    float eps;
    float minus_step;   // -lr / (1 - beta1^step)
    float take_theta;   // 1 - decay
};

// Elements that are updated together. Large arrays begin at the same place of a page, so that their blocks compete for the
// same sets of the first-level cache: with 1024 elements they no longer stay there between the stages of the update, which
// costs 15%, and with halves, which take more stages, 60%.
constexpr std::int64_t kAdamwEmaBlock = 256;

using AdamwEmaBlock = void(const AdamwEma &, std::int64_t begin, std::int64_t end);  // end - begin <= kAdamwEmaBlock

namespace baseline {
AdamwEmaBlock adamw_ema_block;
}
namespace avx2 {
AdamwEmaBlock adamw_ema_block;
}
namespace avx512 {
AdamwEmaBlock adamw_ema_block;
}

}  // namespace dopsd
