// The Python module vpfast._C. Importing it registers the compiled operators with PyTorch; its few functions say what
// was compiled and let tests choose an instruction set. It includes no torch header on purpose: see setup.py.

#include <pybind11/pybind11.h>

#include "common/isa.h"
#if defined(VPFAST_WITH_CUDA)
#include "common/cuda_probe.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#if defined(VPFAST_WITH_CUDA)
  info["cuda"] = vpfast::cuda_version();
  info["cuda_architectures"] = VPFAST_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
#if defined(VPFAST_INSTRUMENT)
  info["instrument"] = VPFAST_INSTRUMENT;
#else
  info["instrument"] = "";
#endif
  return info;
}

py::dict cpu_features() {
  py::dict features;
  for (const auto& [name, found] : vpfast::cpu_features()) features[name.c_str()] = found;
  return features;
}

// "ok", or why no kernel of this build runs on the GPU of this machine.
std::string cuda_probe() {
#if defined(VPFAST_WITH_CUDA)
  return vpfast::cuda_probe();
#else
  return "built without CUDA";
#endif
}

// The latest CUDA that the driver of this machine knows, as "13.0".
std::string cuda_of_driver() {
#if defined(VPFAST_WITH_CUDA)
  return vpfast::cuda_of_driver();
#else
  return "0.0";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of vpfast. Everything here is private; use vpfast.ops.";
  m.def("build_info", &build_info, "What this extension was compiled with.");
  m.def("cpu_features", &cpu_features, "Processor features that the choice of kernels depends on.");
  m.def(
      "isa", [] { return vpfast::active_isa_name(); },
      "The instruction set in use: 'plain', 'avx2', 'avx512', or 'amx', which is avx512 with matrix tiles.");
  m.def("bfloat16_is_active", &vpfast::bfloat16_is_active, "Whether kernels take dot products of bfloat16.");
  m.def("select_isa", &vpfast::select_isa, py::arg("name"), "Use another one ('auto' for the best); meant for tests.");
  m.def("cuda_of_driver", &cuda_of_driver, "The latest CUDA that the driver knows, as '13.0'; '0.0' without one.");
  m.def("cuda_probe", &cuda_probe, "Run one small kernel on the current GPU: 'ok', or the reason it failed.");
}
