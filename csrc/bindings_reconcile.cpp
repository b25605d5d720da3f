// What the native module has of reconcile.h.
#include "bindings.h"
#include "reconcile.h"

namespace py = pybind11;
using namespace py::literals;

namespace pecker {
namespace {

template <typename Where>
using Checksums = void (*)(std::int64_t, const ScatterTable&, std::int64_t, std::uint64_t*, Where);
template <typename Where>
using Reconcile = void (*)(float*, std::int64_t, const ScatterTable&, const Reconciliation&, std::int64_t,
                           std::uint64_t*, Where);

void checksums_cpu(std::int64_t numel, const ScatterTable& table, std::int64_t base, std::uint64_t* sums,
                   int threads) {
  check(threads >= 1, "expected threads >= 1");
  check_host_table(table, numel);
  dense_checksums_cpu(numel, table, base, sums, threads);
}

void checked_reconcile_cpu(float* value, std::int64_t numel, const ScatterTable& table, const Reconciliation& which,
                           std::int64_t base, std::uint64_t* sums, int threads) {
  check(threads >= 1, "expected threads >= 1");
  check_host_table(table, numel);
  reconcile_cpu(value, numel, table, which, base, sums, threads);
}

#if PECKER_CUDA
void checksums_cuda(std::int64_t numel, const ScatterTable& table, std::int64_t base, std::uint64_t* sums,
                    std::uintptr_t stream) {
  check_device_table(table);
  dense_checksums_cuda(numel, table, base, sums, stream);
}

void checked_reconcile_cuda(float* value, std::int64_t numel, const ScatterTable& table, const Reconciliation& which,
                            std::int64_t base, std::uint64_t* sums, std::uintptr_t stream) {
  check_device_table(table);
  reconcile_cuda(value, numel, table, which, base, sums, stream);
}
#endif

template <typename Where>
void def_checksums(py::module_& m, const char* name, const py::arg& where_name, Checksums<Where> checksums) {
  const auto function = [checksums](Address sums, std::int64_t numel, std::int64_t base, Address dense_pointers,
                                    Address dense_dtypes, Address run_parameter, Address run_dense_offset,
                                    Address run_flat_offset, Address tile_run, std::int64_t num_parameters,
                                    std::int64_t num_runs, Where where) {
    check(numel >= 0 && base >= 0, "expected numel >= 0 and base >= 0");
    check(num_runs == 0 || sums, "expected the address of sums");
    checksums(numel,
              scatter_table(dense_pointers, dense_dtypes, run_parameter, run_dense_offset, run_flat_offset, tile_run,
                            num_parameters, num_runs),
              base, at<std::uint64_t>(sums), where);
  };
  m.def(name, function, "Adds the checksum of every parameter's active weights in the dense tensors to sums.",
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "sums"_a, "numel"_a, "base"_a, "dense_pointers"_a,
        "dense_dtypes"_a, "run_parameter"_a, "run_dense_offset"_a, "run_flat_offset"_a, "tile_run"_a = 0,
        "num_parameters"_a, "num_runs"_a, where_name);
}

template <typename Where>
void def_reconcile(py::module_& m, const char* name, const py::arg& where_name, Reconcile<Where> reconcile) {
  const auto function = [reconcile](Address value, Address written, bool follow, Address sums, std::int64_t numel,
                                    std::int64_t base, Address dense_pointers, Address dense_dtypes,
                                    Address run_parameter, Address run_dense_offset, Address run_flat_offset,
                                    Address tile_run, std::int64_t num_parameters, std::int64_t num_runs,
                                    Where where) {
    check(numel >= 0 && base >= 0, "expected numel >= 0 and base >= 0");
    check(num_runs == 0 || (value && written && sums), "expected the addresses of value, written and sums");
    reconcile(at<float>(value), numel,
              scatter_table(dense_pointers, dense_dtypes, run_parameter, run_dense_offset, run_flat_offset, tile_run,
                            num_parameters, num_runs),
              {at<bool>(written), follow}, base, at<std::uint64_t>(sums), where);
  };
  m.def(name, function, "Brings a flat buffer and the dense tensors together, and adds to the checksums.",
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "value"_a, "written"_a, "follow"_a, "sums"_a,
        "numel"_a, "base"_a, "dense_pointers"_a, "dense_dtypes"_a, "run_parameter"_a, "run_dense_offset"_a,
        "run_flat_offset"_a, "tile_run"_a = 0, "num_parameters"_a, "num_runs"_a, where_name);
}

}  // namespace

void bind_reconcile(py::module_& m) {
  def_checksums<int>(m, "dense_checksums_cpu", "threads"_a, checksums_cpu);
  def_reconcile<int>(m, "reconcile_cpu", "threads"_a, checked_reconcile_cpu);
#if PECKER_CUDA
  def_checksums<std::uintptr_t>(m, "dense_checksums_cuda", "stream"_a, checksums_cuda);
  def_reconcile<std::uintptr_t>(m, "reconcile_cuda", "stream"_a, checked_reconcile_cuda);
#endif
}

}  // namespace pecker
