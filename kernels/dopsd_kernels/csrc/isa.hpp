// Which instruction set the kernels use. Every *_kernels.cpp is compiled once per set, with DOPSD_ISA its name and
// DOPSD_ISA_<name> defined, and puts everything in namespace dopsd::DOPSD_ISA; callers pick with `select`:
//
//     namespace dopsd { namespace baseline { void f(int); } namespace avx2 { void f(int); } namespace avx512 { void f(int); } }
//     select(baseline::f, avx2::f, avx512::f)(3);          // DOPSD_SELECT(f)(3) is short for it
//
// A *_kernels.cpp must not instantiate inline functions of the standard library (or nanobind): the linker keeps one copy
// of such a function for the whole module, and it could be the AVX-512 one.
#pragma once

namespace dopsd {

enum class Isa { baseline, avx2, avx512 };

// The set in use: the widest that this processor and operating system have, found when the module is loaded.
extern Isa isa_in_use;

const char *isa_name();

// Uses the named set from now on, for tests; std::invalid_argument where this build or processor does not have it.
void use_isa(const char *name);

#ifdef DOPSD_X86_ISAS
template <typename Function> Function *select(Function *baseline, Function *avx2, Function *avx512) {
    return isa_in_use == Isa::avx512 ? avx512 : isa_in_use == Isa::avx2 ? avx2 : baseline;
}
#define DOPSD_SELECT(function) \
    ::dopsd::select(&::dopsd::baseline::function, &::dopsd::avx2::function, &::dopsd::avx512::function)
#else
#define DOPSD_SELECT(function) (&::dopsd::baseline::function)
#endif

}  // namespace dopsd
