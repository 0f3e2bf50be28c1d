// Does a kernel of this build run on the GPU of this machine? `vpfast doctor` asks.
#pragma once

#include <string>

namespace vpfast {

// The CUDA runtime linked in, as "13.0".
std::string cuda_version();

// The latest CUDA that the driver knows; "0.0" without one. It runs all that is of its major version.
std::string cuda_of_driver();

// "ok", or the CUDA error's own words: no driver, no GPU, or a GPU that the build holds no code for.
std::string cuda_probe();

}  // namespace vpfast
