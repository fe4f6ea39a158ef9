// dopsd_kernels._native: the module. Row operations: rows.cpp; AdamW: adamw_ema.cpp.
#include <nanobind/nanobind.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.hpp"

namespace nb = nanobind;

void register_adamw_ema(nb::module_ &m);
void register_rows(nb::module_ &m);

namespace {

int max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native CPU functions of dopsd_kernels.";
    m.def("max_threads", &max_threads, "Threads that the functions use by default (OpenMP's own number); 1 without OpenMP.");
    m.def("isa", &dopsd::isa_name, "Instruction set in use: \"baseline\", \"avx2\" or \"avx512\".");
    m.def("use_isa", &dopsd::use_isa, nb::arg("name"),
          "Use this instruction set from now on (for tests). ValueError where the processor or the build has it not.");
    register_rows(m);
    register_adamw_ema(m);
}
