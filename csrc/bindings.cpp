// The native module on one page. Addresses and sizes go in, so the module links no torch. The Python ops
// check shapes and devices; here only what would be unsafe is checked again.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <limits>

#include "accumulate_saliency.h"
#include "cpu/isa.h"
#include "masked_adamw.h"
#include "probe.h"
#include "scatter.h"
#include "shifted_rows.h"

namespace py = pybind11;
using namespace py::literals;

namespace pecker {
namespace {

SaliencyKind checked_kind(int kind) {
  check(0 <= kind && kind < kSaliencyKinds,
        "expected a saliency kind of 0 (signed sum), 1 (abs) or 2 (square)");
  return static_cast<SaliencyKind>(kind);
}

void checked_step_cpu(const AdamwBuffers& buffers, const AdamwSettings& settings, const ScatterTable& table,
                      int threads) {
  check(threads >= 1, "expected threads >= 1");
  check_host_table(table, buffers.numel);
  masked_adamw_cpu(buffers, adamw_constants(settings), table, threads);
}

// Binds an AdamW step. Where it runs (threads, or numbers in device memory and a stream) are its last arguments.
template <typename... Where, typename... Names>
void def_masked_adamw(py::module_& m, const char* name, const char* doc,
                      void (*step)(const AdamwBuffers&, const AdamwSettings&, const ScatterTable&, Where...),
                      const Names&... where_names) {
  const auto function = [step](Address value, Address grad, Address exp_avg, Address exp_avg_sq, Address ema,
                               Address saliency, std::int64_t numel, std::int64_t number, double lr,
                               double beta1, double beta2, double eps, double weight_decay, double clip_value,
                               double ema_decay, int saliency_kind, Address dense_pointers,
                               Address dense_dtypes, Address run_parameter, Address run_dense_offset,
                               Address run_flat_offset, Address tile_run, std::int64_t num_parameters,
                               std::int64_t num_runs, Where... where) {
    check(numel >= 0, "expected numel >= 0");
    check(number >= 1, "expected step >= 1");
    check(numel == 0 || (value && grad && exp_avg_sq),
          "expected the addresses of value, grad and exp_avg_sq");
    check(numel == 0 || exp_avg || beta1 == 0.0, "expected the address of exp_avg when beta1 is not 0");
    const AdamwBuffers buffers{at<float>(value),      at<float>(grad), at<float>(exp_avg),
                               at<float>(exp_avg_sq), at<float>(ema),  at<float>(saliency), numel};
    const AdamwSettings settings{number,       lr,         beta1,     beta2,                      eps,
                                 weight_decay, clip_value, ema_decay, checked_kind(saliency_kind)};
    const ScatterTable table = scatter_table(dense_pointers, dense_dtypes, run_parameter, run_dense_offset,
                                             run_flat_offset, tile_run, num_parameters, num_runs);
    step(buffers, settings, table, where...);
  };
  m.def(name, function, doc, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "value"_a, "grad"_a,
        "exp_avg"_a, "exp_avg_sq"_a, "ema"_a, "saliency"_a, "numel"_a, "step"_a, "lr"_a, "beta1"_a, "beta2"_a,
        "eps"_a, "weight_decay"_a, "clip_value"_a = std::numeric_limits<double>::infinity(),
        "ema_decay"_a = 0.0, "saliency_kind"_a = 0, "dense_pointers"_a = 0, "dense_dtypes"_a = 0,
        "run_parameter"_a = 0, "run_dense_offset"_a = 0, "run_flat_offset"_a = 0, "tile_run"_a = 0,
        "num_parameters"_a = 0, "num_runs"_a = 0, where_names...);
}

void checked_scatter_cpu(const float* value, std::int64_t numel, const ScatterTable& table, int threads) {
  check(threads >= 1, "expected threads >= 1");
  check_host_table(table, numel);
  scatter_cpu(value, numel, table, threads);
}

template <typename Where>
void def_scatter(py::module_& m, const char* name, const char* doc, const py::arg& where_name,
                 void (*scatter)(const float*, std::int64_t, const ScatterTable&, Where)) {
  const auto function = [scatter](Address value, std::int64_t numel, Address dense_pointers,
                                  Address dense_dtypes, Address run_parameter, Address run_dense_offset,
                                  Address run_flat_offset, Address tile_run, std::int64_t num_parameters,
                                  std::int64_t num_runs, Where where) {
    check(numel >= 0, "expected numel >= 0");
    check(numel == 0 || value, "expected the address of value");
    scatter(at<float>(value), numel,
            scatter_table(dense_pointers, dense_dtypes, run_parameter, run_dense_offset, run_flat_offset,
                          tile_run, num_parameters, num_runs),
            where);
  };
  m.def(name, function, doc, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "value"_a, "numel"_a,
        "dense_pointers"_a, "dense_dtypes"_a, "run_parameter"_a, "run_dense_offset"_a, "run_flat_offset"_a,
        "tile_run"_a = 0, "num_parameters"_a, "num_runs"_a, where_name);
}

#if PECKER_CUDA
void checked_step_cuda(const AdamwBuffers& buffers, const AdamwSettings& settings, const ScatterTable& table,
                       Address step_tensor, Address lr_tensor, bool lr_is_double, Address constants,
                       std::uintptr_t stream) {
  check_device_table(table);
  check(constants % alignof(AdamwConstants) == 0, "expected constants at a multiple of 16");
  check((step_tensor || lr_tensor) == (constants != 0), "expected constants with step_tensor or lr_tensor, else none");
  const AdamwDeviceNumbers numbers{at<float>(step_tensor), at<void>(lr_tensor), lr_is_double,
                                   at<AdamwConstants>(constants)};
  masked_adamw_cuda(buffers, settings, numbers, table, stream);
}

void checked_scatter_cuda(const float* value, std::int64_t numel, const ScatterTable& table, std::uintptr_t stream) {
  check_device_table(table);
  scatter_cuda(value, numel, table, stream);
}
#endif

SaliencyGrad saliency_grad(Address grad, int dtype, int kind) {
  check(0 <= dtype && dtype < kDenseDtypes,
        "expected grad_dtype of 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)");
  return {at<void>(grad), static_cast<DenseDtype>(dtype), checked_kind(kind)};
}

void checked_accumulate(Address total, bool total_is_double, Address grad, int grad_dtype, int kind,
                        std::int64_t numel, int threads) {
  check(threads >= 1, "expected threads >= 1");
  check(numel >= 0, "expected numel >= 0");
  check(numel == 0 || (total && grad), "expected the addresses of total and grad");
  accumulate_saliency_cpu({at<void>(total), total_is_double}, saliency_grad(grad, grad_dtype, kind), numel,
                          threads);
}

void checked_accumulate_blocks(Address total, bool total_is_double, Address grad, int grad_dtype, int kind,
                               const std::array<std::int64_t, 4>& view,
                               const std::array<std::int64_t, 2>& block, int threads) {
  check(threads >= 1, "expected threads >= 1");
  for (const std::int64_t extent : view) check(extent >= 0, "expected extents of the view >= 0");
  for (const std::int64_t extent : block) check(extent >= 1, "expected extents of the block >= 1");
  const BlockLayout layout{view[0], view[1], view[2], view[3], block[0], block[1]};
  const bool sums_nothing = layout.repeat * layout.unit == 0 || layout.out * layout.in == 0;
  check(layout.out * layout.in == 0 || total, "expected the address of total");
  check(sums_nothing || grad, "expected the address of grad");
  accumulate_block_saliency_cpu({at<void>(total), total_is_double}, saliency_grad(grad, grad_dtype, kind),
                                layout, threads);
}

void checked_shifted_rows(Address grad, std::int64_t element_size,
                          const std::array<std::int64_t, 4>& grad_shape, Address rows, std::int64_t num_rows,
                          const std::array<std::int64_t, 2>& kernel,
                          const std::array<std::int64_t, 2>& around, const std::array<std::int64_t, 2>& size,
                          Address out, int threads) {
  check(threads >= 1, "expected threads >= 1");
  check(element_size == 2 || element_size == 4 || element_size == 8, "expected element_size of 2, 4 or 8");
  for (const std::int64_t extent : grad_shape) check(extent >= 0, "expected extents of grad_shape >= 0");
  check(num_rows >= 0 && size[0] >= 0 && size[1] >= 0, "expected num_rows >= 0 and extents of size >= 0");
  const auto [batch, height, width, channels] = grad_shape;
  for (int d = 0; d < 2; ++d) {
    check(kernel[d] >= 1 && around[d] >= 0, "expected extents of kernel >= 1 and of around >= 0");
    check(grad_shape[1 + d] + 2 * around[d] == size[d] + kernel[d] - 1,
          "expected grad_shape + 2 around = size + kernel - 1");
  }
  const bool empty = batch * size[0] * size[1] * num_rows == 0;
  check(empty || (out && rows && (grad || height * width == 0)), "expected the addresses of grad, rows and out");
  for (std::int64_t r = 0; r < num_rows; ++r) {
    check(0 <= at<std::int64_t>(rows)[r] && at<std::int64_t>(rows)[r] < channels, "expected rows < channels");
  }
  if (empty) return;
  shifted_rows_cpu({at<void>(grad), element_size, batch, height, width, channels, at<std::int64_t>(rows),
                    num_rows, kernel[0], kernel[1], around[0], around[1], size[0], size[1]},
                   at<void>(out), threads);
}

py::dict build_info() {
  return py::dict("version"_a = PECKER_VERSION, "compiler"_a = PECKER_COMPILER, "cuda"_a = bool(PECKER_CUDA),
                  "cuda_architectures"_a = PECKER_CUDA_ARCHITECTURES, "isa_compiled"_a = compiled_isas(),
                  "isa_selected"_a = selected_isa());
}

}  // namespace
}  // namespace pecker

PYBIND11_MODULE(_C, m) {
  using namespace pecker;
  m.doc() = R"(Native kernels of pecker_fast.

Addresses are integers (tensor.data_ptr(), 0 for none) of memory that the caller keeps. Buffers are float32
(numel,); exp_avg, ema and saliency may be 0. csrc/scatter.h describes the scatter table; without runs it may
be 0.)";

  def_masked_adamw(m, "masked_adamw_cpu",
                   "One AdamW step on flat buffers, and the new values to the dense tensors.", checked_step_cpu,
                   "threads"_a);
  def_scatter(m, "scatter_cpu", "Copies a flat buffer to the dense tensors.", "threads"_a,
              checked_scatter_cpu);
  bind_reconcile(m);
  bind_select(m);
  m.def("accumulate_saliency_cpu", checked_accumulate,
        "Adds a gradient, its magnitude or its square to a running saliency of the same layout.",
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "total"_a, "total_is_double"_a, "grad"_a,
        "grad_dtype"_a, "kind"_a, "numel"_a, "threads"_a);
  m.def("accumulate_block_saliency_cpu", checked_accumulate_blocks,
        "The same summed over blocks; csrc/accumulate_saliency.h describes view and block.",
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "total"_a, "total_is_double"_a, "grad"_a,
        "grad_dtype"_a, "kind"_a, "view"_a, "block"_a, "threads"_a);
  m.def("shifted_rows_cpu", checked_shifted_rows,
        "Some channels of a channels-last gradient, shifted by every tap; csrc/shifted_rows.h has the shapes.",
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "grad"_a, "element_size"_a, "grad_shape"_a,
        "rows"_a, "num_rows"_a, "kernel"_a, "around"_a, "size"_a, "out"_a, "threads"_a);
#if PECKER_CUDA
  def_masked_adamw(m, "masked_adamw_cuda",
                   "masked_adamw_cpu in CUDA memory, one launch on a stream of the current device. With step_tensor "
                   "(float) or lr_tensor in device memory, another one before it fills the 48 bytes of constants.",
                   checked_step_cuda, "step_tensor"_a = 0, "lr_tensor"_a = 0, "lr_is_double"_a = false,
                   "constants"_a = 0, "stream"_a);
  def_scatter(m, "scatter_cuda", "scatter_cpu in CUDA memory, one launch on a stream of the current device.",
              "stream"_a, checked_scatter_cuda);
  m.def("cuda_probe", cuda_probe, py::call_guard<py::gil_scoped_release>(),
        "Why the CUDA runtime cannot run these kernels on the current device; None if it can.");
#endif
  m.def("build_info", build_info, "What was compiled in and what runs, as a dict.");
  m.def("use_isa", use_isa, "name"_a,
        "Forces avx512, avx2 or scalar CPU kernels; None: the widest supported.");
}
