// Whether the kernels for a GPU can run here at all: their CUDA runtime is linked in, and may be newer than the driver.
#pragma once

namespace pecker {

// What the runtime says when it is asked for a kernel, which launches nothing; null if it has one for this GPU.
const char* cuda_probe();

}  // namespace pecker
