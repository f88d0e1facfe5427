// Which instruction sets this build holds, and which one runs.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace qcompile {

extern const Kernels kReference;
#if defined(QCOMPILE_X86)
extern const Kernels kAvx2, kAvxVnni, kAvx512Vl, kAvx512Vnni, kAvx512Vbmi;
#elif defined(QCOMPILE_NEON)
extern const Kernels kNeon;
#endif

namespace {

const Kernels* const kAll[] = {
    &kReference,
#if defined(QCOMPILE_X86)
    &kAvx2, &kAvxVnni, &kAvx512Vl, &kAvx512Vnni, &kAvx512Vbmi,
#elif defined(QCOMPILE_NEON)
    &kNeon,
#endif
    nullptr,
};

}  // namespace

const Kernels* const* all_kernels() { return kAll; }

const Kernels* named_kernels(const char* name) {
  for (const Kernels* const* entry = kAll; *entry; ++entry) {
    if (std::strcmp((*entry)->name, name) == 0 && (*entry)->available()) return *entry;
  }
  return nullptr;
}

const Kernels* chosen_kernels() {
  const char* wanted = std::getenv("QCOMPILE_KERNEL");
  if (wanted && *wanted) return named_kernels(wanted);
  const Kernels* best = nullptr;
  for (const Kernels* const* entry = kAll; *entry; ++entry) {
    if ((*entry)->available()) best = *entry;
  }
  return best;
}

const char* kernel_names() {
  static char names[128];
  static const bool filled = [] {
    for (const Kernels* const* entry = kAll; *entry; ++entry) {
      if (!(*entry)->available()) continue;
      if (names[0]) std::strcat(names, ",");
      std::strcat(names, (*entry)->name);
    }
    return true;
  }();
  (void)filled;
  return names;
}

}  // namespace qcompile
