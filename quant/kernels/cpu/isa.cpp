// The instruction sets of this architecture, which of them this CPU has, and the one in use.
#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "api.h"

using namespace slotmoe;

namespace {

bool always() { return true; }

struct Choice {
    const Isa* isa;
    bool (*is_here)();
    bool automatic = true;  // else only where it is asked for
};

#if defined(__x86_64__)
// Which of the sets `is_avx512` and `is_vbmi` this CPU has beside AVX2 with FMA and F16C, and the system saves their
// registers. (Some compilers' __builtin_cpu_supports finds nothing on Windows.)
bool has(bool is_avx512, bool is_vbmi) {
    constexpr unsigned kFirst = 1u << 12 | 1u << 27 | 1u << 29;                       // FMA, OSXSAVE, F16C
    constexpr unsigned kWide = 1u << 8 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // BMI2; AVX-512 F, DQ, BW, VL
    const unsigned state = is_avx512 ? 0xe6 : 6, in_b = 1u << 5 | (is_avx512 ? kWide : 0);  // AVX2
    const unsigned in_c = (is_avx512 ? 1u << 11 : 0) | (is_vbmi ? 1u << 1 : 0);             // VNNI, VBMI
    unsigned a, b, c, d, saved, unused;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kFirst) != kFirst) return false;
    asm("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
    return (saved & state) == state && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & in_b) == in_b &&
           (c & in_c) == in_c;
}
bool has_avx2() { return has(false, false); }
bool has_avx512vnni() { return has(true, false); }
bool has_avx512vbmi() { return has(true, true); }
bool has_avxvnni() {
#ifdef SLOTMOE_EVEX
    return has_avx512vnni();
#else
    unsigned a = 0, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
#endif
}

// The processor has tiles and their products of bytes, and the system saves tiles and lets this process, which has to
// ask, use them.
bool has_amx() {
#if defined(__linux__)
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d = 0, saved, unused;
    if (!has_avx512vbmi() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return false;
    asm("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
    return (saved >> 17 & 3) == 3 && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

constexpr Choice kIsas[] = {  // best first
    {&isa_amx, has_amx},               {&isa_amx_plain, has_avx512vbmi, false}, {&isa_avx512vbmi, has_avx512vbmi},
    {&isa_avx512vnni, has_avx512vnni}, {&isa_avxvnni, has_avxvnni},             {&isa_avx2, has_avx2},
    {&isa_portable, always}};
#elif defined(__aarch64__)
#if defined(__APPLE__)
bool says(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dot() { return says("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dot() && says("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
bool has_dot() { return getauxval(AT_HWCAP) & 1 << 20; }  // HWCAP_ASIMDDP, HWCAP2_I8MM: older headers lack the names
bool has_i8mm() { return has_dot() && getauxval(AT_HWCAP2) & 1 << 13; }
#else
bool has_dot() { return false; }
bool has_i8mm() { return false; }
#endif

constexpr Choice kIsas[] = {
    {&isa_neon_i8mm, has_i8mm}, {&isa_neon_dot, has_dot}, {&isa_neon, always}, {&isa_portable, always}};  // best first
#else
constexpr Choice kIsas[] = {{&isa_portable, always}};
#endif

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

// The best that this CPU has, unless set otherwise. A job asks once: formats differ in detail between sets.
const Isa& slotmoe::best_isa() {
    for (const Choice* c = kIsas; !chosen.load(); c++)
        if (c->automatic && c->is_here()) chosen.store(c->isa);
    return *chosen.load();
}

bool slotmoe::in_halves() {
#if defined(__x86_64__)
    unsigned a = 0, b, c, d;
    static const unsigned family = __get_cpuid(1, &a, &b, &c, &d) ? (a >> 8 & 15) + (a >> 20 & 255) : 0;
    return family == 0x19 && chosen.load() == &isa_avx512vbmi;  // AMD's Zen 3 and 4; Intel's are another
#else
    return false;
#endif
}

EXPORT const char* slotmoe_isa() { return best_isa().name; }
EXPORT int slotmoe_isa_count() { return int(sizeof kIsas / sizeof *kIsas); }
EXPORT const char* slotmoe_isa_name(int i) { return kIsas[i].isa->name; }
EXPORT int slotmoe_isa_supported(int i) { return kIsas[i].is_here(); }
EXPORT int slotmoe_set_isa(const char* name) {
    for (const Choice& c : kIsas)
        if (strcmp(c.isa->name, name) == 0 && c.is_here()) {
            chosen.store(c.isa);
            return kOk;
        }
    return kBadArgument;
}
