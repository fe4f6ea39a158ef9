#include "isa.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

namespace dopsd {

namespace {

bool available(Isa isa) {
#ifdef DOPSD_X86_ISAS
    if (isa == Isa::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && available(Isa::avx2);
    if (isa == Isa::avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return isa == Isa::baseline;
}

Isa widest() {
#ifdef DOPSD_X86_ISAS
    __builtin_cpu_init();
#endif
    return available(Isa::avx512) ? Isa::avx512 : available(Isa::avx2) ? Isa::avx2 : Isa::baseline;
}

constexpr const char *kNames[] = {"baseline", "avx2", "avx512"};

}  // namespace

Isa isa_in_use = widest();

const char *isa_name() { return kNames[static_cast<int>(isa_in_use)]; }

void use_isa(const char *name) {
    for (int i = 0; i < 3; ++i)
        if (!std::strcmp(name, kNames[i]) && available(static_cast<Isa>(i))) {
            isa_in_use = static_cast<Isa>(i);
            return;
        }
    throw std::invalid_argument("use_isa: this processor or build has no \"" + std::string(name) +
                                "\"; leave the choice to the module");
}

}  // namespace dopsd
