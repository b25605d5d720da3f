#include "../probe.h"

#include <cuda_runtime.h>

namespace pecker {
namespace {

__global__ void probe_kernel() {}

}  // namespace

const char* cuda_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // else the next launch is blamed for it
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pecker
