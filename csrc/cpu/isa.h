// Which build of the span kernels runs: the widest instruction set of this processor, or the one asked for.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "span_kernels.h"

namespace pecker {

const SpanKernels& selected_kernels();
std::string selected_isa();
std::vector<std::string> compiled_isas();  // widest first

// Forces an instruction set for the whole process; nothing: back to the widest. Throws std::invalid_argument
// for a name that is not compiled in or that this processor lacks.
void use_isa(const std::optional<std::string>& name);

}  // namespace pecker
