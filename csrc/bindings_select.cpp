// The bindings of select_threshold and compact_active.
#include <pybind11/stl.h>

#include <limits>

#include "bindings.h"
#include "compact_active.h"
#include "select_threshold.h"

namespace py = pybind11;
using namespace py::literals;

namespace pecker {
namespace {

using Addresses = std::vector<Address>;
using Numels = std::vector<std::int64_t>;

struct Arrays {
  std::vector<SelectArray> all;
  std::int64_t numel;
};

Arrays checked_arrays(const Addresses& addresses, const Numels& numels) {
  check(addresses.size() == numels.size(), "expected as many numels as addresses");
  Arrays arrays{{}, 0};
  for (std::size_t i = 0; i < addresses.size(); ++i) {
    check(numels[i] >= 0, "expected numels >= 0");
    check(numels[i] <= std::numeric_limits<std::int64_t>::max() - arrays.numel,
          "expected fewer values in all");
    check(numels[i] == 0 || addresses[i], "expected the address of every array that has values");
    arrays.all.push_back({at<void>(addresses[i]), numels[i]});
    arrays.numel += numels[i];
  }
  return arrays;
}

Arrays checked_arrays(const Addresses& addresses, const Numels& numels, std::int64_t k) {
  Arrays arrays = checked_arrays(addresses, numels);
  check(1 <= k && k <= arrays.numel, "expected k from 1 to the number of values");
  return arrays;
}

template <typename Float>
std::pair<double, std::int64_t> selected(const Arrays& arrays, std::int64_t k, int threads) {
  const Selected found = select_threshold_cpu<Float>(arrays.all, k, threads);
  return {value_of<Float>(static_cast<Key<Float>>(found.key)), found.ties};
}

std::pair<double, std::int64_t> checked_select(const Addresses& addresses, const Numels& numels,
                                               bool is_double, std::int64_t k, int threads) {
  check(threads >= 1, "expected threads >= 1");
  const Arrays arrays = checked_arrays(addresses, numels, k);
  return is_double ? selected<double>(arrays, k, threads) : selected<float>(arrays, k, threads);
}

#if PECKER_CUDA
void check_workspace(Address workspace, std::int64_t bytes, std::int64_t needed) {
  check(workspace && workspace % sizeof(std::uint64_t) == 0, "expected an aligned address of the workspace");
  check(bytes >= needed, "expected a workspace of as many bytes as are needed");
}

void checked_select_cuda(const Addresses& addresses, const Numels& numels, bool is_double, std::int64_t k,
                         Address threshold, Address ties, Address workspace, std::int64_t workspace_bytes,
                         std::uintptr_t stream) {
  const Arrays arrays = checked_arrays(addresses, numels, k);
  check(threshold && ties, "expected the addresses of threshold and ties");
  check_workspace(workspace, workspace_bytes,
                  select_workspace_bytes(static_cast<std::int64_t>(arrays.all.size())));
  const auto select = is_double ? select_threshold_cuda<double> : select_threshold_cuda<float>;
  select(arrays.all, k, {at<void>(threshold), at<std::int64_t>(ties)}, at<void>(workspace), stream);
}

std::int64_t checked_compact_bytes(const Addresses& addresses, const Numels& numels, bool is_double) {
  const Arrays arrays = checked_arrays(addresses, numels);
  return is_double ? compact_workspace_bytes<double>(arrays.all) : compact_workspace_bytes<float>(arrays.all);
}

void checked_compact_cuda(const Addresses& addresses, const Numels& numels, bool is_double, Address threshold,
                          Address ties, Address index, std::int64_t capacity, Address offsets,
                          Address workspace, std::int64_t workspace_bytes, std::uintptr_t stream) {
  const Arrays arrays = checked_arrays(addresses, numels, capacity);
  check(threshold && ties && index && offsets,
        "expected the addresses of threshold, ties, index and offsets");
  check_workspace(workspace, workspace_bytes, checked_compact_bytes(addresses, numels, is_double));
  const auto compact = is_double ? compact_active_cuda<double> : compact_active_cuda<float>;
  compact(arrays.all, {at<void>(threshold), at<std::int64_t>(ties)},
          {at<std::int64_t>(index), capacity, at<std::int64_t>(offsets)}, at<void>(workspace), stream);
}
#endif

}  // namespace

void bind_select(py::module_& m) {
  m.def("select_threshold_cpu", checked_select,
        "The k-th largest value of arrays of float (or double), and how many equal to it are among the k.",
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "addresses"_a, "numels"_a, "is_double"_a,
        "k"_a, "threads"_a);
#if PECKER_CUDA
  m.def("select_workspace_bytes", select_workspace_bytes, "num_arrays"_a,
        "How large the workspace of select_threshold_cuda must be.");
  m.def("select_threshold_cuda", checked_select_cuda,
        "select_threshold_cpu in CUDA memory, on a stream of the current device; the results stay there.",
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "addresses"_a, "numels"_a, "is_double"_a,
        "k"_a, "threshold"_a, "ties"_a, "workspace"_a, "workspace_bytes"_a, "stream"_a);
  m.def("compact_workspace_bytes", checked_compact_bytes, py::kw_only(), "addresses"_a, "numels"_a,
        "is_double"_a, "How large the workspace of compact_active_cuda must be.");
  m.def("compact_active_cuda", checked_compact_cuda,
        "The positions of the active values in CUDA memory; csrc/compact_active.h describes the lists.",
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "addresses"_a, "numels"_a, "is_double"_a,
        "threshold"_a, "ties"_a, "index"_a, "capacity"_a, "offsets"_a, "workspace"_a, "workspace_bytes"_a,
        "stream"_a);
#endif
}

}  // namespace pecker
