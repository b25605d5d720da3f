// What the files of bindings share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "scatter.h"

namespace pecker {

using Address = std::uintptr_t;

inline void check(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline ScatterTable scatter_table(Address dense_pointers, Address dense_dtypes, Address run_parameter,
                           Address run_dense_offset, Address run_flat_offset, Address tile_run,
                           std::int64_t num_parameters, std::int64_t num_runs) {
  check(num_parameters >= 0 && num_runs >= 0, "expected num_parameters >= 0 and num_runs >= 0");
  check(num_runs == 0 ||
            (dense_pointers && dense_dtypes && run_parameter && run_dense_offset && run_flat_offset),
        "expected the addresses of all five arrays of the scatter table when num_runs > 0");
  return {at<std::int64_t>(dense_pointers),
          at<std::int32_t>(dense_dtypes),
          at<std::int32_t>(run_parameter),
          at<std::int64_t>(run_dense_offset),
          at<std::int64_t>(run_flat_offset),
          at<std::int64_t>(tile_run),
          num_parameters,
          num_runs};
}

// A table in host memory is read here; the dtypes of one on a device are checked by whoever fills it.
inline void check_host_table(const ScatterTable& table, std::int64_t numel) {
  if (table.num_runs == 0) return;
  check(table.run_flat_offset[0] == 0 && table.run_flat_offset[table.num_runs] == numel,
        "expected run_flat_offset to start at 0 and to end at numel");
  for (std::int64_t p = 0; p < table.num_parameters; ++p) {
    check(0 <= table.dense_dtypes[p] && table.dense_dtypes[p] < kDenseDtypes,
          "expected dense_dtypes of 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)");
  }
}

inline void check_device_table(const ScatterTable& table) {
  check(table.num_runs == 0 || table.tile_run, "expected the address of tile_run when num_runs > 0");
}

void bind_reconcile(pybind11::module_& m);
void bind_select(pybind11::module_& m);

}  // namespace pecker
