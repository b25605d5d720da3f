// Compiled once per instruction set, as span_kernels.cpp is, with the same rules.
#include "reconcile_kernels.h"

#include "span_kernels.h"

namespace pecker {
namespace {

// Calls visit(parameter, dense, element, count) for every stretch of neighbours of [begin, end) that has dense weights.
template <typename Visit>
void for_each_stretch(std::int64_t begin, std::int64_t end, std::int64_t run, const ScatterTable& table,
                      const Visit& visit) {
  for (; run < table.num_runs && table.run_flat_offset[run] < end; ++run) {
    const std::int64_t start = table.run_flat_offset[run], stop = table.run_flat_offset[run + 1];
    const std::int64_t from = start > begin ? start : begin, to = stop < end ? stop : end;
    const std::int32_t parameter = table.run_parameter[run];
    if (table.dense_pointers[parameter] == 0) continue;
    const std::int64_t offset = table.run_dense_offset[run] + (from - start);
    switch (table.dense_dtypes[parameter]) {
      case kFloat32:
        visit(parameter, reinterpret_cast<float*>(table.dense_pointers[parameter]) + offset, from, to - from);
        break;
      case kBfloat16:
        visit(parameter, reinterpret_cast<Bfloat16*>(table.dense_pointers[parameter]) + offset, from, to - from);
        break;
      case kFloat16:
        visit(parameter, reinterpret_cast<Float16*>(table.dense_pointers[parameter]) + offset, from, to - from);
        break;
      default:
        visit(parameter, reinterpret_cast<double*>(table.dense_pointers[parameter]) + offset, from, to - from);
        break;
    }
  }
}

// Keeps the sum of the parameter at hand, so that a thread adds to the shared ones once a parameter.
struct Sums {
  std::uint64_t* shared;
  std::int32_t parameter = -1;
  std::uint64_t sum = 0;

  void add(std::int32_t of, std::uint64_t terms) {
    if (of != parameter) flush();
    parameter = of;
    sum += terms;
  }
  void flush() {
    if (parameter >= 0) __atomic_fetch_add(shared + parameter, sum, __ATOMIC_RELAXED);
    sum = 0;
  }
};

template <typename Dense>
std::uint64_t checksum(const Dense* dense, std::int64_t element, std::int64_t count) {
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += checksum_term(element + i, to_float(dense[i]));
  return sum;
}

template <typename Dense>
bool all_agree(const float* value, const Dense* dense, std::int64_t count) {
  bool differ = false;
  for (std::int64_t i = 0; i < count; ++i) {
    Dense rounded;
    convert(value[i], rounded);
    differ |= !same_bits(rounded, dense[i]);
  }
  return !differ;
}

void checksums(std::int64_t begin, std::int64_t end, std::int64_t run, const ScatterTable& table, std::int64_t base,
               std::uint64_t* sums) {
  Sums found{sums};
  for_each_stretch(begin, end, run, table, [&](std::int32_t parameter, auto* dense, std::int64_t from, std::int64_t n) {
    found.add(parameter, checksum(dense, base + from, n));
  });
  found.flush();
}

// Nearly always all weights agree, which is seen in loops without branches and without a store.
void reconcile(float* value, std::int64_t begin, std::int64_t end, std::int64_t run, const ScatterTable& table,
               const Reconciliation& which, std::int64_t base, std::uint64_t* sums) {
  Sums found{sums};
  for_each_stretch(begin, end, run, table, [&](std::int32_t parameter, auto* dense, std::int64_t from, std::int64_t n) {
    if (all_agree(value + from, dense, n)) return found.add(parameter, checksum(dense, base + from, n));
    std::uint64_t sum = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      sum += reconcile_weight(base + from + i, value[from + i], dense[i], which.written[parameter], which.follow);
    }
    found.add(parameter, sum);
  });
  found.flush();
}

}  // namespace

const ReconcileKernels PECKER_ISA::reconcile_kernels = {checksums, reconcile};

}  // namespace pecker
