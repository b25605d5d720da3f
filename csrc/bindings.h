// What the files of bindings share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

namespace pecker {

using Address = std::uintptr_t;

inline void check(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_select(pybind11::module_& m);

}  // namespace pecker
