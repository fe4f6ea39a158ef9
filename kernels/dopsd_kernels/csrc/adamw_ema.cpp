// dopsd_kernels._native.adamw_ema: AdamW, the average of the weights and the bf16 copies in one pass over memory.
#include <cmath>
#include <cstdint>
#include <string>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef DOPSD_X86_ISAS
#include <immintrin.h>
#endif

#include "adamw_ema.hpp"

namespace nb = nanobind;

namespace {

using dopsd::AdamwEma;
using dopsd::kAdamwEmaBlock;

// Below this many elements starting threads costs more than the pass over memory.
constexpr std::int64_t kParallelFrom = 1 << 15;

// From this many elements on no cache holds the arrays until the next step.
constexpr std::int64_t kStreamFrom = 1 << 22;

constexpr nb::dlpack::dtype kFloat32{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 32, 1};
constexpr nb::dlpack::dtype kBfloat16{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
constexpr nb::dlpack::dtype kInt16{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Int), 16, 1};

[[noreturn]] void reject(const char *name, const std::string &what) {
    throw nb::value_error(("adamw_ema: " + std::string(name) + " " + what).c_str());
}

using Half = std::uint16_t;

// Checks that all arrays have the same number of elements, and are what the update needs.
class Arrays {
  public:
    // Whether `array` was given; if so, that it is a contiguous CPU array of the common size.
    template <typename Array> bool given(const Array &array, const char *name) {
        if (!array.is_valid()) return false;
        if (array.device_type() != nb::device::cpu::value) reject(name, "must be on the CPU");
        std::int64_t expected = 1;
        for (std::size_t d = array.ndim(); d-- > 0; expected *= static_cast<std::int64_t>(array.shape(d)))
            if (array.shape(d) > 1 && array.stride(d) != expected) reject(name, "must be contiguous");
        const auto found = static_cast<std::int64_t>(array.size());
        if (size < 0) size = found;
        if (size != found)
            reject(name, "has " + std::to_string(found) + " elements, the others have " + std::to_string(size));
        return true;
    }

    template <typename Element> Element *writable(const nb::ndarray<> &array, const char *name, nb::dlpack::dtype dtype,
                                                  const char *wanted) {
        if (!given(array, name)) return nullptr;
        if (array.dtype() != dtype) reject(name, std::string("must be ") + wanted);
        return static_cast<Element *>(array.data());
    }

    // A rounded copy: one of the two is set, or none where the array was not given.
    void copy(const nb::ndarray<> &array, const char *name, Half *&half, float *&single) {
        if (array.is_valid() && array.dtype() == kFloat32) single = fp32(array, name);
        else half = writable<Half>(array, name, kBfloat16, "bfloat16 or float32");
    }

    float *fp32(const nb::ndarray<> &array, const char *name) {
        return writable<float>(array, name, kFloat32, "float32");
    }

    std::int64_t size = -1;
};

void adamw_ema(nb::ndarray<> theta, nb::ndarray<nb::ro> grad, nb::ndarray<> exp_avg, nb::ndarray<> exp_avg_sq,
               nb::ndarray<> ema, nb::ndarray<> student, nb::ndarray<> teacher, double lr, double beta1, double beta2,
               double eps, double weight_decay, double decay, std::int64_t step, int threads, nb::ndarray<> theta_low,
               nb::ndarray<> ema_low, double grad_scale) {
    AdamwEma a;
    Arrays arrays;
    if (theta_low.is_valid()) {
        a.theta_high = arrays.writable<Half>(theta, "theta", kBfloat16, "bfloat16 beside theta_low");
        a.theta_low = arrays.writable<Half>(theta_low, "theta_low", kInt16, "int16");
    } else {
        a.theta = arrays.fp32(theta, "theta");
    }
    arrays.given(grad, "grad");
    if (grad.dtype() == kFloat32) a.grad = static_cast<const float *>(grad.data());
    else if (grad.dtype() == kBfloat16) a.grad_bf16 = static_cast<const Half *>(grad.data());
    else reject("grad", "must be float32 or bfloat16");
    a.exp_avg = arrays.fp32(exp_avg, "exp_avg");
    a.exp_avg_sq = arrays.fp32(exp_avg_sq, "exp_avg_sq");
    if (ema_low.is_valid()) {
        if (!ema.is_valid()) reject("ema_low", "needs ema, its upper half");
        a.ema_high = arrays.writable<Half>(ema, "ema", kBfloat16, "bfloat16 beside ema_low");
        a.ema_low = arrays.writable<Half>(ema_low, "ema_low", kInt16, "int16");
    } else {
        a.ema = arrays.fp32(ema, "ema");
    }
    arrays.copy(student, "student", a.student, a.student_fp32);
    if (teacher.is_valid() && !ema.is_valid()) reject("teacher", "needs ema, of which it is the copy");
    arrays.copy(teacher, "teacher", a.teacher, a.teacher_fp32);

    if (step < 1) reject("step", "must be 1 or more");
    if (!(beta1 >= 0.0 && beta1 < 1.0 && beta2 >= 0.0 && beta2 < 1.0)) reject("beta1, beta2", "must lie in 0..1, below 1");
    if (!(decay >= 0.0 && decay <= 1.0)) reject("decay", "must lie in 0..1");
    if (threads < 0) reject("threads", "must not be negative");

    const auto n = static_cast<double>(step);
    a.grad_scale = static_cast<float>(grad_scale);
    a.shrink = static_cast<float>(1.0 - lr * weight_decay);
    a.take_grad = static_cast<float>(1.0 - beta1);
    a.keep_square = static_cast<float>(beta2);
    a.take_square = static_cast<float>(1.0 - beta2);
    a.root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, n)));
    a.eps = static_cast<float>(eps);
    a.minus_step = static_cast<float>(-lr / (1.0 - std::pow(beta1, n)));
    a.take_theta = static_cast<float>(1.0 - decay);

    const std::int64_t size = arrays.size;
    a.stream = size >= kStreamFrom;
    const auto block = DOPSD_SELECT(adamw_ema_block);
#ifdef _OPENMP
    [[maybe_unused]] const int team = threads > 0 ? threads : omp_get_max_threads();
#endif

    nb::gil_scoped_release unlocked;
    // An element depends on its own inputs only, so the split over threads cannot change a bit.
#pragma omp parallel num_threads(team) if (size >= kParallelFrom && team > 1)
    {
#pragma omp for schedule(static) nowait
        for (std::int64_t begin = 0; begin < size; begin += kAdamwEmaBlock)
            block(a, begin, size - begin < kAdamwEmaBlock ? size : begin + kAdamwEmaBlock);
#ifdef DOPSD_X86_ISAS
        if (a.stream) _mm_sfence();
#endif
    }
}

}  // namespace

void register_adamw_ema(nb::module_ &m) {
    m.def("adamw_ema", &adamw_ema, nb::arg("theta").noconvert(), nb::arg("grad").noconvert(),
          nb::arg("exp_avg").noconvert(), nb::arg("exp_avg_sq").noconvert(), nb::arg("ema").noconvert().none(),
          nb::arg("student").noconvert().none(), nb::arg("teacher").noconvert().none(), nb::arg("lr"), nb::arg("beta1"),
          nb::arg("beta2"), nb::arg("eps"), nb::arg("weight_decay"), nb::arg("decay"), nb::arg("step"),
          nb::arg("threads") = 0, nb::arg("theta_low").noconvert().none() = nb::none(),
          nb::arg("ema_low").noconvert().none() = nb::none(), nb::arg("grad_scale") = 1.0,
          "One AdamW update, then the average of the weights, in place and in one pass over memory.\n\n"
          "    g = grad_scale * grad\n"
          "    theta *= 1 - lr * weight_decay;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2\n"
          "    theta -= lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)\n"
          "    ema = decay * ema + (1 - decay) * theta;  student = theta;  teacher = ema\n\n"
          "Contiguous CPU arrays of one size. theta, exp_avg (m), exp_avg_sq (v), ema: float32; grad: float32 or bfloat16;\n"
          "student, teacher: bfloat16 or float32; ema, student and teacher may be None. With theta_low (int16)\n"
          "theta is bfloat16 and the two hold the bits of a float32 (high = nearest bfloat16, low = the rest); likewise\n"
          "ema and ema_low. Computed in float32; the same bits for any number of threads\n"
          "(0: OpenMP's own). Releases the GIL. ValueError on a wrong dtype, size, layout or number.");
}
