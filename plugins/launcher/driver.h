// Loading PTX and launching it through the CUDA driver, which is found at run time: the library
// can be built and loaded where there is none.
#pragma once

#include "kernel.h"

#include <memory>

namespace tokred {

// A kernel loaded into one CUDA context. Equal code is loaded once a context and unloaded with
// its last user, since the driver would compile each anew.
class LoadedKernel {
public:
    // Into the current context. Throws std::runtime_error, saying which kernel, which GPU, and
    // what the driver said.
    static std::shared_ptr<LoadedKernel const> load(Kernel const& kernel);
    virtual ~LoadedKernel() = default;

    // Puts one launch on the stream and does nothing else, so that a stream may be capturing a
    // CUDA graph; any number of threads may do so. Throws std::runtime_error.
    // ``workspace`` has Kernel::workspace() bytes, aligned to 128; nothing reads it later.
    virtual void launch(Kernel const& kernel, void const* const* inputs, void* const* outputs,
        void* workspace, int64_t batch, void* stream) const = 0;
};

} // namespace tokred
