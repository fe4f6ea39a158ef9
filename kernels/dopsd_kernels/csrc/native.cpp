// dopsd_kernels._native: the module, and ema_update. Row operations: rows.cpp; AdamW: adamw_ema.cpp.
#include <cstdint>
#include <string>
#include <type_traits>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.hpp"

namespace nb = nanobind;

void register_adamw_ema(nb::module_ &m);
void register_rows(nb::module_ &m);

namespace {

// Below this many elements starting threads costs more than the pass over memory.
constexpr std::int64_t kParallelFrom = 1 << 16;

[[noreturn]] void reject(const char *name, const std::string &what) {
    throw nb::value_error((std::string("ema_update: ") + name + " " + what).c_str());
}

// The array's address, once it is known to be float32 [n], contiguous, on the CPU.
template <typename Array> auto *float_vector(const Array &array, const char *name) {
    if (array.device_type() != nb::device::cpu::value) reject(name, "must be on the CPU");
    if (array.dtype() != nb::dtype<float>()) reject(name, "must be float32");
    if (array.ndim() != 1) reject(name, "must have one dimension, not " + std::to_string(array.ndim()));
    if (array.shape(0) > 1 && array.stride(0) != 1) reject(name, "must be contiguous");
    using Element = std::conditional_t<Array::ReadOnly, const float, float>;
    return static_cast<Element *>(array.data());
}

int max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

void ema_update(nb::ndarray<> ema, nb::ndarray<nb::ro> param, double decay, int threads) {
    float *e = float_vector(ema, "ema");
    const float *p = float_vector(param, "param");
    if (ema.shape(0) != param.shape(0))
        reject("param", "has " + std::to_string(param.shape(0)) + " elements, ema has " + std::to_string(ema.shape(0)));
    if (!(decay >= 0.0 && decay <= 1.0)) reject("decay", "must lie in 0..1");
    if (threads < 0) reject("threads", "must not be negative");

    const auto n = static_cast<std::int64_t>(ema.shape(0));
    const double keep = decay, take = 1.0 - decay;
    [[maybe_unused]] const int team = threads > 0 ? threads : max_threads();

    nb::gil_scoped_release unlocked;
    // In double and rounded once: in float32, decay + (1 - decay) is not 1 and the average would shrink (by 1.7e-4 at
    // 0.9999). Each element depends on its own two inputs only, so the split over threads cannot change a bit.
#pragma omp parallel for simd schedule(static) num_threads(team) if (n >= kParallelFrom && team > 1)
    for (std::int64_t i = 0; i < n; ++i)
        e[i] = static_cast<float>(keep * static_cast<double>(e[i]) + take * static_cast<double>(p[i]));
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native CPU functions of dopsd_kernels.";
    m.def("ema_update", &ema_update, nb::arg("ema").noconvert(), nb::arg("param").noconvert(), nb::arg("decay"),
          nb::arg("threads") = 0,
          "ema = decay * ema + (1 - decay) * param, in place.\n\n"
          "ema, param: float32 [n], contiguous, on the CPU (numpy arrays or torch tensors without grad).\n"
          "Computed in float64, rounded once to float32; the same bits for any number of threads (0: OpenMP's own).\n"
          "Releases the GIL. ValueError on a wrong dtype, shape, size or decay.");
    m.def("max_threads", &max_threads, "Threads that the functions use by default (OpenMP's own number); 1 without OpenMP.");
    m.def("isa", &dopsd::isa_name, "Instruction set in use: \"baseline\", \"avx2\" or \"avx512\".");
    m.def("use_isa", &dopsd::use_isa, nb::arg("name"),
          "Use this instruction set from now on (for tests). ValueError where the processor or the build has it not.");
    register_rows(m);
    register_adamw_ema(m);
}
