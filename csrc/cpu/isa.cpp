#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace pecker {
namespace {

struct Isa {
  const char* name;
  const SpanKernels* kernels;
  bool (*supported)();
};

#if defined(PECKER_X86_64)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2");
}
#endif

bool always() {
  return true;
}

const Isa kIsas[] = {
// widest first
#if defined(PECKER_X86_64)
    {"avx512", &avx512::kernels, has_avx512},
    {"avx2", &avx2::kernels, has_avx2},
#endif
    {"scalar", &scalar::kernels, always},
};

const Isa& widest() {
  for (const Isa& isa : kIsas) {
    if (isa.supported()) return isa;
  }
  throw std::logic_error("pecker_fast: no instruction set is supported");  // not reached: scalar always is
}

std::atomic<const Isa*>& selected() {
  static std::atomic<const Isa*> isa{&widest()};
  return isa;
}

std::string supported_names() {
  std::string names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  return names;
}

}  // namespace

const SpanKernels& selected_kernels() {
  return *selected().load()->kernels;
}

std::string selected_isa() {
  return selected().load()->name;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.emplace_back(isa.name);
  return names;
}

void use_isa(const std::optional<std::string>& name) {
  if (!name) {
    selected() = &widest();
    return;
  }
  for (const Isa& isa : kIsas) {
    if (*name == isa.name && isa.supported()) {
      selected() = &isa;
      return;
    }
  }
  throw std::invalid_argument("use_isa: expected one of " + supported_names() + " on this processor, got '" +
                              *name + "'");
}

}  // namespace pecker
